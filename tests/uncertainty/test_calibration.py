"""Calibration against torchmetrics, scikit-free references and temperatures known in closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from mtl.errors import UserError
from mtl.uncertainty.calibration import (
    COLDEST,
    HOTTEST,
    CalibrationError,
    PixelSample,
    at_temperature,
    fit_temperature,
)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31), bins=st.integers(1, 20), classes=st.integers(2, 6), sharpness=st.sampled_from([0.3, 3])
)
def test_is_torchmetrics(seed: int, bins: int, classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    soft = (sharpness * torch.randn(3, classes, 5, 7, generator=generator)).softmax(1)
    soft = soft.clamp(max=1 - 2**-20)  # For a confidence of exactly 1 torchmetrics has a bin of its own.
    target = torch.randint(classes, (3, 5, 7), generator=generator, dtype=torch.uint8)
    target[torch.rand(3, 5, 7, generator=generator) < 0.3] = 255
    ours = CalibrationError(bins)
    for image, labels in zip(soft.split(1), target.split(1), strict=True):
        ours.update(image, labels)
    found = ours.compute()
    for name, norm in (("ece", "l1"), ("mce", "max")):
        theirs = MulticlassCalibrationError(classes, bins, norm, ignore_index=255)  # type: ignore[arg-type]
        theirs.update(soft, target.long())
        assert found[name].item() == pytest.approx(theirs.compute().item(), abs=1e-5)
    nll = F.nll_loss(soft.log(), target.long(), ignore_index=255)
    assert found["nll"].item() == pytest.approx(nll.item(), abs=1e-5)
    # However it is split.
    whole = CalibrationError(bins)
    whole.update(soft, target)
    assert all(torch.equal(value, whole.compute()[name]) for name, value in found.items())
    confidence, accuracy, share = whole.reliability()
    full = share > 0
    assert found["ece"].item() == pytest.approx((share * abs(confidence - accuracy))[full].sum(), abs=1e-6)


def test_in_closed_form() -> None:
    """Ten pixels said to be right with 0.9, of which six are; ten with 1, all of which are."""
    soft = torch.tensor([[0.9, 0.1]] * 10 + [[0.0, 1.0]] * 10)
    target = torch.tensor([0] * 6 + [1] * 4 + [1] * 10)
    metric = CalibrationError(15)
    metric.update(soft, target)
    found = metric.compute()
    assert found["ece"].item() == pytest.approx(0.15)
    assert found["mce"].item() == pytest.approx(0.3)
    confidence, accuracy, share = metric.reliability()
    np.testing.assert_allclose(share[-2:], [0.5, 0.5])
    np.testing.assert_allclose(accuracy[-2:], [0.6, 1.0])
    np.testing.assert_allclose(confidence[-2:], [0.9, 1.0], rtol=1e-6)
    assert not share[:-2].any() and np.isnan(accuracy[:-2]).all()
    assert found["nll"].item() == pytest.approx(-(6 * math.log(0.9) + 4 * math.log(0.1)) / 20)


def test_without_labels_nothing_is_known() -> None:
    metric = CalibrationError()
    metric.update(torch.full((1, 3, 2, 2), 1 / 3), torch.full((1, 2, 2), 255))
    assert all(value.isnan() for value in metric.compute().values())


def two_classes(logit: float, right: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that all give the second class the same odds, and labels of which some are it."""
    return torch.tensor([[0.0, logit]]).expand(count, 2), (torch.arange(count) < right).long()


@pytest.mark.parametrize(("logit", "right"), [(2.0, 70), (0.3, 90), (-1.0, 20), (25.0, 88)])
def test_temperature_in_closed_form(logit: float, right: int) -> None:
    """The best probability of the second class is its share p, so that logit / T = ln p / (1 - p)."""
    temperature = fit_temperature(*two_classes(logit, right, 100))
    assert temperature == pytest.approx(logit / math.log(right / (100 - right)), rel=1e-6)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_and_calibrates(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits * true, labels)
    assert found == pytest.approx(true, rel=0.03)
    before, after = CalibrationError(), CalibrationError()
    before.update((logits * true).softmax(1), labels)
    after.update((logits * true / found).softmax(1), labels)
    assert after.compute()["ece"] < 0.01
    assert after.compute()["nll"] <= before.compute()["nll"] + 1e-6
    if true != 1:
        assert before.compute()["ece"] > 0.05


def test_temperatures_without_a_best_end_at_the_bounds() -> None:
    """The likelihood still rises there, but by less than can be told."""
    assert COLDEST <= fit_temperature(*two_classes(2.0, 100, 100)) < 0.1
    assert COLDEST <= fit_temperature(*two_classes(0.02, 100, 100)) < 0.02
    # Where the likelier class is the rarer, no confidence is the best.
    assert 50 < fit_temperature(*two_classes(2.0, 10, 100)) <= HOTTEST


def test_at_temperature() -> None:
    logits = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(at_temperature(logits.softmax(1), 2.5), (logits / 2.5).softmax(1))
    sure = at_temperature(torch.tensor([[1.0, 0.0]]), 2.0)
    assert sure.isfinite().all() and sure[0, 0] > 0.999


def test_a_sample_is_bounded_spread_and_independent_of_batches() -> None:
    # A power of two wide, as a stride would be.
    images, height, width = 40, 16, 64
    column = torch.arange(width).float().expand(images, 1, height, width)
    row = torch.arange(images * height).float().reshape(images, 1, height, 1).expand(images, 1, height, width)
    logits = torch.cat([column, row], dim=1)
    labels = torch.arange(images * height * width).reshape(images, height, width) % 7
    labels[labels == 6] = 255
    samples = []
    for size in (1, 7, images):
        sample = PixelSample(1000)
        for some, target in zip(logits.split(size), labels.split(size), strict=True):
            sample.add(some, target)
        samples.append(sample)
        assert 500 <= len(sample.labels) <= 1000
        assert torch.equal(sample.logits, samples[0].logits)
        assert torch.equal(sample.labels, samples[0].labels)
    counts = np.bincount(sample.logits[:, 0].int().numpy(), minlength=width)
    assert counts.min() > 0 and counts.max() < 3 * counts.mean()
    assert np.bincount(sample.labels).max() < 1.3 * len(sample.labels) / 6
    # Each pixel has its own label.
    place = (sample.logits[:, 1] * width + sample.logits[:, 0]).long()
    assert torch.equal(place % 7, sample.labels)
    assert len(place.unique()) == len(place)


def test_a_small_set_is_kept_whole() -> None:
    sample = PixelSample(100)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    sample.add(logits, labels)
    assert torch.equal(sample.logits, logits.permute(0, 2, 3, 1).reshape(-1, 3))
    assert torch.equal(sample.labels, labels.flatten())


def test_sentences() -> None:
    with pytest.raises(UserError, match="fitted to no labels"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(UserError, match="not finite"):
        fit_temperature(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
