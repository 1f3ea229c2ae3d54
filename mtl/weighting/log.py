"""The sum of logarithms: L = sum over tasks of log L_t."""

from torch import Tensor

from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import positive


class LogSum(Weighting):
    """The sum of the losses' logarithms, which no change of a loss's unit or factor affects.

    The weight is 1 / L_t: each task's gradient is relative to its loss, where learned weights (`uncertainty`,
    `imtl-l`) arrive in the end. It is the scale-invariant baseline ("SI") of Navon et al., "Multi-Task Learning as a
    Bargaining Game", ICML 2022. A loss below `mtl.weighting.history.FLOOR` counts as that much, so that one of
    exactly 0, whose gradient is 0 as well, has a finite weight.
    """

    def forward(self, step: Step) -> Tensor:
        """Return 1 / L_t, (T,)."""
        return positive(self, step.losses, step.present).reciprocal()
