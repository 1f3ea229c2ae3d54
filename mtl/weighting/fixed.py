"""Constant weights: L = sum over tasks of w_t L_t."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Step, Weighting


class Fixed(Weighting):
    """The same weights at every step, such as the lecture's alpha and beta.

    Args:
        tasks: Each task's likelihood by its name.
        weights: Weights by task, positive; 1 where not named.
    """

    weights: Tensor

    def __init__(self, tasks: Mapping[str, str], weights: Mapping[str, float] | None = None) -> None:
        super().__init__(tasks)
        given = weights or {}
        self.register_buffer("weights", torch.tensor([given.get(t, 1.0) for t in self.tasks], dtype=torch.float64))

    def unseen(self, weights: Tensor) -> Tensor:
        """Return the weights (T,) of all tasks."""
        return self.weights

    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,) of the present tasks."""
        return self.weights[step.present]
