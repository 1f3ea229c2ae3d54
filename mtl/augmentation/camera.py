"""What a change of the picture means for the camera: depth, normals and intrinsics.

A pixel p of depth d shows the point X = d K⁻¹ p. Let H map pixels of the source to those of the result. Then

    H K = K' Q    (RQ decomposition: K' upper triangular with positive diagonal, Q orthogonal)

says that the result is the picture that a camera K' takes of the points Q X: depth becomes the third coordinate
of Q X, normals become Q n, intrinsics K'. Q is a rotation; a mirror image makes it one that is followed by
n_x -> -n_x. Whatever is neither (zoom, stretch, shear, shift) is K' alone.

Zoom by s can be told in two ways, which agree on every pixel's ray and differ in the world that they show:

=========== ======================== ============================= ======================================
convention  depth                    normals                       intrinsics
=========== ======================== ============================= ======================================
`metric`    as it is                 as they are                   K'
`canonical` d / s                    (n_x, n_y, s n_z), normalised K' with its first two columns over s
=========== ======================== ============================= ======================================

with s² the ratio of the areas that K' and K give to a unit square at unit distance, the determinants of their
upper left 2 x 2 blocks. In the canonical convention a picture that is only zoomed keeps its focal length, and the
points of its world are (X, Y, Z / s): exact for every pixel, because the principal point is K''s.

A camera that is unknown (intrinsics all zero, or none at all) is taken to have a focal length of max(H, W) and
its principal point in the middle, and stays unknown. Only perspective depends on that guess.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtl.augmentation.geometry import Warp, invert
from mtl.data.sample import DepthConvention


class View(NamedTuple):
    """What the camera of the result sees.

    Attributes:
        depth: (B,): a point's depth is its old one times this, over the third homogeneous coordinate that the
            warp's matrix gives its pixel.
        normals: (B, 3, 3): a normal is this times the old one, normalised.
        intrinsics: (B, 3, 3), all zero where the camera is unknown or distortion leaves no pinhole.
    """

    depth: Tensor
    normals: Tensor
    intrinsics: Tensor


def view(warp: Warp, intrinsics: Tensor | None, size: tuple[int, int], convention: DepthConvention) -> View:
    """Return what a warp does to the camera.

    Distortion keeps depth and normals along each ray: they are those of the picture without it.

    Args:
        warp: Of B pictures.
        intrinsics: Of the sources (B, 3, 3), all zero where unknown, or None if all are.
        size: Height and width in pixels.
        convention: How zoom is told.
    """
    matrix = warp.matrix
    camera = _default_camera(matrix, size)
    known = torch.zeros_like(warp.distortion, dtype=torch.bool)
    if intrinsics is not None:
        known = intrinsics[:, 2, 2] != 0
        camera = torch.where(known[:, None, None], intrinsics.to(matrix.dtype), camera)
    upper, orthogonal = rq(invert(matrix) @ camera)
    corner = upper[:, 2, 2]
    upper = upper / corner[:, None, None]
    # H times the matrix is the identity, so that the third coordinate of Q X is d / (corner w).
    depth = 1 / corner
    if convention == "canonical":
        zoom = (_area(upper) / _area(camera)).sqrt()
        one = torch.ones_like(zoom)
        depth = depth / zoom
        upper = upper / torch.stack([zoom, zoom, one], -1)[:, None, :]
        orthogonal = orthogonal * torch.stack([one, one, zoom], -1)[:, :, None]
    pinhole = known & (warp.distortion == 0)
    return View(depth, orthogonal, torch.where(pinhole[:, None, None], upper, 0))


def rq(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose regular matrices (B, 3, 3) by Gram-Schmidt from the last row up.

    Returns:
        Upper triangular with positive diagonal, and orthogonal, whose product they are.
    """
    first, second, third = matrix.unbind(1)
    third, k33 = _normalise(third)
    k23, k13 = _dot(second, third), _dot(first, third)
    second, k22 = _normalise(second - k23[:, None] * third)
    k12 = _dot(first, second)
    first, k11 = _normalise(first - k12[:, None] * second - k13[:, None] * third)
    zero = torch.zeros_like(k11)
    upper = torch.stack([k11, k12, k13, zero, k22, k23, zero, zero, k33], -1).view(-1, 3, 3)
    return upper, torch.stack([first, second, third], 1)


def _default_camera(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the intrinsics (3, 3) of a camera that nothing is known of."""
    focal = float(max(size))
    return like.new_tensor([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])


def _area(intrinsics: Tensor) -> Tensor:
    """Return the determinants (B,) of the upper left 2 x 2 blocks of (..., 3, 3)."""
    return intrinsics[..., 0, 0] * intrinsics[..., 1, 1] - intrinsics[..., 0, 1] * intrinsics[..., 1, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _normalise(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions (B, 3) and lengths (B,)."""
    length = torch.linalg.vector_norm(vector, dim=-1)
    return vector / length[:, None], length
