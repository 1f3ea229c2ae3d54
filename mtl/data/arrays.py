"""Numbered .npy files in folders side by side: the layout of MTAN's NYUv2 and Cityscapes, which LibMTL reads too.

.. code-block:: text

    FOLDER/image/0.npy  1.npy ...    (H, W, 3) floats from 0 to 1, or uint8
    FOLDER/label/0.npy  ...          (H, W) class indices in any type; -1 is no label
    FOLDER/depth/0.npy  ...          (H, W, 1) floats; 0 is no measurement
    FOLDER/normal/0.npy ...          (H, W, 3) floats, unit vectors; (0, 0, 0) is no measurement

Names, shapes and types are checked when a folder is opened, values when a sample is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mtl.data.caching import digest, stamp
from mtl.data.decoding import reason
from mtl.data.sample import IGNORE_INDEX, Sample
from mtl.errors import UserError

_FORMATS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "image": ("fu", (3,), "an image is floats or uint8 of shape (H, W, 3)"),
    "segmentation": ("fiu", (), "a label is numbers of shape (H, W)"),
    "depth": ("f", (1,), "depth is floats of shape (H, W, 1)"),
    "normals": ("f", (3,), "normals are floats of shape (H, W, 3)"),
}
"""For each key: NumPy's kinds of types, what follows height and width in the shape, and both in words."""

_ROUNDING = 0.01
"""How far outside 0 to 1 resampling may have taken an image."""

_FRAME_FILES = 16
"""Number of files that are read to recognise the frame of the normals."""

_CLEAR = 0.02
"""The least mean of `_frame` that is no accident; those of NYUv2's own depth are about 0.10, 0.11 and 0.56."""


class Stored(Protocol):
    """Pictures in their own size, in whatever layout.

    Attributes:
        names: What a person would call each picture.
    """

    names: list[str]

    def labelled(self, target: str) -> Sequence[bool]:
        """Return which pictures have this target."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes with the files and with how they are read."""
        ...

    def read(self, indices: Iterable[int], targets: Iterable[str]) -> list[Sample]:
        """Return pictures with those of the targets that each has."""
        ...


class Arrays:
    """The arrays of some folders, one after the other.

    Attributes:
        names: Folder and number of each sample, such as "train/12".
    """

    def __init__(self, folders: Sequence[Path], labels: Mapping[str, str], classes: int) -> None:
        """Find the files and check names, shapes and types.

        Args:
            folders: Each holds a folder `image`, and may hold those of the labels.
            labels: Name of the folder of each target.
            classes: Number of classes.

        Raises:
            UserError: A file is missing or cannot be what its folder says.
        """
        self._classes = classes
        self._samples: list[dict[str, Path]] = []
        self.names: list[str] = []
        for folder in folders:
            self._add(folder, labels)
        with_normals = [sample["normals"] for sample in self._samples if "normals" in sample]
        self._signs = _frame(with_normals[:: max(1, len(with_normals) // _FRAME_FILES)])

    def _add(self, folder: Path, labels: Mapping[str, str]) -> None:
        images = _numbered(folder / "image")
        samples = [{"image": path} for path in images]
        for target, name in labels.items():
            if not (folder / name).is_dir():
                continue
            paths = _numbered(folder / name)
            if len(paths) != len(images):
                raise UserError(
                    f"{folder / name} holds {len(paths)} arrays and {folder / 'image'} {len(images)}: every image "
                    "needs its label, so complete the copy or remove the folder"
                )
            for sample, path in zip(samples, paths, strict=True):
                sample[target] = path
        for sample in samples:
            _check_headers(sample)
        self._samples += samples
        self.names += [f"{folder.name}/{path.stem}" for path in images]

    def labelled(self, target: str) -> list[bool]:
        """Return which samples have an array of this target."""
        return [target in sample for sample in self._samples]

    def fingerprint(self) -> str:
        """Return a text that changes with the files and with how they are read."""
        return digest(self._classes, stamp(path for sample in self._samples for path in sample.values()))

    def read(self, indices: Iterable[int], targets: Iterable[str]) -> list[Sample]:
        """Read samples in their own size.

        Normals are turned into the frame of `mtl.data.sample`, and depth keeps its unit.

        Raises:
            UserError: Values make no sense.
        """
        wanted = {"image", *targets}
        return [
            {key: self._values(key, path) for key, path in self._samples[index].items() if key in wanted}
            for index in indices
        ]

    def _values(self, key: str, path: Path) -> np.ndarray:
        if key == "image":
            return _read_image(path)
        if key == "segmentation":
            return _read_classes(path, self._classes)
        if key == "depth":
            return _read_depth(path)
        return _read_normals(path, self._signs)


def _numbered(folder: Path) -> list[Path]:
    """Return the arrays 0.npy, 1.npy, ... of a folder."""
    count = sum(not path.name.startswith(".") for path in folder.glob("*.npy"))
    paths = [folder / f"{number}.npy" for number in range(count)]
    if not paths:
        raise UserError(f"{folder} holds no array (0.npy, 1.npy, ...)")
    if missing := next((path for path in paths if not path.is_file()), None):
        raise UserError(
            f"{folder} holds {count} arrays but no {missing.name}: they are numbered from 0 without a gap, so "
            "complete the copy"
        )
    return paths


def _open(path: Path) -> np.ndarray:
    """Map an array into memory: this reads its header alone, and never a pickle."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): it is truncated or not what its name says"
        ) from error


def _check_headers(sample: Mapping[str, Path]) -> None:
    """Raise a `UserError` if a sample's arrays have the wrong type or shape."""
    sizes: dict[str, tuple[int, ...]] = {}
    for key, path in sample.items():
        array = _open(path)
        kinds, trailing, words = _FORMATS[key]
        wide = key == "image" and array.dtype.kind == "u" and array.dtype != np.uint8
        if array.dtype.kind not in kinds or wide or array.ndim < 2 or array.shape[2:] != trailing:
            raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, but {words}")
        if not array.size:
            raise UserError(f"{path} holds no pixel, its shape is {array.shape}, but {words}: get the file again")
        sizes[key] = array.shape[:2]
        if sizes[key] != sizes["image"]:
            (label_height, label_width), (height, width) = sizes[key], sizes["image"]
            raise UserError(
                f"{path} is {label_width}x{label_height} pixels, but its image is {width}x{height}: a label must "
                "have the size of its image"
            )


def _read_image(path: Path) -> np.ndarray:
    """Read an image (H, W, 3) uint8."""
    stored = np.array(_open(path))
    if stored.dtype == np.uint8:
        return stored
    low, high = stored.min(), stored.max()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise UserError(
            f"{path} has values from {low:.4g} to {high:.4g}, but an image of floats is from 0 to 1: divide it by 255, "
            "or store it as uint8"
        )
    image: np.ndarray = np.rint(255 * stored.clip(0, 1)).astype(np.uint8)
    return image


def _read_classes(path: Path, classes: int) -> np.ndarray:
    """Read class indices (H, W) uint8."""
    stored = np.array(_open(path))
    ignored = stored == -1
    wrong = ~ignored & ~np.isin(stored, np.arange(classes))
    if wrong.any():
        raise UserError(
            f"{path} has the value {stored[wrong][0]:g} in {np.count_nonzero(wrong)} pixels, but the {classes} classes "
            f"are 0 to {classes - 1}, and -1 is no label: correct the label"
        )
    return np.where(ignored, IGNORE_INDEX, stored).astype(np.uint8)


def _read_depth(path: Path) -> np.ndarray:
    """Read depth, or inverse depth, (H, W) float32."""
    depth = np.array(_open(path)[..., 0], np.float32)
    wrong = ~(np.isfinite(depth) & (depth >= 0))
    if wrong.any():
        raise UserError(
            f"{path} has a depth of {depth[wrong][0]:.4g} in {np.count_nonzero(wrong)} pixels: where there is no "
            "measurement, store 0"
        )
    return depth


def _read_normals(path: Path, signs: np.ndarray) -> np.ndarray:
    """Read unit normals (H, W, 3) float32, each axis multiplied by its sign."""
    stored = np.array(_open(path), np.float32)
    if not np.isfinite(stored).all():
        raise UserError(f"{path} has a normal that is not finite: where there is no measurement, store (0, 0, 0)")
    normals: np.ndarray = _unit(stored) * signs
    valid = normals.any(axis=-1)
    if stored.any() and not valid.any():
        raise UserError(f"{path} has no vector with a length of about 1: normals are unit vectors, so correct it")
    if valid.any() and np.mean(normals[valid][:, 2] > 0) > 0.9:
        raise UserError(
            f"{path} has surfaces that face away from the camera, unlike others of its folder: all normals must have "
            "one frame"
        )
    return normals


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Normalise (H, W, 3), with (0, 0, 0) for what is no unit vector, as interpolation beside holes has left some."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = np.zeros_like(vectors)
    np.divide(vectors, length, out=unit, where=(length > 0.5) & (length < 1.5))
    return unit


def _frame(paths: Sequence[Path]) -> np.ndarray:
    """Return the signs (3,) that turn stored normals into the frame x right, y down, z forward.

    MTAN does not document its frame. But what is seen faces the camera: n · p < 0 for its line of sight
    p = (x, y, 1), and over many pictures so does each term of that sum on average (floors are below, and face up;
    walls at the left face right). An axis whose mean is clearly positive points the other way.

    Args:
        paths: Some files of normals; a single one may mislead.
    """
    total = np.zeros(3)
    for path in paths:
        normals = _unit(np.nan_to_num(_open(path), posinf=0, neginf=0))
        height, width = normals.shape[:2]
        y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        total += np.einsum("hwc,hwc->c", normals, np.stack([x, y, np.ones_like(x)], axis=-1)) / x.size
    signs: np.ndarray = np.where(total > _CLEAR * len(paths), -1, 1).astype(np.float32)
    return signs
