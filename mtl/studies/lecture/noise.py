"""Noise on the inputs of the shallow network: the more of it, the smoother the fit (figure 9.10).

The fit is that of infinitely many noisy copies but for the quantiles that stand for the normal distribution.
"""
# ruff: noqa: RUF001  # the letters of the book

from pathlib import Path

import numpy as np
from scipy.special import ndtri

from mtl.studies.lecture import shallow
from mtl.studies.lecture.curves import draw_fit, draw_points
from mtl.studies.lecture.plate import Plate

COPIES = 200
"""Quantiles of the normal distribution."""

SHOWN = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Deviations of the noise whose fit is drawn."""

SEED = 1
"""Of the drawn data set, and of the dots."""


def fit(data: shallow.Data, deviation: float) -> np.ndarray:
    """Return the parameters (..., 15) of least expected squared error under noise on the inputs (..., N)."""
    noise = deviation * ndtri((np.arange(COPIES) + 0.5) / COPIES)
    noisy = (data.x[..., None] + noise).reshape(*data.x.shape[:-1], -1)
    return shallow.fit(shallow.Data(noisy, np.repeat(data.y, COPIES, -1)), shallow.TINY * COPIES)


def draw(folder: Path, quick: bool) -> str:
    """Draw five fits with ten noisy copies of each point, and the errors against the noise."""
    data = shallow.book_data(np.random.RandomState(SEED))
    random = np.random.default_rng(SEED)
    plate = Plate(2, 3)
    for deviation in SHOWN:
        parameters = fit(data, deviation)
        error = float(shallow.test_error(shallow.predict(parameters)))
        panel = plate.panel(f"σ² = {deviation**2:g} (σ = {deviation:g}): test error {error:.3f}", "x", "y")
        if deviation:
            copies = data.x + deviation * random.standard_normal((10, shallow.POINTS))
            panel.line(
                "noisy copies", copies.ravel(), np.tile(data.y, 10), style=".", color="tab:orange", ms=2, alpha=0.6
            )
        draw_points(panel, data)
        draw_fit(panel, "fit", parameters)
        panel.legend()
    deviations = np.array(SHOWN if quick else (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2))
    many = shallow.many_data(0, 20 if quick else 200)
    test = np.stack([shallow.test_error(shallow.predict(fit(many, float(deviation)))) for deviation in deviations])
    panel = plate.panel(f"mean of {len(many.x)} data sets, standard errors", "deviation σ of the noise", "test error")
    panel.spread("to the true curve", deviations, test)
    panel.axes.set_ylim(0)
    mean = test.mean(1)
    best = int(mean.argmin())
    return plate.save(
        folder,
        "noise",
        f"Noise on the inputs smooths the fit: over {len(many.x)} data sets the mean test error is {mean[0]:.3f} "
        f"without, {mean[best]:.3f} at σ = {deviations[best]:g} (variance {deviations[best] ** 2:g}), and "
        f"{mean[-1]:.3f} at σ = {deviations[-1]:g}, where it smooths too much.",
    )
