"""Bootstraps, and scores of what members have not seen, against plain loops."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.ensembling.bagging import bootstrap, out_of_bag, out_of_bag_score
from mtl.errors import UserError
from mtl.training.module import MultiTaskModule


def test_a_bootstrap_is_a_function_of_its_seed() -> None:
    # Frozen: a run that is repeated elsewhere is to draw the same.
    assert bootstrap(10, 0).tolist() == [1, 9, 2, 7, 7, 4, 3, 9, 2, 5]
    assert np.array_equal(bootstrap(1000, 3), bootstrap(1000, 3))
    assert not np.array_equal(bootstrap(1000, 3), bootstrap(1000, 4))


def test_rows_are_uniform_and_a_share_of_1_over_e_is_left_out() -> None:
    count, members = 50, 2000
    draws = np.stack([bootstrap(count, seed) for seed in range(members)])
    assert draws.dtype == np.int64
    assert draws.min() == 0 and draws.max() == count - 1
    assert stats.chisquare(np.bincount(draws.ravel())).pvalue > 1e-3
    outside = np.stack([out_of_bag(rows, count) for rows in draws])
    expected = (1 - 1 / count) ** count
    # Members are independent, the samples of one nearly so.
    assert outside.mean() == pytest.approx(expected, abs=5 * (expected * (1 - expected) / outside.size) ** 0.5)
    for rows, left in zip(draws[:20], outside, strict=False):
        assert set(np.flatnonzero(left)) == set(range(count)) - set(rows.tolist())


class Constant(nn.Module):
    """Answers the depth at which softplus has an output."""

    def __init__(self, output: float) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.tensor(output))
        self.shown: list[float] = []

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.shown += image[:, 0, 0, 0].tolist()
        return {"depth": self.output.expand(len(image), 1, *image.shape[-2:])}


def member(model: nn.Module, **fields: Any) -> MultiTaskModule:
    fields = {"init": "none", "decoder_channels": 16, "task": ("depth",), "data": {"size": (32, 32)}} | fields
    made = build_module(validate(fields), DataInfo("test", ("depth",)), total_steps=0)
    made.model = model  # type: ignore[assignment]
    return made


def batches(depths: list[float], size: int) -> list[dict[str, torch.Tensor]]:
    """Return samples whose image's pixels are their row."""
    rows = torch.arange(len(depths)).float()
    everything = {
        "image": rows.reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        "depth": torch.tensor(depths).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2),
    }
    parts = {name: tensor.split(size) for name, tensor in everything.items()}
    return [dict(zip(parts, some, strict=True)) for some in zip(*parts.values(), strict=True)]


def test_each_sample_is_judged_by_those_that_have_not_seen_it() -> None:
    values = [20.0, 30.0, 50.0]
    members = [member(Constant(value)) for value in values]
    depths = [25.0, 40.0, 10.0, 30.0, 8.0]
    outside = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 1], [0, 0, 0, 1, 1]], dtype=bool)
    # The fourth is judged by the first and third, and so on; nobody judges the third.
    answers = {0: 25.0, 1: 30.0, 3: 35.0, 4: 40.0}
    for size in (1, 2, 5):
        for part in members:
            part.model.shown.clear()  # type: ignore[operator, union-attr]
        found = out_of_bag_score(members, outside, batches(depths, size))
        assert found.samples == 4
        expected = np.mean([abs(answer + 1e-3 - depths[row]) for row, answer in answers.items()])
        assert found.results["depth/abs_error"] == pytest.approx(expected, rel=1e-5)
        for part, unseen in zip(members, outside, strict=True):
            assert part.model.shown == np.flatnonzero(unseen).tolist()


def test_sentences() -> None:
    members = [member(Constant(1.0))] * 2
    with pytest.raises(UserError, match="bootstrap of 0 samples draws nothing"):
        bootstrap(0, 1)
    with pytest.raises(UserError, match="seed of -1"):
        bootstrap(3, -1)
    with pytest.raises(UserError, match="every member has seen every training sample"):
        out_of_bag_score(members, np.zeros((2, 3), dtype=bool), batches([1.0] * 3, 2))
    with pytest.raises(UserError, match="of 3 training samples, and the data set has 4 or more"):
        out_of_bag_score(members, np.ones((2, 3), dtype=bool), batches([1.0] * 6, 2))
    with pytest.raises(UserError, match="of 3 training samples, and the data set has 2:"):
        out_of_bag_score(members, np.ones((2, 3), dtype=bool), batches([1.0] * 2, 2))
