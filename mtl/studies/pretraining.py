"""Is masked pretraining worth it? A task from few labels, from scratch and on backbones that have learned before."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtl.build import Split, Surroundings, build_module, open_source, steps_in_all, steps_in_epoch, target_of
from mtl.config import Experiment, TaskGroup, changed
from mtl.errors import UserError
from mtl.studies.comparison import Entry, Held, alone, with_seed
from mtl.studies.figures import COLOUR, REFERENCE
from mtl.studies.jobs import Job, folder_of
from mtl.tasks.base import Task

Teacher = Literal["masked", "segmentation"]


@dataclass(frozen=True)
class Method:
    """A way of learning a task from few labels.

    Attributes:
        label: What to call it.
        teacher: What the backbone has learned before, if anything.
        freeze: Whether the backbone stays as it has learned it.
        joint: Whether the task is learned together with the masked one.
        style: Colour, marker and line in the picture.
    """

    label: str
    teacher: Teacher | None = None
    freeze: bool = False
    joint: bool = False
    style: tuple[str, str] = (REFERENCE, "s-")

    @property
    def masked(self) -> bool:
        """Whether patches are hidden, before or meanwhile."""
        return self.joint or self.teacher == "masked"

    @property
    def tuned(self) -> bool:
        """Whether a backbone goes on learning that has learned before."""
        return self.teacher is not None and not self.freeze


METHODS = {
    "scratch": Method("from scratch"),
    "masked-frozen": Method("masked, then frozen", "masked", freeze=True, style=(COLOUR, "o--")),
    "masked-fine-tuned": Method("masked, then fine-tuned", "masked", style=(COLOUR, "o-")),
    "joint": Method("jointly with masked", joint=True, style=("tab:green", "^-")),
    "segmentation-frozen": Method(
        "segmentation, then frozen", "segmentation", freeze=True, style=("tab:orange", "v--")
    ),
    "segmentation-fine-tuned": Method("segmentation, then fine-tuned", "segmentation", style=("tab:orange", "v-")),
}
"""The rows of the study, by the names that --methods takes."""

QUICK_METHODS = ("scratch", "masked-frozen", "masked-fine-tuned", "joint")
"""Those of the quick form."""

LABELS, QUICK_LABELS = (25, 50, 100, 400), (25, 100)
"""Numbers of labelled training images, unless others are named."""

LONGER = 10
"""Pretraining takes so many times the steps of what follows, unless --pretrain-steps says otherwise."""

CROP = 1.0
"""Masked pretraining enlarges pictures up to twice and keeps any part, unless --augmentation.crop says otherwise: what
is passed over many times is learned by heart, and crops are the augmentation that MAE found to suffice."""

LABELLED_SHARE = 0.5
"""Share of the samples that have a label where the masked task is learned beside another."""

SPLITS: tuple[Split, ...] = ("train", "validation")
"""What the study reads."""

WEIGHTING = tuple(name for name in TaskGroup.model_fields if name not in ("needs_plugins", "task"))
"""Fields that say how losses are combined."""

OF_TUNING = ("backbone_lr", "layer_decay")
"""Fields that concern a backbone that goes on learning."""


@dataclass
class Row(Entry):
    """A method with a number of labels: for each seed, a job for each task that it is measured on.

    Attributes:
        method: What it does.
        labels: With how many labelled training images of the task.
    """

    method: Method
    labels: int


@dataclass(frozen=True)
class Setting:
    """What all trainings of the study have in common.

    Attributes:
        experiment: The tasks, each to be learned by itself, and how; its steps, epochs and validations are those of
            every training, whatever its labels.
        pretrain_steps: Optimizer steps of what comes before.
        images: How many training images there are, labelled or not.
    """

    experiment: Experiment
    pretrain_steps: int
    images: int


def settle(experiment: Experiment, pretrain_steps: int | None, surroundings: Surroundings) -> Setting:
    """Return the experiment with lengths that no longer depend on how many samples have labels.

    An epoch is as many samples as there are training images, drawn again and again from those with a label.

    Args:
        experiment: As the flags have it.
        pretrain_steps: Steps of a pretraining, or None for `LONGER` times the others'.
        surroundings: Where.

    Raises:
        UserError: The data set cannot be used.
    """
    images = len(open_source(experiment, "train", surroundings))
    steps, epoch = steps_in_all(experiment, images), steps_in_epoch(experiment, images)
    every = experiment.validate_every or epoch
    lengths = {
        "max_steps": steps,
        "epoch_samples": experiment.epoch_samples or images,
        "validate_every": every,
        "checkpoint_every": experiment.checkpoint_every or every,
        "init": "none",
    }
    return Setting(changed(experiment, lengths), pretrain_steps or LONGER * steps, images)


def find_methods(
    experiment: Experiment, named: Sequence[str], default: Sequence[str], surroundings: Surroundings
) -> list[str]:
    """Return the methods to try: those named, or those of the default for which there are the data.

    Raises:
        UserError: One that is named needs labels that are not there.
    """
    sources = (open_source(experiment, split, surroundings) for split in SPLITS)
    lacking = None
    if not all(source.labelled("segmentation").any() for source in sources):
        lacking = "the data set has no segmentation labels to learn from before"
    elif experiment.task == ["segmentation"] and other_domain(experiment) is None:
        lacking = "a backbone that has seen all segmentation labels says nothing about few of them; name another --task"
    if lacking is None:
        return list(named or default)
    for name in named:
        if METHODS[name].teacher == "segmentation":
            raise UserError(f"--methods {name}: {lacking}")
    return list(named) or [name for name in default if METHODS[name].teacher != "segmentation"]


def check_used(experiment: Experiment, names: Sequence[str], pretrain_steps: int | None) -> None:
    """Refuse what is said of methods that are not among those tried.

    Raises:
        UserError: Something is.
    """
    methods, default = [METHODS[name] for name in names], Experiment()
    for flags, given, used in (
        ("--pretrain-steps is", pretrain_steps is not None, any(method.teacher for method in methods)),
        ("--mask.* is", experiment.mask != default.mask, any(method.masked for method in methods)),
        (
            "--weighting and --loss-weights are",
            any(getattr(experiment, name) != getattr(default, name) for name in WEIGHTING),
            any(method.joint for method in methods),
        ),
        (
            "--backbone-lr and --layer-decay are",
            any(getattr(experiment, name) is not None for name in OF_TUNING),
            any(method.tuned for method in methods),
        ),
    ):
        if given and not used:
            raise UserError(f"{flags} for other rows than --methods {' '.join(names)}; leave that out, or name them")


def check_labels(setting: Setting, labels: Sequence[int], names: Sequence[str], surroundings: Surroundings) -> None:
    """Refuse more labels than there are, and what cannot be masked, before anything is trained.

    Raises:
        UserError: A task has fewer labels, or the backbone does not go with the masked task's options.
    """
    source, most = open_source(setting.experiment, "train", surroundings), max(labels)
    for task in setting.experiment.task:
        available = int(source.labelled(target_of(task)).sum())
        if most > available:
            raise UserError(
                f"--labels {most}: {source.info.name} has only {available} training images with labels for {task!r}"
            )
    if most == setting.images and "joint" in names:
        raise UserError(
            f"--labels {most}: these are all training images, and the method 'joint' is for more images than labels; "
            "name fewer, or leave it out of --methods"
        )
    if any(METHODS[name].masked for name in names):
        build_module(_pretraining(setting, "masked"), source.info, total_steps=1)


def plan(
    setting: Setting,
    labels: Sequence[int],
    names: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[Task],
    held: Held,
    runs: Path,
) -> list[Row]:
    """Return the trainings of the study, the rows of the fewest labels first.

    Args:
        setting: What they have in common.
        labels: Numbers of labels.
        names: Of `METHODS`.
        seeds: The seeds, of which each has pretrainings of its own.
        tasks: The experiment's tasks.
        held: Which samples' metrics count.
        runs: The folder of all runs, which the pretrained backbones are taken from.

    Raises:
        UserError: An experiment does not fit together.
    """
    methods = [METHODS[name] for name in names]
    before = {
        (teacher, seed): Job(f"{teacher} before, seed {seed}", with_seed(_pretraining(setting, teacher), seed))
        for teacher in dict.fromkeys(method.teacher for method in methods if method.teacher)
        for seed in seeds
    }

    def job(method: Method, count: int, task: Task, seed: int) -> Job:
        teacher = before[method.teacher, seed] if method.teacher else None
        init = "none" if teacher is None else str(folder_of(teacher.experiment, runs))
        experiment = with_seed(_learning(setting.experiment, method, count, task), seed, {"init": init})
        after = () if teacher is None else (teacher,)
        return Job(f"{method.label}: {task.name}, {count} labels, seed {seed}", experiment, after, held.then)

    return [
        Row(
            method.label,
            [
                [job(method, count, task, seed) for task in _measured(setting.experiment, method, tasks)]
                for seed in seeds
            ],
            method,
            count,
        )
        for count in sorted(labels)
        for method in methods
    ]


def other_domain(experiment: Experiment) -> str | None:
    """Return where there are labels of other pictures with the same classes, or None."""
    return {"studio": "loft", "loft": "studio"}[experiment.data.domain] if experiment.data.name == "scenes" else None


def _measured(experiment: Experiment, method: Method, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks that a method says something about."""
    has_seen_all = method.teacher == "segmentation" and other_domain(experiment) is None
    return [task for task in tasks if not (has_seen_all and task.name == "segmentation")]


def _learning(experiment: Experiment, method: Method, count: int, task: Task) -> Experiment:
    """Return how a task is learned from so many labels, but for the initial weights and the seed."""
    one = alone(experiment, task.name)
    data: dict[str, Any] = {"labels": {task.name: count}}
    changes: dict[str, Any] = {"freeze": method.freeze, "mask": {}}
    if not method.tuned:
        changes |= dict.fromkeys(OF_TUNING)
    if method.joint:
        data["labelled_share"] = LABELLED_SHARE
        changes |= {name: getattr(experiment, name) for name in WEIGHTING}
        changes["task"] = [task.name, "masked"]
        changes["loss_weights"] = {name: w for name, w in experiment.loss_weights.items() if name == task.name}
        changes["mask"] = _mask(experiment)
        if one.monitor == "gain":  # over both tasks; of one alone, its main metric chooses the same
            changes["monitor"] = f"{task.name}/{task.main_metric}"
    return changed(one, changes | {"data": data})


def _pretraining(setting: Setting, teacher: Teacher) -> Experiment:
    """Return how a backbone learns before. It is validated but once, at its end, so that nothing is chosen by that."""
    experiment, data = setting.experiment, dict[str, Any]()
    if teacher == "masked":
        data["targets"] = None  # no labels, but all pictures
    elif domain := other_domain(experiment):
        data["domain"] = domain
    lengths = {"max_steps": setting.pretrain_steps, "validate_every": setting.pretrain_steps, "patience": None}
    changes = {**lengths, **dict.fromkeys(OF_TUNING), "monitor": "gain"}
    changes["mask"] = _mask(experiment) if teacher == "masked" else {}
    if teacher == "masked" and experiment.augmentation.crop is None:
        changes["augmentation"] = experiment.augmentation.model_dump(mode="json") | {"crop": CROP}
    return alone(changed(experiment, changes | {"data": data}), teacher)


def _mask(experiment: Experiment) -> dict[str, Any]:
    """Return the masked task's options, without trials of the features on the way, as the study is itself one."""
    options = experiment.mask.model_dump(mode="json")
    return options | ({"probe_every": 0} if experiment.mask.probe_every is None else {})
