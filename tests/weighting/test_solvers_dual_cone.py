"""UPGrad and DualProj against the definition of a projection, scipy's bounded least squares and torchjd."""

import numpy as np
import pytest
import torch
from degenerate import CASES, Case, check, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from solver_steps import gradients, unit, weights_of
from torch import Tensor

from mtl.weighting.base import Weighting
from mtl.weighting.dualproj import DualProj, least_change
from mtl.weighting.gram import PRECISION, cosines, lifted
from mtl.weighting.upgrad import UPGrad

BOTH = pytest.mark.parametrize("rule", [UPGrad, DualProj])


def projected(drawn: Tensor, start: Tensor) -> Tensor:
    """Return the projection of start @ gradients onto the dual cone: the shortest v @ gradients with v >= start."""
    lengths = drawn.norm(dim=1)
    bound = (start * lengths / lengths.max()).numpy()
    directions = unit(drawn).T.numpy()
    found = lsq_linear(directions, np.zeros(len(directions)), (bound, np.inf), "bvls", tol=1e-15, max_iter=500)
    return torch.from_numpy(directions @ found.x) * lengths.max()


@settings(max_examples=75, deadline=None)
@given(gradients())
def test_dualproj_is_the_projection_of_the_mean(drawn: Tensor) -> None:
    weights = weights_of(DualProj, drawn)
    lengths = drawn.norm(dim=1)
    added = (weights - 1 / len(drawn)) * lengths / lengths.max()
    slopes = unit(drawn) @ (weights @ drawn) / lengths.max()
    # Of all in the cone it is the nearest to the mean: it was moved only along gradients that it is now at right
    # angles to.
    assert (added >= 0).all()
    assert (slopes >= -1e-8).all()
    assert (added * slopes).abs().max() <= 1e-8


@settings(max_examples=75, deadline=None)
@given(gradients())
def test_upgrad_is_the_mean_of_the_projections(drawn: Tensor) -> None:
    expected = torch.stack([projected(drawn, row) for row in torch.eye(len(drawn)).double()]).mean(dim=0)
    update = weights_of(UPGrad, drawn) @ drawn
    assert (update - expected).norm() <= 1e-8 * drawn.norm(dim=1).max()


@BOTH
@settings(max_examples=50, deadline=None)
@given(drawn=gradients(least=3, decades=1))
def test_more_tasks_than_dimensions(rule: type[Weighting], drawn: Tensor) -> None:
    drawn = drawn[:, :2]
    weights = weights_of(rule, drawn)
    starts = torch.eye(len(drawn)).double() if rule is UPGrad else torch.ones(1, len(drawn)).double()
    expected = torch.stack([projected(drawn, row) for row in starts]).sum(dim=0) / len(drawn)
    # As though each gradient were longer by a component of its own, of the root of single precision.
    reach = (weights * drawn.norm(dim=1)).norm()
    assert (weights @ drawn - expected).norm() <= PRECISION**0.5 * reach
    assert (unit(drawn) @ (weights @ drawn) >= -1.01 * PRECISION * reach).all()


@settings(max_examples=50, deadline=None)
@given(gradients(least=2, most=2))
def test_upgrad_of_two_tasks_is_half_of_pcgrad(drawn: Tensor) -> None:
    first, second = drawn
    conflict = (first @ second).clamp(max=0)
    half = torch.stack([1 - conflict / (first @ first), 1 - conflict / (second @ second)]) / 2
    torch.testing.assert_close(weights_of(UPGrad, drawn), half, rtol=1e-9, atol=0)


def test_dualproj_by_hand() -> None:
    # The mean (-1/2, 1/2) conflicts with the first gradient alone: what remains is its part along the second axis.
    weights = weights_of(DualProj, rows([1, 0], [-2, 1]))
    torch.testing.assert_close(weights, torch.tensor([1, 0.5]).double(), rtol=1e-12, atol=0)


@BOTH
@settings(max_examples=50, deadline=None)
@given(drawn=gradients(decades=4))
def test_no_task_is_worsened(rule: type[Weighting], drawn: Tensor) -> None:
    weights = weights_of(rule, drawn)
    assert (weights >= 1 / len(drawn)).all()
    assert (unit(drawn) @ (weights @ drawn) >= -1e-8 * drawn.norm(dim=1).max()).all()


@BOTH
@given(seed=st.integers(0, 2**32 - 1), tasks=st.integers(1, 6))
def test_without_a_conflict_it_is_the_mean(rule: type[Weighting], seed: int, tasks: int) -> None:
    drawn = torch.rand(tasks, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert weights_of(rule, drawn).tolist() == [1 / tasks] * tasks


@BOTH
@settings(max_examples=50, deadline=None)
@given(drawn=gradients(), exponent=st.integers(-12, 12), seed=st.integers(0, 99))
def test_scale_and_order_do_not_matter(rule: type[Weighting], drawn: Tensor, exponent: int, seed: int) -> None:
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    weights = weights_of(rule, drawn)
    torch.testing.assert_close(weights_of(rule, 10.0**exponent * drawn[order]), weights[order], rtol=1e-6, atol=1e-9)


@BOTH
@settings(max_examples=50, deadline=None)
@given(drawn=gradients(least=2, decades=0.5))
def test_as_torchjd_with_its_regularisation_turned_down(rule: type[Weighting], drawn: Tensor) -> None:
    pytest.importorskip("quadprog", reason="the projections of torchjd are solved by quadprog")
    pytest.importorskip("qpsolvers", reason="the projections of torchjd are solved by quadprog")
    from torchjd.aggregation import DualProjWeighting, UPGradWeighting
    from torchjd.linalg import QuadprogProjector

    theirs = {UPGrad: UPGradWeighting, DualProj: DualProjWeighting}[rule]
    expected = theirs(projector=QuadprogProjector(reg_eps=1e-12))(drawn @ drawn.T) @ drawn
    assert (weights_of(rule, drawn) @ drawn - expected).norm() <= 1e-5 * drawn.norm(dim=1).max()


@BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_degenerate_gradients(rule: type[Weighting], case: Case) -> None:
    weights = check(rule, case)
    update = weights @ case.gradients
    reach = weights * case.gradients.norm(dim=1)
    assert (unit(case.gradients) @ update >= -1e-6 * reach.sum()).all()
    if "opposite" in case.name or "balanced" in case.name:
        assert update.norm() <= 1e-6 * reach.sum()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10), st.integers(1, 10), st.floats(-10, 0))
def test_the_least_change_of_nearly_parallel_and_opposite_vectors(
    seed: int, tasks: int, size: int, close: float
) -> None:
    source = np.random.default_rng(seed)
    signs = source.choice([-1, 1], (tasks, 1))
    drawn = torch.from_numpy(signs * np.ones(size) + 10**close * source.normal(size=(tasks, size)))
    products = lifted(cosines(drawn @ drawn.T)).numpy()
    # Of signs that go with the vectors', or against them, or 0 but for rounding.
    wanted = source.choice([signs[:, 0] * source.random(), source.normal(size=tasks)])
    wanted[source.random(tasks) < 0.3] = 1e-17
    change = least_change(products, wanted)
    slack = products @ change - wanted
    size_of_sums = change.sum() + np.abs(wanted).max()
    assert (change >= 0).all()
    assert (slack >= -1e-11 * size_of_sums).all()
    assert (np.minimum(change, slack) <= 1e-11 * size_of_sums).all()


def test_the_least_change_that_is_wanted() -> None:
    # Right angles: each vector is moved along by what it lacks. At 60 degrees the first half helps the second.
    assert least_change(np.eye(3), np.array([1.0, -1.0, 0.0])).tolist() == [1, 0, 0]
    np.testing.assert_allclose(least_change(np.array([[1, 0.5], [0.5, 1]]), np.array([1.0, 0.5])), [1, 0], atol=1e-15)
    assert least_change(np.eye(2), np.zeros(2)).tolist() == [0, 0]


def test_nothing_wanted_changes_nothing() -> None:
    # On nearly opposite vectors, where scipy's nnls gives weights of 1e7.
    signs = np.array([1.0, 1, -1, -1, -1, -1])
    products = np.outer(signs, signs) + 1e-7 * np.eye(6)
    assert least_change(products, np.array([-1.0, -1, 0, 0, 0, 0])).tolist() == [0] * 6
