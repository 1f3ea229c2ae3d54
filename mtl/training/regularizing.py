"""What a training step adds to its loss, or does to its gradient, to narrow the gap between training and test error."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtl.config import RegularizeOptions
from mtl.regularization.displacement import Gradients
from mtl.regularization.implicit import (
    GradientOf,
    batch_variance,
    gradient_moments,
    gradient_norm,
    gradients_of_loss,
    sharpness_aware,
)
from mtl.regularization.noise import noisy_weights
from mtl.regularization.penalties import Penalties, counted_weights
from mtl.training.balancing import deliver


class Regularized(NamedTuple):
    """What became of a batch's loss.

    Attributes:
        total: A scalar whose backward pass reaches every parameter once.
        terms: What was added to the loss, scalars by name.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Regularizer(nn.Module):
    """Everything of `--regularize` that acts on weights and their gradients, in one order.

    With g the gradient of the tasks' weighted loss L at weights φ + ε, ε the weight noise of the step, the optimizer
    follows

        g(φ + ε)  or, with SAM, g(φ + ε + ρ g / ‖g‖)
          + the gradients of the implicit terms of L at φ + ε
          + the gradients of the penalties at φ

    so that what is added adds up, whatever else is on, and penalties stay outside SAM's maximum, as in its paper. Each
    batch that gradients are accumulated over has an ascent and a gradient norm of its own; see
    `mtl.regularization.implicit` for what that makes of them. Clipping, momentum and decoupled decay come after.

    Args:
        options: How much of what.
        learning: What learns; it does not become a part of this one.
        backbone: The part of it that may be pretrained.
        seed: Of the noise.

    Attributes:
        learns: The parameters that learn in this fit.
        penalties: Of this fit, or None.
        measured: What was measured at the last step, by its name in the history.
    """

    def __init__(self, options: RegularizeOptions, learning: nn.Module, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        self.options, self.seed = options, seed
        self._of = (learning, backbone)  # in a tuple, which hides them from state dicts
        self._starts: Mapping[str, Tensor] = {}
        self._noisy: list[nn.Parameter] = []
        self._batches: list[tuple[GradientOf, Gradients]] = []
        self.learns: list[nn.Parameter] = []
        self.penalties: Penalties | None = None
        self.measured: dict[str, float] = {}

    def begin(self) -> None:
        """Take up what learns, in a fit that is about to begin with weights that are in place.

        Raises:
            UserError: A penalty has nothing to act on.
        """
        options, (learning, backbone) = self.options, self._of
        self._batches, self.measured = [], {}
        self.learns = [p for p in learning.parameters() if p.requires_grad]
        self._noisy = list(counted_weights(learning).values()) if options.weight_noise else []
        # A frozen backbone stays where it starts, until it thaws.
        l2_sp = 0.0 if backbone.frozen else options.l2_sp
        if not (options.l2 or options.l1 or l2_sp):
            return
        if self.penalties is None or self.penalties.l2_sp != l2_sp:
            self.penalties = Penalties(learning, options.l2, options.l1, l2_sp, backbone)
        self.penalties.choose()
        if self._starts:
            self.penalties.start_at(self._starts)
            self._starts = {}

    def starts(self) -> dict[str, Tensor]:
        """Return what a training needs to go on that its weights do not tell: where they started."""
        return {} if self.penalties is None else self.penalties.starts()

    def start_at(self, starts: Mapping[str, Tensor]) -> None:
        """Take up in the next fit where weights started in another process, see `starts`."""
        self._starts = starts

    def noise(self, step: int) -> AbstractContextManager[None]:
        """Return where weights have the noise of an optimizer step: the same for all batches that it accumulates.

        No graph that was built inside may be gone back through outside.
        """
        if not self._noisy:
            return nullcontext()
        return noisy_weights(self._noisy, self.options.weight_noise, self.seed, step)

    def forward(
        self, loss: Tensor, gradient_of: GradientOf, step: int, *, last: bool, scale: Tensor | None
    ) -> Regularized:
        """Return the loss with what is added through gradients: inside `noise`, and before `penalize`.

        Args:
            loss: The tasks' weighted loss on a batch, a scalar.
            gradient_of: Returns the loss's gradient once more, for the parameters in `learns`.
            step: Optimizer steps done.
            last: Whether the batch is the last before the optimizer's step.
            scale: By which half precision multiplies losses on their way back, if it does.
        """
        options, terms = self.options, dict[str, Tensor]()
        self.measured = {}
        measures = options.measure is not None and (step + 1) % options.measure == 0
        keeps = measures or options.batch_variance > 0
        if not (keeps or options.gradient_norm or options.sam or self._noisy):
            return Regularized(loss, terms)
        # No graph may be alive while weights stand elsewhere: this frees the loss's.
        gradients: Gradients = gradients_of_loss(loss, self.learns, scale)
        followed = gradients
        if options.sam:
            followed = sharpness_aware(gradient_of, self.learns, gradients, options.sam)
        if options.gradient_norm:
            terms["gradient_norm"], added = gradient_norm(gradient_of, self.learns, gradients, options.gradient_norm)
            followed = _sum(followed, added)
        value = loss.detach() + sum(terms.values())
        if keeps:
            self._batches.append((gradient_of, gradients))
        if keeps and last:
            (again, found), count = zip(*self._batches, strict=True), len(self._batches)
            self._batches = []
            if options.batch_variance:
                term = batch_variance(again, self.learns, found, options.batch_variance)
                terms["batch_variance"] = term.value
                # As one of the batches, each of which counts for its share of the step.
                followed = _sum(followed, term.gradients, count)
                value = value + count * term.value
            if measures:
                squared_norm, variance = gradient_moments(found)
                self.measured["train/gradient_norm_squared"] = float(squared_norm)
                if count > 1:
                    self.measured["train/batch_variance"] = float(variance)
        return Regularized(deliver(value, followed, self.learns), terms)

    def penalize(self, loss: Tensor) -> Regularized:
        """Return the loss with the penalties, outside `noise`."""
        terms = {} if self.penalties is None else self.penalties.each()
        return Regularized(loss + sum(term.to(loss) for term in terms.values()), terms)


def _sum(gradients: Gradients, added: Gradients, factor: float = 1.0) -> list[Tensor]:
    return [torch.add(gradient, more, alpha=factor) for gradient, more in zip(gradients, added, strict=True)]
