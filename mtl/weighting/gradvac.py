"""Each gradient turned towards the others, as far as has been usual."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import PRECISION, GradientWeighting, cosines, norms, option


class GradVac(GradientWeighting):
    """Gradient vaccine: PCGrad, whose goal for the cosine between two tasks is not 0 but its running average.

    Wang et al., "Gradient Vaccine", ICLR 2021, algorithm 1 and equation 2: for each task i, and the other tasks j in
    random order, with c the cosine between g_i and g_j and a its goal, where c < a,

        g_i <- g_i + g_j |g_i| (a sqrt(1 - c^2) - c sqrt(1 - a^2)) / (|g_j| sqrt(1 - a^2)),

    whose cosine with g_j is a; then a <- (1 - beta) a + beta c. The g_j are as they were. Goals begin at 0, so the
    first step is PCGrad's. Those of pairs with a task that is left out stay as they are.

    Weights are 1 or more. Where a goal is nearly 1, what is added is nearly without bound: it is kept below about
    |g_i| / |g_j| times 2000. Opposite gradients cancel at first, and as the goal nears -1 no longer touch each other.

    Args:
        tasks: Each task's likelihood by its name.
        beta: Share of the newest cosine in the average, 0 to 1. With 0 the goal stays 0, which is PCGrad.

    Attributes:
        goals: (T, T) of all tasks: the goal of the cosine between gradient i (row) as it is turned and j.

    Raises:
        UserError: ``beta`` is not of 0 to 1.
    """

    goals: Tensor

    def __init__(self, tasks: Mapping[str, str], beta: float = 0.5) -> None:
        super().__init__(tasks)
        self.beta = option("beta", beta, 0, 1)
        self.register_buffer("goals", torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64))

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,), and move the goals."""
        between, length = cosines(step.gram).numpy(), norms(step.gram).numpy()
        goals, present, generator = self.goals.numpy(), step.present.tolist(), self.generator()
        multiples = np.diag(length).copy()  # row i: of which multiples of the unit gradients the i-th is made
        for row, own in enumerate(multiples):
            for other in torch.randperm(len(length), generator=generator).tolist():
                size = max(own @ between @ own, 0) ** 0.5
                if other == row or size <= PRECISION * length[row]:
                    continue  # nothing is left of it that could be turned
                pair = present[row], present[other]
                cosine = np.clip(own @ between[other] / size, -1, 1)
                goal = np.clip(goals[pair], PRECISION - 1, 1 - PRECISION)
                if cosine < goal:
                    own[other] += size * (goal * ((1 - cosine**2) / (1 - goal**2)) ** 0.5 - cosine)
                goals[pair] = (1 - self.beta) * goals[pair] + self.beta * cosine
        return torch.from_numpy(multiples.sum(0) / length)
