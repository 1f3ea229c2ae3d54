"""What rules from the losses are shown in tests."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtl.weighting.base import Step, Weighting


def shown(losses: Sequence[float] | Tensor, present: Sequence[int] | None = None) -> Step:
    """Return a step with these losses of the tasks at these places."""
    values = torch.as_tensor(losses, dtype=torch.float64)
    places = torch.arange(len(values)) if present is None else torch.tensor(present)
    return Step(values, places, torch.zeros(0, 0, dtype=torch.float64))


def ask(rule: Weighting, step: Step) -> Tensor:
    """Return a rule's weights as training asks for them."""
    weights = rule(step)
    rule.asked += 1
    return weights


def script(tasks: int, steps: int) -> Iterator[tuple[Step, Tensor]]:
    """Yield steps with random losses, often without some tasks, and the losses after each step."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-2, 2, tasks, dtype=torch.float64)
    for _ in range(steps):
        present = torch.rand(tasks, generator=generator) < 0.7
        present[torch.randint(tasks, (), generator=generator)] = True
        before, after = sizes * torch.rand(2, tasks, generator=generator, dtype=torch.float64)[:, None, :]
        yield shown(before[0][present], present.nonzero().flatten().tolist()), after[0][present]
