"""DualProj: the mean gradient, changed no more than it must be to conflict with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms

_ROUNDING = 1e-13
"""Relative error of a sum of a few numbers, and some more."""

_EXCHANGES = 1000
"""Bound on exchanges; random and degenerate matrices of ten tasks take at most 20."""


def least_change(products: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the y (T,) of the shortest x = sum_i y_i u_i with <u_i, x> >= wanted_i for each of T vectors u_i.

    With M_ij = <u_i, u_j>, its conditions of optimality are y >= 0, s = M y - wanted >= 0 and y_i s_i = 0: a linear
    complementarity problem with one solution. Block principal pivoting (Kim and Park, "Fast Nonnegative Matrix
    Factorization", SIAM J. Sci. Comput. 2011, section 4) guesses which y are positive, solves for them, and exchanges
    all that turn out wrong while these become fewer, else only the first, which comes to an end (Murty 1974). (scipy's
    nnls fails without notice on nearly opposite vectors.)

    Args:
        products: M (T, T), positive definite.
        wanted: What the inner products are to be at least, (T,).
    """
    helping = wanted > 0
    fewest = len(wanted) + 1
    for _ in range(_EXCHANGES):
        y = np.zeros_like(wanted)
        y[helping] = np.linalg.solve(products[np.ix_(helping, helping)], wanted[helping])
        slack = products @ y - wanted
        wrong = np.where(helping, y < 0, slack < -_ROUNDING * (np.abs(y).sum() + np.abs(wanted).max()))
        if not wrong.any():
            break
        count = int(wrong.sum())
        if count >= fewest:
            wrong[wrong.argmax() + 1 :] = False
        fewest = min(fewest, count)
        helping ^= wrong
    return y.clip(min=0)


class DualProj(GradientWeighting):
    """The projection of the mean gradient onto the dual cone: of all d with <g_t, d> >= 0 for each task, the nearest.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv 1706.08840,
    equation 11, with the mean of the gradients for the one that is projected, as in Quinton and Rey, "Jacobian Descent
    for Multi-Objective Optimization", 2024, arXiv 2406.16232. The weights v minimise v^T M v for v_t >= 1/T: without a
    conflict they are 1/T, which is the mean of the losses. T counts the tasks that have a gradient.

    The long gradients dominate the mean, as they do in a plain sum. Opposite gradients of any lengths give a step of
    zero, by weights inversely proportional to the lengths. For duplicated or nearly opposite gradients see `lifted`:
    there the update may conflict with a task by 1e-7 of the lengths times the weights.
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        count = len(step.gram)
        length = norms(step.gram).numpy()
        between = lifted(cosines(step.gram)).numpy()
        change = least_change(between, -between @ length / count)
        return torch.from_numpy(1 / count + change / length)
