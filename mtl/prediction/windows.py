"""Sliding windows: how they cover an image, and how what is computed for each becomes one map again.

Everything works on rows from top to bottom, a strip at a time, so that no map of many channels is ever held whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Cover(NamedTuple):
    """Windows of one size along one axis.

    Attributes:
        length: Pixels to cover.
        window: Pixels of a window.
        starts: First pixel of each window; they are spread evenly, and the last window ends with the axis.
        weights: (windows, window) float64, positive; over all windows they sum to 1 at each pixel.
    """

    length: int
    window: int
    starts: list[int]
    weights: Tensor


def cover(length: int, window: int, overlap: float) -> Cover:
    """Return as few windows as overlap by at least this share.

    The weights are Hann's, sin²: smooth, and least at a window's border, where a network sees least around a pixel.

    Args:
        length: Pixels to cover, at least one.
        window: Pixels of a window; no more than `length` are used.
        overlap: Share of a window, at least 0 and less than 1.
    """
    window = min(window, length)
    step = max(1, window - round(overlap * window))
    count = 1 + -(-(length - window) // step)
    starts = np.linspace(0, length - window, count).round().astype(int).tolist()
    hann = torch.sin(torch.pi * (torch.arange(window, dtype=torch.float64) + 0.5) / window).square()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += hann
    # A window that is alone somewhere has the weight 1 there, exactly.
    return Cover(length, window, starts, torch.stack([hann / total[start : start + window] for start in starts]))


def blend(pieces: Iterator[Tensor], rows: Cover, columns: Cover) -> Iterator[Tensor]:
    """Yield the weighted mean of windows in strips (C, rows, W), as soon as no later window can change them.

    Args:
        pieces: (C, rows.window, columns.window) for each window, row by row; their sum is in float32 at least.
        rows: The windows down the image.
        columns: The windows across it.
    """
    kept: Tensor | None = None
    for start, end, row_weights in zip(rows.starts, [*rows.starts[1:], rows.length], rows.weights, strict=True):
        strip: Tensor | None = None
        for left, column_weights in zip(columns.starts, columns.weights, strict=True):
            piece = next(pieces)
            if strip is None:
                dtype = torch.promote_types(piece.dtype, torch.float32)
                strip = piece.new_zeros((len(piece), rows.window, columns.length), dtype=dtype)
                if kept is not None:
                    strip[:, : kept.shape[1]] = kept
            weights = (row_weights[:, None] * column_weights).to(strip)
            strip[..., left : left + columns.window] += weights * piece
        assert strip is not None, "there is at least one window"
        yield strip[:, : end - start]
        kept = strip[:, end - start :]


def resize(strips: Iterator[Tensor], source: tuple[int, int], size: tuple[int, int], band: int) -> Iterator[Tensor]:
    """Yield a map resampled to another size, in bands (C, at most `band`, width) from top to bottom.

    Together they are ``functional.interpolate(map, size, mode="bilinear", align_corners=False)``, which aligns the
    pixels' areas; at the same size they are the map itself.

    Args:
        strips: The map, (C, rows, source width) each.
        source: Height and width of the map.
        size: Height and width of the result.
        band: The most rows to yield at once.
    """
    position = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * (source[0] / size[0]) - 0.5).clamp(min=0)
    above = position.floor().long().clamp(max=source[0] - 1)
    below = (above + 1).clamp(max=source[0] - 1)
    share = position - above
    first = done = 0  # rows of the map before those held, rows of the result yielded
    held: Tensor | None = None
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], dim=1)
        ready = int(torch.searchsorted(below, first + held.shape[1]))
        for top in range(done, ready, band):
            rows = slice(top, min(top + band, ready))
            upper, lower = (held[:, (index[rows] - first).to(held.device)] for index in (above, below))
            stretched = upper.lerp(lower, share[rows, None].to(upper))
            if source[1] != size[1]:
                wide = (stretched.shape[1], size[1])
                stretched = functional.interpolate(stretched[None], wide, mode="bilinear", align_corners=False)[0]
            yield stretched
        done = ready
        if done < size[0]:
            passed = min(int(above[done]) - first, held.shape[1])
            held, first = held[:, passed:], first + passed
