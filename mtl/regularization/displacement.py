"""Weights that stand elsewhere for a while: the ground under sharpness, implicit regularization and weight noise."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mtl.errors import UserError

Gradients = Sequence[Tensor]
"""A gradient: one tensor for each parameter, zero where the loss does not reach it."""

Undo = Callable[[], None]


def displace(parameters: Iterable[Tensor], by: Iterable[Tensor]) -> Undo:
    """Add to weights in place, so that compiled models need no other program, and return what takes it back.

    The old bits come back, not a difference. A backward pass has to end before: torch refuses one through a graph
    that was built with other weights than those present.

    Args:
        parameters: The weights, kept once more until they are back.
        by: What to add, one tensor each.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def undo() -> None:
        for parameter, before in reversed(kept):
            parameter.copy_(before)
        kept.clear()

    try:
        with torch.no_grad():
            for parameter, change in zip(parameters, by, strict=True):
                kept.append((parameter, parameter.clone()))
                parameter.add_(change)
    except BaseException:  # such as no memory left, half-way
        undo()
        raise
    return undo


def ascend(parameters: Sequence[Tensor], direction: Gradients, distance: float) -> Undo:
    """Move weights a distance (Euclidean, over all of them) along a direction; nowhere if it is zero or not finite.

    With the gradient as direction and ρ as distance this is the first half of SAM, see
    `mtl.regularization.implicit.sharpness_aware`.

    Args:
        parameters: The weights.
        direction: Of any length.
        distance: How far; negative is backwards.

    Returns:
        What puts the weights back where they were, bit by bit.

    Raises:
        UserError: Weights are in half precision, in which so small a change is mostly lost.
    """
    coarse = next((p.dtype for p in parameters if torch.finfo(p.dtype).bits < 32), None)
    if coarse is not None:
        raise UserError(
            f"weights in {str(coarse).removeprefix('torch.')} cannot be moved by as little as implicit and "
            "sharpness-aware regularization need: choose --precision 32-true"
        )
    norm = total_norm(direction)
    # What half precision lets overflow is left to the optimizer to see; weights of no number would end the training.
    usable = (norm > 0) & norm.isfinite()
    factor = distance / norm
    return displace(parameters, (torch.where(usable, tensor * factor.to(tensor), 0) for tensor in direction))


def total_norm(gradients: Gradients) -> Tensor:
    """Return the Euclidean norm of all tensors together, a scalar."""
    return torch.nn.utils.get_total_norm(gradients)


def normal_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers in a weight's shape, type and place."""
    return torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
