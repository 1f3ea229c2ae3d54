"""STCH: a smooth form of the largest of all losses, each relative to what it was early in training."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import EpochMeans, positive


class STCH(Weighting):
    """Smooth Tchebycheff scalarization of the logarithms of L / nadir, after epochs of warm-up.

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, arXiv 2402.19078, in
    the form that the authors use for multi-task learning and that LibMTL's repository has: the sum of log L_t during
    the warm-up, and then T mu log sum_t exp(log(L_t / nadir_t) / mu), whose weights are
    T softmax(log(L / nadir) / mu) / L. The nadir is each task's mean loss in the warm-up's last epoch. Equally good
    tasks have the weights of `mtl.weighting.log.LogSum`, before and after; the smaller mu, the more is done for the
    worst alone.

    A training that ends before the warm-up does is one with `mtl.weighting.log.LogSum`; where epochs are few, set
    ``warmup=1``. (LibMTL counts epochs from 0 and includes the one of that number: its STCH_warmup_epoch=4 is
    ``warmup=5`` here.) The nadir of a task that lacked labels in the warm-up's last epoch is its mean of the last
    epoch that had some, be it later than the warm-up; until there is one, its loss counts as being at its nadir.
    T counts the present tasks.

    Args:
        tasks: Each task's likelihood by its name.
        mu: How smooth the maximum is, positive.
        warmup: Epochs of warm-up, at least 1.

    Attributes:
        epochs: Epochs that are over.
        nadir: The mean loss that each task is compared with, NaN while it is not known.

    Raises:
        UserError: An option is out of its range.
    """

    epochs: Tensor
    nadir: Tensor

    def __init__(self, tasks: Mapping[str, str], mu: float = 1.0, warmup: int = 4) -> None:
        super().__init__(tasks)
        if not 0 < mu < math.inf:
            raise UserError(f"--weighting-options mu={mu}: the smoothness of stch is a positive number, such as 1")
        if warmup < 1 or not float(warmup).is_integer():
            raise UserError(
                f"--weighting-options warmup={warmup}: the warm-up of stch is a whole number of epochs, at least 1,"
                " for the last of them gives each loss its measure"
            )
        self.mu, self.warmup = mu, int(warmup)
        self.means = EpochMeans(len(tasks))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nadir", torch.full((len(tasks),), math.nan, dtype=torch.float64))

    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,), and add the losses to the epoch's means."""
        losses = positive(self, step.losses, step.present)
        self.means.add(losses, step.present)
        if self.epochs < self.warmup:
            return losses.reciprocal()
        ratios = (losses / self.nadir[step.present]).nan_to_num(nan=1.0)
        return len(losses) * (ratios.log() / self.mu).softmax(dim=0) / losses

    def end_epoch(self) -> None:
        """Take the epoch's means for the nadir in the warm-up, and later where none is known."""
        means = self.means.close()
        self.epochs += 1
        taken = means.isfinite() & (self.nadir.isnan() | (self.epochs <= self.warmup))
        self.nadir[taken] = means[taken]
