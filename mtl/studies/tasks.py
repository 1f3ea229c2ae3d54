"""Is it worth it to learn tasks together? Each task alone, and all on one backbone under several weighting rules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl import registry
from mtl.config import Experiment
from mtl.errors import UserError
from mtl.studies.comparison import OF_GRADIENTS, SUMMED, Comparison, Entry, Held, single_tasks, with_seed
from mtl.studies.figures import Panel, draw_rows
from mtl.studies.jobs import Job
from mtl.studies.tables import DELTA_COLUMNS
from mtl.weighting.rules import RULES as BUILT_IN

RULES = (
    "equal", "uncertainty", "dwa", "famo", "mgda", "pcgrad", "cagrad", "nash-mtl", "aligned-mtl", "upgrad", "db-mtl",
)  # fmt: skip
"""The rules tried unless others are named."""

QUICK_RULES = ("equal", "uncertainty", "famo", "pcgrad", "cagrad", "nash-mtl", "upgrad", "db-mtl")
"""Those of the quick form."""


def compares_gradients(rule: str) -> bool:
    """Return whether a weighting rule is shown the tasks' gradients."""
    return (BUILT_IN.get(rule) or registry.weightings[rule]).needs_gram


def check_rules(experiment: Experiment, rules: Sequence[str]) -> None:
    """Refuse what is given for rules that are not among those tried.

    Raises:
        UserError: There are options for several rules, or no rule compares the gradients of which something is said.
    """
    if experiment.weighting_options and len(rules) != 1:
        raise UserError(
            f"--weighting-options: this study tries {len(rules)} rules, whose options differ; name the rule that they "
            "are for alone by --rules, and the others in a study of their own"
        )
    for field in OF_GRADIENTS:
        if (value := getattr(experiment, field)) != SUMMED[field] and not any(map(compares_gradients, rules)):
            raise UserError(
                f"--{field.replace('_', '-')} {value} is for rules that compare gradients, and none of --rules "
                f"{' '.join(rules)} does; leave it out, or name one that does"
            )


def _varied(experiment: Experiment) -> str:
    """Return what an experiment changes of its rule, in parentheses, so that names tell such runs apart."""
    every, on = experiment.weighting_every, experiment.weighting_on
    parts = [f"on {on}"] if on != SUMMED["weighting_on"] else []
    parts += [f"every {every}"] if every != SUMMED["weighting_every"] else []
    parts += [f"{name}={value}" for name, value in experiment.weighting_options.items()]
    return f" ({', '.join(parts)})" if parts else ""


def plan(experiment: Experiment, rules: Sequence[str], seeds: Sequence[int], held: Held) -> list[Entry]:
    """Return the trainings of the study: each task alone, and all together, a rule each.

    Where gradients are compared and how often (`weighting_on`, `weighting_every`) is said to the rules that compare
    them; the others keep the defaults.

    Args:
        experiment: What to train; its loss weights are those of the rule 'fixed', its options those of the only rule.
        rules: Names of weighting rules.
        seeds: The seeds.
        held: Which samples' metrics count.

    Raises:
        UserError: An experiment does not fit together.
    """
    entries = [single_tasks(experiment, seeds, held)]
    for rule in rules:
        changes: dict[str, Any] = {
            "weighting": rule,
            "loss_weights": experiment.loss_weights if rule == "fixed" else {},
        }
        if not compares_gradients(rule):
            changes |= {field: SUMMED[field] for field in OF_GRADIENTS}
        each = [with_seed(experiment, seed, changes) for seed in seeds]
        label = rule + _varied(each[0])
        jobs = [Job(f"{label}, seed {one.seed}", one, then=held.then) for one in each]
        entries.append(Entry(label, [[job] for job in jobs]))
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
