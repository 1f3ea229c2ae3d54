"""Two ranks with half a batch each follow the gradients of one rank with the whole batch, whatever the rule."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.registry import WEIGHTINGS
from mtl.training.module import MultiTaskModule

TASKS = ["segmentation", "depth", "normals"]
SIZE = 32
CASES = {rule: {"weighting": rule} for rule in WEIGHTINGS} | {
    "pcgrad on parameters": {"weighting": "pcgrad", "weighting_on": "parameters"},
    "own heads": {"weighting": "uncertainty", "head_weighting": "own"},
}


def batches() -> Iterator[dict[str, Tensor]]:
    """Yield the batches of three steps: with all labels, without depth in the second half, and without any normals."""
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        batch = {
            "image": torch.rand(4, 3, SIZE, SIZE, generator=generator),
            "segmentation": torch.randint(0, 3, (4, SIZE, SIZE), generator=generator, dtype=torch.uint8),
            "depth": torch.rand(4, 1, SIZE, SIZE, generator=generator) + 1,
            "normals": torch.nn.functional.normalize(torch.randn(4, 3, SIZE, SIZE, generator=generator), dim=1),
        }
        batch["depth"][3, :, 5:] = 0  # the halves have unequally many labelled pixels
        if number == 1:
            batch["depth"][2:] = 0
        if number == 2:
            batch["normals"].zero_()
        yield batch


def follow(case: str, rows: slice, *, ddp: bool) -> dict[str, Tensor]:
    """Return all gradients of three steps, and what the rule knows after them."""
    fields = {"task": TASKS, "init": "none", "backbone": "convnext_atto", "decoder_channels": 16, "seed": 5}
    torch.manual_seed(0)
    info = DataInfo("test", tuple(TASKS), ("wall", "floor", "chair"))
    module = build_module(validate(fields | {"data": {"size": (SIZE, SIZE)}} | CASES[case]), info, total_steps=3)
    module.eval()  # without batch statistics
    steps = iter(range(3))
    module.forward = lambda batch: module.training_step(batch, 0)  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(module) if ddp else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}
    for batch in batches():
        step = next(steps)
        MultiTaskModule.global_step = property(lambda self, step=step: step)
        optimizer.zero_grad()
        wrapped({name: values[rows] for name, values in batch.items()}).backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                found[f"{step} {name}"] = parameter.grad.clone()
        optimizer.step()
        module.look_again(nullcontext())
    module.balancer.rule.end_epoch()
    state = module.balancer.state_dict()
    return found | {name: value for name, value in state.items() if isinstance(value, Tensor)}


def rank(number: int, folder: Path) -> None:
    """Be one of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    half = slice(2 * number, 2 * number + 2)
    torch.save({case: follow(case, half, ddp=True) for case in CASES}, folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(made_once: Callable[[str, Callable[[Path], None]], Path]) -> list[dict[str, dict[str, Tensor]]]:
    folder = made_once("rules_on_ranks", both_ranks)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def both_ranks(folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    running = [subprocess.Popen([*command, str(number)], env=environment) for number in range(2)]
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(
    ranks: list[dict[str, dict[str, Tensor]]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultiTaskModule, "global_step", MultiTaskModule.global_step)  # to be put back
    first, second = (found[case] for found in ranks)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=0, atol=0, equal_nan=True), name
    expected = follow(case, slice(None), ddp=False)
    assert first.keys() == expected.keys()
    for step in ("0 ", "1 ", "2 "):
        of_step = [name for name in expected if name.startswith(step)]
        largest = max(float(expected[name].abs().max()) for name in of_step)
        for name in of_step:
            assert torch.allclose(first[name], expected[name], rtol=1e-3, atol=1e-5 * largest), name
    for name, value in expected.items():
        if name[:2] not in ("0 ", "1 ", "2 "):
            assert torch.allclose(first[name].double(), value.double(), rtol=1e-4, atol=1e-6, equal_nan=True), name


if __name__ == "__main__":
    rank(int(sys.argv[2]), Path(sys.argv[1]))
