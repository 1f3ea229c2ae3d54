"""Convex problems whose Pareto set is known: rules that promise to end on it do."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from degenerate import named
from scipy.optimize import minimize
from torch import Tensor

from mtl.weighting.aligned_mtl import AlignedMTL
from mtl.weighting.base import Step, Weighting
from mtl.weighting.cagrad import CAGrad
from mtl.weighting.conflict_free import ConFIG
from mtl.weighting.db_mtl import DBMTL
from mtl.weighting.dualproj import DualProj
from mtl.weighting.fairgrad import FairGrad
from mtl.weighting.gradvac import GradVac
from mtl.weighting.imtl_g import IMTLG
from mtl.weighting.mgda import MGDA
from mtl.weighting.nash_mtl import NashMTL
from mtl.weighting.pcgrad import PCGrad
from mtl.weighting.upgrad import UPGrad


class Promise(NamedTuple):
    name: str
    rule: Callable[..., Weighting]
    tasks: tuple[int, ...] = (2, 3)
    """For how many it holds. Rules with negative weights may end elsewhere: where gradients depend on one another."""


RULES = [
    *(Promise(f"mgda {n}", partial(MGDA, normalizer=n)) for n in ("none", "l2", "loss", "loss+")),
    Promise("pcgrad", PCGrad),
    Promise("gradvac", GradVac),
    Promise("imtl-g", IMTLG, (2,)),
    Promise("aligned-mtl min", AlignedMTL, (2,)),
    *(Promise(f"aligned-mtl {m}", partial(AlignedMTL, mode=m)) for m in ("median", "rmse")),
    *(Promise(f"fairgrad {a:g}", partial(FairGrad, alpha=a)) for a in (0.5, 1.0, 2.0)),
    Promise("config", ConFIG, (2,)),
    Promise("db-mtl", DBMTL),
    *(Promise(f"cagrad {c:g}", partial(CAGrad, c=c)) for c in (0.4, 0.9)),
    Promise("nash-mtl", NashMTL),
    Promise("upgrad", UPGrad),
    Promise("dualproj", DualProj),
]

OPTIMA = torch.tensor([[1.0, 0, 0, 0, 0], [-1, 0.5, 0, 1, 0], [0, -1, 1, 0, 0.5]], dtype=torch.float64)
CURVATURES = torch.tensor([[1.0, 3, 1, 0.5, 2], [2, 0.6, 1, 1, 3], [0.8, 1, 2, 1, 0.5]], dtype=torch.float64)
SCALES = torch.tensor([1.0, 30, 0.2], dtype=torch.float64)
"""Loss t is 1 + scale_t / 2 sum_k curvature_tk (x_k - optimum_tk)^2."""


def gradients_at(x: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    away = x - OPTIMA[:tasks]
    losses = 1 + SCALES[:tasks] * (CURVATURES[:tasks] * away.square()).sum(1) / 2
    return losses, SCALES[:tasks, None] * CURVATURES[:tasks] * away


def distance_from_pareto(x: Tensor, tasks: int) -> float:
    """Return how far x is from the optimum of the average of losses that is stationary nearest to it.

    The Pareto set of strictly convex losses is the set of the optima of their averages, here of quadratics.
    """

    def away(logits: object) -> float:
        share = (torch.as_tensor(logits, dtype=torch.float64).softmax(0) / SCALES[:tasks])[:, None]
        weight = share * SCALES[:tasks, None] * CURVATURES[:tasks]
        return float(((weight * OPTIMA[:tasks]).sum(0) / weight.sum(0) - x).norm())

    starts = torch.cat([torch.zeros(1, tasks), 3 * torch.eye(tasks)])
    return min(minimize(away, start.numpy(), method="Nelder-Mead", options={"xatol": 1e-8}).fun for start in starts)


@pytest.mark.parametrize("start", [(1.5, 1, 1, 1, 1), (-1.5, -2, 0, 1, 0.3)])
@pytest.mark.parametrize(
    ("promise", "tasks"),
    [(promise, tasks) for promise in RULES for tasks in promise.tasks],
    ids=lambda value: value.name if isinstance(value, Promise) else f"{value} tasks",
)
def test_ends_on_the_pareto_set(promise: Promise, tasks: int, start: tuple[float, ...]) -> None:
    x = torch.tensor(start, dtype=torch.float64)
    rule = promise.rule(named(tasks))
    assert distance_from_pareto(x, tasks) > 0.5
    for number in range(120):
        losses, gradients = gradients_at(x, tasks)
        update = rule(Step(losses, torch.arange(tasks), gradients @ gradients.T)).detach() @ gradients
        rule.asked += 1
        # Rules have their own lengths of a step, and some never shorten it: here it is bounded by what shrinks.
        x = x - update * min(0.3, 0.3 * 0.93**number / float(update.norm().clamp_min(1e-30)))
    assert distance_from_pareto(x, tasks) < 5e-3
