"""albumentations pipelines from YAML against planes in closed form, ramps, and albumentations itself."""

import multiprocessing
import random
import warnings
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml
from albumentations.core.serialization import serialize_enum
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from mtl.augmentation import pipeline as pipeline_module
from mtl.augmentation.pipeline import Pipeline
from mtl.data.sample import Sample
from mtl.errors import UserError

SIZE = (56, 56)
CAMERA = np.array([[70, 0, 25.5], [0, 64, 30], [0, 0, 1]])
NORMAL = np.array([0.3, -0.2, -1]) / np.linalg.norm([0.3, -0.2, -1])
OFFSET = -2.5

EXACT: list[Any] = [
    "HorizontalFlip",
    "VerticalFlip",
    "Transpose",
    "D4",
    "SquareSymmetry",
    "RandomRotate90",
    "TimeReverse",
    {"RandomCrop": {"height": 40, "width": 44}},
    {"RandomCrop": {"height": 60, "width": 40, "pad_if_needed": True, "pad_position": "random"}},
    {"CenterCrop": {"height": 41, "width": 44}},
    {"Crop": {"x_min": 3, "y_min": 10, "x_max": 50, "y_max": 44}},
    {"RandomCropFromBorders": {}},
    {"Pad": {"padding": [3, 5, 7, 2], "border_mode": 4}},
    {"PadIfNeeded": {"min_height": 70, "min_width": 64, "position": "random"}},
    {"CropAndPad": {"px": [-6, 7], "keep_size": False}},
]
"""What moves whole pixels."""

PLANAR: list[Any] = [
    {"Affine": {"rotate": [-40, 40], "scale": {"x": [0.7, 1.4], "y": [0.7, 1.4]}, "shear": [-15, 15]}},
    {"Affine": {"rotate": [-40, 40], "translate_percent": [-0.2, 0.2], "fit_output": True}},
    {"Affine": {"rotate": 25, "scale": 1.3, "border_mode": 4}},
    {"Affine": {"scale": {"x": -1.1, "y": 1.2}, "rotate": 10}},
    {"ShiftScaleRotate": {"rotate_limit": 60, "border_mode": 1}},
    {"Rotate": {"limit": 70}},
    {"Rotate": {"limit": 30, "crop_border": True}},
    {"SafeRotate": {"limit": 60}},
    {"RandomResizedCrop": {"size": [50, 47], "scale": [0.3, 0.9]}},
    {"RandomSizedCrop": {"size": [50, 47], "min_max_height": [20, 40]}},
    {"CropAndPad": {"percent": [-0.2, 0.2]}},
    {"Resize": {"height": 43, "width": 75}},
    {"Resize": {"height": 28, "width": 28}},
    {"Resize": {"height": 112, "width": 168}},
    {"RandomScale": {"scale_limit": 0.4}},
    {"LongestMaxSize": {"max_size": 37}},
    {"SmallestMaxSize": {"max_size": 81}},
]
"""What interpolates, and leaves depth as it is."""

TURNING: list[Any] = [
    {"Perspective": {"scale": [0.05, 0.15]}},
    {"Perspective": {"scale": [0.05, 0.15], "keep_size": False}},
    {"Perspective": {"scale": [0.05, 0.15], "fit_output": True, "border_mode": 2}},
]

BENDING: list[Any] = [
    {"ElasticTransform": {"alpha": 60, "sigma": 6}},
    {"GridDistortion": {"distort_limit": 0.2, "border_mode": 4}},
    {"OpticalDistortion": {"distort_limit": 0.4}},
    {"OpticalDistortion": {"distort_limit": 0.3, "mode": "fisheye"}},
    {"ThinPlateSpline": {}},
    {"PiecewiseAffine": {"scale": 0.03, "nb_rows": 3, "nb_cols": 3}},
]

MIXED: list[Any] = [
    {"HorizontalFlip": {"p": 0.5}},
    {"SomeOf": {"n": 2, "transforms": [{"Rotate": {"limit": 30, "p": 1}}, {"Perspective": {"p": 1}}, "VerticalFlip"]}},
    {"Sequential": {"p": 0.8, "transforms": [{"RandomScale": {"scale_limit": [0, 0.5], "p": 1}}, "ColorJitter"]}},
    {"RandomCrop": {"height": SIZE[0], "width": SIZE[1]}},
    {"OneOf": {"transforms": ["GaussianBlur", {"MotionBlur": {"blur_limit": [3, 7], "p": 2 / 3}}], "p": 0.5}},
    {"CoarseDropout": {"fill_mask": 255, "p": 0.3}},
]


def name_of(node: Any) -> str:
    return node if isinstance(node, str) else next(iter(node))


def always(node: Any) -> list[Any]:
    """Return a pipeline of one transform that is always applied."""
    name = name_of(node)
    return [{name: {**({} if isinstance(node, str) else node[name]), "p": 1.0}}]


def free(spec: Any, monkeypatch: pytest.MonkeyPatch, seed: int, sample: Sample) -> Sample:
    """Return what a pipeline makes of a sample, whatever the result's size."""
    monkeypatch.setattr(pipeline_module, "_TRIALS", 0)
    pipeline = Pipeline(spec, "file.yaml", SIZE)
    dry = Pipeline(spec, "file.yaml", SIZE)._compose
    generator = np.random.default_rng(seed)
    dry.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    pipeline.size = dry(image=sample["image"])["image"].shape[:2]
    return pipeline(sample, np.random.default_rng(seed))


def plane(normal: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return the depth of the plane of all points p with normal . p = OFFSET."""
    rows, columns = np.indices(size)
    rays = np.stack([columns, rows, np.ones(size)], axis=-1) @ np.linalg.inv(intrinsics).T
    return np.asarray(OFFSET / (rays @ normal))


def scene() -> Sample:
    """Return a plane, with each pixel's column and row in the image and its row as class."""
    rows, columns = np.indices(SIZE)
    return {
        "image": np.stack([4 * columns + 10, 4 * rows + 10, 0 * rows], axis=-1).astype(np.uint8),
        "segmentation": rows.astype(np.uint8),
        "depth": plane(NORMAL, CAMERA).astype(np.float32),
        "normals": np.broadcast_to(NORMAL, (*SIZE, 3)).astype(np.float32),
        "intrinsics": CAMERA.astype(np.float32),
    }


def draw(seed: int, size: tuple[int, int] = SIZE) -> Sample:
    """Return a random sample with every target."""
    generator = np.random.default_rng(seed)
    normals = generator.normal(size=(*size, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return {
        "image": generator.integers(0, 256, (*size, 3), dtype=np.uint8),
        "segmentation": generator.choice(np.array([3, 7, 255], np.uint8), size),
        "depth": generator.uniform(1, 9, size).astype(np.float32),
        "normals": normals.astype(np.float32),
        "intrinsics": CAMERA.astype(np.float32),
    }


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


# Geometry


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("node", [*EXACT, *PLANAR, *TURNING], ids=str)
def test_a_plane_stays_a_plane_of_the_new_camera(node: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The camera turns about its own centre, so that normal . p = OFFSET holds with what is said to be new."""
    result = free(always(node), monkeypatch, seed, scene())
    valid = result["depth"] > 0
    assert valid.mean() > 0.2
    assert np.array_equal(valid, result["normals"].any(axis=-1))
    assert np.array_equal(valid, result["segmentation"] != 255)
    normal = result["normals"][valid][0].astype(np.float64)
    np.testing.assert_allclose(result["normals"][valid], np.broadcast_to(normal, (valid.sum(), 3)), atol=1e-6)
    assert abs(np.linalg.norm(normal) - 1) < 1e-6
    camera = result["intrinsics"].astype(np.float64)
    assert np.all(np.diag(camera) > 0)
    assert not np.tril(camera, -1).any()
    assert camera[2, 2] == 1
    ratio = result["depth"][valid] / plane(normal, camera, valid.shape)[valid]
    if node in EXACT:
        np.testing.assert_allclose(ratio, 1, rtol=2e-6)
    else:
        # A pixel shows a neighbour's depth, up to 0.71 px of the original away; the error has no direction.
        step = np.abs(np.gradient(np.log(scene()["depth"]))).sum(axis=0).max()
        assert np.abs(ratio - 1).max() < 1.2 * step
        assert abs(ratio.mean() - 1) < 0.02 * step
    if node not in TURNING:
        assert abs(normal[2] - NORMAL[2]) < 1e-6
        assert np.isin(result["depth"][valid], scene()["depth"]).all()  # metres, not interpolated


@pytest.mark.parametrize("node", [*EXACT, *PLANAR, *TURNING, *BENDING], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_labels_show_what_the_image_shows(node: Any, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ramp in the image and as class agree in the mean to within 0.02 px.

    It is in the image upwards and downwards, so that the rounding of bytes cancels.
    """
    ramp = np.indices(SIZE)[axis]
    image = np.stack([4 * ramp + 10, 240 - 4 * ramp, 0 * ramp], axis=-1).astype(np.uint8)
    sample = {"image": image, "segmentation": ramp.astype(np.uint8)}
    differences = []
    # A grid's lines are straight: all rows of a draw are one measurement.
    for seed in range(40 if name_of(node) == "GridDistortion" else 6):
        result = free(always(node), monkeypatch, seed, sample)
        inside = binary_erosion(result["segmentation"] != 255, np.ones((5, 5)))
        up, down, _ = np.moveaxis(result["image"].astype(np.float64), -1, 0)
        differences.append((result["segmentation"] - (up - down + 230) / 8)[inside])
    total = np.concatenate(differences)
    assert len(total) > 1000
    assert abs(total.mean()) < 0.02
    assert np.abs(total).max() < (1e-9 if node in EXACT else 0.8)


@pytest.mark.parametrize(
    "node",
    [*BENDING, "RandomGridShuffle", {"GridElasticDeform": {"num_grid_xy": [3, 3], "magnitude": 6}}],
    ids=str,
)
def test_what_bends_the_picture_keeps_depth_and_normals_and_has_no_camera(node: Any) -> None:
    result = Pipeline(always(node), "file.yaml", SIZE)(scene(), np.random.default_rng(1))
    valid = result["segmentation"] != 255
    moved = result["segmentation"] != scene()["segmentation"]
    assert (valid & moved).mean() > 0.2
    assert np.isin(result["depth"][valid], scene()["depth"]).all()
    np.testing.assert_array_equal(result["normals"][valid], scene()["normals"][valid])
    assert not result["depth"][~valid].any()
    assert not result["normals"][~valid].any()
    assert not result["intrinsics"].any()


def test_shuffled_tiles_take_their_labels_along() -> None:
    result = Pipeline(always({"RandomGridShuffle": {"grid": [3, 3]}}), "f", SIZE)(scene(), np.random.default_rng(1))
    np.testing.assert_array_equal(4 * result["segmentation"] + 10, result["image"][..., 1])


@pytest.mark.parametrize("angle", [-35, 20, 90])
def test_a_turned_picture_turns_normals_by_its_angle_also_where_the_camera_is_unknown(angle: float) -> None:
    """albumentations turns counterclockwise on the screen, where y points down."""
    sample = scene()
    del sample["intrinsics"]
    result = Pipeline(always({"Rotate": {"limit": [angle, angle]}}), "f", SIZE)(sample, np.random.default_rng(0))
    radians = np.deg2rad(angle)
    turned = [[np.cos(radians), np.sin(radians), 0], [-np.sin(radians), np.cos(radians), 0], [0, 0, 1]] @ NORMAL
    valid = result["depth"] > 0
    np.testing.assert_allclose(result["normals"][valid], np.broadcast_to(turned, (valid.sum(), 3)), atol=1e-6)
    assert "intrinsics" not in result
    unknown = Pipeline(always("HorizontalFlip"), "f", SIZE)(
        sample | {"intrinsics": np.zeros((3, 3), np.float32)}, np.random.default_rng(0)
    )
    assert not unknown["intrinsics"].any()
    np.testing.assert_allclose(unknown["normals"], sample["normals"] * [-1, 1, 1], atol=1e-7)


def test_one_transform_after_another_makes_one_camera() -> None:
    """Flip, perspective, roll, stretch and crop in one go: still a plane of one camera."""
    spec = [
        "HorizontalFlip",
        {"Perspective": {"scale": [0.1, 0.15]}},
        {"Affine": {"rotate": [20, 40], "scale": {"x": [1.1, 1.3], "y": [0.8, 0.9]}}},
        {"Resize": {"height": 80, "width": 90}},
        {"RandomCrop": {"height": SIZE[0], "width": SIZE[1]}},
    ]
    pipeline = Pipeline([always(node)[0] for node in spec], "f", SIZE)
    for seed in range(5):
        result = pipeline(scene(), np.random.default_rng(seed))
        valid = result["depth"] > 0
        normal = result["normals"][valid][0].astype(np.float64)
        ratio = result["depth"][valid] / plane(normal, result["intrinsics"].astype(np.float64))[valid]
        assert np.abs(ratio - 1).max() < 0.02
        assert abs(ratio.mean() - 1) < 3e-4


def test_inverse_depth_turns_the_other_way() -> None:
    spec = always({"Perspective": {"scale": [0.1, 0.15]}})
    metric = Pipeline(spec, "f", SIZE)(scene(), np.random.default_rng(3))["depth"]
    inverse = scene() | {"depth": 1 / scene()["depth"]}
    turned = Pipeline(spec, "f", SIZE, inverse_depth=True)(inverse, np.random.default_rng(3))["depth"]
    valid = metric > 0
    np.testing.assert_allclose(turned[valid], 1 / metric[valid], rtol=1e-5)
    assert not turned[~valid].any()


def test_a_perspective_wants_intrinsics_for_depth_and_normals_only() -> None:
    pipeline = Pipeline(always("Perspective"), "file.yaml", SIZE)
    sample = {name: values for name, values in scene().items() if name != "intrinsics"}
    with pytest.raises(UserError, match=r"^file.yaml: Perspective turns the camera.*intrinsics are known"):
        pipeline(sample, np.random.default_rng(0))
    result = pipeline({name: sample[name] for name in ("image", "segmentation")}, np.random.default_rng(0))
    assert result.keys() == {"image", "segmentation"}


# Labels


@pytest.mark.parametrize("border_mode", [0, 1, 2, 3, 4])
def test_what_comes_from_outside_is_invalid_whatever_the_border_shows(border_mode: int) -> None:
    arguments = {"border_mode": border_mode, "fill_mask": 9, "fill": 40}
    for node in ({"Affine": {"scale": 0.5, **arguments}}, {"GridDistortion": {"distort_limit": 0.5, **arguments}}):
        pipeline = Pipeline(always(node), "f", SIZE)
        for seed in range(3):
            result = pipeline(draw(seed), np.random.default_rng(seed))
            assert set(np.unique(result["segmentation"])) <= {3, 7, 255}
            assert np.array_equal(result["depth"] == 0, ~result["normals"].any(axis=-1))
    shrunk = Pipeline(always({"Affine": {"scale": 0.5, **arguments}}), "f", SIZE)(draw(0), np.random.default_rng(0))
    assert (shrunk["depth"] > 0).mean() == 0.25


@pytest.mark.parametrize(
    "node", [{"CoarseDropout": {"hole_height_range": [0.3, 0.4]}}, {"GridDropout": {}}, {"Erasing": {}}], ids=str
)
def test_holes_hide_labels_only_where_fill_mask_is_given(node: dict[str, Any]) -> None:
    ((name, arguments),) = node.items()
    sample = draw(0)
    generator = np.random.default_rng
    kept = Pipeline(always(node), "f", SIZE)(sample, generator(0))
    assert same(kept | {"image": sample["image"]}, sample)
    hidden = Pipeline(always({name: {**arguments, "fill_mask": 7}}), "f", SIZE)(sample, generator(0))
    hole = (kept["image"] == 0).all(axis=-1)
    assert 0.02 < hole.mean() < 0.9
    assert np.array_equal(hidden["depth"], np.where(hole, 0, sample["depth"]))
    assert np.array_equal(hidden["segmentation"], np.where(hole, 255, sample["segmentation"]))
    assert np.array_equal(hidden["normals"], np.where(hole[..., None], 0, sample["normals"]))
    np.testing.assert_array_equal(hidden["intrinsics"], sample["intrinsics"])


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(12, 70), st.integers(12, 70)),
    targets=st.sets(st.sampled_from(["segmentation", "depth", "normals"])),
    camera=st.sampled_from(["absent", "unknown", "known"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_contract_holds_for_any_shape_and_subset(
    size: tuple[int, int], targets: set[str], camera: str, seed: int
) -> None:
    sample = {name: values for name, values in draw(seed, size).items() if name in {"image", *targets}}
    if camera != "absent":
        sample["intrinsics"] = (CAMERA * (camera == "known")).astype(np.float32)
    before = {name: values.copy() for name, values in sample.items()}
    spec = [
        "D4",
        {"Affine": {"rotate": 30, "p": 0.7}},
        "ElasticTransform",
        {"Resize": dict(zip(("height", "width"), size, strict=True))},
    ]
    result = Pipeline(spec, "f", size)(sample, np.random.default_rng(seed))
    assert same(sample, before)
    assert {name: (values.shape, values.dtype) for name, values in result.items()} == {
        name: (values.shape, values.dtype) for name, values in sample.items()
    }
    if "segmentation" in targets:
        assert set(np.unique(result["segmentation"])) <= {3, 7, 255}
    if "depth" in targets:
        assert np.isin(result["depth"], [0, *sample["depth"].ravel()]).all()
    if "normals" in targets:
        lengths = np.linalg.norm(result["normals"], axis=-1)
        assert np.all((lengths == 0) | (np.abs(lengths - 1) < 1e-5))


# Draws


def run_in_worker(pipeline: Pipeline) -> list[Sample]:
    return [pipeline(draw(0), np.random.default_rng(seed)) for seed in range(6)]


def test_draws_are_a_function_of_the_generator_also_in_a_spawned_worker() -> None:
    worked = Pipeline(MIXED, "f", SIZE)
    first = run_in_worker(worked)
    for one, other in zip(first, run_in_worker(worked), strict=True):
        assert same(one, other)
    assert len({result["image"].tobytes() for result in first}) == 6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for one, other in zip(first, pool.apply(run_in_worker, (worked,)), strict=True):
            assert same(one, other)


def test_transforms_draw_independently() -> None:
    """With one seed for each of them, two flips would always come together and be no flip."""
    pipeline = Pipeline(
        [{"HorizontalFlip": {"p": 0.5}}, {"Sequential": {"transforms": [{"VerticalFlip": {"p": 0.5}}], "p": 1}}],
        "f",
        SIZE,
    )
    sample = {"image": scene()["image"]}
    corners = [tuple(pipeline(sample, np.random.default_rng(seed))["image"][0, 0, :2] > 100) for seed in range(200)]
    assert min(corners.count(corner) for corner in set(corners)) > 25
    assert len(set(corners)) == 4


@pytest.mark.parametrize(
    "name", [name for name, kind in vars(A).items() if isinstance(kind, type) and pipeline_module._usable(kind)]
)
def test_every_transform_draws_from_the_generator_alone(name: str) -> None:
    """Global generators, an earlier call and another instance make no difference."""
    required = {
        **{name: {"height": 20, "width": 20} for name in ("Resize", "RandomCrop", "CenterCrop")},
        "Crop": {"x_max": 20, "y_max": 20},
        "PadIfNeeded": {"min_height": 24, "min_width": 20},
        "RandomResizedCrop": {"size": [20, 20]},
        "RandomSizedCrop": {"size": [20, 20], "min_max_height": [5, 15]},
        "CropAndPad": {"px": [-3, 3]},
        **{name: {"max_size": 20} for name in ("LongestMaxSize", "SmallestMaxSize")},
        "FrequencyMasking": {"freq_mask_param": 9},
        "TimeMasking": {"time_mask_param": 9},
        "GridElasticDeform": {"num_grid_xy": [2, 2], "magnitude": 3},
    }
    rest = [{"Resize": {"height": 20, "width": 20}}]
    spec = always({name: required.get(name, {})})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        state = np.random.get_state()[1].copy(), random.getstate()
        worked, fresh = (Pipeline(spec + rest, "f", (20, 20)) for _ in range(2))
        sample = draw(0, (20, 20))
        worked(sample, np.random.default_rng(1))
        one = worked(sample, np.random.default_rng(5))
        assert np.array_equal(np.random.get_state()[1], state[0])
        assert random.getstate() == state[1]
        assert same(one, fresh(sample, np.random.default_rng(5)))
        assert (one["image"].shape, one["image"].dtype) == ((20, 20, 3), np.uint8)


# Both forms


def reference() -> A.Compose:
    """Return `MIXED` as a person writes it in Python."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.SomeOf([A.Rotate(limit=30, p=1), A.Perspective(p=1), A.VerticalFlip()], n=2),
            A.Sequential([A.RandomScale(scale_limit=(0, 0.5), p=1), A.ColorJitter()], p=0.8),
            A.RandomCrop(height=SIZE[0], width=SIZE[1]),
            A.OneOf([A.GaussianBlur(), A.MotionBlur(blur_limit=(3, 7), p=2 / 3)], p=0.5),
            A.CoarseDropout(fill_mask=255, p=0.3),
        ]
    )


def test_both_forms_and_albumentations_itself_make_the_same() -> None:
    written = yaml.safe_load(yaml.safe_dump(serialize_enum(A.to_dict(reference()))))
    short, long = Pipeline(yaml.safe_load(yaml.safe_dump(MIXED)), "f", SIZE), Pipeline(written, "f", SIZE)
    theirs = reference()
    for seed in range(12):
        sample = draw(seed)
        result = short(sample, np.random.default_rng(seed))
        assert same(result, long(sample, np.random.default_rng(seed)))
        generator = np.random.default_rng(seed)
        theirs.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        np.testing.assert_array_equal(result["image"], theirs(image=sample["image"])["image"])


@pytest.mark.parametrize(
    "transform",
    [
        A.SafeRotate(limit=10, p=1),
        A.Affine(translate_percent=0.1, p=1),
        A.ImageCompression(p=1),
        A.RandomOrder([A.HorizontalFlip(p=1), A.ToGray()], n=2),
        A.OneOrOther(A.HorizontalFlip(), A.VerticalFlip()),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_albumentations_writes_is_read(transform: Any) -> None:
    """Arguments of base classes included, which the classes themselves do not take."""
    written = serialize_enum(A.to_dict(transform))
    full = written["transform"] | {"__class_fullname__": f"albumentations.any.{type(transform).__name__}"}
    one, other = (Pipeline(spec, "f", SIZE) for spec in (written, full))
    image = draw(0)["image"]
    generator = np.random.default_rng(2)
    theirs = A.Compose([transform])
    theirs.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    expected = theirs(image=image)["image"]
    for pipeline in (one, other):
        np.testing.assert_array_equal(pipeline({"image": image}, np.random.default_rng(2))["image"], expected)


# Bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"HorizontalFlip": {}}, "a pipeline is a list of transforms"),
        ("HorizontalFlip", "a pipeline is a list of transforms"),
        (None, "a pipeline is a list of transforms"),
        ([["HorizontalFlip"]], "a transform is written 'Name'"),
        ([{"HorizontalFlip": {}, "VerticalFlip": {}}], "a transform is written 'Name'"),
        ([{"Affine": 3}], "a transform is written 'Name'"),
        (["HorizontalFlop"], "there is no transform 'HorizontalFlop' in albumentations 2.0.8 (did you mean"),
        (["random"], "there is no transform 'random'"),
        (["DualTransform"], "DualTransform is for other data"),
        ({"transform": {"__class_fullname__": "os.system"}}, "os.system is no transform of albumentations"),
        ({"transform": {"__class_fullname__": "albumentations.os.system"}}, "there is no transform 'system'"),
        ([{"Affine": {"rotat": 3}}], "Affine has no argument 'rotat' (did you mean 'rotate'?); it takes scale, "),
        ([{"HorizontalFlip": {"strict": True}}], "HorizontalFlip has no argument 'strict'"),
        ([{"Affine": {"rotate": "far"}}], "Affine: rotate: Input should be a valid tuple, not 'far'"),
        ([{"Posterize": {"num_bits": 9}}], "Posterize: num_bits: "),
        ([{"CropAndPad": {}}], "CropAndPad: "),
        ([], "Compose needs 'transforms', a list of at least one transform, not []"),
        ([{"PadIfNeeded": {"min_height": None}}], "PadIfNeeded: "),
        ([{"Resize": {"height": 3}}], "Resize: width: Field required"),
        ([{"RandomRotate90": {"p": 2}}], "RandomRotate90: p is a probability from 0 to 1, not 2"),
        ([{"OneOf": {"transforms": ["ToGray"], "p": "often"}}], "OneOf: p is a probability from 0 to 1, not 'often'"),
        ([{"OneOf": {"p": 1}}], "OneOf needs 'transforms'"),
        ([{"OneOf": {"transforms": []}}], "OneOf needs 'transforms'"),
        ([{"OneOf": {"transforms": [{"ToGray": {"p": 0}}]}}], "OneOf chooses by the probabilities"),
        ([{"SomeOf": {"transforms": ["ToGray"], "n": 2}}], "SomeOf: n is 2, and there are only 1"),
        ([{"Compose": {"transforms": ["ToGray"], "seed": 3}}], "Compose has no argument 'seed'"),
        ([{"Compose": {"transforms": ["ToGray"], "bbox_params": {"format": "coco"}}}], "no argument 'bbox_params'"),
        (["Normalize"], "Normalize changes the type of the image, which stays uint8"),
        ([{"OneOf": {"transforms": ["ToFloat"]}}], "ToFloat changes the type of the image"),
        (["ToTensorV2"], "ToTensorV2 changes the type of the image"),
        (["MaskDropout"], "MaskDropout looks for objects in masks or boxes"),
        (["Mosaic"], "Mosaic needs other pictures"),
        (["CubicSymmetry"], "CubicSymmetry is for other data"),
        (["Morphological"], "Morphological grows and shrinks regions"),
        (["Lambda"], "Lambda runs code"),
        ([{"Rotate": {"mask_interpolation": 1}}], "Rotate: labels are never interpolated"),
        (
            [{"Resize": {"height": 9, "width": 9, "area_for_downscale": "image_mask"}}],
            "Resize: labels are never averaged",
        ),
        ([{"PixelDropout": {"mask_drop_value": 0}}], "PixelDropout: labels stay"),
        ([{"RandomCrop": {"height": 20, "width": 30}}], "makes a picture of 20 x 30 x 3 out of one of 56 x 56 x 3"),
        ([{"RandomScale": {"p": 0.9}}], "where all have to be 56 x 56 x 3: end it with"),
        ([{"RandomCrop": {"height": 99, "width": 99}}], "the pipeline fails on a picture of 56 x 56: Crop size"),
        ([{"ToGray": {"num_output_channels": 1, "p": 1}}], "makes a picture of 56 x 56 out of one of 56 x 56 x 3"),
    ],
)
def test_bad_input_is_one_sentence_that_says_where(spec: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pipeline(spec, "file.yaml", SIZE)
    sentence = str(caught.value)
    assert sentence.startswith("file.yaml: ")
    assert message in sentence
    assert "\n" not in sentence
    assert "http" not in sentence


def test_a_size_that_no_trial_has_shown_is_found_in_use() -> None:
    pipeline = Pipeline([{"RandomScale": {"scale_limit": [0.5, 0.5], "p": 0.001}}], "file.yaml", SIZE)
    pipeline._compose.transforms[0].p = 1
    with pytest.raises(UserError, match=r"^file.yaml: the pipeline makes a picture of 84 x 84 x 3"):
        pipeline(draw(0), np.random.default_rng(0))
