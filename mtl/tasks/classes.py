"""What tasks share that say which of C classes something is: each pixel, or a whole sample."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.data.sample import IGNORE_INDEX, DataInfo
from mtl.errors import UserError
from mtl.tasks.base import Likelihood, Task, pooled_mean

_PRIOR_SMOOTHING = 0.01
"""Share of the uniform distribution in the prior: a class that no label has keeps a finite bias."""


class OfClasses(Task):
    """One of C classes for each place; the outputs are logits (B, C, ...), a prediction is (B, ...) int64.

    Args:
        info: The data set, which names the classes.

    Attributes:
        frequency: Share of each class among the training labels, (C,); uniform until `learn_frequency`.

    Raises:
        UserError: The data set does not name 2 to 255 different classes.
    """

    likelihood: Likelihood = "categorical"
    higher_is_better: ClassVar[dict[str, bool]]
    frequency: Tensor

    def __init__(self, info: DataInfo) -> None:
        super().__init__()
        classes = len(info.classes)
        if not 2 <= classes <= IGNORE_INDEX:
            raise UserError(
                f"the data set {info.name!r} names {classes} classes, but the task {self.name!r} needs 2 to"
                f" {IGNORE_INDEX}: list the classes with the data, or leave the task out"
            )
        if twice := sorted({c for c in info.classes if info.classes.count(c) > 1}):
            raise UserError(
                f"the data set {info.name!r} has more than one class called {twice[0]!r}:"
                " give every class a name of its own"
            )
        self.data_name = info.name
        self.class_names = info.classes
        self.register_buffer("frequency", torch.full((classes,), 1 / classes))

    @property
    def channels(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def learn_frequency(self, indices: Tensor, counts: Tensor) -> None:
        """Take how often classes occur among the training labels.

        Args:
            indices: Different class indices (K,), int64.
            counts: How often each occurs, (K,).

        Raises:
            UserError: There is no label, or one is not one of the classes.
        """
        wrong = indices[(indices < 0) | (indices >= self.channels)]
        if len(wrong):
            raise UserError(
                f"the {self.name} labels of {self.data_name!r} hold the class index {int(wrong[0])}, but its"
                f" {self.channels} classes are 0 to {self.channels - 1} ({IGNORE_INDEX} means unlabelled):"
                " name the missing classes, or correct the labels"
            )
        if not len(indices):
            raise UserError(
                f"no sample has a label for the task {self.name!r} among the training samples of"
                f" {self.data_name!r}: add labels, or leave the task out"
            )
        frequency = torch.zeros(self.channels, dtype=torch.float64).index_put((indices,), counts.double())
        self.frequency.copy_(frequency / frequency.sum())

    def initial_bias(self) -> Tensor:
        """Return the logarithm of the (slightly smoothed) class frequencies, with mean zero, (C,)."""
        prior = (1 - _PRIOR_SMOOTHING) * self.frequency + _PRIOR_SMOOTHING / self.channels
        return prior.log() - prior.log().mean()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the likeliest class of each place, (B, ...) int64."""
        return outputs.argmax(dim=1)

    def soft(self, outputs: Tensor) -> Tensor:
        """Return the classes' probabilities, (B, C, ...), in single precision at least."""
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(dim=1)

    def harden(self, soft: Tensor) -> Tensor:
        """Return the likeliest class of each place, (B, ...) int64."""
        return soft.argmax(dim=1)

    def constant(self, target: Tensor) -> Tensor:
        """Return the most frequent class of the training labels everywhere, (B, ...) int64."""
        return self.frequency.argmax().to(target.device).expand(target.shape)


def cross_entropy(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return `torch.nn.functional.cross_entropy` over labelled places, but zero where there are none.

    As in torch, class weights make it a weighted mean: the sum over places is divided by the sum of their
    labels' weights. Where several processes train together, the mean is over all ranks' places, see `masked_mean`.

    Args:
        logits: (B, C, ...) floats.
        target: (B, ...) int64, `IGNORE_INDEX` where unlabelled.
        weights: Positive class weights (C,), or None for equal ones.
        label_smoothing: In [0, 1).
    """
    valid = target != IGNORE_INDEX
    weights = logits.new_ones(logits.shape[1]) if weights is None else weights.to(logits.dtype)
    places = F.cross_entropy(
        logits, target, weights, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=label_smoothing
    )
    return pooled_mean(places.sum(), (weights[torch.where(valid, target, 0)] * valid).sum())
