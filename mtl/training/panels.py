"""What a model makes of a few samples, always the same ones, as pictures."""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mtl.data.loading import Key, Samples
from mtl.plugins import in_plugin_of
from mtl.tasks.base import Panel
from mtl.training.module import MultiTaskModule
from mtl.training.pictures import Panels, draw_predictions, input_pictures
from mtl.training.tracking import log_predictions

PICTURES = 4
"""How many validation samples are drawn."""


class Reconstructions(Callback):
    """Draw what is hidden of a few samples, and what is predicted there, at every validation.

    Args:
        folder: The folder of the pictures, one for each validation, named by the optimizer steps done.
        samples: The validation samples.
    """

    def __init__(self, folder: Path, samples: Samples) -> None:
        self.folder, self.samples = folder, samples

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw."""
        assert isinstance(pl_module, MultiTaskModule)
        panels, predictions, targets = predict_panels(pl_module, self.samples)
        self.folder.mkdir(exist_ok=True)
        shown = {title: panel for title, panel in panels.items() if title == "input" or title.startswith("masked")}
        draw_predictions(self.folder / f"step-{trainer.global_step:06d}.png", shown, ())
        tasks = [task for task in pl_module.each_task() if task.name == "masked"]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_predictions(logger, tasks, panels, predictions, targets, trainer.global_step)


def predict_panels(module: MultiTaskModule, samples: Samples) -> tuple[Panels, dict[str, Tensor], dict[str, Tensor]]:
    """Predict a few samples, evenly spread over the set.

    Returns:
        Pictures by title, predictions and targets by task.
    """
    rows = spread(len(samples), PICTURES)
    stored = samples.__getitems__([Key(row, 0, row) for row in rows])
    module.eval()
    batch = module.on_after_batch_transfer({name: v.to(module.device) for name, v in stored.items()}, 0)
    with torch.no_grad():
        predictions = module.predictions(batch)
    panels: Panels = {"input": Panel(input_pictures(stored))}
    targets = {task.name: batch[task.target] for task in module.each_task()}
    for task in module.each_task():
        with in_plugin_of(task, "pictures"):
            panels |= task.pictures(predictions[task.name], targets[task.name])
    return panels, predictions, targets


def spread(length: int, count: int) -> list[int]:
    """Return the numbers of so many samples, evenly spread over a set."""
    rows: list[int] = torch.linspace(0, length - 1, min(count, length)).round().int().tolist()
    return rows
