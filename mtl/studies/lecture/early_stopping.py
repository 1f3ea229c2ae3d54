"""Early stopping of the shallow network of 14 pieces, trained by SGD (figure 9.6)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl.studies.lecture import shallow
from mtl.studies.lecture.curves import draw_fit, draw_points
from mtl.studies.lecture.plate import Plate

RATE, BATCH = 0.05, 5
"""The book's step and batch size; losses are means."""

STEPS, QUICK_STEPS = 100_000, 10_000
"""Of a training."""

SHOWN = (0, 100, 1_000, 10_000)
"""Steps whose fit is drawn, besides the best by the validation points and the last."""


class History(NamedTuple):
    """What K data sets' trainings were at M moments.

    Attributes:
        steps: Steps done (M,).
        parameters: (M, K, 15).
        training: Training errors (M, K).
        validation: Errors (M, K) on as many noisy points that are not trained on.
        test: Distances (M, K) from the true curve.
    """

    steps: np.ndarray
    parameters: np.ndarray
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def stop(self) -> np.ndarray:
        """Return the moment (K,) of the least validation error, where early stopping with patience enough goes back."""
        return np.asarray(self.validation.argmin(0))


def moments(steps: int) -> np.ndarray:
    """Return when to look, ten times in each decade, including the start, `SHOWN` and the end."""
    return np.unique([0, *np.geomspace(1, steps, 10 * round(np.log10(steps)) + 1).round().astype(int)])


def train(data: shallow.Data, validation: shallow.Data, steps: int) -> History:
    """Return the trainings of data sets (K, 15) from random parameters.

    In each epoch the points come in a new order, the same one in all data sets.

    Args:
        data: Training points.
        validation: Validation points (K, 15).
        steps: How long to train.
    """
    random = np.random.default_rng(0)
    inputs = shallow.features(data.x)
    phi = random.standard_normal((len(data.x), inputs.shape[-1]))
    look, seen = moments(steps), [phi.copy()]
    for step in range(steps):
        first = BATCH * step % shallow.POINTS
        if first == 0:
            order = random.permutation(shallow.POINTS)
        chosen = order[first : first + BATCH]
        part = inputs[:, chosen]
        residual = (part @ phi[..., None])[..., 0] - data.y[:, chosen]
        phi -= 2 * RATE / BATCH * (residual[:, None] @ part)[:, 0]
        if step + 1 == look[len(seen)]:
            seen.append(phi.copy())
    parameters = np.stack(seen)
    return History(
        look,
        parameters,
        shallow.training_error(parameters, data),
        shallow.training_error(parameters, validation),
        shallow.test_error(shallow.predict(parameters)),
    )


def draw(folder: Path, quick: bool) -> str:
    """Draw fits along a training, its errors, and what stopping gains over many data sets."""
    steps, count = (QUICK_STEPS, 20) if quick else (STEPS, 100)
    drawn = shallow.book_data(np.random.RandomState(1))
    data, held_out = shallow.many_data(0, count), shallow.many_data(1, count)
    # The drawn data set is the first.
    data.x[0], data.y[0] = drawn
    history = train(data, held_out, steps)
    stop = history.stop
    plate = Plate(2, 4)
    shown = [(int(moment), "") for moment in np.searchsorted(history.steps, SHOWN)]
    for moment, extra in [*shown, (int(stop[0]), " (stopped)"), (len(history.steps) - 1, " (the end)")]:
        error = history.test[moment, 0]
        panel = plate.panel(f"step {history.steps[moment]:,}{extra}: test error {error:.3f}", "x", "y")
        draw_points(panel, drawn)
        draw_fit(panel, "fit", history.parameters[moment, 0])
        panel.legend()
    panel = plate.panel(f"mean of {count} data sets", "step", "mean squared error")
    for name, values in (("training", history.training), ("validation", history.validation), ("test", history.test)):
        panel.line(name, history.steps[1:], values[1:].mean(1))
    unending = float(shallow.test_error(shallow.predict(shallow.fit(data))).mean())
    panel.line("test, best fit to the training points", history.steps[[1, -1]], [unending, unending], style="k:", lw=1)
    panel.axes.set(xscale="log", yscale="log")
    panel.legend()
    at_stop, at_end = history.test[stop, np.arange(count)], history.test[-1]
    panel = plate.panel(
        "each data set: below the line stopping helped", "test error at the end", "test error where it stopped"
    )
    panel.line("data sets", at_end, at_stop, style="o", ms=3)
    limits = [0.8 * min(at_stop.min(), at_end.min()), 1.2 * max(at_stop.max(), at_end.max())]
    panel.axes.plot(limits, limits, color="grey", linewidth=0.8)
    panel.axes.set(xscale="log", yscale="log")
    helped, hurt = float((at_stop < at_end).mean()), float((at_stop > at_end).mean())
    return plate.save(
        folder,
        "early-stopping",
        f"Early stopping by {shallow.POINTS} validation points, {count} data sets, {steps:,} steps: test error "
        f"{at_stop.mean():.4f} where it stopped, {at_end.mean():.4f} at the end, {unending:.3f} at the best fit to the "
        f"training points. A matter of luck: better than the end in {helped:.0%} of them, worse in {hurt:.0%}.",
    )
