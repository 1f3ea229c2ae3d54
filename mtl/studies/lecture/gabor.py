"""The Gabor model of "Understanding Deep Learning" (Prince 2023), sections 6.1.2 and 9.1: two parameters, many minima.

f(x) = sin(u) exp(-u²/32) with u = φ₀ + 0.06 φ₁ x; its loss is the plain sum of squares over 30 points. Parameters are
arrays (..., 2) of float64, and whatever is asked of them is computed for all at once.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import minimum_filter
from scipy.optimize import minimize

X = np.array(
    [
        *(
            -1.92,
            -14.22,
            1.49,
            -1.94,
            -2.389,
            -5.09,
            -8.861,
            3.578,
            -6.01,
            -6.995,
            3.634,
            0.8743,
            -10.96,
            0.4073,
            -9.467,
        ),
        *(8.56, 10.62, -0.1729, 10.40, -12.61, 0.1574, -13.04, -2.156, -12.10, -11.19, 2.902, -8.22, -11.79, -8.391),
        -4.505,
    ]
)
"""Inputs of the book's data (30,)."""

Y = np.array(
    [
        *(-1.051, -0.02482, 0.8896, -0.4943, -0.9371, 0.4306, 0.009577, -0.07944, 0.1624, -0.2682, -0.3129, 0.8303),
        *(-0.02365, 0.5098, -0.2777, 0.3367, 0.1927, -0.2222, 0.06352, 0.006888, 0.03224, 0.01091, -0.5706, -0.05258),
        *(-0.03666, 0.1709, -0.04805, 0.2008, -0.1904, 0.5952),
    ]
)
"""Their targets (30,)."""

CENTRE = np.array([0.0, 12.5])
"""Which parameters the prior prefers."""

LOW, HIGH, STEP = np.array([-10.0, 2.5]), np.array([10.0, 22.5]), 0.1
"""The plotted part of the parameters' plane, and the grid on it."""


class Minima(NamedTuple):
    """Local minima inside the plotted part.

    Attributes:
        on_grid: Points (N, 2) of the grid that are lower than their eight neighbours.
        true: The minima (M, 2) that these lead to. A narrow valley that runs askew to the grid has several points of
            `on_grid` and a single minimum, or none inside the plotted part.
        optimum: The lowest (2,) of `true`.
    """

    on_grid: np.ndarray
    true: np.ndarray
    optimum: np.ndarray


def predict(phi: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    """Return the model's outputs (..., N) at inputs (N,)."""
    u = phi[..., 0, None] + 0.06 * phi[..., 1, None] * x
    return np.asarray(np.sin(u) * np.exp(-u * u / 32))


def loss(phi: np.ndarray) -> np.ndarray:
    """Return the sum of squares (...)."""
    return np.asarray(np.square(predict(phi) - Y).sum(-1))


def sample_gradients(phi: np.ndarray) -> np.ndarray:
    """Return the gradient (..., 30, 2) of each point's squared error."""
    u = phi[..., 0, None] + 0.06 * phi[..., 1, None] * X
    envelope = np.exp(-u * u / 32)
    outer = 2 * (np.sin(u) * envelope - Y) * envelope * (np.cos(u) - u * np.sin(u) / 16)
    return np.stack([outer, 0.06 * X * outer], -1)


def gradient(phi: np.ndarray) -> np.ndarray:
    """Return the gradient (..., 2) of `loss`."""
    return np.asarray(sample_gradients(phi).sum(-2))


def penalty(phi: np.ndarray) -> np.ndarray:
    """Return what λ multiplies, φ₀² + (φ₁ - 12.5)²: up to constants the negative logarithm of a Gaussian prior."""
    return np.asarray(np.square(phi - CENTRE).sum(-1))


def axes(step: float = STEP) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid's coordinates in φ₀ and in φ₁, the upper ends left out."""
    count = round(float(HIGH[0] - LOW[0]) / step)
    return LOW[0] + step * np.arange(count), LOW[1] + step * np.arange(count)


def grid(step: float = STEP) -> np.ndarray:
    """Return the grid's parameters (φ₁'s, φ₀'s, 2)."""
    return np.stack(np.meshgrid(*axes(step)), -1)


def find_minima(strength: float) -> Minima:
    """Return the local minima of the loss plus λ times the penalty.

    Args:
        strength: λ.
    """

    def total(phi: np.ndarray) -> float:
        return float(loss(phi) + strength * penalty(phi))

    def slope(phi: np.ndarray) -> np.ndarray:
        return np.asarray(gradient(phi) + 2 * strength * (phi - CENTRE))

    points = grid()
    values = loss(points) + strength * penalty(points)
    lowest = (minimum_filter(values, size=3) == values)[1:-1, 1:-1]
    on_grid = points[1:-1, 1:-1][lowest]
    found: list[np.ndarray] = []
    for start in on_grid:
        end = minimize(total, start, jac=slope, method="BFGS", tol=1e-9).x
        inside = ((end > LOW) & (end < HIGH)).all()
        if inside and all(np.linalg.norm(end - other) > 1e-3 for other in found):
            found.append(end)
    return Minima(on_grid, np.array(found), min(found, key=total))


def descend(start: np.ndarray, strength: float, rate: float, steps: int) -> np.ndarray:
    """Return the path (steps + 1, 2) of gradient descent on the loss plus λ times the penalty."""
    path = [np.asarray(start, dtype=np.float64)]
    for _ in range(steps):
        path.append(path[-1] - rate * (gradient(path[-1]) + 2 * strength * (path[-1] - CENTRE)))
    return np.stack(path)
