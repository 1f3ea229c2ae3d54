"""The names of tasks, data sets and weighting rules: the package's own, and those that a user's code adds.

Nothing here imports torch, so that the configuration can ask which names there are. A user's code is read by
`mtl.plugins`, from files that a person names, and from nowhere else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.data.sample import Source
    from mtl.tasks.base import Task
    from mtl.weighting.base import Weighting

T = TypeVar("T")

TASKS = ("segmentation", "depth", "normals", "masked", "classification")
"""The tasks that come with the package."""

DATA_SETS = ("scenes", "folder", "nyuv2", "cityscapes", "mnist1d")
"""The data sets that come with the package."""

WEIGHTINGS = (
    "fixed", "equal", "uncertainty", "log", "dwa", "random", "geometric", "imtl-l", "famo", "stch",
    "mgda", "pcgrad", "gradvac", "cagrad", "imtl-g", "nash-mtl", "aligned-mtl", "upgrad", "dualproj", "fairgrad",
    "config", "gradnorm", "db-mtl",
)  # fmt: skip
"""The weighting rules that come with the package: from the losses, then from the gradients."""


class Registry(dict[str, T]):
    """What users have added of one kind, by name.

    Args:
        kind: What it holds, for messages.
        built_in: Names that the package itself has.
    """

    def __init__(self, kind: str, built_in: tuple[str, ...]) -> None:
        super().__init__()
        self.kind, self.built_in = kind, built_in

    @property
    def names(self) -> tuple[str, ...]:
        """Every name there is: the package's own, then the users'."""
        return (*self.built_in, *self)

    def add(self, name: str, value: T) -> None:
        """Add an entry; the same name from the same place replaces it.

        Raises:
            UserError: The name is taken, or cannot be written on the command line.
        """
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split("-")):
            raise UserError(
                f"{self.kind} name {name!r} should be words of letters, digits and '_', with '-' between them"
            )
        known = self.get(name)
        if name in self.built_in or (known is not None and _file(known) != _file(value)):
            raise UserError(f"there is a {self.kind} {name!r} already; give yours another name")
        self[name] = value


def _file(value: object) -> str:
    """Return where an entry was written."""
    return str(getattr(value, "__module__", ""))


tasks: "Registry[type[Task]]" = Registry("task", TASKS)
data_sets: "Registry[Callable[..., Source]]" = Registry("data set", DATA_SETS)
weightings: "Registry[type[Weighting]]" = Registry("weighting rule", WEIGHTINGS)

plugins: dict[str, Path] = {}
"""The files of users' code that have been read, by the file's name."""


def register_task(task: "type[Task]") -> "type[Task]":
    """Make a `Task` subclass known by its `name`; a class decorator for a plugin.

    Its constructor takes a `mtl.data.sample.DataInfo`.
    """
    tasks.add(task.name, task)
    return task


def register_data_set(name: str) -> "Callable[[Callable[..., Source]], Callable[..., Source]]":
    """Make a data set known as ``--data.name NAME``; a decorator for a plugin.

    What is decorated is called with ``(root, split=..., size=...)``: the path of ``--data.root`` or None,
    'train', 'validation' or, for ``evaluate --split test`` alone, 'test', and (height, width); it returns a
    `mtl.data.sample.Source`, or raises a KeyError or ValueError where it has no such split.
    """

    def add(factory: "Callable[..., Source]") -> "Callable[..., Source]":
        data_sets.add(name, factory)
        return factory

    return add


def register_weighting(name: str) -> "Callable[[type[Weighting]], type[Weighting]]":
    """Make a `mtl.weighting.base.Weighting` subclass known as ``--weighting NAME``; a decorator for a plugin.

    Its constructor takes each task's likelihood by its name, and options for ``--weighting-options``.
    """

    def add(rule: "type[Weighting]") -> "type[Weighting]":
        weightings.add(name, rule)
        return rule

    return add


def clear() -> None:
    """Forget all that users have added."""
    for registry in (tasks, data_sets, weightings, plugins):
        registry.clear()  # type: ignore[attr-defined]  # dictionaries all
