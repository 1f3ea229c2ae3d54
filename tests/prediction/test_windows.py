"""Windows against closed forms and torch's own interpolation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mtl.prediction.windows import blend, cover, resize

lengths = st.integers(1, 200)
overlaps = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])


@given(lengths, lengths, overlaps)
def test_windows_cover_with_at_least_the_overlap_and_none_to_spare(length: int, window: int, overlap: float) -> None:
    axis = cover(length, window, overlap)
    assert axis.window == min(window, length) and axis.starts[0] == 0 and axis.starts[-1] == length - axis.window
    steps = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    allowed = max(1, axis.window - round(overlap * axis.window))
    assert all(0 < step <= allowed for step in steps)
    assert (len(axis.starts) - 2) * allowed < length - axis.window or len(axis.starts) == 1, "one fewer would not do"


@given(lengths, lengths, overlaps)
def test_weights_are_positive_symmetric_and_sum_to_one(length: int, window: int, overlap: float) -> None:
    axis = cover(length, window, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights > 0).all()
        total[start : start + axis.window] += weights
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
    if len(axis.starts) == 1:
        assert (axis.weights == 1).all(), "exactly, so that one pass stays what it is"


def test_neighbours_meet_halfway() -> None:
    axis = cover(28, 16, 0.25)
    assert axis.starts == [0, 12]
    fall, rise = axis.weights[0, 12:], axis.weights[1, :4]
    assert torch.allclose(fall, rise.flip(0)) and fall[1] > 0.5 > fall[2]
    assert (axis.weights[0, :12] == 1).all(), "alone there"


@settings(max_examples=60, deadline=None)
@given(lengths, lengths, st.integers(1, 60), st.integers(1, 60), overlaps)
def test_blended_windows_of_a_map_are_the_map(height: int, width: int, tall: int, wide: int, overlap: float) -> None:
    whole = torch.rand(2, height, width, dtype=torch.float64)
    rows, columns = cover(height, tall, max(overlap, 0.1)), cover(width, wide, overlap)
    if len(rows.starts) * len(columns.starts) > 2000:
        return
    pieces = (whole[:, y : y + rows.window, x : x + columns.window] for y in rows.starts for x in columns.starts)
    strips = list(blend(pieces, rows, columns))
    assert all(strip.shape[1] <= rows.window for strip in strips), "no more is held than the windows of one row"
    assert torch.allclose(torch.cat(strips, dim=1), whole, rtol=0, atol=1e-12)


def test_blended_windows_that_disagree_are_weighted_and_half_precision_is_summed_in_single() -> None:
    rows, columns = cover(1, 1, 0), cover(28, 16, 0.25)
    pieces = iter([torch.zeros(1, 1, 16).bfloat16(), torch.ones(1, 1, 16).bfloat16()])
    (strip,) = blend(pieces, rows, columns)
    assert strip.dtype == torch.float32
    assert torch.allclose(strip[0, 0, 12:16], columns.weights[1, :4].float())


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 40), lengths, st.integers(1, 40), st.integers(1, 50), st.integers(1, 30))
def test_resized_bands_are_torch_s_interpolation(
    height: int, width: int, tall: int, wide: int, strip: int, band: int
) -> None:
    whole = torch.rand(3, height, width)
    bands = list(resize(iter(whole.split(strip, dim=1)), (height, width), (tall, wide), band))
    assert all(b.shape[0] == 3 and b.shape[1] <= band and b.shape[2] == wide for b in bands)
    expected = functional.interpolate(whole.double()[None], (tall, wide), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(torch.cat(bands, dim=1).double(), expected, rtol=0, atol=1e-4)
    if (height, width) == (tall, wide):
        assert torch.equal(torch.cat(bands, dim=1), whole)
