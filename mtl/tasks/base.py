"""What a task is: a head's width, a loss, metrics, and a picture of the result."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric

from mtl.data.sample import ALL_TARGETS, Batch, DepthConvention
from mtl.errors import UserError

Likelihood = Literal["gaussian", "laplace", "categorical"]
"""The distribution of which a task's loss L is the negative logarithm, but for its scale and for constants.

It decides what uncertainty weighting (Kendall et al. 2018) minimises over a task's log-scale s:

============= ==================== ======================= ======================================================
`gaussian`    0.5 e^{-s} L + 0.5 s s = ln(variance)        L is a mean of squared errors (equation 5)
`laplace`     e^{-s} L + s         s = ln(scale)           L is a mean of absolute errors, or grows as one does:
                                                           in proportion to the errors
`categorical` e^{-s} L + 0.5 s     s = ln(temperature)     L is the cross-entropy of softmax(logits), which becomes
                                                           softmax(logits / temperature) (equation 10)
============= ==================== ======================= ======================================================

At the best s the loss has the weight 1 / L for `laplace`, and half of that for the other two.
"""


class Scale(NamedTuple):
    """What the colours of a picture mean, where they stand for numbers.

    Attributes:
        low: The number at the colormap's lower end.
        high: The number at its upper end.
        unit: The numbers' unit, or an empty string.
        colormap: matplotlib's name of the colormap.
    """

    low: float
    high: float
    unit: str
    colormap: str


class Panel(NamedTuple):
    """Pictures of one kind, one for each sample.

    Attributes:
        images: (B, H, W, 3) uint8.
        scale: What their colours mean, or None where they are no numbers.
    """

    images: np.ndarray
    scale: Scale | None = None


class Task(nn.Module, ABC):
    """One thing to predict for every pixel.

    A task never sees the backbone, another task or the training loop. It is a module only so that what it
    has learned from the training labels (class weights, a constant prediction) travels in the checkpoint as
    buffers; the head's parameters live in the model.

    Shapes below: B images of H x W pixels; ``outputs`` is what the head returns, (B, ``channels``, H, W)
    floats at the input's resolution.

    Attributes:
        name: The task's name on the command line, and the prefix of its metrics.
        target: The batch key of its labels.
        main_metric: Name (without prefix) of the one metric that stands for the task.
        higher_is_better: Direction of every metric that `metrics` computes, by its name without prefix;
            a name ending in ``/*`` speaks for all that start so.
        class_names: Names of the classes where the prediction is a map of classes, else empty.
        likelihood: What the loss is the negative logarithm of. The default is a guess for a loss of which nothing is
            known: it is right for squares, weighs a cross-entropy as it should be once s has settled, and is wrong by
            a factor of two at most.
        metrics_from: What the metrics are updated with: results of `predict`, or of `soft`, which say more.
    """

    name: ClassVar[str]
    target: ClassVar[str]
    main_metric: ClassVar[str]
    higher_is_better: ClassVar[dict[str, bool]]
    class_names: tuple[str, ...] = ()
    likelihood: Likelihood = "gaussian"
    metrics_from: ClassVar[Literal["predict", "soft"]] = "predict"

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of output channels of the head."""

    @abstractmethod
    def observe(self, targets: Iterable[Tensor]) -> None:
        """Learn from the training labels what no gradient needs to: the prior, and the constant prediction.

        Args:
            targets: Chunks of labels as a batch holds them (leading axis: samples), in any storage type.
        """

    @abstractmethod
    def initial_bias(self) -> Tensor:
        """Return the head's initial output bias (``channels``,), so that training starts at the prior."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the scalar loss, averaged over valid pixels.

        A batch without a valid pixel (or without the target's key) gives exactly zero, attached to the
        graph, with zero gradients.

        Where several processes train together, all ranks ask for the same losses in the same order, of batches with
        the same keys. DDP takes the mean over ranks of the gradients, which is that of all ranks' batches together
        where the loss is a `masked_mean`; a mean over the rank's own pixels gives a pixel more weight the fewer the
        rank has.
        """

    def labelled(self, batch: Batch) -> Tensor:
        """Return whether a batch has any valid pixel of this task: a boolean scalar on the batch's device.

        Without, training leaves the task out of the step. A task that cannot learn from every valid pixel of its
        target may answer for those from which it can.

        Args:
            batch: As the loss is given it; a target whose key is absent has no valid pixel.
        """
        if self.target in batch:
            return (batch[self.target] != ALL_TARGETS[self.target].invalid).any()
        device = next((tensor.device for tensor in batch.values()), None)
        return torch.zeros((), dtype=torch.bool, device=device)

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """Turn the head's outputs into the prediction in the target's own form and unit, each pixel by itself."""

    def soft(self, outputs: Tensor) -> Tensor:
        """Return what predictions of several views or models are averaged in: floats, (B, H, W) or (B, C, H, W).

        Each pixel by itself; ``harden(soft(outputs))`` is ``predict(outputs)``. The default is `predict`, which is
        right where that gives floats whose mean makes sense, such as a depth or a probability.

        Raises:
            UserError: The default, where `predict` gives no floats.
        """
        prediction = self.predict(outputs)
        if not prediction.is_floating_point():
            raise UserError(
                f"predictions of the task {self.name!r} are of the type {prediction.dtype} and have no mean:"
                " its class must say what to average, and what follows from the mean, in the methods soft and harden"
            )
        return prediction

    def harden(self, soft: Tensor) -> Tensor:
        """Return the prediction, as `predict` does, that a result of `soft` or a mean of several stands for."""
        return soft

    def mirrored(self, soft: Tensor) -> Tensor:
        """Return what a result of `soft` for the mirror image (left to right) says of the image itself."""
        return soft.flip(-1)

    def rescaled(self, soft: Tensor, factor: float, convention: DepthConvention = "metric") -> Tensor:
        """Return what a result of `soft` for an enlarged image says of the image itself, still at the enlarged size.

        The default is that it says the same.

        Args:
            soft: Of the enlarged image.
            factor: By which height and width were enlarged; less than 1 where the image was shrunk.
            convention: What that meant in training, see `mtl.augmentation.camera`.
        """
        return soft

    @abstractmethod
    def constant(self, target: Tensor) -> Tensor:
        """Return the best guess that ignores the image, in the form of `predict`, shaped for ``target``."""

    def beside(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the constant prediction to measure beside a prediction; the default is `constant`.

        Args:
            prediction: What `predict` returned.
            target: The batch's target.
        """
        return self.constant(target)

    @abstractmethod
    def metrics(self) -> Metric:
        """Return a fresh metric.

        ``update(prediction, target)`` takes a result of what `metrics_from` names and the batch's target; ``compute()``
        returns a dictionary from name (without the task's prefix) to scalar tensor.
        """

    @abstractmethod
    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return the main metric as an error: zero when perfect, lower is better.

        The ratio of this error to a constant prediction's compares tasks with one another.

        Args:
            metrics: What `metrics` computed, without the task's prefix.
        """

    @abstractmethod
    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw a batch for a person.

        Args:
            prediction: A result of `predict`.
            target: The labels, or None if there are none.

        Returns:
            Pictures by title, in the order to show them: the target, the prediction and its error (the first and
            last only where there is a target). Titles begin with the task's name. Invalid pixels are black.
        """

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Return one image's prediction as files: their content by what follows the image's name.

        The default is ``.npy``; tasks whose predictions have a usual image format override it.

        Args:
            prediction: A result of `predict` for one image, without the batch axis.
        """
        content = io.BytesIO()
        np.save(content, prediction.cpu().numpy())
        return {".npy": content.getvalue()}


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Average `values` where `valid`; exactly zero, still attached to the graph, where nothing is valid.

    Where several processes train together, this is the share of the rank in the average over all ranks' values: the
    mean over ranks of the results, and of their gradients, is what one process would get from all of the values.

    Args:
        values: Any shape, finite everywhere (use a safe target where the label is invalid).
        valid: Boolean, same shape.
    """
    weights = valid.to(values.dtype)
    return pooled_mean((values * weights).sum(), weights.sum())


def local_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Average as `masked_mean` does, but over the values of this rank alone."""
    weights = valid.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def pooled_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return sums over this rank's values per value of a rank, on average; zero where no rank has one.

    Args:
        total: Sums, zero where the count is.
        count: The numbers (or the sums of weights) of the values in them, same shape, not negative.
    """
    count = over_ranks(count)
    return total / torch.where(count > 0, count, 1)


def over_labelled_ranks(loss: Tensor, valid: Tensor) -> Tensor:
    """Return the share of this rank in the average of a loss over those ranks that have labels.

    For a loss that is no mean over pixels: no rank's share of it can be computed from a mere count.

    Args:
        loss: A scalar, of this rank's pixels alone; zero where it has no labels.
        valid: Which pixels have labels, any shape, boolean.
    """
    return loss if ranks() == 1 else masked_mean(loss, valid.any())


def over_ranks(count: Tensor) -> Tensor:
    """Return the mean over ranks of a tensor of floats, without a gradient; itself where there is but one process."""
    if ranks() == 1:
        return count
    total = count.detach().clone()
    distributed.all_reduce(total)
    return total / ranks()


def largest_over_ranks(value: Tensor) -> Tensor:
    """Return the largest over ranks of a tensor, without a gradient; itself where there is but one process."""
    if ranks() == 1:
        return value
    largest = value.detach().clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def ranks() -> int:
    """Return how many processes train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def no_labels(outputs: Tensor) -> Tensor:
    """Return a zero loss whose gradient on `outputs` is zero."""
    # In float32, where the sum of large half-precision outputs is no infinity.
    return outputs.float().sum() * 0.0


def most_precise(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class SumsMetric(Metric):
    """A metric whose states are sums of numbers, float64 (float32 on MPS, which has no float64).

    The sums stay on the device, so that an update does not wait for it, and a module's `.to` moves them but does not
    round them, where training in half precision would.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.zeros(1, device=tensor.device)).device
            return tensor.to(device, most_precise(device))

        return super()._apply(move, exclude_state)
