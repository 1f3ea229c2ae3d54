"""Is it worth it to learn tasks together? Each task alone, and all on one backbone under several weighting rules."""

from collections.abc import Sequence
from pathlib import Path

from mtl.config import Experiment
from mtl.studies.comparison import Comparison, Entry, Held, single_tasks, with_seed
from mtl.studies.figures import Panel, draw_rows
from mtl.studies.jobs import Job
from mtl.studies.tables import DELTA_COLUMNS

RULES = (
    "equal", "uncertainty", "dwa", "famo", "mgda", "pcgrad", "cagrad", "nash-mtl", "aligned-mtl", "upgrad", "db-mtl",
)  # fmt: skip
"""The rules tried unless others are named."""

QUICK_RULES = ("equal", "uncertainty", "famo", "pcgrad", "cagrad", "nash-mtl", "upgrad", "db-mtl")
"""Those of the quick form."""


def plan(experiment: Experiment, rules: Sequence[str], seeds: Sequence[int], held: Held) -> list[Entry]:
    """Return the trainings of the study: each task alone, and all together, a rule each.

    Args:
        experiment: What to train; its loss weights are those of the rule 'fixed'.
        rules: Names of weighting rules.
        seeds: The seeds.
        held: Which samples' metrics count.

    Raises:
        UserError: An experiment does not fit together.
    """
    entries = [single_tasks(experiment, seeds, held)]
    for rule in rules:
        changes = {"weighting": rule, "loss_weights": experiment.loss_weights if rule == "fixed" else {}}
        jobs = [Job(f"{rule}, seed {seed}", with_seed(experiment, seed, changes), then=held.then) for seed in seeds]
        entries.append(Entry(rule, [[job] for job in jobs]))
    return entries


def report(comparison: Comparison, folder: Path) -> str:
    """Write ``table.md``, ``table.csv`` and ``picture.png``, and return the table in Markdown."""
    text = comparison.write(folder, "weighting")
    single, entries = comparison.entries[0], comparison.entries
    panels = [
        Panel(
            measure.name,
            measure.higher_is_better,
            [comparison.values(entry, measure.name) for entry in entries],
            comparison.spread(single, measure.name),
        )
        for measure in comparison.measures
        if measure.main
    ]
    gains = [[delta.main for delta in comparison.each_delta(entry)] for entry in entries]
    panels.append(Panel(DELTA_COLUMNS[0].title, True, gains, comparison.deltas(single)[0]))
    draw_rows(folder / "picture.png", [comparison.label(entry) for entry in entries], panels)
    return text
