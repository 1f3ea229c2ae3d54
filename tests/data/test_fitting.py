"""Fitting to size against coordinate ramps, exact box averages and planes in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mtl.data.fitting import fit
from mtl.data.sample import IGNORE_INDEX, Sample

SIZES = [
    ((64, 96), (32, 48)),  # exactly 2: nearest neighbours would be a quarter of a pixel off
    ((60, 90), (32, 48)),  # exactly 1.875
    ((96, 144), (32, 48)),  # exactly 3
    ((97, 131), (41, 37)),  # no common factor, columns cut off
    ((131, 97), (41, 37)),  # rows cut off
    ((40, 60), (80, 120)),  # enlarged by 2
    ((40, 60), (60, 90)),  # enlarged by 1.5, where nearest neighbours meet ties
    ((40, 60), (67, 43)),
    ((40, 60), (40, 60)),
]


def slope(size: tuple[int, int]) -> int:
    """Return the grey levels per pixel of the ramp in the image."""
    return 255 // (max(size) - 1)


def ramps(size: tuple[int, int], axis: int) -> Sample:
    """Maps that all encode the row (axis 0) or column (axis 1) of a pixel; intrinsics tell the geometry."""
    position = np.indices(size)[axis]
    grey = (position * slope(size)).astype(np.uint8)
    angle = position / 200 - 0.25
    return {
        "image": np.stack([grey, 255 - grey, grey], axis=-1),  # both slopes, so that rounding up cancels
        "segmentation": position.astype(np.uint8),
        "depth": (100 + position).astype(np.float32),
        "normals": np.stack([np.sin(angle), 0 * angle, -np.cos(angle)], axis=-1).astype(np.float32),
        "intrinsics": np.eye(3, dtype=np.float32),
    }


def positions(sample: Sample, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Read the source row or column back from each map of fitted `ramps`."""
    image = sample["image"].astype(np.float64)
    return {
        "image": (image[..., 0] + 255 - image[..., 1]) / 2 / slope(size),
        "segmentation": sample["segmentation"].astype(np.float64),
        "depth": sample["depth"].astype(np.float64) - 100,
        "normals": (np.arctan2(sample["normals"][..., 0], -sample["normals"][..., 2]) + 0.25) * 200,
    }


def assert_registered(source: tuple[int, int], size: tuple[int, int], axis: int, levels: float = 0) -> None:
    """Allow 0.02 target pixels on average, and for the image as much more as `levels` of grey are."""
    fitted = fit(ramps(source, axis), size)
    k = fitted["intrinsics"].astype(np.float64)
    scale, offset = k[1 - axis, 1 - axis], k[1 - axis, 2]
    where = np.indices(size)[axis]
    for name, position in positions(fitted, source).items():
        assert position.shape == size
        drift = scale * position + offset - where  # in target pixels
        rounding = levels * scale / slope(source) if name == "image" else 0
        assert abs(drift.mean()) < 0.02 + rounding, (name, drift.mean())
        inner = drift[4:-4, 4:-4] if scale > 1 else drift
        staircase = 0.125 * min(1, scale) + 0.01  # where target pixels end inside source pixels
        worst = {"segmentation": 0.5 * max(1, scale), "image": 0.5 * scale / slope(source)}
        assert np.abs(inner).max() < worst.get(name, 0) + staircase, (name, np.abs(inner).max())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_no_map_drifts(source: tuple[int, int], size: tuple[int, int], axis: int) -> None:
    assert_registered(source, size, axis)


side = st.integers(32, 150)


@given(st.tuples(side, side), st.tuples(side, side), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_no_map_drifts_whatever_the_sizes(source: tuple[int, int], size: tuple[int, int], axis: int) -> None:
    assert_registered(source, size, axis, levels=0.1)


@given(st.tuples(side, side), st.tuples(side, side))
@settings(max_examples=100, deadline=None)
def test_covers_the_size_and_cuts_the_middle(source: tuple[int, int], size: tuple[int, int]) -> None:
    k = fit({"image": np.zeros((*source, 3), np.uint8), "intrinsics": np.eye(3, dtype=np.float32)}, size)[
        "intrinsics"
    ].astype(np.float64)
    scale = max(size[0] / source[0], size[1] / source[1])
    for axis, s, c in ((0, k[1, 1], k[1, 2]), (1, k[0, 0], k[0, 2])):
        assert abs(size[axis] / s - size[axis] / scale) <= 0.5 + 1e-3  # the window is whole source pixels
        first, last = (np.array([-0.5, size[axis] - 0.5]) - c) / s  # its outer edges in the source
        assert first >= -0.5 - 1e-3
        assert last <= source[axis] - 0.5 + 1e-3
        assert abs((first + last) / 2 - (source[axis] - 1) / 2) <= 0.5 + 1e-3


def box_average(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The exact average over target cells of the same aspect: divide every pixel finely, average blocks."""
    height, width = values.shape
    fine = np.repeat(np.repeat(values.astype(np.float64), size[0], axis=0), size[1], axis=1)
    return fine.reshape(size[0], height, size[1], width).mean(axis=(1, 3))


BOXES = [((12, 18), (6, 9)), ((15, 30), (8, 16)), ((21, 14), (9, 6)), ((16, 16), (15, 15))]


@pytest.mark.parametrize(("source", "size"), BOXES)
def test_shrinking_averages_exactly_what_is_valid(source: tuple[int, int], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
    valid = rng.random(source) < 0.6
    depth = np.where(valid, rng.uniform(0.5, 8, source), 0).astype(np.float32)
    normals = rng.normal(size=(*source, 3)) - (0, 0, 2)
    normals *= valid[..., None] / np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = normals.astype(np.float32)
    fitted = fit({"image": image, "depth": depth, "normals": normals}, size)

    share = box_average(valid, size)
    kept = share > 0.499
    inverse = np.where(valid, 1 / np.where(valid, depth, 1), 0)
    expected_depth = np.where(kept, share / np.maximum(box_average(inverse, size), 1e-9), 0)
    total = np.stack([box_average(normals[..., i], size) for i in range(3)], axis=-1)
    expected_normals = total / np.linalg.norm(total, axis=-1, keepdims=True).clip(1e-9) * kept[..., None]
    np.testing.assert_allclose(fitted["depth"], expected_depth, rtol=1e-4)
    np.testing.assert_allclose(fitted["normals"], expected_normals, atol=1e-4)
    for channel in range(3):
        assert np.abs(fitted["image"][..., channel] - box_average(image[..., channel], size)).max() <= 0.51
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize(("source", "size"), BOXES)
def test_the_class_with_the_largest_share_wins(source: tuple[int, int], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    classes = rng.choice(np.array([0, 1, 7, IGNORE_INDEX], np.uint8), source)
    fitted = fit({"image": np.zeros((*source, 3), np.uint8), "segmentation": classes}, size)["segmentation"]
    shares = {index: box_average(classes == index, size) for index in (0, 1, 7)}
    most = np.max(list(shares.values()), axis=0)
    ignored = 1 - sum(shares.values()) > 0.501
    np.testing.assert_array_equal(fitted == IGNORE_INDEX, ignored)
    for index, share in shares.items():
        assert np.all(share[fitted == index] > most[fitted == index] - 1e-3)
    assert 0 < ignored.mean() < 1


def test_equal_shares_neither_move_edges_nor_favour_a_class() -> None:
    stripes = (np.arange(200) // 5 % 2).astype(np.uint8)  # 5 wide: every second edge splits a cell in halves
    classes = np.broadcast_to(stripes, (80, 200)).copy()
    sample = {"image": np.zeros((80, 200, 3), np.uint8), "segmentation": classes}
    fitted = fit(sample, (40, 100))["segmentation"]
    assert fitted.mean() == pytest.approx(0.5, abs=1e-6)
    step = np.diff(fitted.mean(axis=0))  # an edge's place is the centre of mass of its step
    places = np.arange(1, 100) - 0.5
    for sign in (1, -1):
        edges = np.flatnonzero(np.diff(stripes.astype(int)) == sign) + 0.5
        assert (step * places)[step * sign > 0].sum() * sign == pytest.approx(((edges + 0.5) / 2 - 0.5).sum())


sizes = st.tuples(st.integers(3, 24), st.integers(3, 24))


@given(st.data(), sizes, sizes)
@settings(max_examples=150, deadline=None)
def test_nothing_is_invented(data: st.DataObject, source: tuple[int, int], size: tuple[int, int]) -> None:
    classes = data.draw(npst.arrays(np.uint8, source, elements=st.sampled_from([0, 3, 12, IGNORE_INDEX])))
    depth = data.draw(npst.arrays(np.float32, source, elements=st.sampled_from([0.0, 0.5, 2.0, 9.5])))
    normals = np.zeros((*source, 3), np.float32)
    normals[depth == 2.0, 2] = -1
    normals[depth == 9.5, 1] = -1
    sample = {
        "image": np.zeros((*source, 3), np.uint8),
        "segmentation": classes,
        "depth": depth,
        "normals": normals,
    }
    fitted = fit(sample, size)
    assert {k: (v.shape, v.dtype) for k, v in fitted.items()} == {
        k: (size + v.shape[2:], v.dtype) for k, v in sample.items()
    }
    assert set(np.unique(fitted["segmentation"])) <= set(np.unique(classes))
    found = fitted["depth"][fitted["depth"] > 0]
    if found.size:
        assert depth[depth > 0].min() * (1 - 1e-5) <= found.min()
        assert found.max() <= depth.max() * (1 + 1e-5)
    length = np.linalg.norm(fitted["normals"], axis=-1)
    assert np.all((length == 0) | (np.abs(length - 1) < 1e-5))


@pytest.mark.parametrize("size", [(30, 40), (64, 75), (120, 160), (173, 200)])
def test_depths_stay_between_those_of_valid_neighbours(size: tuple[int, int]) -> None:
    """A step from 1 m to 5 m behind an invalid band: neither a depth between the two nor a narrower band."""
    depth = np.full((120, 160), 1.0, np.float32)
    depth[:, 80:] = 5
    depth[:, 60:101] = 0
    fitted = fit({"image": np.zeros((120, 160, 3), np.uint8), "depth": depth}, size)["depth"]
    assert np.all(np.isclose(fitted, 0) | np.isclose(fitted, 1) | np.isclose(fitted, 5))
    scale = max(size[0] / 120, size[1] / 160)
    lengths = np.count_nonzero(fitted == 0, axis=1)
    assert np.all(np.abs(lengths - 41 * scale) <= 1)


@pytest.mark.parametrize("size", [(120, 160), (128, 160), (100, 150), (240, 320), (300, 350)])
def test_a_plane_stays_the_plane_the_new_intrinsics_see(size: tuple[int, int]) -> None:
    k = np.array([[259.4, 0, 150.3], [0, 261.7, 126.6], [0, 0, 1]])
    normal, distance = np.array([0.3, -0.55, -0.78]), -2.0

    def plane(k: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        rows, columns = np.indices(size)
        rays = np.stack([columns, rows, np.ones(size)], axis=-1) @ np.linalg.inv(k).T
        return distance / (rays @ normal)

    depth = plane(k, (240, 320)).astype(np.float32)
    assert depth.min() > 0
    assert depth.max() / depth.min() > 2
    normals = np.broadcast_to((normal / np.linalg.norm(normal)).astype(np.float32), (240, 320, 3))
    sample = {"image": np.zeros((240, 320, 3), np.uint8), "depth": depth, "normals": normals}
    fitted = fit(sample | {"intrinsics": k.astype(np.float32)}, size)
    inside = np.s_[2:-2, 2:-2]  # enlarging has no neighbours beyond the outermost centres
    expected = plane(fitted["intrinsics"].astype(np.float64), size)
    # Where cells end inside source pixels, their average is that of a staircase: up to 1/8 of a step off.
    step = max(np.abs(np.diff(np.log(depth), axis=axis)).max() for axis in (0, 1))
    whole = size in ((120, 160), (240, 320)) or size > (240, 320)
    np.testing.assert_allclose(fitted["depth"][inside], expected[inside], rtol=2e-5 if whole else step / 8)
    np.testing.assert_allclose(fitted["normals"], np.broadcast_to(normals[0, 0], (*size, 3)), atol=1e-6)


def test_intrinsics_follow_pixel_centres() -> None:
    k = np.array([[100, 0, 31.5], [0, 100, 11.5], [0, 0, 1]], np.float32)
    fitted = fit({"image": np.zeros((24, 64, 3), np.uint8), "intrinsics": k}, (12, 12))["intrinsics"]
    np.testing.assert_allclose(fitted, [[50, 0, 5.5], [0, 50, 5.5], [0, 0, 1]])  # the middle stays the middle
    unknown = fit({"image": np.zeros((24, 64, 3), np.uint8), "intrinsics": 0 * k}, (12, 12))["intrinsics"]
    assert not unknown.any()


def test_normals_that_cancel_are_invalid() -> None:
    normals = np.zeros((4, 4, 3), np.float32)
    normals[:, 0::2, 0], normals[:, 1::2, 0] = 1, -1
    normals[2:, :, 0], normals[2:, :, 2] = 0, -1
    fitted = fit({"image": np.zeros((4, 4, 3), np.uint8), "normals": normals}, (2, 2))["normals"]
    np.testing.assert_array_equal(fitted, [[[0, 0, 0]] * 2, [[0, 0, -1]] * 2])


def test_the_source_is_left_alone() -> None:
    sample = ramps((32, 32), 0)
    before = {key: value.copy() for key, value in sample.items()}
    for size in ((32, 32), (16, 16)):
        for value in fit(sample, size).values():
            value[...] = 0
    for key, value in before.items():
        np.testing.assert_array_equal(sample[key], value)
