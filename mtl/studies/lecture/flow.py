"""Implicit regularization by gradient descent: finite steps follow another loss than flow does (section 9.2.1).

A step α follows, to second order in α, the flow on L + α/4 ‖∂L/∂φ‖² (Barrett & Dherin 2021; equation 9.8).
"""
# ruff: noqa: RUF001  # the letters of the book

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from mtl.studies.lecture.plate import Plate

Loss = Callable[[np.ndarray], np.ndarray]
"""From parameters (..., 2) to losses (...)."""

START, RATE, STEPS = np.array([-0.7, -0.75]), 0.05, 100
"""Of the descent with finite steps."""

FINE, FINE_STEPS = 0.001, 10_000
"""Steps so small that they count as flow, and how many the book takes: twice as far as the finite ones go."""

_OFFSETS = 1e-5 * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


class Paths(NamedTuple):
    """Where descent goes from one start, each (steps + 1, 2).

    Attributes:
        finite: In finite steps on the loss.
        flow: By flow on the loss.
        modified: By flow on the loss with the implicit term.
    """

    finite: np.ndarray
    flow: np.ndarray
    modified: np.ndarray

    @property
    def gaps(self) -> tuple[float, float]:
        """Return the distances from the end of `finite` to that of `flow`, and to that of `modified`."""
        end = self.finite[-1]
        return float(np.linalg.norm(self.flow[-1] - end)), float(np.linalg.norm(self.modified[-1] - end))


def valley(phi: np.ndarray) -> np.ndarray:
    """Return the loss (...) of the book's notebook 9.2, a valley that widens towards φ₀ = 0."""
    width = np.exp(-2 * phi[..., 0] ** 2)
    return np.asarray(1 - np.exp(-(phi[..., 1] ** 2) / (2 * width**2)))


def numerical_gradient(loss: Loss, phi: np.ndarray) -> np.ndarray:
    """Return the gradient (..., 2) by central differences."""
    values = loss(phi[..., None, :] + _OFFSETS)
    differences = np.stack([values[..., 0] - values[..., 1], values[..., 2] - values[..., 3]], -1)
    return np.asarray(differences / (2 * _OFFSETS[0, 0]))


def modified(loss: Loss, rate: float) -> Loss:
    """Return the loss with the implicit term of a step α."""
    return lambda phi: loss(phi) + rate / 4 * np.square(numerical_gradient(loss, phi)).sum(-1)


def descend(loss: Loss, start: np.ndarray, rate: float, steps: int) -> np.ndarray:
    """Return the path (steps + 1, 2) of gradient descent."""
    path = np.empty((steps + 1, 2))
    path[0] = start
    for step in range(steps):
        path[step + 1] = path[step] - rate * numerical_gradient(loss, path[step])
    return path


def follow(loss: Loss, start: np.ndarray, time: float) -> np.ndarray:
    """Return where flow on a loss leads (2,) in some time, to about nine digits."""
    solution = solve_ivp(lambda _, phi: -numerical_gradient(loss, phi), (0, time), start, rtol=1e-9, atol=1e-11)
    return np.asarray(solution.y[:, -1])


def gaps(rate: float, time: float) -> tuple[float, float]:
    """Return how far finite steps end from flow on the loss, and from flow on the modified one, after the same time."""
    end = descend(valley, START, rate, round(time / rate))[-1]
    first, second = (np.linalg.norm(follow(loss, START, time) - end) for loss in (valley, modified(valley, rate)))
    return float(first), float(second)


def compare(rate: float, steps: int, fine: float, fine_steps: int) -> Paths:
    """Return the paths from `START`.

    Args:
        rate: The finite step α.
        steps: How many of them.
        fine: The step that stands for flow.
        fine_steps: How many of those.
    """
    return Paths(
        descend(valley, START, rate, steps),
        descend(valley, START, fine, fine_steps),
        descend(modified(valley, rate), START, fine, fine_steps),
    )


def draw(folder: Path, quick: bool) -> str:
    """Draw the paths, their ends, and how far they are apart for several steps."""
    paths = compare(RATE, STEPS, FINE, FINE_STEPS)
    before, after = paths.gaps
    plate = Plate(1, 3)
    across, up = np.linspace(-0.8, 0.1, 91), np.linspace(-0.8, 0.1, 91)
    surface = np.stack(np.meshgrid(across, up), -1)
    for title, closer in (("paths", False), ("their ends", True)):
        panel = plate.panel(f"{title}, α = {RATE:g}", "φ₀", "φ₁")
        panel.surface("loss", across, up, valley(surface), np.linspace(0, 1, 11))
        panel.line("flow on the loss", *paths.flow[::20].T, style="-", color="white", lw=2)
        panel.line("flow on the loss + α/4 ‖∂L/∂φ‖²", *paths.modified[::20].T, style="-", color="tab:red", lw=2)
        panel.line("descent in finite steps", *paths.finite.T, style=".-", color="black", ms=3, lw=0.7)
        panel.line("start", *START[:, None], style="o", color="tab:orange", mec="black", shown=False)
        if closer:
            panel.axes.set(xlim=(-0.26, -0.18), ylim=(-0.05, 0.01))
        else:
            panel.legend(loc="lower right", facecolor="lightgrey")

    rates = np.array([0.1, 0.05] if quick else [0.1, 0.05, 0.025, 0.0125, 0.00625])
    time = RATE * STEPS
    first, second = np.array([gaps(rate, time) for rate in rates]).T
    panel = plate.panel(f"distance of the ends after time {time:g}", "step α", "distance")
    panel.line("to flow on the loss", rates, first, style="o-")
    panel.line("to flow on the modified loss", rates, second, style="s-", color="tab:red")
    panel.line("∝ α", rates, first[0] * rates / rates[0], style=":", color="grey")
    panel.line("∝ α²", rates, second[0] * (rates / rates[0]) ** 2, style="--", color="grey")
    panel.axes.set_yscale("log")
    panel.log_ticks(rates)
    panel.legend()
    return plate.save(
        folder,
        "flow",
        f"Gradient descent with steps of {RATE:g} ends {before:.4f} from where flow ends, and {after:.4f} from where "
        "flow on the loss with the extra term ends (the book's setting, flow running on to twice the time); at equal "
        f"times {first[1]:.4f} and {second[1]:.4f}.",
    )
