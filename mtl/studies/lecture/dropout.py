"""Dropout removes a kink away from the data, which gradient descent cannot see (figure 9.9)."""

from pathlib import Path

import numpy as np

from mtl.studies.lecture import shallow
from mtl.studies.lecture.curves import draw_fit, draw_points
from mtl.studies.lecture.plate import Plate

POINTS = 45
"""Points of the data set, before those in the gap are taken out: three times the usual."""

KINK = (7, 8, 9)
"""Hidden units whose knots end the gap or lie in it: up, down twice as much, and up again changes no output outside."""

TENT = np.zeros(1 + shallow.PIECES)
TENT[[1 + unit for unit in KINK]] = 1, -2, 1

HEIGHT = 14.0
"""Of the kink that training starts with, in slope: the curve is one higher in the middle of the gap."""

PENALTY = 1e-3
"""Of the fit to which the kink is added."""

RATE, STEPS = 0.2, 2000
"""Of full-batch gradient descent on the mean squared error."""


def gapped_data() -> shallow.Data:
    """Return points with none between the first and the last knot of the kink."""
    whole = shallow.many_data(1, 1, POINTS)
    first, *_, last = (unit / shallow.PIECES for unit in KINK)
    outside = (whole.x[0] <= first) | (whole.x[0] >= last)
    return shallow.Data(whole.x[0, outside], whole.y[0, outside])


def kink(parameters: np.ndarray) -> np.ndarray:
    """Return the height (...) of the kink in parameters (..., 15): their share of `TENT`."""
    return np.asarray(parameters @ TENT / np.square(TENT).sum())


def start(data: shallow.Data) -> np.ndarray:
    """Return a fit (15,) with a straight gap, to which the kink is added."""
    smooth = shallow.fit(data, PENALTY)
    return np.asarray(smooth + (HEIGHT - kink(smooth)) * TENT)


def train(data: shallow.Data, dropped: np.ndarray | None, steps: int = STEPS) -> np.ndarray:
    """Return the parameters (steps + 1, ..., 15) along gradient descent from `start`.

    Args:
        data: Training points.
        dropped: Which of the three units is left out (steps, ...), 0 to 2; None leaves out none.
        steps: How many.
    """
    inputs = shallow.features(data.x)
    shape = () if dropped is None else dropped.shape[1:]
    path = np.empty((steps + 1, *shape, inputs.shape[1]))
    path[0] = start(data)
    keep = np.ones((len(KINK), inputs.shape[1]))
    keep[range(len(KINK)), [1 + unit for unit in KINK]] = 0
    for step in range(steps):
        mask = 1.0 if dropped is None else keep[dropped[step]]
        residual = (path[step] * mask) @ inputs.T - data.y
        path[step + 1] = path[step] - 2 * RATE / len(data.x) * mask * (residual @ inputs)
    return path


def draw(folder: Path, quick: bool) -> str:
    """Draw the curve before, without a unit, and after training with and without dropout, and the kink's height."""
    data = gapped_data()
    plain = train(data, None)
    runs = 10 if quick else 100
    dropped = train(data, np.random.default_rng(0).integers(len(KINK), size=(STEPS, runs)))
    beginning = plain[0]
    without = beginning.copy()
    without[1 + KINK[1]] = 0
    plate = Plate(2, 3)
    for title, series, parameters in (
        ("a kink where no data are: loss {:.3f}", "start", beginning),
        (f"without hidden unit {KINK[1]}: loss {{:.1f}}", "one unit left out", without),
        (f"after {STEPS} steps, all units: loss {{:.3f}}", "gradient descent", plain[-1]),
        (f"after {STEPS} steps, one of three units out: loss {{:.3f}}", "with dropout", dropped[-1, 0]),
    ):
        loss = float(shallow.training_error(parameters, data))
        panel = plate.panel(title.format(loss), "x", "y")
        panel.axes.axvspan(KINK[0] / shallow.PIECES, KINK[-1] / shallow.PIECES, color="tab:grey", alpha=0.15)
        draw_points(panel, data)
        draw_fit(panel, series, parameters)
        panel.legend()
    steps = np.arange(0, STEPS + 1, 10)
    panel = plate.panel(f"the kink's height ({runs} runs with dropout)", "step", "change of slope")
    panel.line("gradient descent", steps, kink(plain)[steps], color="black")
    heights = kink(dropped)[steps]
    panel.line("dropout, mean", steps, heights.mean(1), color="tab:blue")
    panel.axes.fill_between(steps, heights.min(1), heights.max(1), alpha=0.25, color="tab:blue", label="least to most")
    panel.line("dropout, least", steps, heights.min(1), color="tab:blue", lw=0.5, shown=False)
    panel.line("dropout, most", steps, heights.max(1), color="tab:blue", lw=0.5, shown=False)
    panel.legend()
    panel = plate.panel("errors with all units in place", "step", "mean squared error")
    for name, path, color in (("gradient descent", plain[steps], "black"), ("dropout", dropped[steps], "tab:blue")):
        training, test = shallow.training_error(path, data), shallow.test_error(shallow.predict(path))
        of = ", mean" if path.ndim == 3 else ""
        training, test = (values.reshape(len(steps), -1).mean(1) for values in (training, test))
        panel.line(f"{name}{of}, training", steps, training, style="--", color=color)
        panel.line(f"{name}{of}, test", steps, test, style="-", color=color)
    panel.axes.set_yscale("log")
    panel.legend()
    last = dropped[-1]
    errors = [float(shallow.training_error(parameters, data).mean()) for parameters in (plain[-1], last)]
    test_errors = [float(shallow.test_error(shallow.predict(parameters)).mean()) for parameters in (plain[-1], last)]
    return plate.save(
        folder,
        "dropout",
        f"A kink away from the data: gradient descent leaves its change of slope of {HEIGHT:g} at "
        f"{kink(plain[-1]):.1f}, dropout brings "
        f"it to {np.abs(kink(last)).mean():.2f} (mean of {runs} runs). Test error {test_errors[0]:.3f} and "
        f"{test_errors[1]:.3f}; the training error is {errors[0]:.3f} and, with dropout, {errors[1]:.3f}.",
    )
