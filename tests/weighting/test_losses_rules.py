"""Rules from the losses, against the derivative of what they minimise and against torchjd and LibMTL."""

import math
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_steps import ask, shown
from scipy import stats
from torch import Tensor
from torchjd import scalarization

from mtl.errors import UserError
from mtl.weighting.base import Weighting
from mtl.weighting.dwa import DWA
from mtl.weighting.equal import Equal
from mtl.weighting.famo import FAMO
from mtl.weighting.geometric import Geometric
from mtl.weighting.history import FLOOR
from mtl.weighting.imtl_l import IMTLL
from mtl.weighting.log import LogSum
from mtl.weighting.random import RandomWeights
from mtl.weighting.stch import STCH
from mtl.weighting.uncertainty import Uncertainty

LOSSES = st.lists(st.floats(-5, 5).map(lambda exponent: 10**exponent), min_size=1, max_size=6)
"""From one task to six, up to ten orders of magnitude apart."""

often = settings(max_examples=50, deadline=None)


def tables(tasks: int, steps: int) -> st.SearchStrategy[list[list[float]]]:
    """Return losses of up to so many tasks in at least so many steps."""
    loss = st.floats(1e-2, 1e2)
    return st.integers(1, tasks).flatmap(lambda n: st.lists(st.lists(loss, min_size=n, max_size=n), min_size=steps))


def named(count: int, likelihood: str = "gaussian") -> dict[str, str]:
    return {f"task{i}": likelihood for i in range(count)}


def slopes(of: Callable[[Tensor], Tensor], losses: list[float]) -> Tensor:
    """Return the derivative of a function by the losses."""
    leaf = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(of(leaf), leaf)[0]


def agree(weights: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert weights.dtype == torch.float64 and not weights.requires_grad
    torch.testing.assert_close(weights, expected, rtol=rtol, atol=0)


@often
@given(LOSSES)
def test_equal_is_the_plain_sum(losses: list[float]) -> None:
    agree(Equal(named(len(losses)))(shown(losses)), slopes(scalarization.Sum(), losses), 0)


@often
@given(LOSSES)
def test_log_is_the_derivative_of_the_sum_of_logarithms(losses: list[float]) -> None:
    agree(LogSum(named(len(losses)))(shown(losses)), slopes(lambda values: values.log().sum(), losses))


@often
@given(LOSSES)
def test_geometric_is_the_derivative_of_the_geometric_mean(losses: list[float]) -> None:
    rule = Geometric(named(len(losses)))
    agree(rule(shown(losses)), slopes(scalarization.GeometricMean(), losses))
    expected = stats.gmean(losses) / (len(losses) * np.array(losses))
    np.testing.assert_allclose(rule(shown(losses)), expected, rtol=1e-10)


@often
@given(LOSSES, st.data())
def test_uncertainty_and_imtl_l_are_the_derivatives_of_their_sums(losses: list[float], data: st.DataObject) -> None:
    """At any values of what is learned, which torchjd's classes learn from the same derivatives."""
    count = len(losses)
    scales = data.draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    pairs: list[tuple[Any, Any, Any]] = [
        (Uncertainty(named(count)), "log_scales", scalarization.UW(count).double()),
        (IMTLL(named(count)), "log_factors", scalarization.IMTLL(count).double()),
    ]
    for rule, name, theirs in pairs:
        (learned,) = theirs.parameters()
        with torch.no_grad():
            learned.copy_(torch.tensor(scales, dtype=torch.float64))
            for own, scale in zip(getattr(rule, name), scales, strict=True):
                own.fill_(scale)
        agree(rule(shown(losses)), slopes(theirs, losses))
        objective = rule.objective(shown(losses))
        expected = theirs(torch.tensor(losses, dtype=torch.float64))
        torch.testing.assert_close(objective, expected, rtol=1e-10, atol=1e-10)
        own = torch.stack(torch.autograd.grad(objective, list(getattr(rule, name))))
        torch.testing.assert_close(own, torch.autograd.grad(expected, learned)[0], rtol=1e-10, atol=1e-10)


def uncertain(likelihood: str, scale: float) -> Uncertainty:
    """Return the rule for a single task, with its log-scale."""
    rule = Uncertainty({"task": likelihood})
    torch.nn.init.constant_(rule.log_scales[0], scale)
    return rule


@pytest.mark.parametrize("scale", [-3.0, -0.5, 0.0, 1.5])
def test_uncertainty_is_the_negative_logarithm_of_each_density(scale: float) -> None:
    """For errors drawn at random, up to a constant that is known; scipy's densities."""
    errors = np.random.default_rng(0).normal(size=200)
    spread = math.exp(scale / 2)
    expected = -stats.norm.logpdf(errors, scale=spread).mean() - math.log(2 * math.pi) / 2
    found = uncertain("gaussian", scale).objective(shown([(errors**2).mean()]))
    assert found.item() == pytest.approx(expected)
    expected = -stats.laplace.logpdf(errors, scale=math.exp(scale)).mean() - math.log(2)
    found = uncertain("laplace", scale).objective(shown([np.abs(errors).mean()]))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("concentration", [10.0, 200.0])
def test_directions_have_the_form_of_laplace(concentration: float) -> None:
    towards = np.array([0.0, 0.6, -0.8])
    density = stats.vonmises_fisher(towards, concentration)
    directions = density.rvs(100, random_state=np.random.default_rng(0))
    rule = uncertain("laplace", -math.log(concentration))
    found = rule.objective(shown([(1 - directions @ towards).mean()]))
    expected = -density.logpdf(directions).mean() - math.log(2 * math.pi)
    # What vanishes as the concentration grows: log(1 - exp(-2 concentration)).
    assert found.item() == pytest.approx(expected, abs=2 * math.exp(-2 * concentration) + 1e-9)


def test_the_categorical_form_is_cross_entropy_at_a_temperature() -> None:
    """Exact at temperature 1; elsewhere, the mistake is that of the paper's approximation of the normaliser."""
    logits = torch.randn(100, 5, dtype=torch.float64)
    labels = torch.randint(5, (100,))
    entropy = torch.nn.functional.cross_entropy
    for variance in (1.0, 1.3):
        found = uncertain("categorical", math.log(variance)).objective(shown([entropy(logits, labels).item()]))
        assert found is not None
        total, tempered = logits.exp().sum(1), (logits / variance).exp().sum(1)
        mistake = (tempered.log() - total.log() / variance - math.log(variance) / 2).mean()
        torch.testing.assert_close(found.detach() + mistake, entropy(logits / variance, labels))
    assert uncertain("categorical", 0)(shown([2.0])).item() == 1


@pytest.mark.parametrize(
    ("rule", "first", "factors"),
    [
        (Uncertainty({"a": "gaussian", "b": "laplace", "c": "categorical"}), [0.5, 1.0, 1.0], [0.5, 1.0, 0.5]),
        (IMTLL(named(3)), [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
    ids=["uncertainty", "imtl-l"],
)
def test_learned_weights_settle_at_those_of_the_logarithm(
    rule: Weighting, first: list[float], factors: list[float]
) -> None:
    step = shown([1e-2, 1e2, 3.0])
    optimizer = torch.optim.LBFGS(
        rule.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        objective = rule.objective(step)
        assert objective is not None
        objective.backward()
        return objective.item()

    agree(rule(step), torch.tensor(first, dtype=torch.float64), 0)
    optimizer.step(closure)
    agree(rule(step), torch.tensor(factors) / step.losses, 1e-6)


def test_random_is_a_softmax_of_normal_draws() -> None:
    rule = RandomWeights(named(3))
    rule.seed = 5
    drawn = torch.stack([ask(rule, shown([1.0, 2.0, 3.0])) for _ in range(3000)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(3000, dtype=torch.float64))
    for left, right in ((0, 1), (1, 2)):
        # The logarithm of two weights' ratio is the difference of two standard normal draws.
        ratios = (drawn[:, left] / drawn[:, right]).log()
        assert stats.kstest(ratios.numpy(), stats.norm(scale=math.sqrt(2)).cdf).pvalue > 1e-3
    # Draws of neighbouring questions have nothing to do with each other.
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.06


def test_random_draws_depend_on_seed_and_question_alone() -> None:
    first, second, other = (RandomWeights(named(3)) for _ in range(3))
    other.seed = 1
    torch.manual_seed(0)
    drawn = [ask(first, shown([1.0, 2.0, 3.0])) for _ in range(3)]
    torch.manual_seed(7)
    for expected in drawn:
        assert torch.equal(ask(second, shown([9.0, 8.0, 7.0])), expected)
        assert not torch.equal(ask(other, shown([1.0, 2.0, 3.0])), expected)
    without = RandomWeights(named(3))(shown([1.0, 3.0], [0, 2]))
    torch.testing.assert_close(without, drawn[0][[0, 2]] / drawn[0][[0, 2]].sum())


@often
@given(tables(4, 8))
def test_dwa_weighs_as_torchjd_does_epoch_by_epoch(table: list[list[float]]) -> None:
    """Two steps an epoch."""
    rule, theirs = DWA(named(len(table[0])), temperature=0.7), scalarization.DWA(temperature=0.7)
    for number, losses in enumerate(table):
        agree(ask(rule, shown(losses)), slopes(theirs, losses))
        if number % 2:
            rule.end_epoch()
            theirs.step()


def test_dwa_is_its_equation() -> None:
    rule = DWA(named(2))
    for epoch in ([[4.0, 1.0], [2.0, 1.0]], [[2.0, 3.0], [0.0, 1.0]]):  # means 3 and 1, then 1 and 2
        for losses in epoch:
            agree(ask(rule, shown(losses)), torch.ones(2, dtype=torch.float64))
        rule.end_epoch()
    rates = np.exp(np.array([1 / 3, 2.0]) / 2)
    np.testing.assert_allclose(rule(shown([7.0, 7.0])), 2 * rates / rates.sum(), rtol=1e-7)


def test_dwa_keeps_the_history_of_a_task_that_an_epoch_lacks() -> None:
    rule = DWA(named(3))
    for losses in ([4.0, 1.0, 2.0], [2.0, 1.0, 3.0]):
        ask(rule, shown(losses))
        rule.end_epoch()
    expected = rule(shown([1.0, 1.0, 1.0]))
    rule.end_epoch()  # with means of 1 for all
    ask(rule, shown([2.0, 5.0], [0, 1]))
    rule.end_epoch()
    rates = np.exp(np.array([2.0 / 1, 5.0 / 1, 1.0 / 3]) / 2)
    np.testing.assert_allclose(rule(shown([1.0, 1.0, 1.0])), 3 * rates / rates.sum())
    assert not torch.equal(rule(shown([1.0, 1.0, 1.0])), expected)


def warmed(rule: STCH, nadir: list[float]) -> STCH:
    """Return the rule after its warm-up."""
    for number in range(rule.warmup):
        scale = 1 if number == rule.warmup - 1 else 10
        for factor in (0.5, 1.5):
            ask(rule, shown([scale * factor * value for value in nadir]))
        rule.end_epoch()
    return rule


@often
@given(LOSSES, st.sampled_from([0.1, 1.0, 3.0]), st.data())
def test_stch_is_the_derivative_of_the_smooth_maximum(losses: list[float], mu: float, data: st.DataObject) -> None:
    count = len(losses)
    nadir = data.draw(st.lists(st.floats(1e-4, 1e4), min_size=count, max_size=count))
    rule = warmed(STCH(named(count), mu=mu, warmup=2), nadir)
    theirs = scalarization.STCH(mu, weights=torch.ones(count, dtype=torch.float64))
    ratio = torch.tensor(nadir, dtype=torch.float64)
    weights = ask(rule, shown(losses))
    assert not weights.requires_grad
    expected = slopes(lambda values: count * theirs((values / ratio).log()), losses)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-290)


def test_stch_begins_with_the_sum_of_logarithms() -> None:
    """For as many epochs as are asked for; then, where all tasks have come equally far, the weights are the same."""
    rule = STCH(named(2), warmup=3)
    for _ in range(3):
        agree(ask(rule, shown([4.0, 0.1])), torch.tensor([0.25, 10.0], dtype=torch.float64))
        rule.end_epoch()
    agree(ask(rule, shown([2.0, 0.05])), torch.tensor([0.5, 20.0], dtype=torch.float64))
    behind = ask(rule, shown([2.0, 0.1]))
    agree(behind * torch.tensor([2.0, 0.1]).double(), torch.tensor([2 / 3, 4 / 3], dtype=torch.float64), 1e-7)


def test_stch_measures_a_late_task_by_its_first_epoch() -> None:
    rule = STCH(named(2), warmup=1)
    ask(rule, shown([4.0], [0]))
    rule.end_epoch()
    # Unknown as yet: at its nadir, like the other.
    agree(ask(rule, shown([4.0, 8.0])), torch.tensor([0.25, 0.125], dtype=torch.float64))
    ask(rule, shown([4.0, 4.0]))
    rule.end_epoch()
    ask(rule, shown([1.0, 1.0]))
    rule.end_epoch()
    assert rule.nadir.tolist() == [4, 6]


def test_stch_keeps_the_nadir_of_a_task_that_the_last_warm_up_epoch_lacks() -> None:
    rule = STCH(named(2), warmup=2)
    for step in (shown([4.0, 8.0]), shown([2.0], [0]), shown([1.0, 1.0])):
        ask(rule, step)
        rule.end_epoch()
    assert rule.nadir.tolist() == [2, 8]


@often
@given(tables(5, 6))
def test_famo_learns_as_torchjd_does(table: list[list[float]]) -> None:
    """With least losses of 1e-8, which cancel the 1e-8 that torchjd adds to the losses."""
    count = len(table[0])
    least = torch.full((count,), 1e-8, dtype=torch.float64)
    rule = FAMO(named(count), lr=0.05, decay=0.01)
    theirs = scalarization.FAMO(count, least, lr=0.05, weight_decay=0.01).double()
    for before, after in pairwise(table):
        agree(ask(rule, shown(before)), slopes(theirs, before), 1e-6)
        rule.look_again(shown(before), torch.tensor(after, dtype=torch.float64))
        if count > 1:  # a task alone has weight 1, whatever its logit
            theirs.update(torch.tensor(after, dtype=torch.float64))
    assert sum(rule(shown(table[0]))) == pytest.approx(1)


def test_famo_gives_weight_to_what_falls_slowly() -> None:
    """The first step of Adam is as long as its learning rate, whatever the gradient."""
    rule = FAMO(named(2), lr=0.1, decay=0)
    step = shown([1.0, 1.0])
    agree(ask(rule, step), torch.tensor([0.5, 0.5], dtype=torch.float64))
    rule.look_again(step, torch.tensor([0.9, 0.5], dtype=torch.float64))
    agree(ask(rule, step), torch.tensor([0.1, -0.1], dtype=torch.float64).softmax(0), 1e-6)


def test_famo_learns_nothing_from_a_task_alone() -> None:
    rule = FAMO(named(3))
    rule.look_again(shown([1.0, 1.0, 1.0]), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    rule.look_again(shown([1.0], [2]), torch.tensor([0.5], dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in rule.state_dict().items())


def test_famo_makes_losses_fall_at_one_rate() -> None:
    """Two squared distances that pull one point two ways, one a hundred times the other."""
    factors = torch.tensor([100.0, 1.0], dtype=torch.float64)
    ends = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def losses(point: Tensor) -> Tensor:
        return factors * ((point - ends).square().sum(1) + 0.05)

    def falls(rule: Weighting) -> Tensor:
        point = torch.tensor([4.0, -2.0], dtype=torch.float64)
        start = losses(point)
        for _ in range(300):
            leaf = point.clone().requires_grad_()
            values = losses(leaf)
            step = shown(values.detach())
            (gradient,) = torch.autograd.grad(ask(rule, step) @ values, leaf)
            point = point - 0.05 * gradient / (1 + gradient.norm())
            rule.look_again(step, losses(point))
        return (start / losses(point)).log()

    even, plain = falls(FAMO(named(2), lr=0.1, decay=0)), falls(Equal(named(2)))
    assert even.min() / even.max() > 0.8 > 0.6 > plain.min() / plain.max()


RULES: dict[str, Callable[[Mapping[str, str]], Weighting]] = {
    "uncertainty": Uncertainty,
    "log": LogSum,
    "dwa": DWA,
    "geometric": Geometric,
    "imtl-l": IMTLL,
    "famo": FAMO,
    "stch": STCH,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("losses", [[0.0, 1.0, 1e4], [-1e-8, 1.0, 2.0], [0.0], [0.0, 0.0], [1e-300, 1e300]])
def test_losses_of_zero_have_finite_weights(name: str, losses: list[float]) -> None:
    """For as long as they stay so, and after: in every epoch, with what they were before and after the step."""
    rule = RULES[name](named(len(losses)))
    step = shown(losses)
    for _ in range(6):
        for seen in (step, shown([1.0] * len(losses))):
            weights = ask(rule, seen)
            assert weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()
            rule.look_again(seen, step.losses)
            objective = rule.objective(seen)
            assert objective is None or objective.isfinite()
            rule.end_epoch()


@often
@given(st.floats(0, FLOOR))
def test_losses_count_as_the_floor_at_least(loss: float) -> None:
    agree(LogSum(named(2))(shown([loss, 0.5])), torch.tensor([1 / FLOOR, 2], dtype=torch.float64))


@pytest.mark.parametrize("name", RULES)
def test_negative_losses_are_refused_by_name(name: str) -> None:
    rule = RULES[name](named(3))
    step = shown([1.0, -0.25], [0, 2])
    with pytest.raises(UserError, match=r"the loss of 'task2' is -0.25.*equal"):
        rule(step)
        rule.objective(step)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (DWA, {"temperature": 0}),
        (DWA, {"temperature": math.inf}),
        (FAMO, {"lr": -0.1}),
        (FAMO, {"lr": math.nan}),
        (FAMO, {"decay": -1}),
        (STCH, {"mu": 0.0}),
        (STCH, {"warmup": 0}),
        (STCH, {"warmup": 2.5}),
        (STCH, {"warmup": math.inf}),
    ],
)
def test_options_out_of_range_are_refused(rule: Callable[..., Weighting], options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"--weighting-options {name}={value}: "):
        rule(named(2), **options)


def test_a_likelihood_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"of 'b' is 'gausian' \(did you mean 'gaussian'\?\).*laplace"):
        Uncertainty({"a": "laplace", "b": "gausian"})


@pytest.fixture
def libmtl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return LibMTL's rules, which import a module that torchvision no longer has."""
    stub = ModuleType("torchvision.models.utils")
    stub.load_state_dict_from_url = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return pytest.importorskip("LibMTL").weighting


def test_gradients_are_those_of_libmtl(libmtl: Any) -> None:
    """Of its classes' own backward passes, for three tasks."""
    values = [0.3, 2.0, 7.0]

    def theirs(rule: Any, **options: Any) -> Tensor:
        rule.task_num, rule.device = 3, torch.device("cpu")
        rule.init_param()
        losses = torch.tensor(values, requires_grad=True)
        rule.backward(losses, **options)
        assert losses.grad is not None
        return losses.grad.double()

    uncertainty = Uncertainty(named(3))
    for scale in uncertainty.log_scales:
        torch.nn.init.constant_(scale, -0.5)
    dwa = DWA(named(3))
    history = [[1.0, 3.0, 9.0], [0.5, 4.0, 8.0]]
    for losses in history:
        ask(dwa, shown(losses))
        dwa.end_epoch()
    their_dwa = libmtl.DWA()
    their_dwa.epoch, their_dwa.train_loss_buffer = 2, np.array(history).T
    for ours, expected in (
        (Equal(named(3)), theirs(libmtl.EW())),
        (uncertainty, theirs(libmtl.UW())),
        (Geometric(named(3)), theirs(libmtl.GLS())),
        (dwa, theirs(their_dwa, T=2.0)),
    ):
        agree(ours(shown(values)), expected, 1e-5)
