"""Surface normals: which way each pixel's surface faces, in the camera's frame."""

import io
import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from mtl.data.sample import Batch, DataInfo, DepthConvention
from mtl.errors import UserError
from mtl.tasks.base import Panel, Scale, Task, masked_mean, most_precise, no_labels
from mtl.tasks.colours import number_colours

SHORTEST = 0.1
"""The length of an output below which the loss is linear in it. A direction turns by 1 / length for each unit that
the output moves, so that this bounds the gradient; outputs begin at length 1, where the bias puts them."""

_AXES = np.array([1, -1, -1], dtype=np.float32)
"""From our frame to the one of the usual colours: x right, y up, z towards the camera."""


class Normals(Task):
    """Surface normals; the output is a vector of any length, a prediction is its direction, (B, 3, H, W).

    The camera's frame is x right, y down, z forward, so that a surface facing the camera has z < 0.

    The likelihood is von Mises and Fisher's: on the sphere in three dimensions, the negative logarithm of its density
    is k (1 - cos) - ln k + ln 2π + ln(1 - e^{-2k}), the last of which vanishes as the concentration k grows. With
    k = e^{-s} that is e^{-s} L + s, which has the form of Laplace's.

    Attributes:
        mean_direction: Direction (3,) of the sum of the labelled training pixels' normals, which of all constant
            predictions has the least loss; facing the camera until `observe`.
    """

    name = "normals"
    target = "normals"
    main_metric = "mean_angle"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "mean_angle": False,
        "median_angle": False,
        "rmse_angle": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
        "mean_angle_image": False,
    }
    likelihood = "laplace"
    mean_direction: Tensor

    def __init__(self, info: DataInfo) -> None:
        """Make the task for a data set."""
        super().__init__()
        self.data_name = info.name
        self.register_buffer("mean_direction", torch.tensor([0.0, 0.0, -1.0]))

    @property
    def channels(self) -> int:
        """Three: x, y and z."""
        return 3

    def observe(self, targets: Iterable[Tensor]) -> None:
        """Take the mean direction of the training labels.

        Args:
            targets: Chunks of unit normals (n, 3, H, W); (0, 0, 0) where unlabelled.

        Raises:
            UserError: If no pixel is labelled.
        """
        total, labelled = torch.zeros(3, dtype=torch.float64), False
        for chunk in targets:
            total += F.normalize(chunk.float(), dim=1).sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
            labelled = labelled or bool(chunk.any())
        if not labelled:
            raise UserError(
                f"no sample has a label for the task {self.name!r} among the training samples of"
                f" {self.data_name!r}: add labels, or leave the task out"
            )
        self.mean_direction.copy_(directions(total.reshape(1, 3, 1, 1)).flatten())

    def initial_bias(self) -> Tensor:
        """Return the mean direction (3,) itself: an output of length 1."""
        return self.mean_direction.clone()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return 1 - cos of the angle between prediction and label, averaged over labelled pixels (of all ranks).

        Which is half the squared distance of the two unit vectors; an output shorter than `SHORTEST` is divided
        by that in place of its length. MTAN (Liu et al. 2019) and LibMTL have the same loss, but take a label
        whose components sum to zero for none, do not normalise labels, and divide by zero where an output is
        zero or a batch has no label.

        Args:
            outputs: (B, 3, H, W).
            batch: Its `normals` are (B, 3, H, W), of length 1 up to the rounding of their storage.
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.target not in batch:
            return no_labels(outputs)
        target = batch[self.target].to(outputs.dtype)
        valid = labelled_pixels(target)
        # Unlabelled pixels are replaced before anything is computed from them, so that whatever is predicted
        # there, infinity included, reaches neither the loss nor its gradient.
        prediction = F.normalize(torch.where(valid, outputs, 1), dim=1, eps=SHORTEST)
        cosine = (prediction * F.normalize(target, dim=1)).sum(dim=1, keepdim=True)
        return masked_mean(1 - cosine, valid)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return unit vectors (B, 3, H, W); an output of zero faces the camera."""
        return directions(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))

    def harden(self, soft: Tensor) -> Tensor:
        """Return the directions (B, 3, H, W) of means of unit vectors; a mean of zero faces the camera."""
        return directions(soft)

    def mirrored(self, soft: Tensor) -> Tensor:
        """Return the normals of the image itself: at the mirrored pixel, with the opposite x."""
        x, y, z = soft.flip(-1).unbind(1)
        return torch.stack([-x, y, z], 1)

    def rescaled(self, soft: Tensor, factor: float, convention: DepthConvention = "metric") -> Tensor:
        """Return the normals of the image itself: under the canonical convention, enlarging multiplied z by the factor.

        Enlarging by s takes a point (X, Y, Z) to (X, Y, Z / s), and so a normal to (n_x, n_y, s n_z), normalised.
        """
        if convention == "metric":
            return soft
        x, y, z = soft.unbind(1)
        return directions(torch.stack([x, y, z / factor], 1))

    def constant(self, target: Tensor) -> Tensor:
        """Return the mean direction of the training labels everywhere, (B, 3, H, W)."""
        return self.mean_direction.to(target.device).reshape(1, 3, 1, 1).expand(target.shape)

    def metrics(self) -> "NormalsMetric":
        """Return a fresh `NormalsMetric`."""
        return NormalsMetric()

    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return the mean angle."""
        return metrics["mean_angle"]

    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw normals in the usual colours, and their error up to 90 degrees.

        Red, green and blue are (n + 1) / 2 with x to the right, y up and z towards the camera: a wall that
        faces the camera is light blue, a floor green.
        """
        predicted = _colours(prediction)
        if target is None:
            return {"normals prediction": Panel(predicted)}
        valid = labelled_pixels(target)[:, 0].cpu().numpy()[..., None]
        scale = Scale(0, 90, "degrees", "YlOrRd")
        error = angles(prediction.float(), target.float()).cpu().numpy()
        return {
            "normals target": Panel(_colours(target) * valid),
            "normals prediction": Panel(predicted),
            "normals error": Panel(number_colours(error, scale.low, scale.high, scale.colormap) * valid, scale),
        }

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Return a PNG of 8-bit RGB with n = 2 v / 255 - 1 in the camera's frame, as the `folder` data set reads it.

        The rounding turns a normal by 0.39 degrees at most, by 0.17 on average.

        Args:
            prediction: Unit vectors (3, H, W).
        """
        values = ((prediction.float() + 1) * 127.5).round().clamp(0, 255).byte()
        content = io.BytesIO()
        Image.fromarray(values.permute(1, 2, 0).cpu().numpy()).save(content, format="PNG")
        return {".png": content.getvalue()}


def labelled_pixels(target: Tensor) -> Tensor:
    """Return which pixels (B, 1, H, W) of normals (B, 3, H, W) have a label."""
    return (target != 0).any(dim=1, keepdim=True)


def directions(vectors: Tensor) -> Tensor:
    """Return vectors (B, 3, H, W) of any finite length scaled to length 1; (0, 0, 0) becomes (0, 0, -1)."""
    # Divided by the largest component first, the squares neither overflow nor vanish.
    largest = vectors.abs().amax(dim=1, keepdim=True)
    unit = F.normalize(vectors / largest.clamp(min=torch.finfo(vectors.dtype).tiny), dim=1)
    return torch.cat([unit[:, :2], torch.where(largest == 0, -1, unit[:, 2:])], dim=1)


def angles(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the angle in degrees between vectors (B, 3, H, W) of any length, as (B, H, W).

    atan2(|p x t|, p . t) is right to 1e-5 degrees at every angle; the arc cosine of p . t, which the literature
    takes, is off by 0.02 degrees near zero, as float32 has no cosine between that of 0.02 degrees and 1. What is
    no direction, zero or NaN, is 180 degrees off.
    """
    cross = torch.linalg.vector_norm(torch.linalg.cross(prediction, target, dim=1), dim=1)
    dot = (prediction * target).sum(dim=1)
    known = cross + dot.abs() > 0
    return torch.where(known, torch.atan2(cross, dot), math.pi) * (180 / math.pi)


def _colours(normals: Tensor) -> np.ndarray:
    """Return the usual colours (B, H, W, 3) uint8 of normals (B, 3, H, W)."""
    flipped = normals.permute(0, 2, 3, 1).float().cpu().numpy() * _AXES
    colours: np.ndarray = ((flipped + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return colours


class NormalsMetric(Metric):
    """The usual metrics of surface normals over labelled pixels, from the angle between prediction and label.

    =========================================== =======================================================
    `mean_angle`                                mean, degrees
    `median_angle`                              median, degrees, to within 0.005
    `rmse_angle`                                root of the mean square, degrees
    `within_11.25`, `within_22.5`, `within_30`  share of pixels with a smaller angle (Fouhey et al. 2013)
    `mean_angle_image`                          mean over images of the mean of each alone, degrees
    =========================================== =======================================================

    All but the last are pooled over all labelled pixels of the set, as Bae et al. 2021 and LibMTL report them
    (the former in per cent). MTAN computes them in each batch and averages over batches, so that its results,
    the median's most of all, depend on the batches. MTAN and LibMTL trust labels to have length 1 and leave out
    those whose components sum to zero; here lengths do not count, and only (0, 0, 0) is no label. For
    `mean_angle_image`, images without a labelled pixel are left out. With none at all, every value is NaN.

    Angles are computed in double precision and rounded once, to whole parts of a degree, of which all sums are made:
    so the result is the same to the last bit however samples are split over batches and processes, where single
    precision would round an angle by its place in a batch. No change of a module's type rounds the sums, and an update
    does not wait for the device.
    """

    full_state_update = False
    sums: Tensor
    histogram: Tensor
    image_sums: Tensor

    WITHIN = (11.25, 22.5, 30)
    """The angles, in degrees, whose shares are reported."""

    _UNIT = 2**14
    """Angles and their squares are summed in this many parts of a degree (squared): room for 10^10 pixels."""

    _BINS = 100
    """Bins of the histogram in a degree; an angle counts in the nearest."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        # Over pixels: their number, the sums of angles and of squares, how many are within each limit.
        self.add_state("sums", torch.zeros(3 + len(self.WITHIN), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(180 * self._BINS + 1, dtype=torch.int64), dist_reduce_fx="sum")
        # Over images: their number, the sum of their mean angles.
        self.add_state("image_sums", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Unit vectors (B, 3, H, W).
            target: Unit vectors (B, 3, H, W); (0, 0, 0) where unlabelled.
        """
        valid = labelled_pixels(target)[:, 0]
        dtype = most_precise(target.device)
        exact = torch.where(valid, angles(prediction.to(dtype), target.to(dtype)), 0)
        angle = (exact * self._UNIT).round().long()
        terms = (
            valid,
            angle,
            (angle.square() + self._UNIT // 2) // self._UNIT,
            *(valid & (angle < round(limit * self._UNIT)) for limit in self.WITHIN),
        )
        sums = torch.stack([term.sum(dim=(1, 2)) for term in terms], dim=1)
        labelled = sums[:, 0] > 0
        means = sums[:, 1] // sums[:, 0].clamp(min=1)
        bins = ((angle * self._BINS + self._UNIT // 2) // self._UNIT).flatten()

        self.sums += sums.sum(dim=0)
        self.histogram.scatter_add_(0, bins, valid.flatten().long())
        self.image_sums += torch.stack([labelled, means]).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        mean, square, *within = self.sums[1:].float() / self.sums[0]
        return {
            "mean_angle": mean / self._UNIT,
            "median_angle": self._median(),
            "rmse_angle": (square / self._UNIT).sqrt(),
            **{f"within_{limit:g}": share for limit, share in zip(self.WITHIN, within, strict=True)},
            "mean_angle_image": self.image_sums[1].float() / self.image_sums[0] / self._UNIT,
        }

    def _median(self) -> Tensor:
        """Return the middle angle, or the mean of the middle two, in degrees."""
        count = self.sums[0]
        ranks = torch.stack([(count + 1) // 2, count // 2 + 1])
        bins = torch.searchsorted(self.histogram.cumsum(dim=0), ranks)
        return torch.where(count > 0, bins.float().mean() / self._BINS, math.nan)
