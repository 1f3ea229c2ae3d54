"""DualProj: the mean gradient, changed no more than it must be to conflict with no task."""

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms


def least_change(products: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the y (T,) of the shortest x = sum_i y_i u_i with <u_i, x> >= wanted_i for each of T vectors u_i.

    Its conditions of optimality are y >= 0, s = M y - wanted >= 0 and y_i s_i = 0, where M_ij = <u_i, u_j>: those of
    the y >= 0 with the least ||L^T y - L^-1 wanted|| for the Cholesky factor L of M, which the active set of Lawson
    and Hanson ("Solving Least Squares Problems", 1974, chapter 23) finds in finitely many exact steps.

    Args:
        products: M (T, T), positive definite.
        wanted: What the inner products are to be at least, (T,).
    """
    factor = np.linalg.cholesky(products)
    scale = np.abs(wanted).max() or 1.0  # scipy's tolerance is an absolute one
    return scale * nnls(factor.T, np.linalg.solve(factor, wanted / scale), maxiter=100 * len(wanted))[0]


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
