"""A folder of pictures and labels of your own.

.. code-block:: text

    ROOT/dataset.yaml     what the numbers in the labels mean (see `Description`)
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
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import yaml
from PIL import ExifTags, Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from mtl.data.fitting import fit
from mtl.data.sample import IGNORE_INDEX, TARGETS, DataInfo, Sample
from mtl.errors import UserError, nearest

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_SUFFIXES = {
    "images": _IMAGE_SUFFIXES,
    "segmentation": (".png",),
    "depth": (".png", ".npy"),
    "normals": (".png", ".npy"),
}
_DATA_SUFFIXES = {*_IMAGE_SUFFIXES, ".gif", ".npy", ".npz", ".mat", ".exr", ".pfm"}
"""What is surely meant as data: in a folder that does not take it, it is an error, other files are not."""

_DEPTH_RANGE = (1e-3, 1e3)
"""Metres within which half of a depth map must lie; anything else is a wrong scale."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Intrinsics(_Strict):
    """A pinhole camera, in pixels of the stored image; the centre of the top left pixel is (0, 0)."""

    fx: PositiveFloat
    fy: PositiveFloat
    cx: float
    cy: float


class Split(_Strict):
    """Which samples are for validation: those in a file, or every so-many-th run of numbers.

    Attributes:
        validation: A text file of stems, one a line. Relative to the description, ROOT, or the folder above.
        train: The same for training; all others if absent.
        every: Where all stems are numbers, runs of consecutive ones (frames of one scene, usually) stay
            together: of each `every` runs, the first is for validation. Otherwise each file is its own run.
    """

    validation: Path | None = None
    train: Path | None = None
    every: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.validation is None) == (self.every is None):
            raise ValueError("it takes either 'validation: FILE' or 'every: NUMBER'")
        if self.train is not None and self.validation is None:
            raise ValueError("'train: FILE' needs 'validation: FILE'")
        return self


class Description(_Strict):
    """What `dataset.yaml` may say.

    Attributes:
        name: What to call the data set; ROOT's name if absent.
        classes: Names of the classes in the order of their indices; required where there is segmentation.
        ignore_index: The value in segmentation that means "no label".
        depth_scale: Metres per stored unit of depth.
        intrinsics: The camera of all images.
        border: Pixels to cut off on each side before anything else.
        split: By default, the last tenth of the samples in the order of their names is for validation.
    """

    name: str | None = None
    classes: tuple[str, ...] = Field(default=(), max_length=IGNORE_INDEX)
    ignore_index: int = Field(default=IGNORE_INDEX, ge=0, le=2**16 - 1)
    depth_scale: PositiveFloat | None = None
    intrinsics: Intrinsics | None = None
    border: int = Field(default=0, ge=0)
    split: Split | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            UserError: The file is missing, is not YAML, or says something that is not understood.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the description {path} cannot be read ({_reason(error)})") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "it is not text"
            raise UserError(f"{path} is not YAML: {problem}{where}") from error
        if not isinstance(content, dict | None):
            raise UserError(f"{path} must consist of 'field: value' lines, not of a {type(content).__name__}")
        try:
            return cls.model_validate(content or {})
        except ValidationError as error:
            raise UserError(f"{path}: {'; '.join(_complaints(error))}") from error


def _complaints(error: ValidationError) -> Iterator[str]:
    """Yield one clause for each thing that pydantic found wrong with a description."""
    models: dict[str, type[BaseModel]] = {"split": Split, "intrinsics": Intrinsics}
    for problem in error.errors(include_url=False):
        *parents, name = (str(part) for part in problem["loc"] or ("",))
        field = ".".join([*parents, name])
        if problem["type"] == "extra_forbidden":
            allowed = (models[parents[-1]] if parents else Description).model_fields
            yield f"unknown field '{field}'{nearest(name, allowed)}, the fields are {', '.join(allowed)}"
        elif problem["type"] == "missing":
            yield f"'{field}' is required"
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            quotes = " (put it in quotes)" if problem["type"] == "string_type" else ""
            yield f"'{field}' is {problem['input']!r}, but {message}{quotes}"


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
            raise UserError(f"{root / 'images'} holds no image ({', '.join(_IMAGE_SUFFIXES)})")
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
                _read_segmentation,
                classes=len(self._description.classes),
                ignore_index=self._description.ignore_index,
            ),
            "depth": partial(_read_depth, scale=self._description.depth_scale),
            "normals": _read_normals,
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
        sample = {"image": _read_image(self._images[stem])}
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
        height, width = _image_size(image)
        if min(height, width) <= 2 * border:
            raise UserError(
                f"{image} is {width}x{height} pixels, all of which is within the border of {border}"
            )
        for target, files in labels.items():
            if stem not in files:
                continue
            label_height, label_width = _LABEL_SIZES[target](files[stem])
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
            raise UserError(
                f"{both[0]!r} is in both {split.train} and {split.validation}: keep it in one of them"
            )
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
        raise UserError(f"the split's file {path} cannot be read ({_reason(error)})") from error
    listed = {line.strip() for line in lines} - {""}
    if not listed:
        raise UserError(f"the split's file {path} is empty: list stems of images, one a line")
    if unknown := sorted(listed - set(stems)):
        raise UserError(
            f"the split's file {path} names {len(unknown)} of {len(listed)} stems that no image has, such as "
            f"{unknown[0]!r}{nearest(unknown[0], stems)}"
        )
    return listed


# Single files


def _reason(error: Exception) -> str:
    """Return a library's reason in one line, without the path that our sentence has already."""
    return getattr(error, "strerror", None) or str(error).split("\n", maxsplit=1)[0].split(" file '")[
        0
    ].rstrip(".")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what Pillow and NumPy raise for a damaged file into a `UserError`."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read ({_reason(error)}): it is truncated or not what its name says"
        ) from error


def _image_size(path: Path) -> tuple[int, int]:
    """Return an image's height and width, as a viewer would show it."""
    with _decoding(path), Image.open(path) as image:
        mode, (width, height) = image.mode, image.size
        # Pillow would decode the whole of a PNG in search of metadata that may follow the pixels.
        tagged = image.format != "PNG" or "exif" in image.info
        turned = tagged and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    if mode.startswith(("I", "F")):
        raise UserError(f"{path} has pixels of more than 8 bits: convert it to 8 bits a channel")
    return (width, height) if turned else (height, width)


def _read_image(path: Path) -> np.ndarray:
    """Decode an image (H, W, 3) uint8."""
    with _decoding(path), Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _label_size(
    what: str, modes: tuple[str, ...], channels: tuple[int, ...]
) -> Callable[[Path], tuple[int, int]]:
    """Return a function that checks a label's header and returns its height and width.

    Args:
        what: The format for a sentence: what such a label must be.
        modes: Pillow's names of pixel formats that a PNG may have.
        channels: What must follow height and width in the shape of an array.
    """

    def size(path: Path) -> tuple[int, int]:
        if path.suffix.lower() == ".npy":
            with _decoding(path):
                array = np.lib.format.open_memmap(path, mode="r")  # the header only, and never a pickle
            if array.dtype.kind != "f" or array.ndim < 2 or array.shape[2:] != channels:
                raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, but {what}")
            return array.shape[0], array.shape[1]
        with _decoding(path), Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
        if mode not in modes:
            raise UserError(f"{path} is {_MODES.get(mode, f'a picture in mode {mode}')}, but {what}")
        return height, width

    return size


_MODES = {
    "1": "a black and white picture",
    "L": "an 8-bit grey picture",
    "LA": "a grey picture with transparency",
    "P": "a palette picture",
    "RGB": "an 8-bit RGB picture",
    "RGBA": "an 8-bit RGB picture with transparency",
    "I;16": "a 16-bit grey picture",
}

_LABEL_SIZES = {
    "segmentation": _label_size(
        "segmentation is a PNG of class indices in one channel", ("1", "L", "P", "I;16", "I"), ()
    ),
    "depth": _label_size(
        "depth is a 16-bit grey PNG, or a .npy of floats of shape (H, W)", ("I;16", "I"), ()
    ),
    "normals": _label_size(
        "normals are an 8-bit RGB PNG, or a .npy of floats of shape (H, W, 3)", ("RGB",), (3,)
    ),
}


def _stored(path: Path) -> np.ndarray:
    """Decode a label as it is stored."""
    with _decoding(path):
        if path.suffix.lower() == ".npy":
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        with Image.open(path) as image:
            return np.array(image)


def _read_segmentation(path: Path, classes: int, ignore_index: int) -> np.ndarray:
    """Decode class indices (H, W) uint8."""
    stored = _stored(path)
    ignored = stored == ignore_index
    wrong = (stored >= classes) & ~ignored
    if wrong.any():
        raise UserError(
            f"{path} has the value {stored[wrong][0]} in {np.count_nonzero(wrong)} pixels, but the {classes} "
            f"classes are 0 to {classes - 1} and ignore_index is {ignore_index}: correct the label, "
            "'classes' or 'ignore_index'"
        )
    return np.where(ignored, IGNORE_INDEX, stored).astype(np.uint8)


def _read_depth(path: Path, scale: float | None) -> np.ndarray:
    """Decode depth (H, W) float32 in metres."""
    if scale is None:
        scale = 1.0 if path.suffix.lower() == ".npy" else 0.001
    depth = _stored(path).astype(np.float32) * np.float32(scale)
    finite = np.isfinite(depth)
    if not finite.all():
        raise UserError(
            f"{path} has a depth of {depth[~finite][0]} in {np.count_nonzero(~finite)} pixels: where there "
            "is no measurement, store 0"
        )
    if depth.min() < 0:
        raise UserError(
            f"{path} has a negative depth, {depth.min():.4g} m: where there is no measurement, store 0"
        )
    if not depth.any():
        raise UserError(f"{path} has no measurement, every depth is 0: correct it, or remove it")
    measured = np.count_nonzero(depth)
    low, high = _DEPTH_RANGE
    if 2 * np.count_nonzero(depth > high) > measured or 2 * np.count_nonzero(depth >= low) < measured:
        raise UserError(
            f"{path} has a median depth of {np.median(depth[depth > 0]):.4g} m with a depth_scale of "
            f"{scale:g}: state the 'depth_scale' that turns stored values into metres"
        )
    return depth


def _read_normals(path: Path) -> np.ndarray:
    """Decode unit normals (H, W, 3) float32 in the camera's frame."""
    stored = _stored(path)
    normals = stored.astype(np.float32)
    if stored.dtype == np.uint8:
        normals = normals * np.float32(2 / 255) - 1
    if not np.isfinite(normals).all():
        raise UserError(
            f"{path} has a normal that is not finite: where there is no measurement, store (0, 0, 0)"
        )
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    # A stored unit vector has length 1 up to rounding; grey has 0, black and white the square root of 3.
    valid = (length > 0.5) & (length < 1.5)
    if not valid.any():
        raise UserError(
            f"{path} has no measurement, no vector has a length of about 1: correct it, or remove it"
        )
    if np.mean(normals[..., 2][valid[..., 0]] > 0) > 0.9:
        raise UserError(
            f"{path} has surfaces that face away from the camera: normals must be x right, y down, z forward "
            "(negate y and z if they are x right, y up, z towards the camera)"
        )
    unit = np.zeros_like(normals)
    np.divide(normals, length, out=unit, where=valid)
    return unit
