"""How fits of the shallow network are drawn."""

import numpy as np

from mtl.studies.lecture import shallow
from mtl.studies.lecture.plate import Panel

FINE = np.linspace(0, 1, 281)
"""Where curves are drawn: every knot is among these."""


def draw_points(panel: Panel, data: shallow.Data) -> None:
    """Draw the true curve and the training points, and set the limits."""
    panel.line("true curve", FINE, shallow.truth(FINE), style="-", color="black", lw=1, alpha=0.6)
    panel.line("training points", data.x, data.y, style="o", color="tab:orange", ms=4)
    panel.axes.set(xlim=(0, 1), ylim=(-0.6, 3.8))


def draw_fit(panel: Panel, series: str, parameters: np.ndarray, color: str = "tab:cyan") -> None:
    """Draw the curve of parameters (15,)."""
    panel.line(series, FINE, shallow.predict(parameters, FINE), style="-", color=color, lw=1.6)
