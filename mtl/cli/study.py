"""``python -m mtl study``: measurements over many models or trainings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mtl import registry
from mtl.cli.jobs import Trainings, check_different, check_outcomes, read_study, results_folder, run_jobs
from mtl.cli.surroundings import surroundings
from mtl.cli.words import check_output
from mtl.config import DECODERS, Experiment
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import parse

if TYPE_CHECKING:
    from mtl.build import Surroundings
    from mtl.studies.comparison import Comparison, Entry, Held


@dataclasses.dataclass
class _Backbones:
    names: Annotated[list[str], tyro.conf.arg(help="timm's models (none given: one of each family).")] = (
        dataclasses.field(default_factory=list)
    )
    decoders: Annotated[list[str], tyro.conf.arg(help="Which decoders to try them with.")] = dataclasses.field(
        default_factory=lambda: list(DECODERS)
    )
    size: Annotated[tuple[int, int], tyro.conf.arg(help="Height and width in pixels.")] = (128, 128)
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE.md", help="Also write the table to this file.")] = None


def _backbones(words: list[str], program: str) -> None:
    """Try which backbones train with which decoders."""
    flags = parse(_Backbones, None, words, program, STUDIES["backbones"][1])
    for decoder in flags.decoders:
        if decoder not in DECODERS:
            raise UserError(f"--decoders {decoder!r}{nearest(decoder, DECODERS)}; there are {', '.join(DECODERS)}")
    if min(flags.size) < 16:
        raise UserError(f"--size {flags.size[0]} {flags.size[1]}: height and width must be at least 16 pixels")
    if not flags.decoders:
        raise UserError(f"--decoders names none; there are {', '.join(DECODERS)}")
    if flags.output is not None:
        check_output("--output", flags.output)
    surroundings()
    from mtl.studies.backbones import FAMILIES, markdown, study

    table = markdown(study(flags.names or list(FAMILIES), flags.decoders, flags.size, print))
    if flags.output is None:
        print(table)
    else:
        write_whole(flags.output, table.encode())
        print(f"written to {flags.output}")


QUICK: dict[str, Any] = {
    "max_steps": 150,
    "validate_every": 150,
    "batch_size": 16,
    "logger": "csv",
    "data": {"size": (96, 128)},
}
"""What --quick makes of the trainings of several tasks."""


@dataclasses.dataclass
class _Tasks(Trainings):
    rules: Annotated[
        list[str],
        tyro.conf.arg(
            help="Weighting rules (none given: eleven of them, with --quick eight). --weighting-every and "
            "--weighting-on hold for those that compare gradients; --weighting-options needs a single rule."
        ),
    ] = dataclasses.field(default_factory=list)


def _tasks(words: list[str], program: str) -> None:
    """Train each task alone, and all together under several rules."""
    flags, experiment = read_study(_Tasks, QUICK, words, program, STUDIES["tasks"][1])
    names = registry.weightings.names
    for rule in flags.rules:
        if rule not in names:
            raise UserError(
                f"--rules {rule!r} is no weighting rule{nearest(rule, names)}; there are {', '.join(names)}"
            )
    check_different("--rules", flags.rules)
    if len(experiment.task) < 2:
        raise UserError(f"--task {experiment.task[0]}: this study compares tasks alone and together; name several")
    if experiment.weighting != "fixed":
        raise UserError(f"--weighting {experiment.weighting}: this study tries several rules; name them by --rules")
    here = surroundings()
    from mtl.studies.tasks import QUICK_RULES, RULES, check_rules, plan, report

    rules = flags.rules or (QUICK_RULES if flags.quick else RULES)
    check_rules(experiment, rules)
    _compare("tasks", flags, experiment, here, lambda held: plan(experiment, rules, flags.seeds, held), report)


LEAST_RATIO, MOST_RATIO = 1e-6, 1e6
"""Between which ratios weights tell two tasks apart, and the losses still add up in single precision."""


@dataclasses.dataclass
class _LossWeights(Trainings):
    ratios: Annotated[list[float], tyro.conf.arg(help="Of the first task's weight to the second's.")] = (
        dataclasses.field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    )


def _loss_weights(words: list[str], program: str) -> None:
    """Sweep the ratio of two tasks' weights."""
    flags, experiment = read_study(_LossWeights, QUICK, words, program, STUDIES["loss-weights"][1])
    if not flags.ratios:
        raise UserError("--ratios names none; give some, such as --ratios 0.1 1 10")
    for ratio in flags.ratios:
        if not LEAST_RATIO <= ratio <= MOST_RATIO:
            raise UserError(f"--ratios {ratio:g}: a ratio must be from {LEAST_RATIO:g} to {MOST_RATIO:g}")
    check_different("--ratios", flags.ratios)
    if len(experiment.task) != 2:
        raise UserError(f"--task {' '.join(experiment.task)}: this study weighs two tasks against each other; name two")
    if experiment.weighting != "fixed" or experiment.loss_weights:
        raise UserError("--weighting and --loss-weights: this study chooses the weights, by --ratios; leave them out")
    here = surroundings()
    from mtl.studies.loss_weights import check_ratios, plan, report

    check_ratios(flags.ratios)
    _compare(
        "loss-weights",
        flags,
        experiment,
        here,
        lambda held: plan(experiment, flags.ratios, flags.seeds, held),
        lambda comparison, folder: report(comparison, flags.ratios, folder),
    )


def _compare(
    name: str,
    flags: Trainings,
    experiment: Experiment,
    here: "Surroundings",
    plan: "Callable[[Held], list[Entry]]",
    report: "Callable[[Comparison, Path], str]",
) -> None:
    """Run the trainings of a study of several tasks, and write its table and its picture.

    Raises:
        UserError: The experiment cannot be trained, or some trainings failed, which the table marks.
    """
    folder = results_folder(experiment, name)
    from mtl.studies.comparison import Comparison, check_entries, jobs_of, measures_of, prepare

    tasks, held = prepare(experiment, here)
    entries = plan(held)
    check_entries(entries, here)
    outcomes = run_jobs(jobs_of(entries), experiment, flags.jobs)
    print("\n" + report(Comparison(entries, outcomes, measures_of(tasks), held), folder))
    print(f"written to {folder}: table.md  table.csv  picture.png")
    check_outcomes(outcomes)


STUDIES: dict[str, tuple[Callable[[list[str], str], None], str]] = {
    "backbones": (_backbones, "Try which timm backbones train with which decoders, and why the others do not."),
    "tasks": (_tasks, "Train each task alone and all together, under several weighting rules, and compare."),
    "loss-weights": (_loss_weights, "Sweep the ratio of two tasks' loss weights, and draw the trade-off."),
}
"""Each study's function and what it does."""


def run(words: list[str], program: str, description: str) -> None:
    """Run a study."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(STUDIES)}}} [-h] [OPTIONS]\n\n{description}\n")
        print("\n".join(f"  {name:12} {what}" for name, (_, what) in STUDIES.items()))
    elif name not in STUDIES:
        raise UserError(f"{name!r} is no study{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    else:
        STUDIES[name][0](rest, f"{program} {name}")
