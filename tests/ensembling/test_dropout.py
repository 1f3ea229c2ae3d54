"""Random passes: what drops, from which generator, and that their mean is what theory says."""

import math
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.ensembling.combine import combine
from mtl.ensembling.dropout import MonteCarlo, sampling, seeded
from mtl.errors import UserError
from mtl.tasks.depth import NEAREST
from mtl.training.module import MultiTaskModule

SIZE = (32, 32)
IMAGE = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def module(**fields: Any) -> MultiTaskModule:
    fields = {"init": "none", "decoder_channels": 16, "task": ("depth",), "data": {"size": SIZE}} | fields
    return build_module(validate(fields), DataInfo("test", ("depth",)), total_steps=0)


def test_only_dropout_is_in_training() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Dropout1d(0.0), DropPath(0.3), nn.AlphaDropout(0.1))
    model.train()
    model[1].eval()
    model[4].eval()
    before = [part.training for part in model.modules()]
    with sampling(model) as active:
        assert active == [model[0], model[4]]
        assert [part.training for part in model.modules()] == [False, True, False, False, False, True]
    assert [part.training for part in model.modules()] == before
    with pytest.raises(KeyError), sampling(model, drop_path=True) as active:
        assert active == [model[0], model[3], model[4]]
        raise KeyError
    assert [part.training for part in model.modules()] == before


def test_a_recurrent_networks_own_dropout_drops() -> None:
    network = nn.GRU(2, 8, num_layers=2, dropout=0.5).eval()
    signal = torch.randn(5, 1, 2)
    assert torch.equal(network(signal)[0], network(signal)[0])
    with sampling(network):
        assert not torch.equal(network(signal)[0], network(signal)[0])


def test_what_is_frozen_does_not_drop() -> None:
    frozen = module(freeze=True, dropout=0.5)
    frozen.model.backbone.encoder.add_module("extra", nn.Dropout(0.5))
    with sampling(frozen.model) as active:
        assert active == [frozen.model.head("depth").dropout]
    stages = module(freeze_stages=1, dropout=0.5)
    backbone = stages.model.backbone
    inside = next(part for part in backbone._inert if isinstance(part, nn.Sequential))
    inside.add_module("extra", nn.Dropout(0.5))
    backbone.encoder.add_module("extra", nn.Dropout(0.5))
    with sampling(stages.model) as active:
        assert set(active) == {backbone.encoder.extra, stages.model.head("depth").dropout}


def test_seeded_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with seeded(7, torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_differ_and_repeat() -> None:
    trained = module(dropout=0.3).eval()
    state = torch.get_rng_state()
    first = MonteCarlo(trained, passes=3).combine(IMAGE)["depth"]
    again = MonteCarlo(trained, passes=3)
    again.combine(IMAGE.flip(0))
    torch.testing.assert_close(again.combine(IMAGE)["depth"], first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.uncertainty > 0).any()
    assert not torch.equal(MonteCarlo(trained, passes=3, seed=1).soft(IMAGE)["depth"], first.soft)
    assert not any(part.training for part in trained.modules())
    # The first passes are the same whatever their number.
    by_hand = []
    task = next(iter(trained.each_task()))
    hook = trained.model.register_forward_hook(lambda *given: by_hand.append(given[-1]["depth"]))
    more = MonteCarlo(trained, passes=4, kind="median").combine(IMAGE)["depth"]
    hook.remove()
    torch.testing.assert_close(more, combine("median", by_hand, task))
    torch.testing.assert_close(first, combine("mean", by_hand[:3], task))


class Linear(nn.Module):
    """w·x + 30 at each pixel, where softplus is the identity."""

    def __init__(self, weight: tuple[float, ...], rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)
        self.weight = torch.tensor(weight).reshape(1, -1, 1, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"depth": 30 + (self.weight * self.dropout(image)).sum(1, keepdim=True)}


def test_the_spread_of_a_linear_layer_is_the_binomials() -> None:
    """With weights w and dropout p, the mean is w·x and the variance Σ (w x)² p / (1 - p)."""
    linear = module()
    linear.model = Linear((1.0, -2.0, 0.5), 0.25)  # type: ignore[assignment]
    image = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    passes = 100
    combined = MonteCarlo(linear, passes=passes).combine(image)["depth"]
    # A pixel's draws are its own: 4096 estimates from 100 passes each.
    variance = (1 + 16 + 4) * 0.25 / 0.75
    assert combined.uncertainty.square().mean().item() * passes / (passes - 1) == pytest.approx(variance, rel=0.02)
    error = math.sqrt(variance / passes / 64**2)
    assert combined.prediction.mean().item() == pytest.approx(30 + 1 - 4 + 2 + NEAREST, abs=4 * error)


def test_sentences() -> None:
    skipping = module(dropout=0.0)
    with pytest.raises(UserError, match=r"--dropout 0.1, or with --drop-path 0.1"):
        MonteCarlo(skipping)
    skipping.model.backbone.encoder.add_module("extra", DropPath(0.2))
    with pytest.raises(UserError, match=r"only drop-path is random.*--dropout"):
        MonteCarlo(skipping)
    assert MonteCarlo(skipping, drop_path=True).count == 20
    with pytest.raises(UserError, match="--mc-dropout 1:"):
        MonteCarlo(skipping, passes=1)
    with pytest.raises(UserError, match="seed of -1"):
        MonteCarlo(skipping, seed=-1)
    with pytest.raises(UserError, match="vote is for"):
        MonteCarlo(skipping, kind="vote")
