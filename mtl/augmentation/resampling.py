"""One warp for all maps of a batch, each resampled once.

============== ============================================================= =====================
map            inside the frame                                              outside
============== ============================================================= =====================
`image`        linear or cubic, averaged first where it shrinks              `fill`
`segmentation` the nearest pixel's class                                     255
`depth`        valid where the nearest pixel is; 1 / depth, which is affine  0
               across the picture of a plane, is interpolated linearly where
               all neighbours are valid and the result is within `JUMP` of
               the nearest pixel's; elsewhere the nearest pixel's
`normals`      valid where the nearest pixel is; linear over valid pixels,   (0, 0, 0)
               turned with the camera and normalised
`intrinsics`   see `mtl.augmentation.camera`
============== ============================================================= =====================

A pixel is outside if its source lies outside the frame, [-0.5, W - 0.5] x [-0.5, H - 0.5]. So every depth is close
to one that was measured, validity has no bias, its edges, those of classes and jumps of depth stay on one another,
and sparse depth stays as dense as it was. Known limit: a normal at a crease lies between those of its sides.

Warps that map pixels onto pixels (the identity, flips, shifts by whole pixels) move values without changing a bit.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.augmentation.camera import View, view
from mtl.augmentation.geometry import Coordinates, Warp, shrinkage, source_coordinates
from mtl.data.sample import IGNORE_INDEX, Batch, DepthConvention

Fill = Literal["reflection", "zeros", "mean"]
Interpolation = Literal["bilinear", "bicubic"]

JUMP = 0.05
"""Inverse depth that differs by more than this share from the nearest pixel's belongs to another surface."""

_ROUNDING = 1e-6
"""Relative differences up to this one are those of rounding, and not worth a changed bit."""

_SHORTEST = 1e-3
"""Normals whose average is shorter than this cancel out and have no direction."""

_TIE = 2.0**-10
"""Pixels by which the two colours of a chessboard lean to either side where two pixels are equally near."""


class Grid(NamedTuple):
    """Where a batch is sampled.

    Attributes:
        inside: Which pixels (B, H, W) have a source within the frame.
        nearest: Index (B, H W) of the nearest source pixel in its flattened picture.
        points: Coordinates (B, H, W, 2) for `torch.nn.functional.grid_sample` on a canvas.
        canvas: Height and width of the canvas.
        w: Third homogeneous coordinates (B, 1, H, W), see `Coordinates`.
    """

    inside: Tensor
    nearest: Tensor
    points: Tensor
    canvas: tuple[int, int]
    w: Tensor


def warp(
    batch: Batch,
    warp: Warp,
    *,
    fill: Fill = "reflection",
    depth_convention: DepthConvention = "metric",
    inverse_depth: bool = False,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
) -> Batch:
    """Warp the image of a batch and all targets that it has.

    Args:
        batch: As `mtl.data.sample` defines it, on any device, with an image of floats in [0, 1]. Further keys pass
            through.
        warp: Of its B samples.
        fill: What surrounds the image: its reflection (as far again as the picture is wide or high; its edge
            beyond), black, or its mean colour.
        depth_convention: How zoom is told, see `mtl.augmentation.camera`.
        inverse_depth: Whether `depth` holds inverse depth.
        interpolation: Of the image.
        antialias: Whether to average the image before it shrinks; it costs half as much as sampling it, whether
            anything shrinks or not.

    Returns:
        A new batch with the same keys, shapes and types.
    """
    size = batch["image"].shape[-2], batch["image"].shape[-1]
    grid = _grid(source_coordinates(warp, size), size, fill)
    seen = view(warp, batch.get("intrinsics"), size, depth_convention)
    warped = dict(batch)
    image = batch["image"].float()
    softened = _soften(image, *shrinkage(warp.matrix, size)) if antialias else image
    warped["image"] = _warp_image(softened, grid, fill, interpolation)
    if "segmentation" in batch:
        warped["segmentation"] = _warp_segmentation(batch["segmentation"], grid)
    if "depth" in batch:
        warped["depth"] = _warp_depth(batch["depth"].float(), grid, seen, inverse_depth)
    if "normals" in batch:
        warped["normals"] = _warp_normals(batch["normals"].float(), grid, seen)
    if "intrinsics" in batch:
        warped["intrinsics"] = seen.intrinsics
    return {key: value.to(batch[key].dtype) for key, value in warped.items()}


def _grid(source: Coordinates, size: tuple[int, int], fill: Fill) -> Grid:
    """Prepare sampling: `nearest` with integers, the rest as `grid_sample` wants it.

    That function unnormalises coordinates in float32, which is exact only where sizes are powers of two. So it
    samples a larger canvas of such a size, on which the picture lies in the top left corner.
    """
    canvas = 1 << (size[0] - 1).bit_length(), 1 << (size[1] - 1).bit_length()
    lean = _chessboard(size, source.x.device)
    inside, row, y = _along(source.y, size[0], canvas[0], lean, fill)
    inside_x, column, x = _along(source.x, size[1], canvas[1], lean, fill)
    inside &= inside_x & source.ahead
    nearest = row.mul_(size[1]).add_(column).long().flatten(1)
    # Two planes seen as pairs: an interleaved copy would take a third as long as sampling an image.
    points = torch.stack([x, y]).permute(1, 2, 3, 0)
    return Grid(inside, nearest, points, canvas, source.w[:, None])


def _along(x: Tensor, count: int, canvas: int, lean: Tensor, fill: Fill) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for coordinates along one axis of `count` pixels, what is inside, the nearest pixel and the point."""
    # In place wherever possible: on a CPU, fresh memory costs more than arithmetic.
    inside = (x - (count - 1) / 2).abs_() <= count / 2
    nearest = (x + (0.5 + lean)).floor_().clamp_(0, count - 1).int()
    if fill != "reflection":
        return inside, nearest, (x * (2 / canvas)).add_(1 / canvas - 1)
    # From the frame's edge: folded there, and at the other edge, from where the point follows.
    beyond = (x + 0.5).abs_().sub_(count).abs_()
    return inside, nearest, beyond.mul_(-2 / canvas).add_(2 * count / canvas - 1)


def _chessboard(size: tuple[int, int], device: torch.device) -> Tensor:
    """Return +-`_TIE` (H, W). Shrinking by two is all ties: rounding up would shift classes by half a source pixel."""
    row, column = (torch.arange(count, device=device) for count in size)
    return ((row[:, None] + column) % 2 * 2 - 1) * _TIE


def _sample(source: Tensor, grid: Grid, interpolation: Interpolation = "bilinear") -> Tensor:
    """Interpolate (B, C, H, W) float32."""
    below, right = (to - count for to, count in zip(grid.canvas, source.shape[-2:], strict=True))
    if below or right:
        source = F.pad(source, (0, right, 0, below), mode="replicate")
    return F.grid_sample(source, grid.points, mode=interpolation, padding_mode="border", align_corners=False)


def _pick(source: Tensor, grid: Grid) -> Tensor:
    """Return the nearest pixels of (B, H, W) of any type."""
    return source.flatten(1).gather(1, grid.nearest).view_as(source)


def _soften(image: Tensor, shrunk_x: Tensor, shrunk_y: Tensor) -> Tensor:
    """Average an image (B, 3, H, W) before it is sampled `shrunk_x` and `shrunk_y` (B,) pixels apart.

    The kernel (a, 1 - 2a, a) has the variance by which a triangle of half-width f is wider than one of half-width 1,
    the kernel of linear interpolation: 2a = (f² - 1) / 6. At f = 2 it is the binomial one, which ends at a = 1/4; at
    f <= 1 it is none. Shrinking by more than two is not fully averaged.
    """
    image = image.clone()
    for axis, shrunk in ((-1, shrunk_x), (-2, shrunk_y)):
        share = ((shrunk.square() - 1 - _ROUNDING) / 12).clamp(0, 0.25).float().view(-1, 1, 1, 1)
        # Neighbours exchange a share of their difference, so that nothing is lost at the border.
        flow = image.diff(dim=axis).mul_(share)
        count = image.shape[axis]
        image.narrow(axis, 0, count - 1).add_(flow)
        image.narrow(axis, 1, count - 1).sub_(flow)
    return image


def _warp_image(image: Tensor, grid: Grid, fill: Fill, interpolation: Interpolation) -> Tensor:
    """Warp (B, 3, H, W) float32 in [0, 1]."""
    warped = _sample(image, grid, interpolation)
    if interpolation == "bicubic":
        warped = warped.clamp(0, 1)
    if fill == "reflection":
        return warped
    inside = grid.inside[:, None]
    return torch.where(inside, warped, image.mean((2, 3), keepdim=True) if fill == "mean" else 0)


def _warp_segmentation(classes: Tensor, grid: Grid) -> Tensor:
    """Warp (B, H, W) of any integer type."""
    return _pick(classes, grid).masked_fill(~grid.inside, IGNORE_INDEX)


def _warp_depth(depth: Tensor, grid: Grid, seen: View, is_inverse: bool) -> Tensor:
    """Warp (B, 1, H, W) float32."""
    nearest = _pick(depth[:, 0], grid).mul_(grid.inside)[:, None]
    # Infinite where invalid, and so is every mean in which that takes part, or no number.
    inverse = depth.masked_fill(depth == 0, torch.inf) if is_inverse else depth.reciprocal()
    mean = _sample(inverse, grid)
    # By which factor interpolation changes the inverse depth of the nearest pixel.
    change = mean.div_(nearest) if is_inverse else mean.mul_(nearest)
    difference = (change - 1).abs_()
    change = torch.where((difference > _ROUNDING) & (difference < JUMP), change, 1)
    nearer = change.mul_(grid.w).div_(seen.depth.float().view(-1, 1, 1, 1))
    return nearest.mul_(nearer) if is_inverse else nearest.div_(nearer)


def _warp_normals(normals: Tensor, grid: Grid, seen: View) -> Tensor:
    """Warp (B, 3, H, W) float32."""
    valid = (normals[:, 0] != 0) | (normals[:, 1] != 0) | (normals[:, 2] != 0)
    valid = _pick(valid, grid) & grid.inside
    x, y, z = _sample(normals, grid).chunk(3, 1)
    to_x, to_y, to_z = seen.normals.float()[..., None, None].unbind(2)
    turned = (to_x * x).addcmul_(to_y, y).addcmul_(to_z, z)
    square = torch.linalg.vecdot(turned, turned, dim=1)
    length = torch.where((square - 1).abs_() > _ROUNDING, square, 1).sqrt_()
    return turned.mul_(torch.where(valid & (length > _SHORTEST), length.reciprocal(), 0)[:, None])
