"""Depth: how far away each pixel is, in metres along the optical axis."""

import io
import json
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mtl.config import DepthOptions
from mtl.data.sample import Batch, DataInfo, DepthConvention
from mtl.errors import UserError
from mtl.tasks.base import (
    Panel,
    Scale,
    SumsMetric,
    Task,
    largest_over_ranks,
    local_mean,
    masked_mean,
    most_precise,
    no_labels,
    over_labelled_ranks,
    pooled_mean,
)
from mtl.tasks.colours import number_colours

NEAREST = 1e-3
"""The least depth that is ever predicted, in metres: logarithms and ratios stay finite."""

EIGEN_CROP = (45, 471, 41, 601)
"""First row, end row, first column, end column of the evaluation crop in a picture of 480 x 640."""

_MILLIMETRE = 1e-3
"""Metres in one unit of a stored depth map, unless it reaches too far."""

_FINEST_INVERSE = 2.0**-16
"""Inverse depth in one unit of a stored map, unless it reaches too far: all of 0 to 1 fits."""

_LARGEST_STORED = 2**16 - 1

POOLED = (
    "abs_error",
    "abs_rel",
    "sq_rel",
    "rmse",
    "rmse_log",
    "log10",
    "silog",
    "delta1",
    "delta2",
    "delta3",
)
"""The metrics of `DepthMetric`, each of which exists also as the mean over images, ``NAME_image``."""


class Depth(Task):
    """Metric depth; the output is one channel, a prediction is softplus(output) + 1 mm, (B, 1, H, W) metres.

    Where the data set holds inverse depth, so does everything here that is said to be in metres.

    Its likelihood is that of Laplace for each of the losses: the absolute error is the negative logarithm of that
    density, and reverse Huber, the scale-invariant error and `gradient_loss` grow like it, in proportion to the errors
    (of the depth or of its logarithm). So with e^{-s} L + s, least where e^{-s} = 1 / L, the errors' unit is of no
    consequence.

    Attributes:
        mean_depth: Mean of the labelled training pixels in metres, a scalar; 1 until `observe`.
    """

    name = "depth"
    target = "depth"
    main_metric = "abs_rel"
    higher_is_better: ClassVar[dict[str, bool]] = {
        name + suffix: name.startswith("delta") for name in POOLED for suffix in ("", "_image")
    }
    likelihood = "laplace"
    mean_depth: Tensor

    def __init__(self, options: DepthOptions, info: DataInfo) -> None:
        """Make the task for a data set."""
        super().__init__()
        self.options = options
        self.data_name = info.name
        self.inverse = info.inverse_depth
        self.register_buffer("mean_depth", torch.ones(()))

    @property
    def channels(self) -> int:
        """One: depth."""
        return 1

    def observe(self, targets: Iterable[Tensor]) -> None:
        """Take the mean depth of the training labels.

        Args:
            targets: Chunks of depth (n, 1, H, W) in metres; 0 where unlabelled.

        Raises:
            UserError: If no pixel is labelled.
        """
        total, count = 0.0, 0
        for chunk in targets:
            valid = chunk > 0
            total += torch.where(valid, chunk, 0).sum(dtype=torch.float64).item()
            count += int(valid.sum())
        if not count:
            raise UserError(
                f"no sample has a label for the task {self.name!r} among the training samples of"
                f" {self.data_name!r}: add labels, or leave the task out"
            )
        self.mean_depth.fill_(total / count)

    def initial_bias(self) -> Tensor:
        """Return the output (1,) that `predict` turns into the mean depth."""
        above = (self.mean_depth - NEAREST).clamp(min=NEAREST)
        # The inverse of softplus, log(exp(x) - 1), without overflow.
        return (above + (-(-above).expm1()).log()).reshape(1)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the chosen loss, and the weighted `gradient_loss`, over labelled pixels of the whole batch.

        Where several processes train together, they pool the pixels of all their batches, but for the loss "silog":
        a root of means is no mean, and is averaged over the ranks that have labels.

        Args:
            outputs: (B, 1, H, W).
            batch: Its `depth` is (B, 1, H, W) metres.
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.target not in batch:
            return no_labels(outputs)
        target = batch[self.target].to(outputs.dtype)
        valid = target > 0
        # Unlabelled pixels are replaced on both sides before anything is computed from them, so that whatever
        # is predicted there, infinity included, reaches neither the loss nor its gradient.
        prediction = self.predict(torch.where(valid, outputs, 0))
        target = torch.where(valid, target, 1)
        loss = LOSSES[self.options.loss](prediction, target, valid)
        if self.options.gradient_weight > 0:
            loss = loss + self.options.gradient_weight * gradient_loss(prediction, target, valid)
        return loss

    def predict(self, outputs: Tensor) -> Tensor:
        """Return depth in metres, (B, 1, H, W), at least `NEAREST`."""
        return F.softplus(outputs.to(torch.promote_types(outputs.dtype, torch.float32))) + NEAREST

    def rescaled(self, soft: Tensor, factor: float, convention: DepthConvention = "metric") -> Tensor:
        """Return the depth of the image itself: under the canonical convention, enlarging divided it by the factor."""
        if convention == "metric":
            return soft
        return soft / factor if self.inverse else soft * factor

    def constant(self, target: Tensor) -> Tensor:
        """Return the mean depth of the training labels everywhere, (B, 1, H, W)."""
        return self.mean_depth.to(target.device).expand(target.shape)

    def metrics(self) -> "DepthMetric":
        """Return a fresh `DepthMetric` with the caps and the crop of the options."""
        return DepthMetric(self.options)

    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return AbsRel."""
        return metrics["abs_rel"]

    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw numbers from small (dark) to large (bright), over the target's range where there is a target."""
        predicted = prediction[:, 0].float().cpu().numpy()
        true = np.zeros_like(predicted) if target is None else target[:, 0].float().cpu().numpy()
        valid = true > 0
        shown = true[valid] if valid.any() else predicted
        kind, unit = (" (inverse depth)", "") if self.inverse else ("", "m")
        scale = Scale(float(shown.min()), float(shown.max()), unit, "viridis")
        panels = {f"depth prediction{kind}": _draw(predicted, scale)}
        if target is None:
            return panels
        error = np.where(valid, np.abs(predicted - true), 0)
        return {
            f"depth target{kind}": _draw(true, scale, valid),
            **panels,
            f"depth error{kind}": _draw(error, Scale(0.0, float(error.max()), unit, "YlOrRd"), valid),
        }

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Return a 16-bit grey PNG of millimetres.

        Where these do not reach far enough, and for inverse depth, one unit is the smallest multiple by a power of
        two that does, stated in a JSON file beside it as ``metres_per_unit`` or ``inverse_depth_per_unit``. What is
        predicted to be no number is 0, no measurement.

        Args:
            prediction: Depth (1, H, W) in metres.
        """
        depth = prediction[0].double().cpu().numpy()
        known = np.isfinite(depth)
        finest = unit = _FINEST_INVERSE if self.inverse else _MILLIMETRE
        largest = depth.max(initial=0, where=known)
        while round(largest / unit) > _LARGEST_STORED:
            unit *= 2
        stored = np.where(known, (depth / unit).round().clip(1, _LARGEST_STORED), 0)
        content = io.BytesIO()
        Image.fromarray(stored.astype(np.uint16)).save(content, "png")
        files = {".png": content.getvalue()}
        if self.inverse or unit > finest:
            name = "inverse_depth_per_unit" if self.inverse else "metres_per_unit"
            files[".json"] = (json.dumps({name: unit}) + "\n").encode()
        return files


def _draw(values: np.ndarray, scale: Scale, valid: np.ndarray | None = None) -> Panel:
    """Draw numbers (B, H, W) on their scale; what is not `valid` is black."""
    colours = number_colours(values, scale.low, scale.high, scale.colormap)
    return Panel(colours if valid is None else colours * valid[..., None], scale)


def l1_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the mean absolute error in metres.

    Args:
        prediction: Depth (B, 1, H, W), positive.
        target: Depth, same shape, positive everywhere.
        valid: Which pixels count, same shape, boolean.
    """
    return masked_mean((prediction - target).abs(), valid)


def silog_loss(prediction: Tensor, target: Tensor, valid: Tensor, variance_focus: float = 0.85) -> Tensor:
    """Return the scale-invariant error 10 sqrt(mean(d²) - λ mean(d)²) of d = log prediction - log target.

    Eigen et al. 2014, equation 4, in the form of BTS (Lee et al. 2019) and AdaBins (Bhat et al. 2021): under
    a root, with factor 10, λ = 0.85, and pixels pooled over the batch. It is invariant to scale only for
    λ = 1; with less, the scale is learnt too, but weighs less than the shape.

    Where several processes train together, it is computed from each rank's pixels by themselves, and averaged over
    the ranks that have labels.

    Args:
        prediction: Depth (B, 1, H, W), positive.
        target: Depth, same shape, positive everywhere.
        valid: Which pixels count, same shape, boolean.
        variance_focus: λ, from 0 to 1.
    """
    difference = prediction.log() - target.log()
    mean = local_mean(difference, valid)
    # mean(d²) - λ mean(d)² as a sum of two squares, which cannot cancel to less than zero.
    square = local_mean((difference - mean).square(), valid) + (1 - variance_focus) * mean.square()
    # The root has no derivative at zero, which is where a perfect prediction and a batch without labels are.
    positive = square > 0
    return over_labelled_ranks(10 * torch.where(positive, torch.where(positive, square, 1).sqrt(), square), valid)


def berhu_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the mean reverse Huber loss in metres: |x| up to c, (x² + c²) / 2c beyond.

    Laina et al. 2016, section 3.2: c is a fifth of the largest error in the batch (in all batches, where several
    processes train together), here over its labelled pixels, and a constant to the gradient.

    Args:
        prediction: Depth (B, 1, H, W), positive.
        target: Depth, same shape, positive everywhere.
        valid: Which pixels count, same shape, boolean.
    """
    error = torch.where(valid, (prediction - target).abs(), 0)
    threshold = (largest_over_ranks(error.detach().max()) / 5).clamp(min=torch.finfo(error.dtype).tiny)
    beyond = (error.square() / threshold + threshold) / 2
    return masked_mean(torch.where(error <= threshold, error, beyond), valid)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l1": l1_loss,
    "silog": silog_loss,
    "berhu": berhu_loss,
}
"""The losses of `DepthOptions`, from (prediction, target, valid) to a scalar."""


def gradient_loss(prediction: Tensor, target: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Return the mean absolute difference between neighbours' errors, summed over directions and scales.

    It compares the edges of two depth maps and does not see a common factor. The error is that of the
    logarithm, as in Eigen & Fergus 2015 (equation 1; there squared, at one scale) and in MegaDepth (Li &
    Snavely 2018, L_grad), from which come the absolute value and the scales: at scale k every 2^k-th pixel
    remains. A pair counts where both of its pixels do.

    Args:
        prediction: Depth (B, 1, H, W), positive.
        target: Depth, same shape, positive everywhere.
        valid: Which pixels count, same shape, boolean.
        scales: Number of scales.
    """
    error = prediction.log() - target.log()
    totals, counts = [], []
    for step in (2**k for k in range(scales)):
        coarse, known = error[..., ::step, ::step], valid[..., ::step, ::step]
        for axis in (-1, -2):
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(axis, 0, known.shape[axis] - 1)
            pairs = both.to(error.dtype)
            totals.append((coarse.diff(dim=axis).abs() * pairs).sum())
            counts.append(pairs.sum())
    return pooled_mean(torch.stack(totals), torch.stack(counts)).sum()


class DepthMetric(SumsMetric):
    """The usual depth metrics over labelled pixels, for prediction p and label t in metres.

    ============================ ==========================================================================
    `abs_error`                  mean of |p - t|, metres
    `abs_rel`                    mean of |p - t| / t
    `sq_rel`                     mean of (p - t)² / t, metres
    `rmse`                       root of the mean of (p - t)², metres
    `rmse_log`                   root of the mean of d², with d = ln p - ln t
    `log10`                      mean of |log10 p - log10 t|
    `silog`                      100 sqrt(mean(d²) - mean(d)²), as the KITTI benchmark reports it
    `delta1`, `delta2`, `delta3` share of pixels with max(p/t, t/p) < 1.25, 1.25², 1.25³
    ============================ ==========================================================================

    Each is pooled over all labelled pixels of the set (Eigen et al. 2014), and also, as ``NAME_image``, the
    mean over images of the value for each image alone, which is what BTS and its successors report; images
    without a labelled pixel are left out. With no labelled pixel at all, every value is NaN.

    With caps, only pixels with min_depth < t < max_depth count, and p is first clamped to that range. The
    crop "eigen" is rows 45 to 470, columns 41 to 600 of 480 x 640 (`EIGEN_CROP`), scaled to the map's size,
    where a pixel belongs to it if its centre does; it makes sense for maps that show NYUv2's whole picture.

    Args:
        options: Caps and crop.
    """

    pixel_sums: Tensor
    image_sums: Tensor

    def __init__(self, options: DepthOptions) -> None:
        """Start at zero."""
        super().__init__()
        self.options = options
        # Both begin with a count: of pixels, then of images.
        self.add_state("pixel_sums", torch.zeros(11, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("image_sums", torch.zeros(1 + len(POOLED), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Depth (B, 1, H, W) in metres, positive.
            target: Depth (B, 1, H, W) in metres; 0 where unlabelled.
        """
        low, high = self.options.min_depth, self.options.max_depth
        valid = scored(target, self.options)
        dtype = most_precise(target.device)
        # Where nothing is known both are 1, and every error below is 0.
        p = torch.where(valid, prediction.to(dtype).clamp(low, high), 1)
        t = torch.where(valid, target.to(dtype), 1)
        error, log_error, ratio = (p - t).abs(), (p / t).log(), torch.maximum(p / t, t / p)
        terms = (
            valid,
            error,
            error / t,
            error.square() / t,
            error.square(),
            log_error.square(),
            log_error.abs(),
            log_error,
            *(valid & (ratio < 1.25**k) for k in (1, 2, 3)),
        )
        sums = torch.stack([term.sum(dim=(1, 2, 3), dtype=dtype) for term in terms], dim=1)
        values = torch.cat([torch.ones_like(sums[:, :1]), torch.stack(_scores(sums), dim=1)], dim=1)

        self.pixel_sums += sums.sum(dim=0)
        self.image_sums += torch.where(sums[:, :1] > 0, values, 0).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above and their means over images, as scalars."""
        pooled = zip(POOLED, _scores(self.pixel_sums), strict=True)
        means = zip(POOLED, self.image_sums[1:] / self.image_sums[0], strict=True)
        return {**dict(pooled), **{f"{name}_image": value for name, value in means}}


def _scores(sums: Tensor) -> tuple[Tensor, ...]:
    """Return the metrics named `POOLED`, each (...), from sums (..., 11) over the pixels they speak for."""
    means = sums[..., 1:] / sums[..., :1]
    abs_error, abs_rel, sq_rel, square, log_square, log_abs, log_mean, *deltas = means.unbind(dim=-1)
    silog = 100 * (log_square - log_mean.square()).clamp(min=0).sqrt()
    log10 = log_abs / math.log(10)
    return abs_error, abs_rel, sq_rel, square.sqrt(), log_square.sqrt(), log10, silog, *deltas


def scored(target: Tensor, options: DepthOptions) -> Tensor:
    """Return which pixels (B, 1, H, W) of depth labels count in a metric, boolean."""
    valid = target > options.min_depth
    if options.max_depth is not None:
        valid = valid & (target < options.max_depth)
    if options.crop == "eigen":
        valid = valid & eigen_crop(target.shape[-2], target.shape[-1], target.device)
    return valid


def eigen_crop(height: int, width: int, device: torch.device) -> Tensor:
    """Return which pixels lie in `EIGEN_CROP` of a picture resized to (height, width), boolean."""
    top, bottom, left, right = EIGEN_CROP
    rows = (torch.arange(height, device=device) + 0.5) * 480 / height
    columns = (torch.arange(width, device=device) + 0.5) * 640 / width
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
