"""metrics.csv: one row for each step at which anything was measured, never twice and none missing."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from mtl.files import write_whole


class History(Logger):
    """A Lightning logger that keeps its table in memory and on disk.

    Lightning's own CSVLogger deletes the table of a run that is resumed. This one cuts it back to the step of
    the checkpoint, so that what is measured again is not written twice.

    Args:
        path: The CSV file; what it already holds is read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, float]] = {}
        if path.exists():
            for row in csv.DictReader(path.read_text().splitlines()):
                step = int(row.pop("step"))
                self.rows[step] = {name: float(value) for name, value in row.items() if value != ""}

    @property
    def name(self) -> str:
        """Return the logger's name."""
        return "history"

    @property
    def version(self) -> str:
        """Return the version, of which there is one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add measurements to the row of an optimizer step; what is no number stays empty."""
        numbers = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self.rows.setdefault(step or 0, {}).update(numbers)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration has a file of its own."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Forget what was measured after a step."""
        self.rows = {s: row for s, row in self.rows.items() if s <= step}

    @rank_zero_only
    def save(self) -> None:
        """Write the table, whole or not at all."""
        columns = ["step", *dict.fromkeys(name for row in self.rows.values() for name in row)]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))
        write_whole(self.path, text.getvalue().encode())

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which something was measured, and the values."""
        points = [(step, row[name]) for step, row in sorted(self.rows.items()) if name in row]
        return [step for step, _ in points], [value for _, value in points]
