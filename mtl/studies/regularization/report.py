"""What came of a study of regularization: tables with tests against the baseline, a picture, and a page."""

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from mtl.figures import save
from mtl.files import write_whole

LEVEL = 0.05
"""Below this an adjusted p-value counts."""

Numbers = Sequence[float | None]
"""A number for each seed, None where there is none."""


@dataclass(frozen=True)
class Measured:
    """A technique at one strength, measured over seeds.

    Attributes:
        label: What it is.
        strength: How much of it.
        mechanism: What it works through; the baseline has none, and comes first.
        training: Errors on the training samples; low is good.
        test: Errors on others, with the same seeds in the same order.
        more: Further columns; one number is the same for all seeds, and None is no number.
    """

    label: str
    strength: str
    mechanism: str | None
    training: Numbers
    test: Numbers
    more: Mapping[str, Numbers | None] = field(default_factory=dict)

    @property
    def gap(self) -> list[float | None]:
        """Test error less training error."""
        pairs = zip(self.test, self.training, strict=True)
        return [None if test is None or training is None else test - training for test, training in pairs]

    @property
    def name(self) -> str:
        """Label and strength."""
        return f"{self.label}, {self.strength}" if self.strength else self.label


class Section(NamedTuple):
    """One error of all rows.

    Attributes:
        title: Which error, in which unit.
        rows: The rows, the baseline first.
    """

    title: str
    rows: Sequence[Measured]


class Interval(NamedTuple):
    """A mean and half the width of its 95 % confidence interval by Student's t, NaN for a single number."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Numbers) -> "Interval | None":
        """Return the interval of the numbers there are, or None."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        if len(known) == 1:
            return cls(known[0], math.nan)
        half = stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known))
        return cls(float(np.mean(known)), float(half))

    def text(self, digits: int = 1) -> str:
        """Return ``35.5 ± 0.9``."""
        mean = f"{round(self.mean, digits) + 0.0:.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


class Difference(NamedTuple):
    """A technique's test error less the baseline's, seed by seed.

    Attributes:
        interval: Of the differences.
        p: Of the two-sided paired t-test, NaN where it cannot be done.
        adjusted: The same after Holm (1979), for all techniques of the section.
    """

    interval: Interval | None
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if self.interval is None or math.isnan(self.adjusted):
            return "-"
        if self.adjusted >= LEVEL:
            return "not shown"
        return "helps" if self.interval.mean < 0 else "hurts"


def paired_p(new: Numbers, old: Numbers) -> tuple[list[float], float]:
    """Return the differences of the pairs there are, and the p-value of their t-test."""
    pairs = [(a, b) for a, b in zip(new, old, strict=True) if a is not None and b is not None]
    differences = [a - b for a, b in pairs]
    if len(pairs) < 2:
        return differences, math.nan
    if np.ptp(differences) == 0:  # the test statistic is 0 / 0, or infinite
        return differences, 1.0 if differences[0] == 0 else 0.0
    return differences, float(stats.ttest_1samp(differences, 0).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many there are (Holm 1979); NaN stays, and does not count."""
    order = sorted((place for place, p in enumerate(values) if not math.isnan(p)), key=lambda place: values[place])
    adjusted, least = list(values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * values[place]))
        adjusted[place] = least
    return adjusted


def differences(rows: Sequence[Measured]) -> list[Difference]:
    """Return how each row but the first differs from it."""
    baseline, *others = rows
    found = [paired_p(row.test, baseline.test) for row in others]
    adjusted = holm([p for _, p in found])
    return [Difference(Interval.of(d), p, a) for (d, p), a in zip(found, adjusted, strict=True)]


HEAD = ("technique", "strength", "training error", "test error", "gap", "test less baseline", "p", "p, Holm", "verdict")


def tables(section: Section) -> list[tuple[str, list[list[str]]]]:
    """Return for each mechanism its title and the lines of its table, the first of which is the head."""
    baseline, *others = section.rows
    found = dict(zip(map(id, others), differences(section.rows), strict=True))
    head = [*HEAD, *baseline.more]
    made = []
    for mechanism in dict.fromkeys(row.mechanism for row in others):
        rows = [row for row in others if row.mechanism == mechanism]
        made.append((str(mechanism), [head, *(_line(row, found.get(id(row))) for row in (baseline, *rows))]))
    return made or [("Baseline", [head, _line(baseline, None)])]


def _line(row: Measured, difference: Difference | None) -> list[str]:
    cells = [row.label, row.strength]
    cells += [_text(Interval.of(values)) for values in (row.training, row.test, row.gap)]
    if difference is None:
        cells += ["", "", "", ""]
    else:
        cells += [_text(difference.interval), _p(difference.p), _p(difference.adjusted), difference.verdict]
    return cells + [_short(values) for values in row.more.values()]


def _text(interval: Interval | None) -> str:
    return "-" if interval is None else interval.text()


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def _short(values: Numbers | None) -> str:
    """Return a mean with three digits, or a whole number as it is."""
    interval = Interval.of(values or [])
    if interval is None:
        return "-"
    return f"{interval.mean:,.0f}" if abs(interval.mean) >= 1000 else f"{interval.mean:.3g}"


def verdicts(section: Section) -> list[str]:
    """Return sentences that say what helps, what hurts, and what was not shown to do either."""
    found = differences(section.rows)
    rows = section.rows[1:]
    sentences = []
    for word, begin in (("helps", "Helps"), ("hurts", "Hurts"), ("not shown", "Not shown to help or to hurt")):
        which = [
            (d.interval.mean, f"{row.name} ({d.interval.mean:+.1f})")
            for row, d in zip(rows, found, strict=True)
            if d.verdict == word and d.interval is not None
        ]
        if which:
            sentences.append(f"{begin} ({len(which)} of {len(rows)}): {'; '.join(text for _, text in sorted(which))}.")
    return sentences


TEST_NOTE = (
    f"Means with 95 % confidence intervals over seeds (Student's t). A row's test errors are compared with the "
    "baseline's of the same seeds by a paired t-test. As there are many rows, p-values are adjusted after Holm, for "
    f"all rows of one error together: 'helps' and 'hurts' stand where the adjusted one is below {LEVEL:g}. 'Not shown' "
    "is no proof that there is no effect; a smaller one may need more seeds. Of two or three seeds intervals are wide, "
    "and the test leans on the differences' being normal."
)


def write(folder: Path, title: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """Write ``table.md``, ``table.csv``, ``picture.png`` and ``report.html``, and return the first's content.

    Args:
        folder: Where; it is made.
        title: What the study is of.
        sections: The errors.
        notes: What a reader must know besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notes = [TEST_NOTE, *notes]
    text = f"# {title}\n"
    for section in sections:
        text += f"\n## {section.title[0].upper()}{section.title[1:]}\n"
        text += "".join(f"\n{sentence}\n" for sentence in verdicts(section))
        for name, lines in tables(section):
            head, *rows = ("| " + " | ".join(line) + " |" for line in lines)
            rule = "|" + " --- |" * 2 + " ---: |" * (len(lines[0]) - 2)
            text += "\n".join([f"\n### {name}\n", head, rule, *rows]) + "\n"
    text += "".join(f"\n{note}\n" for note in notes)
    write_whole(folder / "table.md", text.encode())
    write_whole(folder / "table.csv", _csv(sections).encode())
    draw(folder / "picture.png", sections)
    write_whole(folder / "report.html", _page(title, sections, notes, (folder / "picture.png").read_bytes()).encode())
    return text


def _csv(sections: Sequence[Section]) -> str:
    """Return every number in full precision, a line for each row of each section."""
    lines = []
    for section in sections:
        found = [None, *differences(section.rows)]
        for row, difference in zip(section.rows, found, strict=True):
            line: dict[str, object] = {"error": section.title, "mechanism": row.mechanism or "baseline"}
            line |= {"technique": row.label, "strength": row.strength}
            columns: dict[str, Numbers | None] = {
                "training": row.training,
                "test": row.test,
                "gap": row.gap,
                **row.more,
            }
            for name, values in columns.items():
                interval = Interval.of(values or [])
                line[name] = "" if interval is None else interval.mean
                line[f"{name} (95 % ±)"] = "" if interval is None or math.isnan(interval.half) else interval.half
            if difference is not None and difference.interval is not None:
                line |= {"difference": difference.interval.mean, "difference (95 % ±)": difference.interval.half}
                line |= {"p": difference.p, "p (Holm)": difference.adjusted, "verdict": difference.verdict}
            line |= {f"test of seed {number}": value for number, value in enumerate(row.test)}
            lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
"""Of the mechanisms."""


def draw(path: Path, sections: Sequence[Section]) -> None:
    """Write test error and gap of each row with their intervals, sorted by test error, a row of panels a section."""
    count = max(len(section.rows) for section in sections)
    figure = Figure(figsize=(11, len(sections) * (1.6 + 0.19 * count)), layout="constrained")
    mechanisms = list(dict.fromkeys(row.mechanism for section in sections for row in section.rows if row.mechanism))
    colours = {None: "black"} | dict(zip(mechanisms, COLOURS, strict=False))
    for section, axes in zip(sections, figure.subplots(len(sections), 2, squeeze=False), strict=True):
        known = [row for row in section.rows if Interval.of(row.test) is not None]
        rows = sorted(known, key=lambda row: np.mean([value for value in row.test if value is not None]))
        for panel, name in zip(axes, ("test", "gap"), strict=True):
            for place, row in enumerate(rows):
                interval = Interval.of(getattr(row, name))
                if interval is None:
                    continue
                half = None if math.isnan(interval.half) else interval.half
                how = {"fmt": "D", "markersize": 3.5, "capsize": 2, "linewidth": 1.2}
                panel.errorbar(interval.mean, place, xerr=half, color=colours[row.mechanism], **how)
            reference = Interval.of(getattr(section.rows[0], name))
            if reference is not None:
                panel.axvline(reference.mean, color="black", linestyle="--", linewidth=0.8)
            panel.set_ylim(len(rows) - 0.5, -0.5)
            panel.grid(alpha=0.3)
        axes[0].set_title(f"test: {section.title}", fontsize=9)
        axes[1].set_title("gap: test less training", fontsize=9)
        axes[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
        axes[1].set_yticks(range(len(rows)), [])
        for tick, row in zip(axes[0].get_yticklabels(), rows, strict=True):
            tick.set_color(colours[row.mechanism])
    for mechanism, colour in colours.items():
        figure.axes[0].plot([], [], "D", color=colour, markersize=4, label=mechanism or "Baseline")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save(figure, path)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 2em; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr:nth-child(2) { background: #f4f4f4; }
tr.helps td:nth-child(9) { color: #07720a; font-weight: bold; }
tr.hurts td:nth-child(9) { color: #b3261e; font-weight: bold; }
img { max-width: 100%; }
"""


def _page(title: str, sections: Sequence[Section], notes: Sequence[str], picture: bytes) -> str:
    """Return a page that needs no other file."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in verdicts(section)]
    image = base64.b64encode(picture).decode()
    parts.append(f'<img alt="test error and gap of each row, sorted" src="data:image/png;base64,{image}">')
    for section in sections:
        for name, (head, *lines) in tables(section):
            parts.append(f"<h3>{html.escape(name)}: {html.escape(section.title)}</h3><table>")
            parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
            for line in lines:
                kind = {"helps": ' class="helps"', "hurts": ' class="hurts"'}.get(line[8], "")
                parts.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>")
            parts.append("</table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
