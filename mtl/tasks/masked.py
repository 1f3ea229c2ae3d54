"""Masked: the hidden patches of a picture, from those that are left."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl.config import MaskOptions
from mtl.data.sample import Batch
from mtl.errors import UserError
from mtl.pretraining.masks import extend, grid_of
from mtl.pretraining.targets import hidden_loss, patch_target, patchify, reconstruct
from mtl.tasks.base import Panel, Scale, SumsMetric, Task, most_precise, no_labels
from mtl.tasks.colours import number_colours

_GREY = 128
"""What hidden patches are drawn as."""


class Masked(Task):
    """The hidden patches of a picture; its labels are the picture itself, (B, 3, H, W) in [0, 1].

    Outputs and predictions are (B, 4, H', W'), where H' and W' are H and W extended to whole patches: three channels
    of colours, of which the options say whether they are normalised in each patch, and one that is 1 where hidden and
    0 where visible. What the colours are where visible is of no consequence.

    The likelihood is Gauss's for squared and Laplace's for absolute differences.

    Attributes:
        options: What is predicted, and by which distance it is judged.
        patch: Side of a patch in pixels.
        mean_colour: Mean (3,) of what is predicted of the training pictures: of their colours, or, where each patch is
            normalised over all of its colours together, of what is then left of a tint. Without `observe`, mid-grey
            or zero.
    """

    name = "masked"
    target = "image"
    main_metric = "loss"
    higher_is_better: ClassVar[dict[str, bool]] = {"loss": False, "r2": True}
    mean_colour: Tensor

    def __init__(self, options: MaskOptions, patch: int) -> None:
        """Make the task for patches of a size in pixels."""
        super().__init__()
        self.options = options
        self.patch = patch
        self.likelihood = "laplace" if options.distance == "l1" else "gaussian"
        self.register_buffer("mean_colour", torch.full((3,), 0.5 if options.target == "raw" else 0.0))

    @property
    def channels(self) -> int:
        """Three colours; which patches are hidden is drawn and not predicted."""
        return 3

    def observe(self, targets: Iterable[Tensor]) -> None:
        """Take the mean colour of what is predicted of the training pictures.

        Args:
            targets: Chunks of pictures (n, 3, H, W), uint8, or floats in [0, 1].

        Raises:
            UserError: If there is no picture.
        """
        total, count = torch.zeros(3, dtype=torch.float64), 0
        for chunk in targets:
            largest = 1 if chunk.is_floating_point() else 255
            wanted = _wanted(chunk / largest, self.options, self.patch).reshape(-1, 3)
            total += wanted.sum(dim=0, dtype=most_precise(chunk.device)).cpu()
            count += len(wanted)
        if not count:
            raise UserError(
                f"there is no picture for the task {self.name!r} among the training samples: add pictures, or leave"
                " the task out"
            )
        self.mean_colour.copy_(total / count)

    def initial_bias(self) -> Tensor:
        """Return the mean colour (3,) of what is predicted."""
        return self.mean_colour.clone()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean distance over the hidden patches (of all ranks).

        Args:
            outputs: (B, 4, H', W').
            batch: Its `image` is (B, 3, H, W) in [0, 1].
        """
        if self.target not in batch:
            return no_labels(outputs)
        prediction, mask = _cut(outputs, self.patch)
        wanted = _wanted(batch[self.target], self.options, self.patch)
        return hidden_loss(prediction, wanted, mask, self.options.distance)

    def labelled(self, batch: Batch) -> Tensor:
        """Return whether a batch has pictures, of which some patches are always hidden."""
        device = next((tensor.device for tensor in batch.values()), None)
        return torch.full((), self.target in batch, dtype=torch.bool, device=device)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the outputs (B, 4, H', W') as they are."""
        return outputs

    def soft(self, outputs: Tensor) -> Tensor:
        """Refuse, as there is nothing to average: each view of a picture hides another part of it.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"the task {self.name!r} hides other parts in every view of a picture, so that its predictions have no"
            " mean: evaluate it without test-time augmentation (--tta)"
        )

    def constant(self, target: Tensor) -> Tensor:
        """Return the mean colour everywhere, in pictures that are hidden as a whole, (B, 4, H', W')."""
        bias = self.initial_bias()
        values = torch.cat([bias, bias.new_ones(1)]).to(target.device)
        rows, columns = grid_of((target.shape[-2], target.shape[-1]), self.patch)
        return values.reshape(1, 4, 1, 1).expand(len(target), 4, rows * self.patch, columns * self.patch)

    def beside(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean colour of the same hidden patches, (B, 4, H', W')."""
        return torch.cat([self.constant(target)[:, :3].to(prediction), prediction[:, 3:]], dim=1)

    def metrics(self) -> "MaskedMetric":
        """Return a fresh `MaskedMetric` of the same target and distance."""
        return MaskedMetric(self.options, self.patch)

    def remaining_error(self, metrics: dict[str, float]) -> float:
        """Return the mean distance."""
        return metrics["loss"]

    def pictures(self, prediction: Tensor, target: Tensor | None) -> dict[str, Panel]:
        """Draw the visible patches alone, then with the hidden ones as predicted, and how far these are off.

        Normalised patches are given the mean and deviation that they really have. The error is the mean over colours
        of the absolute difference, colours being in [0, 1]. Without a target there is at most what is predicted of
        colours as they are, at the size of whole patches.

        Args:
            prediction: (B, 4, H', W').
            target: The pictures, (B, 3, H, W) in [0, 1], or None.
        """
        colours, mask = _cut(prediction, self.patch)
        if target is None:
            if self.options.target == "normalized":
                return {}
            nothing = torch.zeros_like(prediction[:, :3])
            return {"masked: reconstruction": Panel(_picture(reconstruct(colours, nothing, mask, "raw")))}
        height, width = target.shape[-2:]
        image = target.float()
        whole = reconstruct(colours, extend(image, self.patch), mask, self.options.target)[..., :height, :width]
        hidden = (prediction[:, 3, :height, :width] > 0.5).cpu().numpy()
        error = (whole - image).abs().mean(dim=1).cpu().numpy() * hidden
        scale = Scale(0.0, float(error.max()), "", "YlOrRd")
        seen = _picture(image)
        seen[hidden] = _GREY
        drawn = number_colours(error, scale.low, scale.high, scale.colormap) * hidden[..., None]
        return {
            "masked: input": Panel(seen),
            "masked: reconstruction": Panel(_picture(whole)),
            "masked: error": Panel(drawn, scale),
        }

    def encode(self, prediction: Tensor) -> dict[str, bytes]:
        """Refuse: what was visible to begin with is no result.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"the task {self.name!r} fills in what was hidden from it, which is no file to store: train another task"
            " from this run (--init), and predict with that"
        )


def _cut(outputs: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return patches (B, h * w, patch * patch * 3) and mask (B, h, w), True where hidden, of (B, 4, H', W')."""
    return patchify(outputs[:, :3], patch), outputs[:, 3, ::patch, ::patch] > 0.5


def _wanted(image: Tensor, options: MaskOptions, patch: int) -> Tensor:
    """Return what is to be predicted of pictures (B, 3, H, W), (B, h * w, patch * patch * 3)."""
    return patch_target(extend(image.float(), patch), patch, options.target)


def _picture(image: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) of floats in [0, 1] as (B, H, W, 3) uint8."""
    pixels: np.ndarray = (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


class MaskedMetric(SumsMetric):
    """How well hidden patches are predicted, pooled over all of the set; NaN where none is hidden.

    ====== ============================================================================================
    `loss` mean of the loss's distance, squared or absolute, in the target's own space
    `r2`   share of the variance, around the mean colour, that is explained: 1 - mean square / variance
    ====== ============================================================================================

    `r2` has no unit, and compares trainings whatever their target and distance are.

    Args:
        options: What is predicted, and by which distance it is judged.
        patch: Side of a patch in pixels.
    """

    sums: Tensor
    colours: Tensor

    def __init__(self, options: MaskOptions, patch: int) -> None:
        """Start at zero."""
        super().__init__()
        self.options = options
        self.patch = patch
        # Over hidden pixels: their number, the sums of distances, of squared differences and of the target's squares.
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("colours", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: (B, 4, H', W').
            target: The pictures, (B, 3, H, W) in [0, 1].
        """
        dtype = most_precise(target.device)
        predicted, mask = _cut(prediction, self.patch)
        hidden = mask.flatten(1).unsqueeze(-1)
        # What is predicted of visible patches, infinity included, is left out before anything is computed from it.
        wanted = torch.where(hidden, _wanted(target, self.options, self.patch).to(dtype), 0)
        error = torch.where(hidden, predicted.to(dtype) - wanted, 0)
        square = error.square().sum()
        distance = error.abs().sum() if self.options.distance == "l1" else square
        self.sums += torch.stack([hidden.sum() * self.patch**2, distance, square, wanted.square().sum()])
        self.colours += wanted.reshape(-1, 3).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the table above, as scalars."""
        count, distance, square, target_square = self.sums.unbind()
        variance = target_square - self.colours.square().sum() / count
        return {"loss": distance / (3 * count), "r2": 1 - square / variance}
