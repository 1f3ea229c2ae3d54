"""Several trained models, or several passes of one, that answer as one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.ensembling.combine import Combination, Combined, Kind, check_kind
from mtl.errors import UserError
from mtl.prediction.tta import AveragedViews
from mtl.tasks.base import Task
from mtl.training.module import MultiTaskModule

Member = MultiTaskModule | AveragedViews
"""What an ensemble is made of: trained models, each of which may look at several views of an image."""

_KEPT = 2**27
"""The most numbers of members' answers that are kept at once for a median, unless one image takes more."""


class Together(ABC):
    """Members that are asked about the same images, one after another, and whose answers are combined.

    It takes the place of `MultiTaskModule.views`, and of `AveragedViews` for what both do. The answers are combined as
    they come, so that memory does not grow with the members; for a median, which needs them all, few images at once
    are shown.

    Args:
        tasks: The tasks, in order.
        kind: How to combine, for all tasks or by the task's name; those that are not named have their mean taken.
        count: Number of members.

    Raises:
        UserError: A task's answers cannot be combined so.
    """

    def __init__(self, tasks: Sequence[Task], kind: Kind | Mapping[str, Kind], count: int) -> None:
        names = [task.name for task in tasks]
        if not isinstance(kind, str) and (unknown := sorted(set(kind) - set(names))):
            raise UserError(f"there is no task {unknown[0]!r} whose answers to combine; there are {', '.join(names)}")
        self.tasks = tasks
        self.kinds = {name: kind if isinstance(kind, str) else kind.get(name, "mean") for name in names}
        self.count = count
        for task in tasks:
            check_kind(self.kinds[task.name], task)

    @abstractmethod
    def _ask(self, image: Tensor, answers: Mapping[str, Combination]) -> None:
        """Give each member's answers to the tasks' combinations."""

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Return each task's prediction for images (B, 3, H, W) in [0, 1], as a module itself does."""
        return {name: combined.prediction for name, combined in self.combine(image).items()}

    def soft(self, image: Tensor) -> dict[str, Tensor]:
        """Return what each task's prediction is made of (`Task.soft`), for images (B, 3, H, W) in [0, 1]."""
        return {name: combined.soft for name, combined in self.combine(image).items()}

    @torch.no_grad()
    def combine(self, image: Tensor) -> dict[str, Combined]:
        """Return what the members say together of images (B, 3, H, W) in [0, 1], by the tasks' names."""
        parts = []
        for some in torch.split(image, self._at_once(image)):
            answers = {task.name: Combination(task, self.kinds[task.name]) for task in self.tasks}
            self._ask(some, answers)
            parts.append({name: answer.result() for name, answer in answers.items()})
        if len(parts) == 1:
            return parts[0]
        joined = {name: zip(*(part[name] for part in parts), strict=True) for name in parts[0]}
        return {name: Combined(*map(torch.cat, fields)) for name, fields in joined.items()}

    def _at_once(self, image: Tensor) -> int:
        """Return how many images to show the members at once."""
        channels = sum(task.channels for task in self.tasks if self.kinds[task.name] == "median")
        kept = self.count * channels * image.shape[-2:].numel()
        return max(1, min(len(image), _KEPT // kept if kept else len(image)))


class Ensemble(Together):
    """Several trained models that answer as one.

    All but the one that asks are moved to the images' device and type when they are first asked.

    Args:
        members: Trained models of the same tasks and classes; they are put into evaluation mode.
        kind: How to combine, see `Together`.
        names: What to call the members in messages, such as their runs' folders.

    Raises:
        UserError: There is no member, their tasks, classes or kinds of depth differ, or a task's answers cannot be
            combined so.
    """

    def __init__(
        self, members: Sequence[Member], kind: Kind | Mapping[str, Kind] = "mean", names: Sequence[str] | None = None
    ) -> None:
        modules = [m.module if isinstance(m, AveragedViews) else m for m in members]
        check_members(modules, names or [f"member {number}" for number in range(1, len(members) + 1)])
        super().__init__(list(modules[0].each_task()), kind, len(members))
        self.members = members
        for module in modules:
            module.eval()

    def _ask(self, image: Tensor, answers: Mapping[str, Combination]) -> None:
        for member in self.members:
            module = member.module if isinstance(member, AveragedViews) else member
            module.to(image)
            if isinstance(member, AveragedViews):
                for name, soft in member.soft(image).items():
                    answers[name].add_soft(soft)
                continue
            outputs = member.model(image)
            for task in member.each_task():
                answers[task.name].add(outputs[task.name], task)


def check_members(modules: Sequence[MultiTaskModule], names: Sequence[str]) -> None:
    """Refuse models that do not answer the same questions.

    Raises:
        UserError: There is none, or two differ in their tasks, their classes, or in what depth is.
    """
    if not modules:
        raise UserError("an ensemble of no models says nothing: give at least one run")
    first, *others = ([*module.each_task()] for module in modules)
    for tasks, module, name in zip(others, modules[1:], names[1:], strict=True):
        ours, theirs = ([task.name for task in some] for some in (first, tasks))
        if set(ours) != set(theirs):
            raise UserError(
                f"{name} does {', '.join(theirs)}, and {names[0]} {', '.join(ours)}; combine runs of the same tasks"
            )
        classes = {task.name: task.class_names for task in tasks}
        for task in first:
            if task.class_names != classes[task.name]:
                raise UserError(
                    f"{name} tells the classes {', '.join(classes[task.name])}, and {names[0]} "
                    f"{', '.join(task.class_names)}; combine runs with the same classes in the same order"
                )
        if "depth" in ours and module.info.inverse_depth != modules[0].info.inverse_depth:
            kinds = ["inverse depth" if m.info.inverse_depth else "metres" for m in (module, modules[0])]
            raise UserError(f"{name} predicts {kinds[0]}, and {names[0]} {kinds[1]}; combine runs of the same kind")
