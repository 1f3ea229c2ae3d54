"""Implicit regularization by SGD: it also avoids places where the batches disagree (section 9.2.2).

Averaged over the orders of the B batches, an epoch of SGD follows, to second order in the step α, the flow on
L + α/4 ‖∂L/∂φ‖² + α/(4B) Σ ‖∂L_b/∂φ - ∂L/∂φ‖² (Smith et al. 2021; equation 9.9), where losses are means.
"""
# ruff: noqa: RUF001  # the letters of the book

from itertools import permutations
from pathlib import Path

import numpy as np

from mtl.studies.lecture import gabor
from mtl.studies.lecture.flow import Loss, follow
from mtl.studies.lecture.plate import Plate

BATCHES, SIZE = 6, 5
"""The 30 points in the order of the table, five a batch."""

START = np.array([3.5, 6.5])
"""Where the book's SGD starts."""

RATE = 4.0
"""The step of the surfaces: that of the book's SGD, 0.8 on sums over batches of five, for means."""


def loss(phi: np.ndarray) -> np.ndarray:
    """Return the mean of squares (...)."""
    return gabor.loss(phi) / len(gabor.X)


def batch_gradients(phi: np.ndarray) -> np.ndarray:
    """Return the gradients (..., 6, 2) of the batches' mean losses."""
    each = gabor.sample_gradients(phi)
    return np.asarray(each.reshape(*each.shape[:-2], BATCHES, SIZE, 2).mean(-2))


def terms(phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return gradient descent's term and SGD's, (...) each, for a step of one."""
    batches = batch_gradients(phi)
    mean = batches.mean(-2)
    spread = np.square(batches - mean[..., None, :]).sum(-1).mean(-1)
    return np.asarray(np.square(mean).sum(-1) / 4), np.asarray(spread / 4)


def mean_epoch(rate: float) -> np.ndarray:
    """Return where one epoch of SGD from `START` leads (2,), in the mean over all 720 orders of the batches."""
    orders = np.array(list(permutations(range(BATCHES))))
    phi = np.tile(START, (len(orders), 1))
    for batch in orders.T:
        phi = phi - rate * batch_gradients(phi)[np.arange(len(orders)), batch]
    return np.asarray(phi.mean(0))


def modified(rate: float, *, gradient_term: bool, variance_term: bool) -> Loss:
    """Return the mean loss with some of the terms of a step α."""

    def total(phi: np.ndarray) -> np.ndarray:
        of_descent, of_batches = terms(phi)
        return np.asarray(loss(phi) + rate * (gradient_term * of_descent + variance_term * of_batches))

    return total


def gap(rate: float, *, gradient_term: bool, variance_term: bool) -> float:
    """Return how far the mean epoch ends from the flow on the loss with some of the terms, after the same time."""
    total = modified(rate, gradient_term=gradient_term, variance_term=variance_term)
    return float(np.linalg.norm(follow(total, START, rate * BATCHES) - mean_epoch(rate)))


def draw(folder: Path, quick: bool) -> str:
    """Draw loss, both terms and their sum, and which flow SGD follows for several steps."""
    plate = Plate(2, 3)
    points = gabor.grid(2 * gabor.STEP)
    across, up = gabor.axes(2 * gabor.STEP)
    original = loss(points)
    of_descent, of_batches = (RATE * term for term in terms(points))
    of_loss = np.linspace(0, 0.8, 17)
    for title, values, levels in (
        ("mean loss L", original, of_loss),
        (f"descent's term, α/4 ‖∂L/∂φ‖², α = {RATE:g}", of_descent, np.linspace(0, 0.2, 11)),
        ("SGD's term, α/4B Σ ‖∂L_b/∂φ - ∂L/∂φ‖²", of_batches, np.linspace(0, 0.7, 15)),
        ("sum of the three", original + of_descent + of_batches, of_loss),
    ):
        panel = plate.panel(title, "φ₀", "φ₁")
        panel.surface("surface", across, up, values, levels)
        lowest = points[np.unravel_index(values.argmin(), values.shape)]
        if values is not of_descent and values is not of_batches:
            panel.line("lowest", *lowest[:, None], style="*", color="red", mec="black", ms=11)
            panel.legend(loc="lower right")

    rates = np.array([0.1, 0.2] if quick else [0.025, 0.05, 0.1, 0.2, 0.4])
    panel = plate.panel("mean end of SGD's epoch over all 720 orders", "step α", "distance to the flow's end")
    gaps: dict[str, np.ndarray] = {}
    for series, with_gradient, with_variance, style in (
        ("flow on L", False, False, "o-"),
        ("with descent's term", True, False, "^-"),
        ("with descent's and SGD's", True, True, "s-"),
    ):
        gaps[series] = np.array([gap(rate, gradient_term=with_gradient, variance_term=with_variance) for rate in rates])
        panel.line(series, rates, gaps[series], style=style)
    plain, _, both = gaps.values()
    panel.line("∝ α²", rates, plain[0] * (rates / rates[0]) ** 2, style=":", color="grey")
    panel.line("∝ α³", rates, both[0] * (rates / rates[0]) ** 3, style="--", color="grey")
    panel.axes.set_yscale("log")
    panel.log_ticks(rates)
    panel.legend()
    along = plate.panel("along φ₁ at the optimum's φ₀", "φ₁", "")
    heights = np.linspace(gabor.LOW[1], gabor.HIGH[1], 201)
    line = np.stack([np.zeros_like(heights), heights], -1)
    parts = terms(line)
    along.line("L", heights, loss(line))
    along.line("descent's term", heights, RATE * parts[0], style="--")
    along.line("SGD's term", heights, RATE * parts[1], style="-.")
    along.legend()
    where = list(rates).index(0.1)
    return plate.save(
        folder,
        "batch-variance",
        f"SGD follows a loss that is raised where batches disagree: an epoch with steps of {rates[where]:g} ends, in "
        f"the mean over the orders, {plain[where]:.1e} from flow on the loss, and {both[where]:.1e} from flow on the "
        "loss with both terms.",
    )
