"""Averages of weights: soups of several trainings, snapshots and stochastic averages of one."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from mtl.errors import UserError

State = Mapping[str, Any]
"""A state dict; beside tensors it may hold other values."""

Name = TypeVar("Name")

SHAPE = ("backbone", "decoder", "decoder_channels")
"""The fields of an experiment that, beside its tasks and classes, decide what its tensors mean."""


def check_alike(checkpoints: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse checkpoints whose weights have no mean.

    Args:
        checkpoints: What to call each, and its content, one after another; they need not all be in memory.

    Raises:
        UserError: There is none, two differ in what their tensors are or mean, or they hold low-rank adapters.
    """
    first: tuple[str, dict[str, Any], dict[str, torch.Size]] | None = None
    for name, checkpoint in checkpoints:
        experiment, data = checkpoint["experiment"], checkpoint["data"]
        if experiment.get("lora") is not None:
            raise UserError(
                f"{name} has low-rank adapters, products of two matrices each, of which the means of the factors are "
                "no mean; average the outputs of such runs instead"
            )
        meaning = {"task": sorted(experiment["task"]), "classes": list(data["classes"])}
        meaning |= {field: experiment[field] for field in SHAPE} | {"inverse_depth": data["inverse_depth"]}
        shapes = {key: value.shape for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
        if first is None:
            first = name, meaning, shapes
            continue
        for field, value in meaning.items():
            if value != (theirs := first[1][field]):
                raise UserError(
                    f"{name} was trained with {field} {_said(value)}, and {first[0]} with {_said(theirs)}; a soup is "
                    "of runs with the same, so average their outputs instead"
                )
        others = [key for key in first[2] | shapes if first[2].get(key) != shapes.get(key)]
        if others:
            raise UserError(
                f"{name} and {first[0]} have other tensors, or of other shapes ({others[0]}); a soup is of runs of the "
                "same model, so average their outputs instead"
            )
    if first is None:
        raise UserError("a soup of no runs is none: give at least one")


def _said(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


class Mean:
    """A running mean of state dicts, in double precision.

    Floating-point tensors are averaged, the running statistics of batch norm among them. For those that is but a guess,
    as the activations of averaged weights have statistics of their own, which `reestimate` measures. Whole numbers (the
    counts of batches) and what is no tensor are those of the first state.
    """

    def __init__(self) -> None:
        self._first: State = {}
        self._sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, state: State) -> None:
        """Take a state dict, with the keys and shapes of the others; it may change afterwards."""
        if self.count == 0:
            self._first = {n: v.clone() if isinstance(v, Tensor) else v for n, v in state.items()}
        self._sums = self._with(state)
        self.count += 1

    def state(self) -> dict[str, Any]:
        """Return the mean, in the types of the first state."""
        return self._mean(self._sums, self.count)

    def tried(self, state: State) -> dict[str, Any]:
        """Return what the mean would be with one state more."""
        if self.count == 0:
            return dict(state)
        return self._mean(self._with(state), self.count + 1)

    def _with(self, state: State) -> dict[str, Tensor]:
        floats = {n: v for n, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return {n: v.cpu().double() + self._sums.get(n, 0.0) for n, v in floats.items()}

    def _mean(self, sums: Mapping[str, Tensor], count: int) -> dict[str, Any]:
        return {n: (sums[n] / count).to(v) if n in sums else v for n, v in self._first.items()}


def uniform_soup(states: Iterable[State]) -> dict[str, Any]:
    """Return the mean of state dicts (Wortsman et al. 2022, "Model soups", section 2), see `Mean`.

    The mean of weights is a model where the trainings started from the same pretrained weights and ended in the same
    basin, which is to be measured; two trainings from different random weights have nothing in common.

    Args:
        states: The state dicts, one after another, see `check_alike`.

    Raises:
        UserError: There is none.
    """
    mean = Mean()
    for state in states:
        mean.add(state)
    if mean.count == 0:
        raise UserError("a soup of no runs is none: give at least one")
    return mean.state()


class Soup(NamedTuple, Generic[Name]):
    """What came of choosing ingredients.

    Attributes:
        state: The mean of the chosen states.
        ingredients: Their names, best first.
        score: Of the soup.
        scores: Of each candidate by itself.
    """

    state: dict[str, Any]
    ingredients: list[Name]
    score: float
    scores: dict[Name, float]


def greedy_soup(
    candidates: Sequence[Name],
    load: Callable[[Name], State],
    score: Callable[[State], float],
    *,
    higher_is_better: bool = True,
) -> Soup[Name]:
    """Average those candidates that do not make the average worse (Wortsman et al. 2022, algorithm 1).

    From the best to the worst, each is added to the soup and stays where the soup is then as good as before on held-out
    samples: so the soup is no worse than its best ingredient there. It was chosen on these samples, and is to be judged
    on others.

    Args:
        candidates: Names, such as runs' folders; equally good ones are tried in this order.
        load: From a name to its state dict. Each is loaded twice, so that no more than two are in memory at once,
            beside the soup.
        score: Of a state dict, on held-out samples.
        higher_is_better: The score's direction.

    Raises:
        UserError: There is no candidate, or no score is a number.
    """
    if not candidates:
        raise UserError("a soup of no runs is none: give at least one")
    sign = 1.0 if higher_is_better else -1.0
    scores = {name: score(load(name)) for name in candidates}
    usable = [name for name in candidates if not math.isnan(scores[name])]
    if not usable:
        raise UserError(
            f"none of the {len(candidates)} runs has a score that is a number, so that none can be chosen; see whether "
            "the held-out samples have labels"
        )
    soup = Mean()
    chosen: list[Name] = []
    best = -math.inf
    for name in sorted(usable, key=lambda name: -sign * scores[name]):
        state = load(name)
        tried = sign * (score(soup.tried(state)) if chosen else scores[name])
        if tried >= best:
            best = tried
            soup.add(state)
            chosen.append(name)
    return Soup(soup.state(), chosen, sign * best, scores)


@torch.no_grad()
def reestimate(model: nn.Module, images: Iterable[Tensor]) -> int:
    """Measure the running statistics of batch norm anew, as averaged weights need them (Izmailov et al. 2018).

    `torch.optim.swa_utils.update_bn` does the same, but clears the statistics of frozen layers too, which it never
    fills again, and leaves dropout on. Here only the layers that training would change are in training mode, so that
    the statistics are of what the model computes at test time.

    Args:
        model: The model, on the images' device; all modes are afterwards as before.
        images: Batches (B, 3, H, W) as the model takes them, such as the training samples without augmentation. The
            batches count alike, so they should be of one size.

    Returns:
        How many layers were measured; without any, no image is looked at.

    Raises:
        UserError: There are layers, but no images.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    layers = [m for m in modes if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    batches = 0
    try:
        for module in modes:
            module.training = False
        for layer in layers:
            layer.training = True
            # None: the mean over all batches.
            layer.momentum = None
        for batch in images if layers else ():
            if batches == 0:
                for layer in layers:
                    layer.reset_running_stats()
            model(batch)
            batches += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if layers and not batches:
        raise UserError("the statistics of batch norm cannot be measured on no images: give training samples")
    return len(layers)


class StochasticAverage(AveragedModel):
    """The mean of the weights along a training (SWA, Izmailov et al. 2018), as torch computes it.

    It is updated as timm's ModelEmaV3 is, and holds the averaged model as `module` as that does. Until the average
    starts it is the model itself. Floating-point buffers are averaged, whole numbers taken over. How many states are in
    the average follows from the step, so that a resumed training goes on with nothing but the averaged weights.

    Args:
        model: What is averaged; it is copied.
        start: The first optimizer step after which weights are part of the average.
        every: Optimizer steps from one to the next, such as those of an epoch.

    Raises:
        UserError: A number is not allowed.
    """

    def __init__(self, model: nn.Module, start: int, every: int = 1) -> None:
        if start < 0 or every < 1:
            raise UserError(
                f"an average of weights from step {start} on, every {every} steps, is none: start at 0 or later, and "
                "take every step or fewer"
            )
        super().__init__(model, multi_avg_fn=_average, use_buffers=True)
        self.start, self.every = start, every

    def update(self, model: nn.Module, step: int) -> None:
        """Take the model's weights after an optimizer step.

        Args:
            model: The model.
            step: Optimizer steps done.
        """
        past = max(0, step - self.start)
        if past % self.every == 0:
            self.n_averaged.fill_(past // self.every)
            self.update_parameters(model)


def _average(averaged: Any, current: Any, count: Any) -> None:
    """Move averaged tensors of one type towards current ones; whole numbers are taken over."""
    if averaged[0].is_floating_point():
        get_swa_multi_avg_fn()(averaged, current, count)  # type: ignore[no-untyped-call]
    else:
        torch._foreach_copy_(averaged, current)


class Restarts(NamedTuple):
    """A learning rate that falls to zero several times, and where it is there.

    Attributes:
        factor: The learning rate's factor as a function of the optimizer steps done, from 1 to almost 0 in each cycle.
        ends: After how many optimizer steps each cycle ends, which is where a snapshot is taken.
    """

    factor: Callable[[int], float]
    ends: tuple[int, ...]


def warm_restarts(total_steps: int, cycles: int, growth: float = 1.0) -> Restarts:
    """Return half a cosine for each cycle (SGDR, Loshchilov and Hutter 2017, equation 5).

    The weights at the cycles' ends are the members of a snapshot ensemble (Huang et al. 2017): several models for one
    training.

    Args:
        total_steps: Optimizer steps of the whole training.
        cycles: How many; 1 is the usual cosine schedule.
        growth: Length of each cycle over that of the one before; 1 for snapshots, 2 for SGDR.

    Raises:
        UserError: A cycle would have no step, or a number is not allowed.
    """
    if cycles < 1 or not growth > 0 or not math.isfinite(growth):
        raise UserError(
            f"{cycles} cycles, each {growth:g} times as long as the one before, are no schedule: take at least one "
            "cycle, and a positive number"
        )
    ends: tuple[int, ...] = ()
    if cycles <= total_steps:
        sums = list(itertools.accumulate(growth**number for number in range(cycles)))
        ends = tuple(round(total_steps * each / sums[-1]) for each in sums)
    starts = (0, *ends[:-1])
    if not ends or any(end <= start for start, end in zip(starts, ends, strict=True)):
        raise UserError(
            f"{cycles} cycles of the learning rate do not fit into {total_steps} steps of training: take fewer cycles, "
            "or train for longer"
        )

    def factor(step: int) -> float:
        cycle = next((number for number, end in enumerate(ends) if step < end), None)
        if cycle is None:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * (step - starts[cycle]) / (ends[cycle] - starts[cycle])))

    return Restarts(factor, ends)
