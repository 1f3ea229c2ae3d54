"""The trade-off between two tasks: L = α L_1 + β L_2 for several ratios α:β, beside each task alone."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mtl.config import Experiment
from mtl.studies.comparison import Comparison, Entry, Held, single_tasks, with_seed
from mtl.studies.figures import COLOUR, REFERENCE, save
from mtl.studies.jobs import Job
from mtl.studies.tables import Cell, Column


def weights_of(ratio: float) -> tuple[float, float]:
    """Return α and β of a ratio, with α + β = 2 as with equal weights, so that the losses' scale stays as it is."""
    alpha, beta = 2 * ratio / (1 + ratio), 2 / (1 + ratio)
    return float(f"{alpha:.6g}"), float(f"{beta:.6g}")


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
        jobs = [Job(f"{ratio:g}:1, seed {s}", with_seed(experiment, s, changes), then=held.then) for s in seeds]
        entries.append(Entry(f"{ratio:g}:1", [[job] for job in jobs]))
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
    mains = [measure for measure in comparison.measures if measure.main]
    signs = [1 if measure.higher_is_better else -1 for measure in mains]
    single, *swept = comparison.entries
    spreads = [[comparison.spread(entry, measure.name) for measure in mains] for entry in swept]
    points = [
        None if x is None or y is None else (signs[0] * x.mean, signs[1] * y.mean)  # higher is better
        for x, y in spreads
    ]
    best = pareto(points)
    weights = [weights_of(ratio) for ratio in ratios]
    more: dict[Column, Sequence[Cell]] = {
        Column("α"): ["", *(f"{alpha:.3g}" for alpha, _ in weights)],  # noqa: RUF001  # the lecture's letters
        Column("β"): ["", *(f"{beta:.3g}" for _, beta in weights)],
        Column("Pareto-optimal"): ["", *("yes" if is_best else "no" for is_best in best)],
    }
    first, second = (measure.task for measure in mains)
    text = comparison.write(folder, f"α:β ({first}:{second})", more)  # noqa: RUF001  # the lecture's letters

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    there = [place for place, point in enumerate(points) if point is not None]
    means = [[spread.mean for spread in spreads[place] if spread is not None] for place in there]
    front = sorted((mean for mean, place in zip(means, there, strict=True) if best[place]), key=lambda mean: mean[0])
    axes.plot(*zip(*front, strict=True), color=COLOUR, linewidth=1, label="trade-off front") if front else None
    for place, (x, y) in zip(there, means, strict=True):
        deviations = [0.0 if math.isnan(s.deviation) else s.deviation for s in spreads[place] if s is not None]
        face = COLOUR if best[place] else "white"
        axes.errorbar(
            x, y, deviations[1], deviations[0], fmt="o", color=COLOUR, markerfacecolor=face, capsize=2, elinewidth=0.7
        )
        axes.annotate(swept[place].label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    alone = [comparison.spread(single, measure.name) for measure in mains]
    if alone[0] is not None:
        axes.axvline(alone[0].mean, color=REFERENCE, linestyle="--", linewidth=1, label="each alone")
    if alone[1] is not None:
        axes.axhline(alone[1].mean, color=REFERENCE, linestyle="--", linewidth=1)
    for invert, sign in zip((axes.invert_xaxis, axes.invert_yaxis), signs, strict=True):
        if sign < 0:
            invert()
    axes.set(xlabel=f"{mains[0].name}, better to the right", ylabel=f"{mains[1].name}, better upwards")
    axes.set_title(f"α:β of {first} and {second}; full: Pareto-optimal among these", fontsize=9)  # noqa: RUF001  # the lecture's letters
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    save(figure, folder / "picture.png")
    return text
