"""Ensembling: bagged shallow networks against a single one, by mean and by median (section 9.3.2)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl.studies.lecture import shallow
from mtl.studies.lecture.curves import FINE, draw_fit, draw_points
from mtl.studies.lecture.plate import Plate

MEMBERS, SEED = 4, 1
"""Networks in an ensemble, and the seed of the drawn data set and its bootstraps, both the book's."""


class Errors(NamedTuple):
    """Test errors.

    Attributes:
        single: Of one network fitted to all points (...).
        members: Of the members (..., 4).
        mean: Of the mean of their outputs (...).
        median: Of the median of their outputs (...).
    """

    single: np.ndarray
    members: np.ndarray
    mean: np.ndarray
    median: np.ndarray


def resample(data: shallow.Data, chosen: np.ndarray) -> np.ndarray:
    """Return the members' parameters (..., M, 15), each fitted to points chosen with replacement.

    Args:
        data: One data set (15,), or as many (R, 15) as there are repetitions.
        chosen: Indices (..., M, 15).
    """
    pick = [np.take_along_axis(np.broadcast_to(v[..., None, :], chosen.shape), chosen, -1) for v in data]
    return shallow.fit(shallow.Data(*pick))


def evaluate(data: shallow.Data, members: np.ndarray) -> Errors:
    """Return the test errors of networks with parameters (..., M, 15)."""
    outputs = shallow.predict(members)
    return Errors(
        shallow.test_error(shallow.predict(shallow.fit(data))),
        shallow.test_error(outputs),
        shallow.test_error(outputs.mean(-2)),
        shallow.test_error(np.median(outputs, -2)),
    )


def book_example() -> tuple[shallow.Data, np.ndarray]:
    """Return the book's data set and its four members' parameters (4, 15)."""
    random = np.random.RandomState(SEED)
    data = shallow.book_data(random)
    return data, resample(data, np.stack([random.choice(shallow.POINTS, shallow.POINTS) for _ in range(MEMBERS)]))


def repeat(count: int, *, new_data: bool) -> Errors:
    """Return the errors of many ensembles.

    Args:
        count: How many.
        new_data: Whether each has a data set of its own; otherwise all resample the book's.
    """
    data = shallow.many_data(0, count) if new_data else book_example()[0]
    chosen = np.random.default_rng(1).integers(shallow.POINTS, size=(count, MEMBERS, shallow.POINTS))
    return evaluate(data, resample(data, chosen))


def share(better: np.ndarray, worse: np.ndarray) -> float:
    """Return in which part of the repetitions the first error is less than the second."""
    return float((better < worse).mean())


def draw(folder: Path, quick: bool) -> str:
    """Draw the members, their mean and median, and how often the ensemble is better than what."""
    data, members = book_example()
    one = evaluate(data, members)
    plate = Plate(2, 3)
    panel = plate.panel(f"all {shallow.POINTS} points: test error {one.single:.3f}", "x", "y")
    draw_points(panel, data)
    draw_fit(panel, "single network", shallow.fit(data))
    panel.legend()
    panel = plate.panel("four bootstraps: " + ", ".join(f"{error:.3f}" for error in one.members), "x", "y")
    draw_points(panel, data)
    for number, parameters in enumerate(members, 1):
        draw_fit(panel, f"member {number}", parameters, color=f"C{number + 3}")
    panel.legend()
    panel = plate.panel(f"their mean: {one.mean:.3f}, their median: {one.median:.3f}", "x", "y")
    draw_points(panel, data)
    outputs = shallow.predict(members, FINE)
    panel.line("mean", FINE, outputs.mean(0), color="tab:blue")
    panel.line("median", FINE, np.median(outputs, 0), style="--", color="tab:red")
    panel.legend()

    count = 200 if quick else 2000
    same, new = repeat(count, new_data=False), repeat(count, new_data=True)
    panel = plate.panel("the same points, new bootstraps", "test error", f"share of {count} below it")
    ranks = np.arange(1, count + 1) / count
    for name, values in (
        ("best of the 4 members", same.members.min(1)),
        ("mean of the 4 members' errors", same.members.mean(1)),
        ("median ensemble", same.median),
        ("mean ensemble", same.mean),
    ):
        panel.line(name, np.sort(values), ranks)
    panel.axes.axvline(float(one.single), color="black", linestyle=":", label="single network")
    panel.axes.set_xlim(0, 1)
    panel.legend(loc="lower right")

    names = ("the single network", "the members' mean error", "the best member")
    luck: dict[str, list[float]] = {}
    for title, errors in (("the same points", same), ("new points", new)):
        panel = plate.panel(f"how often it beats what: {title}", "share of repetitions", "")
        for offset, (kind, values) in enumerate((("mean", errors.mean), ("median", errors.median))):
            rivals = (errors.single, errors.members.mean(1), errors.members.min(1))
            shares = luck[f"{kind}, {title}"] = [share(values, rival) for rival in rivals]
            places = np.arange(len(names)) + 0.16 * (2 * offset - 1)
            panel.line(f"{kind} ensemble", shares, places, style="so"[offset], ms=7)
            for value, place in zip(shares, places, strict=True):
                panel.axes.annotate(
                    f"{value:.1%}", (value, place), (-7, -3), textcoords="offset points", fontsize=7, ha="right"
                )
        panel.axes.set_yticks(range(len(names)), names, fontsize=7)
        panel.axes.set(xlim=(0, 1.05), ylim=(len(names) - 0.4, -0.6))
        panel.legend(loc="upper left")
    beats_all = luck["mean, the same points"][2], luck["median, the same points"][2]
    return plate.save(
        folder,
        "bagging",
        f"Bagging: this draw's ensemble beats every member, which is luck: the mean does so in {beats_all[0]:.0%} and "
        f"the median in {beats_all[1]:.0%} of {count} repetitions. The mean always beats the members' mean error, and "
        f"beats the single network in {luck['mean, the same points'][0]:.0%}.",
    )
