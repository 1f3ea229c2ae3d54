"""Colours that stand for classes and for numbers."""

from functools import cache

import matplotlib
import numpy as np

OKABE_ITO = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
    ],
    dtype=np.uint8,
)
"""The seven colours of Okabe & Ito (2008, "Color Universal Design") that are not black."""

RIGHT = np.array([128, 128, 128], dtype=np.uint8)
WRONG = np.array([255, 255, 255], dtype=np.uint8)
"""Where a class is right and where it is wrong: no class has these colours."""

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""From linear sRGB to cone responses, and from their cube roots to OKLab (Ottosson 2020)."""

_VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
"""Normal vision, protanopia and deuteranopia on linear RGB (Machado et al. 2009, severity 1)."""


def class_colours(count: int) -> np.ndarray:
    """Return a colour for each of `count` classes, (count, 3) uint8 sRGB.

    The first seven are Okabe & Ito's. Each further one is the colour farthest, to a person with or without
    red-green colour blindness, from all before it and from black and mid-grey, which have other meanings in
    the pictures, as white has; very dark and very light ones are not used. A class keeps its colour whatever the
    number of classes.

    Args:
        count: At most 256.
    """
    return _palette()[:count].copy()


@cache
def _palette(size: int = 256) -> np.ndarray:
    """Choose `size` colours by farthest-first traversal of a grid in sRGB."""
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _seen_by_all(grid)[0, :, 0]
    grid = grid[(lightness > 0.35) & (lightness < 0.95)]
    reserved = np.stack([np.zeros_like(RIGHT), RIGHT])
    seen = _seen_by_all(grid)
    distance = np.full(len(grid), np.inf)
    chosen = list(OKABE_ITO)
    for colour in [*reserved, *chosen]:
        distance = np.minimum(distance, _distance(seen, _seen_by_all(colour[None])))
    while len(chosen) < size:
        farthest = int(distance.argmax())
        chosen.append(grid[farthest])
        distance = np.minimum(distance, _distance(seen, seen[:, farthest : farthest + 1]))
    return np.stack(chosen)


def _seen_by_all(colours: np.ndarray) -> np.ndarray:
    """Return OKLab coordinates (3 visions, N, 3), lightness first, of sRGB colours (N, 3) uint8."""
    srgb = colours / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ _VISIONS.transpose(0, 2, 1)).clip(0, 1)
    oklab: np.ndarray = np.cbrt(seen @ _TO_LMS.T) @ _TO_OKLAB.T
    return oklab


def _distance(seen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the distance (N,) in the least favourable of the visions."""
    difference: np.ndarray = np.linalg.norm(seen - other, axis=-1).min(axis=0)
    return difference


def number_colours(values: np.ndarray, low: float, high: float, colormap: str) -> np.ndarray:
    """Draw numbers of any shape as colours (..., 3) uint8: `low` and `high` get the colormap's two ends.

    Args:
        values: Numbers; what lies outside the range is drawn as its nearer end.
        low: Lower end of the range.
        high: Upper end; where it does not exceed `low`, everything is drawn as the lower end.
        colormap: A name that matplotlib knows.
    """
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours: np.ndarray = matplotlib.colormaps[colormap](share, bytes=True)
    return colours[..., :3]
