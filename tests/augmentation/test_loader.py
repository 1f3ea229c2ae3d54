"""Loader-side augmentation against planes in closed form, and its draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.augmentation.loader import LoaderAugmentation, mirror
from mtl.data.sample import Sample

SIZE = (24, 33)
seeds = st.integers(0, 2**32 - 1)


def plane(normal: np.ndarray, offset: float, intrinsics: np.ndarray) -> Sample:
    """Return depth and normals of the plane of all points p with normal . p = offset.

    The ray through pixel (u, v) is K^-1 (u, v, 1), whose third component is 1, so that its parameter where it
    meets the plane is the depth along the optical axis.
    """
    rows, columns = np.indices(SIZE)
    rays = np.stack([columns, rows, np.ones(SIZE)], axis=-1) @ np.linalg.inv(intrinsics).T
    return {
        "depth": (offset / (rays @ normal)).astype(np.float32),
        "normals": np.broadcast_to(normal, (*SIZE, 3)).astype(np.float32),
    }


def draw(seed: int) -> Sample:
    """Return a sample with every target, a strip of each without labels."""
    generator = np.random.default_rng(seed)
    normals = generator.normal(size=(*SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, :3] = 0
    return {
        "image": generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        "segmentation": generator.integers(0, 256, SIZE, dtype=np.uint8),
        "depth": generator.uniform(0, 9, SIZE).astype(np.float32),
        "normals": normals.astype(np.float32),
        "intrinsics": np.array([[30, 0, 12.5], [0, 31, 9], [0, 0, 1]], np.float32),
    }


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


# The mirror


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_mirroring_twice_changes_nothing(seed: int) -> None:
    sample = draw(seed)
    before = {name: values.copy() for name, values in sample.items()}
    once = mirror(sample)
    assert same(mirror(once), sample)
    assert same(sample, before)
    assert not any(np.array_equal(once[name], sample[name]) for name in sample)
    assert all(values.flags.c_contiguous for values in once.values())


@settings(max_examples=50, deadline=None)
@given(
    tilt=st.floats(-0.5, 0.5),
    lean=st.floats(-0.5, 0.5),
    focal=st.floats(40, 90),
    cx=st.floats(3, SIZE[1] - 4),
    cy=st.floats(3, SIZE[0] - 4),
)
def test_a_mirrored_plane_is_the_mirror_worlds_plane(
    tilt: float, lean: float, focal: float, cx: float, cy: float
) -> None:
    """Mirroring the world in x gives the plane (-nx, ny, nz) . p = offset, seen by a camera with W - 1 - cx."""
    normal = np.array([tilt, lean, -1]) / np.linalg.norm([tilt, lean, -1])
    offset = -2.5
    camera = np.array([[focal, 0, cx], [0, 1.1 * focal, cy], [0, 0, 1]])
    image = np.zeros((*SIZE, 3), np.uint8)
    mirrored = mirror(plane(normal, offset, camera) | {"image": image, "intrinsics": camera.astype(np.float32)})

    other = camera.copy()
    other[0, 2] = SIZE[1] - 1 - cx
    np.testing.assert_allclose(mirrored["intrinsics"], other, rtol=1e-6)
    expected = plane(normal * [-1, 1, 1], offset, other)
    np.testing.assert_allclose(mirrored["depth"], expected["depth"], rtol=1e-5)
    np.testing.assert_allclose(mirrored["normals"], expected["normals"], atol=1e-6)


def test_labels_stay_with_their_pixels() -> None:
    """Each map holds its pixel's column; after the mirror all hold W - 1 minus it."""
    columns = np.broadcast_to(np.arange(SIZE[1]), SIZE)
    mirrored = mirror(
        {
            "image": np.repeat(columns[..., None], 3, axis=-1).astype(np.uint8),
            "segmentation": columns.astype(np.uint8),
            "depth": columns.astype(np.float32),
        }
    )
    assert mirrored.keys() == {"image", "segmentation", "depth"}
    for values in (*np.moveaxis(mirrored["image"], -1, 0), mirrored["segmentation"], mirrored["depth"]):
        np.testing.assert_array_equal(values, SIZE[1] - 1 - columns)


def test_an_unknown_camera_stays_unknown_and_a_missing_normal_missing() -> None:
    mirrored = mirror(draw(0) | {"intrinsics": np.zeros((3, 3), np.float32)})
    assert not mirrored["intrinsics"].any()
    assert not mirrored["normals"][:, -3:].any()


# The policies


def augment(policy: str, sample: Sample, seed: int) -> Sample:
    return LoaderAugmentation(policy)(sample, np.random.default_rng(seed))


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_colour_leaves_labels_alone_and_images_images(seed: int) -> None:
    sample = draw(0)
    before = {name: values.copy() for name, values in sample.items()}
    changed = augment("colour", sample, seed)
    assert (changed["image"].shape, changed["image"].dtype) == ((*SIZE, 3), np.uint8)
    assert same(changed | {"image": sample["image"]}, sample)
    assert same(sample, before)


@pytest.mark.parametrize("policy", ["colour", "light"])
def test_draws_are_a_function_of_the_generator(policy: str) -> None:
    """One object that has worked before and a fresh one agree, as two workers have to."""
    worked = LoaderAugmentation(policy)
    images = set()
    for seed in range(30):
        changed = worked(draw(0), np.random.default_rng(seed))
        assert same(changed, augment(policy, draw(0), seed))
        images.add(changed["image"].tobytes())
    assert len(images) >= 28  # a draw may change nothing, rarely


def test_draws_do_not_depend_on_or_touch_the_global_generator() -> None:
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = augment("light", draw(0), 5)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert same(first, augment("light", draw(0), 5))


def test_light_mirrors_half_of_the_samples_and_all_of_a_sample() -> None:
    sample = draw(0)
    opposite = mirror(sample)
    labels = [name for name in sample if name != "image"]
    augmentation = LoaderAugmentation("light")
    flips = 0
    for seed in range(200):
        changed = augmentation(sample, np.random.default_rng(seed))
        flipped = np.array_equal(changed["segmentation"], opposite["segmentation"])
        reference = opposite if flipped else sample
        assert all(np.array_equal(changed[name], reference[name]) for name in labels)
        flips += flipped
    assert 72 <= flips <= 128  # four standard deviations


def test_light_mirrors_the_image_with_its_labels() -> None:
    """A dark left half beside a bright right half stays recognisable under any change of colours."""
    sample = draw(0)
    columns = np.broadcast_to(np.arange(SIZE[1]), SIZE)
    sample["segmentation"] = (columns > SIZE[1] // 2).astype(np.uint8)
    sample["image"] = np.repeat(60 + 120 * sample["segmentation"][..., None], 3, axis=-1)
    for seed in range(40):
        changed = augment("light", sample, seed)
        bright = changed["segmentation"] == 1
        assert changed["image"][bright].mean() > changed["image"][~bright].mean() + 30
