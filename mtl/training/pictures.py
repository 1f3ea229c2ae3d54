"""Pictures for a person: training curves from the run's table, and predictions beside their images."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mtl.files import write_whole
from mtl.tasks.base import Panel, Scale, Task
from mtl.tasks.colours import class_colours
from mtl.training.history import History

Panels = dict[str, Panel]
"""Pictures by title, all of the same samples, side by side."""

_PAGE_SHAPE = 1.6
"""Width over height that a page of one sample comes near to."""


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
    samples, height, width = next(iter(panels.values())).images.shape[:3]
    # Cells of one area whatever their shape, but never too narrow for a title.
    cell_width = 2.4 * min(max(math.sqrt(width / height), 0.6), 2.5)
    cell_height = min(cell_width * height / width, 5.0)
    across = len(panels) if samples > 1 else _columns(len(panels), cell_width / (cell_height + 0.5))
    lines = -(-len(panels) // across)
    figure = Figure(figsize=(cell_width * across, (cell_height * samples + 0.7) * lines + 0.4), layout="compressed")
    shown = range(len(classes)) if present is None else sorted(present)
    patches = [Patch(color=class_colours(len(classes))[index] / 255, label=classes[index]) for index in shown]
    if patches:
        fitting = max(1, int(figure.get_figwidth() / (0.4 + 0.07 * max(len(classes[index]) for index in shown))))
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), fitting), fontsize=7)
    grid = figure.subplots(lines * samples, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (title, panel) in enumerate(panels.items()):
        line, column = divmod(place, across)
        cells: list[Axes] = list(grid[line * samples : (line + 1) * samples, column])
        cells[0].set_title(title, fontsize=8)
        for axes, image in zip(cells, panel.images, strict=True):
            axes.imshow(image)
        if panel.scale is not None:
            _add_scale(figure, cells, panel.scale)
    _save(figure, path)


def _columns(panels: int, cell_shape: float) -> int:
    """Return how many panels to put on a line, for a page of about the usual shape and without gaps if possible."""

    def strain(across: int) -> float:
        lines = -(-panels // across)
        return abs(math.log(cell_shape * across / lines / _PAGE_SHAPE)) + 0.3 * (across * lines - panels)

    return min(range(1, panels + 1), key=strain)


def _add_scale(figure: Figure, cells: list[Axes], scale: Scale) -> None:
    """Put a bar of colours with numbers and their unit below a column of pictures."""
    spread = scale.high > scale.low
    colours = ScalarMappable(Normalize(scale.low, scale.high if spread else scale.low + 1), scale.colormap)
    bar = figure.colorbar(
        colours,
        ax=cells,
        location="bottom",
        ticks=MaxNLocator(4) if spread else [scale.low],
        shrink=0.9,
        aspect=30,
        pad=0.02,
        label=scale.unit,
    )
    bar.ax.tick_params(labelsize=6, length=2)
    bar.ax.xaxis.label.set_fontsize(7)
    bar.outline.set_linewidth(0.4)


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
