"""Uncertainty weighting: each task's noise is learned, and divides its loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl.errors import UserError, nearest
from mtl.weighting.base import Step, Weighting
from mtl.weighting.history import positive

FORMS = {"gaussian": (0.5, 0.5), "laplace": (1.0, 1.0), "categorical": (1.0, 0.5)}
"""By likelihood, a and b of a task's term a exp(-s) L + b s."""


class Uncertainty(Weighting):
    r"""The negative log-likelihood of all tasks under noise that is learned with the model.

    Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
    CVPR 2018, arXiv 1705.07115. Constants left out, a task's loss L becomes, by its likelihood:

    =============== ======================== ======================== =================== ================
    likelihood      L                        -log p                   s                   term
    =============== ======================== ======================== =================== ================
    ``gaussian``    mean of (y - f)^2        L / 2 sigma^2 + log sigma log sigma^2        e^-s L / 2 + s / 2
    ``laplace``     mean of abs(y - f)       L / b + log b            log b               e^-s L + s
    ``categorical`` mean cross-entropy       L / sigma^2 + log sigma  log sigma^2         e^-s L + s / 2
    =============== ======================== ======================== =================== ================

    The first and the last are the paper's equations 5 and 10; the last is softmax(f / sigma^2) with the paper's
    approximation sum_c exp(f_c / sigma^2) / sigma = (sum_c exp f_c)^(1 / sigma^2), exact at sigma = 1. Directions in
    space have the ``laplace`` form too: the density of von Mises and Fisher on the sphere, kappa / (4 pi sinh kappa)
    exp(kappa cos), has -log p = kappa (1 - cos) - log kappa + log(1 - e^(-2 kappa)) but for a constant, the last term
    vanishes as kappa grows, and s is -log kappa. Other libraries use the first form, or the second, for every task.

    The s learn by the run's own optimizer, without weight decay, from 0. Where they have settled the weight is
    1 / (2 L) (``laplace``: 1 / L), that of `mtl.weighting.log.LogSum` but for the factor.

    Args:
        tasks: Each task's likelihood by its name.

    Attributes:
        log_scales: Each task's s, a float64 scalar; of a task without labels it has no gradient.

    Raises:
        UserError: A likelihood is none of the three.
    """

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__(tasks)
        for task, likelihood in tasks.items():
            if likelihood not in FORMS:
                raise UserError(
                    f"the likelihood of {task!r} is {likelihood!r}{nearest(str(likelihood), FORMS)}, and --weighting"
                    f" uncertainty knows {', '.join(FORMS)}: let the task state one of them, or choose another rule"
                )
        self._forms = torch.tensor([FORMS[likelihood] for likelihood in self.likelihoods], dtype=torch.float64)
        self.log_scales = nn.ParameterList(nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in tasks)

    def forward(self, step: Step) -> Tensor:
        """Return a exp(-s) of the present tasks, (T,)."""
        return self._forms[step.present, 0] * self._present(step).detach().neg().exp()

    def objective(self, step: Step) -> Tensor:
        """Return the sum of the present tasks' terms."""
        loss_factor, scale_factor = self._forms[step.present].unbind(dim=1)
        scales = self._present(step)
        return (loss_factor * (-scales).exp() * positive(self, step.losses, step.present) + scale_factor * scales).sum()

    def _present(self, step: Step) -> Tensor:
        return torch.stack([self.log_scales[place] for place in step.present.tolist()])
