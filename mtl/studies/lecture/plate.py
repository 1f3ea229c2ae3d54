"""A figure whose numbers lie beside it: what is drawn is what is written."""

import csv
import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mtl.figures import save
from mtl.files import write_whole

WIDTH, HEIGHT = 3.7, 3.1
"""Inches of a panel."""


class Panel:
    """One pair of axes; whatever is drawn on it is remembered for the CSV.

    Args:
        axes: Where to draw.
        title: What the panel shows.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.

    Attributes:
        axes: For what has no numbers of its own: limits, scales, text.
        rows: Each drawn number: panel, series, x, y, and a surface's value.
    """

    def __init__(self, axes: Axes, title: str, x: str, y: str) -> None:
        self.axes = axes
        self.rows: list[tuple[str, ...]] = []
        self._title = title
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel(y, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)

    def line(
        self, series: str, x: ArrayLike, y: ArrayLike, *, style: str = "-", shown: bool = True, **how: Any
    ) -> None:
        """Draw a line, or markers, through the points x (N,) and y (N,).

        Args:
            series: Its name, in the legend and in the CSV.
            x: Horizontal coordinates.
            y: Vertical coordinates.
            style: matplotlib's format, such as "o" for dots.
            shown: Whether the legend names it.
            how: Anything else for `Axes.plot`.
        """
        self.axes.plot(x, y, style, label=series if shown else None, **how)
        self._remember(series, x, y)

    def spread(self, series: str, x: ArrayLike, values: np.ndarray, **how: Any) -> None:
        """Draw the means over the last axis of values (N, S) with their standard errors; the CSV has every value."""
        error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else None
        self.axes.errorbar(np.asarray(x), values.mean(axis=1), error, label=series, fmt="o-", ms=4, capsize=3, **how)
        self._remember(series, np.repeat(np.asarray(x), values.shape[1]), values.ravel())

    def surface(self, series: str, x: np.ndarray, y: np.ndarray, values: np.ndarray, levels: ArrayLike) -> None:
        """Draw values (len(y), len(x)) as filled contours between levels, with a scale beside the panel."""
        colours = self.axes.contourf(x, y, values, levels, cmap="viridis", extend="both")
        self.axes.contour(x, y, values, levels, colors="white", linewidths=0.3, alpha=0.5)
        self.axes.grid(visible=False)
        figure = self.axes.figure
        figure.colorbar(colours, ax=self.axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)  # type: ignore[union-attr]
        across, up = np.meshgrid(x, y)
        self._remember(series, across.ravel(), up.ravel(), values.ravel())

    def log_ticks(self, ticks: ArrayLike) -> None:
        """Make the horizontal axis logarithmic, with a label at each of the ticks (N,) and nowhere else."""
        places = np.asarray(ticks).tolist()
        self.axes.set_xscale("log")
        self.axes.set_xticks(places, [f"{place:g}" for place in places])
        self.axes.set_xticks([], minor=True)

    def legend(self, **where: Any) -> None:
        """Explain what has been drawn so far."""
        self.axes.legend(fontsize=7, **where)

    def _remember(self, series: str, x: ArrayLike, y: ArrayLike, values: ArrayLike | None = None) -> None:
        columns = [[f"{number:.10g}" for number in np.ravel(column)] for column in (x, y)]
        last = [""] * len(columns[0]) if values is None else [f"{number:.10g}" for number in np.ravel(values)]
        self.rows += [(self._title, series, *row) for row in zip(*columns, last, strict=True)]


class Plate:
    """Panels in a grid, filled row by row.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.6), layout="constrained")
        self._free = iter(self._figure.subplots(rows, columns, squeeze=False).ravel())
        self._line = int(13 * WIDTH * columns)
        self._panels: list[Panel] = []

    def panel(self, title: str, x: str, y: str) -> Panel:
        """Return the next panel, see `Panel`."""
        panel = Panel(next(self._free), title, x, y)
        self._panels.append(panel)
        return panel

    def save(self, folder: Path, name: str, caption: str) -> str:
        """Write ``name.png``, with the caption above the panels, and ``name.csv``.

        Returns:
            The caption.
        """
        self._figure.suptitle("\n".join(textwrap.wrap(caption, self._line)), fontsize=10)
        text = io.StringIO()
        lines = [row for panel in self._panels for row in panel.rows]
        csv.writer(text, lineterminator="\n").writerows([("panel", "series", "x", "y", "value"), *lines])
        write_whole(folder / f"{name}.csv", text.getvalue().encode())
        save(self._figure, folder / f"{name}.png")
        return caption
