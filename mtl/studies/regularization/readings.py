"""With which weights a training answers: its last ones, those of other moments, or an average along the way."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mtl.studies.regularization.recipe import Published, Recipe
from mtl.studies.regularization.training import Parameters, logits


class Reading(NamedTuple):
    """How weights come of a training.

    Attributes:
        name: One of `WATCHERS`.
        value: Its number, if it has one.
    """

    name: str = "last"
    value: float = 0.0

    def watch(self, recipe: Recipe, published: Published) -> "Watcher":
        """Return what sees the training's steps."""
        count = 2 * len(published.all.labels) if recipe.signals == "copies" else len(published.all.labels)
        count = len(published.train.labels) if recipe.signals == "train" else count
        epoch = math.ceil(count / recipe.batch)
        return WATCHERS[self.name](self.value, epoch, recipe.epochs * epoch, published)


LAST = Reading()
"""The weights at the end."""


class Watcher:
    """Keeps the last weights.

    Args:
        value: See `Reading`.
        epoch: Steps in an epoch.
        total: Steps of the training.
        published: MNIST-1D.

    Attributes:
        kept: The weights to answer with; several are an ensemble.
    """

    def __init__(self, value: float, epoch: int, total: int, published: Published) -> None:
        self.value, self.epoch, self.total, self.published = value, epoch, total, published
        self.kept: list[Parameters] = []

    def __call__(self, step: int, parameters: Parameters) -> None:
        """See the parameters after a step, the first of which is 1."""
        if step == self.total:
            self._keep(parameters)

    def _keep(self, parameters: Parameters) -> None:
        self.kept.append([tensor.detach().clone() for tensor in parameters])


class _Exponential(Watcher):
    """Keeps a moving average of all steps' weights, with `value` as its decay."""

    @torch.no_grad()
    def __call__(self, step: int, parameters: Parameters) -> None:
        if step == 1:
            self._keep(parameters)
        torch._foreach_lerp_(self.kept[0], [tensor.detach() for tensor in parameters], 1 - self.value)


class _Stochastic(Watcher):
    """Keeps the mean of the weights at the ends of epochs, from the share `value` of the training on."""

    count = 0

    @torch.no_grad()
    def __call__(self, step: int, parameters: Parameters) -> None:
        if step % self.epoch or step < self.value * self.total:
            return
        self.count += 1
        if self.count == 1:
            self._keep(parameters)
        torch._foreach_lerp_(self.kept[0], [tensor.detach() for tensor in parameters], 1 / self.count)


class _Stopped(Watcher):
    """Keeps the end of the epoch with the least error on validation signals, until `value` epochs brought no less."""

    best = waited = torch.zeros(0)

    @torch.no_grad()
    def __call__(self, step: int, parameters: Parameters) -> None:
        if step % self.epoch:
            return
        errors = self.judge(logits(parameters, self.published.validation.signals.expand(len(parameters[0]), -1, -1)))
        if not self.kept:
            self._keep(parameters)
            self.best, self.waited = errors, torch.zeros_like(errors)
            return
        # What has waited for too long has ended, whatever comes.
        better = (errors < self.best) & (self.waited < self.value)
        self.best, self.waited = torch.where(better, errors, self.best), torch.where(better, 0, self.waited + 1)
        for kept, tensor in zip(self.kept[0], parameters, strict=True):
            kept[better] = tensor.detach()[better]

    def judge(self, found: Tensor) -> Tensor:
        """Return by how much logits (N, B, classes) are wrong, (N,)."""
        return (found.argmax(-1) != self.published.validation.labels).double().mean(1)


class _StoppedByLoss(_Stopped):
    """The same with the loss in place of the error."""

    def judge(self, found: Tensor) -> Tensor:
        labels = self.published.validation.labels.repeat(len(found))
        return functional.cross_entropy(found.flatten(0, 1), labels, reduction="none").view(len(found), -1).mean(1)


class _Snapshots(Watcher):
    """Keeps the weights at the ends of `value` equal parts of the training."""

    def __call__(self, step: int, parameters: Parameters) -> None:
        if step in [round(self.total * number / self.value) for number in range(1, round(self.value) + 1)]:
            self._keep(parameters)


WATCHERS: dict[str, type[Watcher]] = {
    "last": Watcher,
    "ema": _Exponential,
    "swa": _Stochastic,
    "least-error": _Stopped,
    "least-loss": _StoppedByLoss,
    "snapshots": _Snapshots,
}
"""By name."""


def members_of(kept: Sequence[Parameters], recipe: int, recipes: int, members: int, seeds: int) -> list[Parameters]:
    """Return the members of a recipe's ensembles, each the parameters of S networks, one a seed.

    Args:
        kept: What a watcher has kept of recipes trained together.
        recipe: Which of them.
        recipes: How many they are.
        members: How many of each moment to take.
        seeds: S.
    """

    def part(tensor: Tensor, member: int) -> Tensor:
        return tensor.view(recipes, -1, seeds, *tensor.shape[1:])[recipe, member]

    return [[part(tensor, member) for tensor in moment] for moment in kept for member in range(members)]
