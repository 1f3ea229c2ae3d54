"""A direction with the same angle to every task's gradient, as far as the gradients agree."""

import torch
from torch import Tensor

from mtl.weighting.base import Step
from mtl.weighting.gram import GradientWeighting, cosines, lifted, norms


class ConFIG(GradientWeighting):
    """Conflict-free inverse gradients: u with the same positive cosine to every gradient, sum_t <g_t, u> long.

    Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, equation 2:
    the direction is pinv(U) 1, where the rows of U are the gradients made one long. In terms of the cosines
    C = U U', C x = 1 and w_t = x_t / |g_t| sum_s |g_s| / sum_s x_s. For two tasks u is the bisector.

    Weights of three tasks or more may be negative. Gradients with an affine combination of their directions that is
    zero, such as opposite ones, have no such direction: they have the weights of gradients that nearly are so, which
    cancel them. (The pseudoinverse would follow the majority there.) Duplicated tasks share their weight.
    """

    def solve(self, step: Step) -> Tensor:
        """Return the weights (T,)."""
        length = norms(step.gram)
        multiples: Tensor = torch.linalg.solve(lifted(cosines(step.gram)), torch.ones_like(length))
        return multiples / length * length.sum() / multiples.sum()
