"""Classification: which class a whole sample is."""

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl.data.sample import IGNORE_INDEX, Batch, DataInfo
from mtl.errors import UserError
from mtl.tasks.base import Panel, SumsMetric, most_precise, no_labels
from mtl.tasks.classes import OfClasses, cross_entropy
from mtl.tasks.colours import RIGHT, WRONG, class_colours

_CELL = 8
"""Side in pixels of a class's cell in a picture."""


class Classification(OfClasses):
    """One of C classes per sample; the outputs are logits (B, C), a prediction is (B,) int64.

    Where other tasks have height and width, this one has nothing: a batch's `label` is (B,), `IGNORE_INDEX` where a
    sample has none, and what `mtl.tasks.base.Task` says of pixels holds for samples.

    Args:
        info: The data set, which names the classes.
        label_smoothing: Share of each label's probability spread over all classes (Szegedy et al. 2016, section 7),
            in [0, 1).

    Raises:
        UserError: The data set does not name 2 to 255 different classes, or the smoothing is out of range.
    """

    name = "classification"
    target = "label"
    metrics_from = "soft"
    main_metric = "accuracy"
    higher_is_better: ClassVar[dict[str, bool]] = {"accuracy": True, "error": False, "cross_entropy": False}

    def __init__(self, info: DataInfo, label_smoothing: float = 0.0) -> None:
        super().__init__(info)
        if not 0 <= label_smoothing < 1:
            raise UserError(
                f"the task {self.name!r} has a label_smoothing of {label_smoothing:g}: it is the share of a label's"
                " probability that all classes get, at least 0 and less than 1"
            )
        self.label_smoothing = label_smoothing

    def observe(self, targets: Iterable[Tensor]) -> None:
        """Count the classes of the training labels.

        Args:
            targets: Chunks of labels (n,), integers.

        Raises:
            UserError: If no sample is labelled, or a label is not one of the classes.
        """
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(chunk.cpu().long() for chunk in targets)])
        labels = labels[labels != IGNORE_INDEX]
        indices, counts = torch.unique(labels, return_counts=True)
        self.learn_frequency(indices, counts)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy, with label smoothing, over the labelled samples of all ranks' batches.

        Args:
            outputs: Logits (B, C).
            batch: Its `label` is (B,).
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.target not in batch:
            return no_labels(outputs)
        return cross_entropy(outputs, batch[self.target].long(), label_smoothing=self.label_smoothing)

    def mirrored(self, soft: Tensor) -> Tensor:
        """Return the probabilities as they are: a class has no left and no right."""
        return soft

    def metrics(self) -> "ClassificationMetric":
        """Return a fresh `ClassificationMetric`."""
        return ClassificationMetric()

    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return the error, 1 - accuracy."""
        return metrics["error"]

    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw a row of cells, one a class, of which that of the sample's class has its colour.

        In the error the cell of the prediction is grey where it is right, and white where it is wrong.
        """
        palette = class_colours(self.channels)
        predicted = prediction.cpu().numpy()
        if target is None:
            return {"classification prediction": self._draw(predicted, palette[predicted])}
        true = target.cpu().numpy()
        known = true != IGNORE_INDEX
        shown = np.where(known, true, 0)
        verdict = np.where((predicted == true)[:, None], RIGHT, WRONG)
        return {
            "classification target": self._draw(shown, palette[shown] * known[:, None]),
            "classification prediction": self._draw(predicted, palette[predicted]),
            "classification error": self._draw(predicted, verdict * known[:, None]),
        }

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Return the class's name as a line of text.

        Args:
            prediction: A class index, int64 scalar.
        """
        return {".txt": f"{self.class_names[int(prediction)]}\n".encode()}

    def _draw(self, classes: np.ndarray, colours: np.ndarray) -> Panel:
        """Draw the cells of classes (B,) in colours (B, 3)."""
        cells = np.zeros((len(classes), 1, self.channels, 3), np.uint8)
        cells[np.arange(len(classes)), 0, classes] = colours
        return Panel(cells.repeat(_CELL, axis=1).repeat(_CELL, axis=2))


class ClassificationMetric(SumsMetric):
    """How often, and with what confidence, labelled samples get their class.

    =============== ==================================================================================
    `accuracy`      share of samples that are right
    `error`         share that are wrong
    `cross_entropy` mean of -ln p, with p the probability of the sample's class, in nats
    =============== ==================================================================================

    Cross-entropy needs probabilities: it is over the samples that came with them, and NaN where none did. A
    probability of 0 counts as the smallest positive number, 2^-126. Without a labelled sample everything is NaN.
    """

    right: Tensor
    count: Tensor
    surprise: Tensor
    rated: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("surprise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rated", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: Class indices (B,) int64, a result of `Classification.predict`; or probabilities (B, C), a
                result of `Classification.soft`, or a mean of several.
            target: Labels (B,), integers; `IGNORE_INDEX` where unlabelled.
        """
        known = target != IGNORE_INDEX
        target = torch.where(known, target.long(), 0)
        if prediction.dim() == 2:
            own = prediction.gather(1, target[:, None])[:, 0].clamp(min=math.ldexp(1, -126))
            self.surprise += torch.where(known, -own.log(), 0).sum(dtype=most_precise(target.device))
            self.rated += known.sum()
            prediction = prediction.argmax(dim=1)
        self.right += ((prediction == target) & known).sum()
        self.count += known.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        wrong = self.count - self.right
        return {
            "accuracy": self.right / self.count,
            "error": wrong / self.count,
            "cross_entropy": self.surprise / self.rated,
        }
