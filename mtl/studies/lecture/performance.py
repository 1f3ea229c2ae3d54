"""Test performance against learning rate and batch size, on MNIST-1D (figure 9.5).

As in the book, the learning rates have the opportunity to move equally far, steps times rate being the same, and the
batch sizes see the training signals equally often. To take seconds it has fewer signals and steps than the book's.
"""

from pathlib import Path

import numpy as np
import torch

from mtl.data.mnist1d import load_mnist1d
from mtl.studies.lecture.perceptron import Perceptrons
from mtl.studies.lecture.plate import Plate

WIDTHS = (40, 100, 100, 10)
"""Of the network."""

TRAINING = 500
"""Training signals; all others of the 5000 are for the test."""

RATES, REACH, BATCH = (0.05, 0.1, 0.2, 0.4, 0.8), 100.0, 100
"""Learning rates, what rate times steps is, and their batch size."""

BATCHES, EPOCHS, RATE = (10, 20, 50, 100), 100, 0.1
"""Batch sizes, their epochs, and their learning rate."""

SEEDS = range(5)


def measure(seeds: range, rate: float, batch: int, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the test errors (S,) in percent."""
    parts = [load_mnist1d(None, split) for split in ("all", "test")]
    signals, labels = torch.cat([part[0] for part in parts])[:, 0], torch.cat([part[1] for part in parts])
    networks = Perceptrons(WIDTHS, seeds)
    networks.train(signals[:TRAINING], labels[:TRAINING], rate=rate, batch=batch, epochs=epochs)
    training = networks.errors(signals[:TRAINING], labels[:TRAINING])
    return training.numpy(), networks.errors(signals[TRAINING:], labels[TRAINING:]).numpy()


def draw(folder: Path, quick: bool) -> str:
    """Draw the test error against learning rate and against batch size."""
    seeds = range(2) if quick else SEEDS
    rates = RATES[2:] if quick else RATES
    batches = BATCHES[2:] if quick else BATCHES
    by_rate = [measure(seeds, rate, BATCH, round(REACH / rate * BATCH / TRAINING)) for rate in rates]
    by_batch = [measure(seeds, RATE, batch, EPOCHS) for batch in batches]
    plate = Plate(1, 2)
    found = []
    for name, places, measured in (
        (f"learning rate (batches of {BATCH})", rates, by_rate),
        (f"batch size (learning rate {RATE:g})", batches, by_batch),
    ):
        training, test = (np.stack(values) for values in zip(*measured, strict=True))
        panel = plate.panel(f"test error (on the training signals at most {training.max():.1f} %)", name, "%")
        panel.spread(f"mean of {len(seeds)} seeds, standard error", places, test)
        panel.log_ticks(places)
        panel.legend()
        found.append(test.mean(1))
    return plate.save(
        folder,
        "learning-rate-batch-size",
        f"MNIST-1D, {TRAINING} training signals: test error {found[0][0]:.1f} % at a learning rate of {rates[0]:g} and "
        f"{found[0][-1]:.1f} % at {rates[-1]:g}; {found[1][-1]:.1f} % with batches of {batches[-1]} and "
        f"{found[1][0]:.1f} % with batches of {batches[0]}. Chance is 90 %.",
    )
