"""Which patches of a picture are hidden.

A mask is (B, h, w) bool, True where hidden, one element for each patch of --mask.patch pixels. Equally many patches are
hidden in every picture of a batch, so that what is visible fits one tensor. A picture whose sides are no multiples of
the patch is extended to such (`extend`).
"""

import torch
from torch import Tensor
from torch.nn import functional

from mtl.augmentation.draws import Draws
from mtl.errors import UserError
from mtl.models.backbone import Backbone

_BLOCKS = 64
"""Blocks drawn for a picture; they are many more than it takes to reach the ratio."""

_SMALLEST = 0.08
"""Share of a picture that a block covers at least: BEiT's 16 of 196 patches."""

_ELONGATION = 10 / 3
"""How many times longer than wide a block may be, as in BEiT."""


def check_patch(backbone: Backbone, patch: int) -> None:
    """Raise a UserError unless a patch is made of whole positions of the backbone's coarsest map."""
    stride = max(backbone.strides)
    if patch < 1 or patch % stride:
        raise UserError(
            f"--mask.patch {patch}: what is hidden must be whole positions of {backbone.name!r}, whose stride is "
            f"{stride}; give {stride} or a multiple of it"
        )


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return how many patches cover a picture of (height, width) pixels; the last may reach beyond its edge."""
    return -(-size[0] // patch), -(-size[1] // patch)


def extend(image: Tensor, patch: int) -> Tensor:
    """Extend pictures (B, 3, H, W) to whole patches, repeating the last pixels at the right and lower edges."""
    padding = (0, -image.shape[-1] % patch, 0, -image.shape[-2] % patch)
    return functional.pad(image, padding, mode="replicate") if any(padding) else image


def hidden_count(grid: tuple[int, int], ratio: float) -> int:
    """Return how many patches of a grid (h, w) a ratio hides: ratio * h * w, rounded to the nearest.

    Raises:
        UserError: The ratio is not in [0, 1), or hides all of the patches, or none though it is not 0.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"--mask.ratio {ratio:g} is the share of patches to hide; give a number from 0 to less than 1")
    total = grid[0] * grid[1]
    if total == 1 and ratio:
        raise UserError(
            f"--mask.ratio {ratio:g}: a picture is a single patch, which cannot be hidden; give a smaller --mask.patch "
            "or a larger --data.size"
        )
    count = round(ratio * total)
    if count == total or (count == 0 and ratio > 0):
        raise UserError(
            f"--mask.ratio {ratio:g} hides {'all' if count else 'none'} of the {total} patches ({grid[0]}x{grid[1]}) "
            "of a picture; choose a less extreme ratio, a smaller --mask.patch or a larger --data.size"
        )
    return count


def draw_masks(draws: Draws, grid: tuple[int, int], ratio: float, *, blocks: bool = False) -> Tensor:
    """Return masks (B, h, w), a function of each sample's (seed, epoch, position) alone, the same on every device.

    Args:
        draws: The random numbers of B samples.
        grid: Height and width h, w in patches.
        ratio: Share of patches to hide; see `hidden_count`.
        blocks: Hide rectangles, in the manner of BEiT (Bao et al. 2022, https://arxiv.org/abs/2106.08254,
            algorithm 1), in place of patches independent of one another.

    Raises:
        UserError: The ratio makes no sense for the grid.
    """
    count = hidden_count(grid, ratio)
    noise = draws.words("mask", grid)
    return hide(noise if not blocks else _order_of_blocks(draws, grid, count, noise), count)


def hide(noise: Tensor, count: int) -> Tensor:
    """Return masks that hide the patches with the most noise, as MAE does.

    Args:
        noise: A number for each patch (B, h, w).
        count: How many patches to hide in each picture.
    """
    order = noise.flatten(1).argsort(dim=1, descending=True, stable=True)
    hidden = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)
    return hidden.view(noise.shape)


def _order_of_blocks(draws: Draws, grid: tuple[int, int], count: int, noise: Tensor) -> Tensor:
    """Return noise (B, h, w) whose largest values fill block after block.

    The block that would exceed the number is cut, row by row. Should the blocks not suffice, single patches follow.
    Everything is whole numbers, and therefore the same on every device.

    Args:
        draws: The random numbers of B samples.
        grid: Height and width.
        count: How many patches are to be hidden, of which a block takes at most half.
        noise: Numbers (B, h, w) from 0 to 2^32 - 1.
    """
    device, choices = noise.device, torch.tensor(_sides(grid, count), device=noise.device)
    sides = choices[draws.integers("mask block", len(choices), (_BLOCKS,))]
    extent = torch.tensor(grid, device=device)
    # Where a block of this size fits, (B, blocks, 2).
    first = (draws.words("mask place", (_BLOCKS, 2)) * (extent - sides + 1)) >> 32
    places = (torch.arange(side, device=device).view(1, 1, side) for side in grid)
    rows, columns = ((first[..., k, None] <= at) & (at < (first + sides)[..., k, None]) for k, at in enumerate(places))
    inside = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    # An earlier block counts more; argmax finds the first of those that hold a patch.
    rank = _BLOCKS - inside.to(torch.uint8).argmax(dim=1)
    row_by_row = torch.arange(grid[0] * grid[1], 0, -1, device=device).view(grid)
    return torch.where(inside.any(dim=1), (rank << 32) + row_by_row, noise)


def _sides(grid: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Return the heights and widths that blocks may have."""
    height, width = grid
    smallest = max(1, round(_SMALLEST * height * width))
    largest = max(smallest, count // 2)
    sides = [
        (h, w)
        for h in range(1, height + 1)
        for w in range(1, width + 1)
        if smallest <= h * w <= largest and max(h, w) <= _ELONGATION * min(h, w)
    ]
    return sides or [(1, 1)]
