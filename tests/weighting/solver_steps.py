"""Random gradients for the rules that solve for their weights, and what their updates are."""

import torch
from degenerate import Case, named
from hypothesis import strategies as st
from torch import Tensor

from mtl.weighting.base import Weighting


@st.composite
def gradients(draw: st.DrawFn, least: int = 1, most: int = 6, decades: float = 2) -> Tensor:
    """Draw (T, P), often conflicting; P is more than T, and lengths are within 10^±``decades``."""
    tasks = draw(st.integers(least, most))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(tasks, tasks + 1 + draw(st.integers(0, 6)), generator=source, dtype=torch.float64)
    # Some that nearly agree and some that nearly oppose each other.
    common = draw(st.sampled_from([0.0, 0.0, 1.0, 3.0]))
    values = values + common * (2 * torch.randint(2, (tasks, 1), generator=source) - 1)
    lengths = 10 ** (decades * (2 * torch.rand(tasks, 1, generator=source, dtype=torch.float64) - 1))
    return values * lengths


def weights_of(rule: type[Weighting], rows: Tensor, **options: float) -> Tensor:
    """Return the weights (T,) of a fresh rule for gradients (T, P)."""
    return rule(named(len(rows)), **options)(Case("", rows).step)


def unit(rows: Tensor) -> Tensor:
    """Return the gradients' directions, zero for a zero gradient."""
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-300)
