"""UPGrad: the mean of the gradients after each has been changed no more than it must be to conflict with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.dualproj import least_change
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms


class UPGrad(GradientWeighting):
    """The mean of all projections of a task's gradient onto the dual cone, {d: <g_t, d> >= 0 for each task t}.

    Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, arXiv 2406.16232, proposition 1: the
    weights are the mean over tasks i of the v that minimises v^T M v for v >= e_i, elementwise. Without a conflict they
    are 1/T; for two tasks this is half of PCGrad's step. T counts the tasks that have a gradient.

    Unlike `mtl.weighting.dualproj.DualProj`, which projects the mean once, it lets each task, however short its
    gradient, keep what no other objects to; lengths are not balanced. Opposite gradients of any lengths give a step of
    zero, by weights inversely proportional to the lengths. For duplicated or nearly opposite gradients see `lifted`:
    there the update may conflict with a task by 1e-7 of the lengths times the weights. (torchjd's ``reg_eps=1e-4`` is
    a similar lift, but relative to the longest gradient, and always there: where one is up to 30 times as long as the
    other, it moves the update by up to a third of its length.)
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        length = norms(step.gram).numpy()
        between = lifted(cosines(step.gram)).numpy()
        # Row i changes the unit vector along gradient i, and by the factor of that gradient's length the gradient.
        changes = np.stack([least_change(between, -row) for row in between])
        return torch.from_numpy((1 + length @ changes / length) / len(length))
