"""CAGrad against its primal and dual problems, scipy's solvers and torchjd."""

import numpy as np
import pytest
import torch
from degenerate import CASES, Case, check, named, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from solver_steps import gradients, weights_of
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.cagrad import CAGrad

RADII = st.sampled_from([0.05, 0.4, 0.9, 1.5])


def dual(drawn: Tensor, weights: np.ndarray, c: float) -> float:
    """Return what the paper's algorithm minimises over the simplex: <g_w, g_0> + c |g_0| |g_w|."""
    mean = drawn.mean(dim=0).numpy()
    combined = weights @ drawn.numpy()
    return float(combined @ mean + c * np.linalg.norm(mean) * np.linalg.norm(combined))


@settings(max_examples=75, deadline=None)
@given(gradients(), RADII)
def test_no_other_direction_in_the_ball_does_more_for_the_task_that_gains_least(drawn: Tensor, c: float) -> None:
    mean = drawn.mean(dim=0)
    added = weights_of(CAGrad, drawn, c=c) - 1 / len(drawn)
    update = mean + added @ drawn
    assert (update - mean).norm() <= c * mean.norm() * (1 + 1e-6)
    assert (added >= 0).all()
    # For every w on the simplex, dual(w) is an upper bound of what any such direction does for that task.
    bound = dual(drawn, (added / added.sum()).numpy(), c)
    assert abs(bound - float((drawn @ update).min())) <= 1e-7 * float(drawn.norm(dim=1).max()) ** 2


@settings(max_examples=40, deadline=None)
@given(gradients(least=3, decades=0.5), RADII)
def test_as_by_a_general_solver_on_the_simplex(drawn: Tensor, c: float) -> None:
    count = len(drawn)
    scale = drawn.norm(dim=1).max()
    found = minimize(
        lambda w: dual(drawn / scale, w, c),
        np.full(count, 1 / count),
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    added = weights_of(CAGrad, drawn, c=c) - 1 / count
    ours = dual(drawn / scale, (added / added.sum()).numpy(), c)
    assert ours == pytest.approx(found.fun, abs=1e-5)
    assert ours <= found.fun + 1e-9


@settings(max_examples=60, deadline=None)
@given(gradients(least=2, most=2, decades=1), RADII)
def test_two_tasks_by_a_search_along_one_line(drawn: Tensor, c: float) -> None:
    found = minimize_scalar(
        lambda w: dual(drawn, np.array([w, 1 - w]), c), bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    )
    shares = np.array([found.x, 1 - found.x])
    mean = drawn.mean(dim=0)
    combined = torch.from_numpy(shares) @ drawn
    expected = mean + c * mean.norm() / combined.norm() * combined
    # A minimum is found to the root of the precision, no better.
    assert (weights_of(CAGrad, drawn, c=c) @ drawn - expected).norm() <= 1e-4 * drawn.norm(dim=1).max()


def test_by_hand() -> None:
    # At right angles and equally long: straight on, 1.4 times the mean. Where one is four times as long, the other
    # gains least even if all of the radius goes its way: d = (2, 1/2) + 0.4 |(2, 1/2)| (0, 1), and 4 * 2 > 1.32.
    torch.testing.assert_close(weights_of(CAGrad, rows([1, 0], [0, 1])), torch.tensor([0.7, 0.7]).double())
    expected = torch.tensor([0.5, 0.5 + 0.4 * 4.25**0.5]).double()
    torch.testing.assert_close(weights_of(CAGrad, rows([4, 0], [0, 1])), expected)


@given(gradients())
def test_without_a_radius_it_is_the_mean(drawn: Tensor) -> None:
    assert weights_of(CAGrad, drawn, c=0).tolist() == [1 / len(drawn)] * len(drawn)


def test_rescaling() -> None:
    drawn = rows([1, 0.2], [-0.4, 1], [0.5, 0.5])
    plain = weights_of(CAGrad, drawn, c=0.5)
    torch.testing.assert_close(weights_of(CAGrad, drawn, c=0.5, rescale=0), plain)
    torch.testing.assert_close(weights_of(CAGrad, drawn, c=0.5, rescale=1), plain / 1.25)
    torch.testing.assert_close(weights_of(CAGrad, drawn, c=0.5, rescale=2), plain / 1.5)


@settings(max_examples=50, deadline=None)
@given(gradients(), st.integers(-12, 12), st.integers(0, 99))
def test_scale_and_order_do_not_matter(drawn: Tensor, exponent: int, seed: int) -> None:
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    weights = weights_of(CAGrad, drawn)
    assert ((weights_of(CAGrad, 10.0**exponent * drawn[order]) - weights[order]).abs() <= 1e-6 * weights[order]).all()


@settings(max_examples=25, deadline=None)
@given(gradients(least=2, decades=0.5), st.sampled_from([0.1, 0.4, 0.9]))
def test_as_torchjd(drawn: Tensor, c: float) -> None:
    pytest.importorskip("cvxpy", reason="torchjd solves CAGrad by cvxpy and clarabel")
    pytest.importorskip("clarabel", reason="torchjd solves CAGrad by cvxpy and clarabel")
    from torchjd.aggregation import CAGradWeighting

    drawn = drawn / drawn.norm(dim=1).max()
    expected = CAGradWeighting(c=c, norm_eps=0)(drawn @ drawn.T) @ drawn
    assert (weights_of(CAGrad, drawn, c=c) @ drawn - expected).norm() <= 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_degenerate_gradients(case: Case) -> None:
    weights = check(CAGrad, case)
    moving = case.gradients[case.gradients.norm(dim=1) > 0]
    if len(moving) == len(case.gradients):
        mean = moving.mean(dim=0)
        assert (weights @ moving - mean).norm() <= 0.4 * mean.norm() * (1 + 1e-6) + 1e-12 * moving.norm(dim=1).max()


@pytest.mark.parametrize("c", [0, 1e-15, 1e-6, 0.4, 10])
def test_lengths_that_differ_beyond_double_precision(c: float) -> None:
    drawn = rows([1e8, 1e7, 0], [-1e-8, 1e-9, 0], [1, 0, 1], [-1e8, 0, 1e6])
    weights = weights_of(CAGrad, drawn, c=c)
    mean = drawn.mean(dim=0)
    assert weights.isfinite().all() and (weights >= 0.25).all()
    assert (weights @ drawn - mean).norm() <= c * mean.norm() * (1 + 1e-6) + 1e-12 * mean.norm()


def test_six_against_four() -> None:
    # The four gain least, and what the ball allows is to go less far against them.
    drawn = torch.tensor([1, 1, 1, -1, -1, 1, 1, 1, 1, -1], dtype=torch.float64)[:, None] * rows([5] * 8)
    update = weights_of(CAGrad, drawn, c=0.1) @ drawn
    torch.testing.assert_close(update, 0.9 * drawn.mean(dim=0), rtol=1e-6, atol=0)


def test_duplicates_share_and_agreement_hastens() -> None:
    torch.testing.assert_close(weights_of(CAGrad, rows([1, 2], [1, 2])), torch.tensor([0.7, 0.7]).double())
    # Parallel gradients: along them, as far as the ball goes.
    update = weights_of(CAGrad, rows([1, 2], [3, 6])) @ rows([1, 2], [3, 6])
    torch.testing.assert_close(update, 1.4 * torch.tensor([2, 4]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"c": -1}, "c=-1"), ({"c": float("nan")}, "c=nan"), ({"c": 11}, "c=11"), ({"rescale": 3}, "rescale=3")],
)
def test_options_out_of_range(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=rf"^--weighting-options {said}: must be "):
        CAGrad(named(2), **options)
