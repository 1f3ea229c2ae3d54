"""What rules from the losses share: losses that can be divided by, and their means over epochs."""

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import HostModule, Weighting

FLOOR = 1e-8
"""Smaller losses count as this much, so that quotients and logarithms are finite: a weight of 1 / loss is at most its
inverse. It is FAMO's epsilon."""

_ROUNDING = 1e-6
"""How far below zero single precision takes a loss that is none, such as 1 - cosine."""


def positive(rule: Weighting, losses: Tensor, present: Tensor) -> Tensor:
    """Return the losses (T,), at least `FLOOR`.

    Args:
        rule: Who asks.
        losses: (T,).
        present: Places (T,) of their tasks among all of the rule's.

    Raises:
        UserError: A loss is negative: the rule's quotients and logarithms would mean nothing.
    """
    least, place = losses.min(dim=0)
    if least < -_ROUNDING:
        raise UserError(
            f"the loss of {rule.tasks[present[place]]!r} is {least:.6g}, and this weighting rule needs losses of 0 or"
            " more: choose one that takes any, such as --weighting equal"
        )
    return losses.clamp(min=FLOOR)


class EpochMeans(HostModule):
    """The mean of each task's losses over an epoch, complete in ``state_dict`` at any step of it.

    Args:
        tasks: Number of tasks.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(tasks, dtype=torch.int64))

    def add(self, losses: Tensor, present: Tensor) -> None:
        """Take in a step's losses (T,) of the tasks at the places (T,)."""
        self.sums[present] += losses
        self.counts[present] += 1

    def close(self) -> Tensor:
        """Return the epoch's means, one for each task, NaN for one that was never there; begin the next epoch."""
        means = self.sums / self.counts
        self.sums.zero_()
        self.counts.zero_()
        return means
