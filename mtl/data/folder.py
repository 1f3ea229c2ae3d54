"""A folder of pictures and labels of your own.

.. code-block:: text

    ROOT/dataset.yaml     what the numbers in the labels mean (see `mtl.data.description`)
    ROOT/images/          .jpg .jpeg .png .bmp .webp .tif .tiff, 8 bits
    ROOT/segmentation/    .png, one channel (grey or palette) of class indices
    ROOT/depth/           .png, 16 bits, times `depth_scale` (0.001 unless stated) in metres; or .npy, (H, W)
                          floats, times `depth_scale` (1 unless stated) in metres; 0 is no measurement
    ROOT/normals/         .png, 8-bit RGB with n = 2 v / 255 - 1; or .npy, (H, W, 3) floats; in the camera's
                          frame, x right, y down, z forward; black, grey and white are no measurement

A label belongs to the image with the same stem and has its size. Any of the label folders may be absent or
have fewer files than there are images.

Names, sizes and pixel formats are checked when the data set is opened, values when a sample is read.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mtl.data.caching import digest, stamp
from mtl.data.decoding import (
    LABEL_SIZES,
    image_size,
    read_depth,
    read_image,
    read_normals,
    read_segmentation,
    reason,
)
from mtl.data.description import Description, Split
from mtl.data.fitting import fit
from mtl.data.sample import TARGETS, DataInfo, Sample
from mtl.errors import UserError, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_SUFFIXES = {
    "images": IMAGE_SUFFIXES,
    "segmentation": (".png",),
    "depth": (".png", ".npy"),
    "normals": (".png", ".npy"),
}
_DATA_SUFFIXES = {*IMAGE_SUFFIXES, ".gif", ".npy", ".npz", ".mat", ".exr", ".pfm"}
"""What is surely meant as data: in a folder that does not take it, it is an error, other files are not."""


class Folder:
    """A folder of images and labels, fitted to one size; see `mtl.data.folder` for its layout.

    A sample also has `intrinsics` if the description does.

    Attributes:
        info: Name, targets that some sample of this split has, and class names.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: Literal["train", "validation", "all"],
        size: tuple[int, int],
        description: Path | None = None,
    ) -> None:
        """Find the files and check names, sizes and pixel formats.

        Args:
            root: The folder that holds `images`.
            split: Which samples to take, in the order of their names.
            size: Height and width of every sample in pixels.
            description: A YAML file to use in place of ROOT/dataset.yaml.

        Raises:
            UserError: Something is missing, has no partner, or cannot be what its folder says.
        """
        _check_root(root)
        images = _files(root / "images")
        if not images:
            raise UserError(f"{root / 'images'} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        labels = {target: _files(root / target) for target in TARGETS}
        self._description = _describe(root, description, needs_classes=bool(labels["segmentation"]))
        for target, files in labels.items():
            _check_partners(root / target, files, images)
        _check_headers(images, labels, self._description.border)
        stems = sorted(images, key=int) if _all_numbers(images) else sorted(images)
        if split != "all":
            folders = [description.parent if description else root, root, root.parent]
            stems = _split(stems, self._description.split, folders)[split]
        self._stems, self._images, self._labels, self._size = stems, images, labels, size
        self._readers: dict[str, Callable[[Path], np.ndarray]] = {
            "segmentation": partial(
                read_segmentation,
                classes=len(self._description.classes),
                ignore_index=self._description.ignore_index,
            ),
            "depth": partial(read_depth, scale=self._description.depth_scale),
            "normals": read_normals,
        }
        self.info = DataInfo(
            name=self._description.name or root.resolve().name,
            targets=tuple(target for target in TARGETS if self.labelled(target).any()),
            classes=self._description.classes,
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._stems)

    def name(self, index: int) -> str:
        """Return the stem of a sample's files."""
        return self._stems[index]

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): which samples have a file of this target."""
        return np.array([stem in self._labels.get(target, {}) for stem in self._stems], dtype=bool)

    def fingerprint(self) -> str:
        """Return a text that changes with the files, the description and the size."""
        files = [path for files in (self._images, *self._labels.values()) for path in files.values()]
        return digest(self._stems, self._size, self._description.model_dump_json(), stamp(files))

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Decode samples, cut off the border and fit them to size.

        Args:
            indices: Which samples.
            targets: Which labels, where there are any.

        Returns:
            Samples with `image`, `intrinsics` if they are known, and each target that there is a file of.

        Raises:
            UserError: A file is truncated or not what its name says, or its values make no sense.
        """
        wanted = tuple(targets)
        return [self._read(self._stems[index], wanted) for index in indices]

    def _read(self, stem: str, targets: Iterable[str]) -> Sample:
        sample = {"image": read_image(self._images[stem])}
        for target in targets:
            if path := self._labels.get(target, {}).get(stem):
                sample[target] = self._readers[target](path)
        if border := self._description.border:
            sample = {key: value[border:-border, border:-border] for key, value in sample.items()}
        if camera := self._description.intrinsics:
            sample["intrinsics"] = np.array(
                [[camera.fx, 0, camera.cx - border], [0, camera.fy, camera.cy - border], [0, 0, 1]],
                np.float32,
            )
        return fit(sample, self._size)


# What is there


def _check_root(root: Path) -> None:
    """Raise a `UserError` unless the root is a folder with images."""
    if not root.is_dir():
        raise UserError(f"the data folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
    entries = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if (root / "images") in entries:
        return
    if not any(root.iterdir()):
        raise UserError(f"the data folder {root} is empty: it must hold images/ and folders of labels")
    inner = next((entry for entry in entries if (entry / "images").is_dir()), None)
    hint = f" (did you mean {inner}?)" if inner else nearest("images", (entry.name for entry in entries))
    raise UserError(f"the data folder {root} holds no folder images/{hint}")


def _files(folder: Path) -> dict[str, Path]:
    """Return a data folder's files by stem; none if there is no such folder."""
    suffixes = _SUFFIXES[folder.name]
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in _DATA_SUFFIXES:
            continue
        if suffix not in suffixes:
            raise UserError(f"{path} cannot be used: files in {folder.name}/ are {' or '.join(suffixes)}")
        if path.stem in files:
            raise UserError(f"{files[path.stem]} and {path.name} have the same stem: remove one of them")
        files[path.stem] = path
    return files


def _describe(root: Path, path: Path | None, *, needs_classes: bool) -> Description:
    """Return what the given file, or else ROOT/dataset.yaml if it exists, says."""
    default = root / "dataset.yaml"
    path = path or (default if default.exists() else None)
    description = Description.load(path) if path else Description()
    if needs_classes and not description.classes:
        raise UserError(
            f"{root / 'segmentation'} needs names for its classes: write 'classes: [NAME, ...]', in the "
            f"order of their indices, into {path or default}"
        )
    if len(set(description.classes)) < len(description.classes):
        twice = next(name for name in description.classes if description.classes.count(name) > 1)
        raise UserError(f"{path}: 'classes' has {twice!r} twice, but every class needs a name of its own")
    return description


def _check_partners(folder: Path, labels: dict[str, Path], images: dict[str, Path]) -> None:
    """Raise a `UserError` if a label has no image."""
    alone = [path for stem, path in labels.items() if stem not in images]
    example = next(iter(images.values())).name
    if alone and len(alone) == len(labels):
        raise UserError(
            f"no file in {folder} has the stem of an image (such as {alone[0].name} beside {example}): "
            "name each label as its image"
        )
    if alone:
        others = f", nor have {len(alone) - 1} more" if len(alone) > 1 else ""
        raise UserError(
            f"{alone[0]} has no image of the same stem in images/{nearest(alone[0].stem, images)}{others}: "
            "add the image or remove the label"
        )


def _check_headers(images: dict[str, Path], labels: dict[str, dict[str, Path]], border: int) -> None:
    """Raise a `UserError` if a file's header tells that it cannot be used, or sizes differ."""
    for stem, image in images.items():
        height, width = image_size(image)
        if min(height, width) <= 2 * border:
            raise UserError(f"{image} is {width}x{height} pixels, all of which is within the border of {border}")
        for target, files in labels.items():
            if stem not in files:
                continue
            label_height, label_width = LABEL_SIZES[target](files[stem])
            if (label_height, label_width) != (height, width):
                raise UserError(
                    f"{files[stem]} is {label_width}x{label_height} pixels, but its image {image.name} is "
                    f"{width}x{height}: a label must have the size of its image"
                )


# Splits


def _all_numbers(stems: Iterable[str]) -> bool:
    return all(stem.isascii() and stem.isdigit() for stem in stems)


def _split(stems: list[str], split: Split | None, folders: list[Path]) -> dict[str, list[str]]:
    """Divide ordered stems; `folders` are where a split's files may be."""
    if split is None:
        kept = len(stems) - -(-len(stems) // 10)
        parts = {"train": stems[:kept], "validation": stems[kept:]}
        reason = "one image cannot be split in two: add more"
    elif split.every is not None:
        runs = _runs(stems)
        held = set(itertools.chain.from_iterable(runs[:: split.every]))
        parts = {"train": [s for s in stems if s not in held], "validation": [s for s in stems if s in held]}
        reason = (
            f"'every: {split.every}' takes whole runs of consecutive numbers, and there is only one: list "
            "stems in a file and say 'validation: FILE'"
        )
    else:
        assert split.validation is not None
        held = _listed(split.validation, stems, folders)
        kept_back = _listed(split.train, stems, folders) if split.train else set(stems) - held
        if both := sorted(held & kept_back):
            raise UserError(f"{both[0]!r} is in both {split.train} and {split.validation}: keep it in one of them")
        parts = {"train": [s for s in stems if s in kept_back], "validation": [s for s in stems if s in held]}
        reason = f"{split.validation} lists every image: leave some out"
    if not parts["train"]:
        raise UserError(f"nothing is left for training: {reason}")
    return parts


def _runs(stems: list[str]) -> list[list[str]]:
    """Group ordered stems into runs of consecutive numbers; each is its own run unless all are numbers."""
    if not _all_numbers(stems):
        return [[stem] for stem in stems]
    runs: list[list[str]] = []
    for stem in stems:
        if runs and int(stem) - int(runs[-1][-1]) <= 1:
            runs[-1].append(stem)
        else:
            runs.append([stem])
    return runs


def _listed(file: Path, stems: list[str], folders: list[Path]) -> set[str]:
    """Read a file of stems, one a line."""
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        places = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise UserError(f"the split's file {file} does not exist in {places}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the split's file {path} cannot be read ({reason(error)})") from error
    listed = {line.strip() for line in lines} - {""}
    if not listed:
        raise UserError(f"the split's file {path} is empty: list stems of images, one a line")
    if unknown := sorted(listed - set(stems)):
        raise UserError(
            f"the split's file {path} names {len(unknown)} of {len(listed)} stems that no image has, such as "
            f"{unknown[0]!r}{nearest(unknown[0], stems)}"
        )
    return listed
