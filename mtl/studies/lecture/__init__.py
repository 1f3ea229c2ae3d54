"""The lecture's figures on regularization, drawn anew: a picture and its numbers each, all computed when asked for.

After "Understanding Deep Learning" (Prince 2023), chapter 9 and its notebooks. Float64 but for the networks on
MNIST-1D, whose signals are float32; every seed is fixed.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mtl.errors import UserError, nearest
from mtl.studies.lecture import (
    augmentation,
    bagging,
    batch_variance,
    dropout,
    early_stopping,
    flow,
    noise,
    performance,
    prior,
    smoothing,
)

FIGURES: dict[str, Callable[[Path, bool], str]] = {
    "prior": prior.draw,
    "l2": smoothing.draw,
    "flow": flow.draw,
    "batch-variance": batch_variance.draw,
    "learning-rate-batch-size": performance.draw,
    "early-stopping": early_stopping.draw,
    "bagging": bagging.draw,
    "dropout": dropout.draw,
    "noise": noise.draw,
    "augmentation": augmentation.draw,
}
"""What draws each figure: from the folder in which to write ``NAME.png`` and ``NAME.csv``, and whether fewer data sets,
seeds and steps will do, to the figure's caption."""


def check_names(names: Sequence[str]) -> None:
    """Refuse figures that do not exist.

    Raises:
        UserError: One does not.
    """
    for name in names:
        if name not in FIGURES:
            raise UserError(f"--figures {name!r} is no figure{nearest(name, FIGURES)}; there are {', '.join(FIGURES)}")


def draw(folder: Path, names: Sequence[str], *, quick: bool = False) -> dict[str, str]:
    """Write figures and their numbers, and return their captions by name.

    Args:
        folder: Where to; it must exist.
        names: Which of `FIGURES`.
        quick: Whether fewer data sets, seeds and steps will do.

    Raises:
        UserError: There is no such figure.
    """
    check_names(names)
    return {name: FIGURES[name](folder, quick) for name in names}


def run(folder: Path, names: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Write figures in full, and say of each what it shows.

    Args:
        folder: Where to; it is made where it is missing.
        names: Which of `FIGURES`; none stands for all.
        say: Is told a line for each figure.

    Raises:
        UserError: There is no such figure, or the folder cannot be made.
    """
    check_names(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    for name in names or FIGURES:
        start = time.perf_counter()
        (caption,) = draw(folder, [name]).values()
        say(f"{name} ({time.perf_counter() - start:.0f} s): {caption}")
    say(f"written to {folder}: a PNG and a CSV of each")
