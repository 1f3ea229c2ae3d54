"""Fitting a sample to a size: scale until it covers the size, cut the middle out.

All maps go through one geometry and one symmetric kernel, so none of them drifts against another: target
pixel x of a window that begins at source pixel x0 and is scaled by s covers the source interval
[x0 - 0.5 + x / s, x0 - 0.5 + (x + 1) / s] (pixel centres at integers). When shrinking, a target pixel is
the average over that interval; when enlarging, the linear interpolation at its middle. Picking the nearest
pixel instead would be off by a quarter of a target pixel when shrinking by two, and albumentations'
``Resize`` offers nothing else that knows invalid labels; so this calls OpenCV, as albumentations does.

=============== =====================================================================================
map             what is averaged
=============== =====================================================================================
`image`         its values
`segmentation`  one indicator a class; the class with the largest share wins
`depth`         1 / depth over valid pixels: affine across the picture of a plane, so that planes stay planes
`normals`       the vectors over valid pixels, normalised again
=============== =====================================================================================

A target pixel is valid if at least half of it is. Depth and normals keep their values under scaling (they
are metric); the intrinsics say what changed. Known limit: a pixel that straddles two surfaces gets a depth
between theirs.
"""

from collections.abc import Callable

import cv2
import numpy as np

from mtl.data.sample import IGNORE_INDEX, Sample

_HALF = 0.5 - 1e-4
"""The least valid share of a valid pixel, with room for the rounding of exact halves."""

_TIE = 1e-4
"""Shares that differ by less than this are equal up to rounding."""

_MIN_LENGTH = 1e-3
"""Normals whose average is shorter than this cancel out and have no direction."""


def fit(sample: Sample, size: tuple[int, int]) -> Sample:
    """Scale a sample so that it covers `size` and cut out the middle.

    The scale is the same in both directions up to the rounding of the window to whole source pixels.

    Args:
        sample: As `mtl.data.sample` defines it; every map has the height and width of `image`.
        size: Height and width of the result in pixels.

    Returns:
        A new sample with the same keys and types; intrinsics are those of the new pixels.
    """
    source_height, source_width = sample["image"].shape[:2]
    top, left, height, width = _window((source_height, source_width), size)
    rows, columns = slice(top, top + height), slice(left, left + width)
    fitted = {key: _FITTERS[key](value[rows, columns], size) for key, value in sample.items() if key != "intrinsics"}
    if "intrinsics" in sample:
        scale_y, scale_x = size[0] / height, size[1] / width
        to_target = np.array(
            [
                [scale_x, 0, (0.5 - left) * scale_x - 0.5],
                [0, scale_y, (0.5 - top) * scale_y - 0.5],
                [0, 0, 1],
            ]
        )
        fitted["intrinsics"] = (to_target @ sample["intrinsics"]).astype(np.float32)
    return fitted


def _window(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the central part of the source with the shape of `size`."""
    scale = max(target / available for target, available in zip(size, source, strict=True))
    height, width = (
        min(available, max(1, round(target / scale))) for target, available in zip(size, source, strict=True)
    )
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width


def resample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average (H, W) or (H, W, C) over target pixels when shrinking, interpolate linearly when enlarging."""
    height, width = values.shape[:2]
    if (height, width) == size:
        return np.array(values)
    shrinks = height >= size[0] and width >= size[1]
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, size[::-1], interpolation=kernel))


def _fit_segmentation(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Let the class with the largest share win each pixel; (H, W) uint8 to `size`."""
    if classes.shape == size:
        return np.array(classes)
    classes = np.ascontiguousarray(classes)
    present = np.flatnonzero(cv2.calcHist([classes], [0], None, [256], [0, 256]))
    # Equal shares are common (shrinking by two). If the lower index always won, its regions would grow, and
    # if the left one did, edges would drift: on a chessboard, the lower wins on black, the higher on white.
    to_win = np.full(size, _TIE, np.float32)
    to_win[::2, ::2] = to_win[1::2, 1::2] = -_TIE
    winner = np.full(size, IGNORE_INDEX, np.uint8)
    most = np.zeros(size, np.float32)
    valid_share = np.zeros(size, np.float32)
    for index in present[present != IGNORE_INDEX]:
        share = resample((classes == index).astype(np.float32), size)
        np.copyto(winner, index, where=share > most + to_win, casting="unsafe")
        np.maximum(most, share, out=most)
        valid_share += share
    winner[valid_share < _HALF] = IGNORE_INDEX
    return winner


def _fit_depth(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average inverse depth over valid pixels; (H, W) float32 metres to `size`."""
    valid = depth > 0
    inverse = np.zeros_like(depth)
    np.divide(1, depth, out=inverse, where=valid)
    share = resample(valid.astype(np.float32), size)
    fitted = np.zeros(size, np.float32)
    np.divide(share, resample(inverse, size), out=fitted, where=share >= _HALF)
    return fitted


def _fit_normals(normals: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average vectors over valid pixels and normalise; (H, W, 3) float32 to `size`."""
    share = resample(np.any(normals, axis=-1).astype(np.float32), size)
    total = resample(normals, size)
    length = np.linalg.norm(total, axis=-1)
    valid = (share >= _HALF) & (length >= _MIN_LENGTH)
    fitted = np.zeros((*size, 3), np.float32)
    np.divide(total, length[..., None], out=fitted, where=valid[..., None])
    return fitted


_FITTERS: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "image": resample,
    "segmentation": _fit_segmentation,
    "depth": _fit_depth,
    "normals": _fit_normals,
}
