"""The shortest of all averages of the gradients."""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from mtl.errors import UserError, nearest
from mtl.weighting.base import Step
from mtl.weighting.gram import PRECISION, GradientWeighting, cosines, norms

Normalizer = Literal["none", "l2", "loss", "loss+"]


class MGDA(GradientWeighting):
    """Multiple gradient descent: min over w of |sum_t w_t g_t|^2 where w >= 0 and sum_t w_t = 1.

    Désidéri, C. R. Acad. Sci. 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS
    2018, equation 3. Without a normalizer short gradients dominate: at right angles, w_t is as 1 / |g_t|^2. With one,
    the average is that of g_t / z_t, and the weights are those of the raw gradients, scaled to sum to 1. (The
    authors' code gives the weights of the normalized gradients to the raw ones, which of two tasks with ``l2`` makes
    the plain mean.)

    The minimum is found exactly, as one of non-negative least squares: min over y >= 0 of |sum_t y_t g_t|^2 +
    (sum_t y_t - 1)^2 lies on the same ray.

    Weights are non-negative. Opposite gradients have weights that cancel them. Of duplicated tasks, one may have all
    of their weight.

    Args:
        tasks: Each task's likelihood by its name.
        normalizer: z_t: ``none`` is 1, ``l2`` is |g_t|, ``loss`` is L_t, and ``loss+`` is L_t |g_t|. Of the losses,
            the absolute values count.

    Raises:
        UserError: No such normalizer.
    """

    def __init__(self, tasks: Mapping[str, str], normalizer: Normalizer = "none") -> None:
        super().__init__(tasks)
        if normalizer not in get_args(Normalizer):
            raise UserError(
                f"--weighting-options normalizer={normalizer}: must be one of {', '.join(get_args(Normalizer))}"
                f"{nearest(str(normalizer), get_args(Normalizer))}"
            )
        self.normalizer = normalizer

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,), which sum to 1."""
        length = norms(step.gram)
        losses = step.losses.abs()
        losses = losses.clamp_min(PRECISION * losses.max()) if losses.any() else torch.ones_like(losses)
        normalized = {"none": length, "l2": length / length, "loss": length / losses, "loss+": 1 / losses}
        # In multiples of the unit gradients, all columns are about as long, however far apart the gradients are.
        values, vectors = torch.linalg.eigh(cosines(step.gram))
        units = values.clamp_min(0).sqrt()[:, None] * vectors.T
        total = normalized[self.normalizer].reciprocal()
        system = torch.cat([units, total[None] / total.max()])
        multiples, _ = nnls(system.numpy(), np.eye(len(system))[-1], maxiter=100 * len(system))
        weights = torch.from_numpy(multiples) / (length / length.min())
        return weights / weights.sum()
