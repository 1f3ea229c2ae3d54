"""How a network on MNIST-1D is trained: the fixed recipe, and what each technique changes of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from mtl.augmentation.draws import Draws
from mtl.augmentation.signals import SignalAugmentation
from mtl.data.mnist1d import generate_from
from mtl.regularization.noise import noisy_inputs, redrawn_labels

SHAPES, SIGNALS_OF_SHAPES = 20, 8000
"""Classes of the data that are learned before, and how many signals they have."""

_MEMBER_SEED = 2**31
"""Below this are the seeds of an ensemble's further members."""


@dataclass(frozen=True)
class Recipe:
    """A training. What is given here is that of notebook 9.5 of "Understanding Deep Learning" (Prince 2023).

    Attributes:
        signals: The published training signals ("all"), the seven eighths of them that leave the others for validation
            ("train"), all with one changed copy of each ("copies"), or those of `SHAPES` other shapes ("shapes").
        goal: What is learned: the classes, or the values that are hidden ("hidden").
        start: The training whose hidden layers this one begins with; None begins at random.
        l2_sp: λ of the distance from these hidden layers' weights.
        rate: Learning rate.
        momentum: Of SGD.
        batch: Samples in a batch.
        epochs: Passes over the data.
        cycles: How often the learning rate falls to zero along half a cosine; 0 leaves it constant.
        members: Networks for each seed.
        branch: Epochs that the members have in common.
        bootstrap: Whether each network has as many samples, drawn with replacement.
        l2: λ of ‖φ‖², of weights without biases, as are the next two.
        l1: λ of ‖φ‖₁.
        decay: Decoupled weight decay: a step takes the learning rate times this share of a weight.
        gradient_norm: α of α/4 ‖∂L/∂φ‖².
        batch_variance: α of α/4B Σ ‖∂L_b/∂φ - ∂L/∂φ‖² over the `PARTS` of a batch.
        sam: ρ of sharpness-aware minimization.
        weight_noise: Standard deviation.
        dropout: Probability.
        smoothing: Share of a label that all classes get.
        input_noise: Standard deviation.
        redrawn: Share of the labels that each epoch draws anew.
        shift: Whether each epoch moves signals circularly, by any number of places.
        scale: Each epoch multiplies signals by a factor of 1 ± this at most.
        joint: Weight of the error on hidden values, learned beside the classes.
        hidden: Share of the values that are hidden where they are to be learned.
    """

    signals: Literal["all", "train", "copies", "shapes"] = "all"
    goal: Literal["classes", "hidden"] = "classes"
    start: "Recipe | None" = None
    l2_sp: float = 0.0
    rate: float = 0.05
    momentum: float = 0.9
    batch: int = 100
    epochs: int = 50
    cycles: int = 0
    members: int = 1
    branch: int = 0
    bootstrap: bool = False
    l2: float = 0.0
    l1: float = 0.0
    decay: float = 0.0
    gradient_norm: float = 0.0
    batch_variance: float = 0.0
    sam: float = 0.0
    weight_noise: float = 0.0
    dropout: float = 0.0
    smoothing: float = 0.0
    input_noise: float = 0.0
    redrawn: float = 0.0
    shift: bool = False
    scale: float = 0.0
    joint: float = 0.0
    hidden: float = 0.0

    @property
    def kind(self) -> "Recipe":
        """This recipe with every strength that is in use 1: recipes of one kind are trained as one model."""
        used: dict[str, Any] = {name: float(getattr(self, name) != 0) for name in STRENGTHS}
        return dataclasses.replace(self, l2_sp=0.0, **OF_DATA, **used)


STRENGTHS = (
    "rate",
    "l2",
    "l1",
    "decay",
    "gradient_norm",
    "batch_variance",
    "sam",
    "weight_noise",
    "dropout",
    "smoothing",
)
"""Numbers that may differ between networks trained as one model, if they are zero in all or none."""

OF_DATA: dict[str, Any] = {"input_noise": 0.0, "redrawn": 0.0, "shift": False, "scale": 0.0}
"""What is done to the data before each epoch, in which such networks may differ at will; as they may in `l2_sp`."""


class Data(NamedTuple):
    """Signals (..., N, 40) float32, and their classes (..., N) int64."""

    signals: Tensor
    labels: Tensor


class Published(NamedTuple):
    """MNIST-1D: all training signals, those among them that are not held out, those that are, and the test signals."""

    all: Data
    train: Data
    validation: Data
    test: Data


@cache
def shapes() -> Data:
    """Return signals of other shapes, drawn at random and then changed as MNIST-1D's digits are.

    A shape is a smooth curve through twelve places, as a digit is; nothing of the digits goes into it.
    """
    random = np.random.RandomState(0)
    templates = gaussian_filter1d(random.uniform(2.5, 7.5, (SHAPES, 12)), 1.0, axis=1)
    x, y = generate_from(templates, SIGNALS_OF_SHAPES, random)
    return Data(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))


def seeds_of(seed: int, members: int) -> list[int]:
    """Return the seeds of an ensemble's members, the first one's is its own."""
    state = np.random.SeedSequence(seed).generate_state(members)
    return [seed, *(int(word) % _MEMBER_SEED for word in state[1:])]


def data_of(recipe: Recipe, published: Published, seeds: Sequence[int]) -> Data:
    """Return what each network learns from, (S, N, 40) and (S, N), before what each epoch changes."""
    if recipe.signals == "copies":
        signals, labels = published.all
        more = torch.stack([torch.cat([signals, _augmented(signals, seed, 0, True, 0.2)]) for seed in seeds])
        return Data(more, torch.cat([labels, labels]).expand(len(seeds), -1))
    signals, labels = {"all": published.all, "train": published.train}.get(recipe.signals) or shapes()
    return Data(signals.expand(len(seeds), -1, -1), labels.expand(len(seeds), -1))


def changed_by_epoch(recipe: Recipe, data: Data, epoch: int, seeds: Sequence[int], classes: int) -> Data:
    """Return what each network sees in an epoch: a function of its seed, the epoch, and the sample."""
    signals, labels = data
    places = torch.arange(labels.shape[1])
    if recipe.shift or recipe.scale:
        parts = [_augmented(x, seed, epoch, recipe.shift, recipe.scale) for x, seed in zip(signals, seeds, strict=True)]
        signals = torch.stack(parts)
    if recipe.input_noise or recipe.redrawn:
        draws = [Draws(seed, epoch, places) for seed in seeds]
        if recipe.input_noise:
            parts = [noisy_inputs(x, recipe.input_noise, draw) for x, draw in zip(signals, draws, strict=True)]
            signals = torch.stack(parts)
        if recipe.redrawn:
            parts = [redrawn_labels(y, recipe.redrawn, classes, draw) for y, draw in zip(labels, draws, strict=True)]
            labels = torch.stack(parts)
    return Data(signals, labels)


def _augmented(signals: Tensor, seed: int, epoch: int, shift: bool, scale: float) -> Tensor:
    """Return signals (N, 40), each shifted and scaled."""
    places = torch.arange(len(signals))
    batch = {"signal": signals[:, None], "draw": torch.stack([torch.full_like(places, epoch), places], 1)}
    changed: Tensor = SignalAugmentation(seed, shift=shift, scale=scale)(batch)["signal"]
    return changed[:, 0]
