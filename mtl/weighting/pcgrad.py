"""Each gradient without what opposes another."""

import numpy as np
import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting


class PCGrad(GradientWeighting):
    """Projected conflicting gradients: the sum of the gradients, each projected onto those that it opposes.

    Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1: for each task i, and the other
    tasks j in random order, g_i becomes g_i - g_j <g_i, g_j> / |g_j|^2 where <g_i, g_j> < 0, with the g_j as they
    were. For two tasks w_i = 1 - min(0, <g_1, g_2>) / |g_i|^2.

    Weights are 1 or more. Opposite gradients have weights that cancel them.
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        gram, generator = step.gram.numpy(), self.generator()
        weights = np.eye(len(gram))  # row i: of which gradients the i-th is made
        for row, own in enumerate(weights):
            for other in torch.randperm(len(gram), generator=generator).tolist():
                product = own @ gram[other]
                if other != row and product < 0:
                    own[other] -= product / gram[other, other]
        return torch.from_numpy(weights.sum(0))
