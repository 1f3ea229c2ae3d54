"""Rules from the gradients, against their equations on explicit gradients, torchjd and LibMTL."""

import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from degenerate import named, rows
from torch import Tensor
from torchjd import aggregation

from mtl.weighting.aligned_mtl import AlignedMTL
from mtl.weighting.base import Step, Weighting
from mtl.weighting.conflict_free import ConFIG
from mtl.weighting.db_mtl import DBMTL
from mtl.weighting.fairgrad import FairGrad
from mtl.weighting.gradnorm import GradNorm
from mtl.weighting.gradvac import GradVac
from mtl.weighting.gram import cosines, norms
from mtl.weighting.imtl_g import IMTLG
from mtl.weighting.mgda import MGDA
from mtl.weighting.pcgrad import PCGrad

COUNTS = [2, 3, 4, 5, 6]
SEEDS = range(5)

some_gradients = pytest.mark.parametrize(
    "gradients", [(count, seed) for count in COUNTS for seed in SEEDS], indirect=True, ids=str
)
pairs = pytest.mark.parametrize("gradients", [(2, seed) for seed in range(25)], indirect=True, ids=str)


@pytest.fixture
def gradients(request: pytest.FixtureRequest) -> Tensor:
    """Gradients (T, P) whose norms differ by a factor of up to 100, most of them in conflict with others."""
    count, seed = request.param
    generator = torch.Generator().manual_seed(1000 * count + seed)
    sizes = 10 ** (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
    return sizes * torch.randn(count, count + 2, generator=generator, dtype=torch.float64)


def shown(gradients: Tensor, losses: Tensor | None = None) -> Step:
    count = len(gradients)
    return Step(
        torch.ones(count, dtype=torch.float64) if losses is None else losses,
        torch.arange(count),
        gradients @ gradients.T,
    )


def weights_of(rule: Callable[..., Weighting], gradients: Tensor, **options: Any) -> Tensor:
    return rule(named(len(gradients)), **options)(shown(gradients)).detach()


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visit tasks in order, as the orders drawn by others are not ours."""
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))


# The equations.


@some_gradients
def test_mgda_is_the_shortest_average(gradients: Tensor) -> None:
    """The optimality conditions: no gradient has less of the average's direction than the average itself."""
    count = len(gradients)
    losses = torch.linspace(0.2, 3, count, dtype=torch.float64)
    lengths = gradients.norm(dim=1)
    divisors = {"none": torch.ones_like(losses), "l2": lengths, "loss": losses, "loss+": losses * lengths}
    for normalizer, divisor in divisors.items():
        weights = MGDA(named(count), normalizer)(shown(gradients, losses))
        assert float(weights.sum()) == pytest.approx(1) and (weights >= 0).all()
        share = weights * divisor / (weights * divisor).sum()
        normalized = gradients / divisor[:, None]
        average = share @ normalized
        along, square = normalized @ average, average @ average
        assert (along >= square * (1 - 1e-8)).all()
        torch.testing.assert_close(along[share > 0], square.expand(int((share > 0).sum())), rtol=1e-8, atol=0)


def pcgrads(gradients: Tensor) -> list[Tensor]:
    """Return every update that algorithm 1 can give, over all orders, from explicit vectors."""
    turned = []
    for i, own in enumerate(gradients):
        results = []
        for order in itertools.permutations([j for j in range(len(gradients)) if j != i]):
            vector = own.clone()
            for j in order:
                other = gradients[j]
                if vector @ other < 0:
                    vector = vector - vector @ other / (other @ other) * other
            results.append(vector)
        turned.append(results)
    return [torch.stack(choice).sum(0) for choice in itertools.product(*turned)]


def test_pcgrad_is_algorithm_1_in_a_random_order() -> None:
    gradients = rows([1, 0.2, 0, 0.1], [-0.9, 1, -0.3, 0], [-0.2, -0.5, 1, 0.2])
    possible = torch.stack(pcgrads(gradients))
    seen = set()
    rule = PCGrad(named(3))
    for _ in range(40):
        update = rule(shown(gradients)) @ gradients
        rule.asked += 1
        distance = (possible - update).norm(dim=1)
        assert distance.min() < 1e-12
        seen.add(tuple(update.round(decimals=9).tolist()))
    assert len(seen) == len({tuple(update.round(decimals=9).tolist()) for update in possible})


@some_gradients
def test_gradvac_gives_each_pair_the_cosine_of_its_goal(gradients: Tensor, in_order: None) -> None:
    """From explicit vectors, in order, over several steps."""
    count = len(gradients)
    rule, goals = GradVac(named(count), beta=0.3), torch.zeros(count, count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(count)
    for _ in range(4):
        gradients = gradients + 0.3 * torch.randn(gradients.shape, generator=generator, dtype=torch.float64)
        total = torch.zeros_like(gradients[0])
        for i, own in enumerate(gradients):
            for j, other in enumerate(gradients):
                if i == j:
                    continue
                cosine = torch.cosine_similarity(own, other, dim=0)
                goal = goals[i, j].clone()
                if cosine < goal:
                    # In the plane of the two: the part across stays, the part along makes the angle right.
                    unit = other / other.norm()
                    across = own - (own @ unit) * unit
                    own = across + across.norm() * goal / (1 - goal**2).sqrt() * unit
                goals[i, j] = 0.7 * goal + 0.3 * cosine
            total = total + own
        agree(rule(shown(gradients)) @ gradients, total, 1e-10)
        agree(rule.goals, goals, 1e-10)


@some_gradients
def test_imtl_g_steps_equally_far_along_each_gradient(gradients: Tensor) -> None:
    weights = weights_of(IMTLG, gradients)
    along = gradients @ (weights @ gradients) / gradients.norm(dim=1)
    torch.testing.assert_close(along, along.mean().expand_as(along), rtol=1e-8, atol=0)
    assert (along > 0).all()
    bounded = weights.abs().sum() * (1 + 1e-9) >= 100
    assert float(weights.sum()) == pytest.approx(1) or bounded


def test_imtl_g_never_steps_uphill() -> None:
    """The weights of equation 6 sum to a negative number here before they are made to sum to 1."""
    gradients = rows([1, 0, 0], [0, 1, 0], [0.8, 0.8, 0.1]) * rows([1], [1], [1e-4])
    weights = weights_of(IMTLG, gradients)
    theirs = aggregation.IMTLG()(gradients)
    assert (gradients @ theirs < 0).all()
    along = gradients @ (weights @ gradients) / gradients.norm(dim=1)
    torch.testing.assert_close(along, along.mean().expand_as(along), rtol=1e-8, atol=0)
    assert (along > 0).all() and weights.abs().sum() <= 100 + 1e-9


@some_gradients
def test_config_has_one_cosine_with_every_gradient(gradients: Tensor) -> None:
    update = weights_of(ConFIG, gradients) @ gradients
    cosine = torch.cosine_similarity(gradients, update[None])
    torch.testing.assert_close(cosine, cosine.mean().expand_as(cosine), rtol=1e-9, atol=0)
    assert (cosine > 0).all()
    torch.testing.assert_close(update.norm(), (gradients @ update / update.norm()).sum(), rtol=1e-9, atol=0)


@some_gradients
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_is_the_mean_of_the_nearest_orthogonal_gradients(gradients: Tensor, mode: Any) -> None:
    left, values, right = torch.linalg.svd(gradients, full_matrices=False)
    scale = {"min": values.min(), "median": values.median(), "rmse": values.square().mean().sqrt()}[mode]
    agree(weights_of(AlignedMTL, gradients, mode=mode) @ gradients, (scale * left @ right).mean(0), 1e-8)


@some_gradients
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
def test_fairgrad_solves_its_equation(gradients: Tensor, alpha: float) -> None:
    weights = weights_of(FairGrad, gradients, alpha=alpha)
    assert (weights > 0).all()
    torch.testing.assert_close(gradients @ (weights @ gradients), weights ** (-1 / alpha), rtol=1e-8, atol=0)


def test_fairgrad_is_the_best_direction_of_its_utility() -> None:
    """No direction of the same length has more of sum <d, g>^(1 - alpha) / (1 - alpha)."""
    gradients = rows([1, 0.2, 0, 0.1], [-4, 10, 3, 0], [0.02, -0.05, 0.1, 0.02])
    for alpha in (0.5, 2.0):

        def utility(update: Tensor, alpha: float = alpha) -> Tensor:
            return ((update @ gradients.T) ** (1 - alpha) / (1 - alpha)).sum(-1)

        update = weights_of(FairGrad, gradients, alpha=alpha) @ gradients
        near = update + 0.05 * update.norm() * torch.randn(2000, 4, dtype=torch.float64)
        near = near / near.norm(dim=1, keepdim=True) * update.norm()
        near = near[(near @ gradients.T > 0).all(1)]
        assert len(near) > 100
        assert (utility(near) < utility(update)).all()


def test_db_mtl_sums_gradients_of_logarithms_of_one_length() -> None:
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([theta.square().sum(), (theta - 1).abs().sum() * 100, theta.exp().sum() * 1e-3])
    raw = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])
    logs = torch.stack([torch.autograd.grad(loss.log(), theta, retain_graph=True)[0] for loss in losses])
    expected = logs.norm(dim=1).max() * (logs / logs.norm(dim=1, keepdim=True)).sum(0)
    agree(DBMTL(named(3))(shown(raw, losses.detach())) @ raw, expected, 1e-12)


def slope_of(rule: GradNorm) -> Tensor:
    return torch.stack([logit.grad for logit in rule.logits if logit.grad is not None])


class TestGradNorm:
    gradients = rows([3, 4], [0.6, -0.8], [20, 0])

    def test_the_slope_is_that_of_its_sum_with_the_goals_held(self) -> None:
        rule = GradNorm(named(3), alpha=1.2)
        first = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
        torch.testing.assert_close(rule(shown(self.gradients, first)), torch.ones(3, dtype=torch.float64))
        with torch.no_grad():
            for logit, value in zip(rule.logits, [0.3, -0.2, 0.1], strict=True):
                logit.fill_(value)
        losses = torch.tensor([0.5, 3.0, 0.1], dtype=torch.float64)
        step = shown(self.gradients, losses)
        objective = rule.objective(step)
        assert objective is not None
        objective.backward()

        lengths = np.array([5.0, 1.0, 20.0])
        rate = np.array([0.5, 0.75, 0.2]) / np.mean([0.5, 0.75, 0.2])

        def weights(logits: np.ndarray) -> np.ndarray:
            return 3 * np.exp(logits) / np.exp(logits).sum()

        here = np.array([0.3, -0.2, 0.1])
        goals = (weights(here) * lengths).mean() * rate**1.2

        def total(logits: np.ndarray) -> float:
            return float(np.abs(weights(logits) * lengths - goals).sum() / lengths.mean())

        assert objective.item() == pytest.approx(total(here), rel=1e-12)
        h = 1e-6
        slopes = [(total(here + h * e) - total(here - h * e)) / (2 * h) for e in np.eye(3)]
        np.testing.assert_allclose(slope_of(rule), slopes, rtol=1e-6)

    def test_lengths_become_as_the_rates(self) -> None:
        """All goals can be reached where their mean is that of the lengths, as with alpha 1: w_t |g_t| is as r_t."""
        rule = GradNorm(named(3), alpha=1)
        rule(shown(self.gradients, torch.ones(3, dtype=torch.float64)))
        losses = torch.tensor([0.8, 0.4, 0.2], dtype=torch.float64)
        step = shown(self.gradients, losses)
        optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
        for number in range(400):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.98**number
            optimizer.zero_grad()
            objective = rule.objective(step)
            assert objective is not None
            objective.backward()
            optimizer.step()
        weights = rule(step)
        assert float(weights.sum()) == pytest.approx(3)
        lengths = weights * torch.tensor([5.0, 1.0, 20.0], dtype=torch.float64)
        torch.testing.assert_close(lengths / lengths.sum(), losses / losses.sum(), rtol=1e-2, atol=0)

    def test_a_slower_task_gets_more(self) -> None:
        rule = GradNorm(named(2))
        rule(shown(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)))
        objective = rule.objective(shown(torch.eye(2, dtype=torch.float64), rows([0.9, 0.1])[0]))
        assert objective is not None
        objective.backward()
        slope = slope_of(rule)
        assert slope[0] < 0 < slope[1]


# Two tasks: closed forms.


def units(gradients: Tensor) -> tuple[Tensor, Tensor]:
    first, second = gradients / gradients.norm(dim=1, keepdim=True)
    return first, second


@pairs
def test_closed_forms_of_two_tasks(gradients: Tensor) -> None:
    (first, second), (n1, n2) = gradients, gradients.norm(dim=1)
    product, bisector = first @ second, sum(units(gradients))
    assert isinstance(bisector, Tensor)
    cosine = product / (n1 * n2)
    share = ((n2**2 - product) / (n1**2 + n2**2 - 2 * product)).clamp(0, 1)
    direction = bisector / bisector.norm()
    expected: dict[Callable[..., Weighting], Tensor] = {
        PCGrad: (1 - product.clamp(max=0) / n1**2) * first + (1 - product.clamp(max=0) / n2**2) * second,
        GradVac: (1 - product.clamp(max=0) / n1**2) * first + (1 - product.clamp(max=0) / n2**2) * second,
        MGDA: share * first + (1 - share) * second,
        IMTLG: (n2 * first + n1 * second) / (n1 + n2),
        ConFIG: (first @ direction + second @ direction) * direction,
        FairGrad: bisector / (1 + cosine).sqrt(),
    }
    for rule, update in expected.items():
        agree(weights_of(rule, gradients) @ gradients, update, 1e-8)


# torchjd.


@some_gradients
def test_torchjd_agrees(gradients: Tensor, in_order: None) -> None:
    gram = gradients @ gradients.T
    agree(weights_of(PCGrad, gradients), aggregation.PCGradWeighting()(gram))
    agree(weights_of(ConFIG, gradients) @ gradients, aggregation.ConFIG()(gradients), 1e-8)
    for mode in ("min", "median", "rmse"):
        theirs = aggregation.AlignedMTLWeighting(scale_mode=mode)(gram)
        agree(weights_of(AlignedMTL, gradients, mode=mode), theirs, 1e-8)
    imtl = weights_of(IMTLG, gradients)
    if imtl.abs().sum() < 99:  # not one of those that are bounded
        agree(imtl, aggregation.IMTLGWeighting()(gram), 1e-6)
    # Its descent stops early: it is never shorter than ours.
    ours, theirs = (w @ gradients for w in (weights_of(MGDA, gradients), aggregation.MGDAWeighting(1e-7, 300)(gram)))
    assert ours.norm() <= theirs.norm() * (1 + 1e-12)
    assert theirs.norm() <= ours.norm() * 1.1
    agree(weights_of(FairGrad, gradients), aggregation.FairGradWeighting(1.0)(gram), 1e-2)


@some_gradients
def test_torchjd_has_the_same_goals_of_gradvac(gradients: Tensor, in_order: None) -> None:
    ours, theirs = GradVac(named(len(gradients))), aggregation.GradVacWeighting(eps=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradients = gradients + 0.2 * torch.randn(gradients.shape, generator=generator, dtype=torch.float64)
        agree(ours(shown(gradients)), theirs(gradients @ gradients.T))


# LibMTL.


@pytest.fixture
def libmtl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return LibMTL's rules, which import a module that torchvision no longer has and work in the default type."""
    stub = ModuleType("torchvision.models.utils")
    stub.load_state_dict_from_url = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    library = pytest.importorskip("LibMTL").weighting
    torch.set_default_dtype(torch.float64)
    yield library
    torch.set_default_dtype(torch.float32)


def driven(kind: Any, gradients: Tensor, losses: Tensor | None = None, **options: Any) -> tuple[Tensor, Any]:
    """Return the update of one of LibMTL's rules, and the rule, for losses with these gradients."""
    theta = torch.nn.Parameter(torch.zeros(gradients.shape[1]))

    class Model(kind):  # type: ignore[misc]
        task_num, rep_grad, device, epoch = len(gradients), False, torch.device("cpu"), 1

        def get_share_params(self) -> list[Tensor]:
            return [theta]

        def zero_grad_share_params(self) -> None:
            theta.grad = torch.zeros_like(theta)

    model = Model()
    model.init_param()
    model.train_loss_buffer = np.ones((len(gradients), 1))
    values = torch.ones(len(gradients)) if losses is None else losses
    model.backward(gradients @ theta + values, **options)
    assert theta.grad is not None
    return theta.grad, model


@pairs
def test_libmtl_agrees_on_two_tasks(gradients: Tensor, libmtl: Any) -> None:
    agree(weights_of(PCGrad, gradients) @ gradients, driven(libmtl.PCGrad, gradients)[0])
    agree(weights_of(GradVac, gradients) @ gradients, driven(libmtl.GradVac, gradients, beta=0.5)[0])
    agree(weights_of(IMTLG, gradients) @ gradients, driven(libmtl.IMTL, gradients)[0])
    losses = torch.tensor([0.3, 2.0])
    for normalizer in ("none", "l2", "loss", "loss+"):
        weights = MGDA(named(2), normalizer)(shown(gradients, losses))
        if weights.min() > 0:  # it never gives a task nothing
            theirs, _ = driven(libmtl.MGDA, gradients, losses, mgda_gn=normalizer)
            update = weights @ gradients  # as long as an average of raw gradients, and theirs one of normalized ones
            agree(update / update.norm() * theirs.norm(), theirs)


@some_gradients
def test_libmtl_has_the_same_slope_of_gradnorm(gradients: Tensor, libmtl: Any) -> None:
    losses = torch.linspace(0.3, 1.2, len(gradients))
    rule = GradNorm(named(len(gradients)), alpha=1.3)
    rule(shown(gradients, torch.ones(len(gradients))))
    objective = rule.objective(shown(gradients, losses))
    assert objective is not None
    objective.backward()
    _, theirs = driven(libmtl.GradNorm, gradients, losses, alpha=1.3)
    agree(slope_of(rule) * gradients.norm(dim=1).mean(), theirs.loss_scale.grad)


@some_gradients
def test_libmtl_agrees_on_imtl_g(gradients: Tensor, libmtl: Any) -> None:
    weights = weights_of(IMTLG, gradients)
    if weights.abs().sum() < 99:
        agree(weights @ gradients, driven(libmtl.IMTL, gradients)[0], 1e-6)


# The Gram matrix.


@some_gradients
def test_norms_and_cosines(gradients: Tensor) -> None:
    gram = gradients @ gradients.T
    agree(norms(gram), gradients.norm(dim=1), 1e-12)
    agree(cosines(gram), torch.cosine_similarity(gradients[:, None], gradients[None], dim=-1), 1e-12)


def test_a_zero_gradient_is_at_right_angles_to_all_others() -> None:
    gradients = rows([1, 1], [0, 0], [-2, -2])
    expected = rows([1, 0, -1], [0, 1, 0], [-1, 0, 1])
    torch.testing.assert_close(cosines(gradients @ gradients.T), expected)
