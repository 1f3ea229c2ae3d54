"""What rules from the gradients remember: all of it is in their state, and only that of present tasks moves."""

import io
from collections.abc import Iterator

import pytest
import torch
from degenerate import named
from test_gradients_degenerate import RULES
from torch import Tensor

from mtl.weighting.base import Step, Weighting
from mtl.weighting.gradnorm import GradNorm
from mtl.weighting.gradvac import GradVac
from mtl.weighting.pcgrad import PCGrad

TASKS = 4


def script(steps: int) -> Iterator[Step]:
    """Yield steps with random gradients, in which tasks are often missing and sometimes without a gradient."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        present = (torch.rand(TASKS, generator=generator) < 0.75).nonzero().flatten()
        if not len(present):
            continue
        gradients = torch.randn(len(present), 6, generator=generator, dtype=torch.float64)
        gradients = gradients * (torch.rand(len(present), 1, generator=generator) < 0.9)
        losses = 0.1 + torch.rand(len(present), generator=generator, dtype=torch.float64)
        yield Step(losses, present, gradients @ gradients.T)


class Run:
    """A rule as training uses it, with the optimizer of what it learns."""

    def __init__(self, name: str) -> None:
        self.rule = RULES[name](named(TASKS))
        parameters = list(self.rule.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9) if parameters else None

    def step(self, seen: Step) -> Tensor:
        weights = self.rule(seen)
        self.rule.asked += 1
        objective = self.rule.objective(seen)
        if objective is not None and self.optimizer is not None:
            self.optimizer.zero_grad()
            objective.backward()
            self.optimizer.step()
        return weights.detach().clone()


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_rule_goes_on_to_the_last_bit(name: str) -> None:
    steps = list(script(30))
    whole, first = Run(name), Run(name)
    expected = [whole.step(seen) for seen in steps]
    for seen in steps[:14]:
        first.step(seen)
    file = io.BytesIO()
    torch.save([first.rule.state_dict(), first.optimizer and first.optimizer.state_dict()], file)
    file.seek(0)
    rule, optimizer = torch.load(file, weights_only=True)
    second = Run(name)
    second.rule.load_state_dict(rule)
    if second.optimizer is not None:
        second.optimizer.load_state_dict(optimizer)
    for seen, weights in zip(steps[14:], expected[14:], strict=True):
        assert torch.equal(second.step(seen), weights)
    for key, value in whole.rule.state_dict().items():
        assert torch.equal(value, second.rule.state_dict()[key]), key


@pytest.mark.parametrize("name", RULES)
def test_ranks_agree_whatever_else_they_draw(name: str) -> None:
    one, other = RULES[name](named(TASKS)), RULES[name](named(TASKS))
    for seen in script(10):
        weights = one(seen)
        torch.rand(7)
        assert torch.equal(weights, other(seen))
        one.asked += 1
        other.asked += 1


def test_the_order_of_pcgrad_is_another_in_every_step_and_with_every_seed() -> None:
    def draws(seed: int) -> list[Tensor]:
        rule = PCGrad(named(TASKS))
        rule.seed = seed
        gradients = torch.randn(TASKS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        seen = Step(torch.ones(TASKS), torch.arange(TASKS), gradients @ gradients.T)
        results = []
        for _ in range(12):
            results.append(rule(seen))
            rule.asked += 1
        return results

    first = torch.stack(draws(0))
    assert len(first.unique(dim=0)) > 1
    assert torch.equal(first, torch.stack(draws(0)))
    assert not torch.equal(first, torch.stack(draws(1)))


def states(rule: Weighting, steps: list[Step]) -> Iterator[tuple[Step, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield each step, and the rule's state before and after it."""
    for seen in steps:
        before = {key: value.clone() for key, value in rule.state_dict().items()}
        rule(seen)
        yield seen, before, rule.state_dict()


def test_gradvac_keeps_the_goals_of_missing_tasks() -> None:
    moved = 0
    for seen, before, after in states(GradVac(named(TASKS)), list(script(30))):
        there = torch.zeros(TASKS, dtype=torch.bool)
        there[seen.present[seen.gram.diagonal() > 0]] = True
        pairs = there[:, None] & there & ~torch.eye(TASKS, dtype=torch.bool)
        changed = before["goals"] != after["goals"]
        assert torch.equal(changed, pairs)
        moved += int(changed.sum())
    assert moved > 0


def test_gradvac_has_the_same_goals_with_and_without_tasks_that_never_come() -> None:
    """Places among all tasks, not among the present ones, say which goal is whose."""
    few, many = GradVac(named(2)), GradVac(named(TASKS))
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        gradients = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        losses, gram = torch.ones(2, dtype=torch.float64), gradients @ gradients.T
        weights = few(Step(losses, torch.tensor([0, 1]), gram))
        assert torch.equal(weights, many(Step(losses, torch.tensor([1, 3]), gram)))
    assert torch.equal(many.goals[1, 3], few.goals[0, 1]) and torch.equal(many.goals[3, 1], few.goals[1, 0])


def test_gradnorm_keeps_what_it_knows_of_missing_tasks() -> None:
    rule = GradNorm(named(TASKS))
    steps = list(script(30))
    first: dict[int, float] = {}
    for seen, before, after in states(rule, steps):
        for place, loss in zip(seen.present.tolist(), seen.losses.tolist(), strict=True):
            first.setdefault(place, loss)
        absent = [place for place in range(TASKS) if place not in seen.present]
        assert torch.equal(before["first"][absent], after["first"][absent])
        rule.zero_grad()
        objective = rule.objective(seen)
        if objective is not None:
            objective.backward()
            learning = [place for place, logit in enumerate(rule.logits) if logit.grad is not None]
            assert learning and not set(learning) & set(absent)
    assert rule.first.tolist() == [first[place] for place in range(TASKS)]
