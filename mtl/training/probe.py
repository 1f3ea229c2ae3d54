"""What a linear layer reads from a backbone's features, tried while the backbone still learns."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

from mtl.data.loading import Key, Samples
from mtl.data.sample import Batch, as_floats
from mtl.models.backbone import Backbone
from mtl.plugins import in_plugin_of
from mtl.pretraining.masks import extend
from mtl.tasks.base import Task
from mtl.training.module import MultiTaskModule, schedule

LEARNT, MEASURED = 256, 128
"""The most images to learn from, and to measure, for a task."""

KEPT = 2**27
"""The most numbers of features to keep: half a gibibyte in single precision."""

_STRIDE = 4
"""Stride of the finest map that is read, and of the pixels whose labels are learnt from."""

_BATCH = 16
"""Images that pass the backbone together, and that make a step."""

_RATE = 0.1
"""Learning rate times the root of the number of channels, so that a step moves outputs as far whatever their number."""

_EPSILON = 1e-6
"""What is added to a channel's variance before features are divided by its root, as in MAE."""


class LinearProbe:
    """A linear head for each task, trained on a backbone's frozen features, and measured on other images.

    The features of a pixel are those of all maps of stride 4 and coarser, each channel standardised over the training
    images (as in the linear probe of MAE, He et al. 2022, section A.2: a BatchNorm without affine parameters), and
    concatenated. The head is one linear layer, upsampled bilinearly to the labels' size. As a linear layer and
    bilinear resizing can change places, each map is read at its own size; what was read is resized to stride 4, and
    summed.

    It learns by AdamW in single precision from the task's own loss, of the labels of one pixel in 4 x 4, beginning
    with weights of zero and the task's initial bias. The backbone stays as it is, with its modes, and so do torch's
    generators and the tasks, copies of which learn. All that is random follows from the seed.

    Of each task's images with labels, at most 256 are learnt from and 128 measured, spread evenly. They are fewer to
    learn from where their features would be more than 2^27 numbers (ViT-B/16: beyond 222 images of 224 x 224).

    Where several processes train together, each of them must call it with the same: losses and metrics wait for one
    another.

    Args:
        tasks: What to read; a task that lacks labels in either split is left out.
        training: What to learn from, without its augmentation.
        validation: What to measure.
        steps: Steps of training.
        seed: Seed of the images' order.
    """

    def __init__(
        self, tasks: Sequence[Task], training: Samples, validation: Samples, steps: int = 200, seed: int = 0
    ) -> None:
        self.tasks, self.steps, self.seed = list(tasks), steps, seed
        self.training = _some_of(training, self.tasks, LEARNT)
        self.validation = _some_of(validation, self.tasks, MEASURED)

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """Return each task's main metric, by the name ``probe/TASK/METRIC``."""
        # Validation runs in inference mode, whose tensors nothing can be learnt from.
        with torch.inference_mode(False), torch.no_grad(), _left_as_it_is(backbone):
            for samples in (self.training, self.validation):
                if samples.stored is None and len(samples):
                    samples.keep("memory")
            # Tasks with labels of the same images share their features.
            groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Task]] = {}
            for task in self.tasks:
                learnt = _labelled(self.training, task.target, LEARNT)
                measured = _labelled(self.validation, task.target, MEASURED)
                if learnt and measured:
                    groups.setdefault((learnt, measured), []).append(copy.deepcopy(task).float())
            results: dict[str, float] = {}
            for (learnt, measured), tasks in groups.items():
                statistics, heads = self._learn(backbone, learnt, tasks)
                results |= self._measure(backbone, measured, statistics, heads)
        return results

    def _learn(
        self, backbone: Backbone, rows: Sequence[int], tasks: Sequence[Task]
    ) -> tuple[list["_Statistics"], list["_Head"]]:
        """Return the features' statistics, and a head for each task that has a valid pixel in these samples."""
        features, labels, grid = _gather(backbone, self.training, rows, {task.target for task in tasks})
        statistics = [_Statistics(*torch.var_mean(kept, (0, 2, 3), correction=0)) for kept in features]
        heads = []
        for task in tasks:
            target = labels[task.target]
            if task.labelled({task.target: target}):
                with in_plugin_of(task, "observe"):
                    task.observe(torch.split(target.cpu(), _BATCH))
                heads.append(_Head(task, [kept.shape[1] for kept in features]).to(target.device))
        if not heads:
            return statistics, heads
        rate = _RATE / math.sqrt(sum(kept.shape[1] for kept in features))
        optimizer = torch.optim.AdamW(nn.ModuleList(heads).parameters(), rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("cosine", self.steps, None))
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            chosen = torch.randperm(len(features[0]), generator=generator)[:_BATCH].to(features[0].device)
            maps = _standardised([kept[chosen] for kept in features], statistics)
            with torch.enable_grad():
                torch.autograd.backward(
                    [head.loss(head(maps, grid), labels[head.task.target][chosen]) for head in heads]
                )
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return statistics, heads

    def _measure(
        self, backbone: Backbone, rows: Sequence[int], statistics: Sequence["_Statistics"], heads: Sequence["_Head"]
    ) -> dict[str, float]:
        """Return the heads' main metrics on samples, at the labels' full size."""
        metrics = [head.task.metrics().to(backbone.mean.device) for head in heads]
        for batch in _read(self.validation, rows, backbone.mean.device):
            height, width = batch["image"].shape[-2:]
            image = extend(batch["image"], backbone.stride)
            maps = _standardised(_features(backbone, image), statistics)
            for head, metric in zip(heads, metrics, strict=True):
                outputs = _resized(head(maps, _grid(image)), (image.shape[-2], image.shape[-1]))[..., :height, :width]
                with in_plugin_of(head.task, "predict"):
                    prediction = head.task.predict(outputs)
                with in_plugin_of(head.task, "metrics' update"):
                    metric.update(prediction, batch[head.task.target])
        results: dict[str, float] = {}
        for head, metric in zip(heads, metrics, strict=True):
            name = head.task.main_metric
            with in_plugin_of(head.task, "metrics' compute"):
                results[f"probe/{head.task.name}/{name}"] = float(metric.compute()[name])
        return results


class OnlineProbe(Callback):
    """Record what a probe measures: before the first step, after every so many epochs, and after the last one planned.

    A validation's end is where it acts, on the weights that are validated. Every rank probes and one of them records.

    Args:
        probe: The probe.
        every: Epochs from one to the next.
    """

    def __init__(self, probe: LinearProbe, every: int) -> None:
        self.probe, self.every = probe, every
        self._epochs = 0
        self._step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure what training begins with."""
        if trainer.global_step == 0:
            self._record(trainer, pl_module)

    # Before `on_validation_end`, where averaged weights go.
    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure, if it is time."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        finished = trainer.current_epoch + int(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        last = trainer.should_stop or finished == trainer.max_epochs
        if last or finished // self.every > self._epochs // self.every:
            self._record(trainer, pl_module)
        self._epochs = finished

    def _record(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, MultiTaskModule) and isinstance(pl_module.model.backbone, Backbone)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        row = {"epoch": float(trainer.current_epoch), **self.probe(pl_module.model.backbone)}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured last, for a run that is resumed."""
        return {"epochs": self._epochs, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was measured last."""
        self._epochs, self._step = state_dict["epochs"], state_dict["step"]


class _Statistics(NamedTuple):
    """Of each channel of a map, (C,) both."""

    variance: Tensor
    mean: Tensor


class _Head(nn.Module):
    """A linear layer on standardised maps, and the copy of a task that it learns for.

    Args:
        task: The task, after `observe`.
        channels: Of each map.
    """

    def __init__(self, task: Task, channels: Sequence[int]) -> None:
        super().__init__()
        self.task = task
        self.weights = nn.ParameterList(torch.zeros(task.channels, count, 1, 1) for count in channels)
        self.bias = nn.Parameter(task.initial_bias().float()[:, None, None])

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Return outputs (B, C, h, w) on a grid (h, w)."""
        outputs: Tensor = self.bias
        for features, weight in zip(maps, self.weights, strict=True):
            outputs = outputs + _resized(functional.conv2d(features, weight), grid)
        return outputs

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the task's loss, for outputs of which some at the right and lower edges have no label."""
        with in_plugin_of(self.task, "loss"):
            return self.task.loss(outputs[..., : target.shape[-2], : target.shape[-1]], {self.task.target: target})


def _some_of(samples: Samples, tasks: Sequence[Task], limit: int) -> Samples:
    """Return those samples, as the source has them, that any of the tasks is to have."""
    targets = list(dict.fromkeys(task.target for task in tasks))
    rows = sorted({row for target in targets for row in _labelled(samples, target, limit)})
    return Samples(samples.source, [samples.indices[row] for row in rows], targets, hidden=samples.hidden)


def _labelled(samples: Samples, target: str, limit: int) -> tuple[int, ...]:
    """Return rows of samples with a label to use, spread evenly, at most so many."""
    rows = np.flatnonzero(samples.has(target))
    return tuple(rows[_spread(len(rows), limit)].tolist())


def _spread(length: int, limit: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(limit, length)).round().astype(int)


def _read(samples: Samples, rows: Sequence[int], device: torch.device) -> Iterator[Batch]:
    """Yield samples in batches of floats."""
    for chunk in (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)):
        batch = samples.__getitems__([Key(row, 0, position) for position, row in enumerate(chunk)])
        yield as_floats({name: values.to(device) for name, values in batch.items()})


def _gather(
    backbone: Backbone, samples: Samples, rows: Sequence[int], targets: set[str]
) -> tuple[list[Tensor], Batch, tuple[int, int]]:
    """Return samples' features by map (N, C, h, w), labels, and the grid that the labels lie on.

    There are as many of the samples, spread evenly, as memory is to hold features of.
    """
    device = backbone.mean.device
    image = extend(next(_read(samples, rows[:1], device))["image"], backbone.stride)
    one = _features(backbone, image)
    fitting = max(1, KEPT // sum(features.numel() for features in one))
    rows = [rows[number] for number in _spread(len(rows), fitting)]
    kept = [features.new_empty(len(rows), *features.shape[1:]) for features in one]
    labels: dict[str, list[Tensor]] = {target: [] for target in targets}
    for number, batch in enumerate(_read(samples, rows, device)):
        place = slice(number * _BATCH, (number + 1) * _BATCH)
        for store, features in zip(kept, _features(backbone, extend(batch["image"], backbone.stride)), strict=True):
            store[place] = features
        for target in targets:
            labels[target].append(batch[target][..., _STRIDE // 2 :: _STRIDE, _STRIDE // 2 :: _STRIDE])
    return kept, {target: torch.cat(chunks) for target, chunks in labels.items()}, _grid(image)


def _grid(image: Tensor) -> tuple[int, int]:
    return image.shape[-2] // _STRIDE, image.shape[-1] // _STRIDE


def _resized(outputs: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(outputs, size, mode="bilinear", align_corners=False)


def _features(backbone: Backbone, image: Tensor) -> list[Tensor]:
    """Return the maps of stride 4 and coarser in single precision."""
    # Not by calling it: compiled, it would be compiled once more for these batches.
    maps = backbone.forward(image.to(backbone.mean.dtype)).maps
    pairs = zip(maps, backbone.strides, strict=True)
    return [features.float() for features, stride in pairs if stride >= _STRIDE and features.shape[1]]


def _standardised(maps: Sequence[Tensor], statistics: Sequence[_Statistics]) -> list[Tensor]:
    return [
        functional.batch_norm(features, mean, variance, eps=_EPSILON)
        for features, (variance, mean) in zip(maps, statistics, strict=True)
    ]


@contextmanager
def _left_as_it_is(backbone: Backbone) -> Iterator[None]:
    """Put a backbone in evaluation mode, and afterwards it and torch's generators back in their states."""
    device = backbone.mean.device
    modes = [(module, module.training) for module in backbone.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        backbone.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
