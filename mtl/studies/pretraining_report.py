"""What came of learning from few labels: tables, verdicts in a sentence, and error against the number of labels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mtl.figures import save
from mtl.files import write_whole
from mtl.studies.comparison import Comparison
from mtl.studies.figures import label
from mtl.studies.jobs import Outcome, Result
from mtl.studies.pretraining import LABELLED_SHARE, METHODS, OF_TUNING, Method, Row, Setting, Teacher, other_domain
from mtl.studies.tables import Cell, Column, Measure, Spread, Table
from mtl.tasks.base import Task

JUDGED, AGAINST = ("masked-frozen", "masked-fine-tuned", "joint"), METHODS["scratch"]
"""What the verdicts are about, and what that is compared with."""


def report(comparison: Comparison, rows: Sequence[Row], tasks: Sequence[Task], setting: Setting, folder: Path) -> str:
    """Write ``table.md``, ``table.csv`` and ``picture.png``, and return the table in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*_main_tables(comparison, rows), _verdicts(comparison, rows)])
    text += "".join(f"\n{note}\n" for note in _notes(comparison, rows, setting))
    counts: dict[Column, Sequence[Cell]] = {Column("labels"): [str(row.labels) for row in rows]}
    every = comparison.table("method", counts, comparison.measures, metrics_alone=True)
    usual = [measure for measure in comparison.measures if measure.usual or measure.main]
    short = comparison.table("method", counts, usual, metrics_alone=True)
    text += "\nThe usual metrics; the best of all numbers of labels is bold, and `table.csv` has every metric:\n\n"
    text += short.markdown()
    write_whole(folder / "table.md", text.encode())
    write_whole(folder / "table.csv", every.csv().encode())
    _draw(folder / "picture.png", comparison, rows, tasks)
    return text


def _by_method(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """Return the rows of each method by its label, in the order of the numbers of labels."""
    return {method: [row for row in rows if row.label == method] for method in dict.fromkeys(row.label for row in rows)}


def _main_tables(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each task's main metric: a line for each method, a column for each number of labels."""
    counts = sorted({row.labels for row in rows})
    for measure in (measure for measure in comparison.measures if measure.main):
        better: Literal["higher", "lower"] = "higher" if measure.higher_is_better else "lower"
        table = Table([Column(measure.name), *(Column(f"{count} labels", better) for count in counts)])
        for method, each in _by_method(rows).items():
            table.rows.append([method, *(comparison.spread(row, measure.name) for row in each)])
        yield table.markdown()


def judge(difference: Spread, higher_is_better: bool) -> str | None:
    """Return what can be said of the differences between two methods, in the words of a sentence.

    A seed decides which images have labels and in which order they come, for both methods alike, and most of what
    varies between seeds is that. So runs of the same seed are compared, and the spread is that of their differences.

    Args:
        difference: The new method's metric less the old one's, over seeds.
        higher_is_better: The metric's direction.

    Returns:
        None where there is but one seed, and so no spread.
    """
    if math.isnan(difference.deviation):
        return None
    if abs(difference.mean) <= difference.deviation:
        return "does not differ by more than the spread from"
    return "beats" if (difference.mean > 0) == higher_is_better else "is worse than"


def _verdicts(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Return a sentence for each task, number of labels and masked method, or nothing where there is none."""
    lines = []
    for measure in (measure for measure in comparison.measures if measure.main):
        for count in sorted({row.labels for row in rows}):
            having = {row.method: row for row in rows if row.labels == count}
            for method in (METHODS[name] for name in JUDGED if METHODS[name] in having and AGAINST in having):
                found = _differences(comparison, having[method], having[AGAINST], measure.name)
                if (difference := Spread.of(found)) is not None:
                    lines.append(f"- {measure.name}, {count} labels: {_sentence(method, difference, measure)}\n")
    if not lines:
        return ""
    return "".join(lines) + (
        "\nDifferences are between runs of the same seed, which have the same labels; their spread is their sample "
        "standard deviation. What is within it may be gone with other seeds.\n"
    )


def _differences(comparison: Comparison, new: Row, old: Row, name: str) -> list[float]:
    """Return by how much a metric of one row is greater than another's, for each seed that both have."""
    found = []
    for pair in zip(new.jobs, old.jobs, strict=True):
        runs = [[outcome for job in jobs if isinstance(outcome := comparison.outcomes[job], Result)] for jobs in pair]
        each = [{k: v for run in of_seed for k, v in comparison.held.metrics(run).items()} for of_seed in runs]
        if all(name in metrics for metrics in each):
            found.append(each[0][name] - each[1][name])
    return found


def _sentence(method: Method, difference: Spread, measure: Measure) -> str:
    """Return the verdict with its numbers."""
    words = judge(difference, measure.higher_is_better)
    if words is None:
        return (
            f"whether *{method.label}* beats *{AGAINST.label}* cannot be told without several seeds: a difference of "
            f"{difference.mean:+.3g}."
        )
    return (
        f"*{method.label}* **{words}** *{AGAINST.label}*: a difference of {difference.mean:+.3g} ± "
        f"{difference.deviation:.2g}."
    )


def _notes(comparison: Comparison, rows: Sequence[Row], setting: Setting) -> list[str]:
    """Return what a reader of the table must know."""
    experiment, methods = setting.experiment, {row.method for row in rows}
    teachers = _teachers(rows)
    notes = [
        "Mean ± sample standard deviation over seeds; an arrow says which direction is better.",
        comparison.held.note,
        f"Every row learns each task by itself, in {experiment.max_steps} steps of {experiment.batch_size} samples "
        f"(--augment {experiment.augment}), from labels of as many of the {setting.images} training images as it says, "
        "which the seed draws. Backbones start at random, or where the row's pretraining has ended.",
    ]
    notes += [_cost(comparison, rows, teacher, setting) for teacher in teachers]
    if METHODS["joint"] in methods:
        notes.append(
            f"{METHODS['joint'].label}: {LABELLED_SHARE:.0%} of a batch's samples have a label, and the others are of "
            "the other training images, so that it sees fewer labels in its steps than the rows beside it."
        )
    if "segmentation" in teachers:
        other = other_domain(experiment)
        notes.append(
            "The rows that have learned segmentation before did so on all labels of as many other rooms, with the look "
            f"{other}. Where the task is segmentation, they begin with that head."
            if other
            else "The rows that have learned segmentation before did so on all segmentation labels of this data set; "
            "what they would be for that task with few labels is no question (-)."
        )
    if any(method.tuned for method in methods) and any(getattr(experiment, name) for name in OF_TUNING):
        notes.append("--backbone-lr and --layer-decay hold for the rows that are fine-tuned.")
    if any(len(comparison.runs(row)) < len(row.jobs) for row in rows):
        notes.append("Some trainings failed: the column of seeds says how many are left.")
    return notes


def _teachers(rows: Sequence[Row]) -> list[Teacher]:
    """Return what is learned before."""
    return list(dict.fromkeys(row.method.teacher for row in rows if row.method.teacher))


def _cost(comparison: Comparison, rows: Sequence[Row], teacher: Teacher, setting: Setting) -> str:
    """Return how long it takes to learn before, beside how long to learn from scratch."""
    after = [job for row in rows if row.method.teacher == teacher for jobs in row.jobs for job in jobs]
    before = {each for job in after for each in job.after}
    first, then = (Spread.of(_seconds(comparison.outcomes[job]) for job in jobs) for jobs in (before, after))
    took = "" if first is None or then is None else f", and took {_short(first)} seconds, what followed {_short(then)}"
    crop = next(iter(before)).experiment.augmentation.crop
    enlarged = f" on pictures enlarged by a factor of up to {1 + crop:g}" if crop else ""
    return (
        f"Pretraining ({teacher}) had {setting.pretrain_steps} steps a seed{enlarged}{took}; it is shared by all tasks "
        "and numbers of labels, and comes on top of the rows' own steps."
    )


def _seconds(outcome: Outcome) -> float | None:
    """Return the time that a run's steps took: their number times the median of one."""
    cost = outcome.cost if isinstance(outcome, Result) else {}
    each: float | None = cost.get("seconds_per_step")
    return None if each is None else each * cost["steps"]


def _short(spread: Spread) -> str:
    """Return a number with what it varies by."""
    return f"{spread.mean:.0f}" + ("" if math.isnan(spread.deviation) else f" ± {spread.deviation:.0f}")


def _draw(path: Path, comparison: Comparison, rows: Sequence[Row], tasks: Sequence[Task]) -> None:
    """Write the error against the number of labels, a panel for each task and a line for each method."""
    figure = Figure(figsize=(1 + 4 * len(tasks), 4.4), layout="constrained")
    counts, methods = sorted({row.labels for row in rows}), _by_method(rows)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        name = f"{task.name}/{task.main_metric}"
        for number, (method, each) in enumerate(methods.items()):
            errors = [
                (
                    row.labels,
                    Spread.of(task.remaining_error({task.main_metric: v}) for v in comparison.values(row, name)),
                )
                for row in each
            ]
            points = [(count, error) for count, error in errors if error is not None]
            aside = 1.015 ** (number - len(methods) / 2)  # so that no bar hides another
            colour, form = each[0].method.style
            axes.errorbar(
                [count * aside for count, _ in points],
                [error.mean for _, error in points],
                [0.0 if math.isnan(error.deviation) else error.deviation for _, error in points],
                fmt=form,
                color=colour,
                markersize=5,
                capsize=2,
                linewidth=1.2,
                label=method,
            )
        label(axes, f"error by {name}", higher_is_better=False)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("labelled training images")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, path)
