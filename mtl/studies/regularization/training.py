"""Trains many networks at once as one model whose every tensor has the networks in front."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from mtl.ensembling.bagging import bootstrap
from mtl.ensembling.soups import warm_restarts
from mtl.studies.lecture.augmentation import WIDTHS
from mtl.studies.lecture.perceptron import he_weights
from mtl.studies.regularization.recipe import (
    SHAPES,
    STRENGTHS,
    Data,
    Published,
    Recipe,
    changed_by_epoch,
    data_of,
    seeds_of,
)

Parameters = list[Tensor]
"""Of each layer the weights (N, inputs, outputs) and the biases (N, 1, outputs) of N networks."""

Watch = Callable[[int, Parameters], None]
"""Is told after each step how many there have been, and the parameters."""

PARTS = 4
"""Parts of a batch between which gradients vary."""

PATCH = 4
"""Neighbouring values that are hidden together."""

LENGTH, CLASSES = WIDTHS[0], WIDTHS[-1]


def logits(parameters: Parameters, signals: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
    """Return the outputs (N, B, outputs) of signals (N, B, features).

    Args:
        parameters: The networks.
        signals: Inputs.
        keep: Of each hidden layer the factors (N, B, units) of dropout.
    """
    hidden = signals
    for number, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        if number:
            hidden = functional.relu(hidden)
            hidden = hidden if keep is None else hidden * keep[number - 1]
        hidden = torch.baddbmm(bias, hidden, weight)
    return hidden


def dropout_factors(generators: Sequence[torch.Generator], count: int, probability: Tensor) -> list[Tensor]:
    """Return for each hidden layer (N, count, units) what each output is multiplied by: 0, or 1 / (1 - p).

    Args:
        generators: Of S networks, whose draws each K-th part of the N = K S networks shares.
        count: Samples B.
        probability: p of each network, (N, 1, 1).
    """
    factors = []
    for units in WIDTHS[1:-1]:
        drawn = torch.stack([torch.rand(count, units, generator=generator) for generator in generators])
        kept = drawn.repeat(len(probability) // len(drawn), 1, 1) >= probability
        factors.append(kept / (1 - probability))
    return factors


class Trainer:
    """Trains recipes of one kind, each with every seed, by SGD on mean cross-entropies.

    A seed decides a network's first weights and the order of its samples, whatever the technique, and what a
    technique draws besides, whatever its strength: so networks of one seed can be compared in pairs. None depends, but
    for rounding, on what is trained beside it. What a recipe starts from is trained here and now.

    Args:
        recipes: K recipes that have the same `Recipe.kind`.
        seeds: S seeds.
        published: MNIST-1D.
    """

    def __init__(self, recipes: Sequence[Recipe], seeds: Sequence[int], published: Published) -> None:
        self.recipes, self.recipe = recipes, recipes[0]
        recipe = self.recipe
        self.classes = 0 if recipe.goal == "hidden" else SHAPES if recipe.signals == "shapes" else CLASSES
        self.masking = recipe.goal == "hidden" or recipe.joint > 0
        each = list(zip(*(seeds_of(seed, recipe.members) for seed in seeds), strict=True))
        self.all_seeds = [seed for member in each for seed in member]
        self.seeds = list(seeds) if recipe.branch else self.all_seeds
        self.orders = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.noise = [torch.Generator().manual_seed(seed + 2**32) for seed in self.seeds]
        drawn = [he_weights(*sides, self.orders).float() for sides in pairwise((*WIDTHS[:-1], self.classes))]
        if self.masking:
            # From elsewhere, so that the order of the samples is what it is without.
            drawn[-1] = torch.cat([drawn[-1], he_weights(WIDTHS[-2], LENGTH, self.noise).float()], 2)
        parameters = [tensor for weight in drawn for tensor in (weight, torch.zeros_like(weight[:, :1]))]
        if recipe.start is not None:
            before = Trainer([recipe.start], seeds, published).run()
            parameters[:-2] = [tensor.repeat(recipe.members, 1, 1) for tensor in before[:-2]]
        self.parameters = [tensor.repeat(len(recipes), 1, 1).requires_grad_() for tensor in parameters]
        self.velocity = [torch.zeros_like(tensor) for tensor in self.parameters]
        self.first = [tensor.detach().clone() for tensor in self.parameters]
        self.published = published
        self._place()

    def _place(self) -> None:
        """Set what depends on how many networks there are."""
        self.data = data_of(self.recipe, self.published, self.seeds)
        count = self.data.labels.shape[1]
        self.rows = (
            torch.stack([torch.from_numpy(bootstrap(count, seed)) for seed in self.seeds])
            if self.recipe.bootstrap
            else torch.arange(count).expand(len(self.seeds), -1)
        )
        self.networks = torch.arange(len(self.recipes) * len(self.seeds))[:, None]
        names = (*STRENGTHS, "l2_sp")
        values = {name: torch.tensor([getattr(recipe, name) for recipe in self.recipes]) for name in names}
        self.of = {name: each.repeat_interleave(len(self.seeds))[:, None, None] for name, each in values.items()}
        self.used = {name for name in names if values[name].any()}

    def _branch(self) -> None:
        """Make of each network as many as there are members, which from now on see other orders."""

        def wider(tensor: Tensor) -> Tensor:
            shape = (len(self.recipes), 1, len(self.seeds), *tensor.shape[1:])
            return tensor.detach().view(shape).repeat(1, self.recipe.members, 1, 1, 1).flatten(0, 2)

        self.parameters = [wider(tensor).requires_grad_() for tensor in self.parameters]
        self.velocity = [wider(tensor) for tensor in self.velocity]
        more = self.all_seeds[len(self.seeds) :]
        self.orders += [torch.Generator().manual_seed(seed) for seed in more]
        self.noise += [torch.Generator().manual_seed(seed + 2**32) for seed in more]
        self.seeds = self.all_seeds
        self._place()

    def run(self, watch: Watch = lambda step, parameters: None) -> Parameters:
        """Train, and return the parameters of K x members x S networks, in this order.

        Their outputs are the classes' logits alone, unless hidden values are all that was learned.

        Args:
            watch: Sees every step.
        """
        recipe = self.recipe
        count = self.data.labels.shape[1]
        total = recipe.epochs * math.ceil(count / recipe.batch)
        factor = warm_restarts(total, recipe.cycles).factor if recipe.cycles else lambda step: 1.0
        step = 0
        for epoch in range(recipe.epochs):
            if recipe.branch and epoch == recipe.branch:
                self._branch()
            parts = [changed_by_epoch(one, self.data, epoch, self.seeds, self.classes) for one in self.recipes]
            seen = Data(*parts[0]) if len(parts) == 1 else Data(*map(torch.cat, zip(*parts, strict=True)))
            order = torch.stack([torch.randperm(count, generator=one) for one in self.orders])
            order = self.rows.gather(1, order).repeat(len(self.recipes), 1)
            for chosen in torch.split(order, recipe.batch, 1):
                self._step(seen.signals[self.networks, chosen], seen.labels[self.networks, chosen], factor(step))
                step += 1
                watch(step, self.parameters)
        return classifier([tensor.detach() for tensor in self.parameters], self.classes)

    def _step(self, signals: Tensor, labels: Tensor, factor: float) -> None:
        at, of, used = self.parameters, self.of, self.used
        keep = dropout_factors(self.noise, signals.shape[1], of["dropout"]) if "dropout" in used else None
        hidden = self._hidden(signals.shape[1]) if self.masking else None

        def gradient(where: Parameters) -> Sequence[Tensor]:
            return torch.autograd.grad(self._losses(where, signals, labels, keep, hidden).sum(), where)

        if used & {"gradient_norm", "batch_variance"}:
            gradients = self._with_implicit_terms(signals, labels)
        else:
            if "weight_noise" in used:
                at = self._noisy(at)
            gradients = gradient(at)
            if "sam" in used:
                gradients = gradient(_moved(at, gradients, of["sam"]))
        with torch.no_grad():
            for place, (p, v, g) in enumerate(zip(self.parameters, self.velocity, gradients, strict=True)):
                if place % 2 == 0:
                    # The gradients of the penalties; the first two are of all weights, the last of those that started
                    # somewhere.
                    if "l2" in used:
                        g = g + 2 * of["l2"] * p
                    if "l1" in used:
                        g = g + of["l1"] * p.sign()
                    if "l2_sp" in used and place < len(self.parameters) - 2:
                        g = g + 2 * of["l2_sp"] * (p - self.first[place])
                    if "decay" in used:
                        p.mul_(1 - factor * of["rate"] * of["decay"])
                v.mul_(self.recipe.momentum).add_(g)
                p.addcmul_(v, of["rate"], value=-factor)

    def _losses(
        self,
        parameters: Parameters,
        signals: Tensor,
        labels: Tensor,
        keep: Sequence[Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return each network's mean loss over its batch, (N,)."""
        total = signals.new_zeros(len(signals))
        if self.classes:
            scores = logits(parameters, signals, keep)[..., : self.classes].log_softmax(-1)
            losses = -scores.gather(-1, labels[..., None])[..., 0]
            if "smoothing" in self.used:
                share = self.of["smoothing"][..., 0]
                losses = (1 - share) * losses - share * scores.mean(-1)
            total = total + losses.mean(1)
        if hidden is not None:
            found = logits(parameters, signals.masked_fill(hidden, 0))[..., self.classes :]
            errors = ((found - signals).square() * hidden).sum((1, 2)) / hidden.sum((1, 2))
            total = total + (self.recipe.joint if self.classes else 1.0) * errors
        return total

    def _with_implicit_terms(self, signals: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """Return the gradient of the loss and what finite steps add to it, by a second derivative, which is exact.

        Each part of a batch has copies of its network's parameters, so that each has a gradient of its own.
        """
        count = PARTS if "batch_variance" in self.used else 1
        copies = [parameter.repeat_interleave(count, 0) for parameter in self.parameters]
        number = len(copies[0])
        losses = self._losses(copies, signals.reshape(number, -1, LENGTH), labels.reshape(number, -1))
        gradients = torch.autograd.grad(losses.sum(), copies, create_graph=True)
        squares = losses.new_zeros(len(self.networks))
        spread = squares
        for each in gradients:
            parts = each.view(-1, count, *each.shape[1:])
            mean = parts.mean(1)
            squares = squares + mean.square().sum((1, 2))
            spread = spread + (parts - mean[:, None]).square().sum((2, 3)).mean(1)
        norm, variance = (self.of[name][:, 0, 0] for name in ("gradient_norm", "batch_variance"))
        total = losses.view(-1, count).mean(1) + norm / 4 * squares + variance / 4 * spread
        return torch.autograd.grad(total.sum(), self.parameters)

    def _noisy(self, parameters: Parameters) -> Parameters:
        """Return parameters with noise on the weights."""
        moved = [tensor.detach() for tensor in parameters]
        for place, weight in list(enumerate(moved))[::2]:
            drawn = torch.stack([torch.randn(weight.shape[1:], generator=one) for one in self.noise])
            moved[place] = weight + self.of["weight_noise"] * drawn.repeat(len(self.recipes), 1, 1)
        return [tensor.requires_grad_() for tensor in moved]

    def _hidden(self, count: int) -> Tensor:
        """Return which values are hidden, (N, count, 40): as many patches of each signal."""
        patches = LENGTH // PATCH
        drawn = torch.stack([torch.rand(count, patches, generator=one) for one in self.noise])
        chosen = drawn.argsort(-1) < round(self.recipe.hidden * patches)
        return chosen.repeat_interleave(PATCH, -1).repeat(len(self.recipes), 1, 1)


def _moved(parameters: Parameters, gradients: Sequence[Tensor], distance: Tensor) -> Parameters:
    """Return each network's parameters a distance (N, 1, 1) along its gradient."""
    squares = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0)
    # A network that has no gradient stays where it is.
    factor = distance / squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)[:, None, None]
    return [(p.detach() + factor * g).requires_grad_() for p, g in zip(parameters, gradients, strict=True)]


def classifier(parameters: Parameters, classes: int) -> Parameters:
    """Return parameters without the outputs that are no classes, where there are classes."""
    return [*parameters[:-2], *(tensor[..., : classes or None] for tensor in parameters[-2:])]
