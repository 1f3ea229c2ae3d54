"""Gradients turned and stretched until they are orthogonal and of one length."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from mtl.errors import UserError, nearest
from mtl.weighting.base import Step
from mtl.weighting.gram import PRECISION, GradientWeighting, cosines

Mode = Literal["min", "median", "rmse"]

_SCALES: dict[Mode, Callable[[Tensor], Tensor]] = {"min": torch.min, "median": torch.median, "rmse": torch.mean}
"""The common squared length of the aligned gradients, from the eigenvalues of M."""


class AlignedMTL(GradientWeighting):
    """Independent component alignment: the mean of the nearest orthogonal gradients of one length.

    Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, algorithm 1: with the
    eigendecomposition M = V S^2 V' and a length s, w = s V S^-1 V' 1/T, over the eigenvalues that are not zero.

    Which are zero is decided on the cosines, whose eigenvalues do not depend on the gradients' lengths: there are as
    many as of theirs are below `PRECISION` times T. So a short gradient counts, and the rounding of duplicated tasks
    does not, whose s would stop the training.

    Weights may be negative, and their sum is positive. Opposite gradients are one direction, that of the longer;
    where they are of one length, or what is not zero is otherwise orthogonal to 1, all weights are 1/T.

    Args:
        tasks: Each task's likelihood by its name.
        mode: s: ``min`` is the least singular value, as in the paper, ``median`` their median, ``rmse`` their root
            mean square.

    Raises:
        UserError: No such mode.
    """

    def __init__(self, tasks: Mapping[str, str], mode: Mode = "min") -> None:
        super().__init__(tasks)
        if mode not in _SCALES:
            raise UserError(
                f"--weighting-options mode={mode}: must be one of {', '.join(get_args(Mode))}"
                f"{nearest(str(mode), get_args(Mode))}"
            )
        self.mode: Mode = mode

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        count = len(step.gram)
        equal = torch.full_like(step.losses, 1 / count)
        rank = int((torch.linalg.eigvalsh(cosines(step.gram)) > PRECISION * count).sum())
        values, vectors = torch.linalg.eigh(step.gram / step.gram.diagonal().max())
        # What rounding leaves of the least eigenvalue, where lengths differ by more than 1e7, may be negative.
        values, vectors = values[-rank:].clamp_min(torch.finfo(values.dtype).tiny), vectors[:, -rank:]
        weights: Tensor = vectors @ ((_SCALES[self.mode](values) / values).sqrt() * (vectors.T @ equal))
        return weights if weights.sum() > 1e-12 else equal
