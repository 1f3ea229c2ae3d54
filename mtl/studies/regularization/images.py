"""The study on pictures: trains an experiment with and without each technique, and measures all of its tasks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl.build import Surroundings, load_samples, steps_in_all, steps_in_epoch
from mtl.config import SHIPPED_BACKBONE, AugmentationOptions, Experiment, RegularizeOptions, changed
from mtl.errors import UserError, nearest
from mtl.studies.comparison import Entry, Held, alone, with_seed
from mtl.studies.jobs import Job, Outcome, Result, folder_of
from mtl.studies.regularization.recipe import seeds_of
from mtl.studies.regularization.report import Measured, Section, write
from mtl.studies.regularization.techniques import MECHANISMS, Mechanism
from mtl.tasks.base import Task

MEMBERS, PASSES = 3, 20
"""Of an ensemble, and of Monte Carlo dropout."""


@dataclass(frozen=True)
class Variant:
    """A row of the study.

    Attributes:
        name: As --techniques takes it.
        label: What to call it.
        strength: How much of it.
        mechanism: What it works through; the baseline has none.
        changes: What it changes of the baseline's experiment, nested as in YAML.
        words: What else `evaluate` is told.
        members: How many runs answer together.
        alone: Whether each task has a network of its own.
        quick: Whether it is part of the quick form.
    """

    name: str
    label: str
    strength: str
    mechanism: Mechanism | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    members: int = 1
    alone: bool = False
    quick: bool = False


def plain(experiment: Experiment, surroundings: Surroundings) -> Experiment:
    """Return the baseline: an experiment without regularization, validated at its end alone, so that nothing is chosen.

    Raises:
        UserError: The data cannot be used.
    """
    samples = len(load_samples(experiment, "train", surroundings))
    steps = steps_in_all(experiment, samples)
    changes = {
        "max_steps": steps,
        "epoch_samples": experiment.epoch_samples or samples,
        "validate_every": steps,
        "checkpoint_every": experiment.checkpoint_every or steps_in_epoch(experiment, samples),
        "monitor": "gain",
        "init": "none",
        "augment": "none",
        "weight_decay": 0.0,
        "dropout": 0.0,
        "bootstrap": False,
        "freeze": False,
        "augmentation": dict.fromkeys(AugmentationOptions.model_fields),
        "regularize": RegularizeOptions().model_dump(),
        "segmentation": {"label_smoothing": 0.0},
    }
    none = ["drop_path", "ema", "swa", "snapshots", "patience", "lora"]
    none += ["freeze_stages", "unfreeze_at", "backbone_lr", "layer_decay"]
    return changed(experiment, changes | dict.fromkeys(none))


def variants(experiment: Experiment) -> list[Variant]:
    """Return the baseline, and the techniques that an experiment allows.

    Args:
        experiment: As it was given: its own initial weights are those of the transfer.
    """
    found = [Variant("baseline", "baseline", "", None, quick=True)]
    found += [*_smooth(experiment), *_data(experiment), *_average(), *_wide(experiment)]
    return found


def _smooth(experiment: Experiment) -> Iterator[Variant]:
    for value in (1e-5, 1e-4, 1e-3):
        yield Variant("l2", "L2 penalty", f"λ {value:g}", "smooth", {"regularize": {"l2": value}}, quick=value == 1e-4)
    for value in (1e-6, 1e-5):
        yield Variant("l1", "L1 penalty", f"λ {value:g}", "smooth", {"regularize": {"l1": value}})
    for value in (0.01, 0.05, 0.3):
        label = "decoupled weight decay"
        yield Variant("weight-decay", label, f"{value:g}", "smooth", {"weight_decay": value}, quick=value == 0.05)
    for value in (0.1, 0.3):
        yield Variant("dropout", "dropout in heads", f"p {value:g}", "smooth", {"dropout": value}, quick=value == 0.3)
    yield Variant("drop-path", "drop path", "p 0.1", "smooth", {"drop_path": 0.1})
    for value in (0.02, 0.1):
        changes: dict[str, Any] = {"augmentation": {"noise": value}}
        yield Variant("input-noise", "noise on inputs", f"deviation {value:g}", "smooth", changes)
    if "segmentation" in experiment.task and experiment.segmentation.loss != "dice":
        for value in (0.1, 0.3):
            changes = {"segmentation": {"label_smoothing": value}}
            strength, quick = f"share {value:g}", value == 0.1
            yield Variant("label-smoothing", "label smoothing", strength, "smooth", changes, quick=quick)
    if "depth" in experiment.task:
        for value in (0.05, 0.2):
            changes = {"regularize": {"depth_jitter": value}}
            yield Variant("depth-jitter", "noise on depth labels", f"deviation {value:g}", "smooth", changes)


def _data(experiment: Experiment) -> Iterator[Variant]:
    for policy in ("light", "heavy", "lecture"):
        changes: dict[str, Any] = {"augment": policy}
        yield Variant("augmentation", "augmentation", policy, "data", changes, quick=policy == "light")
    start = experiment.init
    if start == "none" and experiment.backbone == SHIPPED_BACKBONE:
        start = "shipped"
    if start != "none":
        yield Variant("transfer", "transfer", f"--init {start}", "data", {"init": start}, quick=True)
        changes = {"init": start, "regularize": {"l2_sp": 1e-3}}
        yield Variant("transfer", "transfer", f"--init {start}, L2-SP, λ 0.001", "data", changes)
    changes = {"task": [*experiment.task, "masked"]}
    yield Variant("self-supervised", "masked, beside the tasks", "", "data", changes, quick=True)
    if len(experiment.task) > 1:
        label, strength = "without multi-task learning", f"{len(experiment.task)} networks"
        yield Variant("multi-task", label, strength, "data", alone=True, quick=True)


def _average() -> Iterator[Variant]:
    words: tuple[str, ...]
    for kind in ("mean", "median", "logits"):
        words, label = ("--combine", kind), f"ensemble of {MEMBERS}"
        yield Variant("ensemble", label, kind, "average", words=words, members=MEMBERS, quick=kind == "mean")
    changes: dict[str, Any] = {"bootstrap": True}
    yield Variant("bagging", f"bagging, {MEMBERS} resampled sets", "mean", "average", changes, members=MEMBERS)
    changes, words = {"snapshots": MEMBERS}, ("--snapshots",)
    yield Variant("snapshots", "snapshot ensemble", f"{MEMBERS} cycles", "average", changes, words)
    for decay in (0.9, 0.99):
        changes = {"ema": decay}
        yield Variant("ema", "moving average of weights", f"decay {decay:g}", "average", changes, quick=decay == 0.9)
    yield Variant("swa", "plain average of weights", "from 75% on", "average", {"swa": 0.75})
    words = ("--mc-dropout", str(PASSES))
    yield Variant("mc-dropout", "Monte Carlo dropout", f"p 0.3, {PASSES} passes", "average", {"dropout": 0.3}, words)


def _wide(experiment: Experiment) -> Iterator[Variant]:
    for factor in (0.3, 3.0):
        yield Variant("learning-rate", "learning rate", f"x {factor:g}", "wide", {"lr": factor * experiment.lr})
    for name, label, word, values, first in (
        ("gradient_norm", "gradient norm", "for a step of", (0.01, 0.1), None),
        ("sam", "SAM", "radius", (0.05, 0.2), 0.05),
        ("weight_noise", "noise on weights", "deviation", (0.003, 0.01), 0.003),
    ):
        for value in values:
            changes, key = {"regularize": {name: value}}, name.replace("_", "-")
            yield Variant(key, label, f"{word} {value:g}", "wide", changes, quick=value == first)


def choose(found: Sequence[Variant], wanted: Sequence[str], quick: bool) -> list[Variant]:
    """Return the baseline and the rows of the techniques that are wanted; none stands for all, or for the quick form.

    Raises:
        UserError: There is no such technique, or not for this experiment.
    """
    known = list(dict.fromkeys(one.name for one in found if one.mechanism))
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--techniques {name!r} is none of this experiment's{nearest(name, known)}; "
                f"there are {', '.join(known)}"
            )
    if wanted:
        return [one for one in found if one.mechanism is None or one.name in wanted]
    return [one for one in found if one.quick or not quick]


@dataclass
class Row(Entry):
    """A variant's trainings: for each seed those whose results are read, each after those that answer with it.

    Attributes:
        variant: What it is.
        files: In a run's folder: the metrics on the training samples, and those on others.
    """

    variant: Variant
    files: tuple[str, str]


def plan(base: Experiment, chosen: Sequence[Variant], seeds: Sequence[int], held: Held, runs: Path) -> list[Row]:
    """Return the trainings of the study.

    Args:
        base: The baseline, see `plain`.
        chosen: The rows, the baseline first.
        seeds: The seeds; further members of ensembles have seeds of their own.
        held: On which samples the test error is measured.
        runs: The folder of all runs.

    Raises:
        UserError: An experiment does not fit together.
    """
    rows = []
    for number, variant in enumerate(chosen):
        key = f"{variant.name}-{variant.strength}" if variant.words else "plain"
        key = "".join(letter if letter.isalnum() else "-" for letter in key)
        files = (f"{key}-train.json", f"{key}-{'test' if held.test else 'validation'}.json")
        experiment = changed(base, variant.changes)
        experiments = [alone(experiment, task) for task in experiment.task] if variant.alone else [experiment]
        label = f"{variant.label} {variant.strength}".strip()
        jobs = [
            [_job(f"{label}, seed {seed}", one, seed, variant, files, held, runs) for one in experiments]
            for seed in seeds
        ]
        rows.append(Row(label if number else "baseline", jobs, variant, files))
    return rows


def _job(
    name: str, experiment: Experiment, seed: int, variant: Variant, files: tuple[str, str], held: Held, runs: Path
) -> Job:
    first, *others = (with_seed(experiment, each) for each in seeds_of(seed, variant.members))
    together = [str(folder_of(other, runs)) for other in others]
    split = "test" if held.test else "validation"
    then = {
        file: ("evaluate", "{run}", *together, "--split", where, *variant.words, "--json", "{file}")
        for file, where in zip(files, ("train", split), strict=True)
    }
    after = tuple(Job(f"{name}, member {number}", other) for number, other in enumerate(others, 2))
    return Job(name, first, after, then)


def report(
    rows: Sequence[Row],
    outcomes: Mapping[Job, Outcome],
    tasks: Sequence[Task],
    base: Experiment,
    held: Held,
    samples: int,
    folder: Path,
) -> str:
    """Write the study's table, picture and page, and return the table.

    Args:
        rows: The rows, the baseline first.
        outcomes: What became of the trainings.
        tasks: The experiment's tasks.
        base: The baseline.
        held: On which samples the test error is measured.
        samples: How many training samples there are.
        folder: Where to.
    """
    sections = [
        Section(
            f"{task.name}: remaining error by {task.main_metric}, in percent",
            [_measured(row, outcomes, task) for row in rows],
        )
        for task in tasks
    ]
    where = "the official test split" if held.test else "the validation samples, as the data set has no test split"
    notes = [
        f"{base.data.name}, {samples} training samples of {base.data.size[0]} x {base.data.size[1]} pixels; "
        f"{base.backbone} from random weights, {', '.join(base.task)} together, {base.max_steps} steps of "
        f"{base.batch_size} samples by {base.optimizer} with a learning rate of {base.lr:g}, without augmentation, "
        "weight decay and whatever else regularizes. A row changes what it says and nothing else.",
        f"The test error is measured on {where}, with the weights at the end of training: nothing was chosen by these "
        "samples, nor was the strength of a technique, all of which are shown. The training error is that of the same "
        "weights on the training samples, without augmentation.",
        "Left out: early stopping, which needs further held-out samples to stop by.",
        "Seconds: the steps of a training, of all members of an ensemble. Parameters: in millions, of what must be "
        "kept to predict.",
    ]
    return write(folder, f"Regularization on {base.data.name}", sections, notes)


def _measured(row: Row, outcomes: Mapping[Job, Outcome], task: Task) -> Measured:
    errors: tuple[list[float | None], list[float | None]] = ([], [])
    seconds: list[float] = []
    parameters: list[float] = []
    for jobs in row.jobs:
        finished = [outcomes[job] for job in jobs]
        runs = [result for result in finished if isinstance(result, Result)]
        for into, file in zip(errors, row.files, strict=True):
            metrics = {name: value for run in runs for name, value in run.read(file).items()}
            value = metrics.get(f"{task.name}/{task.main_metric}")
            into.append(None if value is None else 100 * task.remaining_error({task.main_metric: value}))
        costs = [run.cost for run in runs if run.cost.get("seconds_per_step") is not None]
        if len(costs) == len(jobs):
            seconds.append(row.variant.members * sum(cost["steps"] * cost["seconds_per_step"] for cost in costs))
            parameters.append(row.variant.members * sum(cost["parameters"] for cost in costs) / 1e6)
    variant = row.variant
    mechanism = MECHANISMS[variant.mechanism] if variant.mechanism else None
    more = {"seconds": seconds, "parameters (M)": parameters[:1]}
    return Measured(variant.label, variant.strength, mechanism, *errors, more)
