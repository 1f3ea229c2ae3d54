"""Users' own code: a Python file, named by a person on the command line or in a call, and never by another file."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from mtl import registry
from mtl.data.sample import TARGETS
from mtl.errors import UserError, nearest
from mtl.tasks.base import Task
from mtl.weighting.base import Weighting
from mtl.weighting.rules import RULES

_REGISTRIES: tuple[registry.Registry[Any], ...] = (registry.tasks, registry.data_sets, registry.weightings)


def load_plugins(files: Sequence[Path]) -> None:
    """Run files of users' code, which add tasks, data sets or rules by the decorators of `mtl.registry`.

    Args:
        files: Python files.

    Raises:
        UserError: A file is missing, raises, adds nothing, or adds what lacks a method.
    """
    for file in files:
        before = [dict(entries) for entries in _REGISTRIES]
        _run(file)
        added = [
            (entries.kind, name, value)
            for entries, known in zip(_REGISTRIES, before, strict=True)
            for name, value in entries.items()
            if known.get(name) is not value
        ]
        if not added:
            raise UserError(
                f"--plugin {file} adds nothing: decorate a class in it with mtl.register_task, "
                "mtl.register_data_set(NAME) or mtl.register_weighting(NAME)"
            )
        with in_plugin(file, "checking what it adds"):
            for kind, name, value in added:
                _check_entry(kind, name, value)
        registry.plugins[file.name] = file


def _run(file: Path) -> None:
    """Run a file as a module of its own."""
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--plugin {file} is not a Python file; give the path of one, such as my_task.py")
    if file.name in registry.plugins and registry.plugins[file.name].resolve() != file.resolve():
        raise UserError(
            f"--plugin {file} has the name of another plugin, {registry.plugins[file.name]}; rename one of them"
        )
    name = f"mtl_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for the module of a class
    with in_plugin(file, "running it"):
        spec.loader.exec_module(module)


@contextmanager
def in_plugin(file: Path | str, doing: str) -> Iterator[None]:
    """Turn whatever a plugin's code raises into a `UserError` that names the file and the line.

    Args:
        file: The plugin.
        doing: What was being done, for the sentence.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(file)):  # said by a step inside this one
            raise
        raise UserError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and may leave
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            places.append((error.filename, error.lineno))
        lines = [line for place, line in places if line and Path(place).resolve() == Path(file).resolve()]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        said = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
        raise UserError(f"{where}: {doing} raised {type(error).__name__}{said}") from error


def in_plugin_of(part: Task | Weighting, method: str) -> AbstractContextManager[None]:
    """Return `in_plugin` for a method of a task or rule; for one of the package, what does nothing."""
    file = file_of(part)
    return nullcontext() if file is None else in_plugin(file, f"{method} of {title_of(part)}")


def title_of(part: Task | Weighting) -> str:
    """Return what to call a task or rule in a sentence."""
    if isinstance(part, Task):
        return f"the task {part.name!r}"
    names = [name for name, rule in (RULES | registry.weightings).items() if rule is type(part)]
    return f"the weighting rule {(names or [type(part).__name__])[0]!r}"


def _check_entry(kind: str, name: str, value: Any) -> None:
    """Refuse what cannot be a task, a data set or a rule."""
    here = f"the {kind} {name!r}"
    base: Any = {"task": Task, "weighting rule": Weighting}.get(kind)
    if base is None:
        if not callable(value):
            raise UserError(f"{here} is a {type(value).__name__}, not a class or a function")
        return
    if not (inspect.isclass(value) and issubclass(value, base)):
        raise UserError(f"{here} must be a subclass of {base.__module__}.{base.__name__}")
    missing = sorted(getattr(value, "__abstractmethods__", ()))
    if base is Task:
        missing += [name for name in ("target", "main_metric", "higher_is_better") if not hasattr(value, name)]
    if missing:
        raise UserError(f"{here} lacks {', '.join(missing)}; {base.__name__} says what each is")
    if issubclass(value, Task):
        if hasattr(nn.ModuleDict(), name):
            raise UserError(f"{here} has the name of an attribute of torch.nn.ModuleDict, which holds tasks; rename it")
        if value.target not in list(TARGETS):
            close = nearest(str(value.target), TARGETS)
            raise UserError(f"{here} has the target {value.target!r}{close}; targets are {', '.join(TARGETS)}")
        directions: Any = value.higher_is_better
        if not isinstance(directions, dict) or not all(isinstance(higher, bool) for higher in directions.values()):
            raise UserError(
                f"{here}: higher_is_better is {directions!r}, and must be a dictionary from names to booleans"
            )
        if value.main_metric not in list(directions):
            raise UserError(f"{here} has a main metric, {value.main_metric!r}, that higher_is_better lacks")


def file_of(value: Any) -> Path | None:
    """Return the plugin that an entry of a registry, or an instance of one, comes from."""
    module = getattr(value, "__module__", "")
    return next((path for path in registry.plugins.values() if f"mtl_plugin_{path.stem}" == module), None)
