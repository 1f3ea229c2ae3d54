"""The trade-off between two tasks: L = α L_1 + β L_2 for several ratios α:β, beside each task alone."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mtl.config import Experiment
from mtl.errors import UserError
from mtl.figures import save
from mtl.studies.comparison import Comparison, Entry, Held, single_tasks, with_seed
from mtl.studies.figures import COLOUR, REFERENCE
from mtl.studies.jobs import Job
from mtl.studies.tables import Cell, Column, Measure

ALPHA, BETA = "α", "β"  # noqa: RUF001  # the letters of the lecture
"""What the weights of the first and the second task's losses are called."""


def weights_of(ratio: float) -> tuple[float, float]:
    """Return α and β of a ratio, with α + β = 2 as with equal weights, so that the losses' scale stays as it is."""
    alpha, beta = 2 * ratio / (1 + ratio), 2 / (1 + ratio)
    return float(f"{alpha:.6g}"), float(f"{beta:.6g}")


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse ratios that are so close that their weights are the same.

    Raises:
        UserError: Two are.
    """
    known: dict[tuple[float, float], float] = {}
    for ratio in ratios:
        alpha, beta = weights_of(ratio)
        if (other := known.setdefault((alpha, beta), ratio)) != ratio:
            raise UserError(
                f"--ratios {_short(other)} and {_short(ratio)} are the same weights, {alpha:g} and {beta:g} in six "
                "digits; leave one out"
            )


def _short(ratio: float) -> str:
    """Return a ratio with as many digits as tell it from any other."""
    return str(float(ratio)).removesuffix(".0")


def plan(experiment: Experiment, ratios: Sequence[float], seeds: Sequence[int], held: Held) -> list[Entry]:
    """Return the trainings of the study: each task alone, and both together, a ratio each.

    Args:
        experiment: What to train: two tasks.
        ratios: Of the first task's weight to the second's.
        seeds: The seeds.
        held: Which samples' metrics count.

    Raises:
        UserError: An experiment does not fit together.
    """
    entries = [single_tasks(experiment, seeds, held)]
    for ratio in ratios:
        weights = dict(zip(experiment.task, weights_of(ratio), strict=True))
        # Written as the configuration's own default where it is one, so that such a run of another study is found.
        changes = {"loss_weights": {} if ratio == 1 else weights}
        label = f"{_short(ratio)}:1"
        jobs = [Job(f"{label}, seed {s}", with_seed(experiment, s, changes), then=held.then) for s in seeds]
        entries.append(Entry(label, [[job] for job in jobs]))
    return entries


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Return which points no other one dominates: is at least as good in both coordinates, and better in one.

    Args:
        points: Both coordinates higher is better; None is a point that is not there.
    """

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] >= other[0] and one[1] >= other[1]

    return [
        point is not None and not any(other is not None and dominates(other, point) for other in points)
        for point in points
    ]


def report(comparison: Comparison, ratios: Sequence[float], folder: Path) -> str:
    """Write ``table.md``, ``table.csv`` and ``picture.png``, and return the table in Markdown."""
    first, second = (measure for measure in comparison.measures if measure.main)
    points = []
    for entry in comparison.entries[1:]:
        x, y = comparison.spread(entry, first.name), comparison.spread(entry, second.name)
        signed = (_up(first, x.mean), _up(second, y.mean)) if x is not None and y is not None else None
        points.append(signed)
    best = pareto(points)
    weights = [weights_of(ratio) for ratio in ratios]
    more: dict[Column, Sequence[Cell]] = {
        Column(ALPHA): ["", *(f"{alpha:.3g}" for alpha, _ in weights)],
        Column(BETA): ["", *(f"{beta:.3g}" for _, beta in weights)],
        Column("Pareto-optimal"): ["", *("yes" if is_best else "no" for is_best in best)],
    }
    text = comparison.write(folder, f"{ALPHA}:{BETA} ({first.task}:{second.task})", more)
    _draw(folder / "picture.png", comparison, first, second, best)
    return text


def _up(measure: Measure, value: float) -> float:
    """Return a value so that higher is better."""
    return value if measure.higher_is_better else -value


def _draw(path: Path, comparison: Comparison, first: Measure, second: Measure, best: Sequence[bool]) -> None:
    """Write both tasks' main metrics against each other, better to the right and upwards."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    single, *swept = comparison.entries
    front = []
    for entry, is_best in zip(swept, best, strict=True):
        x, y = comparison.spread(entry, first.name), comparison.spread(entry, second.name)
        if x is None or y is None:
            continue
        up, across = (0.0 if math.isnan(spread.deviation) else spread.deviation for spread in (y, x))
        face = COLOUR if is_best else "white"
        axes.errorbar(x.mean, y.mean, up, across, fmt="o", color=COLOUR, markerfacecolor=face, capsize=2)
        axes.annotate(entry.label, (x.mean, y.mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if is_best:
            front.append((x.mean, y.mean))
    if front:
        axes.plot(*zip(*sorted(front), strict=True), color=COLOUR, linewidth=1, label="trade-off front")
    for line, measure, title in ((axes.axvline, first, "each alone"), (axes.axhline, second, None)):
        if (alone := comparison.spread(single, measure.name)) is not None:
            line(alone.mean, color=REFERENCE, linestyle="--", linewidth=1, label=title)
    if not first.higher_is_better:
        axes.invert_xaxis()
    if not second.higher_is_better:
        axes.invert_yaxis()
    axes.set(xlabel=f"{first.name}, better to the right", ylabel=f"{second.name}, better upwards")
    axes.set_title(f"{ALPHA}:{BETA} of {first.task} and {second.task}; full: Pareto-optimal among these", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    save(figure, path)
