"""Matrices against the plain formulas of what happens to a point, and against kornia and NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.augmentation import geometry
from mtl.augmentation.geometry import Warp, source_coordinates

SIZE = (20, 31)
CENTRE = np.array([15.0, 9.5])
POINTS = np.array([[0.0, 0.0], [30, 0], [30, 19], [0, 19], [15, 9.5], [3.25, 17.5]])


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def forward(matrix: Tensor, points: np.ndarray = POINTS) -> np.ndarray:
    """Return where points of the source appear in the result (B, N, 2)."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], -1)
    moved = np.einsum("bij,nj->bni", np.linalg.inv(matrix.numpy()), homogeneous)
    return moved[..., :2] / moved[..., 2:]


def test_flips_exchange_columns_or_rows_of_the_chosen_samples() -> None:
    chosen = torch.tensor([True, False])
    expected = np.stack([POINTS * [-1, 1] + [30, 0], POINTS])
    np.testing.assert_array_equal(forward(geometry.hflip(chosen, SIZE)), expected)
    expected = np.stack([POINTS * [1, -1] + [0, 19], POINTS])
    np.testing.assert_array_equal(forward(geometry.vflip(chosen, SIZE)), expected)


def test_rotation_is_clockwise_as_seen_and_agrees_with_kornia() -> None:
    quarter = forward(geometry.rotation(column(math.pi / 2), SIZE), CENTRE + np.eye(2))[0] - CENTRE
    np.testing.assert_allclose(quarter, [[0, 1], [-1, 0]], atol=1e-12)  # right goes down, down goes left

    angles = column(0.3, -1.2)
    kornia = pytest.importorskip("kornia")
    centre = torch.from_numpy(CENTRE).expand(2, 2)
    anticlockwise, one = -angles.rad2deg(), torch.ones(2, 2, dtype=torch.float64)
    theirs = kornia.geometry.get_rotation_matrix2d(centre, anticlockwise, one)
    expected = np.einsum("bij,nj->bni", theirs.numpy(), np.c_[POINTS, np.ones(len(POINTS))])
    # kornia's pi is a float32.
    np.testing.assert_allclose(forward(geometry.rotation(angles, SIZE)), expected, atol=1e-5)


def test_translation_shear_stretch_scale_and_crop_do_what_they_say() -> None:
    moved = forward(geometry.translation(column(2, -1.5), column(3, 0.25)))
    np.testing.assert_allclose(moved, POINTS + np.array([[[2, 3]], [[-1.5, 0.25]]]), atol=1e-12)

    x, y = 0.3, -0.2
    u, v = (POINTS - CENTRE).T
    slanted = u + x * v
    expected = np.stack([slanted, v + y * slanted], -1) + CENTRE
    np.testing.assert_allclose(forward(geometry.shear(column(x), column(y), SIZE))[0], expected, atol=1e-12)

    expected = (POINTS - CENTRE) * [2, 0.5] + CENTRE
    np.testing.assert_allclose(forward(geometry.stretch(column(2), column(0.5), SIZE))[0], expected, atol=1e-12)
    expected = (POINTS - CENTRE) * 1.7 + CENTRE
    np.testing.assert_allclose(forward(geometry.scale(column(1.7), SIZE))[0], expected, atol=1e-12)

    top, left, height, width = 3, 5.5, 7, 11
    window = np.array([[left - 0.5, top - 0.5], [left + width - 0.5, top + height - 0.5]])
    matrix = geometry.crop(*(column(edge) for edge in (top, left, height, width)), SIZE)
    np.testing.assert_allclose(forward(matrix, window)[0], [[-0.5, -0.5], [30.5, 19.5]], atol=1e-12)


def test_perspective_moves_the_corners_of_the_frame_and_agrees_with_kornia() -> None:
    displacement = (torch.rand(8, 4, 2, dtype=torch.float64) - 0.5) * 8
    matrix = geometry.perspective(displacement, SIZE)
    corners = np.array([[-0.5, -0.5], [30.5, -0.5], [30.5, 19.5], [-0.5, 19.5]])
    np.testing.assert_allclose(forward(matrix, corners), corners + displacement.numpy(), atol=1e-9)

    kornia = pytest.importorskip("kornia")
    start = torch.from_numpy(corners).expand(8, 4, 2)
    theirs = torch.linalg.inv(kornia.geometry.get_perspective_transform(start, start + displacement))
    assert torch.allclose(matrix / matrix[:, 2:, 2:], theirs / theirs[:, 2:, 2:], atol=1e-9)


def test_neutral_parameters_leave_everything_where_it_is() -> None:
    none, one = torch.zeros(1), torch.ones(1)
    for matrix in (
        geometry.hflip(none.bool(), SIZE),
        geometry.vflip(none.bool(), SIZE),
        geometry.rotation(none, SIZE),
        geometry.translation(none, none),
        geometry.shear(none, none, SIZE),
        geometry.stretch(one, one, SIZE),
        geometry.scale(one, SIZE),
        geometry.crop(none, none, one * SIZE[0], one * SIZE[1], SIZE),
    ):
        assert torch.equal(matrix[0], torch.eye(3, dtype=torch.float64))
    neutral = geometry.perspective(torch.zeros(1, 4, 2), SIZE)
    torch.testing.assert_close(neutral[0], torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_composition_applies_the_first_matrix_first() -> None:
    angle, shift = 0.4, column(3)
    rotated = geometry.rotation(column(angle), SIZE)
    both = geometry.compose(rotated, geometry.translation(shift, 0 * shift), geometry.scale(column(2), SIZE))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = ((POINTS - CENTRE) @ turn.T + [3, 0]) * 2 + CENTRE
    np.testing.assert_allclose(forward(both)[0], expected, atol=1e-12)
    assert torch.equal(geometry.compose(rotated), rotated)


@pytest.mark.parametrize("k", [0.0, 0.35, -0.35])
def test_distortion_and_matrix_give_the_source_of_every_pixel(k: float) -> None:
    matrix = geometry.compose(
        geometry.rotation(column(0.3), SIZE),
        geometry.perspective((torch.rand(1, 4, 2, dtype=torch.float64) - 0.5) * 6, SIZE),
    )
    found = source_coordinates(Warp(matrix, column(k)), SIZE)
    for row in range(SIZE[0]):
        for col in range(SIZE[1]):
            offset = np.array([col, row]) - CENTRE
            radius = np.linalg.norm(offset) / (math.hypot(*SIZE) / 2)
            x, y, w = matrix[0].numpy() @ [*(CENTRE + offset / (1 + k * radius**2)), 1]
            assert found.x[0, row, col] == pytest.approx(x / w, abs=2e-5)
            assert found.y[0, row, col] == pytest.approx(y / w, abs=2e-5)
            assert found.w[0, row, col] == pytest.approx(w, rel=1e-6)
    assert found.ahead.all()


def test_pincushion_bends_lines_inwards_and_keeps_the_scale_of_the_middle() -> None:
    size = (101, 101)
    x = source_coordinates(Warp(torch.eye(3, dtype=torch.float64)[None], column(0.3)), size).x[0]
    # The source's column 10 appears nearer to the middle half way up than at the top.
    at_top, half_way = ((row - 10).abs().argmin().item() for row in (x[0, :51], x[50, :51]))
    assert half_way > at_top
    assert x[50, 51] - x[50, 50] == pytest.approx(1, abs=1e-3)


def test_what_lies_behind_the_horizon_is_not_ahead() -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[2] = column(-0.1, 0, 1)  # w is zero at column 10
    ahead = source_coordinates(Warp(matrix[None], column(0)), SIZE).ahead[0]
    assert ahead[:, :10].all() and not ahead[:, 10:].any()


def test_shrinkage_is_the_length_of_a_step_in_the_source() -> None:
    matrix = geometry.compose(
        geometry.stretch(column(0.5, 2, 1), column(0.25, 3, 1), SIZE), geometry.rotation(column(0, 0, 0.7), SIZE)
    )
    x, y = geometry.shrinkage(matrix, SIZE)
    torch.testing.assert_close(x, column(2, 0.5, 1))
    torch.testing.assert_close(y, column(4, 1 / 3, 1))

    tilted = geometry.perspective((torch.rand(1, 4, 2, dtype=torch.float64) - 0.5) * 6, SIZE)
    at = torch.from_numpy(CENTRE)

    def source(point: Tensor) -> Tensor:
        x, y, w = tilted[0] @ torch.cat([point, column(1)])
        return torch.stack([x / w, y / w])

    jacobian = torch.autograd.functional.jacobian(source, at)
    for found, expected in zip(geometry.shrinkage(tilted, SIZE), jacobian.norm(dim=1), strict=True):
        torch.testing.assert_close(found[0], expected)
