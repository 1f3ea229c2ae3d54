"""Users' own code: a Python file, named by a person on the command line or in a call, and never by another file."""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from mtl import registry
from mtl.data.sample import IGNORE_INDEX, TARGETS, Source
from mtl.errors import UserError, nearest
from mtl.tasks.base import Panel, Task
from mtl.weighting.base import Weighting

T = TypeVar("T")

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
        for kind, name, value in added:
            _check_entry(file, kind, name, value)
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
    """Turn whatever a plugin's code raises into a `UserError` that names the line.

    Args:
        file: The plugin.
        doing: What was being done, for the sentence.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # a user's code may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        where = f"{file}, line {line}" if line else f"{file}"
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{where}: {doing} raised {type(error).__name__}: {said}") from error


def _check_entry(file: Path, kind: str, name: str, value: Any) -> None:
    """Refuse what cannot be a task, a data set or a rule."""
    here = f"{file}: the {kind} {name!r}"
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
        if value.target not in TARGETS:
            close = nearest(value.target, TARGETS)
            raise UserError(f"{here} has the target {value.target!r}{close}; targets are {', '.join(TARGETS)}")
        if value.main_metric not in value.higher_is_better:
            raise UserError(f"{here} has a main metric, {value.main_metric!r}, that higher_is_better lacks")


def file_of(value: Any) -> Path | None:
    """Return the plugin that an entry of a registry, or an instance of one, comes from."""
    module = getattr(value, "__module__", "")
    return next((path for path in registry.plugins.values() if f"mtl_plugin_{path.stem}" == module), None)


def check_source(source: Any, name: str, size: tuple[int, int]) -> Source:
    """Return a plugin's data set if it is a `mtl.data.sample.Source`, as its first sample shows.

    Args:
        source: What the plugin gives.
        name: Its name, for messages.
        size: Height and width that samples must have.

    Raises:
        UserError: A method is missing or raises, or returns what the contract does not allow.
    """
    missing = [part for part in ("info", "__len__", "name", "labelled", "read") if not hasattr(source, part)]
    if missing:
        raise UserError(f"the data set {name!r} gives a {type(source).__name__} without {', '.join(missing)}")
    if wrong := [target for target in source.info.targets if target not in TARGETS]:
        raise UserError(f"the data set {name!r} has the target {wrong[0]!r}; targets are {', '.join(TARGETS)}")
    for target in source.info.targets:
        labelled = source.labelled(target)
        if not (isinstance(labelled, np.ndarray) and labelled.dtype == bool and labelled.shape == (len(source),)):
            raise UserError(
                f"the data set {name!r}: labelled({target!r}) must be a boolean array of {len(source)}, one a sample"
            )
    if not len(source):
        raise UserError(f"the data set {name!r} has no sample")
    for sample in source.read([0], source.info.targets):
        if "image" not in sample:
            raise UserError(f"the data set {name!r}: read must give samples with an 'image'")
        for key, value in sample.items():
            if key == "intrinsics":
                continue
            channels = (3,) if key in ("image", "normals") else ()
            dtype = "float32" if key in ("depth", "normals") else "uint8"
            if key not in ("image", *TARGETS) or value.shape != (*size, *channels) or value.dtype != dtype:
                raise UserError(
                    f"the data set {name!r}: {key!r} of its first sample is {value.dtype} {value.shape}, and must be "
                    f"{dtype} {(*size, *channels)}"
                )
    checked: Source = source
    return checked


def check_task(task: Task, size: tuple[int, int] = (16, 24)) -> None:
    """Try a task on random outputs and labels, before any training depends on it.

    Args:
        task: The task.
        size: Height and width of what it is tried on.

    Raises:
        UserError: A method raises, or returns what `Task` does not allow; the sentence names it.
    """
    file = file_of(task) or type(task).__name__
    generator = torch.Generator().manual_seed(0)
    target = _random_target(task, size, generator)
    empty = torch.full_like(target, TARGETS[task.target].invalid)

    def attempt(method: str, call: Callable[..., T], *arguments: Any) -> T:
        with in_plugin(file, f"{method} of the task {task.name!r}"):
            return call(*arguments)

    def expect(holds: bool, method: str, what: str) -> None:
        if not holds:
            raise UserError(f"{file}: {method} of the task {task.name!r} {what}")

    channels: int = attempt("channels", getattr, task, "channels")
    outputs = torch.randn(2, channels, *size, generator=generator)
    for labels, what in ((target, "labels"), (empty, "no label")):
        leaf = outputs.clone().requires_grad_()
        loss = attempt("loss", task.loss, leaf, {task.target: labels})
        expect(isinstance(loss, Tensor) and loss.shape == (), "loss", f"with {what} must return a scalar tensor")
        value = loss.item()
        expect(math.isfinite(value), "loss", f"with {what} is {value}, and must be finite")
        if labels is empty:
            expect(value == 0, "loss", f"is {value} where nothing is labelled, and must be zero")
        expect(loss.requires_grad, "loss", f"with {what} does not depend on the outputs, and so cannot be learned from")
    attempt("observe", task.observe, [target])
    bias = attempt("initial_bias", task.initial_bias)
    expect(bias.shape == (channels,), "initial_bias", f"must have the shape ({channels},)")
    prediction = attempt("predict", task.predict, outputs)
    metric = attempt("metrics", task.metrics)
    expect(isinstance(metric, Metric), "metrics", "must return a torchmetrics.Metric")
    for guess in (prediction, attempt("constant", task.constant, target)):
        attempt("metrics' update", metric.update, guess, target)
    names = {name: float(value) for name, value in attempt("metrics' compute", metric.compute).items()}
    unknown = [name for name in names if name not in task.higher_is_better and "/" not in name]
    expect(not unknown, "higher_is_better", f"says nothing of the metric {unknown[:1]}")
    expect(task.main_metric in names, "metrics", f"do not compute the main metric, {task.main_metric!r}")
    attempt("remaining_error", task.remaining_error, names)
    for known in (target, None):
        for title, panel in attempt("pictures", task.pictures, prediction, known).items():
            right = isinstance(panel, Panel) and panel.images.shape == (2, *size, 3) and panel.images.dtype == "uint8"
            expect(right, "pictures", f"must give a Panel of (2, {size[0]}, {size[1]}, 3) uint8 under {title!r}")


def _random_target(task: Task, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    if task.target == "segmentation":
        classes = max(2, len(task.class_names))
        target = torch.randint(0, classes, (2, *size), generator=generator).to(torch.uint8)
        target[:, 0] = IGNORE_INDEX
        return target
    if task.target == "depth":
        target = torch.rand(2, 1, *size, generator=generator) + 1
    else:
        target = functional.normalize(torch.randn(2, 3, *size, generator=generator), dim=1)
        target[:, 2] = -target[:, 2].abs()
    target[:, :, 0] = 0
    return target
