"""What a weighting rule is: from a step's losses, and how their gradients meet, to the losses' weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """What a rule sees of a training step. Tasks without a label in the batch are left out of all three.

    On the host, in double precision, detached; the same on every rank of a distributed run.

    Attributes:
        losses: Finite losses (T,) of the tasks that have labels.
        present: Places (T,) of these tasks among all of the rule's, int64, ascending.
        gram: Inner products (T, T) of the tasks' gradients, positive semi-definite up to rounding; (0, 0) for a rule
            that does not need it.
    """

    losses: Tensor
    present: Tensor
    gram: Tensor


class HostModule(nn.Module):
    """A module of a handful of numbers, which stays on the host and in its own types wherever the model goes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self


class Weighting(HostModule, ABC):
    """A rule that combines the losses of several tasks: the backbone follows sum over t of weight_t * gradient_t.

    It is a module, so that what it learns or remembers (parameters, buffers) travels in checkpoints; a resumed run
    goes on exactly, so whatever a rule remembers must be in its ``state_dict``. It computes on the host in double
    precision, wherever the model is. It never asks what a task is.

    Args:
        tasks: Each task's likelihood by its name, in order: the distribution of which the task's loss is the negative
            logarithm but for scale and constants, see `mtl.tasks.base.Task.likelihood`. A rule's own options are
            further arguments with defaults, for ``--weighting-options``.

    Attributes:
        needs_gram: Whether `forward` is to be shown the Gram matrix of the tasks' gradients.
        needs_second_forward: Whether `look_again` is to be shown the same batch's losses after the optimizer step,
            which takes another forward pass.
        tasks: The tasks' names.
        likelihoods: Each task's likelihood.
        seed: Decides, with the number of questions so far, what `generator` draws.
        asked: How often the rule has been asked for weights, a buffer.
    """

    needs_gram: ClassVar[bool] = False
    needs_second_forward: ClassVar[bool] = False
    asked: Tensor

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.likelihoods = tuple(tasks.values())
        self.seed = 0
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,) of the present tasks' losses: finite floats, not all zero.

        Asked once for each optimizer step (with accumulation, of its first batch), so that it may move its state.
        Only rules from gradients may give negative weights, where their equation does.

        Args:
            step: What there is to see.
        """

    def unseen(self, weights: Tensor) -> Tensor:
        """Return weights (T,) of all tasks, which those have that have had no label so far: the mean of the others'.

        Args:
            weights: Those of the present tasks, as `forward` has just returned them.
        """
        return weights.abs().mean().repeat(len(self.tasks))

    def objective(self, step: Step) -> Tensor | None:
        """Return a scalar that the rule's own parameters are to minimise, or None if it has none.

        Its gradient is delivered to the run's optimizer along with the model's, for each batch.

        Args:
            step: What there is to see; with accumulation, of each batch.
        """
        return None

    def look_again(self, before: Step, losses: Tensor) -> None:
        """Take in what the optimizer step has done, where `needs_second_forward`.

        Args:
            before: What `forward` was shown.
            losses: The same tasks' losses (T,) on the same batch after the step, finite.
        """

    def end_epoch(self) -> None:
        """Take in that an epoch of training is over."""

    def generator(self) -> torch.Generator:
        """Return the generator of this question's draws: the same on all ranks, and after a resume."""
        state = np.random.SeedSequence([self.seed, int(self.asked)]).generate_state(2, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))
