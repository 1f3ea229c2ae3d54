"""The run's pictures: curves.png from its table, predictions.png from a few samples."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mtl.files import write_whole
from mtl.tasks.base import Task
from mtl.tasks.colours import class_colours
from mtl.training.history import History

Panels = dict[str, np.ndarray]
"""Pictures (B, H, W, 3) uint8 by title, side by side."""


def draw_predictions(path: Path, panels: Panels, classes: Sequence[str] = ()) -> None:
    """Write one row for each sample: the image, then each task's target, prediction and error.

    Args:
        path: The file.
        panels: The pictures.
        classes: Names of the classes whose colours are to be explained.
    """
    rows, columns = len(next(iter(panels.values()))), len(panels)
    height, width = next(iter(panels.values())).shape[1:3]
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows * height / width + 0.4), layout="constrained")
    if classes:
        patches = [
            Patch(color=colour / 255, label=name)
            for name, colour in zip(classes, class_colours(len(classes)), strict=True)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(classes), 3 * columns), fontsize=7)
    axes = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
    for column, (title, pictures) in enumerate(panels.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set_axis_off()
    _save(figure, path)


def draw_curves(path: Path, history: History, tasks: Sequence[Task], constant: Mapping[str, float]) -> None:
    """Write the training losses and each task's main metric, with a constant prediction's beside it."""
    figure = Figure(figsize=(4.5 * (len(tasks) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    for task in tasks:
        steps, values = history.column(f"train/loss/{task.name}")
        axes[0].plot(steps, values, label=task.name, linewidth=1)
    axes[0].set(title="training loss", xlabel="step", yscale="log")
    axes[0].legend()
    for axis, task in zip(axes[1:], tasks, strict=True):
        name = f"{task.name}/{task.main_metric}"
        steps, values = history.column(name)
        axis.plot(steps, values, marker="o", markersize=3, label="held out")
        if name in constant:
            axis.axhline(constant[name], color="grey", linestyle="--", label="constant prediction")
        direction = "higher" if task.higher_is_better[task.main_metric] else "lower"
        axis.set(title=f"{name} ({direction} is better)", xlabel="step")
        axis.legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
