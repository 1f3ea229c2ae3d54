"""A step that is fair to the tasks, in the sense of alpha-fair resource allocation."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms, option

_ITERATIONS = 200
"""Bound on Newton's steps. Ten are usual; with ``alpha`` 10 and norm ratios of 1e8, a hundred."""


class FairGrad(GradientWeighting):
    """Fair resource allocation: M w = w^(-1/alpha), w > 0.

    Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 4: the step of a given length
    that maximises sum_t <d, g_t>^(1 - alpha) / (1 - alpha). 1 is proportional fairness, Nash-MTL's equation; more is
    fairer, towards the largest least progress; less nears the plain sum.

    Weights are positive and of any size: of order |g|^(-2 alpha / (1 + alpha)). Gradients without a common descent
    direction have no solution: they have that of gradients with a common one to single precision, whose weights are
    large (for alpha 1, about 3000 / |g_t|) and cancel the gradients. Duplicated tasks share their weight.

    Args:
        tasks: Each task's likelihood by its name.
        alpha: 0.1 to 10; the paper's are 1 to 10.

    Raises:
        UserError: ``alpha`` is out of this range.
    """

    def __init__(self, tasks: Mapping[str, str], alpha: float = 1.0) -> None:
        super().__init__(tasks)
        self.alpha = option("alpha", alpha, 0.1, 10)

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        # With w = x / |g| in units of the longest gradient, C x = |g|^(p - 1) x^-p.
        power = 1 / self.alpha
        length = norms(step.gram)
        longest = length.max()
        demand = (length / longest) ** (power - 1)
        shares = fair_shares(lifted(cosines(step.gram)).numpy(), demand.numpy(), power)
        return torch.from_numpy(shares) / length * longest ** ((power - 1) / (power + 1))


def fair_shares(matrix: np.ndarray, demand: np.ndarray, power: float) -> np.ndarray:
    """Return x > 0 (T,) with matrix x = demand x^-power, by Newton's method.

    It is the minimum of the strictly convex x' matrix x / 2 - sum_t demand_t x_t^(1 - power) / (1 - power), a
    logarithm where power is 1. Steps are damped until they no longer end where the slope is half as steep, upwards.

    Args:
        matrix: (T, T), positive definite, with a diagonal of about 1.
        demand: (T,), positive.
        power: Positive.
    """
    # The solution for orthogonal gradients, and the minimum on its ray.
    x: np.ndarray = demand ** (1 / (1 + power))
    x = x * ((demand * x ** (1 - power)).sum() / (x @ matrix @ x)) ** (1 / (1 + power))
    for _ in range(_ITERATIONS):
        pull = demand * x**-power
        slope = x * (matrix @ x - pull)  # with respect to relative changes of x, as all that follows
        hessian = x[:, None] * matrix * x + np.diag(power * x * pull)
        unit = hessian.diagonal() ** -0.5
        move = -unit * np.linalg.solve(unit[:, None] * hessian * unit, unit * slope)
        damping = min(1.0, 0.9 / max(-move.min(), 0.9))
        while damping > 1e-9:
            there = x * (1 + damping * move)
            if (x * move) @ (matrix @ there - demand * there**-power) <= -0.5 * (slope @ move):
                break
            damping /= 2
        x = x * (1 + damping * move)
        if np.abs(damping * move).max() < 1e-9:
            break
    return x
