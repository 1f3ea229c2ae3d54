"""The folder data set: what it reads, how it splits, and the sentence that each bad input gets."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl.data.description import Description
from mtl.data.folder import Folder
from mtl.errors import UserError

SIZE = (6, 8)
YAML = "classes: [wall, floor, chair]\n"
NYUV2_DESCRIPTION = Path(__file__).parents[2] / "data" / "nyuv2-folder.yaml"


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def image(value: int = 100, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def depth(value: int = 2000, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full(size, value, np.uint16)


def classes(value: int = 1, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full(size, value, np.uint8)


def facing(size: tuple[int, int] = SIZE) -> np.ndarray:
    """Normals of a wall that faces the camera."""
    return np.broadcast_to(np.array([128, 127, 0], np.uint8), (*size, 3)).copy()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images, all labelled in full, and their description."""
    root = tmp_path / "rooms"
    for stem in ("a", "b", "c"):
        save(root / "images" / f"{stem}.png", image())
        save(root / "segmentation" / f"{stem}.png", classes())
        save(root / "depth" / f"{stem}.png", depth())
        save(root / "normals" / f"{stem}.png", facing())
    (root / "dataset.yaml").write_text(YAML)
    return root


def read(root: Path, description: Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Open everything and read everything; samples by stem."""
    folder = Folder(root, split="all", size=SIZE, description=description)
    samples = folder.read(range(len(folder)), folder.info.targets)
    return {folder.name(i): sample for i, sample in enumerate(samples)}


def test_a_full_set_follows_the_contract(root: Path) -> None:
    folder = Folder(root, split="all", size=(12, 12))
    assert len(folder) == 3
    assert folder.info.name == "rooms"
    assert folder.info.targets == ("segmentation", "depth", "normals")
    assert folder.info.classes == ("wall", "floor", "chair")
    (sample,) = folder.read([1], folder.info.targets)
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((12, 12, 3), "uint8"),
        "segmentation": ((12, 12), "uint8"),
        "depth": ((12, 12), "float32"),
        "normals": ((12, 12, 3), "float32"),
    }
    assert np.all(sample["image"] == 100)
    assert np.all(sample["segmentation"] == 1)
    np.testing.assert_allclose(sample["depth"], 2.0)
    np.testing.assert_allclose(sample["normals"], np.broadcast_to([0, 0, -1], (12, 12, 3)), atol=0.01)
    assert set(folder.read([0], ["depth"])[0]) == {"image", "depth"}


def test_labels_may_be_fewer_than_images(root: Path) -> None:
    (root / "depth" / "b.png").unlink()
    folder = Folder(root, split="all", size=SIZE)
    assert folder.labelled("depth").tolist() == [True, False, True]
    assert folder.labelled("normals").all()
    assert not folder.labelled("masked").any()
    assert [("depth" in sample) for sample in folder.read([2, 1], ["depth"])] == [True, False]


@pytest.mark.parametrize("kept", ["segmentation", "depth", "normals", None])
def test_one_label_folder_alone_works_and_none_too(root: Path, kept: str | None) -> None:
    for target in {"segmentation", "depth", "normals"} - {kept}:
        for path in (root / target).iterdir():
            path.unlink()
        (root / target).rmdir()
    if kept != "segmentation":
        (root / "dataset.yaml").unlink()
    assert all(set(sample) == {"image"} | ({kept} - {None}) for sample in read(root).values())


def test_targets_are_those_of_the_split(root: Path) -> None:
    (root / "depth" / "c.png").unlink()  # the last sample, which alone is for validation by default
    assert "depth" not in Folder(root, split="validation", size=SIZE).info.targets
    assert "depth" in Folder(root, split="train", size=SIZE).info.targets


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".webp", ".tif", ".tiff"])
def test_image_formats(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "images" / f"x{suffix}", image(77))
    assert np.abs(read(tmp_path)["x"]["image"].astype(int) - 77).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_8_bit_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", SIZE[::-1], (255, 255, 255)).convert(mode).save(tmp_path / "images" / "x.png")
    np.testing.assert_array_equal(read(tmp_path)["x"]["image"], image(255))


def test_a_photo_taken_upright_is_upright(tmp_path: Path) -> None:
    """EXIF orientation 6 asks to turn the stored picture clockwise: its left column becomes the top row."""
    stored = image(0, SIZE[::-1])
    stored[:, 0] = 255
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "images" / "x.jpg", exif=exif, quality=100)
    Image.fromarray(stored).save(tmp_path / "images" / "y.png", exif=exif)
    save(tmp_path / "depth" / "x.png", depth())
    save(tmp_path / "depth" / "y.png", depth())
    for sample in read(tmp_path).values():
        assert sample["image"][0].min() > 200
        assert sample["image"][2:].max() < 50


def test_segmentation_formats_and_ignore_index(root: Path) -> None:
    (root / "dataset.yaml").write_text("classes: [void, wall, floor]\nignore_index: 0\n")
    values = np.array([[0, 1], [2, 1]], np.uint8).repeat(3, axis=0).repeat(4, axis=1)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel())
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    palette.save(root / "segmentation" / "a.png")
    save(root / "segmentation" / "b.png", values.astype(np.uint16))
    save(root / "segmentation" / "c.png", values)
    with Image.open(root / "segmentation" / "a.png") as a, Image.open(root / "segmentation" / "b.png") as b:
        assert (a.mode, b.mode) == ("P", "I;16")
    for sample in read(root).values():
        np.testing.assert_array_equal(sample["segmentation"], np.where(values == 0, 255, values))


def test_depth_formats_and_scale(root: Path) -> None:
    metres = np.linspace(0.5, 3, 48).reshape(SIZE)
    metres[0, 0] = 0
    (root / "depth" / "b.png").unlink()
    (root / "depth" / "c.png").unlink()
    save(root / "depth" / "a.png", (metres * 1000).astype(np.uint16))
    save(root / "depth" / "b.npy", metres)
    save(root / "depth" / "c.npy", metres.astype(np.float16))
    for sample in read(root).values():
        np.testing.assert_allclose(sample["depth"], metres, atol=0.001)
        assert sample["depth"][0, 0] == 0
    (root / "dataset.yaml").write_text(YAML + "depth_scale: 2e-3\n")
    np.testing.assert_allclose(read(root)["a"]["depth"], 2 * metres, atol=0.002)
    np.testing.assert_allclose(read(root)["b"]["depth"], 0.002 * metres, atol=1e-6)


def test_a_depth_map_may_say_its_own_scale(root: Path) -> None:
    """As predictions beyond 65.5 m are written; what does not say one is refused."""
    beside = root / "depth" / "a.json"
    beside.write_text('{"metres_per_unit": 0.004}')
    sample = read(root)
    assert np.allclose(sample["a"]["depth"], 8.0) and np.allclose(sample["b"]["depth"], 2.0)
    for wrong in ('{"inverse_depth_per_unit": 0.1}', "{", '{"metres_per_unit": -1}', "[]"):
        beside.write_text(wrong)
        with pytest.raises(UserError, match=r"a\.json.*metres_per_unit"):
            read(root)


def test_normals_formats_and_missing_vectors(root: Path) -> None:
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(*SIZE, 3)) - (0, 0, 3)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    stored = np.rint((unit + 1) * 127.5).astype(np.uint8)
    missing = [(0, 0, 0), (127, 127, 127), (128, 128, 128), (127, 128, 127), (255, 255, 255)]
    stored[0, :5] = missing
    expected = unit.copy()
    expected[0, :5] = 0
    (root / "normals" / "b.png").unlink()
    save(root / "normals" / "a.png", stored)
    save(root / "normals" / "b.npy", expected * 1.02)  # lengths are normalised
    samples = read(root)
    np.testing.assert_allclose(samples["a"]["normals"], expected, atol=0.008)
    np.testing.assert_allclose(samples["b"]["normals"], expected, atol=1e-6)
    assert not samples["a"]["normals"][0, :5].any()


def test_border_and_intrinsics(root: Path) -> None:
    """A border is cut off before fitting, and the principal point moves with it."""
    stored = image(255, (10, 12))
    stored[2:-2, 2:-2] = 10
    for stem in ("a", "b", "c"):
        save(root / "images" / f"{stem}.png", stored)
        save(root / "segmentation" / f"{stem}.png", classes(1, (10, 12)))
        save(root / "depth" / f"{stem}.png", depth(2000, (10, 12)))
        save(root / "normals" / f"{stem}.png", facing((10, 12)))
    (root / "dataset.yaml").write_text(YAML + "border: 2\nintrinsics: {fx: 20, fy: 21, cx: 5.5, cy: 4.5}\n")
    for sample in read(root).values():
        assert np.all(sample["image"] == 10)
        assert sample["depth"].shape == SIZE
        np.testing.assert_allclose(sample["intrinsics"], [[20, 0, 3.5], [0, 21, 2.5], [0, 0, 1]])


def test_other_files_are_no_data(root: Path) -> None:
    (root / "images" / "Thumbs.db").write_bytes(b"x")
    (root / "images" / "._a.png").write_bytes(b"x")
    (root / "depth" / "README.txt").write_text("millimetres")
    assert len(read(root)) == 3


def test_a_description_elsewhere(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "rooms.yaml"
    other.parent.mkdir()
    other.write_text("name: my rooms\nclasses: [a, b]\nsplit: {validation: held.txt}\n")
    (other.parent / "held.txt").write_text("b\n")
    folder = Folder(root, split="validation", size=SIZE, description=other)
    assert (folder.info.name, folder.info.classes, folder.name(0)) == ("my rooms", ("a", "b"), "b")


# Splits


def names(root: Path, description: str, stems: list[str]) -> tuple[list[str], list[str]]:
    """Return the stems for training and for validation of a set of images alone."""
    for stem in stems:
        save(root / "images" / f"{stem}.png", image())
    (root / "dataset.yaml").write_text(description)
    folders = [Folder(root, split=split, size=SIZE) for split in ("train", "validation", "all")]
    train, validation, everything = ([f.name(i) for i in range(len(f))] for f in folders)
    assert sorted(everything) == sorted(stems)
    return train, validation


def test_by_default_the_last_tenth_is_for_validation(tmp_path: Path) -> None:
    train, validation = names(tmp_path, "", [str(i) for i in range(1, 22)])
    assert train == [str(i) for i in range(1, 19)]  # in the order of numbers, where '10' comes after '9'
    assert validation == ["19", "20", "21"]


def test_a_rule_takes_the_first_of_every_so_many_runs(tmp_path: Path) -> None:
    train, validation = names(tmp_path, "split: {every: 2}", ["1", "2", "3", "5", "6", "9", "20", "21", "023"])
    assert train == ["5", "6", "20", "21"]
    assert validation == ["1", "2", "3", "9", "023"]


def test_a_rule_takes_single_files_where_names_are_not_numbers(tmp_path: Path) -> None:
    train, validation = names(tmp_path, "split: {every: 3}", ["a", "b1", "b2", "c", "d"])
    assert (train, validation) == (["b1", "b2", "d"], ["a", "c"])


@pytest.mark.parametrize("place", ["root", "root/.."])
def test_a_split_by_file(tmp_path: Path, place: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / place / "val.txt").write_text("b\r\n\nd\n")
    train, validation = names(root, "split: {validation: val.txt}", ["a", "b", "c", "d"])
    assert (train, validation) == (["a", "c"], ["b", "d"])
    (root / "train.txt").write_text("c")
    train, validation = names(root, "split: {validation: val.txt, train: train.txt}", ["a", "b", "c", "d"])
    assert (train, validation) == (["c"], ["b", "d"])


# Bad input: each breaks the full set of three, and names words that the sentence must have


def wrong_class(root: Path) -> None:
    values = classes()
    values[2, 3] = 7
    save(root / "segmentation" / "b.png", values)


def holding(name: str, values: np.ndarray) -> Callable[[Path], object]:
    """Replace a file (and one of the same stem) by these values."""

    def change(root: Path) -> None:
        for path in (root / name).parent.glob((root / name).stem + ".*"):
            path.unlink()
        save(root / name, values)

    return change


def saying(text: str) -> Callable[[Path], object]:
    """Describe the set by this text."""
    return lambda root: (root / "dataset.yaml").write_text(text)


def listing(text: str, more: str = "") -> Callable[[Path], object]:
    """Split the set by a file with this text."""

    def change(root: Path) -> None:
        (root / "val.txt").write_text(text)
        (root / "dataset.yaml").write_text(f"{YAML}split: {{validation: val.txt{more}}}\n")

    return change


def truncate(name: str) -> Callable[[Path], object]:
    """Cut a file in halves, after its header."""

    def change(root: Path) -> None:
        stored = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        for stem in ("a", "b", "c"):
            for target in ("segmentation", "depth", "normals"):
                (root / target / f"{stem}.png").unlink()
        if name.startswith("depth"):
            save(root / "images" / "b.png", image(1, (40, 40)))
            stored = stored[..., 0].astype(np.float64 if name.endswith("npy") else np.uint16)
        save(root / name, stored)
        if name == "images/b.jpg":
            (root / "images" / "b.png").unlink()
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])

    return change


def remove(*names: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def rename(before: str, after: str) -> Callable[[Path], object]:
    return lambda root: (root / before).rename(root / after)


def float_map(value: float) -> np.ndarray:
    values = np.full(SIZE, 2.0, np.float32)
    values[1, 1] = value
    return values


def nest(root: Path) -> None:
    """Put the set one level deeper."""
    (root / "inner").mkdir()
    (root / "images").rename(root / "inner" / "images")


def numbered(root: Path) -> None:
    """Make the stems one run of numbers."""
    for path in list(root.glob("*/*.png")):
        path.rename(path.with_stem(str("abc".index(path.stem) + 7)))
    (root / "dataset.yaml").write_text(f"{YAML}split: {{every: 8}}\n")


BAD = {
    "root is missing": (rename(".", "../elsewhere"), ["rooms", "does not exist"]),
    "no images": (rename("images", "image"), ["no folder images/", "did you mean 'image'?"]),
    "one level too high": (nest, ["no folder images/", "did you mean", "inner"]),
    "images are empty": (
        remove("images/a.png", "images/b.png", "images/c.png"),
        ["images holds no image", ".jpg"],
    ),
    "twice the same stem": (
        lambda root: save(root / "images/b.jpg", image()),
        ["b.jpg", "b.png", "same stem"],
    ),
    "label without image": (remove("images/b.png"), ["segmentation/b.png", "no image of the same stem"]),
    "labels of other stems": (
        lambda root: [rename(f"depth/{s}.png", f"depth/{s}_depth.png")(root) for s in "abc"],
        ["no file in", "depth", "a_depth.png beside a.png"],
    ),
    "label as jpeg": (holding("segmentation/b.jpg", image()), ["segmentation/b.jpg", "are .png"]),
    "sizes differ": (holding("depth/b.png", depth(2000, (5, 9))), ["depth/b.png is 9x5", "b.png is 8x6"]),
    "sizes differ, arrays": (holding("depth/b.npy", np.ones((5, 9))), ["depth/b.npy is 9x5", "b.png is 8x6"]),
    "image is not one": (
        lambda r: (r / "images/b.png").write_text("x"),
        ["images/b.png", "cannot identify image"],
    ),
    "image is truncated": (truncate("images/b.jpg"), ["images/b.jpg", "truncated"]),
    "png is truncated": (truncate("images/b.png"), ["images/b.png", "truncated"]),
    "label is truncated": (truncate("depth/b.png"), ["depth/b.png", "truncated"]),
    "array is truncated": (truncate("depth/b.npy"), ["depth/b.npy", "truncated"]),
    "image of 16 bits": (holding("images/b.png", depth()), ["images/b.png", "more than 8 bits"]),
    "segmentation in colour": (
        holding("segmentation/b.png", image()),
        ["segmentation/b.png", "RGB", "one channel"],
    ),
    "value outside the classes": (
        wrong_class,
        ["segmentation/b.png", "value 7", "0 to 2", "ignore_index is 255"],
    ),
    "depth of 8 bits": (holding("depth/b.png", classes()), ["depth/b.png", "8-bit grey", "16-bit grey PNG"]),
    "depth in colour": (holding("depth/b.png", image()), ["depth/b.png", "8-bit RGB", "16-bit grey PNG"]),
    "depth of integers": (holding("depth/b.npy", depth()), ["depth/b.npy", "uint16", "floats"]),
    "depth of three axes": (
        holding("depth/b.npy", np.ones((*SIZE, 1))),
        ["depth/b.npy", "(6, 8, 1)", "(H, W)"],
    ),
    "depth of objects": (holding("depth/b.npy", np.full(SIZE, None)), ["depth/b.npy", "cannot be read"]),
    "depth all zero": (holding("depth/b.png", depth(0)), ["depth/b.png", "every depth is 0"]),
    "depth not a number": (
        holding("depth/b.npy", float_map(np.nan)),
        ["depth/b.npy", "nan in 1 pixels", "store 0"],
    ),
    "depth infinite": (
        holding("depth/b.npy", float_map(np.inf)),
        ["depth/b.npy", "inf in 1 pixels", "store 0"],
    ),
    "depth negative": (holding("depth/b.npy", float_map(-1)), ["depth/b.npy", "negative depth, -1 m"]),
    "depth in millimetres": (
        holding("depth/b.npy", 1000 * float_map(2)),
        ["depth/b.npy", "median depth of 2000 m with a depth_scale of 1", "'depth_scale'"],
    ),
    "depth scaled twice": (
        saying(YAML + "depth_scale: 0.0000001"),
        ["depth/a.png", "median depth of 0.0002 m with a depth_scale of 1e-07"],
    ),
    "normals of one channel": (holding("normals/b.png", classes()), ["normals/b.png", "8-bit grey", "RGB"]),
    "normals of two channels": (
        holding("normals/b.npy", np.ones((*SIZE, 2))),
        ["normals/b.npy", "(6, 8, 2)"],
    ),
    "normals not finite": (
        holding("normals/b.npy", np.full((*SIZE, 3), np.inf)),
        ["normals/b.npy", "not finite"],
    ),
    "normals all missing": (holding("normals/b.png", image(128)), ["normals/b.png", "no measurement"]),
    "normals towards z": (
        holding("normals/b.png", 255 - facing()),
        ["normals/b.png", "face away from the camera", "z forward"],
    ),
    "no description": (remove("dataset.yaml"), ["segmentation", "classes: [NAME, ...]", "dataset.yaml"]),
    "no classes": (saying("border: 0"), ["segmentation", "classes: [NAME, ...]", "dataset.yaml"]),
    "class twice": (saying("classes: [a, b, a]"), ["dataset.yaml", "'a' twice"]),
    "class that YAML takes for False": (saying("classes: [yes, a, b]"), ["'classes.0' is True", "quotes"]),
    "not YAML": (saying("classes: [a, b\nborder: 1\n"), ["dataset.yaml is not YAML", "line 2"]),
    "not fields": (saying("- a\n- b\n"), ["dataset.yaml", "field: value", "list"]),
    "unknown field": (
        saying(YAML + "depth_scal: 1"),
        ["unknown field 'depth_scal'", "did you mean 'depth_scale'?"],
    ),
    "unknown field inside": (saying(YAML + "split: {evry: 8}"), ["'split.evry'", "did you mean 'every'?"]),
    "missing field": (saying(YAML + "intrinsics: {fx: 1, fy: 1, cx: 0}"), ["'intrinsics.cy' is required"]),
    "negative scale": (saying(YAML + "depth_scale: -1"), ["'depth_scale' is -1", "greater than 0"]),
    "scale not a number": (saying(YAML + "depth_scale: .nan"), ["'depth_scale' is nan", "finite"]),
    "two ways to split": (
        saying(YAML + "split: {validation: v, every: 3}"),
        ["'split'", "either", "every: NUMBER"],
    ),
    "only training": (
        saying(YAML + "split: {train: v, every: 3}"),
        ["'train: FILE' needs 'validation: FILE'"],
    ),
    "border too wide": (saying(YAML + "border: 3"), ["images/a.png", "8x6", "border of 3"]),
    "split file missing": (
        saying(YAML + "split: {validation: val.txt}"),
        ["val.txt", "does not exist", "rooms"],
    ),
    "split file empty": (listing("\n"), ["val.txt", "empty"]),
    "split file of unknown stems": (listing("b\nc.png\n"), ["val.txt", "1 of 2", "'c.png'"]),
    "split file of everything": (listing("a\nb\nc\n"), ["nothing is left for training", "val.txt"]),
    "split files overlap": (listing("a\n", ", train: val.txt"), ["'a'", "both"]),
    "a single run": (numbered, ["nothing is left for training", "'every: 8'", "only one"]),
}


def use(root: Path) -> None:
    """Read all samples of the set and of its training split."""
    for split in ("all", "train"):
        folder = Folder(root, split=split, size=SIZE)
        folder.read(range(len(folder)), folder.info.targets)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(root: Path, case: str) -> None:
    change, words = BAD[case]
    change(root)
    with pytest.raises(UserError) as caught:
        use(root)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert "http" not in message
    assert not re.search(r"[.!?] [A-Z]", message), message


def test_a_description_that_is_missing(root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read \(No such file"):
        Folder(root, split="all", size=SIZE, description=root / "nowhere.yaml")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        Folder(tmp_path, split="all", size=SIZE)
    with pytest.raises(UserError, match="is not a folder"):
        Folder(Path(__file__), split="all", size=SIZE)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", image())
    assert len(Folder(tmp_path, split="all", size=SIZE)) == 1
    with pytest.raises(UserError, match="one image cannot be split"):
        Folder(tmp_path, split="train", size=SIZE)


def test_the_description_of_nyuv2() -> None:
    description = Description.load(NYUV2_DESCRIPTION)
    assert len(description.classes) == 13
    assert (description.classes[0], description.classes[12]) == ("bed", "window")


@pytest.mark.skipif("MTL_NYUV2" not in os.environ, reason="MTL_NYUV2 names no folder with NYUv2's images/")
def test_nyuv2() -> None:
    root = Path(os.environ["MTL_NYUV2"])
    train, validation = (
        Folder(root, split=split, size=(116, 156), description=NYUV2_DESCRIPTION)  # half, without the frame
        for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (704, 91)
    assert train.info.targets == ("segmentation", "depth")
    if (root.parent / "val.txt").exists():
        listed = [int(line) for line in (root.parent / "val.txt").read_text().split()]
        assert [int(validation.name(i)) for i in range(91)] == sorted(listed)
    stored: dict[str, list[np.ndarray]] = {"depth": [], "classes": []}
    fitted: dict[str, list[np.ndarray]] = {"depth": [], "classes": []}
    for folder in (train, validation):
        for i, sample in enumerate(folder.read(range(len(folder)), folder.info.targets)):
            assert sample["image"][[0, -1]].mean() < 250  # no white frame is left
            depths, labels = (
                np.asarray(Image.open(root / target / f"{folder.name(i)}.png"))[4:-4, 4:-4]
                for target in ("depth", "segmentation")
            )
            stored["depth"].append(depths.mean() / 1000)
            fitted["depth"].append(sample["depth"].mean())
            stored["classes"].append(np.bincount(labels.ravel(), minlength=256) / labels.size)
            fitted["classes"].append(np.bincount(sample["segmentation"].ravel(), minlength=256) / (116 * 156))
    assert np.mean(stored["depth"]) == pytest.approx(2.84, abs=0.03)
    np.testing.assert_allclose(fitted["depth"], stored["depth"], rtol=0.01)
    # Lines of one pixel without a label vanish in the vote; classes keep their shares of what has a label.
    before, after = (np.mean(maps["classes"], axis=0) for maps in (stored, fitted))
    assert 0 < before[255] - after[255] < 0.03
    np.testing.assert_allclose(after[:13] / after[:13].sum(), before[:13] / before[:13].sum(), rtol=0.02)
    assert after[13:255].sum() == 0
