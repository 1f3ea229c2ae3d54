"""FAMO: all losses fall at the same rate, with no gradient of a single task."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from mtl.errors import UserError
from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import positive


class FAMO(Weighting):
    """Fast adaptive multitask optimization: tasks whose loss fell least in the last step gain weight.

    Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 1. With logits xi
    and z = softmax(xi) the model follows c sum_t z_t log L_t, where c = 1 / sum_t (z_t / L_t) makes the weights
    c z_t / L_t sum to 1. After the optimizer step the same batch's losses L' show by how much each logarithm fell,
    delta_t = log L_t - log L'_t, and one step of Adam takes xi down the gradient sum_t delta_t dz_t/dxi + decay xi.

    The least possible losses, which the paper subtracts, are 0 here. Where the official code adds 1e-8 to a loss,
    losses below `mtl.weighting.history.FLOOR`, the same number, count as that much. The softmax is over the present
    tasks; each logit has its own averages and its own count of steps, and those of a missing task rest.

    Args:
        tasks: Each task's likelihood by its name.
        lr: Adam's learning rate for the logits.
        decay: Weight decay of the logits, the paper's gamma.

    Attributes:
        logits: xi, (tasks,).
        means: Adam's average of each logit's gradient, (tasks,).
        squares: Adam's average of its square, (tasks,).
        steps: Adam's steps of each logit, (tasks,).

    Raises:
        UserError: An option is out of its range.
    """

    needs_second_forward: ClassVar[bool] = True
    logits: Tensor
    means: Tensor
    squares: Tensor
    steps: Tensor

    def __init__(self, tasks: Mapping[str, str], lr: float = 0.025, decay: float = 1e-3) -> None:
        super().__init__(tasks)
        if not 0 < lr <= 1:
            raise UserError(
                f"--weighting-options lr={lr}: the learning rate of famo's logits is positive, and 1 at most;"
                " the paper's is 0.025"
            )
        if not 0 <= decay <= 1:
            raise UserError(
                f"--weighting-options decay={decay}: the decay of famo's logits is from 0 to 1; the paper's is 0.001"
            )
        self.lr, self.decay = lr, decay
        for name in ("logits", "means", "squares", "steps"):
            self.register_buffer(name, torch.zeros(len(tasks), dtype=torch.float64))

    def forward(self, step: Step) -> Tensor:
        """Return c z / L, (T,), which sums to 1."""
        shares = self.logits[step.present].softmax(dim=0) / positive(self, step.losses, step.present)
        return shares / shares.sum()

    @torch.no_grad()
    def look_again(self, before: Step, losses: Tensor) -> None:
        """Take one step of Adam with the logits of the present tasks.

        Nothing is learned from a task alone, which has none to be compared with.

        Args:
            before: What `forward` was shown.
            losses: The same tasks' losses (T,) on the same batch after the optimizer's step, finite.
        """
        present = before.present
        if len(present) == 1:
            return
        falls = positive(self, before.losses, present).log() - positive(self, losses, present).log()
        shares = self.logits[present].softmax(dim=0)
        gradient = shares * (falls - (shares * falls).sum())
        # Views: what Adam does to them in place, it does to the buffers.
        logits, means, squares, steps = (
            [values[place] for place in present.tolist()]
            for values in (self.logits, self.means, self.squares, self.steps)
        )
        adam(
            logits,
            list(gradient),
            means,
            squares,
            [],
            steps,
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.decay,
            eps=1e-8,
            maximize=False,
        )
