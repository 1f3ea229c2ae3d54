"""Nash-MTL against its equation, the closed form for two tasks and scipy's solvers."""

import numpy as np
import pytest
import torch
from degenerate import CASES, Case, check, named, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from solver_steps import gradients, unit, weights_of
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.nash_mtl import NashMTL


@settings(max_examples=100, deadline=None)
@given(gradients(decades=4))
def test_the_bargain(drawn: Tensor) -> None:
    weights = weights_of(NashMTL, drawn, max_norm=0)
    assert (weights > 0).all()
    # M a = 1 / a, as a number for each task. It has one solution: its left side is the gradient of a convex function.
    torch.testing.assert_close(
        weights * (drawn @ (weights @ drawn)), torch.ones(len(drawn)).double(), rtol=0, atol=1e-8
    )


@settings(max_examples=50, deadline=None)
@given(gradients(least=2, most=2, decades=4))
def test_two_tasks_in_closed_form(drawn: Tensor) -> None:
    cosine = unit(drawn)[0] @ unit(drawn)[1]
    expected = 1 / (drawn.norm(dim=1) * (1 + cosine).sqrt())
    torch.testing.assert_close(weights_of(NashMTL, drawn, max_norm=0), expected, rtol=1e-8, atol=0)


@settings(max_examples=30, deadline=None)
@given(gradients(decades=0.5))
def test_as_by_a_general_solver(drawn: Tensor) -> None:
    matrix = (drawn @ drawn.T).numpy()
    found = minimize(
        lambda a: a @ matrix @ a / 2 - np.log(a).sum(),
        1 / np.sqrt(matrix.diagonal()),
        jac=lambda a: matrix @ a - 1 / a,
        method="L-BFGS-B",
        bounds=[(1e-9, None)] * len(matrix),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 50000},
    )
    weights = weights_of(NashMTL, drawn, max_norm=0).numpy()
    np.testing.assert_allclose(weights, found.x, rtol=2e-3)
    assert weights @ matrix @ weights / 2 - np.log(weights).sum() <= found.fun + 1e-12


@settings(max_examples=50, deadline=None)
@given(gradients(decades=4), st.sampled_from([0.0, 0.3, 1.0, 2.0, 5.0]))
def test_the_length_of_the_update(drawn: Tensor, max_norm: float) -> None:
    expected = len(drawn) ** 0.5
    if max_norm:
        expected = min(expected, max_norm)
    update = weights_of(NashMTL, drawn, max_norm=max_norm) @ drawn
    assert float(update.norm()) == pytest.approx(expected, rel=1e-8)
    free = weights_of(NashMTL, drawn, max_norm=0) @ drawn
    torch.testing.assert_close(update / update.norm(), free / free.norm(), rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(gradients(), st.integers(-12, 12), st.integers(0, 99))
def test_lengths_and_order_do_not_matter_to_the_update(drawn: Tensor, exponent: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(drawn), generator=source)
    lengths = 10.0 ** (exponent + torch.randn(len(drawn), 1, generator=source, dtype=torch.float64))
    other = lengths * drawn[order]
    torch.testing.assert_close(
        weights_of(NashMTL, other) @ other, weights_of(NashMTL, drawn) @ drawn, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_degenerate_gradients(case: Case) -> None:
    weights = check(NashMTL, case)
    lengths = case.gradients.norm(dim=1)
    assert (weights > 0).all()
    assert (weights @ case.gradients).norm() <= 1 + 1e-6
    assert ((weights * lengths)[lengths > 0] <= 3000).all()
    if case.name in ("opposite", "opposite, of other lengths", "balanced on a plane", "two against one"):
        # Nothing can be agreed on: the weights are as long as they get, and cancel.
        assert (weights @ case.gradients).norm() <= 1e-3
        assert ((weights * lengths) > 500).all()


def test_towards_opposite_gradients_the_update_shrinks_where_it_cannot_be_resolved() -> None:
    norms = []
    for aside in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0):
        drawn = rows([1, aside], [-1, aside])
        norms.append(float((weights_of(NashMTL, drawn) @ drawn).norm()))
    assert norms[:3] == pytest.approx([1, 1, 1])
    assert norms[3:] == sorted(norms[3:], reverse=True) and norms[-1] == 0


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_options_out_of_range(value: float) -> None:
    with pytest.raises(UserError, match=r"^--weighting-options max_norm=.*: must be "):
        NashMTL(named(2), max_norm=value)
