"""Implicit regularization made explicit: what finite steps of gradient descent add to the loss that they follow.

Gradient descent with steps α follows, to second order, the continuous path of gradient flow not on L but on

    L + α/4 ‖∂L/∂φ‖²                                                            (Barrett & Dherin 2021)

and one epoch of stochastic gradient descent over B batches, on average over their order, that on

    L + α/4 ‖∂L/∂φ‖² + α/(4B) Σ_b ‖∂L_b/∂φ - ∂L/∂φ‖²                            (Smith et al. 2021)

where L is the mean of the batches' L_b (Prince 2023, "Understanding Deep Learning", equations 9.8 and 9.9). Both
terms together are α/(4B) Σ_b ‖∂L_b/∂φ‖²: the first term of each batch by itself, on average. So where gradients are
accumulated, `gradient_norm` of each small batch is both terms of the large one.

Added as terms, they give small or adaptive steps what large plain ones have of themselves. Their gradients hold
products of the Hessian H with a vector v, taken as a difference of gradients along v, as Geiping et al. 2022
("Stochastic training is not necessary for generalization") do: one more pass, forward and backward, through anything
that has a first derivative, be it compiled, with fused attention, or the gradient that a weighting rule makes.

The gradient is a function here, `GradientOf`. Asked twice with the same weights, it must give the same: the same
batch, the same random choices (dropout), the same task weights, and no trace left in running statistics. Where
several processes train together it is the mean over ranks. All of this is in the gradient's own unit, not in one that
half precision has scaled; `gradients_of_loss` sees to that and to the ranks. Forward passes may be in mixed precision:
at the distance below, its rounding is the lesser error.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtl.regularization.displacement import Gradients, ascend, total_norm
from mtl.tasks.base import over_ranks

GradientOf = Callable[[], Gradients]
"""Returns the gradient at the weights that the model has now, in tensors of its own."""

DISTANCE = 0.05
"""How far weights move for a difference of gradients: as far as SAM's.

Smooth networks bear a shorter distance, such as the 0.01 of DARTS (Liu et al. 2019) and Geiping et al. 2022, with less
error of truncation. But at each ReLU that switches in between the gradient jumps, which is real and which no second
derivative sees; over a short distance these few jumps, divided by it, drown the rest. At 0.05 to 0.1 a step along the
difference lowers ‖∂L/∂φ‖² about as much as one along the second derivative, in bfloat16 too; at 0.003 clearly less.
"""


class Term(NamedTuple):
    """What a loss has added to it.

    Attributes:
        value: A scalar.
        gradients: Its gradient.
    """

    value: Tensor
    gradients: list[Tensor]


class Moments(NamedTuple):
    """What batches' gradients are, on average and about it; times α/4 the two terms of this file.

    Attributes:
        squared_norm: ‖g‖² of their mean g, a scalar.
        variance: 1/B Σ_b ‖g_b - g‖², a scalar.
    """

    squared_norm: Tensor
    variance: Tensor


def gradients_of_loss(loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None = None) -> list[Tensor]:
    """Return the gradient of a loss, mean over ranks, without adding to any ``.grad``.

    Args:
        loss: A scalar; its graph is freed.
        parameters: Of which some may not have been reached: their gradient is zero.
        scale: By which half precision multiplies losses on their way back, if it does.
    """
    start = torch.ones_like(loss) if scale is None else scale.to(loss)
    # Backward passes run in the precision of their forward pass, whatever surrounds them.
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, parameters, start, allow_unused=True, materialize_grads=True)
    return [over_ranks(gradient if scale is None else gradient / scale.to(gradient)) for gradient in found]


def gradient_norm(
    gradient_of: GradientOf,
    parameters: Sequence[Tensor],
    gradients: Gradients,
    alpha: float,
    distance: float = DISTANCE,
) -> Term:
    """Return α/4 ‖g‖² and its gradient α/2 H g, for the gradient g of the loss.

    Args:
        gradient_of: Is asked once.
        parameters: The weights.
        gradients: The gradient where they are.
        alpha: α, the step that the term stands for.
        distance: See `hessian_product`.
    """
    product = hessian_product(gradient_of, parameters, gradients, gradients, distance)
    return Term(alpha / 4 * total_norm(gradients).square(), [alpha / 2 * tensor for tensor in product])


def batch_variance(
    gradients_of: Sequence[GradientOf],
    parameters: Sequence[Tensor],
    gradients: Sequence[Gradients],
    alpha: float,
    distance: float = DISTANCE,
) -> Term:
    """Return α/(4B) Σ_b ‖g_b - g‖² and its gradient α/(2B) Σ_b H_b (g_b - g), for the mean g of B batches' gradients.

    H (g_b - g) sums to zero over the batches, so that each is asked only for its own Hessian. The batches'
    gradients have to be kept meanwhile. Where B batches stand for all those that might have been drawn, the term is
    on average (B - 1) / B of theirs.

    Args:
        gradients_of: One for each batch; each is asked once.
        parameters: The weights.
        gradients: The batches' gradients where they are.
        alpha: α, the step that the term stands for.
        distance: See `hessian_product`.
    """
    mean = [torch.stack(tensors).mean(dim=0) for tensors in zip(*gradients, strict=True)]
    value = torch.zeros_like(total_norm(mean))
    total = [torch.zeros_like(tensor) for tensor in mean]
    for gradient_of, own in zip(gradients_of, gradients, strict=True):
        deviation = [tensor - middle for tensor, middle in zip(own, mean, strict=True)]
        value += alpha / (4 * len(gradients)) * total_norm(deviation).square()
        for into, tensor in zip(total, hessian_product(gradient_of, parameters, own, deviation, distance), strict=True):
            into.add_(tensor, alpha=alpha / (2 * len(gradients)))
    return Term(value, total)


def sharpness_aware(
    gradient_of: GradientOf, parameters: Sequence[Tensor], gradients: Gradients, rho: float
) -> Gradients:
    """Return the gradient at φ + ρ g / ‖g‖: SAM (Foret et al. 2021, "Sharpness-aware minimization", algorithm 1).

    It replaces the gradient g of the loss. To first order it is g + ρ H g / ‖g‖, the gradient of L + ρ ‖g‖: the
    practical relative of `gradient_norm`. Accumulated over small batches, each with an ascent of its own, it is the
    paper's m-sharpness.

    Args:
        gradient_of: Is asked once.
        parameters: The weights.
        gradients: The gradient where they are.
        rho: ρ, in the paper 0.05 for networks on ImageNet.
    """
    undo = ascend(parameters, gradients, rho)
    try:
        return gradient_of()
    finally:
        undo()


def hessian_product(
    gradient_of: GradientOf,
    parameters: Sequence[Tensor],
    gradients: Gradients,
    vector: Gradients,
    distance: float = DISTANCE,
) -> list[Tensor]:
    """Return the Hessian's product with a vector v: ‖v‖ / ε (∇L(φ + ε v / ‖v‖) - ∇L(φ)).

    The error is one of curvature's change, in proportion to ε, and one of rounding, in proportion to 1 / ε; see
    `DISTANCE` for networks with kinks.

    Args:
        gradient_of: Is asked once.
        parameters: The weights φ.
        gradients: The gradient where they are.
        vector: v, of any length.
        distance: ε.
    """
    undo = ascend(parameters, vector, distance)
    try:
        moved = gradient_of()
    finally:
        undo()
    factor = total_norm(vector) / distance
    return [(there - here) * factor.to(here) for there, here in zip(moved, gradients, strict=True)]


def gradient_moments(gradients: Iterable[Gradients]) -> Moments:
    """Return the square of the mean gradient's norm, and the variance of batches' gradients about it.

    In one pass with memory for two gradients (Welford 1962), where a difference of squares would cancel.

    Args:
        gradients: Those of batches of one size, at least one, at the same weights.
    """
    batches = iter(gradients)
    mean = [tensor.clone() for tensor in next(batches)]
    spread = torch.zeros_like(total_norm(mean))
    count = 1
    for own in batches:
        count += 1
        deviation = [tensor - middle for tensor, middle in zip(own, mean, strict=True)]
        spread += (1 - 1 / count) * total_norm(deviation).square()
        for middle, tensor in zip(mean, deviation, strict=True):
            middle.add_(tensor, alpha=1 / count)
    return Moments(total_norm(mean).square(), spread / count)
