"""Pictures of studies."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtl.figures import save
from mtl.studies.tables import Spread

COLOUR, REFERENCE = "tab:blue", "tab:grey"
"""Of what is compared, and of what it is compared with."""


class Panel(NamedTuple):
    """One number of each row.

    Attributes:
        title: What it is.
        higher_is_better: Its direction.
        values: For each row, the numbers of its seeds.
        reference: What to draw a line at.
    """

    title: str
    higher_is_better: bool
    values: Sequence[Sequence[float]]
    reference: Spread | None


def draw_rows(path: Path, labels: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write panels side by side that share their rows: each seed a dot, mean and standard deviation a bar.

    Args:
        path: The file.
        labels: The rows' labels, from the top.
        panels: What to draw.
    """
    figure = Figure(figsize=(2 + 3 * len(panels), 1.1 + 0.3 * len(labels)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        if panel.reference is not None:
            mean, deviation = panel.reference.mean, panel.reference.deviation
            axes.axvline(mean, color=REFERENCE, linestyle="--", linewidth=1)
            if math.isfinite(deviation):
                axes.axvspan(mean - deviation, mean + deviation, color=REFERENCE, alpha=0.15, linewidth=0)
        for row, values in enumerate(panel.values):
            axes.plot(values, [row] * len(values), ".", color=COLOUR, alpha=0.5)
            if (spread := Spread.of(values)) is not None:
                error = None if math.isnan(spread.deviation) else spread.deviation
                axes.errorbar(spread.mean, row, xerr=error, fmt="D", markersize=4, capsize=3, color=COLOUR)
        label(axes, panel.title, panel.higher_is_better)
    grid[0].set_yticks(range(len(labels)), labels)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    save(figure, path)


def label(axes: Axes, title: str, higher_is_better: bool) -> None:
    """Title axes, and lay a grid below what they show."""
    axes.set_title(f"{title} ({'higher' if higher_is_better else 'lower'} is better)", fontsize=9)
    axes.grid(alpha=0.3)
