"""Weights & Biases: online with a key, offline without, and never in the way of training."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mtl.config import Experiment
from mtl.data.sample import IGNORE_INDEX
from mtl.tasks.base import Panel, Task
from mtl.training.pictures import Panels

_log = logging.getLogger("mtl")

RUN_ID_FILE = "wandb_id.txt"
"""File in the run's folder that keeps W&B's id, so that a resumed run goes on as the same one."""

Mode = Literal["online", "offline", "disabled"]


def start_wandb(experiment: Experiment, folder: Path, mode: Mode) -> WandbLogger:
    """Start or continue the run on W&B; where the server cannot be reached, warn and go on offline."""
    id_file = folder / RUN_ID_FILE
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
    id_file.write_text(run_id + "\n")
    arguments: dict[str, Any] = {
        "project": experiment.project,
        "name": folder.name,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        "config": experiment.model_dump(mode="json"),
    }
    settings = wandb.Settings(silent=True, console="off", init_timeout=15)
    try:
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except Exception as error:  # noqa: BLE001  # whatever its transport raises must not stop training
        _log.warning("W&B cannot be reached (%s); this run is tracked offline", _short(error))
        wandb.teardown()
        run = wandb.init(mode="offline", settings=settings, **arguments)
    return WandbLogger(experiment=run)


def log_predictions(
    logger: WandbLogger,
    tasks: Sequence[Task],
    panels: Panels,
    predictions: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    step: int,
) -> None:
    """Log the pictures: maps of classes as masks over the image, a class in words, everything else as drawn."""
    images = panels["input"].images
    content: dict[str, list[wandb.Image]] = {}
    for task in tasks:
        if task.target == "label":
            content[f"{task.name}/predictions"] = [
                wandb.Image(image, caption=f"{_class(task, targets, row)}, predicted {_class(task, predictions, row)}")
                for row, image in enumerate(images)
            ]
        elif task.class_names:
            names = {**dict(enumerate(task.class_names)), IGNORE_INDEX: "unlabelled"}
            content[f"{task.name}/predictions"] = [
                wandb.Image(
                    image,
                    masks={
                        "prediction": {
                            "mask_data": _mask(predictions[task.name][row]),
                            "class_labels": names,
                        },
                        "ground_truth": {"mask_data": _mask(targets[task.name][row]), "class_labels": names},
                    },
                )
                for row, image in enumerate(images)
            ]
        else:
            drawn = {title: panel for title, panel in panels.items() if title.startswith(task.name)}
            caption = " | ".join(["input", *(_caption(title, panel) for title, panel in drawn.items())])
            content[f"{task.name}/predictions"] = [
                wandb.Image(
                    np.concatenate([image, *(panel.images[row] for panel in drawn.values())], axis=1), caption=caption
                )
                for row, image in enumerate(images)
            ]
    logger.experiment.log({**content, "trainer/global_step": step})


def _caption(title: str, panel: Panel) -> str:
    """Return the title with the range and the unit of what is drawn."""
    if panel.scale is None:
        return title
    return f"{title}, {panel.scale.low:.3g} to {panel.scale.high:.3g} {panel.scale.unit}".rstrip()


def _class(task: Task, classes: Mapping[str, Tensor], row: int) -> str:
    index = int(classes[task.name][row])
    return "unlabelled" if index == IGNORE_INDEX else task.class_names[index]


def _mask(classes: Tensor) -> np.ndarray:
    return classes.cpu().numpy().astype(np.uint8)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
