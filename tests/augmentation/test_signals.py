"""Changes of signals: what each does, and that they belong to a sample wherever it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl.augmentation.signals import SignalAugmentation, circular_shift
from mtl.data.sample import Batch
from mtl.errors import UserError

FULL = {"shift": 1.0, "scale": 0.2, "noise": 0.1}


def batch(count: int = 6, epoch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    draw = torch.tensor([[epoch, position] for position in range(count)])
    return {"signal": torch.randn(count, 1, 40, generator=generator), "label": torch.arange(count) % 10, "draw": draw}


def ramps(count: int, epoch: int = 0) -> Batch:
    """Return signals that tell each of their places: 1, 2, ... 40."""
    return {**batch(count, epoch), "signal": torch.arange(1.0, 41).repeat(count, 1, 1)}


def changed(given: Batch, seed: int = 0, *, shift: float = 0.0, scale: float = 0.0, noise: float = 0.0) -> Tensor:
    return SignalAugmentation(seed, shift=shift, scale=scale, noise=noise)(given)["signal"]


class TestWhose:
    def test_a_sample_s_changes_are_its_own_whoever_shares_the_batch(self) -> None:
        whole = batch()
        part = {name: value[[4, 1]] for name, value in whole.items()}
        torch.testing.assert_close(changed(part, **FULL), changed(whole, **FULL)[[4, 1]], rtol=0, atol=0)

    def test_seed_epoch_and_position_decide(self) -> None:
        before = changed(batch(), **FULL)
        assert torch.equal(before, changed(batch(), **FULL))
        moved = {**batch(), "draw": batch()["draw"] + torch.tensor([0, 1])}
        for other in (changed(batch(), seed=1, **FULL), changed(batch(epoch=3), **FULL), changed(moved, **FULL)):
            assert not any(torch.equal(a, b) for a, b in zip(other, before, strict=True))

    def test_the_rest_of_the_batch_and_what_was_given_stay(self) -> None:
        given, kept = batch(), batch()
        result = SignalAugmentation(0, **FULL)(given)
        assert result.keys() == kept.keys()
        assert all(torch.equal(result[name], kept[name]) for name in ("label", "draw"))
        assert all(torch.equal(given[name], kept[name]) for name in kept)
        assert result["signal"].dtype == torch.float32

    def test_nothing_asked_for_is_nothing_done(self) -> None:
        assert torch.equal(changed(batch()), batch()["signal"])


class TestShift:
    def test_a_share_of_the_signals_shifts_as_all_would_and_the_others_stay(self) -> None:
        given = ramps(400)["signal"]
        every, half = changed(ramps(400), shift=1.0), changed(ramps(400), shift=0.5)
        moved = (half != given).flatten(1).any(1)
        assert torch.equal(half[moved], every[moved])
        # Of half of them, one in forty is shifted by nothing; the standard deviation is 0.025.
        assert moved.double().mean() == pytest.approx(0.5 * 39 / 40, abs=0.1)

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
    def test_a_share_is_one(self, share: float) -> None:
        with pytest.raises(UserError, match="of the signals are to be shifted"):
            SignalAugmentation(0, shift=share)

    @given(st.lists(st.integers(0, 39), min_size=1, max_size=5), st.integers(1, 3))
    @settings(max_examples=30, deadline=None)
    def test_is_a_roll(self, places: list[int], channels: int) -> None:
        signal = torch.randn(len(places), channels, 40)
        rolled = torch.stack([row.roll(place, dims=-1) for row, place in zip(signal, places, strict=True)])
        assert torch.equal(circular_shift(signal, torch.tensor(places)), rolled)

    def test_every_shift_is_as_likely_as_the_others(self) -> None:
        shifted = changed(ramps(8000), shift=True)[:, 0]
        assert torch.equal(shifted.sort(dim=1).values, ramps(8000)["signal"][:, 0])
        counts = np.bincount(shifted.argmin(dim=1).numpy(), minlength=40)
        # Chi-square with 39 degrees of freedom: mean 39, and more than 73 in one of a thousand.
        assert ((counts - 200) ** 2 / 200).sum() < 73


class TestScale:
    def test_is_one_uniform_factor_a_sample(self) -> None:
        factors = (changed(ramps(8000), scale=0.2) / ramps(8000)["signal"])[:, 0]
        assert (factors - factors[:, :1]).abs().max() < 1e-6
        share = (factors[:, 0].sort().values - 0.8) / 0.4
        # Kolmogorov and Smirnov's distance to the uniform distribution, exceeded by one of a thousand.
        assert (share - (torch.arange(8000) + 0.5) / 8000).abs().max() < 1.95 / 8000**0.5
        assert 0 <= share[0] < 0.002 and 0.998 < share[-1] <= 1

    def test_does_not_follow_from_the_shift(self) -> None:
        both = changed(ramps(8000), shift=True, scale=0.2)[:, 0]
        correlation = np.corrcoef(both.min(dim=1).values, both.argmin(dim=1))[0, 1]
        assert abs(correlation) < 3.3 / 8000**0.5


class TestNoise:
    def test_is_normal_and_independent(self) -> None:
        noise = (changed(batch(4000), noise=0.5) - batch(4000)["signal"])[:, 0].double() / 0.5
        assert noise.mean().abs() < 4 / noise.numel() ** 0.5
        assert noise.var().item() == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5)
        assert (noise.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)
        correlations = torch.corrcoef(noise.T) - torch.eye(40)
        assert correlations.abs().max() < 5 / 4000**0.5
        assert len(torch.unique(noise[:, 0])) > 3000

    def test_comes_after_scaling(self) -> None:
        silent = {**batch(2000), "signal": torch.zeros(2000, 1, 40)}
        for scale in (0.0, 0.9):
            deviations = changed(silent, scale=scale, noise=0.3).std(dim=2)
            # Of forty numbers each, whatever the factor of their signal.
            assert deviations.min() > 0.15 and deviations.max() < 0.45


class TestRefused:
    @pytest.mark.parametrize("scale", [-0.1, 1.0, float("nan"), float("inf")])
    def test_scale(self, scale: float) -> None:
        with pytest.raises(UserError, match=r"scaled by up to .*at least 0 and below 1"):
            SignalAugmentation(0, scale=scale)

    @pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
    def test_noise(self, noise: float) -> None:
        with pytest.raises(UserError, match=r"noise on signals .*at least 0 and finite"):
            SignalAugmentation(0, noise=noise)
