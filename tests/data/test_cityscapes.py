"""Cityscapes in both layouts: what each file's numbers become, and what bad input is told."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl.data.cityscapes import CLASSES, Cityscapes
from mtl.errors import UserError

FULL = (1024, 2048)
CAMERA = {
    "extrinsic": {"baseline": 0.209313, "pitch": 0.038, "roll": 0.0, "x": 1.7, "y": 0.1, "yaw": -0.0195, "z": 1.22},
    "intrinsic": {"fx": 2262.52, "fy": 2265.3017905988554, "u0": 1096.98, "v0": 513.137},
}
"""The camera file of most of the set."""

TRAIN = ["aachen_000000_000019", "aachen_000001_000019", "zurich_000121_000019"]
VALIDATION = ["lindau_000000_000019"]


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, compress_level=1)


def file(kind: str, stem: str, ending: str) -> str:
    part = "val" if stem in VALIDATION else "train"
    return f"{kind}/{part}/{stem.split('_')[0]}/{stem}_{ending}"


def identifiers() -> np.ndarray:
    """All ids from 0 to 33, each in a column of 32 pixels; the last 960 pixels are 0."""
    ids = np.zeros(FULL, np.uint8)
    ids[:, : 34 * 32] = np.arange(34).repeat(32)
    return ids


def disparities() -> np.ndarray:
    """Rows of 128 pixels: missing, infinitely far, too fine, a sixteenth of a pixel, 1, 10 and 100 pixels, missing."""
    stored = np.array([0, 1, 16, 17, 257, 2561, 25601, 0], np.uint16)
    return np.broadcast_to(stored.repeat(128)[:, None], FULL).copy()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    for number, stem in enumerate(TRAIN + VALIDATION):
        save(root / file("leftImg8bit", stem, "leftImg8bit.png"), np.full((*FULL, 3), 10 * number, np.uint8))
        save(root / file("gtFine", stem, "gtFine_labelIds.png"), identifiers())
        save(root / file("disparity", stem, "disparity.png"), disparities())
        camera = root / file("camera", stem, "camera.json")
        camera.parent.mkdir(parents=True, exist_ok=True)
        camera.write_text(json.dumps(CAMERA))
    return root


@pytest.fixture
def official(written: Path, tmp_path: Path) -> Path:
    """The official layout, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "cityscapes"))


# The official layout


def test_the_official_layout_follows_the_contract(written: Path) -> None:
    data = Cityscapes(written, split="train", size=FULL)
    assert (data.info.name, data.info.targets) == ("Cityscapes", ("segmentation", "depth"))
    assert not data.info.inverse_depth
    assert [data.name(i) for i in range(len(data))] == TRAIN
    assert data.labelled("depth").tolist() == [True] * 3
    assert not data.labelled("normals").any()
    (sample,) = data.read([1], ["segmentation", "depth", "normals"])
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((*FULL, 3), "uint8"),
        "segmentation": (FULL, "uint8"),
        "depth": (FULL, "float32"),
        "intrinsics": ((3, 3), "float32"),
    }
    assert np.all(sample["image"] == 10)
    np.testing.assert_allclose(sample["intrinsics"], [[2262.52, 0, 1096.98], [0, 2265.3018, 513.137], [0, 0, 1]])
    assert set(data.read([0], [])[0]) == {"image", "intrinsics"}


def test_splits_are_the_official_ones(written: Path) -> None:
    for split, stems in {"train": TRAIN, "validation": VALIDATION, "all": TRAIN + VALIDATION}.items():
        data = Cityscapes(written, split=split, size=(8, 16))
        assert [data.name(i) for i in range(len(data))] == stems
    with pytest.raises(UserError, match="labels of Cityscapes' test pictures are not public"):
        Cityscapes(written, split="test", size=(8, 16))


def test_disparity_becomes_metres(written: Path) -> None:
    """At a disparity of one pixel, a point is as many baselines away as the focal length has pixels."""
    (sample,) = Cityscapes(written, split="train", size=FULL).read([0], ["depth"])
    unit = 0.209313 * 2262.52
    expected = [0, 0, 0, 16 * unit, unit, unit / 10, unit / 100, 0]
    np.testing.assert_allclose(sample["depth"][64::128, 1000], expected, rtol=1e-6)
    assert np.isfinite(sample["depth"].astype(np.float16)).all()  # which is how it is kept


@pytest.mark.parametrize("classes", [19, 7])
def test_ids_become_classes(written: Path, classes: int) -> None:
    """Ids by class and by group, as the benchmark's overview of its class definitions has them."""
    data = Cityscapes(written, split="train", size=FULL, classes=classes)
    (sample,) = data.read([0], ["segmentation"])
    nineteen = {
        **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
        **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
        **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
    }
    seven = {
        **{"flat": [7, 8], "construction": [11, 12, 13], "object": [17, 19, 20], "nature": [21, 22], "sky": [23]},
        **{"human": [24, 25], "vehicle": [26, 27, 28, 31, 32, 33]},
    }
    groups = {name: [i] for name, i in nineteen.items()} if classes == 19 else seven
    assert data.info.classes == CLASSES[classes] == tuple(groups)
    expected = np.full(34, 255)
    for index, ids in enumerate(groups.values()):
        expected[ids] = index
    np.testing.assert_array_equal(sample["segmentation"][500, 16 : 34 * 32 : 32], expected)


def test_the_camera_follows_the_fit(written: Path) -> None:
    """At half the size, pixel centres at integers move by half a new pixel."""
    (sample,) = Cityscapes(written, split="train", size=(512, 1024)).read([0], [])
    expected = [[1131.26, 0, (1096.98 + 0.5) / 2 - 0.5], [0, 2265.3017906 / 2, (513.137 + 0.5) / 2 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(sample["intrinsics"], expected, rtol=1e-6)


def test_labels_may_be_absent_or_fewer(official: Path) -> None:
    (official / file("gtFine", TRAIN[1], "gtFine_labelIds.png")).unlink()
    shutil.rmtree(official / "disparity")
    (official / file("camera", TRAIN[0], "camera.json")).unlink()
    data = Cityscapes(official, split="all", size=(8, 16))
    assert data.info.targets == ("segmentation",)
    assert data.labelled("segmentation").tolist() == [True, False, True, True]
    keys = [set(sample) for sample in data.read([0, 1], ["segmentation", "depth"])]
    assert keys == [{"image", "segmentation"}, {"image", "intrinsics"}]


# The .npy layout


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Three and two pictures of 16 x 32."""
    for part, count in {"train": 3, "val": 2}.items():
        for i in range(count):
            save(tmp_path / part / "image" / f"{i}.npy", np.full((16, 32, 3), i / 10))
            for classes in (7, 19):
                label = np.full((16, 32), classes - 1.0)
                label[0] = -1
                save(tmp_path / part / f"label_{classes}" / f"{i}.npy", label)
            inverse = np.full((16, 32, 1), 0.1 * (i + 1))
            inverse[:, ::2] = 0.02
            inverse[8:] = 0
            save(tmp_path / part / "depth" / f"{i}.npy", inverse)
    return tmp_path


def test_the_arrays_follow_the_contract(arrays: Path) -> None:
    data = Cityscapes(arrays, split="all", size=(16, 32))
    assert (data.info.targets, data.info.inverse_depth) == (("segmentation", "depth"), True)
    assert [data.name(i) for i in range(5)] == ["train/0", "train/1", "train/2", "val/0", "val/1"]
    assert len(Cityscapes(arrays, split="train", size=(16, 32))) == 3
    assert len(Cityscapes(arrays, split="validation", size=(16, 32))) == 2
    (sample,) = data.read([2], data.info.targets)
    assert {key: value.dtype.name for key, value in sample.items()} == {
        "image": "uint8",
        "segmentation": "uint8",
        "depth": "float32",
    }
    assert np.all(sample["image"] == 51)
    assert np.all(sample["segmentation"][0] == 255)
    assert np.all(sample["segmentation"][1:] == 18)
    np.testing.assert_allclose(sample["depth"][:8, 1::2], 0.3, rtol=1e-6)
    np.testing.assert_allclose(sample["depth"][:8, ::2], 0.02, rtol=1e-6)
    assert not sample["depth"][8:].any()
    assert set(data.read([0], [])[0]) == {"image"}


def test_inverse_depth_is_averaged_as_it_is(arrays: Path) -> None:
    """Half of 0.3 and half of 0.02 make 0.16, not the 0.0375 of averaged distances."""
    (sample,) = Cityscapes(arrays, split="train", size=(8, 16)).read([2], ["depth"])
    np.testing.assert_allclose(sample["depth"][:4], 0.16, rtol=1e-6)
    assert not sample["depth"][4:].any()


@pytest.mark.parametrize("folder", ["label", "label_7"])
def test_seven_classes_are_called_label_too(arrays: Path, folder: str) -> None:
    for part in ("train", "val"):
        shutil.rmtree(arrays / part / "label_19")
        (arrays / part / "label_7").rename(arrays / part / folder)
    data = Cityscapes(arrays, split="all", size=(16, 32), classes=7)
    assert data.info.classes == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    assert np.all(data.read([3], ["segmentation"])[0]["segmentation"][1:] == 6)
    with pytest.raises(UserError, match=r"no label_19/, but labels of 7 classes: ask for 7 classes"):
        Cityscapes(arrays, split="all", size=(16, 32))
    for part in ("train", "val"):
        shutil.rmtree(arrays / part / folder)
    assert Cityscapes(arrays, split="all", size=(16, 32)).info.targets == ("depth",)


# Bad input

Change = Callable[[Path], object]
IMAGE, LABEL, DISPARITY, CAMERA_FILE = (
    file(kind, TRAIN[1], ending)
    for kind, ending in {
        "leftImg8bit": "leftImg8bit.png",
        "gtFine": "gtFine_labelIds.png",
        "disparity": "disparity.png",
        "camera": "camera.json",
    }.items()
)


def holding(name: str, values: np.ndarray) -> Change:
    return lambda root: save(root / name, values)


def remove(name: str) -> Change:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def truncate(name: str) -> Change:
    def change(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])

    return change


def without(part: str, field: str) -> Change:
    """Leave a field out of a camera file."""
    camera = {key: {k: v for k, v in value.items() if (key, k) != (part, field)} for key, value in CAMERA.items()}
    return lambda root: (root / CAMERA_FILE).write_text(json.dumps(camera))


def saying(text: str) -> Change:
    return lambda root: (root / CAMERA_FILE).write_text(text)


def rename_labels(root: Path) -> None:
    for path in (root / "gtFine" / "train").glob("*/*"):
        path.rename(path.with_name("x" + path.name))


def wrong_id(value: int) -> np.ndarray:
    ids = identifiers()
    ids[3, 4] = value
    return ids


BAD_OFFICIAL: dict[str, tuple[Change, list[str]]] = {
    "neither layout": (remove("leftImg8bit"), ["cityscapes holds neither leftImg8bit/ nor train/image/"]),
    "absent": (lambda r: r.rename(r.with_name("other")), ["cityscapes does not exist"]),
    "no pictures": (
        remove("leftImg8bit/train"),
        ["leftImg8bit/train holds no picture", "leftImg8bit_trainvaltest.zip"],
    ),
    "other names": (rename_labels, ["no file in", "gtFine/train", "xaachen", "begin alike"]),
    "no camera": (remove("camera"), [f"{TRAIN[0]}_disparity.png has no camera file", "camera_trainvaltest.zip"]),
    "one camera less": (remove(CAMERA_FILE), [f"{TRAIN[1]}_disparity.png has no camera file"]),
    "resized": (
        holding(IMAGE, np.zeros((512, 1024, 3), np.uint8)),
        [IMAGE, "1024x512", "all of Cityscapes is 2048x1024"],
    ),
    "resized label": (holding(LABEL, np.zeros((512, 1024), np.uint8)), [LABEL, "1024x512"]),
    "label in colour": (holding(LABEL, np.zeros((*FULL, 3), np.uint8)), [LABEL, "8-bit RGB", "one channel"]),
    "disparity of 8 bits": (holding(DISPARITY, np.zeros(FULL, np.uint8)), [DISPARITY, "8-bit grey", "16-bit"]),
    "disparity all missing": (holding(DISPARITY, np.zeros(FULL, np.uint16)), [DISPARITY, "no measurement"]),
    "trainIds": (holding(LABEL, wrong_id(255)), [LABEL, "value 255 in 1 pixels", "0 to 33", "labelTrainIds"]),
    "id 34": (holding(LABEL, wrong_id(34)), [LABEL, "value 34"]),
    "truncated picture": (truncate(IMAGE), [IMAGE, "truncated"]),
    "truncated label": (truncate(LABEL), [LABEL, "truncated"]),
    "truncated disparity": (truncate(DISPARITY), [DISPARITY, "truncated"]),
    "camera without baseline": (
        without("extrinsic", "baseline"),
        [CAMERA_FILE, "'extrinsic.baseline': Field required"],
    ),
    "camera without fx": (without("intrinsic", "fx"), [CAMERA_FILE, "'intrinsic.fx': Field required"]),
    "camera without anything": (saying("{}"), [CAMERA_FILE, "'extrinsic': Field required"]),
    "camera without a baseline": (
        saying(json.dumps({**CAMERA, "extrinsic": {"baseline": 0}})),
        ["'extrinsic.baseline'", "greater than 0"],
    ),
    "camera is no JSON": (saying("fx: 1"), [CAMERA_FILE, "Invalid JSON", "camera_trainvaltest.zip"]),
}


@pytest.mark.parametrize("case", BAD_OFFICIAL)
def test_bad_official_files_get_one_sentence(official: Path, case: str) -> None:
    change, words = BAD_OFFICIAL[case]
    change(official)
    with pytest.raises(UserError) as caught:
        Cityscapes(official, split="train", size=(8, 16)).read(range(3), ["segmentation", "depth"])
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert "http" not in message
    assert not re.search(r"[.!?] [A-Z]", message), message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train/depth/1.npy", -0.1, "depth of -0.1 in 1 pixels"),
        ("train/depth/1.npy", np.nan, "depth of nan in 1 pixels"),
        ("train/image/1.npy", None, r"image/1.npy holds no pixel, its shape is \(0, \d+, 3\)"),
        ("train/label_19/1.npy", 19, "value 19 in 1 pixels, but the 19 classes are 0 to 18"),
    ],
)
def test_bad_arrays_get_one_sentence(arrays: Path, name: str, value: float | None, words: str) -> None:
    values = np.load(arrays / name)
    if value is None:
        values = values[:0]
    else:
        values[2, 3] = value
    np.save(arrays / name, values)
    with pytest.raises(UserError, match=words):
        Cityscapes(arrays, split="train", size=(8, 16)).read([1], ["segmentation", "depth"])


def test_other_numbers_of_classes(arrays: Path) -> None:
    with pytest.raises(UserError, match="19 or 7 classes, not 34"):
        Cityscapes(arrays, split="train", size=(8, 16), classes=34)
