"""Gradients on which rules break: a table for every rule that is made from the gradients."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mtl.weighting.base import Step, Weighting


class Case(NamedTuple):
    name: str
    gradients: Tensor
    """(T, P): rows are the tasks' gradients."""

    @property
    def step(self) -> Step:
        count = len(self.gradients)
        losses = torch.linspace(0.5, 2, count, dtype=torch.float64)
        return Step(losses, torch.arange(count), self.gradients @ self.gradients.T)


def rows(*gradients: list[float]) -> Tensor:
    return torch.tensor(gradients, dtype=torch.float64)


_SKEW = rows([1, 0.2, 0, 0.1], [-0.4, 1, 0.3, 0], [0.2, -0.5, 1, 0.2])

CASES = [
    Case("one task", rows([3, 4])),
    Case("one task, zero", rows([0, 0])),
    Case("zero of two", rows([0, 0], [1, 2])),
    Case("zero of three", torch.cat([_SKEW[:2], 0 * _SKEW[:1]])),
    Case("all zero", 0 * _SKEW),
    Case("orthogonal", rows([1, 0], [0, 1])),
    Case("parallel", rows([1, 2], [2, 4])),
    Case("duplicated pair", rows([1, 2], [1, 2])),
    Case("duplicated among three", _SKEW[[0, 1, 0]]),
    Case("all the same", _SKEW[[0, 0, 0, 0]]),
    Case("nearly parallel", rows([1, 0], [1, 1e-7])),
    Case("opposite", rows([1, 2], [-1, -2])),
    Case("opposite, of other lengths", rows([1, 2], [-1e4, -2e4])),
    Case("nearly opposite", rows([1, 0], [-1, 1e-7])),
    Case("two against one", _SKEW[[0, 0, 0]] * rows([1], [1], [-1])),
    Case("balanced on a plane", rows([1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)])),
    Case("more tasks than dimensions", rows([1, 0], [0, 1], [1, 1], [1, -0.5], [-0.2, 1])),
    Case("lengths 1 and 1e4", _SKEW * rows([1], [1e4], [1])),
    Case("lengths 1e-4, 1 and 1e4", _SKEW * rows([1e-4], [1], [1e4])),
    Case("conflict, lengths 1 and 1e-4", rows([1, 0.1], [-1e-4, 1e-5])),
    Case("tiny", 1e-12 * _SKEW),
    Case("huge", 1e12 * _SKEW),
    Case("rounded to single precision", torch.cat([_SKEW, _SKEW[:1]]).float().double() + 1e-8 * torch.eye(4)),
]


def named(count: int) -> Mapping[str, str]:
    """Return likelihoods of so many tasks."""
    return {f"task{i}": "gaussian" for i in range(count)}


def check(rule: Callable[[Mapping[str, str]], Weighting], case: Case) -> Tensor:
    """Assert that a rule's weights are finite and one of them positive, twice in a row, and return the second."""
    step = case.step
    weighting = rule(named(len(step.losses)))
    for _ in range(2):
        weights = weighting(step).detach()
        weighting.asked += 1
        assert weights.shape == step.losses.shape and weights.dtype == torch.float64
        assert weights.isfinite().all(), weights
        assert (weights > 0).any(), weights
    if len(weights) == 1:
        assert weights[0] > 0
    return weights
