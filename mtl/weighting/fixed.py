"""Constant weights: L = sum over tasks of w_t L_t."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class FixedWeights(Weighting):
    """The same weights at every step, such as the lecture's alpha and beta.

    Args:
        weights: Each task's weight, positive.
    """

    weights: Tensor

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(list(weights))
        self.register_buffer("weights", torch.tensor([weights[task] for task in self.tasks]))

    def forward(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weight of each task's scalar loss."""
        return {task: weight for task, weight in zip(self.tasks, self.weights, strict=True) if task in losses}
