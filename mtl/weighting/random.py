"""Random weights, drawn anew at each step."""

import torch
from torch import Tensor

from mtl.weighting.base import Step, Weighting


class RandomWeights(Weighting):
    """The softmax of standard normal draws at each step: random loss weighting, RLW.

    Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022, with
    its normal distribution. As there, the weights sum to 1, not to the number of tasks, so that each is 1/T on
    average: a sum of T losses takes steps T times as long.
    """

    def forward(self, step: Step) -> Tensor:
        """Return weights (T,) that sum to 1."""
        # Drawn for all tasks, so that what the others get does not depend on who is missing.
        draws = torch.randn(len(self.tasks), generator=self.generator(), dtype=torch.float64)
        return draws[step.present].softmax(dim=0)
