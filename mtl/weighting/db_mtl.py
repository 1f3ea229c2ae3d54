"""Logarithms of the losses, and gradients of one length."""

from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, norms
from mtl.weighting.history import positive


class DBMTL(GradientWeighting):
    """Dual-balancing: the gradients of log L_t, each made as long as the longest of them.

    Lin et al., "Dual-Balancing for Multi-Task Learning", 2023 (arXiv 2308.12029), sections 3.1 and 3.2, without the
    running average of the gradients, which of shared features would be one of different images. As log L_t has the
    gradient g_t / L_t, w_t = max_s(|g_s| / L_s) / |g_t|.

    Weights are positive. Opposite gradients cancel; duplicated tasks count twice.
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,).

        Raises:
            UserError: A loss is negative and has no logarithm.
        """
        length = norms(step.gram)
        return (length / positive(self, step.losses, step.present)).max() / length
