"""Pictures for a person: training curves from the run's table, and predictions beside their images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional

from mtl.data.sample import Batch
from mtl.figures import save
from mtl.tasks.base import Panel, Scale, Task
from mtl.tasks.colours import class_colours
from mtl.training.history import History

Panels = dict[str, Panel]
"""Pictures by title, all of the same samples, side by side."""

_PAGE_SHAPE = 2.4
"""Width over height that a page of one sample comes near to."""

_AREA, _WIDEST, _HIGHEST, _THINNEST = 6.0, 8.0, 5.0, 0.1
"""Square inches of a picture whatever its shape, the most inches it is wide and high, and the least it is either."""

_SLOT, _GAP, _TITLE, _BAR, _ENTRY = 2.0, 0.06, 0.22, 0.42, 0.17
"""Inches: the least width for a title, between pictures, and heights of a title, a scale and a line of the legend."""

_CURVE, _RANGE = 8, 6.0
"""Columns of a signal's picture for each of its values, and the largest value in it."""


def draw_predictions(
    path: Path, panels: Panels, classes: Sequence[str] = (), present: Iterable[int] | None = None
) -> None:
    """Write one row for each sample: the image, then each task's target, prediction and error.

    The panels of a single sample are broken into lines where that makes a handier page. Below each column is the
    scale of its colours, where they stand for numbers.

    Args:
        path: The file.
        panels: The pictures.
        classes: Names of the classes whose colours are to be explained.
        present: Indices of those that occur; None explains all.
    """
    samples, rows, columns = next(iter(panels.values())).images.shape[:3]
    width = min(math.sqrt(_AREA * columns / rows), _WIDEST, _HIGHEST * columns / rows)
    width, height = max(width, _THINNEST), max(width * rows / columns, _THINNEST)
    slot = max(width, _SLOT) + _GAP
    plain_line = _TITLE + samples * (height + _GAP)
    across = len(panels) if samples > 1 else _columns(len(panels), slot / (plain_line + _BAR))
    scaled = [panel.scale is not None for panel in panels.values()]
    bars = [_BAR * any(scaled[first : first + across]) for first in range(0, len(panels), across)]
    tops = [number * plain_line + sum(bars[:number]) for number in range(len(bars) + 1)]

    indices = range(len(classes)) if present is None else sorted(present)
    page_width = across * slot + _GAP
    fitting = max(1, int(page_width / (0.45 + 0.075 * max((len(classes[i]) for i in indices), default=0))))
    legend = -(-len(indices) // fitting) * _ENTRY + _GAP if indices else 0.0
    page_height = tops[-1] + legend
    figure = Figure(figsize=(page_width, page_height))

    def place(middle: float, top: float, width: float, height: float) -> Axes:
        """Return axes at a place in inches from the page's upper left corner."""
        left, bottom = middle - width / 2, page_height - top - height
        return figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))

    for number, (title, panel) in enumerate(panels.items()):
        middle = (number % across + 0.5) * slot + _GAP / 2
        top = tops[number // across] + _TITLE
        figure.text(middle / page_width, 1 - (top - 0.06) / page_height, title, ha="center", fontsize=8)
        for image in panel.images:
            axes = place(middle, top, width, height)
            axes.imshow(image, aspect="auto")
            axes.set_axis_off()
            top += height + _GAP
        if panel.scale is not None:
            _draw_scale(figure, place(middle, top, min(max(width, _SLOT), 4.0) - 0.3, 0.08), panel.scale)
    if indices:
        patches = [Patch(color=class_colours(len(classes))[i] / 255, label=classes[i]) for i in indices]
        figure.legend(handles=patches, loc="lower center", ncols=fitting, fontsize=7, frameon=False, borderpad=0.2)
    save(figure, path)


def _columns(panels: int, cell_shape: float) -> int:
    """Return how many panels to put on a line, for a page of about the usual shape and without gaps if possible."""

    def strain(across: int) -> float:
        lines = -(-panels // across)
        return abs(math.log(cell_shape * across / lines / _PAGE_SHAPE)) + 0.3 * (across * lines - panels)

    return min(range(1, panels + 1), key=strain)


def _draw_scale(figure: Figure, axes: Axes, scale: Scale) -> None:
    """Fill axes with a bar of colours, with numbers and their unit below it."""
    spread = scale.high > scale.low
    colours = ScalarMappable(Normalize(scale.low, scale.high if spread else scale.low + 1), scale.colormap)
    ticks = MaxNLocator(4) if spread else [scale.low]
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal", ticks=ticks)
    bar.set_label(scale.unit, fontsize=7, labelpad=0)
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.outline.set_linewidth(0.4)


def draw_rows(path: Path, rows: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write rows of pictures (H, W, 3) uint8 with a label at the left of each."""
    count = max(len(pictures) for pictures in rows.values())
    height, width = next(iter(rows.values()))[0].shape[:2]
    figure = Figure(figsize=(1.5 * count + 1, 1.5 * len(rows) * height / width), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(picture, aspect="auto")
    save(figure, path)


def channels_last(images: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) as pictures (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def draw_signals(signals: Tensor) -> np.ndarray:
    """Return the curves of standardised signals (B, 1, T) as pictures (B, H, W, 3) uint8, all on one fixed scale."""
    curves = functional.interpolate(signals.float(), scale_factor=_CURVE, mode="linear", align_corners=True)[:, 0]
    height = curves.shape[1] // 2
    rows = (0.5 - curves.numpy() / (2 * _RANGE)) * (height - 1)
    following = np.concatenate([rows[:, 1:], rows[:, -1:]], axis=1)
    top, bottom = np.minimum(rows, following) - 1, np.maximum(rows, following) + 1
    places = np.arange(height)[:, None]
    inked = (places >= top[:, None]) & (places <= bottom[:, None])
    return np.where(inked[..., None], 0, 255).astype(np.uint8).repeat(3, axis=-1)


def input_pictures(batch: Batch) -> np.ndarray:
    """Return what models are given as pictures (B, H, W, 3) uint8.

    Args:
        batch: With `image`, bytes or floats in [0, 1], or with `signal`.
    """
    if "signal" in batch:
        return draw_signals(batch["signal"].cpu())
    image = batch["image"].cpu()
    return channels_last((image * 255).round().to(torch.uint8) if image.is_floating_point() else image)


def overlay(images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Lay drawn labels half transparently over images, (B, H, W, 3) uint8 both; where they are black, nothing is."""
    known = drawn.any(axis=-1, keepdims=True)
    mixed: np.ndarray = np.where(known, images // 2 + drawn // 2, images)
    return mixed


def draw_curves(
    path: Path, history: History, tasks: Sequence[Task], constant: Mapping[str, float], probed: Sequence[Task] = ()
) -> None:
    """Write the training losses and each task's main metric, with a constant prediction's beside it.

    Args:
        path: The file.
        history: The run's table.
        tasks: The tasks that are learnt.
        constant: Metrics of constant predictions, by full name.
        probed: The tasks of an online probe, each of which has a picture where the table has its main metric.
    """
    metrics = [(task, f"{task.name}/{task.main_metric}", "held out") for task in tasks]
    probes = [(task, f"probe/{task.name}/{task.main_metric}", "linear probe") for task in probed]
    metrics += [probe for probe in probes if history.column(probe[1])[0]]
    figure = Figure(figsize=(4.5 * (len(metrics) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(metrics) + 1, squeeze=False)[0]
    for task in tasks:
        steps, values = history.column(f"train/loss/{task.name}")
        axes[0].plot(steps, values, label=task.name, linewidth=1, marker="." if len(steps) < 20 else None)
    axes[0].set(title="training loss", xlabel="step", yscale="log")
    axes[0].legend()
    for axis, (task, name, label) in zip(axes[1:], metrics, strict=True):
        steps, values = history.column(name)
        axis.plot(steps, values, marker="o", markersize=3, label=label)
        if name in constant:
            axis.axhline(constant[name], color="grey", linestyle="--", label="constant prediction")
        if name.startswith("probe/"):
            axis.axhline(values[0], color="grey", linestyle=":", label="before training")
        direction = "higher" if task.higher_is_better[task.main_metric] else "lower"
        axis.set(title=f"{name} ({direction} is better)", xlabel="step")
        axis.legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, path)


def draw_weighting(path: Path, history: History, tasks: Sequence[str]) -> None:
    """Write how the losses were combined: each task's weight and share of the gradient's norm, and pairs' cosines."""
    pairs = [f"{first}-{second}" for i, first in enumerate(tasks) for second in tasks[i + 1 :]]
    kinds = {
        "weight of the loss": ("train/weight/", tasks),
        "share of the shared gradient's norm": ("train/gradient_share/", tasks),
        "cosine of two tasks' gradients": ("train/cosine/", pairs),
    }
    figure = Figure(figsize=(4.5 * len(kinds), 3.4), layout="constrained")
    for axes, (title, (prefix, names)) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        for name in names:
            steps, values = history.column(prefix + name)
            axes.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 20 else None)
        axes.set(title=title, xlabel="step")
        axes.legend()
        axes.grid(alpha=0.3)
        if title.startswith("cosine"):
            axes.set_ylim(-1.05, 1.05)
            axes.axhline(0, color="grey", linewidth=0.8)
    save(figure, path)
