"""Whether intervals around a predicted depth hold the truth as often as they say."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mtl.config import DepthOptions
from mtl.tasks.base import most_precise
from mtl.tasks.depth import scored

Distribution = Literal["gaussian", "laplace"]
"""What a prediction and a standard deviation are those of."""

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal coverages that are reported."""

_BINS = 1000


class Coverage(NamedTuple):
    """How often intervals hold the truth.

    Attributes:
        level: Nominal coverages (K,), ascending from 0 to 1.
        coverage: The shares of pixels (K,) whose label the interval holds.
    """

    level: np.ndarray
    coverage: np.ndarray


class IntervalCoverage(Metric):
    """The share of labels within central intervals, for a depth and its standard deviation s.

    The interval of level q is |p - t| <= k s, with k = sqrt(2) erfinv(q) for a normal distribution, and
    k = -ln(1 - q) / sqrt(2) for Laplace's.

    ================= ================================================================================================
    `coverage_50`     share of labels within the interval of level 0.5, and so of 0.8, 0.9 and 0.95; less than the
                      level where the model is too sure
    `miscalibration`  mean over levels from 0 to 1 of the distance between coverage and level (Kuleshov et al. 2018,
                      section 3.5, with absolute values for squares)
    ================= ================================================================================================

    They are over all pixels of the set that `DepthMetric` would count; with none, every value is NaN. An interval of no
    width holds what is exactly right. The spread of an ensemble says nothing of noise that all members expect, so that
    its intervals are too narrow by that.

    What is kept is how many labels lie at which level, in 1000 bins: the results are the same to the last bit however
    samples are split over batches and processes.

    Args:
        options: Caps and crop.
        distribution: Whose intervals.
    """

    full_state_update = False
    histogram: Tensor

    def __init__(self, options: DepthOptions, distribution: Distribution = "gaussian") -> None:
        """Start at zero."""
        super().__init__()
        self.options, self.distribution = options, distribution
        self.add_state("histogram", torch.zeros(_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, deviation: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Depth (B, 1, H, W) in metres, positive.
            deviation: Standard deviation (B, H, W) in metres, not negative.
            target: Depth (B, 1, H, W) in metres; 0 where unlabelled.
        """
        valid = scored(target, self.options)
        dtype = most_precise(target.device)
        low, high = self.options.min_depth, self.options.max_depth
        error = (prediction.to(dtype).clamp(low, high) - target.to(dtype)).abs()
        ratio = torch.where(error > 0, error / deviation[:, None].to(dtype), 0)
        gaussian = self.distribution == "gaussian"
        level = torch.erf(ratio / 2**0.5) if gaussian else -torch.expm1(-(2**0.5) * ratio)
        place = (level * _BINS).nan_to_num(nan=_BINS).long().clamp(max=_BINS - 1)
        self.histogram.scatter_add_(0, place.flatten(), valid.flatten().long())

    def curve(self) -> Coverage:
        """Return the coverage of every level."""
        counts = np.concatenate([[0], self.histogram.cumsum(0).cpu().numpy()])
        with np.errstate(invalid="ignore"):
            return Coverage(np.arange(_BINS + 1) / _BINS, counts / counts[-1])

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        level, coverage = self.curve()
        results = {f"coverage_{100 * q:g}": coverage[round(q * _BINS)] for q in LEVELS}
        # The ends hold no and all labels whatever the model says; a step reaches from one level to the next.
        results["miscalibration"] = np.abs(coverage - level).sum() / _BINS
        return {name: torch.tensor(float(value)) for name, value in results.items()}
