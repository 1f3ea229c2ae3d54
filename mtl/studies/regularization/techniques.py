"""The techniques of the study on MNIST-1D, and their strengths."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from mtl.ensembling.combine import Kind
from mtl.studies.regularization.readings import LAST, Reading
from mtl.studies.regularization.recipe import Recipe

MECHANISMS = {
    "smooth": "A smoother function",
    "data": "More data",
    "average": "Averaged models",
    "wide": "Wider minima",
}
"""What techniques work through, as "Understanding Deep Learning" (Prince 2023, section 9.4) sorts them."""

Mechanism = Literal["smooth", "data", "average", "wide"]

MEMBERS = 5
"""Of an ensemble."""

PASSES = 20
"""Of Monte Carlo dropout."""

BRANCHES = (10, 25)
"""Epochs that the ingredients of a soup have in common, of 50."""

SHORT = 25
"""Epochs of a training that comes before."""


@dataclasses.dataclass(frozen=True)
class Technique:
    """A row of the study.

    Attributes:
        name: As --techniques takes it.
        label: What to call it.
        strength: How much of it.
        mechanism: What it works through; the baseline has none.
        recipe: The training.
        reading: Which weights of it count.
        members: How many of the recipe's members answer.
        kind: How members' answers are combined, if there are several.
        soup: Whether the members' weights are averaged in place of their answers.
        passes: With Monte Carlo dropout, so many random passes answer.
    """

    name: str
    label: str
    strength: str
    mechanism: Mechanism | None
    recipe: Recipe
    reading: Reading = LAST
    members: int = 1
    kind: Kind = "mean"
    soup: bool = False
    passes: int = 0


def techniques(base: Recipe) -> list[Technique]:
    """Return the baseline and all techniques.

    Args:
        base: The baseline's training.
    """
    # Its further members are the ensembles'.
    base = dataclasses.replace(base, members=MEMBERS)
    alone = dataclasses.replace(base, members=1)
    return [
        Technique("baseline", "baseline", "", None, base),
        *_smooth(alone),
        *_data(alone),
        *_average(base),
        *_wide(alone),
    ]


def _strengths(
    base: Recipe, name: str, label: str, symbol: str, mechanism: Mechanism, field: str, values: tuple[float, ...]
) -> Iterator[Technique]:
    for value in values:
        recipe = dataclasses.replace(base, **{field: value})  # type: ignore[arg-type]
        yield Technique(name, label, f"{symbol} {value:g}".strip(), mechanism, recipe)


def _smooth(base: Recipe) -> Iterator[Technique]:
    replace = dataclasses.replace
    yield from _strengths(base, "l2", "L2 penalty", "λ", "smooth", "l2", (1e-4, 1e-3, 3e-3, 1e-2))
    yield from _strengths(base, "l1", "L1 penalty", "λ", "smooth", "l1", (1e-5, 1e-4, 3e-4))
    for l2, l1 in ((1e-3, 1e-5), (1e-3, 1e-4), (3e-3, 1e-4)):
        recipe = replace(base, l2=l2, l1=l1)
        yield Technique("elastic-net", "elastic net", f"λ₂ {l2:g}, λ₁ {l1:g}", "smooth", recipe)
    yield from _strengths(
        base, "weight-decay", "decoupled weight decay", "", "smooth", "decay", (1e-3, 1e-2, 3e-2, 1e-1)
    )
    held_out = replace(base, signals="train")
    label = "fewer signals, not stopped"
    yield Technique("early-stopping", label, "7/8 of them", "smooth", held_out)
    for name, by in (("least-error", "error"), ("least-loss", "loss")):
        for patience in (5, 20):
            strength = f"by validation {by}, patience {patience}"
            reading = Reading(name, patience)
            yield Technique("early-stopping", "early stopping", strength, "smooth", held_out, reading)
    yield from _strengths(base, "dropout", "dropout", "p", "smooth", "dropout", (0.1, 0.2, 0.4))
    yield from _strengths(
        base, "input-noise", "noise on inputs", "deviation", "smooth", "input_noise", (0.05, 0.1, 0.2, 0.4)
    )
    yield from _strengths(base, "label-smoothing", "label smoothing", "share", "smooth", "smoothing", (0.05, 0.1, 0.3))
    label = "noise on labels, fresh each epoch"
    yield from _strengths(base, "label-noise", label, "share", "smooth", "redrawn", (0.05, 0.1, 0.3))


def _data(base: Recipe) -> Iterator[Technique]:
    replace = dataclasses.replace
    for strength, changes in (
        ("the lecture's: one copy, shifted and scaled", {"signals": "copies"}),
        ("scale by 0.8 to 1.2, fresh each epoch", {"scale": 0.2}),
        ("circular shift, fresh each epoch", {"shift": True}),
        ("both, fresh each epoch", {"shift": True, "scale": 0.2}),
    ):
        recipe = replace(base, **changes)  # type: ignore[arg-type]
        yield Technique("augmentation", "augmentation", strength, "data", recipe)
    shapes = replace(base, signals="shapes", epochs=max(1, base.epochs * SHORT // 50))
    for l2_sp in (0.0, 1e-3, 1e-2):
        strength = f"L2-SP, λ {l2_sp:g}" if l2_sp else "fine-tuned"
        recipe = replace(base, start=shapes, l2_sp=l2_sp)
        yield Technique("transfer", "transfer from 20 other shapes", strength, "data", recipe)
    for share in (0.3, 0.6):
        before = replace(base, goal="hidden", hidden=share)
        recipe = replace(base, start=before)
        yield Technique("self-supervised", "masked pretraining", f"{share:.0%} hidden", "data", recipe)
    for weight in (0.1, 1.0):
        strength = f"30% hidden, weight {weight:g}"
        recipe = replace(base, joint=weight, hidden=0.3)
        yield Technique("multi-task", "multi-task with masked", strength, "data", recipe)


def _average(base: Recipe) -> Iterator[Technique]:
    replace, alone = dataclasses.replace, dataclasses.replace(base, members=1)
    words: dict[Kind, str] = {"mean": "mean", "logits": "mean before softmax", "median": "median", "vote": "vote"}
    for kind, word in words.items():
        label = f"ensemble of {MEMBERS}"
        yield Technique("ensemble", label, word, "average", base, members=MEMBERS, kind=kind)
    bagged = replace(base, bootstrap=True)
    label = f"bagging, {MEMBERS} resampled sets"
    yield Technique("bagging", "one resampled set", "", "average", bagged)
    for kind in ("mean", "median"):
        yield Technique("bagging", label, kind, "average", bagged, members=MEMBERS, kind=kind)
    snapshots = replace(alone, cycles=MEMBERS, rate=2 * base.rate)
    yield Technique("snapshots", "cyclic learning rate", f"{MEMBERS} cycles, the last end", "average", snapshots)
    strength = f"{MEMBERS} cycles, mean"
    yield Technique("snapshots", "snapshot ensemble", strength, "average", snapshots, Reading("snapshots", MEMBERS))
    for decay in (0.9, 0.99, 0.998):
        yield Technique("ema", "moving average of weights", f"decay {decay:g}", "average", base, Reading("ema", decay))
    for start in (0.5, 0.75):
        yield Technique(
            "swa", "plain average of weights", f"from {start:.0%} on", "average", base, Reading("swa", start)
        )
    label = f"weight soup of {MEMBERS}"
    for epochs in BRANCHES:
        recipe = replace(base, branch=max(1, base.epochs * epochs // 50))
        strength = f"{recipe.branch} epochs in common"
        yield Technique("soup", label, strength, "average", recipe, members=MEMBERS, soup=True)
    yield Technique("soup", label, "nothing in common", "average", base, members=MEMBERS, soup=True)
    for p in (0.1, 0.2, 0.4):
        recipe, strength = replace(alone, dropout=p), f"p {p:g}, {PASSES} passes"
        yield Technique("mc-dropout", "Monte Carlo dropout", strength, "average", recipe, passes=PASSES)


def _wide(base: Recipe) -> Iterator[Technique]:
    yield from _strengths(base, "learning-rate", "learning rate", "", "wide", "rate", (0.005, 0.02, 0.1, 0.2))
    for batch in (20, 50, 400):
        recipe = dataclasses.replace(base, batch=batch)
        yield Technique("batch-size", "batch size", str(batch), "wide", recipe)
    yield from _strengths(base, "gradient-norm", "gradient norm", "for a step of", "wide", "gradient_norm", (0.05, 0.2))
    yield from _strengths(
        base, "batch-variance", "batch variance", "for a step of", "wide", "batch_variance", (0.05, 0.2)
    )
    yield from _strengths(base, "sam", "SAM", "radius", "wide", "sam", (0.05, 0.2, 0.5))
    yield from _strengths(
        base, "weight-noise", "noise on weights", "deviation", "wide", "weight_noise", (0.01, 0.03, 0.1)
    )


LEFT_OUT = (
    "Left out: depth jitter and drop path, as there is no depth and no residual block; a greedy soup, which is the "
    "uniform one less what a validation set would throw out; multi-task learning with other labels, as MNIST-1D has "
    "none but the class."
)
"""What makes no sense on MNIST-1D."""
