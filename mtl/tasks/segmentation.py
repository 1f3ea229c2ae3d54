"""Semantic segmentation: which class each pixel is."""

import io
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from mtl.config import SegmentationOptions
from mtl.data.sample import IGNORE_INDEX, Batch, DataInfo
from mtl.tasks.base import Panel, local_mean, no_labels, over_labelled_ranks
from mtl.tasks.classes import OfClasses, cross_entropy
from mtl.tasks.colours import RIGHT, WRONG, class_colours


class Segmentation(OfClasses):
    """One of C classes per pixel; the outputs are logits (B, C, H, W), a prediction is (B, H, W) int64.

    Its likelihood is categorical, with the Dice loss as well: that is no logarithm of a density, but compares the same
    probabilities with the same classes, and a sum of the two needs one form.

    Attributes:
        class_weights: Median-frequency weights, (C,); ones until `observe`.
    """

    name = "segmentation"
    target = "segmentation"
    main_metric = "miou"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "miou": True,
        "pixel_accuracy": True,
        "mean_accuracy": True,
        "miou_image": True,
        "iou/*": True,
    }
    class_weights: Tensor

    def __init__(self, options: SegmentationOptions, info: DataInfo) -> None:
        """Make the task for the classes of a data set.

        Raises:
            UserError: If the data set does not name 2 to 255 different classes.
        """
        super().__init__(info)
        self.options = options
        self.register_buffer("class_weights", torch.ones(self.channels))

    def observe(self, targets: Iterable[Tensor]) -> None:
        """Count the classes of the training labels.

        The weights are median-frequency balancing (Eigen & Fergus 2015): the frequency of a class is its
        share of the labelled pixels of the images in which it occurs, its weight the median of all
        frequencies over its own. A class that never occurs has the neutral weight 1.

        Args:
            targets: Chunks of labels (n, H, W), integers.

        Raises:
            UserError: If no pixel is labelled, or a label is not one of the classes.
        """
        pixels = torch.zeros(256, dtype=torch.int64)
        pixels_where_present = torch.zeros(256, dtype=torch.int64)
        for chunk in targets:
            for image in chunk:
                count = torch.bincount(image.flatten(), minlength=256).cpu()
                count[IGNORE_INDEX] = 0
                pixels += count
                pixels_where_present += torch.where(count > 0, count.sum(), 0)
        present = pixels.nonzero()[:, 0]
        self.learn_frequency(present, pixels[present])
        count = pixels[: self.channels].double()
        frequency = count / pixels_where_present[: self.channels]
        self.class_weights.copy_((frequency.nanquantile(0.5) / frequency).nan_to_num(nan=1.0))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy, soft Dice loss or their sum over the labelled pixels of the whole batch.

        Where several processes train together, cross-entropy pools the pixels of all their batches; Dice, no mean over
        pixels, is averaged over the ranks that have labels.

        Args:
            outputs: Logits (B, C, H, W).
            batch: Its `segmentation` is (B, H, W).
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.target not in batch:
            return no_labels(outputs)
        target = batch[self.target].long()
        loss = outputs.new_zeros(())
        if self.options.loss in ("cross_entropy", "both"):
            weights = self.class_weights if self.options.class_weights == "balanced" else None
            loss = loss + cross_entropy(outputs, target, weights, self.options.label_smoothing)
        if self.options.loss in ("dice", "both"):
            loss = loss + dice_loss(outputs, target)
        return loss

    def metrics(self) -> "SegmentationMetric":
        """Return a fresh `SegmentationMetric`."""
        return SegmentationMetric(self.class_names)

    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return 1 - mIoU."""
        return 1 - metrics["miou"]

    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw classes in the colours of `class_colours`; in the error, what is right is grey, what is wrong white."""
        palette = self._palette()
        predicted = prediction.cpu().numpy()
        if target is None:
            return {"segmentation prediction": Panel(palette[predicted])}
        true = target.cpu().numpy()
        error = np.where((predicted == true)[..., None], RIGHT, WRONG)
        error[true == IGNORE_INDEX] = 0
        return {
            "segmentation target": Panel(palette[true]),
            "segmentation prediction": Panel(palette[predicted]),
            "segmentation error": Panel(error),
        }

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Return an 8-bit PNG whose pixels are class indices, with a palette in the colours of `class_colours`.

        Args:
            prediction: Class indices (H, W), int64.
        """
        picture = Image.fromarray(prediction.cpu().numpy().astype(np.uint8))
        # A palette of fewer colours would be stored in fewer bits, which some readers stretch to 0 to 255.
        picture.putpalette(self._palette().tobytes())
        content = io.BytesIO()
        picture.save(content, "png")
        return {".png": content.getvalue()}

    def _palette(self) -> np.ndarray:
        """Return the colours of all 8-bit indices, (256, 3) uint8; black where there is no class."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[: self.channels] = class_colours(self.channels)
        return palette


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the soft Dice loss: 1 - 2 |P ∩ T| / (|P| + |T|), averaged over the classes in the target.

    Sets are fuzzy (Milletari et al. 2016, with sums in place of squares), with the softmax as membership, and
    pooled over the labelled pixels of the batch. A class that is not in the target has no term. Where several processes
    train together, each rank's batch is taken by itself, and the mean is over the ranks that have labels.

    Args:
        logits: (B, C, H, W) floats.
        target: (B, H, W) int64, `IGNORE_INDEX` where unlabelled.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    member = target[:, None] == classes
    valid = target != IGNORE_INDEX
    probability = torch.where(valid[:, None], logits.softmax(dim=1), 0)
    pixels = (0, 2, 3)
    overlap = torch.where(member, probability, 0).sum(pixels)
    size = member.sum(pixels)
    # A class in the target has a size of at least one pixel: the clamp only guards the others' 0 / 0.
    dice = 2 * overlap / (probability.sum(pixels) + size).clamp(min=1)
    return over_labelled_ranks(local_mean(1 - dice, size > 0), valid)


class SegmentationMetric(Metric):
    """Intersection over union and accuracies over labelled pixels.

    ================== ===============================================================================
    `miou`             mean over classes of the IoU, from one confusion matrix over the whole set
    `iou/NAME`         IoU of one class over the whole set
    `pixel_accuracy`   share of labelled pixels that are right
    `mean_accuracy`    mean over classes of the share of their own pixels that are right
    `miou_image`       mean over images of the mIoU of each alone
    ================== ===============================================================================

    A class that is in neither the labels nor the predictions has no IoU (0 / 0): its `iou/NAME` is NaN, and
    the means leave it out. A class that is only predicted has IoU 0 and counts. `mean_accuracy` is over the
    classes in the labels. For `miou_image`, absent means absent from that image, and images without a label
    are left out. (MTAN and LibMTL take a plain mean of the classes' IoU, which agrees with `miou` wherever
    it is not NaN.) With no labelled pixel at all, every value is NaN.

    All sums are integers, so the result is the same to the last bit however samples are split over batches
    and processes; an update does not wait for the device.

    Args:
        class_names: Names of the C classes in the order of their indices.
    """

    full_state_update = False
    confusion: Tensor
    image_miou: Tensor
    images: Tensor

    _UNIT = 2**32
    """The sum over images is kept in fixed point, in this many parts of one."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        """Start at zero."""
        super().__init__()
        self.class_names = class_names
        classes = len(class_names)
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("image_miou", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: Class indices (B, H, W), int64.
            target: Labels (B, H, W), integers; `IGNORE_INDEX` where unlabelled.
        """
        images, classes = len(target), len(self.class_names)
        target = target.long()
        # A row of bins per image: one for each (label, prediction), and a last one for unlabelled pixels.
        # Neither bincount nor a boolean index would do: only the device knows the size of their result.
        bins = classes**2 + 1
        index = torch.where(target != IGNORE_INDEX, target * classes + prediction, bins - 1)
        index = (index.flatten(1) + bins * torch.arange(images, device=target.device)[:, None]).flatten()
        counts = target.new_zeros(images * bins).scatter_add_(0, index, torch.ones_like(index))
        confusion = counts.view(images, bins)[:, :-1].view(images, classes, classes)
        miou = _iou(confusion).nanmean(dim=1)

        self.confusion += confusion.sum(dim=0)
        self.image_miou += (miou.nan_to_num(0.0) * self._UNIT).round().long().sum()
        self.images += miou.isfinite().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        iou = _iou(self.confusion)
        right = self.confusion.diagonal().float()
        labels = self.confusion.sum(dim=1).float()
        return {
            "miou": iou.nanmean(),
            "pixel_accuracy": right.sum() / labels.sum(),
            "mean_accuracy": (right / labels).nanmean(),
            "miou_image": self.image_miou.float() / self._UNIT / self.images,
            **{f"iou/{name}": value for name, value in zip(self.class_names, iou, strict=True)},
        }


def _iou(confusion: Tensor) -> Tensor:
    """Return the IoU (..., C) of confusion matrices (..., C, C), label first; NaN for absent classes."""
    both = confusion.diagonal(dim1=-2, dim2=-1)
    either = confusion.sum(dim=-1) + confusion.sum(dim=-2) - both
    return both.float() / either.float()
