"""The warp of whole batches: exactness, registration, validity, and scenes seen from the moved camera."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mtl.augmentation import geometry
from mtl.augmentation.geometry import Warp, source_coordinates
from mtl.augmentation.resampling import JUMP, warp
from mtl.data.raycast import cast, pinhole, to_tensors
from mtl.data.rooms import build
from mtl.data.sample import Batch
from mtl.data.scenes import render

Builder = Callable[[tuple[int, int]], Tensor]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def undistorted(matrix: Tensor) -> Warp:
    return Warp(matrix, torch.zeros(len(matrix)))


def identity(count: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)


def noise(count: int, size: tuple[int, int], seed: int = 0) -> Batch:
    """Return a batch without any structure, some of it invalid."""
    g = torch.Generator().manual_seed(seed)
    holes = torch.rand(count, 1, *size, generator=g) < 0.2
    return {
        "image": torch.rand(count, 3, *size, generator=g),
        "segmentation": torch.randint(0, 9, (count, *size), generator=g).byte().masked_fill(holes[:, 0], 255),
        "depth": torch.rand(count, 1, *size, generator=g).add(0.5).masked_fill(holes, 0),
        "normals": F.normalize(torch.randn(count, 3, *size, generator=g), dim=1).masked_fill(holes, 0),
        "intrinsics": torch.tensor([[60.0, 0, 12], [0, 55, 17], [0, 0, 1]]).repeat(count, 1, 1),
    }


def assert_equal(found: Batch, expected: Batch) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


TRANSFORMS: dict[str, Builder] = {
    "hflip": lambda size: geometry.hflip(torch.ones(1, dtype=torch.bool), size),
    "vflip": lambda size: geometry.vflip(torch.ones(1, dtype=torch.bool), size),
    "rotation": lambda size: geometry.rotation(column(0.4), size),
    "translation": lambda size: geometry.translation(column(5.5), column(-3.5)),
    "shear": lambda size: geometry.shear(column(0.2), column(-0.1), size),
    "enlarged": lambda size: geometry.scale(column(1.7), size),
    "shrunk": lambda size: geometry.scale(column(0.5), size),
    "stretched": lambda size: geometry.stretch(column(1), column(1.4), size),
    "cropped": lambda size: geometry.crop(column(7), column(9), column(40), column(50), size),
    "perspective": lambda size: geometry.perspective(
        torch.tensor([[[3.0, 2], [-5, 4], [-2, -6], [4, -1]]], dtype=torch.float64), size
    ),
}

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
settings_of_the_image = st.fixed_dictionaries(
    {
        "fill": st.sampled_from(["reflection", "zeros", "mean"]),
        "interpolation": st.sampled_from(["bilinear", "bicubic"]),
        "antialias": st.booleans(),
        "depth_convention": st.sampled_from(["metric", "canonical"]),
        "inverse_depth": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(sizes, settings_of_the_image)
def test_identity_and_flips_move_values_without_changing_a_bit(size: tuple[int, int], options: dict) -> None:
    batch = noise(3, size)
    batch["other"] = torch.arange(3)
    assert_equal(warp(batch, undistorted(identity(3)), **options), batch)

    for axis, flip in ((-1, geometry.hflip), (-2, geometry.vflip)):
        expected = {key: value.flip(axis) if value.dim() > 2 else value for key, value in batch.items()}
        expected["normals"][:, -1 - axis] *= -1
        expected["intrinsics"] = batch["intrinsics"].clone()
        expected["intrinsics"][:, -1 - axis, 2] = size[axis] - 1 - batch["intrinsics"][:, -1 - axis, 2]
        assert_equal(warp(batch, undistorted(flip(torch.ones(3, dtype=torch.bool), size)), **options), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_shift_by_whole_pixels_is_a_slice_with_nothing_beyond(interpolation: str) -> None:
    size, (right, down) = (21, 30), (4, -3)
    batch = noise(2, size)
    matrix = geometry.translation(column(right, right), column(down, down))
    moved = warp(batch, undistorted(matrix), fill="zeros", interpolation=interpolation)
    for key, nothing in (("image", 0), ("segmentation", 255), ("depth", 0), ("normals", 0)):
        expected = torch.full_like(batch[key], nothing)
        expected[..., : size[0] + down, right:] = batch[key][..., -down:, : size[1] - right]
        assert torch.equal(moved[key], expected), key
    shift = torch.tensor([[0.0, 0, right], [0, 0, down], [0, 0, 0]])
    assert torch.equal(moved["intrinsics"], batch["intrinsics"] + shift)


@pytest.mark.parametrize("fill", ["reflection", "zeros", "mean"])
def test_what_surrounds_the_image(fill: str) -> None:
    batch = noise(2, (12, 15))
    shift = column(15, 4)
    moved = warp(batch, undistorted(geometry.translation(shift, 0 * shift)), fill=fill)["image"]
    mean = batch["image"].mean((2, 3), keepdim=True)
    for image, source, average, count in zip(moved, batch["image"], mean, (15, 4), strict=True):
        expected = {"reflection": source[..., :count].flip(-1), "zeros": 0 * average, "mean": average}[fill]
        assert torch.equal(image[..., :count], expected.expand_as(image[..., :count]))


# --- Registration ---


def ramps(size: tuple[int, int], axis: int) -> Batch:
    """Return maps that all encode the row (axis 0) or the column (axis 1) of a pixel."""
    at = torch.meshgrid(*(torch.arange(count).float() for count in size), indexing="ij")[axis]
    angle = at / 200 - 0.2
    normals = [angle.sin(), 0 * angle, -angle.cos()] if axis else [0 * angle, angle.sin(), -angle.cos()]
    return {
        "image": (at / 255).expand(1, 3, *size),
        "segmentation": at.byte()[None],
        "depth": (100 / (100 + at))[None, None],
        "normals": torch.stack(normals)[None],
    }


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("distortion", [0.0, 0.25, -0.2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_map_drifts_against_another(name: str, distortion: float, axis: int) -> None:
    size = (121, 150)
    bent = Warp(TRANSFORMS[name](size), column(distortion))
    moved = warp(ramps(size, axis), bent, antialias=False)
    source = source_coordinates(bent, size)
    at = torch.stack([source.x[0], source.y[0], torch.ones(size)]).double()

    # Undo the turn of the camera, of which nothing is known but that 150 pixels are the default focal length.
    camera = np.array([[150, 0, 74.5], [0, 150, 60], [0, 0, 1]])
    upper, turn = scipy.linalg.rq(np.linalg.inv(bent.matrix[0].numpy()) @ camera)
    turn = torch.from_numpy(turn * np.sign(np.diag(upper))[:, None])
    ray = torch.einsum("ij,jhw->ihw", torch.from_numpy(np.linalg.inv(camera)), at)
    depth = moved["depth"][0, 0] / torch.einsum("j,jhw->hw", turn[2], ray)
    normals = torch.einsum("ji,jhw->ihw", turn, moved["normals"][0].double())
    positions = {
        "image": moved["image"][0, 0].double() * 255,
        "segmentation": moved["segmentation"][0].double(),
        "depth": 100 / depth - 100,
        "normals": (torch.atan2(normals[1 - axis], -normals[2]) + 0.2) * 200,
    }
    inside = (at[0] > 0) & (at[0] < size[1] - 1) & (at[1] > 0) & (at[1] < size[0] - 1)
    assert inside.sum() > 800
    for key, position in positions.items():
        drift = (position - at[1 - axis])[inside]
        assert abs(drift.mean()) < 0.02, (key, drift.mean())
        assert drift.abs().max() < (0.502 if key == "segmentation" else 0.01), (key, drift.abs().max())


def test_averaging_shifts_nothing_either() -> None:
    size = (64, 80)
    for name in ("shrunk", "perspective", "rotation"):
        matrix = TRANSFORMS[name](size)
        source = source_coordinates(undistorted(matrix), size)
        moved = warp(ramps(size, 1), undistorted(matrix))["image"][0, 0] * 255
        inside = (source.x - 39.5).abs() < 37
        assert (moved - source.x[0])[inside[0] & (source.y[0] > 1) & (source.y[0] < 62)].abs().max() < 0.01


def test_averaging_keeps_what_is_coarse_and_removes_what_is_finer_than_the_result() -> None:
    size = (64, 64)
    x = torch.arange(64.0)
    # Every second pixel exactly, where linear interpolation alone would average nothing.
    shrink = undistorted(torch.tensor([[[2.0, 0, -32], [0, 2, -32], [0, 0, 1]]], dtype=torch.float64))
    for period, least, most in ((32, 0.93, 1.0), (2, 0.0, 0.001)):
        wave = (0.5 + 0.5 * (2 * math.pi / period * (x + 0.25)).cos()).expand(1, 3, 64, 64)
        for direction in (wave, wave.mT):
            seen = warp({"image": direction.contiguous()}, shrink)["image"][..., 20:44, 20:44]
            contrast = (seen - 0.5).abs().max() / (wave - 0.5).abs().max()
            assert least <= contrast <= most, (period, contrast)
    same = undistorted(geometry.compose(identity(1), geometry.scale(column(1.5), size)))
    noisy = {"image": torch.rand(1, 3, *size)}
    assert_equal(warp(noisy, same, antialias=True), warp(noisy, same, antialias=False))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_inverse_brings_the_original_back(name: str) -> None:
    size = (64, 64)
    batch = smooth_plane(size)
    # The outermost half pixel is no interpolation.
    batch["depth"] = F.pad(batch["depth"][..., 2:-2, 2:-2], (2, 2, 2, 2))
    matrix = TRANSFORMS[name](size)
    there = warp(batch, undistorted(matrix), antialias=False)
    back = warp(there, undistorted(geometry.invert(matrix)), antialias=False)
    visible = (back["depth"] > 0) & F.max_pool2d((back["depth"] == 0).float(), 5, 1, 2).eq(0)
    assert visible.sum() > 500
    where = visible.expand(-1, 3, -1, -1)
    assert (back["image"] - batch["image"])[where].abs().max() < 0.01
    assert (back["depth"] / batch["depth"] - 1)[visible].abs().max() < 2e-3
    assert (back["normals"] - batch["normals"])[where].abs().max() < 2e-3
    same = (back["segmentation"] == batch["segmentation"])[visible[:, 0]]
    assert same.float().mean() > (0.95 if name != "shrunk" else 0.9)
    torch.testing.assert_close(back["intrinsics"], batch["intrinsics"], rtol=1e-5, atol=1e-4)


# --- What is seen by a camera that moved ---


NORMAL = torch.tensor([0.3, -0.5, -0.8]) / math.sqrt(0.98)
CAMERA = torch.tensor([[[60.0, 0, 30], [0, 66, 34], [0, 0, 1]]])


def plane_depth(normal: Tensor, camera: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the depth (1, 1, H, W) of the plane n·X = -2 in closed form."""
    v, u = torch.meshgrid(*(torch.arange(count).double() for count in size), indexing="ij")
    rays = torch.linalg.inv(camera[0].double()) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    return (-2 / (normal.double() @ rays)).view(1, 1, *size).float()


def smooth_plane(size: tuple[int, int]) -> Batch:
    v, u = torch.meshgrid(*(torch.arange(count).float() for count in size), indexing="ij")
    return {
        "image": torch.stack([(u / 9).sin(), (v / 8).cos(), ((u + v) / 12).sin()])[None] / 2.5 + 0.5,
        "segmentation": (u // 20 + 4 * (v // 20)).byte()[None],
        "depth": plane_depth(NORMAL, CAMERA, size),
        "normals": NORMAL.view(1, 3, 1, 1).expand(1, 3, *size).contiguous(),
        "intrinsics": CAMERA,
    }


def turn(x: float, y: float, z: float) -> Tensor:
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


MOTIONS: dict[str, tuple[Tensor, Tensor]] = {
    "roll": (turn(0, 0, 0.6), CAMERA),
    "pan and tilt": (turn(0.1, -0.15, 0.2), CAMERA),
    "zoom": (turn(0, 0, 0), CAMERA * torch.tensor([1.6, 1.6, 1])[:, None]),
    "another lens": (turn(0.05, 0.1, 0), torch.tensor([[[80.0, 5, 36], [0, 50, 28], [0, 0, 1]]])),
    "flip": (torch.tensor([-1.0, 1, 1]).double().diag(), torch.tensor([[[60.0, 0, 33], [0, 66, 34], [0, 0, 1]]])),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("motion", MOTIONS)
def test_planes_are_exact_in_closed_form(motion: str, inverse: bool) -> None:
    size, (orthogonal, camera) = (68, 64), MOTIONS[motion]
    batch = smooth_plane(size)
    matrix = batch["intrinsics"].double() @ orthogonal.T @ torch.linalg.inv(camera.double())
    if inverse:
        batch["depth"] = 3 / batch["depth"]
    moved = warp(batch, undistorted(matrix), inverse_depth=inverse)
    seen = moved["depth"] > 0
    assert seen.float().mean() > 0.3
    normal = orthogonal.float() @ NORMAL
    depth = plane_depth(normal, camera, size)
    expected = 3 / depth if inverse else depth
    source = source_coordinates(undistorted(matrix), size)
    inner = (source.x > 0) & (source.x < size[1] - 1) & (source.y > 0) & (source.y < size[0] - 1)
    assert inner.sum() > 1000
    assert (moved["depth"] / expected - 1)[:, 0][inner].abs().max() < 2e-5
    assert (moved["normals"] - normal.view(1, 3, 1, 1))[seen.expand(-1, 3, -1, -1)].abs().max() < 1e-5
    torch.testing.assert_close(moved["intrinsics"], camera, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_canonical_zoom_shows_a_plane_of_another_world_through_the_same_lens(inverse: bool) -> None:
    size, s = (68, 64), 1.5
    batch = smooth_plane(size)
    if inverse:
        batch["depth"] = 3 / batch["depth"]
    matrix = geometry.scale(column(s), size)
    metric, canonical = (
        warp(batch, undistorted(matrix), depth_convention=convention, inverse_depth=inverse)
        for convention in ("metric", "canonical")
    )
    torch.testing.assert_close(canonical["depth"], metric["depth"] * (s if inverse else 1 / s))
    expected = F.normalize(NORMAL * torch.tensor([1, 1, s]), dim=0)
    torch.testing.assert_close(canonical["normals"][0, :, 34, 32], expected)
    camera = canonical["intrinsics"]
    torch.testing.assert_close(camera[0].diag(), CAMERA[0].diag())
    # All points lie in a plane of that normal: depth, normals and intrinsics agree.
    depth = (3 / canonical["depth"] if inverse else canonical["depth"])[0, 0]
    ratio = depth / plane_depth(expected, camera, size)[0, 0]
    assert (ratio / ratio[34, 32] - 1).abs()[2:-2, 2:-2].max() < 2e-5


def test_distortion_keeps_depth_and_normals_along_each_ray_and_leaves_no_pinhole() -> None:
    size = (68, 64)
    batch = smooth_plane(size)
    bent = Warp(identity(1), column(0.3))
    moved = warp(batch, bent)
    source = source_coordinates(bent, size)
    rays = torch.stack([source.x[0], source.y[0], torch.ones(size)]).flatten(1)
    depth = -2 / (NORMAL @ (torch.linalg.inv(CAMERA[0]) @ rays))
    torch.testing.assert_close(moved["depth"].flatten(), depth, rtol=2e-5, atol=0)
    torch.testing.assert_close(moved["normals"], batch["normals"])
    assert not moved["intrinsics"].any()


SIZE = (96, 128)


def seen_from(orthogonal: Tensor, matrix: Tensor) -> Batch:
    """Render scenes with cameras of other axes, whose intrinsics are the old ones times a matrix from the left."""
    scene = to_tensors(build(range(3), "studio", 7), "cpu")
    intrinsics = matrix @ pinhole(scene, SIZE)
    scene["rotation"] = orthogonal @ scene["rotation"]
    out = {
        "image": torch.empty(3, 3, *SIZE, dtype=torch.uint8),
        "segmentation": torch.empty(3, *SIZE, dtype=torch.uint8),
        "depth": torch.empty(3, 1, *SIZE),
        "normals": torch.empty(3, 3, *SIZE),
    }
    cast(scene, intrinsics, 0, out)
    return out | {"image": out["image"] / 255, "intrinsics": intrinsics}


ROLL = 0.3
SCENES: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "roll": (
        geometry.rotation(column(ROLL).expand(3), SIZE),
        turn(0, 0, ROLL).float(),
        torch.eye(3),
    ),
    "zoom": (
        geometry.scale(column(1.4).expand(3), SIZE),
        torch.eye(3),
        torch.tensor([[1.4, 0, -0.4 * 63.5], [0, 1.4, -0.4 * 47.5], [0, 0, 1]]),
    ),
    "flip": (
        geometry.hflip(torch.ones(3, dtype=torch.bool), SIZE),
        torch.diag(torch.tensor([-1.0, 1, 1])),
        torch.eye(3),
    ),
    "crop": (
        geometry.crop(*(column(edge).expand(3) for edge in (24, 16, 48, 64)), SIZE),
        torch.eye(3),
        torch.tensor([[2, 0, 0.5 - 32], [0, 2, 0.5 - 48], [0, 0, 1]]),
    ),
}


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_what_the_moved_camera_sees(name: str) -> None:
    matrix, orthogonal, change = SCENES[name]
    batch = render(range(3), domain="studio", seed=7, size=SIZE)
    batch["image"] = batch["image"] / 255
    moved, expected = warp(batch, undistorted(matrix)), seen_from(orthogonal, change)
    seen = moved["depth"] > 0
    torch.testing.assert_close(moved["intrinsics"], expected["intrinsics"], rtol=1e-5, atol=1e-3)
    error = (moved["depth"] / expected["depth"] - 1).abs()[seen]
    angle = (moved["normals"] - expected["normals"]).norm(dim=1, keepdim=True)[seen].rad2deg()
    assert error.median() < 1e-4 and (error < 0.01).float().mean() > 0.97
    assert angle.median() < 0.02 and (angle < 1).float().mean() > 0.9
    same = moved["segmentation"] == expected["segmentation"]
    assert same[seen[:, 0]].float().mean() > 0.97
    assert (moved["image"] - expected["image"]).abs()[seen.expand(-1, 3, -1, -1)].median() < 0.02


# --- Validity ---


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    st.integers(1, 4),
    st.integers(0, 10**6),
    settings_of_the_image,
    st.sets(st.sampled_from(["segmentation", "depth", "normals", "intrinsics"])),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_any_warp_of_any_batch_invents_nothing(
    size: tuple[int, int], count: int, seed: int, options: dict, targets: set[str], empty: bool, stored: torch.dtype
) -> None:
    batch = noise(count, size, seed)
    batch = {key: value for key, value in batch.items() if key in targets | {"image"}}
    for key in targets & {"depth", "normals"}:
        batch[key] = batch[key].to(stored) * (not empty)
    if empty and "segmentation" in batch:
        batch["segmentation"].fill_(255)
    g = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    corners = between(-0.2, 0.2, 4, 2) * torch.tensor(size[::-1])
    matrix = geometry.compose(
        geometry.rotation(between(-3, 3), size),
        geometry.stretch(between(0.3, 3), between(0.3, 3), size),
        geometry.perspective(corners, size),
    )
    bent = Warp(matrix, between(-0.4, 0.4))
    moved = warp(batch, bent, **options)

    assert moved.keys() == batch.keys()
    for key, value in batch.items():
        assert moved[key].shape == value.shape and moved[key].dtype == value.dtype, key
        assert moved[key].isfinite().all(), key
    low, high = batch["image"].amin((2, 3)), batch["image"].amax((2, 3))
    if options["interpolation"] == "bilinear":
        least = low.clamp(max=0) if options["fill"] == "zeros" else low
        assert (moved["image"].amin((2, 3)) >= least - 1e-6).all()
        assert (moved["image"].amax((2, 3)) <= high + 1e-6).all()
    else:
        assert moved["image"].min() >= 0 and moved["image"].max() <= 1
    source = source_coordinates(bent, size)
    outside = ((source.x - (size[1] - 1) / 2).abs() > size[1] / 2) | (
        (source.y - (size[0] - 1) / 2).abs() > size[0] / 2
    )
    if "segmentation" in targets:
        for before, after in zip(batch["segmentation"], moved["segmentation"], strict=True):
            assert set(after.unique().tolist()) <= {*before.unique().tolist(), 255}
        assert (moved["segmentation"][outside] == 255).all()
    if "normals" in targets:
        length = moved["normals"].float().norm(dim=1)
        assert ((length == 0) | ((length - 1).abs() < (1e-5 if stored == torch.float32 else 2e-3))).all()
        assert (length[outside] == 0).all()
    if "depth" in targets:
        assert (moved["depth"][:, 0][outside] == 0).all()
        assert (moved["depth"] >= 0).all()
    if empty:
        assert all(not moved[key].any() for key in targets & {"depth", "normals"})
        assert "segmentation" not in targets or (moved["segmentation"] == 255).all()


def test_depth_comes_from_valid_neighbours_and_stays_close_to_the_nearest() -> None:
    size = (40, 50)
    batch = {key: noise(2, size)[key] for key in ("image", "depth", "segmentation")}
    steps = 2 + (torch.arange(50) >= 25) * 3 + 0.01 * torch.arange(50)  # a gentle slope with a jump
    batch["depth"] = torch.where(batch["depth"] > 0, steps.expand(2, 1, *size), 0)
    matrix = geometry.compose(
        geometry.rotation(column(0.2, -0.9), size), geometry.stretch(column(1.3, 1), column(1.1, 2), size)
    )
    moved = warp(batch, undistorted(matrix))
    source = source_coordinates(undistorted(matrix), size)
    for b in range(2):
        for row in range(size[0]):
            for col in range(size[1]):
                x, y, depth = (
                    float(source.x[b, row, col]),
                    float(source.y[b, row, col]),
                    float(moved["depth"][b, 0, row, col]),
                )
                if not (-0.5 < x < size[1] - 0.5 and -0.5 < y < size[0] - 0.5):
                    assert depth == 0
                    continue
                if min(abs(x % 1 - 0.5), abs(y % 1 - 0.5)) < 2e-3:
                    continue  # two pixels are equally near
                nearest = float(batch["depth"][b, 0, round(y), round(x)])
                assert (depth > 0) == (nearest > 0)
                assert (depth > 0) == (moved["segmentation"][b, row, col] != 255)
                if not depth:
                    continue
                corners = batch["depth"][b, 0][
                    max(math.floor(y), 0) : math.floor(y) + 2, max(math.floor(x), 0) : math.floor(x) + 2
                ]
                corners = corners[corners > 0]
                assert corners.min() * (1 - 1e-6) <= depth <= corners.max() * (1 + 1e-6)
                assert abs(nearest / depth - 1) < JUMP
                if len(corners) < 4 and 0 < x < size[1] - 1 and 0 < y < size[0] - 1:
                    assert depth == nearest  # next to an invalid pixel


def test_normals_that_cancel_have_no_direction_and_what_lies_behind_is_not_seen() -> None:
    batch = noise(1, (6, 8))
    signs = 1.0 - 2 * (torch.arange(8) % 2)
    batch["normals"] = torch.tensor([0.6, 0, -0.8]).view(1, 3, 1, 1) * signs.expand(1, 1, 6, 8)
    moved = warp(batch, undistorted(geometry.translation(column(0.5), column(0))))["normals"]
    assert not moved[..., 1:].any() and moved[..., 0].any()

    behind = warp(batch, undistorted(torch.diag(column(1, 1, -1))[None]))
    assert not behind["depth"].any() and not behind["normals"].any() and (behind["segmentation"] == 255).all()


# --- Elsewhere ---


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_agree_with_kornia(name: str, interpolation: str) -> None:
    kornia = pytest.importorskip("kornia")
    size = (50, 64)
    batch = {"image": noise(1, size)["image"]}
    matrix = TRANSFORMS[name](size)
    mine = warp(batch, undistorted(matrix), antialias=False, interpolation=interpolation)["image"]
    to_result = torch.linalg.inv(matrix).float()
    theirs = kornia.geometry.warp_perspective(
        batch["image"], to_result, size, mode=interpolation, padding_mode="border", align_corners=True
    )
    source = source_coordinates(undistorted(matrix), size)
    inner = (source.x - 31.5).abs().lt(30) & (source.y - 24.5).abs().lt(23)
    assert inner.sum() > 600
    assert (mine - theirs.clamp(0, 1)).abs()[inner[:, None].expand_as(mine)].max() < 1e-3
    if name != "perspective":
        affine = kornia.geometry.warp_affine(
            batch["image"], to_result[:, :2], size, mode=interpolation, padding_mode="border", align_corners=True
        )
        assert (mine - affine.clamp(0, 1)).abs()[inner[:, None].expand_as(mine)].max() < 1e-3


def test_compiles_into_one_graph_that_does_the_same() -> None:
    batch = noise(2, (33, 40))
    bent = Warp(geometry.rotation(column(0.3, -2), (33, 40)), column(0.2, 0))
    # Without a break nothing in it can wait for the device either.
    compiled = torch.compile(warp, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(batch, bent, depth_convention="canonical"), warp(batch, bent, depth_convention="canonical"))


def test_the_batch_given_is_not_changed() -> None:
    batch = noise(2, (16, 16))
    before = {key: value.clone() for key, value in batch.items()}
    matrix = geometry.scale(column(0.5, 0.7), (16, 16))
    bent = Warp(matrix, column(0.1, 0.2))
    warp(batch, bent)
    assert_equal(batch, before)
    assert torch.equal(bent.matrix, geometry.scale(column(0.5, 0.7), (16, 16)))
