"""Rules from the gradients where their equations have no solution, or many; what their weights may be."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from degenerate import CASES, Case, check, named, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mtl.errors import UserError
from mtl.weighting.aligned_mtl import AlignedMTL
from mtl.weighting.base import Step, Weighting
from mtl.weighting.conflict_free import ConFIG
from mtl.weighting.db_mtl import DBMTL
from mtl.weighting.fairgrad import FairGrad
from mtl.weighting.gradnorm import GradNorm
from mtl.weighting.gradvac import GradVac
from mtl.weighting.imtl_g import IMTLG
from mtl.weighting.mgda import MGDA
from mtl.weighting.pcgrad import PCGrad

RULES: dict[str, Callable[..., Weighting]] = {
    "mgda": MGDA,
    "mgda l2": partial(MGDA, normalizer="l2"),
    "mgda loss": partial(MGDA, normalizer="loss"),
    "mgda loss+": partial(MGDA, normalizer="loss+"),
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "imtl-g": IMTLG,
    "aligned-mtl": AlignedMTL,
    "aligned-mtl median": partial(AlignedMTL, mode="median"),
    "aligned-mtl rmse": partial(AlignedMTL, mode="rmse"),
    "fairgrad": FairGrad,
    "fairgrad 0.1": partial(FairGrad, alpha=0.1),
    "fairgrad 10": partial(FairGrad, alpha=10),
    "config": ConFIG,
    "gradnorm": GradNorm,
    "db-mtl": DBMTL,
}
NEVER_NEGATIVE = [name for name in RULES if name.split()[0] not in ("imtl-g", "aligned-mtl", "config")]
CANCELLING = [name for name in RULES if name.split()[0] not in ("gradnorm", "aligned-mtl")]
BY_NAME = {case.name: case for case in CASES}


def solved(name: str, gradients: Tensor) -> Tensor:
    return RULES[name](named(len(gradients)))(Case("", gradients).step).detach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", RULES)
def test_weights_are_finite_and_one_is_positive(name: str, case: Case) -> None:
    weights = check(RULES[name], case)
    if name in NEVER_NEGATIVE:
        assert (weights >= 0).all()


small = arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(-3, 3).map(float))
exponents = st.lists(st.integers(-4, 4), min_size=5, max_size=5)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(small, exponents)
def test_whatever_the_gradients(name: str, drawn: object, sizes: list[int]) -> None:
    """Small whole numbers, so that gradients are often parallel, opposite, zero or more than there are dimensions."""
    gradients = torch.as_tensor(drawn)
    gradients = gradients * torch.tensor([10.0**size for size in sizes[: len(gradients)]])[:, None].double()
    weights = check(RULES[name], Case("", gradients))
    if name in NEVER_NEGATIVE:
        assert (weights >= 0).all()
    if name in ("pcgrad", "gradvac"):
        assert (weights >= 1 - 1e-9).all()
    if name == "gradnorm":
        assert float(weights.sum()) == pytest.approx(len(weights))


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("case", ["opposite", "opposite, of other lengths", "nearly opposite"])
def test_opposite_gradients_cancel(name: str, case: str) -> None:
    gradients = BY_NAME[case].gradients
    weights = solved(name, gradients)
    lengths = weights * gradients.norm(dim=1)
    assert (weights @ gradients).norm() < 1e-6 * lengths.max()
    torch.testing.assert_close(lengths, lengths.mean().expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["mgda", "imtl-g", "fairgrad", "config"])
def test_no_task_is_harmed_where_none_can_be_helped_without_harm(name: str) -> None:
    """There is no direction that is downhill for all: the step is short beside what it is made of."""
    for case in ("two against one", "balanced on a plane"):
        gradients = BY_NAME[case].gradients
        weights = solved(name, gradients)
        assert (weights @ gradients).norm() < 1e-6 * (weights * gradients.norm(dim=1)).max()


@pytest.mark.parametrize("name", ["imtl-g", "aligned-mtl", "fairgrad", "config", "db-mtl"])
def test_duplicated_tasks_have_the_same_weight(name: str) -> None:
    for case in ("duplicated pair", "duplicated among three", "all the same"):
        gradients = BY_NAME[case].gradients
        weights = solved(name, gradients)
        same = (gradients == gradients[0]).all(dim=1)
        torch.testing.assert_close(weights[same], weights[0].expand(int(same.sum())), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["mgda", "imtl-g", "fairgrad", "config"])
def test_a_duplicate_changes_no_direction(name: str) -> None:
    """But for FairGrad, where it is one more to be fair to."""
    pair = rows([1, 0.2, 0], [-0.4, 1, 0.3])
    once, twice = solved(name, pair) @ pair, solved(name, pair[[0, 1, 0]]) @ pair[[0, 1, 0]]
    if name == "fairgrad":
        assert pair[0] @ twice / twice.norm() > pair[0] @ once / once.norm()
    else:
        assert torch.cosine_similarity(once, twice, dim=0) > 1 - 1e-9


def test_aligned_mtl_is_not_stopped_by_the_rounding_of_duplicates() -> None:
    """The least singular value is rounding, which torchjd takes for a length: its step is 1e-4 of this one."""
    gradients = rows([1, 0.2, 0], [-0.4, 1, 0.3])[[0, 1, 0]]
    noise = 1e-8 * rows([0, 1, -1], [1, 0, 1], [-1, 1, 0])
    exact = Case("", gradients).step
    rounded = Step(exact.losses, exact.present, exact.gram + noise)
    torch.testing.assert_close(AlignedMTL(named(3))(rounded), AlignedMTL(named(3))(exact), rtol=1e-6, atol=0)


def test_aligned_mtl_counts_a_short_gradient() -> None:
    """1e-4 as long as the other, it decides the common length, in 1e-8 of the Gram matrix."""
    weights = solved("aligned-mtl", rows([1, 0, 0], [0, 1e-4, 0]))
    torch.testing.assert_close(weights, rows([0.5e-4, 0.5])[0])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_unit_of_the_losses_does_not_matter(name: str, scale: float) -> None:
    """Other than in FairGrad's length, w as |g|^(-2 alpha / (1 + alpha))."""
    gradients = rows([1, 0.2, 0, 0.1], [-4, 10, 3, 0], [0.02, -0.05, 0.1, 0.02])
    alpha = {"fairgrad": 1.0, "fairgrad 0.1": 0.1, "fairgrad 10": 10.0}.get(name)
    factor = 1 if alpha is None else scale ** (-2 * alpha / (1 + alpha))
    torch.testing.assert_close(solved(name, scale * gradients), factor * solved(name, gradients), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_a_zero_gradient_changes_nothing_for_others_and_its_head_learns_on(name: str) -> None:
    gradients = rows([1, 0.2, 0], [0, 0, 0], [-0.4, 1, 0.3])
    losses = torch.tensor([0.7, 3.0, 0.4], dtype=torch.float64)
    others = torch.tensor([0, 2])
    weights = RULES[name](named(3))(Step(losses, torch.arange(3), gradients @ gradients.T)).detach()
    alone = RULES[name](named(3))(Step(losses[others], others, gradients[others] @ gradients[others].T)).detach()
    torch.testing.assert_close(weights[others], alone, rtol=0, atol=0)
    torch.testing.assert_close(weights[1], alone.abs().mean(), rtol=0, atol=0)
    assert weights[1] > 0


def test_the_goal_of_gradvac_has_no_end_but_what_it_adds_has() -> None:
    """After many steps with parallel gradients the goal is a cosine of 1, which no sum with g_j reaches."""
    rule = GradVac(named(2))
    for _ in range(80):
        torch.testing.assert_close(rule(BY_NAME["parallel"].step), torch.ones(2, dtype=torch.float64))
    assert rule.goals[0, 1] == pytest.approx(1, abs=1e-12)
    weights = rule(BY_NAME["orthogonal"].step)
    assert ((weights > 1000) & (weights < 2500)).all()


def test_db_mtl_refuses_a_loss_without_logarithm() -> None:
    step = Case("", rows([1, 0], [0, 1])).step._replace(losses=torch.tensor([1.0, -0.25], dtype=torch.float64))
    with pytest.raises(UserError, match=r"'task1' is -0\.25"):
        DBMTL(named(2))(step)


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [
        (FairGrad, "alpha", 0.0),
        (FairGrad, "alpha", 11.0),
        (FairGrad, "alpha", float("nan")),
        (FairGrad, "alpha", "1"),
        (GradVac, "beta", -0.1),
        (GradVac, "beta", 1.5),
        (GradNorm, "alpha", -1),
        (GradNorm, "alpha", True),
        (MGDA, "normalizer", "l3"),
        (AlignedMTL, "mode", "mean"),
    ],
)
def test_an_option_out_of_range_is_refused(rule: Callable[..., Weighting], name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--weighting-options {name}={value}: must be"):
        rule(named(2), **{name: value})
