"""Pictures of uncertainty, and of how far it is to be believed."""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mtl.files import write_whole
from mtl.tasks.base import Panel, Scale, Task
from mtl.tasks.colours import number_colours
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.uncertainty.calibration import Reliability
from mtl.uncertainty.coverage import Coverage
from mtl.uncertainty.sparsification import Sparsification


def draw_uncertainty(task: Task, uncertainty: Tensor) -> dict[str, Panel]:
    """Draw maps of uncertainty for a person, from certain (dark) to uncertain (bright).

    The scale of classes reaches to the entropy of a mere guess, ln C; others' to the largest of the maps.

    Args:
        task: Whose uncertainty.
        uncertainty: (B, H, W), as `mtl.ensembling.combine.Combined` has it.

    Returns:
        A picture by its title, such as "depth uncertainty".
    """
    values = uncertainty.float().cpu().numpy()
    known = values[np.isfinite(values)]
    high, unit = float(known.max(initial=0.0)), ""
    if task.class_names:
        high, unit = math.log(len(task.class_names)), "nats"
    elif isinstance(task, Normals):
        unit = "degrees"
    elif isinstance(task, Depth) and not task.inverse:
        unit = "m"
    scale = Scale(0.0, high, unit, "magma")
    return {f"{task.name} uncertainty": Panel(number_colours(values, 0.0, high, scale.colormap), scale)}


def draw_reliability(path: Path, models: Mapping[str, Reliability]) -> None:
    """Write a reliability diagram as PNG: accuracy over confidence, and below it how often each confidence occurs.

    Args:
        path: The file.
        models: What to compare, by its label.
    """
    figure = Figure(figsize=(4.6, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _diagonal(above, "accuracy")
    for label, (confidence, accuracy, share) in models.items():
        full = share > 0
        above.plot(confidence[full], accuracy[full], marker="o", markersize=3, label=label)
        edges = np.linspace(0, 1, len(share) + 1)
        below.stairs(share, edges)
    below.set(xlabel="confidence", ylabel="share of pixels")
    below.grid(alpha=0.3)
    above.legend(fontsize=8)
    _save(figure, path)


def draw_sparsification(path: Path, models: Mapping[str, Sparsification], error: str = "error") -> None:
    """Write sparsification curves as PNG, each with its oracle dashed in the same colour.

    Args:
        path: The file.
        models: What to compare, by its label.
        error: Which error, for the axis.
    """
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, (removed, curve, oracle) in models.items():
        (line,) = axes.plot(removed, curve, label=label)
        axes.plot(removed, oracle, linestyle="--", color=line.get_color(), label=f"{label}, oracle")
    axes.axhline(1, color="tab:grey", linewidth=1, label="at random")
    axes.set(xlabel="share of the most uncertain pixels left out", ylabel=f"{error} of the rest / of all")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_coverage(path: Path, models: Mapping[str, Coverage]) -> None:
    """Write the coverage of intervals over their level as PNG.

    Args:
        path: The file.
        models: What to compare, by its label.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    _diagonal(axes, "share of labels within the interval")
    for label, (level, coverage) in models.items():
        axes.plot(level, coverage, label=label)
    axes.set_xlabel("level of the interval")
    axes.legend(fontsize=8)
    _save(figure, path)


def _diagonal(axes: Axes, title: str) -> None:
    """Draw what a calibrated model would have."""
    axes.plot([0, 1], [0, 1], color="tab:grey", linewidth=1, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel=title)
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
