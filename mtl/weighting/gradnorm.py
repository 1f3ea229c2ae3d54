"""Weights that learn to give tasks gradients of like lengths, longer where a task has learned less."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, norms, option, without_zeros


class GradNorm(GradientWeighting):
    """Gradient normalization: weights that minimise sum_t abs(w_t |g_t| - mean_s(w_s |g_s|) r_t^alpha).

    Chen et al., ICML 2018, equations 1 and 2, where the mean and r_t count as constants and r_t is the task's loss
    relative to its first, L_t / L_t(0), over the mean of these ratios. The weights are positive and sum to T: they
    are T softmax(v) over the present tasks, and v is learned by the run's optimizer, where the paper has a step on w
    and a division afterwards. The sum is divided by the mean of the |g_t|, so that the losses' units do not matter.

    A loss that is not positive counts as one that has been learned, r_t = 0.

    Args:
        tasks: Each task's likelihood by its name.
        alpha: How hard tasks that learn slowly are pulled, 0 to 10. 0 makes the gradients equally long.

    Attributes:
        logits: v of each task, a float64 scalar; of a task without labels it has no gradient.
        first: L_t(0) (T,) of all tasks; 0 until the task has had a label, and a positive loss.

    Raises:
        UserError: ``alpha`` is out of this range.
    """

    first: Tensor

    def __init__(self, tasks: Mapping[str, str], alpha: float = 1.5) -> None:
        super().__init__(tasks)
        self.alpha = option("alpha", alpha, 0, 10)
        self.logits = nn.ParameterList(nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in tasks)
        self.register_buffer("first", torch.zeros(len(self.tasks), dtype=torch.float64))

    def forward(self, step: Step) -> Tensor:
        """Return the weights (T,) of the present tasks, which sum to T, and remember their first losses."""
        self.first[step.present] = self._first(step)
        return super().forward(step)

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,), which sum to T."""
        return self._weights(step).detach()

    def objective(self, step: Step) -> Tensor | None:
        """Return equation 2, to be minimised by `logits`; None where every gradient is zero."""
        step = without_zeros(step)
        if not len(step.losses):
            return None
        length = norms(step.gram)
        lengths = self._weights(step) * (length / length.mean())
        first = self._first(step)
        left = torch.where(first > 0, step.losses / first, 1).clamp_min(0)
        rate = left / left.mean().clamp_min(torch.finfo(left.dtype).tiny)
        return (lengths - (lengths.mean() * rate**self.alpha).detach()).abs().sum()

    def _weights(self, step: Step) -> Tensor:
        return len(step.losses) * torch.stack([self.logits[place] for place in step.present.tolist()]).softmax(0)

    def _first(self, step: Step) -> Tensor:
        first = self.first[step.present]
        return torch.where(first > 0, first, step.losses.clamp_min(0))
