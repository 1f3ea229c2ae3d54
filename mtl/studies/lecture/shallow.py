"""The shallow network of "Understanding Deep Learning" (Prince 2023), sections 8.2 and 9.3, and its toy data.

y = β + Σ ω_c ReLU(x - c/14): the knots are fixed, so that there are 14 linear pieces on [0, 1], 15 parameters, and a
least-squares fit in closed form. Arrays may have leading axes: many data sets are fitted at once.
"""

from typing import NamedTuple

import numpy as np

PIECES = 14
"""Linear pieces, and hidden units."""

POINTS, NOISE = 15, 0.3
"""Training points of a data set, and the deviation of the noise on their targets."""

GRID = np.linspace(0, 1, 100)
"""Where a fit is compared with the true curve."""

TINY = 1e-5
"""The penalty of a fit without regularization: it keeps the equations solvable."""


class Data(NamedTuple):
    """Training points.

    Attributes:
        x: Inputs (..., N).
        y: Targets (..., N).
    """

    x: np.ndarray
    y: np.ndarray


def truth(x: np.ndarray) -> np.ndarray:
    """Return the true curve; the 3.1413 is the book's."""
    return np.exp(np.sin(2 * 3.1413 * x))


def book_data(random: np.random.RandomState) -> Data:
    """Return the book's way of drawing points (15,): one x in each fifteenth of [0, 1], then the noise."""
    x = (np.arange(POINTS) + random.uniform(size=POINTS)) / POINTS
    return Data(x, truth(x) + random.normal(0, NOISE, POINTS))


def many_data(seed: int, count: int, points: int = POINTS) -> Data:
    """Return data sets (count, points) drawn like the book's."""
    random = np.random.default_rng(seed)
    x = (np.arange(points) + random.random((count, points))) / points
    return Data(x, truth(x) + NOISE * random.standard_normal((count, points)))


def features(x: np.ndarray) -> np.ndarray:
    """Return a one and the 14 hidden units' activations (..., N, 15) at inputs (..., N)."""
    hidden = np.maximum(0, x[..., None] - np.arange(PIECES) / PIECES)
    return np.concatenate([np.ones_like(x)[..., None], hidden], -1)


def fit(data: Data, penalty: float = TINY) -> np.ndarray:
    """Return the parameters (..., 15), β first, of the least sum of squares plus λ Σ ω².

    Args:
        data: Training points.
        penalty: λ; β is free.
    """
    inputs = features(data.x)
    transposed = inputs.swapaxes(-1, -2)
    ridge = penalty * np.diag([0.0, *[1.0] * PIECES])
    return np.asarray(np.linalg.solve(transposed @ inputs + ridge, transposed @ data.y[..., None])[..., 0])


def predict(parameters: np.ndarray, x: np.ndarray = GRID) -> np.ndarray:
    """Return outputs (..., N) of parameters (..., 15) at inputs (..., N), or at the same inputs (N,) for all."""
    return np.asarray((features(x) @ parameters[..., None])[..., 0])


def training_error(parameters: np.ndarray, data: Data) -> np.ndarray:
    """Return the mean squared error (...) on the training points."""
    return np.asarray(np.square(predict(parameters, data.x) - data.y).mean(-1))


def test_error(outputs: np.ndarray) -> np.ndarray:
    """Return the mean squared distance (...) of outputs (..., 100) on `GRID` from the true curve."""
    return np.asarray(np.square(outputs - truth(GRID)).mean(-1))
