"""What rules from the losses remember: all of it in their state, and of missing tasks nothing moves."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_steps import ask, script, shown
from torch import Tensor

from mtl.weighting.base import Step, Weighting
from mtl.weighting.dwa import DWA
from mtl.weighting.equal import Equal
from mtl.weighting.famo import FAMO
from mtl.weighting.geometric import Geometric
from mtl.weighting.imtl_l import IMTLL
from mtl.weighting.log import LogSum
from mtl.weighting.random import RandomWeights
from mtl.weighting.stch import STCH
from mtl.weighting.uncertainty import Uncertainty

TASKS = {"segmentation": "categorical", "depth": "laplace", "normals": "laplace", "edges": "gaussian"}
RULES: dict[str, Callable[[dict[str, str]], Weighting]] = {
    "equal": Equal,
    "uncertainty": Uncertainty,
    "log": LogSum,
    "dwa": DWA,
    "random": RandomWeights,
    "geometric": Geometric,
    "imtl-l": IMTLL,
    "famo": FAMO,
    "stch": lambda tasks: STCH(tasks, warmup=2),
}
EPOCH = 5
"""Steps."""


class Run:
    """A rule as training uses it, with the optimizer of what it learns."""

    def __init__(self, name: str, tasks: dict[str, str] = TASKS) -> None:
        self.rule = RULES[name](tasks)
        learned = list(self.rule.parameters()) or [torch.nn.Parameter(torch.zeros(()))]
        self.optimizer = torch.optim.AdamW(learned, lr=0.1, weight_decay=0.0)

    def step(self, number: int, seen: Step, after: Tensor) -> Tensor:
        weights = ask(self.rule, seen)
        objective = self.rule.objective(seen)
        self.optimizer.zero_grad()
        if objective is not None:
            objective.backward()
        self.optimizer.step()
        if self.rule.needs_second_forward:
            self.rule.look_again(seen, after)
        if number % EPOCH == EPOCH - 1:
            self.rule.end_epoch()
        return weights

    def resumed(self, name: str) -> "Run":
        """Return a run that knows only what a checkpoint can hold."""
        file = io.BytesIO()
        torch.save([self.rule.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        rule, optimizer = torch.load(file, weights_only=True)
        other = Run(name)
        other.rule.load_state_dict(rule)
        other.optimizer.load_state_dict(optimizer)
        return other


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_rule_goes_on_to_the_last_bit(name: str) -> None:
    """Wherever it stopped: before the first step, within an epoch, at its end, in the warm-up and after."""
    steps = list(script(len(TASKS), 6 * EPOCH))
    whole = Run(name)
    expected, runs = [], []
    for number, (seen, after) in enumerate(steps):
        if number in (0, 3, EPOCH, 2 * EPOCH - 1, 2 * EPOCH + 2, 4 * EPOCH + 3):
            runs.append((number, whole.resumed(name)))
        expected.append(whole.step(number, seen, after))
    for start, run in runs:
        for number, (seen, after) in enumerate(steps[start:], start):
            assert torch.equal(run.step(number, seen, after), expected[number]), (start, number)
        for key, value in whole.rule.state_dict().items():
            torch.testing.assert_close(run.rule.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "imtl-l", "famo", "stch", "random"])
def test_what_is_remembered_matters(name: str) -> None:
    """The test above could not fail otherwise: a fresh rule weighs differently."""
    steps = list(script(len(TASKS), 4 * EPOCH))
    whole = Run(name)
    for number, (seen, after) in enumerate(steps):
        whole.step(number, seen, after)
    step = shown([1.0, 2.0, 3.0, 4.0])
    assert not torch.allclose(whole.rule(step), Run(name).rule(step), rtol=1e-2)


def of_task(run: Run, place: int) -> dict[str, Tensor]:
    """Return copies of all that a rule, and its optimizer, remember of a task."""
    state = copy.deepcopy(run.rule.state_dict())
    found = {key: value[..., place] for key, value in state.items() if value.dim()}
    found |= {key: value for key, value in state.items() if key.endswith(f".{place}")}
    if list(run.rule.parameters()):
        optimizer: dict[str, Any] = copy.deepcopy(run.optimizer.state_dict()["state"])
        found |= optimizer.get(place, {})
    return found


@pytest.mark.parametrize("name", RULES)
def test_of_a_missing_task_nothing_moves(name: str) -> None:
    run = Run(name)
    steps = [(seen, after) for seen, after in script(len(TASKS), 40) if len(seen.present) == len(TASKS)]
    for number, (seen, after) in enumerate(steps):
        run.step(number, seen, after)
    if name in ("dwa", "stch"):
        run.rule.end_epoch()
    missing, there = of_task(run, 1), of_task(run, 2)
    for _ in range(3):
        run.step(0, shown([0.5, 0.25, 3.0], [0, 2, 3]), torch.tensor([0.3, 0.2, 4.0], dtype=torch.float64))
    assert repr(of_task(run, 1)) == repr(missing)
    assert (repr(of_task(run, 2)) == repr(there)) == (name in ("equal", "log", "random", "geometric"))
    if name in ("dwa", "stch"):
        run.rule.end_epoch()
        assert repr(of_task(run, 1)) == repr(missing)


@pytest.mark.parametrize("name", [name for name in RULES if name != "random"])
def test_a_task_that_is_never_there_might_as_well_not_exist(name: str) -> None:
    fewer = {task: likelihood for task, likelihood in TASKS.items() if task != "depth"}
    run, without = Run(name), Run(name, fewer)
    for number, (seen, after) in enumerate(script(3, 4 * EPOCH)):
        shifted = shown(seen.losses, [(0, 2, 3)[place] for place in seen.present.tolist()])
        assert torch.equal(run.step(number, shifted, after), without.step(number, seen, after))


@pytest.mark.parametrize("name", RULES)
def test_weights_depend_on_the_losses_of_present_tasks_in_order(name: str) -> None:
    """One weight each, in the order of the losses, and nothing that is shown is changed."""
    run = Run(name)
    for number, (seen, after) in enumerate(script(len(TASKS), 3 * EPOCH)):
        kept = seen.losses.clone()
        weights = run.step(number, seen, after)
        assert weights.shape == seen.losses.shape and weights.dtype == torch.float64 and not weights.requires_grad
        assert torch.equal(seen.losses, kept)
