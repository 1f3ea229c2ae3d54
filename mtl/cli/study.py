"""``python -m mtl study``: measurements over many models or trainings."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mtl import registry
from mtl.cli.jobs import (
    RUNS,
    Trainings,
    check_different,
    check_folder,
    check_outcomes,
    check_seeds,
    read_study,
    results_folder,
    run_jobs,
)
from mtl.cli.surroundings import count_cores, surroundings
from mtl.cli.words import base_of, check_output, values_of_flag
from mtl.config import DECODERS, Experiment
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import parse

if TYPE_CHECKING:
    from mtl.build import Surroundings
    from mtl.studies.comparison import Comparison, Entry, Held
    from mtl.tasks.base import Task


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


PRETRAINING_QUICK: dict[str, Any] = QUICK | {"data": {"size": (64, 64)}}
"""What --quick makes of the trainings from few labels."""


@dataclasses.dataclass
class _Pretraining(Trainings):
    labels: Annotated[
        list[int],
        tyro.conf.arg(help="Numbers of labelled training images (none given: 25 50 100 400, with --quick 25 100)."),
    ] = dataclasses.field(default_factory=list)
    pretrain_steps: Annotated[
        int | None, tyro.conf.arg(help="Optimizer steps of a pretraining (none: ten times those of what follows).")
    ] = None
    methods: Annotated[
        list[str],
        tyro.conf.arg(
            help="Rows: scratch, masked-frozen, masked-fine-tuned, joint, segmentation-frozen, segmentation-fine-tuned "
            "(none given: all for which there are labels, with --quick the first four). --weighting and --loss-weights "
            "hold for joint, --backbone-lr and --layer-decay for what is fine-tuned."
        ),
    ] = dataclasses.field(default_factory=list)


def _pretraining(words: list[str], program: str) -> None:
    """Learn each task from few labels, from scratch and on pretrained backbones."""
    flags, experiment = read_study(_Pretraining, PRETRAINING_QUICK, words, program, STUDIES["pretraining"][1])
    check_different("--labels", flags.labels)
    check_different("--methods", flags.methods)
    if flags.labels and min(flags.labels) < 1:
        raise UserError(f"--labels {min(flags.labels)} must be at least 1")
    if flags.pretrain_steps is not None and flags.pretrain_steps < 1:
        raise UserError(f"--pretrain-steps {flags.pretrain_steps} must be at least 1")
    _check_undecided(experiment, words)
    here = surroundings()
    from mtl.studies import pretraining as study
    from mtl.studies.comparison import prepare
    from mtl.studies.pretraining_report import report

    for name in flags.methods:
        if name not in study.METHODS:
            raise UserError(
                f"--methods {name!r} is none{nearest(name, study.METHODS)}; there are {', '.join(study.METHODS)}"
            )
    folder = results_folder(experiment, "pretraining")
    labels = flags.labels or (study.QUICK_LABELS if flags.quick else study.LABELS)
    tasks, held = prepare(experiment, here)
    default = study.QUICK_METHODS if flags.quick else tuple(study.METHODS)
    methods = study.find_methods(experiment, flags.methods, default, here)
    study.check_used(experiment, methods, flags.pretrain_steps)
    setting = study.settle(experiment, flags.pretrain_steps, here)
    study.check_labels(setting, labels, methods, here)
    rows = study.plan(setting, labels, methods, flags.seeds, tasks, held, experiment.output_dir / RUNS)
    _measure(
        rows,
        tasks,
        held,
        experiment,
        flags,
        here,
        folder,
        lambda comparison, folder: report(comparison, rows, tasks, setting, folder),
    )


def _check_undecided(experiment: Experiment, words: list[str]) -> None:
    """Refuse what each row of the study decides for itself.

    Raises:
        UserError: It is given.
    """
    default = Experiment()
    if "masked" in experiment.task:
        raise UserError("--task masked: this study learns it by itself where it is wanted; name tasks with labels")
    if experiment.init != "none" and (experiment.init != default.init or values_of_flag(words, "--init")):
        raise UserError(f"--init {experiment.init}: this study decides what a backbone starts from; leave it out")
    for name in ("freeze", "freeze_stages", "unfreeze_at", "lora"):
        if getattr(experiment, name) != getattr(default, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: this study decides how much of a backbone learns, by --methods; leave it out")
    if experiment.data.labels:
        raise UserError("--data.labels: this study tries several numbers of labels; name them by --labels")
    if experiment.more_data:
        raise UserError("more_data: this study counts the labels of a single data set; leave the others out")


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
    from mtl.studies.comparison import prepare

    tasks, held = prepare(experiment, here)
    _measure(plan(held), tasks, held, experiment, flags, here, folder, report)


def _measure(
    entries: "Sequence[Entry]",
    tasks: "Sequence[Task]",
    held: "Held",
    experiment: Experiment,
    flags: Trainings,
    here: "Surroundings",
    folder: Path,
    report: "Callable[[Comparison, Path], str]",
) -> None:
    """Run the trainings of planned entries, and write their table and their picture to a folder.

    Raises:
        UserError: A training cannot be done, or some failed, which the table marks.
    """
    from mtl.studies.comparison import Comparison, check_entries, jobs_of, measures_of

    check_entries(entries, here)
    outcomes = run_jobs(jobs_of(entries), experiment, flags.jobs)
    print("\n" + report(Comparison(entries, outcomes, measures_of(tasks), held), folder))
    print(f"written to {folder}: table.md  table.csv  picture.png")
    check_outcomes(outcomes)


_OTHER = "choose another --output-dir"


@dataclasses.dataclass
class _Lecture:
    figures: Annotated[list[str], tyro.conf.arg(metavar="NAME ...", help="Which figures (none given: all).")] = (
        dataclasses.field(default_factory=list)
    )
    output_dir: Annotated[Path, tyro.conf.arg(help="The folder to write to.")] = Path("runs/lecture")


def _lecture(words: list[str], program: str) -> None:
    """Draw the lecture's figures on regularization."""
    flags = parse(_Lecture, None, words, program, STUDIES["lecture"][1])
    check_different("--figures", flags.figures)
    check_folder(flags.output_dir, _OTHER)
    surroundings()
    from mtl.studies.lecture import run

    run(flags.output_dir, flags.figures)


@dataclasses.dataclass
class _Regularization:
    techniques: Annotated[list[str], tyro.conf.arg(metavar="NAME ...", help="Which techniques (none given: all).")] = (
        dataclasses.field(default_factory=list)
    )
    seeds: Annotated[list[int], tyro.conf.arg(help="The seeds, at least two.")] = dataclasses.field(
        default_factory=lambda: [0, 1, 2, 3, 4]
    )
    root: Annotated[
        Path | None, tyro.conf.arg(help="MNIST-1D's file, or its folder (none: the data are generated).")
    ] = None
    jobs: Annotated[
        int | None, tyro.conf.arg(help="Trainings at a time, each of many networks (none: one a core).")
    ] = None
    output_dir: Annotated[Path, tyro.conf.arg(help="The folder to write to.")] = Path("runs/regularization")


IMAGES_QUICK: dict[str, Any] = QUICK | {"max_steps": 100, "validate_every": 100, "data": {"size": (64, 64)}}
"""What --quick makes of the trainings with and without regularization."""

FEW_ROOMS = 64
"""Training samples of rendered rooms in the quick form, few enough to be learned by heart."""


@dataclasses.dataclass
class _RegularizationOfImages(Trainings):
    techniques: Annotated[
        list[str],
        tyro.conf.arg(
            metavar="NAME ...", help="Which techniques (none given: all, with --quick one strength of the usual ones)."
        ),
    ] = dataclasses.field(default_factory=list)


OF_REGULARIZATION = (
    *("init", "freeze", "freeze-stages", "unfreeze-at", "lora", "backbone-lr", "layer-decay", "dropout", "drop-path"),
    *("augment", "weight-decay", "ema", "swa", "snapshots", "bootstrap", "patience", "validate-every", "monitor"),
    *("segmentation.label-smoothing", "mask", "regularize", "augmentation"),
)
"""Flags, and groups of flags, that the study of regularization decides for each row."""


def _regularization_of_images(words: list[str], program: str) -> None:
    """Train an experiment with and without each technique."""
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("_", "-")
        names = {name for name in OF_REGULARIZATION if flag in (name, f"no-{name}") or flag.startswith(f"{name}.")}
        if word.startswith("--") and names:
            raise UserError(f"--{flag}: this study decides what regularizes, row by row, by --techniques; leave it out")
    quick = IMAGES_QUICK
    if base_of(words).data.name == "scenes":
        quick = quick | {"data": quick["data"] | {"train_samples": FEW_ROOMS}}
    flags, experiment = read_study(_RegularizationOfImages, quick, words, program, STUDIES["regularization"][1])
    check_different("--techniques", flags.techniques)
    if experiment.signals:
        raise UserError(
            f"--config {flags.config}: this study trains MNIST-1D by the lecture's own recipe; leave --config out"
        )
    if "masked" in experiment.task:
        raise UserError("--task masked: this study learns it by itself where it is wanted; name tasks with labels")
    if len(flags.seeds) < 2:
        raise UserError(f"--seeds {flags.seeds[0]}: a single seed has no spread to judge by; give at least two")
    here = surroundings()
    from mtl.build import load_samples
    from mtl.studies.comparison import check_entries, jobs_of, prepare
    from mtl.studies.regularization.images import choose, plain, plan, report, variants

    folder = results_folder(experiment, "regularization")
    chosen = choose(variants(experiment), flags.techniques, flags.quick)
    base = plain(experiment, here)
    tasks, held = prepare(base, here)
    rows = plan(base, chosen, flags.seeds, held, experiment.output_dir / RUNS)
    check_entries(rows, here)
    outcomes = run_jobs(jobs_of(rows), experiment, flags.jobs)
    samples = len(load_samples(base, "train", here))
    print("\n" + report(rows, outcomes, tasks, base, held, samples, folder))
    print(f"written to {folder}: table.md  table.csv  picture.png  report.html")
    check_outcomes(outcomes)


def _regularization(words: list[str], program: str) -> None:
    """Measure what each technique does to training and test error: on MNIST-1D, or on the pictures of a --config."""
    if values_of_flag(words, "--config"):
        _regularization_of_images(words, program)
        return
    description = f"{STUDIES['regularization'][1]} On MNIST-1D; with --config, on its pictures, by flags of train."
    flags = parse(_Regularization, None, words, program, description)
    check_different("--techniques", flags.techniques)
    check_seeds(flags.seeds)
    if len(flags.seeds) < 2:
        raise UserError(f"--seeds {flags.seeds[0]}: a single seed has no spread to judge by; give at least two")
    if flags.jobs is not None and flags.jobs < 1:
        raise UserError(f"--jobs {flags.jobs} must be at least 1")
    check_folder(flags.output_dir, _OTHER)
    if (flags.output_dir / "config.yaml").exists():
        raise UserError(f"{flags.output_dir} is a run's folder; choose another --output-dir for the study")
    surroundings()
    from mtl.studies.regularization.signals import check_names, run

    check_names(flags.techniques)
    print("\n" + run(flags.output_dir, flags.techniques, flags.seeds, flags.root, flags.jobs or count_cores(), print))
    print(f"written to {flags.output_dir}: table.md  table.csv  picture.png  report.html")


STUDIES: dict[str, tuple[Callable[[list[str], str], None], str]] = {
    "backbones": (_backbones, "Try which timm backbones train with which decoders, and why the others do not."),
    "tasks": (_tasks, "Train each task alone and all together, under several weighting rules, and compare."),
    "loss-weights": (_loss_weights, "Sweep the ratio of two tasks' loss weights, and draw the trade-off."),
    "pretraining": (_pretraining, "Learn from few labels, from scratch and after masked pretraining, and compare."),
    "lecture": (_lecture, "Draw the lecture's figures on regularization anew, each with its numbers."),
    "regularization": (_regularization, "Measure what each way of regularizing does to training and test error."),
}
"""Each study's function and what it does."""


def run(words: list[str], program: str, description: str) -> None:
    """Run a study."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(STUDIES)}}} [-h] [OPTIONS]\n\n{description}\n")
        print("\n".join(f"  {name:14} {what}" for name, (_, what) in STUDIES.items()))
    elif name not in STUDIES:
        raise UserError(f"{name!r} is no study{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    else:
        STUDIES[name][0](rest, f"{program} {name}")
