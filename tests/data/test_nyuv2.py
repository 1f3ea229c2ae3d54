"""NYUv2 in both layouts: what each file's numbers become, which samples a split has, what bad input is told."""

import itertools
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from torch.utils.data import DataLoader, Dataset

from mtl.data.nyuv2 import CLASSES, INTRINSICS, THIRTEEN_OF_FORTY, NYUv2
from mtl.data.scenes import Scenes
from mtl.errors import UserError

MAT = "nyu_depth_v2_labeled.mat"
FULL = (480, 640)
SCENES = [f"office_{scene:04d}{part}" for scene in range(10) for part in "ab"]
"""Twenty pictures, two of each room."""

TRAIN = [n for n in range(1, 21) if n % 10]
"""Numbers of the training pictures; 10 and 20 are for testing."""


def picture(index: int) -> np.ndarray:
    """A picture whose corners and axes can be told apart, (480, 640, 3)."""
    image = np.full((*FULL, 3), index, np.uint8)
    image[:240, :, 0] = 200
    image[:, :320, 1] = 100
    return image


def write_mat(path: Path, count: int = 20) -> None:
    """Write the variables as MATLAB does: axes reversed, text as references to 16-bit characters."""
    with h5py.File(path, "w", userblock_size=512) as file:
        options = {"compression": "gzip", "compression_opts": 1}
        names = {"images": "u1", "depths": "f4", "rawDepths": "f4", "labels": "u2"}
        for name, dtype in names.items():
            shape = (3, 640, 480) if name == "images" else (640, 480)
            file.create_dataset(name, (count, *shape), dtype, chunks=(1, *shape), **options)
        references = file.create_dataset("scenes", (1, count), h5py.ref_dtype)
        for i in range(count):
            file["images"][i] = picture(i).transpose(2, 1, 0)
            depth = np.full(FULL, 1 + i, np.float32)
            depth[:, 320:] += 1
            file["depths"][i] = depth.T
            depth[:240] = 0
            file["rawDepths"][i] = depth.T
            labels = np.zeros(FULL, np.uint16)
            labels[:240, 320:] = 1
            labels[240:, 320:] = 894
            file["labels"][i] = labels.T
            name = file.create_dataset(f"#refs#/{i}", data=np.array([[ord(c)] for c in SCENES[i]], np.uint16))
            references[0, i] = name.ref


def write_splits(root: Path, train: list[int] = TRAIN, test: tuple[int, ...] = (10, 20)) -> None:
    columns = {"trainNdxs": np.array(train, np.uint16)[:, None], "testNdxs": np.array(test, np.uint16)[:, None]}
    scipy.io.savemat(root / "splits.mat", columns)


def write_mapping(root: Path, first: int = 5, last: int = 25) -> None:
    """Write a mapping whose first label is of one class (chair) and the last of another (television)."""
    mapping = np.full((1, 894), 40, np.uint8)
    mapping[0, 0], mapping[0, -1] = first, last
    names = np.empty((1, 40), object)
    names[0] = [f"class {i}" for i in range(40)]
    scipy.io.savemat(root / "classMapping40.mat", {"mapClass": mapping, "className": names})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_mat(root / MAT)
    write_splits(root)
    write_mapping(root)
    return root


@pytest.fixture
def official(written: Path, tmp_path: Path) -> Path:
    """The official layout, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "nyu"))


def numbers(data: NYUv2) -> list[int]:
    return [int(data.name(i)) for i in range(len(data))]


# The official layout


def test_the_official_layout_follows_the_contract(written: Path) -> None:
    data = NYUv2(written, split="all", size=FULL)
    assert (data.info.name, data.info.targets, len(data.info.classes)) == ("NYUv2", ("segmentation", "depth"), 13)
    assert not data.info.inverse_depth
    assert data.labelled("depth").tolist() == [True] * 18
    assert data.labelled("depth").dtype == bool
    assert not data.labelled("normals").any()
    (sample,) = data.read([3], ["segmentation", "depth", "normals"])
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((480, 640, 3), "uint8"),
        "segmentation": ((480, 640), "uint8"),
        "depth": ((480, 640), "float32"),
        "intrinsics": ((3, 3), "float32"),
    }
    np.testing.assert_array_equal(sample["image"], picture(3))
    assert np.all(sample["depth"][:, :320] == 4)
    assert np.all(sample["depth"][:, 320:] == 5)
    np.testing.assert_allclose(sample["intrinsics"], INTRINSICS)
    assert set(data.read([0], [])[0]) == {"image", "intrinsics"}


def test_raw_depth_has_holes(written: Path) -> None:
    (sample,) = NYUv2(written, split="all", size=FULL, raw_depth=True).read([3], ["depth"])
    assert not sample["depth"][:240].any()
    assert np.all(sample["depth"][240:, :320] == 4)


@pytest.mark.parametrize(("classes", "first", "last"), [(40, "chair", "television"), (13, "chair", "tv")])
def test_labels_go_through_the_mapping(written: Path, classes: int, first: str, last: str) -> None:
    data = NYUv2(written, split="all", size=FULL, classes=classes)
    (sample,) = data.read([0], ["segmentation"])
    assert np.all(sample["segmentation"][:, :320] == 255)
    assert data.info.classes[sample["segmentation"][0, 639]] == first
    assert data.info.classes[sample["segmentation"][479, 639]] == last


def test_the_13_classes_group_the_40() -> None:
    """SceneNet's table in words."""
    assert [len(names) for names in CLASSES.values()] == [13, 40]
    groups: dict[str, set[str]] = {name: set() for name in CLASSES[13]}
    for name, index in zip(CLASSES[40], THIRTEEN_OF_FORTY, strict=True):
        groups[CLASSES[13][index]].add(name)
    assert groups == {
        "bed": {"bed"},
        "books": {"books"},
        "ceiling": {"ceiling"},
        "chair": {"chair"},
        "floor": {"floor", "floor mat"},
        "furniture": {
            *"cabinet bookshelf counter shelves dresser refrigerator".split(),
            *("night stand", "other furniture"),
        },
        "objects": {
            *"pillow mirror clothes paper towel box whiteboard person toilet sink lamp bathtub bag".split(),
            *("shower curtain", "other structure", "other prop"),
        },
        "picture": {"picture"},
        "sofa": {"sofa"},
        "table": {"table", "desk"},
        "tv": {"television"},
        "wall": {"wall", "door"},
        "window": {"window", "blinds", "curtain"},
    }


def test_validation_is_whole_rooms_of_the_training_pictures(written: Path) -> None:
    """Rooms 0 to 9 in order: 0 and 8 are held out; parts a and b of a room stay together."""
    parts = {split: numbers(NYUv2(written, split=split, size=(6, 8))) for split in ("train", "validation")}
    assert parts["validation"] == [1, 2, 17, 18]
    assert sorted(parts["train"] + parts["validation"]) == TRAIN
    assert numbers(NYUv2(written, split="all", size=(6, 8))) == TRAIN
    assert numbers(NYUv2(written, split="test", size=(6, 8))) == [10, 20]


def test_intrinsics_follow_the_fit(written: Path) -> None:
    (sample,) = NYUv2(written, split="all", size=(240, 320)).read([0], [])
    expected = [[259.43, 0, 162.54], [0, 259.735, 126.62], [0, 0, 1]]  # as in data/nyuv2-folder.yaml
    np.testing.assert_allclose(sample["intrinsics"], expected, rtol=1e-6)


class Depths(Dataset):
    def __init__(self, data: NYUv2) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> float:
        return float(self.data.read([index], ["depth"])[0]["depth"][0, 0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_main_process_reads(written: Path, context: str) -> None:
    data = NYUv2(written, split="test", size=(6, 8))
    data.read([0], ["depth"])
    pickle.dumps(data)
    loader = DataLoader(Depths(data), num_workers=1, multiprocessing_context=context)
    assert [float(value) for value in loader] == pytest.approx([10, 20], rel=1e-5)


# The .npy layout


def normal_map(number: int) -> np.ndarray:
    """Normals of a room (24, 32, 3) in our frame: ceiling, walls at the left and right, floor; one is missing."""
    rng = np.random.default_rng(number)
    normals = np.zeros((24, 32, 3))
    normals[...] = (0, 0, -1)
    normals[:6] = (0, 0.8, -0.6)
    normals[18:] = (0, -0.8, -0.6)
    normals[6:18, :8] = (0.8, 0, -0.6)
    normals[6:18, 24:] = (-0.8, 0, -0.6)
    normals *= rng.uniform(0.95, 1.05)  # rounding is undone
    normals[12, 16] = 0
    return normals


def write_arrays(root: Path, count: int) -> None:
    """Write one part, such as train/."""
    for folder in ("image", "label", "depth", "normal"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        image = np.zeros((24, 32, 3))
        image[:, 16:] = (i % 100 / 255, 1, 0.5)
        label = np.full((24, 32), i % 13)
        label[0] = -1
        depth = np.full((24, 32, 1), 1 + i / 100, np.float32)
        depth[:, :4] = 0
        np.save(root / "image" / f"{i}.npy", image)
        np.save(root / "label" / f"{i}.npy", label)
        np.save(root / "depth" / f"{i}.npy", depth)
        np.save(root / "normal" / f"{i}.npy", normal_map(i))


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """The .npy layout with 20 training and 3 test pictures."""
    write_arrays(tmp_path / "train", 20)
    write_arrays(tmp_path / "val", 3)
    return tmp_path


def test_the_arrays_follow_the_contract(arrays: Path) -> None:
    data = NYUv2(arrays, split="all", size=(24, 32))
    assert data.info.targets == ("segmentation", "depth", "normals")
    assert data.info.classes == CLASSES[13]
    assert data.name(12) == "train/12"
    (sample,) = data.read([12], data.info.targets)
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((24, 32, 3), "uint8"),
        "segmentation": ((24, 32), "uint8"),
        "depth": ((24, 32), "float32"),
        "normals": ((24, 32, 3), "float32"),
    }
    assert sample["image"][0, 31].tolist() == [12, 255, 128]
    assert np.all(sample["segmentation"][0] == 255)
    assert np.all(sample["segmentation"][1:] == 12)
    assert not sample["depth"][:, :4].any()
    np.testing.assert_allclose(sample["depth"][:, 4:], 1.12)
    length = np.linalg.norm(sample["normals"], axis=-1)
    assert length[12, 16] == 0
    np.testing.assert_allclose(np.delete(length.ravel(), 12 * 32 + 16), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_types_on_disk_do_not_matter(arrays: Path, dtype: str) -> None:
    (before,) = NYUv2(arrays, split="all", size=(24, 32)).read([7], ["segmentation"])
    image, label = (np.load(arrays / "train" / kind / "7.npy") for kind in ("image", "label"))
    np.save(
        arrays / "train/image/7.npy", np.rint(255 * image).astype("u1") if dtype == "uint8" else image.astype(dtype)
    )
    np.save(arrays / "train/label/7.npy", label.astype("int8" if dtype == "uint8" else dtype))
    (after,) = NYUv2(arrays, split="all", size=(24, 32)).read([7], ["segmentation"])
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.fixture(scope="module")
def rooms() -> list[np.ndarray]:
    """Normals of rendered rooms, exact but for their storage in half precision."""
    scenes = Scenes(20, domain="studio", seed=0, size=(24, 32))
    return [sample["normals"] for sample in scenes.read(range(20), ["normals"])]


@pytest.mark.parametrize("frame", itertools.product((1, -1), repeat=3))
def test_normals_of_any_frame_end_in_ours(tmp_path: Path, rooms: list[np.ndarray], frame: tuple[int, ...]) -> None:
    """Whichever way the axes point that the files were stored along."""
    write_arrays(tmp_path / "train", 20)
    for index, normals in enumerate(rooms):
        np.save(tmp_path / "train" / "normal" / f"{index}.npy", normals * frame)
    data = NYUv2(tmp_path, split="all", size=(24, 32))
    for sample, normals in zip(data.read(range(20), ["normals"]), rooms, strict=True):
        np.testing.assert_allclose(sample["normals"], normals, atol=1e-3)


def test_folders_may_be_absent(arrays: Path) -> None:
    shutil.rmtree(arrays / "train" / "normal")
    shutil.rmtree(arrays / "train" / "label")
    data = NYUv2(arrays, split="train", size=(24, 32))
    assert data.info.targets == ("depth",)
    assert set(data.read([0], ["segmentation", "depth", "normals"])[0]) == {"image", "depth"}


def test_validation_is_whole_blocks_and_test_is_val(tmp_path: Path) -> None:
    write_arrays(tmp_path / "train", 75)
    write_arrays(tmp_path / "val", 2)
    names = {}
    for split in ("train", "validation", "all", "test"):
        data = NYUv2(tmp_path, split=split, size=(6, 8))
        names[split] = [data.name(i) for i in range(len(data))]
    assert names["validation"] == [f"train/{i}" for i in (*range(8), *range(64, 72))]
    assert names["train"] == [f"train/{i}" for i in (*range(8, 64), *range(72, 75))]
    assert names["all"] == [f"train/{i}" for i in range(75)]
    assert names["test"] == ["val/0", "val/1"]


# Bad input

Change = Callable[[Path], object]


def changing(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Replace an array by what becomes of it."""
    return lambda root: np.save(root / "train" / name, change(np.load(root / "train" / name)))


def putting(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Set one pixel."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float64)
        array[1, 5] = value
        return array

    return change


def truncate(name: str) -> Change:
    def change(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])

    return change


def remove(name: str) -> Change:
    return lambda root: (root / name).unlink()


def instead(name: str, change: Callable[[h5py.File], object]) -> Change:
    """Change the .mat: delete a variable and call what may write another."""

    def apply(root: Path) -> None:
        with h5py.File(root / MAT, "r+") as file:
            if name:
                del file[name]
            change(file)

    return apply


def setting(name: str, value: float) -> Change:
    """Set one pixel of picture 3."""

    def change(file: h5py.File) -> None:
        file[name][2, 5, 7] = value

    return instead("", change)


BAD_OFFICIAL: dict[str, tuple[Change, list[str]]] = {
    "empty": (lambda r: [p.unlink() for p in r.iterdir()], ["neither nyu_depth_v2_labeled.mat nor train/image/"]),
    "absent": (lambda r: r.rename(r.with_name("other")), ["nyu does not exist"]),
    "no splits": (remove("splits.mat"), ["splits.mat does not exist", "horatio.cs.nyu.edu"]),
    "no mapping": (remove("classMapping40.mat"), ["classMapping40.mat does not exist", "ankurhanda"]),
    "truncated": (truncate(MAT), [MAT, "truncated"]),
    "truncated splits": (truncate("splits.mat"), ["splits.mat cannot be read", "horatio"]),
    "not HDF5": (lambda r: (r / MAT).write_bytes(b"MATLAB 5.0 MAT-file" * 100), [MAT, "cannot be read as HDF5"]),
    "mapping is a page": (
        lambda r: (r / "classMapping40.mat").write_text("<html>" * 50),
        ["classMapping40.mat cannot"],
    ),
    "splits without the variable": (
        lambda r: scipy.io.savemat(r / "splits.mat", {"train": [[1]]}),
        ["splits.mat has no whole numbers", "'trainNdxs'"],
    ),
    "splits of another set": (lambda r: write_splits(r, [1, 900]), ["pictures 1 to 900", "holds 20"]),
    "splits from zero": (lambda r: write_splits(r, [0, 1]), ["pictures 0 to 1"]),
    "a picture twice": (
        lambda r: write_splits(r, [1, 2, 3, 2, 11]),
        ["splits.mat has picture 2 more than once in 'trainNdxs'", "get it from horatio"],
    ),
    "a test picture twice": (lambda r: write_splits(r, test=(10, 20, 10)), ["picture 10 more than once in 'testNdxs'"]),
    "test pictures among those for training": (
        lambda r: write_splits(r, test=(10, 19, 7, 20)),
        ["splits.mat has 2 pictures both in 'trainNdxs' and 'testNdxs', such as 7"],
    ),
    "mapping to other classes": (lambda r: write_mapping(r, last=41), ["classMapping40.mat", "5 to 41", "1 to 40"]),
    "mapping too short": (
        lambda r: scipy.io.savemat(r / "classMapping40.mat", {"mapClass": np.ones((1, 500), np.uint8)}),
        ["picture 0003", "label 894", "maps 1 to 500"],
    ),
    "no labels": (instead("labels", lambda f: None), [MAT, "no variable 'labels'", "rawDepths"]),
    "scenes too few": (
        instead("scenes", lambda f: f.create_dataset("scenes", (1, 0), h5py.ref_dtype)),
        ["20 images but 'scenes' of 0"],
    ),
    "scenes are numbers": (instead("scenes", lambda f: f.create_dataset("scenes", (1, 20), "f8")), [MAT, "HDF5"]),
    "images not reversed": (
        instead("images", lambda f: f.create_dataset("images", (480, 640, 3, 20), "u1")),
        ["'images' of uint8 and shape (480, 640, 3, 20)", "(480, 3, 640, 480)"],
    ),
    "depth of other type": (
        instead("depths", lambda f: f.create_dataset("depths", (20, 640, 480), "u2")),
        ["'depths' of uint16", "float32"],
    ),
    "not a number": (setting("depths", np.nan), ["picture 0003", "nan in 1 pixels", "'depths'"]),
    "negative": (setting("depths", -1), ["picture 0003", "-1 in 1 pixels"]),
    "millimetres": (
        instead("", lambda f: f["depths"].write_direct(np.full((20, 640, 480), 2000, np.float32))),
        ["picture 0003", "median depth of 2000", "metres"],
    ),
    "one room": (lambda r: write_splits(r, [3, 4]), ["nothing is left for training"]),
}

BAD_ARRAYS: dict[str, tuple[Change, list[str]]] = {
    "gap": (remove("train/image/4.npy"), ["train/image holds 19 arrays but no 4.npy"]),
    "count": (remove("train/label/19.npy"), ["train/label holds 19 arrays", "train/image 20"]),
    "empty folder": (lambda r: [p.unlink() for p in (r / "train/depth").iterdir()], ["train/depth holds no array"]),
    "truncated": (truncate("train/depth/5.npy"), ["train/depth/5.npy", "truncated"]),
    "pickle": (changing("depth/5.npy", lambda a: np.full(a.shape, None)), ["depth/5.npy cannot be read"]),
    "channels first": (
        changing("image/5.npy", lambda a: a.transpose(2, 0, 1)),
        ["image/5.npy holds float64 of shape (3, 24, 32)", "(H, W, 3)"],
    ),
    "16 bits": (changing("image/5.npy", lambda a: a.astype(np.uint16)), ["image/5.npy holds uint16", "uint8"]),
    "depth without channel": (changing("depth/5.npy", lambda a: a[..., 0]), ["shape (24, 32), but", "(H, W, 1)"]),
    "depth of integers": (changing("depth/5.npy", lambda a: a.astype(np.int64)), ["depth/5.npy holds int64"]),
    "other size": (changing("label/5.npy", lambda a: a[:20]), ["label/5.npy is 32x20", "image is 32x24"]),
    "no pixels": (
        lambda r: [np.save(p, np.load(p)[:0, :0]) for p in r.glob("train/*/5.npy")],
        ["image/5.npy holds no pixel", "(0, 0, 3)"],
    ),
    "no columns": (changing("label/5.npy", lambda a: a[:, :0]), ["label/5.npy holds no pixel", "(24, 0)"]),
    "image to 255": (changing("image/5.npy", lambda a: 255 * a), ["from 0 to 255", "divide it by 255"]),
    "image with nan": (changing("image/5.npy", putting(np.nan)), ["image/5.npy", "nan"]),
    "class 13": (changing("label/5.npy", putting(13)), ["label/5.npy", "value 13 in 1 pixels", "0 to 12", "-1"]),
    "class -2": (changing("label/5.npy", putting(-2)), ["value -2"]),
    "half a class": (changing("label/5.npy", putting(2.5)), ["value 2.5"]),
    "negative": (changing("depth/5.npy", putting(-1)), ["depth/5.npy", "depth of -1 in 1 pixels", "store 0"]),
    "infinite": (changing("depth/5.npy", putting(np.inf)), ["depth/5.npy", "depth of inf"]),
    "millimetres": (changing("depth/5.npy", lambda a: 1000 * a), ["train/5", "metres"]),
    "normals infinite": (changing("normal/5.npy", putting(np.inf)), ["normal/5.npy", "not finite"]),
    "normals encoded": (changing("normal/5.npy", lambda a: a * 127 + 128), ["normal/5.npy", "length of about 1"]),
    "normals mixed": (changing("normal/5.npy", lambda a: -a), ["normal/5.npy", "face away", "one frame"]),
}


def complaint(root: Path) -> str:
    """Return what is said when the training and validation samples are read."""
    with pytest.raises(UserError) as caught:
        for split in ("train", "validation"):
            data = NYUv2(root, split=split, size=(6, 8))
            data.read(range(len(data)), data.info.targets)
    return str(caught.value)


def check_sentence(message: str, words: list[str]) -> None:
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert not re.search(r"[.!?] [A-Z]", message), message


@pytest.mark.parametrize("case", BAD_OFFICIAL)
def test_bad_official_files_get_one_sentence(official: Path, case: str) -> None:
    change, words = BAD_OFFICIAL[case]
    change(official)
    check_sentence(complaint(official), words)


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_get_one_sentence(arrays: Path, case: str) -> None:
    change, words = BAD_ARRAYS[case]
    change(arrays)
    check_sentence(complaint(arrays), words)


def test_what_a_layout_does_not_have(arrays: Path) -> None:
    for options in ({"classes": 40}, {"raw_depth": True}):
        with pytest.raises(UserError, match="13 classes and in-painted depth only"):
            NYUv2(arrays, split="all", size=(6, 8), **options)
    with pytest.raises(UserError, match="13 or 40 classes, not 37"):
        NYUv2(arrays, split="all", size=(6, 8), classes=37)
    shutil.rmtree(arrays / "val")
    with pytest.raises(UserError, match=r"val/image holds no array"):
        NYUv2(arrays, split="test", size=(6, 8))
