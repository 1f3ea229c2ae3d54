"""A step of the same length along every task's gradient."""

import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms


class IMTLG(GradientWeighting):
    """Impartial multi-task learning, gradients: <d, g_t> / |g_t| is the same for every task, and sum_t w_t = 1.

    Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, equation 6. In terms of the cosines C between the
    gradients, C x = 1 and w_t is as x_t / |g_t|. For two tasks w_t is as 1 / |g_t|.

    Weights of three tasks or more may be negative. Then their sum may be nearly zero, which has no bound, or
    negative, which steps uphill for every task: it counts as at least a hundredth of the sum of their sizes, so that
    the step is downhill, and bounded. Opposite gradients have the weights of nearly opposite ones, as 1 / |g_t|, which
    cancel them; of three and more, so do those with an affine combination of their directions that is zero.
    Duplicated tasks share their weight.
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        between = lifted(cosines(step.gram))
        weights: Tensor = torch.linalg.solve(between, torch.ones_like(step.losses)) / norms(step.gram)
        return weights / torch.maximum(weights.sum(), weights.abs().sum() / 100)
