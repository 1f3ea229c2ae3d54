"""Whether classes that a model is sure of by so much are right as often, and the baseline that mends it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from mtl.data.sample import IGNORE_INDEX
from mtl.errors import UserError
from mtl.tasks.base import most_precise


class Reliability(NamedTuple):
    """How often predictions of about one confidence are right, by bins of the confidence.

    Attributes:
        confidence: Mean confidence (bins,) in each bin; NaN where it is empty.
        accuracy: Share of right predictions (bins,); NaN where it is empty.
        share: Of all pixels (bins,).
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray


class CalibrationError(Metric):
    """How far the confidence of a prediction, its class's probability, is from the share of right predictions.

    ===== ==========================================================================================================
    `ece` expected calibration error: mean over pixels of the distance between accuracy and mean confidence of the
          pixel's bin (Naeini et al. 2015; Guo et al. 2017, equation 3)
    `mce` the largest such distance over bins that have pixels (Guo et al. 2017, equation 5)
    `nll` mean negative logarithm of the label's probability in nats, a proper score: unlike the others it cannot be
          made small by forgetting what one knows. Probabilities below 10^-38 count as that
    ===== ==========================================================================================================

    All are over the labelled pixels of the whole set; with none, every value is NaN. Bins have the same width, and the
    last includes 1; torchmetrics' MulticlassCalibrationError, which keeps every pixel where this keeps sums, has the
    same but for a bin of its own for a confidence of exactly 1.

    The sums are integers, so that the result is the same to the last bit however samples are split over batches and
    processes, and an update does not wait for the device.

    Args:
        bins: Number of bins.
    """

    full_state_update = False
    count: Tensor
    right: Tensor
    confidence: Tensor
    surprise: Tensor

    _UNIT = 2**24
    """Confidences and logarithms are summed in this many parts of one: room for 10^9 pixels."""

    def __init__(self, bins: int = 15) -> None:
        """Start at zero."""
        super().__init__()
        self.bins = bins
        for name in ("count", "right", "confidence"):
            self.add_state(name, torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("surprise", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, soft: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            soft: Probabilities (B, C, H, W), or (B, C).
            target: Labels (B, H, W), or (B,), integers; `IGNORE_INDEX` where unlabelled.
        """
        soft, target = soft.float(), target.long()
        valid = target != IGNORE_INDEX
        confidence, prediction = soft.max(dim=1)
        inner = torch.linspace(0, 1, self.bins + 1, device=soft.device)[1:-1]
        place = torch.bucketize(confidence, inner, right=True).flatten()
        sums = (
            (self.count, valid),
            (self.right, valid & (prediction == target)),
            (self.confidence, torch.where(valid, confidence * self._UNIT, 0).round()),
        )
        for total, values in sums:
            total.scatter_add_(0, place, values.flatten().long())
        likelihood = soft.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
        nats = -likelihood.clamp(min=torch.finfo(soft.dtype).tiny).log()
        self.surprise += torch.where(valid, nats * self._UNIT, 0).round().long().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        dtype = most_precise(self.count.device)
        total = self.count.sum()
        gap = (self.confidence.to(dtype) / self._UNIT - self.right).abs()
        largest = torch.where(self.count > 0, gap / self.count, 0).max()
        return {
            "ece": gap.sum() / total,
            "mce": torch.where(total > 0, largest, math.nan),
            "nll": self.surprise.to(dtype) / self._UNIT / total,
        }

    def reliability(self) -> Reliability:
        """Return what a reliability diagram shows."""
        count, right, confidence = (sums.cpu().double().numpy() for sums in (self.count, self.right, self.confidence))
        with np.errstate(invalid="ignore"):
            return Reliability(confidence / self._UNIT / count, right / count, count / count.sum())


class PixelSample:
    """Some of the labelled pixels of a set, whatever its size: what temperature scaling is fitted to.

    Which pixels is a function of their places among all labelled ones in the order in which they come: the place times
    the golden ratio, less its whole part, is spread evenly over 0 to 1 (Fibonacci hashing, Knuth, volume 3, section
    6.4), and is below a bound that is halved whenever more pixels are kept than there is room for. A plain stride would
    meet the same columns of each image.

    Args:
        capacity: The most pixels kept; at least half as many are, where there are more.
    """

    def __init__(self, capacity: int = 2**16) -> None:
        self.capacity = capacity
        self._halvings = 0
        self._seen = 0
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Take a batch.

        Args:
            logits: (B, C, H, W), or (B, C).
            target: Labels (B, H, W), or (B,), integers; `IGNORE_INDEX` where unlabelled.
        """
        labels = target.flatten().long()
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        number = self._seen + torch.arange(len(places), device=places.device)
        self._seen += len(places)
        keys = ((number & 0x7FFFFFFF) * _GOLDEN) & 0xFFFFFFFF
        kept = keys >> (32 - self._halvings) == 0
        places = places[kept]
        self._logits.append(logits.detach().movedim(1, -1).flatten(0, -2)[places].float().cpu())
        self._labels.append(labels[places].cpu())
        self._keys.append(keys[kept].cpu())
        while sum(map(len, self._labels)) > self.capacity:
            self._halvings += 1
            keys = torch.cat(self._keys)
            kept = keys >> (32 - self._halvings) == 0
            self._logits = [torch.cat(self._logits)[kept]]
            self._labels = [torch.cat(self._labels)[kept]]
            self._keys = [keys[kept]]

    @property
    def logits(self) -> Tensor:
        """Those of the kept pixels, (n, C)."""
        return torch.cat(self._logits)

    @property
    def labels(self) -> Tensor:
        """Those of the kept pixels, (n,) int64."""
        return torch.cat(self._labels)


_GOLDEN = 2654435769
"""2^32 over the golden ratio, an odd number."""

COLDEST, HOTTEST = 1e-2, 1e2
"""The bounds of a temperature: labels that are all right, or at random, have none that is best."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T for which softmax(logits / T) gives held-out labels the most likelihood.

    Guo et al. 2017, section 4.2. No prediction changes, only how sure it is. The logarithms of averaged probabilities
    do as logits. The negative log-likelihood is convex in 1 / T; L-BFGS finds its minimum over ln T, in double
    precision.

    Args:
        logits: (n, C), of samples held out from training.
        labels: (n,), classes from 0 to C - 1.

    Returns:
        The temperature, from `COLDEST` to `HOTTEST`: above 1 where the model is too sure.

    Raises:
        UserError: There are no labels, or a logit is not finite.
    """
    if len(labels) == 0:
        raise UserError("a temperature cannot be fitted to no labels: give held-out samples that have some")
    logits = logits.detach().cpu().double()
    labels = labels.cpu().long()
    if not logits.isfinite().all():
        raise UserError(
            "a temperature cannot be fitted to outputs that are not finite: the model's weights have diverged, or a "
            "probability of exactly 0 has become a logarithm"
        )
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logarithm], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        bounded = logarithm.clamp(math.log(COLDEST), math.log(HOTTEST))
        loss = F.cross_entropy(logits / bounded.exp(), labels)
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return min(max(math.exp(min(logarithm.item(), 100.0)), COLDEST), HOTTEST)


def at_temperature(soft: Tensor, temperature: float) -> Tensor:
    """Return probabilities (B, C, ...) at a temperature: softmax(ln p / T) along the second axis.

    For p = softmax(z) that is softmax(z / T). A probability of 0 counts as the least positive number.
    """
    return (soft.clamp(min=torch.finfo(soft.dtype).tiny).log() / temperature).softmax(dim=1)
