"""What masked pretraining predicts: the pixels of the hidden patches.

A patch's values are ordered by row, column, colour, and patches by row, column, as in MAE (He et al. 2022,
https://arxiv.org/abs/2111.06377, whose reconstruction target this is).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from mtl.tasks.base import masked_mean

Target = Literal["normalized", "raw"]
Distance = Literal["l2", "l1"]

_EPSILON = 1e-6
"""Added to a patch's variance, as MAE does."""


def patchify(image: Tensor, patch: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, N, patch * patch * 3); H and W are multiples of ``patch``."""
    batch, colours, height, width = image.shape
    grid = image.reshape(batch, colours, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, h * w, patch * patch * 3) of a grid (h, w) together to images: the inverse of `patchify`."""
    (height, width), patch = grid, math.isqrt(patches.shape[-1] // 3)
    image = patches.reshape(-1, height, width, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(-1, 3, height * patch, width * patch)


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a mask (B, h, w) on a grid that is as fine or some whole number of times finer.

    Raises:
        ValueError: The grid is no such number of times finer.
    """
    height, width = mask.shape[1:]
    factor = max(1, grid[0] // height)
    if (height * factor, width * factor) != tuple(grid):
        raise ValueError(f"a mask of {height}x{width} patches does not fit a grid of {grid[0]}x{grid[1]}")
    return mask if factor == 1 else mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def patch_target(image: Tensor, patch: int, target: Target = "normalized") -> Tensor:
    """Return what is to be predicted of images (B, 3, H, W) in [0, 1], as patches (B, N, patch * patch * 3).

    Args:
        image: The images.
        patch: Side of a patch in pixels.
        target: 'normalized', each patch less its mean and divided by its standard deviation (unbiased, and 1e-6
            added to the variance), which MAE found better, or 'raw', pixels as they are.
    """
    patches = patchify(image.float(), patch)
    if target == "raw":
        return patches
    mean, scale = _statistics(patches)
    return (patches - mean) / scale


def hidden_loss(prediction: Tensor, target: Tensor, mask: Tensor, distance: Distance = "l2") -> Tensor:
    """Return the mean distance over the hidden patches, a scalar; exactly zero where none is hidden.

    Each hidden patch of the batch counts alike, and where several processes train together, each of all their
    batches: see `mtl.tasks.base.masked_mean`.

    Args:
        prediction: (B, N, patch * patch * 3).
        target: The same shape, from `patch_target`, in whose single precision all is computed.
        mask: (B, h, w) bool with h * w = N, True where hidden.
        distance: Squared ('l2', as MAE) or absolute ('l1', as SimMIM) difference.
    """
    hidden = mask.flatten(1)
    # What is predicted of visible patches, infinity included, reaches neither the loss nor its gradient.
    difference = torch.where(hidden.unsqueeze(-1), prediction - target, 0)
    each = (difference.abs() if distance == "l1" else difference.square()).mean(-1)
    return masked_mean(each, hidden)


def reconstruct(prediction: Tensor, image: Tensor, mask: Tensor, target: Target = "normalized") -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] whose hidden patches are as predicted.

    Predictions of normalised patches are given the mean and deviation that the patch really has, which nobody
    predicts.

    Args:
        prediction: (B, N, patch * patch * 3).
        image: (B, 3, H, W) in [0, 1].
        mask: (B, h, w) bool with h * w = N, True where hidden.
        target: What the prediction is of, see `patch_target`.
    """
    grid = (mask.shape[1], mask.shape[2])
    patches = patchify(image.float(), image.shape[-2] // grid[0])
    predicted = prediction.float()
    if target == "normalized":
        mean, scale = _statistics(patches)
        predicted = predicted * scale + mean
    return unpatchify(torch.where(mask.flatten(1).unsqueeze(-1), predicted, patches), grid).clamp(0.0, 1.0)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return each patch's mean and what its deviation counts as (B, N, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + _EPSILON).sqrt()
