"""What happens around the steps: averaging, recording, and checkpoints that training can go on from."""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, RichProgressBar
from lightning.pytorch.loops.progress import _ProcessedTracker as ProcessedTracker
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mtl.ensembling.soups import StochasticAverage, reestimate
from mtl.training.history import History
from mtl.training.module import LOG_EVERY, MultiTaskModule


class ProgressBar(RichProgressBar):
    """Lightning's bar with the loss and the last validation's gain beside it."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what to show beside the bar."""
        assert isinstance(pl_module, MultiTaskModule)
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if trainer.training and "train/loss" in pl_module.terms:
            shown["loss"] = f"{pl_module.terms['train/loss']:.3f}"
        if "gain" in pl_module.results:
            shown["gain"] = f"{pl_module.results['gain']:.3f}"
        return shown


class AveragedWeights(Callback):
    """Validate and keep an average of the weights that learn along the training.

    A frozen backbone is not copied. The checkpoints' weights are the average; the raw weights travel in this
    callback's state, for training to go on.

    Args:
        make: From what learns to the average, which is updated after each optimizer step with the number of steps that
            this fit has done: timm's ModelEmaV3, or a `StochasticAverage`.
        start: Optimizer steps done before this fit.
        inputs: Batches as models take them, over which batch norms of a `StochasticAverage` measure their statistics
            before each validation; of an exponential average, which follows the weights closely, the average of the
            statistics will do.
    """

    def __init__(
        self,
        make: Callable[[nn.Module], ModelEmaV3 | StochasticAverage],
        start: int = 0,
        inputs: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        self.make, self.start, self.inputs = make, start, inputs
        self.average: ModelEmaV3 | StochasticAverage | None = None
        self._raw: dict[str, Tensor] = {}
        self._steps = start

    @staticmethod
    def _learning(module: MultiTaskModule) -> nn.Module:
        return module.model.heads if module.model.backbone.frozen else module.model

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the average at the weights that training starts from."""
        assert isinstance(pl_module, MultiTaskModule)
        learning = self._learning(pl_module)
        self.average = self.make(learning)
        if self._raw:
            # Resumed: the checkpoint's weights, just loaded, are the average.
            learning.load_state_dict(self._raw)
            self._raw = {}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the average after each optimizer step."""
        assert isinstance(pl_module, MultiTaskModule) and self.average is not None
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.average.update(self._learning(pl_module), step=self._steps - self.start)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in the model's place."""
        if self.average is None:
            return
        self._swap(pl_module)
        if self.inputs is not None and isinstance(self.average, StochasticAverage) and self.average.n_averaged > 0:
            assert isinstance(pl_module, MultiTaskModule)
            reestimate(pl_module.model, self.inputs())

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the raw weights back."""
        if self.average is not None:
            self._swap(pl_module)

    def _swap(self, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, MultiTaskModule) and self.average is not None
        state = self._learning(pl_module).state_dict()
        for name, averaged in self.average.module.state_dict().items():
            raw = state[name].clone()
            state[name].copy_(averaged)
            averaged.copy_(raw)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the weights, and the raw weights beside it."""
        assert isinstance(pl_module, MultiTaskModule) and self.average is not None
        prefix = "model.heads." if pl_module.model.backbone.frozen else "model."
        checkpoint["average"] = {
            "steps": self._steps,
            "raw": {k: v.clone() for k, v in self._learning(pl_module).state_dict().items()},
        }
        for name, averaged in self.average.module.state_dict().items():
            checkpoint["state_dict"][prefix + name] = averaged.clone()

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the raw weights where training stopped."""
        self._steps = checkpoint["average"]["steps"]
        self._raw = checkpoint["average"]["raw"]


class Recorder(Callback):
    """Write what was measured into the history and every other logger.

    Args:
        history: The run's table.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self._recorded = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop what a resumed run measured after the checkpoint it goes on from."""
        self._recorded = trainer.global_step
        self.history.cut(trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Record the losses now and then."""
        assert isinstance(pl_module, MultiTaskModule)
        step = trainer.global_step
        if step == self._recorded:
            return
        self._recorded = step
        values = pl_module.regularizer.measured
        if step % LOG_EVERY == 0:
            values = values | pl_module.terms | {"train/lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if values:
            self._log(trainer, values)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the metrics."""
        assert isinstance(pl_module, MultiTaskModule)
        self._log(trainer, pl_module.results)
        self.history.save()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the table a last time."""
        self.history.save()

    @staticmethod
    def _log(trainer: lightning.Trainer, values: dict[str, float]) -> None:
        row = {"epoch": float(trainer.current_epoch), **values}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)


class ResumePoint(Checkpoint):
    """Keep `last.ckpt`, from which training goes on as if it had never stopped.

    Beside what Lightning keeps it holds the states of all random generators. A checkpoint between two epochs'
    ends is made after the step's measurements, and not at a step that a validation follows: that one is made
    after the validation, so that no measurement is lost between the two.

    Args:
        path: The file.
        every: Optimizer steps between checkpoints, or None for one after each epoch.
        history: The run's table, written before each checkpoint so that it is never behind it.
    """

    def __init__(self, path: str, every: int | None, history: History) -> None:
        self.path, self.every, self.history = path, every, history
        self._generators: dict[str, Any] | None = None
        self._saved = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save nothing before the first step: of gradients half accumulated a checkpoint knows nothing."""
        self._saved = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Restore the generators right before the first step, when nothing else will draw from them."""
        if self._generators is not None:
            restore_generators(self._generators, trainer.global_rank, trainer.global_step)
            self._generators = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save every so many steps."""
        loop = trainer.fit_loop.epoch_loop
        due = self.every and trainer.global_step % self.every == 0 and not loop.batch_progress.is_last_batch
        if due and not self._validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after a validation in the middle of an epoch."""
        loop = trainer.fit_loop.epoch_loop
        if self.every and not loop.batch_progress.is_last_batch and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after each epoch."""
        self._save(trainer)

    @staticmethod
    def _validation_follows(trainer: lightning.Trainer) -> bool:
        every = trainer.val_check_batch
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return trainer.should_stop or (isinstance(every, int) and batches % every == 0)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved:
            self._saved = trainer.global_step
            self.history.save()
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the generators' states."""
        checkpoint["generators"] = generator_states()

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember them until the first step."""
        self._generators = checkpoint["generators"]


class Snapshots(Callback):
    """Keep the weights at certain steps, as `snapshot-1.ckpt` and on: the members of a snapshot ensemble.

    Each file is a checkpoint to evaluate and predict with, as `best.ckpt` is, but not to go on from; its weights are
    those that learn, and no average of them.

    Args:
        folder: Where.
        steps: After how many optimizer steps each is kept.
    """

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, tuple(steps)
        self._saved = -1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save after the last step of a cycle."""
        step = trainer.global_step
        if step in self.steps and step != self._saved:
            self._saved = step
            path = self.folder / f"snapshot-{self.steps.index(step) + 1}.ckpt"
            trainer.save_checkpoint(path, weights_only=True)


class StopAfter(Callback):
    """Stop after so many optimizer steps, with a validation, which Lightning's own max_steps leaves out.

    Args:
        steps: The number of steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Tell the trainer at the last step."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def count_from(trainer: lightning.Trainer, epoch: int, step: int) -> None:
    """Let a trainer that has not begun count epochs and optimizer steps from those of an earlier fit.

    Everything that depends on them (the order of samples, the draws of augmentation, what is recorded) then goes on.
    """
    progress = cast(ProcessedTracker, trainer.fit_loop.epoch_progress.current)
    # All four: from their differences Lightning tells, on resume, what of an epoch was done.
    progress.ready = progress.started = progress.processed = progress.completed = epoch
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def generator_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any], rank: int, step: int) -> None:
    """Put the generators back; on ranks other than the one that saved, seed them from their own place."""
    if rank > 0:
        lightning.seed_everything(int(np.random.SeedSequence([rank, step]).generate_state(1)[0]), verbose=False)
        return
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
