"""Dynamic weight average: more weight for tasks whose loss falls slowly from epoch to epoch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import EpochMeans, positive


class DWA(Weighting):
    """Weights T softmax(r / temperature), where r_t is the mean loss of the last epoch over that of the one before.

    Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7. Until a task has
    been there in two epochs its r is 1, so that all weights are 1 in the first two epochs. Means are over the steps of
    an epoch in which the task had labels; an epoch without any leaves its r as it is. T counts the present tasks.

    Args:
        tasks: Each task's likelihood by its name.
        temperature: From 0.001 to 1000; the larger, the more equal the weights.

    Attributes:
        last: Each task's mean loss in the last epoch that had its labels, NaN before one had.
        before: The same of the epoch before that one.

    Raises:
        UserError: The temperature is out of this range.
    """

    last: Tensor
    before: Tensor

    def __init__(self, tasks: Mapping[str, str], temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if not 1e-3 <= temperature <= 1e3:
            raise UserError(
                f"--weighting-options temperature={temperature}: the temperature of dwa is a number from 0.001 to"
                " 1000; the paper's is 2"
            )
        self.temperature = temperature
        self.means = EpochMeans(len(tasks))
        self.register_buffer("last", torch.full((len(tasks),), math.nan, dtype=torch.float64))
        self.register_buffer("before", self.last.clone())

    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,), and add the losses to the epoch's means."""
        self.means.add(positive(self, step.losses, step.present), step.present)
        rates = (self.last / self.before)[step.present].nan_to_num(nan=1.0)
        return len(rates) * (rates / self.temperature).softmax(dim=0)

    def end_epoch(self) -> None:
        """Move the history on, where the epoch has added to it."""
        means = self.means.close()
        seen = means.isfinite()
        self.before[seen] = self.last[seen]
        self.last[seen] = means[seen]
