"""What Lightning trains: the model, its tasks, and how their losses become one."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mtl.augmentation.draws import Draws
from mtl.config import Experiment
from mtl.data.sample import Batch, DataInfo, as_floats
from mtl.ensembling.soups import Restarts, warm_restarts
from mtl.models.multitask import MultiTaskModel
from mtl.models.statistics import kept_statistics
from mtl.plugins import in_plugin_of
from mtl.regularization.implicit import gradients_of_loss
from mtl.regularization.noise import jittered_depth
from mtl.tasks.base import Task, ranks
from mtl.training.balancing import Cut, LossBalancer
from mtl.training.regularizing import Regularizer
from mtl.transfer.groups import parameter_groups

LOG_EVERY = 10
"""Optimizer steps between two rows of training losses."""

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


class Views(Protocol):
    """What can answer in a module's place."""

    def soft(self, image: Tensor) -> dict[str, Tensor]:
        """Return what each task's prediction is made of (`Task.soft`), for images (B, 3, H, W) in [0, 1]."""


class MultiTaskModule(lightning.LightningModule):
    """One training step, one validation pass, and the optimizer.

    Args:
        model: Backbone and heads.
        tasks: The tasks, in the order in which they are reported.
        balancer: From losses to one backward pass.
        options: Optimizer, schedule and the like; all of it is stored in checkpoints.
        total_steps: Optimizer steps of the fit, for the schedule.
        info: What is known of the data, stored in checkpoints.
        augmentation: A random change of training batches on the device, a function of the batch and its `draw`.

    Attributes:
        thawed_at: Epochs and optimizer steps done when the backbone thawed, or None.
        terms: What there is to record of the last step: raw losses and weights by task, and how gradients meet.
        results: The last validation's metrics by full name.
        constant: The same metrics of each task's constant prediction, once a validation has seen its labels.
        views: What answers in this module's place in validation, such as an average over views of each image.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Iterable[Task],
        balancer: LossBalancer,
        options: Experiment,
        total_steps: int,
        info: DataInfo,
        augmentation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = nn.ModuleDict({task.name: task for task in tasks})
        self.balancer = balancer
        # What the balancer learns is computed on every rank from the same numbers, on the host.
        self._ddp_params_and_buffers_to_ignore = [f"balancer.{name}" for name in balancer.state_dict()]
        self.options = options
        learning = nn.ModuleList([self.model, self.tasks])
        self.regularizer = Regularizer(options.regularize, learning, self.model.backbone, options.seed)
        self.total_steps = total_steps
        self.info = info
        self.augmentation = augmentation
        self.thawed_at: tuple[int, int] | None = None
        self.measured = nn.ModuleDict({task.name: task.metrics() for task in self.each_task()})
        self.baseline = nn.ModuleDict({task.name: task.metrics() for task in self.each_task()})
        self.views: Views | None = None
        self.terms: dict[str, float] = {}
        self._again: _Again | None = None
        self.results: dict[str, float] = {}
        self.constant: dict[str, float] = {}

    def thaw(self, total_steps: int, epoch: int, step: int) -> None:
        """Let the whole backbone learn, in a fit that is about to begin.

        Args:
            total_steps: Optimizer steps of that fit.
            epoch: Epochs done before.
            step: Optimizer steps done before.
        """
        self.model.backbone.thaw()
        if self.model.masked is not None:
            self.model.masked.requires_grad_(True)
        self.model.train()
        self.total_steps = total_steps
        self.thawed_at = (epoch, step)

    def on_fit_start(self) -> None:
        """Tell what regularizes which weights learn, and where they start."""
        self.regularizer.begin()
        # The same on every rank, as the weights themselves are.
        names = [name for name, _ in self.regularizer.named_buffers(prefix="regularizer")]
        self._ddp_params_and_buffers_to_ignore += names

    def forget_masked(self) -> None:
        """Drop the task of predicting hidden patches, if there is one."""
        if self.model.masked is not None:
            self.model.masked = None
            for tasks in (self.tasks, self.measured, self.baseline):
                del tasks["masked"]

    def each_task(self) -> Iterable[Task]:
        """Yield the tasks in order."""
        return (cast(Task, task) for task in self.tasks.values())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the prediction of each task with a head, in its own form and unit, for images (B, 3, H, W).

        Signals are (B, 1, T).
        """
        outputs = self.model(image)
        return {
            task.name: _said(task, "predict", outputs[task.name]) for task in self.each_task() if task.name in outputs
        }

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        """Return each task's prediction for a batch; of what is hidden, with the masks of the first epoch."""
        return self._answers(batch, dict.fromkeys(self.tasks, "predict"))

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(batch[self.info.input]) if len(self.model.heads) else {}
        if self.model.masked is not None:
            outputs["masked"] = self._reconstruct(batch, None)
        return outputs

    def _answers(self, batch: Batch, kinds: Mapping[str, str]) -> dict[str, Tensor]:
        """Return what each task's method of that name makes of a batch: its `predict`, or its `soft`."""
        if self.views is not None:
            soft = self.views.soft(batch[self.info.input])
            each = ((task, soft[task.name]) for task in self.each_task())
            return {task.name: one if kinds[task.name] == "soft" else _said(task, "harden", one) for task, one in each}
        outputs = self._outputs(batch)
        return {task.name: _said(task, kinds[task.name], outputs[task.name]) for task in self.each_task()}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn stored types into those to compute with, once the batch is on the device, and augment in training."""
        batch = as_floats(batch)
        if self.training and self.augmentation is not None:
            batch = self.augmentation(batch)
        if self.training and (sigma := self.options.regularize.depth_jitter):
            draws = Draws(self.options.seed, batch["draw"][0, 0], batch["draw"][:, 1])
            batch = {**batch, "depth": jittered_depth(batch["depth"], sigma, draws)}
        layout = torch.channels_last if self._channels_last() else torch.contiguous_format
        given = self.info.input
        batch[given] = batch[given].to(self.dtype).contiguous(memory_format=layout)
        return batch

    def _channels_last(self) -> bool:
        weight = next((p for p in self.model.parameters() if p.dim() == 4 and p.shape[1] > 1), None)
        return weight is not None and weight.is_contiguous(memory_format=torch.channels_last)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the tasks' losses, regularized.

        Its backward pass delivers what the weighting makes of it, and what regularizes.
        """
        step, scale, generators = self.global_step, self._loss_scale(), Generators(self.device)
        if self.balancer.rule.needs_second_forward and self.balancer.asks(step):
            self._again = _Again(step, batch, generators)
        with self.regularizer.noise(step):
            shared = self.model.before_features()
            cut = self.balancer.cut(shared, step, measure=(step + 1) % LOG_EVERY == 0)
            losses = self._losses(batch, cut)
            labelled = {task.name: task.labelled(batch) for task in self.each_task()}
            balance = self.balancer(losses, labelled, self._own(shared), cut, step, scale)
            again = partial(self._gradients_again, batch, generators, scale)
            followed = self.regularizer(balance.total, again, step, last=self._steps_after(batch_idx), scale=scale)
        penalized = self.regularizer.penalize(followed.total)
        self.terms = balance.terms
        if added := followed.terms | penalized.terms:
            values = dict(zip(added, torch.stack([term.float() for term in added.values()]).tolist(), strict=True))
            self.terms = self.terms | {f"train/penalty/{name}": value for name, value in values.items()}
            self.terms["train/loss"] += sum(values.values())
        return penalized.total if balance.objective is None else penalized.total + balance.objective

    def _steps_after(self, batch_idx: int) -> bool:
        """Return whether the optimizer makes its step after a batch."""
        ends = self._trainer is not None and self.trainer.is_last_batch
        return ends or (batch_idx + 1) % self.options.accumulate == 0

    def _own(self, shared: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        """Return by task what learns of its head and of the task itself."""
        before = set(map(id, shared))
        return {
            task.name: [
                p
                for part in (self.model.head(task.name), task)
                for p in part.parameters()
                if p.requires_grad and id(p) not in before
            ]
            for task in self.each_task()
        }

    def _gradients_again(self, batch: Batch, generators: "Generators", scale: Tensor | None) -> list[Tensor]:
        """Return the gradient of a batch's loss at the weights there are now, with all else as it was.

        With the same random choices and the same weights of the tasks, and without a trace in running statistics.
        """
        with generators.replayed(), kept_statistics(self.model):
            shared = self.model.before_features()
            cut = self.balancer.held_cut(shared)
            total = self.balancer.held_total(self._losses(batch, cut), self._own(shared), cut, scale)
            return gradients_of_loss(total, self.regularizer.learns, scale)

    def _losses(self, batch: Batch, cut: Cut | None) -> dict[str, Tensor]:
        given, outputs = batch[self.info.input], {}
        if len(self.model.heads):
            features = self.model.encode(given)
            if cut is not None:
                features = cut.through(features)
            outputs = self.model.decode(features, given.shape[2:])
        if self.model.masked is not None:
            outputs["masked"] = self._reconstruct(batch, cut)
        losses: dict[str, Tensor] = {}
        for task in self.each_task():
            with in_plugin_of(task, "loss"):
                losses[task.name] = task.loss(outputs[task.name], batch)
        return losses

    def _reconstruct(self, batch: Batch, cut: Cut | None) -> Tensor:
        """Hide patches of a batch's images and return what the masked head makes of the rest."""
        head, image = self.model.masked, batch["image"]
        assert head is not None
        epoch, position = batch["draw"][0, 0], batch["draw"][:, 1]
        draws = Draws(self.options.seed, epoch if self.training else 0, position)
        mask = head.draw(draws, (image.shape[-2], image.shape[-1]))
        features = self.model.encode_masked(image, mask)
        if cut is not None:
            features = cut.through(features)
        outputs: Tensor = head(features, mask)
        if ranks() == 1:
            return outputs
        # Of what only fills a batch up, nothing counts as hidden.
        return torch.cat([outputs[:, :3], outputs[:, 3:] * (position >= 0).view(-1, 1, 1, 1)], dim=1)

    def _loss_scale(self) -> Tensor | None:
        """Return what half precision multiplies losses by, if it does."""
        scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the step; then, for a rule that asks for it, see what it has done to the losses of the same batch."""
        super().optimizer_step(*args, **kwargs)
        self.look_again(self.trainer.precision_plugin.train_step_context())

    def look_again(self, precision: AbstractContextManager[None]) -> None:
        """Show the rule, if it asks for that, the losses of the batch that it was last asked with.

        Args:
            precision: In which the training step was computed.
        """
        again, self._again = self._again, None
        if again is None or self.balancer.asked_at != again.step:
            return
        # As the first time: the same random choices, and nothing of the batch counted twice in running statistics.
        kept = [buffer.clone() for buffer in self.model.buffers()]
        with again.generators.replayed(), self.regularizer.noise(again.step), torch.no_grad(), precision:
            losses = self._losses(again.batch, None)
        for buffer, before in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(before)
        self.balancer.look_again(losses)

    def on_train_epoch_end(self) -> None:
        """Tell the weighting rule."""
        with in_plugin_of(self.balancer.rule, "end_epoch"):
            self.balancer.rule.end_epoch()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure predictions, and at the first validation constant predictions too."""
        answers = self._answers(batch, {task.name: task.metrics_from for task in self.each_task()})
        for task in self.each_task():
            target = batch[task.target]
            with in_plugin_of(task, "metrics' update"):
                _metric(self.measured, task).update(answers[task.name], target)
                if not self.constant:
                    _metric(self.baseline, task).update(task.beside(answers[task.name], target), target)

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics, and the gain that stands for all tasks."""
        if not self.constant:
            self.constant = self._compute(self.baseline)
        self.results = self._compute(self.measured)
        self.results["gain"] = gain(self.each_task(), self.results, self.constant)
        self.log_dict(self.results, logger=False)

    def _compute(self, metrics: nn.ModuleDict) -> dict[str, float]:
        results: dict[str, float] = {}
        for task in self.each_task():
            metric = _metric(metrics, task)
            with in_plugin_of(task, "metrics' compute"):
                results |= {f"{task.name}/{name}": float(value) for name, value in metric.compute().items()}
            metric.reset()
        return results

    def configure_optimizers(self) -> Any:
        """Return the optimizer of all that may learn, and its schedule."""
        options = self.options
        kwargs: dict[str, Any] = {"lr": options.lr}
        if options.optimizer == "sgd":
            kwargs["momentum"] = 0.9 if options.momentum is None else options.momentum
        elif options.optimizer == "rmsprop":
            kwargs["momentum"] = options.momentum or 0.0
        learning = nn.ModuleList([self.model, self.tasks])
        groups = parameter_groups(learning, options.weight_decay, options.lr, options.backbone_lr, options.layer_decay)
        if weights := list(self.balancer.parameters()):
            # By themselves: beside parameters on the host, torch would update those of a GPU one by one.
            groups.append({"name": "weighting", "params": weights, "lr": options.lr, "weight_decay": 0.0})
        optimizer = _OPTIMIZERS[options.optimizer](groups, **kwargs)
        restarts = self.restarts()
        scale = schedule(options.schedule, self.total_steps, options.warmup) if restarts is None else restarts.factor
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def restarts(self) -> Restarts | None:
        """Return the schedule of a fit whose learning rate falls several times, if it does: the last one's."""
        snapshots = self.options.snapshots
        if snapshots is None or (self.options.unfreeze_at is not None and self.thawed_at is None):
            return None
        return schedule_with_restarts(self.total_steps, self.options.warmup, snapshots)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what was trained, and keep what only the first validation measures."""
        checkpoint["experiment"] = self.options.model_dump(mode="json")
        checkpoint["data"] = dataclasses.asdict(self.info)
        checkpoint["thawed_at"] = self.thawed_at
        checkpoint["constant"] = self.constant
        if starts := self.regularizer.starts():
            checkpoint["starts"] = {name: start.clone() for name, start in starts.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what only the first validation measures, and where weights started."""
        self.constant = checkpoint["constant"]
        self.regularizer.start_at(checkpoint.get("starts", {}))


class _Again(NamedTuple):
    """A batch that is to be looked at again after the optimizer step, and the generators as they were before it."""

    step: int
    batch: Batch
    generators: "Generators"


class Generators:
    """The states that torch's generators have now.

    Args:
        device: Whose generator, beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw once more what was drawn from here on, and leave the generators as they are."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.host)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def _metric(metrics: nn.ModuleDict, task: Task) -> Metric:
    return cast(Metric, metrics[task.name])


def _said(task: Task, method: str, outputs: Tensor) -> Tensor:
    """Return what one of a task's methods makes of its head's outputs, or of a mean."""
    with in_plugin_of(task, method):
        said: Tensor = getattr(task, method)(outputs)
    return said


def gain(tasks: Iterable[Task], results: Mapping[str, float], constant: Mapping[str, float]) -> float:
    """Return the mean over tasks of the share of a constant prediction's error that the model removes.

    1 is perfect, 0 no better than a constant. A task whose labels the validation set lacks is left out.
    """
    shares = []
    for task in tasks:
        error, reference = (
            task.remaining_error({name.removeprefix(task.name + "/"): v for name, v in values.items()})
            for values in (results, constant)
        )
        share = 1 - error / reference if reference else math.nan
        if math.isfinite(share):
            shares.append(share)
    return sum(shares) / len(shares) if shares else math.nan


def schedule(kind: str, total_steps: int, warmup: int | None) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the optimizer step.

    Linear warm-up from 1 / (warmup + 1), then constant, linear to zero, or half a cosine to zero (Loshchilov and
    Hutter, 2017, without restarts).

    Args:
        kind: 'constant', 'linear' or 'cosine'.
        total_steps: Steps of the whole training.
        warmup: Steps of warm-up; None is a twentieth of all.
    """
    rising = warmup_steps(total_steps, warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1, total_steps - rising))
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]

    return factor


def schedule_with_restarts(total_steps: int, warmup: int | None, cycles: int) -> Restarts:
    """Return a learning rate that falls along half a cosine several times, after the warm-up, and where each fall ends.

    Args:
        total_steps: Steps of the whole training.
        warmup: As of `schedule`.
        cycles: How often it falls.

    Raises:
        UserError: There are not as many steps.
    """
    rising = warmup_steps(total_steps, warmup)
    falls = warm_restarts(total_steps - rising, cycles)

    def factor(step: int) -> float:
        return (step + 1) / (rising + 1) if step < rising else falls.factor(step - rising)

    return Restarts(factor, tuple(rising + end for end in falls.ends))


def warmup_steps(total_steps: int, warmup: int | None) -> int:
    """Return how many steps of warm-up a training has, by default a twentieth."""
    return total_steps // 20 if warmup is None else warmup
