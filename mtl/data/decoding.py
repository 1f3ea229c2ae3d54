"""Reads single files of a folder: pictures, and labels whose values must make sense."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mtl.data.sample import IGNORE_INDEX
from mtl.errors import UserError

_DEPTH_RANGE = (1e-3, 1e3)
"""Metres within which half of a depth map must lie; anything else is a wrong scale."""


def reason(error: Exception) -> str:
    """Return a library's reason in one line, without the path that our sentence has already."""
    return getattr(error, "strerror", None) or str(error).split("\n", maxsplit=1)[0].split(" file '")[0].rstrip(".")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what Pillow and NumPy raise for a file that is damaged or too large into a `UserError`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels, the most that are "
            "read: make it smaller, or cut it into several"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): it is truncated or not what its name says"
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return an image's height and width, as a viewer would show it."""
    with _decoding(path), Image.open(path) as image:
        mode, (width, height) = image.mode, image.size
        # Pillow would decode the whole of a PNG in search of metadata that may follow the pixels.
        tagged = image.format != "PNG" or "exif" in image.info
        turned = tagged and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    if mode.startswith(("I", "F")):
        raise UserError(f"{path} has pixels of more than 8 bits: convert it to 8 bits a channel")
    return (width, height) if turned else (height, width)


def read_image(path: Path) -> np.ndarray:
    """Decode an image (H, W, 3) uint8."""
    with _decoding(path), Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _label_size(what: str, modes: tuple[str, ...], channels: tuple[int, ...]) -> Callable[[Path], tuple[int, int]]:
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

LABEL_SIZES = {
    "segmentation": _label_size(
        "segmentation is a PNG of class indices in one channel", ("1", "L", "P", "I;16", "I"), ()
    ),
    "depth": _label_size("depth is a 16-bit grey PNG, or a .npy of floats of shape (H, W)", ("I;16", "I"), ()),
    "normals": _label_size("normals are an 8-bit RGB PNG, or a .npy of floats of shape (H, W, 3)", ("RGB",), (3,)),
}


def _stored(path: Path) -> np.ndarray:
    """Decode a label as it is stored."""
    with _decoding(path):
        if path.suffix.lower() == ".npy":
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        with Image.open(path) as image:
            return np.array(image)


def read_segmentation(path: Path, classes: int, ignore_index: int) -> np.ndarray:
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


def read_depth(path: Path, scale: float | None) -> np.ndarray:
    """Decode depth (H, W) float32 in metres.

    Args:
        path: The file; a scale of its own may stand in a JSON file of the same stem, as `Depth.encode` writes it.
        scale: Metres for one unit, where the file has no scale of its own; None is a metre in .npy, a millimetre
            otherwise.

    Raises:
        UserError: It cannot be read, or its values make no sense.
    """
    if (beside := path.with_suffix(".json")).is_file():
        scale = _own_scale(beside)
    elif scale is None:
        scale = 1.0 if path.suffix.lower() == ".npy" else 0.001
    depth = _stored(path).astype(np.float32) * np.float32(scale)
    finite = np.isfinite(depth)
    if not finite.all():
        raise UserError(
            f"{path} has a depth of {depth[~finite][0]} in {np.count_nonzero(~finite)} pixels: where there "
            "is no measurement, store 0"
        )
    if depth.min() < 0:
        raise UserError(f"{path} has a negative depth, {depth.min():.4g} m: where there is no measurement, store 0")
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


def _own_scale(path: Path) -> float:
    """Return the metres for one unit of the depth map beside a JSON file."""
    try:
        scale = float(json.loads(path.read_text())["metres_per_unit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say {{'metres_per_unit': NUMBER}}, as a JSON file beside a depth map must; remove it, if "
            "it has nothing to do with it"
        ) from error
    if not 0 < scale < math.inf:
        raise UserError(f"{path} has {scale} metres_per_unit, which must be positive and finite")
    return scale


def read_normals(path: Path) -> np.ndarray:
    """Decode unit normals (H, W, 3) float32 in the camera's frame."""
    stored = _stored(path)
    normals = stored.astype(np.float32)
    if stored.dtype == np.uint8:
        normals = normals * np.float32(2 / 255) - 1
    if not np.isfinite(normals).all():
        raise UserError(f"{path} has a normal that is not finite: where there is no measurement, store (0, 0, 0)")
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    # A stored unit vector has length 1 up to rounding; grey has 0, black and white the square root of 3.
    valid = (length > 0.5) & (length < 1.5)
    if not valid.any():
        raise UserError(f"{path} has no measurement, no vector has a length of about 1: correct it, or remove it")
    if np.mean(normals[..., 2][valid[..., 0]] > 0) > 0.9:
        raise UserError(
            f"{path} has surfaces that face away from the camera: normals must be x right, y down, z forward "
            "(negate y and z if they are x right, y up, z towards the camera)"
        )
    unit = np.zeros_like(normals)
    np.divide(normals, length, out=unit, where=valid)
    return unit
