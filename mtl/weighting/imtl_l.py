"""IMTL-L: learned factors that bring all losses to one size."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import positive


class IMTLL(Weighting):
    """The sum of exp(s_t) L_t - s_t over tasks, minimised also over s.

    The loss balance of Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2. Where the s have
    settled, exp(s_t) L_t is 1 for each task and the weight is 1 / L_t. They learn by the run's own optimizer, without
    weight decay, from 0. It is twice the ``gaussian`` form of `mtl.weighting.uncertainty.Uncertainty` at -s, whatever
    the tasks' likelihoods.

    Args:
        tasks: Each task's likelihood by its name.

    Attributes:
        log_factors: Each task's s, a float64 scalar; of a task without labels it has no gradient.
    """

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__(tasks)
        self.log_factors = nn.ParameterList(nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in tasks)

    def forward(self, step: Step) -> Tensor:
        """Return exp(s) of the present tasks, (T,)."""
        return self._present(step).detach().exp()

    def objective(self, step: Step) -> Tensor:
        """Return the sum over the present tasks."""
        factors = self._present(step)
        return (factors.exp() * positive(self, step.losses, step.present) - factors).sum()

    def _present(self, step: Step) -> Tensor:
        return torch.stack([self.log_factors[place] for place in step.present.tolist()])
