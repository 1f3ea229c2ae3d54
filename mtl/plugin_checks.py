"""What users' code is held to: tasks, data sets and rules do as their contract says, or a sentence says what not."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from mtl import registry
from mtl.data.caching import Fingerprinted, digest
from mtl.data.sample import IGNORE_INDEX, TARGETS, DataInfo, Sample, Source
from mtl.errors import UserError
from mtl.plugins import file_of, in_plugin, in_plugin_of, title_of
from mtl.tasks.base import Likelihood, Panel, Task
from mtl.weighting.base import Step, Weighting

T = TypeVar("T")


def open_data_set(name: str, root: Path | None, split: str, size: tuple[int, int]) -> Source:
    """Open a plugin's data set.

    Args:
        name: Its name.
        root: What ``--data.root`` says.
        split: 'train', 'validation' or 'test'.
        size: Height and width that samples must have.

    Returns:
        The data set, whose every answer is checked.

    Raises:
        UserError: It cannot be opened, has no such split, or is no `mtl.data.sample.Source`.
    """
    factory = registry.data_sets[name]
    file = file_of(factory) or name
    try:
        with in_plugin(file, f"opening the data set {name!r}"):
            source = factory(root, split=split, size=size)
    except UserError as error:
        if split == "test" and isinstance(error.__cause__, KeyError | ValueError | UserError):
            raise UserError(
                f"--split test: the data set {name!r} seems to have no test split ({error}); leave --split out"
            ) from error
        raise
    with in_plugin(file, f"trying the data set {name!r}"):
        return _CheckedSource(source, name, file, size)


class _CheckedSource:
    """A plugin's data set, which is told from a `Source` that breaks the contract at every answer it gives.

    Args:
        source: What the plugin gives.
        name: The data set's name, for messages.
        file: The plugin.
        size: Height and width that samples must have.

    Raises:
        UserError: Here and in every method, the source raises or returns what the contract does not allow.
    """

    def __init__(self, source: Any, name: str, file: Path | str, size: tuple[int, int]) -> None:
        missing = [part for part in ("info", "__len__", "name", "labelled", "read") if not hasattr(source, part)]
        if missing:
            raise UserError(f"the data set {name!r} gives a {type(source).__name__} without {', '.join(missing)}")
        if not isinstance(source.info, DataInfo):
            raise UserError(f"the data set {name!r}: info is a {type(source.info).__name__}, not a mtl.DataInfo")
        if wrong := [target for target in source.info.targets if target not in TARGETS]:
            raise UserError(f"the data set {name!r} has the target {wrong[0]!r}; targets are {', '.join(TARGETS)}")
        self.info: DataInfo = source.info
        self._source, self._name, self._file, self._size = source, name, file, size
        self._length = len(source)
        if not self._length:
            raise UserError(f"the data set {name!r} has no sample")
        for target in self.info.targets:
            self.labelled(target)
        self.name(0)
        self.read([0], self.info.targets)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Return what a person would call this sample."""
        with in_plugin(self._file, f"name of the data set {self._name!r}"):
            return str(self._source.name(index))

    def labelled(self, target: str) -> np.ndarray:
        """Return which samples have a label of this target; the source is only asked about those that it has."""
        if target not in self.info.targets:
            return np.zeros(self._length, dtype=bool)
        with in_plugin(self._file, f"labelled of the data set {self._name!r}"):
            labelled = self._source.labelled(target)
            if isinstance(labelled, np.ndarray) and labelled.dtype == bool and labelled.shape == (self._length,):
                return labelled
            raise UserError(
                f"the data set {self._name!r}: labelled({target!r}) must be a boolean array of {self._length}, "
                "one a sample"
            )

    def fingerprint(self) -> str | None:
        """Return a text that changes with the samples, or None where the source cannot tell."""
        if not isinstance(self._source, Fingerprinted):
            return None
        with in_plugin(self._file, f"fingerprint of the data set {self._name!r}"):
            known = self._source.fingerprint()
            return None if known is None else digest(self._size, known)

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Return samples; the source is only asked for targets that it has."""
        wanted = tuple(target for target in targets if target in self.info.targets)
        with in_plugin(self._file, f"read of the data set {self._name!r}"):
            samples = list(self._source.read(indices, wanted))
            if len(samples) != len(indices):
                raise UserError(
                    f"the data set {self._name!r}: read gives {len(samples)} samples where {len(indices)} are asked for"
                )
            for index, sample in zip(indices, samples, strict=True):
                if wrong := self._wrong(sample):
                    raise UserError(f"the sample {self.name(index)!r} of the data set {self._name!r} has {wrong}")
            # Copies: what is done to a sample later is not to reach one that the source keeps.
            return [dict(sample) for sample in samples]

    def _wrong(self, sample: Any) -> str | None:
        """Return what of a sample is not as `mtl.data.sample` says."""
        if not isinstance(sample, dict) or "image" not in sample:
            return "no 'image': samples are dictionaries with one"
        for key, value in sample.items():
            if key not in ("image", "intrinsics", *TARGETS):
                return f"the key {key!r}; allowed are image, intrinsics, {', '.join(TARGETS)}"
            channels = (3,) if key in ("image", "normals") else ()
            shape = (3, 3) if key == "intrinsics" else (*self._size, *channels)
            dtype = "uint8" if key in ("image", "segmentation") else "float32"
            if not isinstance(value, np.ndarray):
                return f"a {type(value).__name__} as {key!r}, which must be an array, {dtype} {shape}"
            if value.shape != shape or value.dtype != dtype:
                return f"{value.dtype} {value.shape} as {key!r}, which must be {dtype} {shape}"
            if dtype == "float32" and not np.isfinite(value).all():
                return f"values that are not finite in {key!r}; where nothing is known, store 0"
        classes, labels = len(self.info.classes), sample.get("segmentation", np.zeros(0, np.uint8))
        beyond = labels[(labels >= classes) & (labels != IGNORE_INDEX)] if classes else labels[:0]
        if beyond.size:
            return f"the class {beyond[0]}, and there are {classes}, counted from 0; {IGNORE_INDEX} is no label"
        return None


def weigh(rule: Weighting, step: Step, number: int) -> Tensor:
    """Return a rule's weights (T,), detached, in double precision.

    Args:
        rule: The rule.
        step: What it is shown.
        number: Optimizer steps done, for the message.

    Raises:
        UserError: A plugin's rule raises, or a rule returns what `Weighting` does not allow.
    """
    return _checked_weights(rule, step, f" at step {number}")


def objective_of(rule: Weighting, step: Step, number: int) -> Tensor | None:
    """Return what a rule's own parameters are to minimise, or None.

    Args:
        rule: The rule.
        step: What it is shown.
        number: Optimizer steps done, for the message.

    Raises:
        UserError: A plugin's rule raises, or the objective is no finite scalar.
    """
    with in_plugin_of(rule, f"objective at step {number}"):
        objective = rule.objective(_copy(step))
        if objective is None:
            return None
        if not isinstance(objective, Tensor) or objective.shape != () or not math.isfinite(objective.item()):
            raise UserError(
                f"the objective of {title_of(rule)} at step {number} is {objective}, and must be a finite scalar tensor"
            )
    return objective


def _copy(step: Step) -> Step:
    """Return the same, of which a user's code may do what it likes."""
    return Step(*(values.clone() for values in step))


def check_weighting(rule: Weighting, tasks: Sequence[str]) -> None:
    """Try a copy of a rule for a few steps, before any training depends on it.

    Args:
        rule: The rule.
        tasks: The tasks' names.

    Raises:
        UserError: The rule raises, or returns what `Weighting` does not allow.
    """
    title = title_of(rule)
    if rule.needs_second_forward and type(rule).look_again is Weighting.look_again:
        raise UserError(f"{title} needs a second forward pass, and has no look_again to see its losses")
    with in_plugin(file_of(rule) or type(rule).__name__, f"trying {title}"):
        tried = copy.deepcopy(rule).train()
        parameters = list(tried.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
        # Thrice, as a rule may remember, and may keep a graph that is gone by then; last without labels of a task.
        for number, unlabelled in enumerate((None, None, tasks[0] if len(tasks) > 1 else None)):
            present = torch.tensor([place for place, task in enumerate(tasks) if task != unlabelled])
            losses = torch.linspace(1, 2, len(tasks), dtype=torch.float64) / (number + 1)
            gram = (torch.eye(len(tasks)) + 0.5).double() if rule.needs_gram else torch.zeros(0, 0).double()
            step = Step(losses[present], present, gram[present][:, present] if rule.needs_gram else gram)
            when = f" where {unlabelled!r} has no labels" if unlabelled else ""
            _checked_weights(tried, step, when)
            tried.asked += 1
            objective = objective_of(tried, step, number)
            if optimizer is not None:
                if objective is None or not objective.requires_grad:
                    raise UserError(
                        f"{title} has parameters, and its objective{when} must be a scalar that teaches them"
                    )
                optimizer.zero_grad()
                torch.autograd.backward(objective)
                optimizer.step()
            tried.look_again(_copy(step), step.losses / 2)
            tried.end_epoch()
        resumed = copy.deepcopy(rule).train()
        resumed.load_state_dict(tried.state_dict())
        if not torch.equal(_checked_weights(tried, step, ""), _checked_weights(resumed, step, "")):
            raise UserError(
                f"{title} remembers something that is not in its state_dict, so that a resumed run would not go on as "
                "before; keep it in buffers (register_buffer)"
            )


def _checked_weights(rule: Weighting, step: Step, when: str) -> Tensor:
    title = title_of(rule)
    with in_plugin_of(rule, f"forward{when}"):
        weights = rule(_copy(step))
        count = len(step.losses)
        if not isinstance(weights, Tensor):
            raise UserError(f"{title} gives a {type(weights).__name__}, and must give a tensor of {count} weights")
        if weights.shape != (count,) or not weights.is_floating_point():
            given = f"a tensor of {weights.dtype}, {tuple(weights.shape)}"
            raise UserError(f"{title} gives {given}{when}, and must give {count} floats, one a task with labels")
        for place, value in zip(step.present.tolist(), weights.tolist(), strict=True):
            if not math.isfinite(value) or (value < 0 and not rule.needs_gram):
                raise UserError(
                    f"{title} gives {rule.tasks[place]!r} the weight {value}{when}; weights are finite, and 0 or more "
                    "unless they come from gradients"
                )
        if not weights.any():
            raise UserError(f"{title} gives every task the weight 0{when}, and one must have another")
    return weights.detach().double()


def check_task(task: Task, size: tuple[int, int] = (16, 24)) -> None:
    """Try a task on random outputs and labels, before any training depends on it.

    Args:
        task: The task.
        size: Height and width of what it is tried on.

    Raises:
        UserError: A method raises, or returns what `Task` does not allow; the sentence names it.
    """
    file = file_of(task) or type(task).__name__
    with in_plugin(file, f"trying {title_of(task)}"):
        _try_task(task, size, file)


def _try_task(task: Task, size: tuple[int, int], file: Path | str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = _random_target(task, size, generator)
    empty = torch.full_like(target, TARGETS[task.target].invalid)

    def attempt(method: str, call: Callable[..., T], *arguments: Any) -> T:
        with in_plugin(file, f"{method} of {title_of(task)}"):
            return call(*arguments)

    def expect(holds: bool, method: str, what: str) -> None:
        if not holds:
            raise UserError(f"{method} of {title_of(task)} {what}")

    likelihood = attempt("likelihood", getattr, task, "likelihood")
    allowed = " or ".join(map(repr, get_args(Likelihood)))
    expect(likelihood in get_args(Likelihood), "likelihood", f"is {likelihood!r}, and must be {allowed}")
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
        labelled = attempt("labelled", task.labelled, {task.target: labels})
        right = isinstance(labelled, Tensor) and labelled.shape == () and labelled.dtype == torch.bool
        expect(right, "labelled", "must return a boolean scalar tensor")
        expect(labels is target or not labelled, "labelled", "is true where nothing is labelled, and must be false")
    attempt("observe", task.observe, [target])
    bias = attempt("initial_bias", task.initial_bias)
    shaped = isinstance(bias, Tensor) and bias.shape == (channels,)
    expect(shaped, "initial_bias", f"must return a tensor of the shape ({channels},)")
    expect(bool(bias.isfinite().all()), "initial_bias", f"is {bias.tolist()}, and must be finite")
    prediction = attempt("predict", task.predict, outputs)
    metric = attempt("metrics", task.metrics)
    expect(isinstance(metric, Metric), "metrics", "must return a torchmetrics.Metric")
    for guess in (prediction, attempt("constant", task.constant, target)):
        attempt("metrics' update", metric.update, guess, target)
    names = attempt("metrics' compute", lambda: {name: float(value) for name, value in metric.compute().items()})
    unknown = [name for name in names if name not in task.higher_is_better and "/" not in name]
    expect(not unknown, "higher_is_better", f"says nothing of the metric {unknown[:1]}")
    expect(task.main_metric in names, "metrics", f"do not compute the main metric, {task.main_metric!r}")
    error: Any = attempt("remaining_error", task.remaining_error, names)
    right = isinstance(error, Real) and 0 <= float(error) < math.inf
    expect(right, "remaining_error", f"is {error!r} for {names}, and must be a finite number, 0 or more")
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
