"""Sparsification and coverage, against closed forms and sorting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl.config import DepthOptions
from mtl.tasks.depth import DepthMetric
from mtl.uncertainty.coverage import IntervalCoverage
from mtl.uncertainty.sparsification import ERRORS, SparsificationError

OPTIONS = DepthOptions()
COUNT = 100 * 200

DEPTH = 2.0


def spread_errors() -> Tensor:
    """Return errors (1, 1, 100, 200) that are spread evenly over 0 to 1 m, in no order."""
    errors = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    return errors[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))].reshape(1, 1, 100, 200)


def measure(errors: Tensor, uncertainty: Tensor) -> dict[str, float]:
    metric = SparsificationError(OPTIONS)
    target = torch.full_like(errors, DEPTH)
    metric.update(target + errors, uncertainty[:, 0], target)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("scale", [1.0, 8.0, 2.0**-40, 2.0**60])
def test_a_perfect_ranking_has_no_area(scale: float) -> None:
    found = measure(spread_errors(), scale * spread_errors())
    for name in ERRORS:
        assert found[f"ause_{name}"] == 0
        # Of errors spread evenly, the rest has a mean that falls in a straight line.
        assert found[f"aurg_{name}"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("monotone", [torch.exp, torch.sqrt, lambda e: 3 * e, lambda e: 5 + e])
def test_any_rising_function_of_the_error_ranks_as_it_does(monotone: object) -> None:
    found = measure(spread_errors(), monotone(spread_errors()))  # type: ignore[operator]
    for name in ERRORS:
        assert 0 <= found[f"ause_{name}"] < 2e-3


def test_ignorance_and_its_opposite_in_closed_form() -> None:
    """What remains of e in [0, 1]: 1 - f for the oracle, 1 + f and sqrt(1 + f + f²) for the reverse order."""
    ignorant = measure(spread_errors(), torch.ones(1, 1, 100, 200))
    reverse = measure(spread_errors(), 1 / spread_errors())
    # The integral of sqrt(1 + f + f²) from 0 to 1.
    square = (3 * math.sqrt(3) - 1) / 4 + 3 / 8 * math.log((2 * math.sqrt(3) + 3) / 3)
    for name in ERRORS:
        assert ignorant[f"ause_{name}"] == pytest.approx(0.5, abs=2e-3)
        assert ignorant[f"aurg_{name}"] == pytest.approx(0, abs=1e-9)
        worst = square if name == "rmse" else 1.5
        assert reverse[f"ause_{name}"] == pytest.approx(worst - 0.5, abs=4e-3)
        assert reverse[f"aurg_{name}"] == pytest.approx(1 - worst, abs=4e-3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), low=st.floats(0.1, 1), high=st.floats(3, 10))
def test_is_what_sorting_says(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, prediction = (10 * torch.rand(3, 1, 40, 50, generator=generator) + 0.01 for _ in range(2))
    target[torch.rand(target.shape, generator=generator) < 0.3] = 0
    # At most one in a bin, over many orders of magnitude.
    ranks = (prediction - target).abs().flatten().mul(torch.rand(6000, generator=generator)).argsort().argsort()
    uncertainty = ((ranks.int() + 10_000) << 16).view(torch.float32).reshape(target.shape)
    uncertainty[target == 0] = math.nan  # where nothing is known, nothing is asked
    options = DepthOptions(min_depth=low, max_depth=high)
    metric = SparsificationError(options)
    parts = zip(prediction.split(1), uncertainty[:, 0].split(1), target.split(1), strict=True)
    for part in parts:
        metric.update(*part)

    kept = (target > low) & (target < high)
    p, t, u = (maps[kept].double().numpy() for maps in (prediction.clamp(low, high), target, uncertainty))
    errors = {"abs_error": abs(p - t), "abs_rel": abs(p - t) / t, "rmse": (p - t) ** 2}
    total = DepthMetric(options)
    total.update(prediction, target)
    for name, (removed, curve, oracle) in metric.curves().items():
        values = errors[name]
        # Errors that share a bin are less than 2^-7 apart, whose squares are twice that.
        for found, order, tolerance in ((curve, u.argsort(), 1e-6), (oracle, values.argsort(), 2**-6)):
            sums = np.concatenate([[0], values[order].cumsum()])
            left = np.interp((1 - removed) * len(values), np.arange(len(values) + 1), sums)
            expected = left / (1 - removed) / len(values)
            if name == "rmse":
                expected = np.sqrt(expected)
            np.testing.assert_allclose(found * float(total.compute()[name]), expected, rtol=tolerance)


def test_whatever_is_no_number_goes_first() -> None:
    errors = torch.tensor([0.1, 0.2, 0.3, 4.0]).reshape(1, 1, 2, 2)
    metric = SparsificationError(OPTIONS)
    metric.update(1 + errors, torch.tensor([1.0, 2.0, 3.0, math.nan]).reshape(1, 2, 2), torch.ones(1, 1, 2, 2))
    assert metric.compute()["ause_abs_error"].item() == pytest.approx(0, abs=1e-9)


def test_nothing_known_and_no_error() -> None:
    metric = SparsificationError(OPTIONS)
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 1, 2, 2))
    assert all(value.isnan() for value in metric.compute().values())
    coverage = IntervalCoverage(OPTIONS)
    assert all(value.isnan() for value in coverage.compute().values())


def test_no_cast_rounds_the_sums() -> None:
    metric = SparsificationError(OPTIONS).half()
    assert metric.by_error.dtype == torch.float64


def quantiles(distribution: str) -> Tensor:
    """Return a unit-variance distribution's quantiles, (1, 1, 100, 200)."""
    share = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    if distribution == "gaussian":
        values = torch.special.ndtri(share)
    else:
        values = torch.distributions.Laplace(0.0, 0.5**0.5).icdf(share)
    return values.reshape(1, 1, 100, 200)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_a_calibrated_model_covers_what_it_says(distribution: str) -> None:
    deviation = 0.01 + torch.rand(1, 100, 200, dtype=torch.float64)
    target = torch.full((1, 1, 100, 200), 50.0, dtype=torch.float64)
    for factor in (1.0, 2.0, 0.5):
        metric = IntervalCoverage(OPTIONS, distribution)  # type: ignore[arg-type]
        metric.update(target + quantiles(distribution) * deviation[:, None], deviation * factor, target)
        found = {name: value.item() for name, value in metric.compute().items()}
        for level in (0.5, 0.8, 0.9, 0.95):
            if distribution == "gaussian":
                reach = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)) * factor
                expected = (2 * torch.special.ndtr(reach) - 1).item()
            else:
                expected = 1 - (1 - level) ** factor
            assert found[f"coverage_{100 * level:g}"] == pytest.approx(expected, abs=2e-4)
        if factor == 1:
            assert found["miscalibration"] < 2e-4
    if distribution == "laplace":
        # The integral of 1 - (1 - q)^(1/2) - q, and its negative.
        assert found["miscalibration"] == pytest.approx(1 / 6, abs=1e-3)


def test_intervals_of_no_width_hold_what_is_right() -> None:
    metric = IntervalCoverage(OPTIONS)
    prediction = torch.tensor([1.0, 1, 2, 2]).reshape(1, 1, 2, 2)
    target = torch.tensor([1.0, 1, 2, 0]).reshape(1, 1, 2, 2) + torch.tensor([0.0, 0, 1, 0]).reshape(1, 1, 2, 2)
    metric.update(prediction, torch.zeros(1, 2, 2), target)
    assert metric.compute()["coverage_50"].item() == pytest.approx(2 / 3)
    assert metric.compute()["coverage_95"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("crop", ["none", "eigen"])
def test_the_pixels_are_those_of_the_depth_metric(crop: str) -> None:
    options = DepthOptions(min_depth=1.0, max_depth=4.0, crop=crop)  # type: ignore[arg-type]
    target, prediction = 5 * torch.rand(2, 1, 48, 64), 5 * torch.rand(2, 1, 48, 64) + 0.1
    theirs, ours, coverage = DepthMetric(options), SparsificationError(options), IntervalCoverage(options)
    theirs.update(prediction, target)
    ours.update(prediction, torch.rand(2, 48, 64), target)
    coverage.update(prediction, torch.rand(2, 48, 64), target)
    count = theirs.pixel_sums[0].item()
    assert count == ours.by_uncertainty[0].sum() == coverage.histogram.sum()
    assert (ours.by_error[1].sum() / count).item() == pytest.approx(theirs.compute()["abs_error"].item())
    assert (ours.by_error[2].sum() / count).item() == pytest.approx(theirs.compute()["abs_rel"].item())
