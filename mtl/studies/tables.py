"""Results as a table, in Markdown and as CSV, and what several tasks learned together gain over each alone."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self


class Spread(NamedTuple):
    """Numbers of several seeds in short.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation (divided by n - 1); NaN where there is but one.
        seeds: How many there are.
    """

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Return the numbers' spread; what is no finite number is left out, and None stands for nothing at all."""
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        if not numbers:
            return None
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
        return cls(statistics.fmean(numbers), deviation, len(numbers))


Cell = str | Spread | None
"""A word, numbers, or nothing."""


@dataclass(frozen=True)
class Column:
    """What one column holds.

    Attributes:
        title: Its title.
        better: Which direction is better, if any: the best of the column is set in bold.
        digits: After the point; None is three, fewer for large numbers.
    """

    title: str
    better: Literal["higher", "lower"] | None = None
    digits: int | None = None


@dataclass
class Table:
    """Rows of cells under columns, and sentences below them.

    Attributes:
        columns: The columns.
        rows: The rows, each with a cell for each column.
        notes: What a reader must know.
    """

    columns: Sequence[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table in Markdown: mean ± sample standard deviation, an arrow to what is better, the best bold."""
        arrows = {"higher": " ↑", "lower": " ↓", None: ""}
        texts = [self._texts(place) for place in range(len(self.columns))]
        numbers = [any(isinstance(row[place], Spread) for row in self.rows) for place in range(len(self.columns))]
        lines = [
            [column.title + arrows[column.better] for column in self.columns],
            ["---:" if is_number else "---" for is_number in numbers],
            *([column[number] for column in texts] for number in range(len(self.rows))),
        ]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        return table + "".join(f"\n{note}\n" for note in self.notes)

    def csv(self) -> str:
        """Return the table as CSV, in full precision: of numbers the mean, then the deviation and the count."""
        names: list[str] = []
        lines: list[list[str]] = [[] for _ in self.rows]
        for place, column in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            if not any(isinstance(cell, Spread) for cell in cells):
                names.append(column.title)
                for line, cell in zip(lines, cells, strict=True):
                    line.append("" if cell is None else str(cell))
                continue
            names += [column.title, f"{column.title} (standard deviation)", f"{column.title} (n)"]
            for line, cell in zip(lines, cells, strict=True):
                if isinstance(cell, Spread):
                    deviation = "" if math.isnan(cell.deviation) else repr(cell.deviation)
                    line += [repr(cell.mean), deviation, str(cell.seeds)]
                else:
                    line += [cell or "", "", ""]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([names, *lines])
        return text.getvalue()

    def _texts(self, place: int) -> list[str]:
        """Return the cells of a column as they are shown."""
        column, cells = self.columns[place], [row[place] for row in self.rows]
        means = [cell.mean for cell in cells if isinstance(cell, Spread)]
        best = {"higher": max, "lower": min}[column.better](means) if column.better and len(means) > 1 else None
        digits = column.digits
        if digits is None:
            largest = max(map(abs, means), default=0.0)
            digits = 3 if largest < 10 else 2 if largest < 100 else 1
        texts = []
        for cell in cells:
            if not isinstance(cell, Spread):
                texts.append(cell or "-")
                continue
            text = _fixed(cell.mean, digits)
            if best is not None and text == _fixed(best, digits):
                text = f"**{text}**"  # ties of what is shown alike
            texts.append(text if math.isnan(cell.deviation) else f"{text} ± {_fixed(cell.deviation, digits)}")
        return texts


def _fixed(number: float, digits: int) -> str:
    """Return a number with so many digits after the point, and no negative zero."""
    return f"{round(number, digits) + 0.0:.{digits}f}"


@dataclass(frozen=True)
class Measure:
    """A metric of a task.

    Attributes:
        name: Its full name, such as ``depth/abs_rel``.
        task: The task's name.
        higher_is_better: Its direction.
        main: Whether it stands for the task.
        usual: Whether it is one of those that the literature averages over, see `USUAL`.
    """

    name: str
    task: str
    higher_is_better: bool
    main: bool = False
    usual: bool = True


USUAL: dict[str, tuple[str, ...]] = {
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("abs_error", "abs_rel"),
    "normals": ("mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"),
}
"""The nine metrics of NYUv2, and the four of Cityscapes, over which the literature since MTAN takes Δm."""


class Delta(NamedTuple):
    """How a network of several tasks compares with a network for each task, in percent, by three conventions.

    With the relative gain of a metric m over the single-task networks' b, g = (m - b) / b where higher is better and
    (b - m) / b where lower is:

    Attributes:
        main: 100 times the mean over tasks of g of the task's one main metric; higher is better. Vandenhende et al.
            2021, "Multi-Task Learning for Dense Prediction Tasks: A Survey", and Auto-Lambda (Liu et al. 2022).
        all: -100 times the mean of g over all metrics; lower is better. Nash-MTL (Navon et al. 2022), CAGrad, FAMO.
        by_task: 100 times the mean over tasks of the mean of g over the task's metrics; higher is better. LibMTL,
            DB-MTL (Lin et al. 2023).
    """

    main: float
    all: float
    by_task: float


def delta(values: Mapping[str, float], single: Mapping[str, float], measures: Sequence[Measure]) -> Delta:
    """Return what learning together gains.

    Args:
        values: Metrics by full name of the network of all tasks.
        single: The same of the networks for one task each.
        measures: The metrics; those that are not `usual` count only where they are `main`.

    Returns:
        NaN in a place where a metric that it needs is missing, or zero on its own.
    """

    def gain(measure: Measure) -> float:
        reference = single.get(measure.name, math.nan)
        if reference == 0:
            return math.nan
        share = (values.get(measure.name, math.nan) - reference) / reference
        return share if measure.higher_is_better else -share

    tasks = list(dict.fromkeys(measure.task for measure in measures))
    usual = [[gain(measure) for measure in measures if measure.usual and measure.task == task] for task in tasks]
    main = [gain(measure) for measure in measures if measure.main]
    return Delta(
        main=100 * statistics.fmean(main),
        all=-100 * statistics.fmean(share for shares in usual for share in shares),
        by_task=100 * statistics.fmean(statistics.fmean(shares) for shares in usual),
    )


DELTA_COLUMNS = (
    Column("Δm, main metrics (%)", "higher", 2),
    Column("Δm, all metrics (%)", "lower", 2),
    Column("Δp, tasks' means (%)", "higher", 2),
)
"""The columns of the three conventions, in `Delta`'s order."""


def delta_note(measures: Sequence[Measure]) -> str:
    """Return the sentences that name the conventions and the metrics."""
    main = ", ".join(measure.name for measure in measures if measure.main)
    usual = ", ".join(measure.name for measure in measures if measure.usual)
    return (
        "Relative to the mean of each task alone over the seeds. Δm of the main metrics (Vandenhende et al. 2021, "
        f"Auto-Lambda): the mean gain of {main}, one a task. Δm of all metrics (Nash-MTL, CAGrad, FAMO), where lower "
        f"is better: the mean loss over {usual}. Δp (LibMTL, DB-MTL): the mean gain over these, first within each "
        "task, then over the tasks."
    )
