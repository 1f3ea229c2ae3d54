"""Each gradient without what opposes another."""

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
        count = len(step.gram)
        generator = self.generator()
        weights = torch.eye(count, dtype=torch.float64)  # row i: of which gradients the i-th is made
        for row, own in enumerate(weights):
            for other in torch.randperm(count, generator=generator):
                product = own @ step.gram[other]
                if other != row and product < 0:
                    own[other] -= product / step.gram[other, other]
        return weights.sum(0)
