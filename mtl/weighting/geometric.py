"""The geometric mean of the losses."""

from torch import Tensor

from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import positive


class Geometric(Weighting):
    """The geometric mean (L_1 ... L_T)^(1/T) of the losses, known as GLS, the geometric loss strategy.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR workshops 2019. The weight is the mean divided by T L_t: the direction of
    `mtl.weighting.log.LogSum` with a step that shrinks with the losses. T counts the present tasks. A loss below
    `mtl.weighting.history.FLOOR` counts as that much.
    """

    def forward(self, step: Step) -> Tensor:
        """Return the mean's derivatives by the losses, (T,)."""
        logs = positive(self, step.losses, step.present).log()
        return (logs.mean() - logs).exp() / len(logs)
