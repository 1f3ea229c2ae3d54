"""The camera's rule against projection, closed forms, and SciPy's RQ decomposition."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mtl.augmentation import geometry
from mtl.augmentation.camera import rq, view
from mtl.augmentation.geometry import Warp

SIZE = (48, 64)


def cameras(count: int) -> Tensor:
    """Return intrinsics with unequal focal lengths and an eccentric principal point."""
    intrinsics = torch.zeros(count, 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = 40 + 40 * torch.rand(2, count, dtype=torch.float64)
    intrinsics[:, :2, 2] = torch.tensor([31.5, 23.5]) + 6 * torch.randn(count, 2, dtype=torch.float64)
    intrinsics[:, 2, 2] = 1
    return intrinsics


def homographies(count: int) -> Tensor:
    """Return random warps of all kinds, half of them mirrored."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, dtype=torch.float64)

    return geometry.compose(
        geometry.hflip(torch.arange(count) % 2 == 1, SIZE),
        geometry.rotation(between(-3, 3), SIZE),
        geometry.shear(between(-0.4, 0.4), between(-0.4, 0.4), SIZE),
        geometry.stretch(between(0.4, 2), between(0.4, 2), SIZE),
        geometry.perspective(between(-8, 8)[:, None, None] * torch.randn(4, 2, dtype=torch.float64).clamp(-1, 1), SIZE),
        geometry.translation(between(-9, 9), between(-9, 9)),
    )


def project(intrinsics: Tensor, points: Tensor) -> Tensor:
    """Return pixels (B, N, 2) of points (B, N, 3)."""
    pixels = points @ intrinsics.mT
    return pixels[..., :2] / pixels[..., 2:]


@pytest.mark.parametrize("convention", ["metric", "canonical"])
def test_points_project_to_where_the_warp_takes_their_pixels(convention: str) -> None:
    count = 1000
    camera, matrix = cameras(count), homographies(count)
    seen = view(Warp(matrix, torch.zeros(count)), camera, SIZE, convention)

    pixels = torch.rand(count, 16, 2, dtype=torch.float64) * torch.tensor([63.0, 47.0])
    homogeneous = torch.cat([pixels, torch.ones(count, 16, 1, dtype=torch.float64)], -1)
    depth = 1 + 5 * torch.rand(count, 16, 1, dtype=torch.float64)
    points = depth * (homogeneous @ torch.linalg.inv(camera).mT)
    warped = homogeneous @ torch.linalg.inv(matrix).mT
    warped_pixels = warped[..., :2] / warped[..., 2:]
    # (x, y, 1) of a pixel of the result, for which the matrix gives w.
    back = torch.cat([warped_pixels, torch.ones(count, 16, 1, dtype=torch.float64)], -1) @ matrix.mT
    new_depth = depth * seen.depth[:, None, None] / back[..., 2:]

    # The world of the result: in the metric convention turned only, in the canonical one depth is divided too.
    orthogonal = seen.normals.clone()
    squeeze = torch.linalg.vector_norm(orthogonal[:, 2], dim=-1)
    orthogonal[:, 2] /= squeeze[:, None]
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(orthogonal @ orthogonal.mT, eye.expand(count, 3, 3), atol=1e-12, rtol=0)
    if convention == "metric":
        torch.testing.assert_close(squeeze, torch.ones_like(squeeze), atol=1e-12, rtol=0)
    new_points = points @ orthogonal.mT
    new_points[..., 2] /= squeeze[:, None]

    assert (project(seen.intrinsics, new_points) - warped_pixels).abs().max() < 1e-9
    assert ((new_points[..., 2:] - new_depth) / new_depth).abs().max() < 1e-11
    assert (seen.intrinsics.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(torch.linalg.det(orthogonal).sign(), torch.linalg.det(matrix).sign())


def test_rq_agrees_with_scipy() -> None:
    for matrix in torch.randn(50, 3, 3, dtype=torch.float64):
        upper, orthogonal = (part[0].numpy() for part in rq(matrix[None]))
        expected_upper, expected_orthogonal = scipy.linalg.rq(matrix.numpy())
        signs = np.sign(np.diag(expected_upper))
        np.testing.assert_allclose(upper, expected_upper * signs, atol=1e-12)
        np.testing.assert_allclose(orthogonal, expected_orthogonal * signs[:, None], atol=1e-12)


def test_a_turned_camera_is_recognised() -> None:
    camera = cameras(2)
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.2, 0.1], [0.2, 0, -0.3], [-0.1, 0.3, 0]]).double())
    other = cameras(2)
    seen = view(Warp(camera @ turn.T @ torch.linalg.inv(other), torch.zeros(2)), camera, SIZE, "metric")
    torch.testing.assert_close(seen.normals, turn.expand(2, 3, 3))
    torch.testing.assert_close(seen.intrinsics, other)


def test_roll_flips_and_zoom_in_closed_form() -> None:
    f, cx, cy = 50.0, 31.5, 23.5  # about the picture's centre
    camera = torch.tensor([[[f, 0, cx], [0, f, cy], [0, 0, 1]]], dtype=torch.float64)
    none, chosen = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    angle, s = torch.tensor([0.5], dtype=torch.float64), 1.5

    rolled = view(Warp(geometry.rotation(angle, SIZE), none), camera, SIZE, "canonical")
    cos, sin = math.cos(0.5), math.sin(0.5)
    expected = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(rolled.normals[0], expected)
    torch.testing.assert_close(rolled.intrinsics, camera)

    for flip, signs in ((geometry.hflip, [-1.0, 1, 1]), (geometry.vflip, [1.0, -1, 1])):
        flipped = view(Warp(flip(chosen, SIZE), none), camera, SIZE, "metric")
        assert torch.equal(flipped.normals[0], torch.tensor(signs).double().diag())
        assert torch.equal(flipped.intrinsics, camera)
        assert flipped.depth == 1

    matrix = geometry.scale(torch.tensor([s], dtype=torch.float64), SIZE)
    metric = view(Warp(matrix, none), camera, SIZE, "metric")
    torch.testing.assert_close(metric.normals[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(metric.intrinsics[0].diag(), torch.tensor([s * f, s * f, 1], dtype=torch.float64))
    canonical = view(Warp(matrix, none), camera, SIZE, "canonical")
    torch.testing.assert_close(canonical.depth / metric.depth, torch.tensor([1 / s], dtype=torch.float64))
    torch.testing.assert_close(canonical.normals[0], torch.tensor([1, 1, s], dtype=torch.float64).diag())
    torch.testing.assert_close(canonical.intrinsics, camera)


def test_an_unknown_camera_stays_unknown_and_distortion_makes_one() -> None:
    matrix = homographies(4)
    seen = view(
        Warp(matrix, torch.tensor([0, 0.1, 0, -0.1])),
        cameras(4) * torch.tensor([1, 1, 0, 0])[:, None, None],
        SIZE,
        "metric",
    )
    assert [bool(camera.any()) for camera in seen.intrinsics] == [True, False, False, False]
    guess = torch.tensor([[[64.0, 0, 31.5], [0, 64, 23.5], [0, 0, 1]]]).double().expand(4, 3, 3)
    expected = view(Warp(matrix, torch.zeros(4)), guess, SIZE, "metric")
    unknown = view(Warp(matrix, torch.zeros(4)), None, SIZE, "metric")
    torch.testing.assert_close(unknown.depth, expected.depth)
    torch.testing.assert_close(unknown.normals, expected.normals)
    assert not unknown.intrinsics.any()
