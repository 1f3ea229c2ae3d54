"""CAGrad: near the mean gradient, the direction that is best for the task that it helps least."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import Step
from mtl.weighting.dualproj import least_change
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms, option

_ROUNDING = 1e-13
"""A radius below this share of the longest gradient is lost in the sums it takes to find d: there is none."""


class CAGrad(GradientWeighting):
    """Of all d with ||d - g_0|| <= c ||g_0||, where g_0 is the mean gradient, the one with the largest min <g_t, d>.

    Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv 2110.14048. The paper's
    algorithm 1 goes by the dual: d = g_0 + c ||g_0|| g_w / ||g_w|| where w on the simplex minimises
    <g_w, g_0> + c ||g_0|| ||g_w||. Here the same d is found in the primal: the shortest x with <g_t, g_0 + x> >= m for
    all t grows with m, and the largest m is where it is c ||g_0|| long, a root to be found; the weights of x are 0 or
    more, and proportional to w. T counts the tasks that have a gradient.

    The lengths of gradients matter: a short one limits min <g_t, d>, and gets a weight in inverse proportion to its
    length. With c=0 this is the mean of the losses. Where some tasks are at a Pareto-stationary point, such as opposite
    gradients, g_w vanishes: there `lifted` decides, with weights of up to 3000 c ||g_0|| / ||g_t|| where the paper's
    have no limit.

    Args:
        tasks: Each task's likelihood by its name.
        c: How far d may be from g_0, relative to its length: 0 to 10; below 1 the mean loss still converges.
        rescale: By what d is divided. 0: by nothing, as in the paper and in torchjd. 1: by 1 + c², as the authors' code
            and LibMTL do by default. 2: by 1 + c, which is an option of both.

    Raises:
        UserError: An option is out of its range.
    """

    def __init__(self, tasks: Mapping[str, str], c: float = 0.4, rescale: int = 0) -> None:
        super().__init__(tasks)
        self.c = option("c", c, 0, 10)
        if rescale not in (0, 1, 2):
            raise UserError(f"--weighting-options rescale={rescale}: must be 0, 1 (by 1 + c²) or 2 (by 1 + c)")
        self.divisor = (1, 1 + self.c**2, 1 + self.c)[int(rescale)]

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        between = cosines(step.gram)
        length = norms(step.gram)
        mean = length / len(length)
        radius = self.c * math.sqrt(max(float(mean @ between @ mean), 0))
        weights = torch.full_like(length, 1 / len(length))
        if radius > _ROUNDING * length.max():
            weights += _best_change(lifted(between).numpy(), length.numpy(), radius) / length
        return weights / self.divisor


def _best_change(products: np.ndarray, length: np.ndarray, radius: float) -> Tensor:
    """Return the weights (T,) of unit gradients in d - g_0.

    Args:
        products: Inner products (T, T) of the unit gradients, positive definite.
        length: The gradients' lengths (T,), positive.
        radius: How far d is from g_0, positive.
    """
    slopes = products @ length / len(length)
    # As good as `low` without a change; straight along a gradient, a change makes d no better for it than `high`.
    low, high = (length * slopes).min(), (length * (slopes + radius * np.sqrt(products.diagonal()))).min()

    def change(share: float) -> np.ndarray:
        wanted = (low + share * (high - low)) / length - slopes
        # No change as short as the radius costs a task more than that, and huge numbers would swamp the others.
        return least_change(products, wanted.clip(min=-2 * radius))

    def excess(share: float) -> float:
        weights = change(share)
        return math.sqrt(weights @ products @ weights) - radius

    # Beyond 1, as the root may be 1 but for rounding.
    return torch.from_numpy(change(brentq(excess, 0, 2, xtol=1e-15)))
