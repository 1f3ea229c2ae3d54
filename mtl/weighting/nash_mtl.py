"""Nash-MTL: the step on which the tasks, bargaining for their own improvement, would agree."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms, option

_NEWTON_FROM = 0.25
"""Newton decrement below which full steps converge quadratically."""

_LAST = 1e-6
"""Newton decrement at which a full step leaves an error of its square."""


class NashMTL(GradientWeighting):
    """The solution a > 0 of M a = 1 / a, elementwise: the Nash bargaining solution.

    Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017, claim 3.1. It is the one
    minimiser of the convex, self-concordant function a^T M a / 2 - sum log a; damped Newton steps reach it to rounding,
    where the paper takes a sequence of convex programs. In terms of the cosines C and the lengths n of the gradients it
    is a = b / n with C b = 1 / b, so that lengths do not matter to the direction. For two tasks it is
    a_i = 1 / (n_i sqrt(1 + cosine)), and the update along the bisector. T counts the tasks that have a gradient.

    As a^T M a = sum a_i / a_i = T, the update's norm is sqrt(T) whatever the gradients. It is clipped to `max_norm`,
    the radius of the ball in which the paper's tasks bargain, so that by default it is 1 at every step: choose the
    learning rate for that. (torchjd, after the authors' code, divides M by its Frobenius norm and never undoes that, so
    that its update is shorter where gradients are short.)

    The closer gradients come to a Pareto-stationary point, such as opposite ones, the longer is a, and in the limit it
    has no end: there `lifted` decides, with a up to 3000 sqrt(T) / n, shortened by the same factor as at any other
    step; the update then falls short of `max_norm` and is zero at the point itself.

    Args:
        tasks: Each task's likelihood by its name.
        max_norm: Largest norm of the update, which the backbone's features see; 0 for no limit.

    Raises:
        UserError: The norm is negative.
    """

    def __init__(self, tasks: Mapping[str, str], max_norm: float = 1.0) -> None:
        super().__init__(tasks)
        self.max_norm = option("max_norm", max_norm, 0, 1e6)

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        bargain = _bargain(lifted(cosines(step.gram)))
        norm = math.sqrt(len(bargain))
        return bargain / norms(step.gram) * (min(1, self.max_norm / norm) if self.max_norm else 1)


def _bargain(matrix: Tensor) -> Tensor:
    """Return the b > 0 (T,) with M b = 1 / b, for a positive definite M (T, T).

    A step divided by 1 + decrement stays positive and lowers the function by a fixed amount at least, and so does a
    full step near the minimum (Nesterov and Nemirovskii 1994; Boyd and Vandenberghe, "Convex Optimization", 9.6).
    """
    point = torch.ones(len(matrix), dtype=matrix.dtype)
    decrement = math.inf
    while decrement > _LAST:
        gradient = matrix @ point - 1 / point
        newton = torch.linalg.solve(matrix + (point**-2).diag(), gradient)
        decrement = math.sqrt(float(gradient @ newton))
        point = point - newton / (1 + decrement if decrement > _NEWTON_FROM else 1)
    return point
