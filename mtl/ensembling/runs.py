"""Ensembles of finished runs: which weights answer, in what way, and how their answers are combined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mtl.config import Experiment
from mtl.ensembling.combine import KINDS, Combination, Kind
from mtl.ensembling.dropout import MonteCarlo
from mtl.ensembling.ensemble import Ensemble, Together
from mtl.errors import UserError, nearest
from mtl.prediction.tta import SCALES, AveragedViews
from mtl.runs import forget_masked, load_predicting
from mtl.tasks.base import Task
from mtl.training.module import MultiTaskModule
from mtl.transfer.weights import find_checkpoint


@dataclass(frozen=True)
class Combining:
    """What answers beside a run's best weights seeing an image once, and how the answers become one.

    Attributes:
        others: Folders of further runs.
        snapshots: Whether the run's snapshots answer in place of its best weights.
        mc_dropout: Number of passes with dropout and drop-path on, as in training; None for one without.
        views: Whether to average over views of each image, or which scales of it beside its mirror image.
        kind: How answers are combined, None for the mean. A vote is for tasks with classes; beside it others have
            their mean taken.

    Raises:
        UserError: These do not go together.
    """

    others: Sequence[Path] = ()
    snapshots: bool = False
    mc_dropout: int | None = None
    views: Sequence[float] | bool = False
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(f"--combine {self.kind!r}{nearest(self.kind, KINDS)} is one of {', '.join(KINDS)}")
        several = bool(self.others) or self.snapshots
        views = self.views is not False
        if self.others and self.snapshots:
            raise UserError("--snapshots are those of one run; leave them or the other runs out")
        if self.mc_dropout is not None:
            if self.mc_dropout < 2:
                raise UserError(f"--mc-dropout {self.mc_dropout}: passes are compared with one another: take 2 or more")
            if several or views:
                raise UserError(
                    "--mc-dropout is of the passes of one run over each image as it is; leave it out, or "
                    f"{'the other runs' if self.others else '--snapshots' if self.snapshots else '--tta'}"
                )
        elif self.kind is not None and not several and not views:
            raise UserError(
                f"--combine {self.kind}: a single run has but one answer; name more runs, or add --snapshots, "
                "--mc-dropout or --tta"
            )
        if self.kind == "logits" and views:
            raise UserError(
                "--combine logits: the heads' outputs for several views of an image have no mean, only what is made of "
                "them; combine by mean, median or vote, or leave --tta out"
            )


ALONE = Combining()
"""A run's best weights see each image once."""


def checkpoints(run: Path, combining: Combining) -> list[Path]:
    """Return the checkpoints that answer, the one of the run itself first.

    Raises:
        UserError: A folder is not a run's, is named twice, or has no snapshots.
    """
    if combining.snapshots:
        found = sorted(run.glob("snapshot-*.ckpt"), key=lambda path: (len(path.name), path.name))
        if len(found) < 2:
            raise UserError(
                f"--snapshots: {run} holds {len(found)} of them, and two or more can be combined; train with "
                "--snapshots 5"
            )
        return found
    runs = [run, *combining.others]
    places = [path.resolve() for path in runs]
    for path, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is named twice, and would count twice; name each run once")
    return [find_checkpoint(path) for path in runs]


def kinds(tasks: Sequence[Task], kind: Kind | None) -> Kind | Mapping[str, Kind]:
    """Return how to combine the tasks' answers: a vote is for those with classes, if there is any."""
    if kind == "vote" and (voting := [task.name for task in tasks if task.class_names]):
        return dict.fromkeys(voting, "vote")
    return kind or "mean"


def together(
    module: MultiTaskModule, paths: Sequence[Path], combining: Combining, *, judged: bool = False
) -> Together | AveragedViews | None:
    """Return what answers in a module's place, or None if it does so itself.

    Args:
        module: The run's own model. Where it is one of several, it forgets what has learned to predict hidden patches.
        paths: The checkpoints that answer, `module`'s first.
        combining: In what way.
        judged: Whether its uncertainty is wanted even where nobody has said how to combine.

    Raises:
        UserError: The runs' tasks, classes or sizes differ, the model has no dropout, or a task's answers cannot be
            combined so.
    """
    views = combining.views
    if len(paths) == 1 and combining.mc_dropout is None and views is False and not judged:
        return None
    if module.model.masked is not None and views is not False:
        raise UserError(
            f"--tta: {paths[0].parent} has learned the task 'masked', and a reconstruction has no other views; leave "
            "--tta out"
        )
    if module.options.signals and views is not False:
        raise UserError(f"--tta: {paths[0].parent} has learned from signals, which have no other views; leave it out")
    forget_masked(module, paths[0].parent)
    kind = kinds(list(module.each_task()), combining.kind)
    if combining.mc_dropout is not None:
        return MonteCarlo(module, combining.mc_dropout, kind, drop_path=True)
    scales = SCALES if views is True else views
    if len(paths) == 1 and scales is not False:
        averaged = AveragedViews(module, scales)
        return averaged if combining.kind is None and not judged else Views(averaged, kind)
    modules = [module, *(_member(path, module.options) for path in paths[1:])]
    names = [str(path if combining.snapshots else path.parent) for path in paths]
    for other, name in zip(modules[1:], names[1:], strict=True):
        if _sized(other) and other.options.data.size != module.options.data.size:
            sizes = ["x".join(map(str, m.options.data.size)) for m in (other, module)]
            raise UserError(
                f"{name} takes images of {sizes[0]} only, and {names[0]} is asked about those of {sizes[1]}; combine "
                "runs of one --data.size"
            )
    members = modules if scales is False else [AveragedViews(member, scales) for member in modules]
    return Ensemble(members, kind, names)


def _member(path: Path, asked: Experiment) -> MultiTaskModule:
    """Return another run's model, where and in the precision in which the first one is asked."""
    return load_predicting(path, {"device": asked.device, "precision": asked.precision})


def _sized(module: MultiTaskModule) -> bool:
    """Return whether a model takes images of one size only."""
    return "img_size" in getattr(module.model.backbone, "size_arguments", {})


class Views(Together):
    """A trained model whose answers to several views of an image are combined as those of several models are.

    Args:
        views: The views.
        kind: How to combine, see `Together`; the mean is that of `AveragedViews`.

    Raises:
        UserError: A task's answers cannot be combined so.
    """

    def __init__(self, views: AveragedViews, kind: Kind | Mapping[str, Kind] = "mean") -> None:
        super().__init__(list(views.module.each_task()), kind, 2 * len(views.scales))
        self.views = views

    def _ask(self, image: Tensor, answers: Mapping[str, Combination]) -> None:
        for name, soft in self.views.each(image):
            answers[name].add_soft(soft)
