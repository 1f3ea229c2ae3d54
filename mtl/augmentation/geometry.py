"""Where each pixel of a changed picture comes from: matrices, their composition, and lens distortion.

Image coordinates have pixel centres at integers: (0, 0) is the centre of the top-left pixel, x points right,
y down, and the frame reaches from -0.5 to W - 0.5 and to H - 0.5. Every builder takes parameters (B,), one a
sample, and returns a matrix (B, 3, 3) that leads *back*: from the homogeneous coordinates of a pixel of the
result to those of its source, scaled so that the third is positive for whatever lies before the camera.
Parameters, in contrast, say what happens to the *picture*: a positive translation in x moves it to the right.
Neutral parameters (no angle, factor 1) give the identity, so a transform is left out for one sample by its
parameters.

Matrices are float64 (float32 on devices without it). Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Warp(NamedTuple):
    """One geometric change of each picture of a batch.

    A pixel of the result at (u, v) from the picture's centre, with radius r in units of half the diagonal, is the
    pixel at (u, v) / (1 + k r²) of a picture without distortion (Fitzgibbon 2001, the division model), and the
    matrix leads from there to the source.

    Attributes:
        matrix: (B, 3, 3), from homogeneous pixels of the undistorted result to those of the source.
        distortion: k (B,), between -1 and 1: positive bends straight lines inwards (pincushion), negative outwards
            (barrel), 0 is no distortion. The centre's scale stays.
    """

    matrix: Tensor
    distortion: Tensor


class Coordinates(NamedTuple):
    """The source of each pixel of the result.

    Attributes:
        x: Source column (B, H, W).
        y: Source row (B, H, W).
        w: Third homogeneous coordinate (B, H, W) that the matrix gives an undistorted pixel (x, y, 1), at least
            `LEAST_W`.
        ahead: Which pixels (B, H, W) have a source before the camera.
    """

    x: Tensor
    y: Tensor
    w: Tensor
    ahead: Tensor


LEAST_W = 1e-6
"""The least third coordinate that is divided by; at or below it, a pixel looks at or behind the horizon."""


def precise(device: torch.device) -> torch.dtype:
    """Return the type in which small matrices are computed."""
    return torch.float32 if device.type == "mps" else torch.float64


def compose(*matrices: Tensor) -> Tensor:
    """Return the matrix of several transforms that happen to the picture in this order."""
    product, *others = matrices
    for matrix in others:
        product = product @ matrix
    return product


def invert(matrix: Tensor) -> Tensor:
    """Return the inverses of regular matrices (B, 3, 3), without waiting for the device to check them."""
    inverse: Tensor = torch.linalg.inv_ex(matrix).inverse
    return inverse


def hflip(mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Exchange left and right.

    Args:
        mirrored: Which samples (B,), boolean.
        size: Height and width in pixels.
    """
    chosen = mirrored.to(precise(mirrored.device))
    return _matrix(1 - 2 * chosen, 0, chosen * (size[1] - 1), 0, 1, 0, 0, 0, 1)


def vflip(mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Exchange top and bottom.

    Args:
        mirrored: Which samples (B,), boolean.
        size: Height and width in pixels.
    """
    chosen = mirrored.to(precise(mirrored.device))
    return _matrix(1, 0, 0, 0, 1 - 2 * chosen, chosen * (size[0] - 1), 0, 0, 1)


def rotation(angle: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn the picture about its centre.

    Args:
        angle: Radians (B,), positive clockwise as seen.
        size: Height and width in pixels.
    """
    angle = angle.to(precise(angle.device))
    cos, sin = angle.cos(), angle.sin()
    return _about_centre(_matrix(cos, sin, 0, -sin, cos, 0, 0, 0, 1), size)


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Move the picture.

    Args:
        x: Pixels to the right (B,).
        y: Pixels down (B,).
    """
    x, y = (offset.to(precise(offset.device)) for offset in (x, y))
    return _matrix(1, 0, -x, 0, 1, -y, 0, 0, 1)


def shear(x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """Slant the picture about its centre, first its columns, then its rows.

    Args:
        x: By how many pixels each row is shifted right against the one above it (B,).
        y: By how many pixels each column is then shifted down against the one on its left (B,).
        size: Height and width in pixels.
    """
    x, y = (slope.to(precise(slope.device)) for slope in (x, y))
    return _about_centre(_matrix(1 + x * y, -x, 0, -y, 1, 0, 0, 0, 1), size)


def stretch(x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge the picture about its centre by two factors.

    Args:
        x: Horizontal factor (B,), positive; less than 1 shrinks.
        y: Vertical factor (B,), positive.
        size: Height and width in pixels.
    """
    x, y = (factor.to(precise(factor.device)) for factor in (x, y))
    return _about_centre(_matrix(1 / x, 0, 0, 0, 1 / y, 0, 0, 0, 1), size)


def scale(factor: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge the picture about its centre.

    Args:
        factor: (B,), positive; less than 1 shrinks.
        size: Height and width in pixels.
    """
    return stretch(factor, factor, size)


def crop(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge a window to the whole picture.

    Args:
        top: The window's first row (B,); fractions and windows that leave the frame are fine.
        left: Its first column (B,).
        height: Its height in pixels (B,), positive.
        width: Its width in pixels (B,), positive.
        size: Height and width of the picture in pixels.
    """
    top, left, height, width = (edge.to(precise(edge.device)) for edge in (top, left, height, width))
    y, x = height / size[0], width / size[1]
    return _matrix(x, 0, left + (x - 1) / 2, 0, y, top + (y - 1) / 2, 0, 0, 1)


def perspective(displacement: Tensor, size: tuple[int, int]) -> Tensor:
    """Move the four corners of the frame (Heckbert 1989, section 2.2.3).

    Args:
        displacement: (B, 4, 2): pixels to the right and down by which the top-left, top-right, bottom-right and
            bottom-left corner move; what they span must remain convex.
        size: Height and width in pixels.
    """
    height, width = size
    corners = displacement.new_tensor(
        [[0, 0], [width, 0], [width, height], [0, height]], dtype=precise(displacement.device)
    )
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corner.unbind(-1) for corner in (corners + displacement).unbind(1))
    area = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    x, y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    g = (x * (y3 - y2) - y * (x3 - x2)) / area
    h = (y * (x1 - x2) - x * (y1 - y2)) / area
    from_square = _matrix(x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, 1)
    # Corners lie half a pixel outside the corner pixels' centres.
    to_corners = from_square.new_tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    to_frame = from_square.new_tensor([[width, 0, -0.5], [0, height, -0.5], [0, 0, 1]])
    return to_frame @ invert(from_square) @ to_corners


def source_coordinates(warp: Warp, size: tuple[int, int]) -> Coordinates:
    """Return where each pixel of the result comes from.

    In homogeneous coordinates the division model is (u, v, 1 + k r²), a sum of a function of the column and one of
    the row, and so is its image under a matrix. Distortion therefore costs nothing, and only H + W numbers a
    coordinate are computed with care.

    Args:
        warp: Of B pictures.
        size: Height and width in pixels, of the source and of the result.
    """
    height, width = size
    matrix = warp.matrix
    centre = matrix.new_tensor([(width - 1) / 2, (height - 1) / 2, 1])
    u, v = (
        torch.arange(count, device=matrix.device, dtype=matrix.dtype) - (count - 1) / 2 for count in (width, height)
    )
    bend = (warp.distortion.to(matrix.dtype) * (4 / (width**2 + height**2)))[:, None]
    middle = (matrix * centre).sum(-1)[..., None]
    of_column = matrix[:, :, 0, None] * u + middle * (1 + bend * u.square())[:, None]
    of_row = matrix[:, :, 1, None] * v + middle * (bend * v.square())[:, None]

    def combine(columns: Tensor, rows: Tensor) -> Tensor:
        return columns.float()[:, None, :] + rows.float()[:, :, None]

    x, y, w = (combine(of_column[:, k], of_row[:, k]) for k in range(3))
    undistorted = combine(1 + bend * u.square(), bend * v.square())
    ahead = w > LEAST_W
    w.clamp_(min=LEAST_W)
    return Coordinates(x.div_(w), y.div_(w), w.div_(undistorted), ahead)


def shrinkage(matrix: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return how many source pixels a step of one result pixel covers at the picture's centre, by axis.

    Args:
        matrix: (B, 3, 3).
        size: Height and width in pixels.

    Returns:
        Lengths (B,) of the gradients of the source's column and of its row.
    """
    centre = matrix.new_tensor([(size[1] - 1) / 2, (size[0] - 1) / 2, 1])
    x, y, w = (matrix * centre).sum(-1).unbind(-1)
    column = (matrix[:, 0, :2] - (x / w)[:, None] * matrix[:, 2, :2]) / w[:, None]
    row = (matrix[:, 1, :2] - (y / w)[:, None] * matrix[:, 2, :2]) / w[:, None]
    return torch.hypot(*column.unbind(-1)), torch.hypot(*row.unbind(-1))


def _matrix(*entries: Tensor | float) -> Tensor:
    """Stack nine entries, row by row, of which at least one is (B,), into (B, 3, 3)."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    columns = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in entries]
    return torch.stack(columns, -1).view(-1, 3, 3)


def _about_centre(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a linear map (B, 3, 3) as one that leaves the picture's centre where it is."""
    centre = matrix.new_tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
    offset = centre - (matrix[:, :2, :2] * centre).sum(-1)
    return torch.cat([torch.cat([matrix[:, :2, :2], offset[..., None]], -1), matrix[:, 2:]], 1)
