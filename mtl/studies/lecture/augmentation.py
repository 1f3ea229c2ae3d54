"""Augmentation on MNIST-1D: circular shifts and scaling (notebook 9.5)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl.augmentation.signals import SignalAugmentation
from mtl.data.mnist1d import load_mnist1d
from mtl.studies.lecture.perceptron import Perceptrons
from mtl.studies.lecture.plate import Plate

WIDTHS = (40, 200, 200, 10)
"""Of the book's network."""

RATE, MOMENTUM, BATCH, EPOCHS = 0.05, 0.9, 100, 50
"""Of its SGD."""

SEEDS = range(4)


def augmented(signals: Tensor, seed: int) -> Tensor:
    """Return the signals (N, 40), and below them a shifted and scaled copy of each."""
    places = torch.arange(len(signals))
    batch = {"signal": signals[:, None], "draw": torch.stack([torch.zeros_like(places), places], 1)}
    return torch.cat([signals, SignalAugmentation(seed)(batch)["signal"][:, 0]])


def compare(seeds: range, epochs: int) -> np.ndarray:
    """Return errors in percent (4, S): training and test without augmentation, training and test with it."""
    signals, labels = load_mnist1d(None, "all")
    test_signals, test_labels = load_mnist1d(None, "test")
    signals, test_signals = signals[:, 0], test_signals[:, 0]
    more = torch.stack([augmented(signals, seed) for seed in seeds])
    rows = []
    for inputs, targets in ((signals, labels), (more, torch.cat([labels, labels]))):
        networks = Perceptrons(WIDTHS, seeds)
        networks.train(inputs, targets, rate=RATE, momentum=MOMENTUM, batch=BATCH, epochs=epochs)
        rows += [networks.errors(signals, labels), networks.errors(test_signals, test_labels)]
    return torch.stack(rows).numpy()


def draw(folder: Path, quick: bool) -> str:
    """Draw signals with their copies, and the errors without and with augmentation."""
    seeds, epochs = (range(2), 2) if quick else (SEEDS, EPOCHS)
    plate = Plate(1, 2)
    signals, labels = load_mnist1d(None, "all")
    both = augmented(signals[:, 0], seeds[0]).reshape(2, len(signals), -1)
    panel = plate.panel("three signals, each with its copy", "place", "")
    for row in range(3):
        for copy, name in enumerate(("as it is", "shifted and scaled")):
            series = f"a {labels[row]}, {name}"
            values = both[copy, row].numpy() - 5 * row
            panel.line(series, np.arange(values.size), values, style=("-", "--")[copy], color=f"C{row}")
    panel.axes.set_yticks([])
    panel.axes.set_ylim(-20, 3)
    panel.legend(loc="lower right", ncols=2)
    errors = compare(seeds, epochs)
    pair = errors[[1, 3]]
    panel = plate.panel(f"test error (on the training signals at most {errors[[0, 2]].max():.1f} %)", "", "%")
    for seed, values in zip(seeds, pair.T, strict=True):
        panel.line(f"seed {seed}", [0, 1], values, style="o-", color="tab:grey", alpha=0.6, shown=False)
    panel.spread(f"mean of {len(seeds)} seeds, standard error", [0, 1], pair, color="tab:blue")
    panel.axes.set_xticks([0, 1], ["without", "with augmentation"])
    panel.axes.set_xlim(-0.4, 1.4)
    panel.legend()
    plain, changed = pair
    gain = plain - changed
    return plate.save(
        folder,
        "augmentation",
        f"MNIST-1D, two layers of 200: test error {plain.mean():.1f} ± {plain.std(ddof=1):.1f} % without and "
        f"{changed.mean():.1f} ± {changed.std(ddof=1):.1f} % with circular shifts and scaling; the gain of "
        f"{gain.mean():.1f} points lies from {gain.min():.1f} to {gain.max():.1f} in {len(seeds)} seeds.",
    )
