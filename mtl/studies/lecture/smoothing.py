"""Explicit regularization of the shallow network: the larger the penalty, the smoother the fit (figure 9.2)."""

from pathlib import Path

import numpy as np

from mtl.studies.lecture import shallow
from mtl.studies.lecture.curves import draw_fit, draw_points
from mtl.studies.lecture.plate import Plate

SHOWN = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Each λ whose fit is drawn."""

SEED = 1
"""Of the drawn data set."""


def errors(data: shallow.Data, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return training and test errors (λ's, data sets) of fits to data sets (..., N)."""
    fits = [shallow.fit(data, float(strength)) for strength in strengths]
    training = np.stack([shallow.training_error(parameters, data) for parameters in fits])
    return training, np.stack([shallow.test_error(shallow.predict(parameters)) for parameters in fits])


def draw(folder: Path, quick: bool) -> str:
    """Draw six fits, the errors against λ, and the size of the slopes' changes."""
    data = shallow.book_data(np.random.RandomState(SEED))
    plate = Plate(2, 4)
    for strength in SHOWN:
        parameters = shallow.fit(data, strength)
        error = float(shallow.test_error(shallow.predict(parameters)))
        panel = plate.panel(f"λ = {strength:g}: test error {error:.3f}", "x", "y")
        draw_points(panel, data)
        draw_fit(panel, "fit", parameters)
        panel.legend()

    strengths = np.geomspace(1e-5, 10, 13 if quick else 37)
    many = shallow.many_data(0, 100 if quick else 1000)
    training, test = errors(many, strengths)
    panel = plate.panel(f"mean of {len(many.x)} data sets", "λ", "mean squared error")
    panel.line("on the training points", strengths, training.mean(1), style="-", color="tab:orange")
    panel.line("to the true curve", strengths, test.mean(1), style="-", color="tab:blue")
    panel.line("to the true curve, the data set drawn", strengths, errors(data, strengths)[1], style="--", color="grey")
    panel.axes.set(xscale="log", ylim=(0, 0.45))
    panel.legend()
    sizes = np.array([np.square(shallow.fit(data, float(strength))[1:]).sum() for strength in strengths])
    panel = plate.panel("what the penalty counts", "λ", "Σ ω², the slopes' changes squared")
    panel.line("Σ ω²", strengths, sizes)
    panel.axes.set(xscale="log", yscale="log")
    best = int(test.mean(1).argmin())
    return plate.save(
        folder,
        "l2",
        f"A shallow network under rising L2: over {len(many.x)} data sets the mean test error falls from "
        f"{test.mean(1)[0]:.3f} (λ = {strengths[0]:g}) to {test.mean(1)[best]:.3f} (λ = {strengths[best]:.2g}) and "
        f"rises to {test.mean(1)[-1]:.3f} (λ = {strengths[-1]:g}), while the training error only rises.",
    )
