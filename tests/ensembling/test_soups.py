"""Averages of weights, against torch's own, timm's callback protocol, and functions with known optima."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.optim.swa_utils import AveragedModel, update_bn

from mtl.ensembling.soups import (
    StochasticAverage,
    check_alike,
    greedy_soup,
    reestimate,
    uniform_soup,
    warm_restarts,
)
from mtl.errors import UserError


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 1))
    made(torch.randn(8, 3, 6, 6))  # gives the statistics values
    return made


def test_uniform_soup_is_torchs_average() -> None:
    networks = [network(seed) for seed in range(4)]
    reference = AveragedModel(networks[0])
    for each in networks:
        reference.update_parameters(each)
    soup = uniform_soup(each.state_dict() for each in networks)
    for name, parameter in reference.module.named_parameters():
        torch.testing.assert_close(soup[name], parameter)
    variances = torch.stack([each[1].running_var for each in networks])
    torch.testing.assert_close(soup["1.running_var"], variances.mean(0))
    assert soup["1.num_batches_tracked"].dtype == torch.int64
    networks[0].load_state_dict(soup)


def test_a_soup_of_the_same_is_the_same_to_the_last_bit() -> None:
    state = network().half().state_dict() | {"balancer": {"rule": "equal"}}
    for name, value in uniform_soup([state] * 3).items():
        if isinstance(value, Tensor):
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
        else:
            assert value is state[name]


def test_states_may_change_after_they_were_taken() -> None:
    parameter = torch.tensor([1.0])

    def states() -> Any:
        for value in (1.0, 2.0, 6.0):
            parameter.fill_(value)
            yield {"w": parameter, "n": parameter.long()}

    soup = uniform_soup(states())
    assert soup["w"].item() == 3.0
    assert soup["n"].item() == 1


def greedy(points: list[float], optimum: float, **options: Any) -> Any:
    """Choose among scalars, scored by the distance of their mean from an optimum."""
    loads: list[int] = []

    def load(name: int) -> dict[str, Tensor]:
        loads.append(name)
        return {"w": torch.tensor(points[name], dtype=torch.float64)}

    distance = -1.0 if options.get("higher_is_better", True) else 1.0
    soup = greedy_soup(range(len(points)), load, lambda s: distance * abs(s["w"].item() - optimum), **options)
    assert all(loads.count(name) <= 2 for name in range(len(points)))
    return soup


def test_greedy_soup_takes_what_helps() -> None:
    # Best first: 0.5; with -0.6 the mean is -0.05; 1.0 would move it to 0.3, -3 further still.
    soup = greedy([1.0, 0.5, -3.0, -0.6], 0.0)
    assert soup.ingredients == [1, 3]
    assert soup.state["w"].item() == pytest.approx(-0.05)
    assert soup.score == pytest.approx(-0.05)
    assert soup.scores == {0: -1.0, 1: -0.5, 2: -3.0, 3: pytest.approx(-0.6)}
    lower = greedy([1.0, 0.5, -3.0, -0.6], 0.0, higher_is_better=False)
    assert lower.ingredients == [1, 3]
    assert lower.score == pytest.approx(0.05)


@settings(deadline=None)
@given(points=st.lists(st.floats(-10, 10), min_size=1, max_size=6), optimum=st.floats(-10, 10))
def test_greedy_soup_is_no_worse_than_the_best(points: list[float], optimum: float) -> None:
    soup = greedy(points, optimum)
    assert soup.score >= max(soup.scores.values())
    assert soup.score == pytest.approx(-abs(soup.state["w"].item() - optimum), abs=1e-9)
    mean = sum(points[name] for name in soup.ingredients) / len(soup.ingredients)
    assert soup.state["w"].item() == pytest.approx(mean, abs=1e-9)


def test_a_score_that_is_no_number_is_no_ingredient() -> None:
    assert greedy([1.0, math.nan, 2.0], 0.0).ingredients == [0]
    with pytest.raises(UserError, match="none of the 2 runs has a score that is a number"):
        greedy([math.nan, math.nan], 0.0)


def test_reestimate_is_torchs_update_where_that_is_right() -> None:
    ours = network()
    ours[2].p = 0.0
    theirs = copy.deepcopy(ours)
    images = [torch.randn(4, 3, 6, 6) + 2 for _ in range(3)]
    ours.eval()
    assert reestimate(ours, images) == 1
    update_bn(images, theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert not ours.training and not ours[1].training
    assert ours[1].momentum == 0.1


def test_reestimate_measures_what_the_model_computes() -> None:
    """Without dropout's noise, and without touching what training would not change."""

    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False)

    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), Frozen(3)).train()
    kept = {name: value.clone() for name, value in model[2].state_dict().items()}
    images = torch.randn(64, 3, 4, 4) * torch.tensor([1.0, 2, 3])[:, None, None] + 5
    state = torch.get_rng_state()
    assert reestimate(model, images.split(64)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, images.var((0, 2, 3)))
    assert all(torch.equal(value, kept[name]) for name, value in model[2].state_dict().items())
    assert model[0].training and model[1].training and not model[2].training


def test_reestimate_without_layers_or_images() -> None:
    def forbidden() -> Any:
        raise AssertionError
        yield

    assert reestimate(nn.Conv2d(3, 1, 1), forbidden()) == 0
    model = network()
    before = model[1].running_mean.clone()
    with pytest.raises(UserError, match="no images"):
        reestimate(model, [])
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("resumed_at", [None, 3, 5, 8])
def test_stochastic_average_is_the_mean_of_what_it_took(resumed_at: int | None) -> None:
    model = network()
    average = StochasticAverage(model, start=4, every=3)
    taken: list[dict[str, Tensor]] = []
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, 6, 6))
        average.update(model, step)
        if step in (4, 7, 10):
            taken.append(copy.deepcopy(model.state_dict()))
        now = average.module.state_dict()
        for name, value in (uniform_soup(taken) if taken else model.state_dict()).items():
            if value.is_floating_point():
                torch.testing.assert_close(now[name], value)
        if step == resumed_at:
            again = StochasticAverage(model, start=4, every=3)
            again.module.load_state_dict(now)
            average = again
    assert len(taken) == 3
    assert average.module[1].num_batches_tracked == 11  # at the last step that was taken


@given(cycles=st.integers(1, 5), length=st.integers(2, 9), growth=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_restarts_are_torchs(cycles: int, length: int, growth: int) -> None:
    total = length * sum(growth**number for number in range(cycles))
    restarts = warm_restarts(total, cycles, growth)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = CosineAnnealingWarmRestarts(optimizer, T_0=length, T_mult=growth)
    ends = []
    for step in range(total):
        assert restarts.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()
        if reference.T_cur == 0:
            ends.append(step + 1)
    assert list(restarts.ends) == ends
    assert restarts.factor(total) == 0


def test_cycles_that_do_not_divide_the_steps() -> None:
    restarts = warm_restarts(10, 3)
    assert restarts.ends == (3, 7, 10)
    assert [step for step in range(10) if restarts.factor(step) == 1] == [0, 3, 7]


def checkpoint(**changes: Any) -> dict[str, Any]:
    experiment = {"task": ["depth"], "backbone": "b", "decoder": "unet", "decoder_channels": 16, "lora": None}
    data = {"classes": ["a", "b"], "inverse_depth": False}
    own = {name: value for name, value in changes.items() if name in experiment}
    return {
        "experiment": experiment | own,
        "data": data | {name: value for name, value in changes.items() if name in data},
        "state_dict": changes.get("state_dict", {"w": torch.zeros(3)}),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "c"}, "two was trained with backbone c, and one with b"),
        ({"task": ["normals", "depth"]}, "task depth, normals, and one with depth;"),
        ({"classes": ["b", "a"]}, "classes b, a, and one with a, b;"),
        ({"inverse_depth": True}, "inverse_depth True"),
        ({"state_dict": {"w": torch.zeros(4)}}, r"other tensors, or of other shapes \(w\)"),
        ({"state_dict": {"w": torch.zeros(3), "v": torch.zeros(3)}}, r"other tensors, or of other shapes \(v\)"),
        ({"lora": 4}, "two has low-rank adapters"),
    ],
)
def test_soups_of_different_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_alike([("one", checkpoint()), ("two", checkpoint(**changes))])


def test_soups_of_the_same_model_are_not() -> None:
    check_alike([("one", checkpoint(task=["a", "b"])), ("two", checkpoint(task=("b", "a"), classes=("a", "b")))])


def test_sentences() -> None:
    for nothing in (lambda: check_alike([]), lambda: uniform_soup([]), lambda: greedy([], 0.0)):
        with pytest.raises(UserError, match="soup of no runs"):
            nothing()
    with pytest.raises(UserError, match=r"5 cycles .* do not fit into 3 steps"):
        warm_restarts(3, 5)
    with pytest.raises(UserError, match="do not fit"):
        warm_restarts(300, 10**12)  # said at once
    with pytest.raises(UserError, match="are no schedule"):
        warm_restarts(3, 0)
    with pytest.raises(UserError, match="every 0 steps"):
        StochasticAverage(nn.Linear(1, 1), 0, 0)
