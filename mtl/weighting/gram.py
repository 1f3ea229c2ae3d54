"""What the rules from the gradients share: the Gram matrix M of the tasks' gradients, M_ij = <g_i, g_j>."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import Step, Weighting

PRECISION = torch.finfo(torch.float32).eps
"""Relative error of inner products: the gradients are of single precision at best, whatever M is held in."""


def norms(gram: Tensor) -> Tensor:
    """Return the gradients' norms (T,) from their Gram matrix (T, T)."""
    return gram.diagonal().clamp_min(0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Return the cosines (T, T) between the gradients, in [-1, 1] and 1 on the diagonal.

    A zero gradient is at right angles to all others.

    Args:
        gram: Gram matrix (T, T), positive semi-definite up to rounding.
    """
    length = norms(gram)
    inverse = torch.where(length > 0, length.reciprocal(), 0)
    between = (inverse[:, None] * gram * inverse).clamp(-1, 1)
    between.fill_diagonal_(1)
    return between


def lifted(cosines: Tensor) -> Tensor:
    """Return cosines (T, T) that can be inverted: themselves, where their least eigenvalue is at least `PRECISION`.

    Otherwise the least multiple of the identity that makes it so is added. So what an equation gives for opposite or
    duplicated gradients is its limit, and is bounded.
    """
    least = torch.linalg.eigvalsh(cosines)[0]
    lift: Tensor = (PRECISION - least).clamp_min(0) * torch.eye(len(cosines), dtype=cosines.dtype)
    return cosines + lift


def option(name: str, value: float, least: float, most: float) -> float:
    """Return the value of one of a rule's options.

    Raises:
        UserError: It is no number from ``least`` to ``most``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"--weighting-options {name}={value}: must be a number from {least:g} to {most:g}")
    return float(value)


def without_zeros(step: Step) -> Step:
    """Return what there is to see of the tasks whose gradient is not zero."""
    moving = step.gram.diagonal() > 0
    return Step(step.losses[moving], step.present[moving], step.gram[moving][:, moving])


class GradientWeighting(Weighting):
    """A rule that is shown the Gram matrix, and solved for the tasks whose gradient is not zero.

    A gradient of exactly zero (such as that of a head whose last layer starts at zero) changes no direction, whatever
    its weight, and says nothing of the others: it is left out of `solve`, and the task gets the mean size of the
    other tasks' weights, so that its head learns on. If all gradients are zero, all weights are 1.
    """

    needs_gram: ClassVar[bool] = True

    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,) of the present tasks."""
        moving = step.gram.diagonal() > 0
        if not moving.any():
            return torch.ones_like(step.losses)
        solved = self.solve(without_zeros(step))
        weights = solved.abs().mean().repeat(len(moving))
        weights[moving] = solved
        return weights

    @abstractmethod
    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,) of tasks whose gradients are not zero, in double precision.

        Args:
            step: What there is to see of these tasks.
        """
