"""Explicit regularization: a loss with many minima, a prior, and their sum (section 9.1)."""
# ruff: noqa: RUF001  # the letters of the book

from pathlib import Path

import numpy as np

from mtl.studies.lecture import gabor
from mtl.studies.lecture.plate import Panel, Plate

STRENGTHS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Each λ whose minima are counted."""

SHOWN = (0.2, 1.0)
"""Those whose surface is drawn."""

START, RATE, STEPS = np.array([2.6, 8.5]), 0.1, 41
"""Gradient descent of the book's notebook 9.1."""

_LEVELS = np.concatenate([np.arange(0, 12), np.arange(12, 41, 4)])


def draw(folder: Path, quick: bool) -> str:
    """Draw loss, prior and sums with their minima, descents, and how minima vanish and the optimum moves with λ."""
    strengths = (0.0, *SHOWN) if quick else STRENGTHS
    every = {strength: gabor.find_minima(strength) for strength in strengths}
    plate = Plate(2, 3)
    surface = gabor.grid(2 * gabor.STEP)
    across, up = gabor.axes(2 * gabor.STEP)
    loss, penalty = gabor.loss(surface), gabor.penalty(surface)

    def landscape(title: str, values: np.ndarray, levels: np.ndarray = _LEVELS) -> Panel:
        panel = plate.panel(title, "φ₀", "φ₁")
        panel.surface("surface", across, up, values, levels)
        return panel

    def mark(panel: Panel, strength: float, *, descent: bool) -> None:
        minima = every[strength].on_grid
        panel.line("local minima on the grid", *minima.T, style="o", color="tab:cyan", mec="black", ms=4)
        panel.line("optimum", *every[strength].optimum[:, None], style="*", color="red", mec="black", ms=11)
        if descent:
            path = gabor.descend(START, strength, RATE, STEPS)
            panel.line("gradient descent", *path.T, style=".-", color="tab:orange", ms=4, lw=1)
        if strength == SHOWN[0]:
            panel.legend(loc="lower left")

    mark(landscape(f"loss (λ = 0): {_count(every[0.0])}", loss), 0.0, descent=True)
    prior = landscape("penalty φ₀² + (φ₁ - 12.5)²", penalty, np.arange(0, 201, 20))
    prior.line("preferred parameters", *gabor.CENTRE[:, None], style="*", color="red", mec="black", ms=11)
    for strength in SHOWN:
        panel = landscape(f"loss + {strength:g} × penalty: {_count(every[strength])}", loss + strength * penalty)
        mark(panel, strength, descent=strength == SHOWN[0])

    counts = plate.panel("local minima: not always fewer for larger λ", "λ", "how many")
    counts.line(
        "lower than 8 neighbours on the 0.1 grid", strengths, [len(m.on_grid) for m in every.values()], style="o-"
    )
    counts.line("minima that these lead to", strengths, [len(m.true) for m in every.values()], style="s--")
    counts.axes.set_ylim(0)
    counts.legend()
    moved = plate.panel("where the optimum moves: λ beside it", "φ₀", "φ₁")
    best = np.array([minima.optimum for minima in every.values()])
    moved.line("optimum", *best.T, style="o-", color="red")
    for strength, point in zip(strengths, best, strict=True):
        if strength in (0.0, 0.01, 0.1, 0.2, 0.5, 1.0):
            moved.axes.annotate(f"{strength:g}", point, xytext=(6, 2), textcoords="offset points", fontsize=7)
    moved.axes.margins(0.15)
    return plate.save(
        folder,
        "prior",
        "A prior that prefers small parameters: local minima on the plotted grid "
        + ", ".join(f"{len(every[strength].on_grid)} at λ = {strength:g}" for strength in (0.0, *SHOWN))
        + f"; the optimum moves from ({_point(best[0])}) to ({_point(best[-1])}).",
    )


def _count(minima: gabor.Minima) -> str:
    number = len(minima.on_grid)
    return f"{number} local minim{'um' if number == 1 else 'a'}"


def _point(phi: np.ndarray) -> str:
    return ", ".join(f"{number:.2f}" for number in phi)
