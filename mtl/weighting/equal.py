"""The plain sum: L = sum over tasks of L_t."""

import torch
from torch import Tensor

from mtl.weighting.base import Step, Weighting


class Equal(Weighting):
    """Every task's weight is 1."""

    def forward(self, step: Step) -> Tensor:
        """Return ones (T,)."""
        return torch.ones_like(step.losses)
