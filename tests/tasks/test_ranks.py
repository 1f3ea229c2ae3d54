"""Losses of two processes with half of the images each against one process with all of them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.sample import IGNORE_INDEX, Batch, DataInfo
from mtl.tasks.base import Task, over_ranks
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation

INFO = DataInfo("rooms", ("segmentation", "depth", "normals"), ("wall", "floor", "chair", "sofa"))
PARTS = (slice(0, 1), slice(1, 4))
"""The images of each rank."""

LABELLED = {"unequal": (0.9, 0.2), "one lacks": (0.0, 0.5), "other lacks": (0.5, 0.0), "none": (0.0, 0.0)}
"""Shares of labelled pixels on each rank."""


class Case(NamedTuple):
    """A task, and tasks whose losses add up to its: those that pool pixels over ranks, and those that do not."""

    make: Callable[[], Task]
    pooled: Sequence[Callable[[], Task]] = ()
    by_rank: Sequence[Callable[[], Task]] = ()


def segmentation(options: SegmentationOptions) -> Callable[[], Task]:
    def make() -> Task:
        task = Segmentation(options, INFO)
        task.class_weights.copy_(torch.tensor([0.01, 0.3, 1.0, 7.0]))
        return task

    return make


def depth(options: DepthOptions) -> Callable[[], Task]:
    return lambda: Depth(options, INFO)


CROSS_ENTROPY, DICE = (segmentation(SegmentationOptions(loss=loss)) for loss in ("cross_entropy", "dice"))
WEIGHTED = segmentation(SegmentationOptions(class_weights="balanced", label_smoothing=0.1))
BOTH = segmentation(SegmentationOptions(loss="both"))
L1, BERHU, SILOG = (depth(DepthOptions(loss=loss)) for loss in ("l1", "berhu", "silog"))
GRADIENT = depth(DepthOptions(loss="berhu", gradient_weight=0.7))

CASES = {
    "cross-entropy": Case(CROSS_ENTROPY, pooled=[CROSS_ENTROPY]),
    "weighted, smoothed cross-entropy": Case(WEIGHTED, pooled=[WEIGHTED]),
    "dice": Case(DICE, by_rank=[DICE]),
    "both": Case(BOTH, pooled=[CROSS_ENTROPY], by_rank=[DICE]),
    "l1": Case(L1, pooled=[L1]),
    "berhu": Case(BERHU, pooled=[BERHU]),
    "berhu and gradients": Case(GRADIENT, pooled=[GRADIENT]),
    "silog": Case(SILOG, by_rank=[SILOG]),
    "normals": Case(lambda: Normals(INFO), pooled=[lambda: Normals(INFO)]),
}


def draw(task: Task, shares: Sequence[float]) -> tuple[Tensor, Batch]:
    """Return outputs and labels of all four images, of which `shares` are labelled on either rank."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(4, task.channels, 9, 11, generator=generator, dtype=torch.float64)
    known = torch.rand(4, 1, 9, 11, generator=generator)
    known = torch.cat([known[part] < share for part, share in zip(PARTS, shares, strict=True)])
    if task.target == "segmentation":
        target = torch.randint(4, (4, 9, 11), generator=generator).where(known[:, 0], IGNORE_INDEX).to(torch.uint8)
    elif task.target == "depth":
        # The largest error, and so the threshold of the reverse Huber loss, differs among ranks.
        target = known * (1 + torch.arange(4).reshape(4, 1, 1, 1) + torch.rand(known.shape, generator=generator))
    else:
        target = known * F.normalize(torch.randn(4, 3, 9, 11, generator=generator), dim=1)
    return outputs, {task.target: target}


def train(rank: int, folder: Path) -> None:
    """Write the losses of one of two ranks, and their gradients on its outputs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for name, case in CASES.items():
        for layout, shares in LABELLED.items():
            task = case.make()
            outputs, batch = draw(task, shares)
            mine = outputs[PARTS[rank]].clone().requires_grad_()
            loss = task.loss(mine, {task.target: batch[task.target][PARTS[rank]]})
            results[name, layout] = loss.detach(), torch.autograd.grad(loss, mine)[0]
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(
    made_once: Callable[[str, Callable[[Path], object]], Path],
) -> list[dict[tuple[str, str], tuple[Tensor, Tensor]]]:
    """Return what each of two processes found, all in one launch."""
    folder = made_once("ranks", lambda folder: multiprocessing.spawn(train, (folder,), nprocs=2))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", LABELLED)
@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_ranks_is_what_one_process_gets(
    name: str, layout: str, trained: list[dict[tuple[str, str], tuple[Tensor, Tensor]]]
) -> None:
    case, shares = CASES[name], LABELLED[layout]
    outputs, batch = draw(case.make(), shares)
    outputs.requires_grad_()
    expected = outputs.sum() * 0
    for pooled in case.pooled:
        expected = expected + pooled().loss(outputs, batch)
    for task in (make() for make in case.by_rank):
        parts = [part for part, share in zip(PARTS, shares, strict=True) if share]
        losses = [task.loss(outputs[part], {task.target: batch[task.target][part]}) for part in parts]
        expected = expected + sum(losses) / max(1, len(parts))
    (gradient,) = torch.autograd.grad(expected, outputs)
    assert (expected > 0) == any(shares)

    losses, gradients = zip(*(results[name, layout] for results in trained), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-9, atol=1e-12)
    # Each output belongs to one rank, and has no gradient on the other.
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-9, atol=1e-12)
    for share, loss, mine in zip(shares, losses, gradients, strict=True):
        assert (loss.item() != 0) == bool(mine.any()) == (share > 0)


def test_one_process_asks_nobody() -> None:
    count = torch.tensor(3.0)
    assert over_ranks(count) is count
