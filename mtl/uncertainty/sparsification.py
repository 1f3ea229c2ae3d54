"""Whether the pixels of which a model is least sure are those where it errs most."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl.config import DepthOptions
from mtl.tasks.base import SumsMetric, most_precise
from mtl.tasks.depth import scored

ERRORS = ("abs_error", "abs_rel", "rmse")
"""The errors of depth by which uncertainty is judged, as `mtl.tasks.depth.DepthMetric` defines them."""

_BINS = 2**15
"""Floats whose upper 16 bits are equal share a bin: 128 bins from one power of two to the next."""

_STEPS = 100
"""Points of a curve."""


class Sparsification(NamedTuple):
    """The error that remains without the most uncertain pixels, over the error of all.

    Attributes:
        removed: Shares of the pixels that are left out, (K,), ascending: the middles of K equal steps from 0 to 1.
        curve: What remains (K,) where the most uncertain go first.
        oracle: What remains (K,) where the largest errors go first, which nothing can beat.
    """

    removed: np.ndarray
    curve: np.ndarray
    oracle: np.ndarray


class SparsificationError(SumsMetric):
    """The area under the sparsification error, for depth (Ilg et al. 2018, section 5.1).

    Pixels are left out in the order of their uncertainty, the most uncertain first, and in that of their errors; the
    error of the rest, over that of all, falls from 1 in both cases, and at random would stay there.

    ============= ===================================================================================================
    `ause_ERROR`  area between the two curves: 0 where uncertainty ranks as the errors do, whatever its unit and scale
    `aurg_ERROR`  area between leaving out at random and by uncertainty (Poggi et al. 2020): positive where the
                  uncertainty is better than none
    ============= ===================================================================================================

    ERROR is `abs_error`, `abs_rel` or `rmse`. All pixels of the set that `DepthMetric` would count are ranked together;
    Poggi et al. rank each image by itself and do not divide by its error. With no labelled pixel, or no error at all,
    every value is NaN.

    Memory is bounded: what is kept are sums over bins of the uncertainty and of the errors, of 128 bins from one power
    of two to the next at whatever magnitude. Pixels of one bin count as equally uncertain and go in any order: numbers
    that are 0.8% apart need not be told from each other. An uncertainty that is no number is the largest.

    Args:
        options: Caps and crop.
    """

    by_uncertainty: Tensor
    by_error: Tensor
    by_relative: Tensor

    def __init__(self, options: DepthOptions) -> None:
        """Start at zero."""
        super().__init__()
        self.options = options
        # Number of pixels, and the sums of absolute errors, relative errors and squares, by bin.
        for name in ("by_uncertainty", "by_error", "by_relative"):
            self.add_state(name, torch.zeros(4, _BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, uncertainty: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Depth (B, 1, H, W) in metres, positive.
            uncertainty: (B, H, W), not negative, in any unit.
            target: Depth (B, 1, H, W) in metres; 0 where unlabelled.
        """
        valid = scored(target, self.options)
        dtype = most_precise(target.device)
        low, high = self.options.min_depth, self.options.max_depth
        t = torch.where(valid, target.to(dtype), 1)
        error = torch.where(valid, prediction.to(dtype).clamp(low, high) - t, 0).abs()
        terms = torch.stack([valid.to(dtype), error, error / t, error.square()]).flatten(1)
        for sums, ranked in (
            (self.by_uncertainty, uncertainty[:, None]),
            (self.by_error, error),
            (self.by_relative, error / t),
        ):
            sums.index_add_(1, _bin(ranked).flatten(), terms.to(sums.dtype))

    def curves(self) -> dict[str, Sparsification]:
        """Return the curves of each of `ERRORS`."""
        sums = [total.cpu().double().numpy() for total in (self.by_uncertainty, self.by_error, self.by_relative)]
        removed = (np.arange(_STEPS) + 0.5) / _STEPS
        curves = {}
        for name, row, oracle in (("abs_error", 1, sums[1]), ("abs_rel", 2, sums[2]), ("rmse", 3, sums[1])):
            curve, best = (_remaining(by[0], by[row], removed) for by in (sums[0], oracle))
            if name == "rmse":
                curve, best = np.sqrt(curve), np.sqrt(best)
            curves[name] = Sparsification(removed, curve, best)
        return curves

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        results = {}
        for name, (_, curve, oracle) in self.curves().items():
            results[f"ause_{name}"] = torch.tensor(float((curve - oracle).mean()))
            results[f"aurg_{name}"] = torch.tensor(float((1 - curve).mean()))
        return results


def _bin(numbers: Tensor) -> Tensor:
    """Return the bins of numbers that are not negative: larger ones are in higher bins."""
    # The bits of a positive float, read as an integer, rise with it; NaN comes after infinity.
    return (numbers.float().abs().view(torch.int32) >> 16).long()


def _remaining(counts: np.ndarray, sums: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Return the mean of what remains over the mean of all, where the highest bins go first."""
    used = counts > 0
    if not used.any():
        return np.full_like(removed, np.nan)
    count = np.concatenate([[0.0], counts[used].cumsum()])
    total = np.concatenate([[0.0], sums[used].cumsum()])
    with np.errstate(invalid="ignore"):
        left: np.ndarray = np.interp((1 - removed) * count[-1], count, total) / ((1 - removed) * total[-1])
    return left
