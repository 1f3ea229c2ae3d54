"""Logarithms of the losses, and gradients of one length."""

from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, norms

_LEAST_LOSS = 1e-8
"""Losses count as at least this, as in LibMTL, so that their logarithms are finite."""


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
        if (step.losses < 0).any():
            place = int(step.losses.argmin())
            raise UserError(
                f"--weighting db-mtl takes the logarithm of each loss, and that of {self.tasks[step.present[place]]!r}"
                f" is {step.losses[place]:.3g}; choose a rule without logarithms, such as imtl-g"
            )
        length = norms(step.gram)
        return (length / step.losses.clamp_min(_LEAST_LOSS)).max() / length
