"""Figures as files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from mtl.files import write_whole


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
