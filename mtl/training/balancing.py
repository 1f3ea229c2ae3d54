"""How the tasks' losses become one backward pass, whatever the rule that weighs them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtl.errors import UserError
from mtl.plugin_checks import objective_of, weigh
from mtl.plugins import in_plugin_of
from mtl.tasks.base import most_precise, over_ranks, ranks
from mtl.weighting.base import HostModule, Step, Weighting

T = TypeVar("T")

_REMEDY = "a lower --lr, --clip 1, less of --regularize where it is used, or --precision 32-true usually helps"


class Cut:
    """The shared features, cut off from the backbone's graph: what the heads read, and where their gradients meet.

    All maps are cut at once. They are nested, each computed from the one before: a gradient that went on from one map
    into another would be counted twice.

    Args:
        backbone: What learns of the backbone, and before it.
        compares: Whether it is to be known how the gradients meet, and not only to be delivered what they are.

    Attributes:
        features: The features as the backbone gives them, those that have a graph.
        leaves: The same, detached, as the heads read them.
    """

    def __init__(self, backbone: Sequence[nn.Parameter], *, compares: bool) -> None:
        self.backbone, self.compares = backbone, compares
        self.features: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def through(self, features: T) -> T:
        """Return features of the same values for heads to read: a tensor, or a tuple or list of such, nested.

        A pass of its own through the backbone, such as that of a masked image, is cut in the same way, and its
        gradients meet those of other passes at the parameters alone.
        """
        if isinstance(features, Tensor):
            return cast(T, self._leaf(features))
        if isinstance(features, tuple | list):
            parts = [self.through(part) for part in features]
            return cast(T, type(features)._make(parts) if hasattr(features, "_make") else type(features)(parts))
        return features

    def _leaf(self, features: Tensor) -> Tensor:
        # Such as the image itself, or what comes from frozen stages.
        if not features.requires_grad:
            return features
        self.features.append(features)
        self.leaves.append(features.detach().requires_grad_())
        return self.leaves[-1]


@dataclass
class Balance:
    """What came of the losses of one batch.

    Attributes:
        total: The weighted sum; its ``backward()`` reaches every parameter once.
        objective: What the rule's own parameters are to minimise, as zero with a gradient, or None.
        terms: What there is to record: raw losses and weights by task, their sum, and, where gradients were compared,
            each task's share of their norm and the cosine of each pair.
    """

    total: Tensor
    objective: Tensor | None
    terms: dict[str, float]


@dataclass
class _Gradients:
    """The tasks' gradients, as far as they go through the cut, times `scale`.

    Attributes:
        scale: What keeps them from vanishing in half precision, a device scalar.
        heads: Of each task's own parameters.
        shared: Of the features, or of the backbone's parameters; None where a task does not reach one.
        meets: The tensors of which `shared` are the gradients.
    """

    scale: Tensor
    meets: Sequence[Tensor]
    heads: dict[str, Sequence[Tensor | None]] = field(default_factory=dict)
    shared: dict[str, Sequence[Tensor | None]] = field(default_factory=dict)


class LossBalancer(HostModule):
    """Asks a rule for weights, and delivers the weighted gradients in one backward pass.

    Where nobody needs to know how the gradients of the tasks meet, the weighted losses are summed and autograd does the
    rest. Otherwise each task's loss goes back through its own head to the shared features and stops there (MGDA-UB's
    cut, Sener and Koltun 2018); their Gram matrix, summed over every element of every map and over ranks, is what the
    rule sees; and the combined gradient of the features goes through the backbone once. So the backbone is passed as
    often as for a plain sum.

    Args:
        rule: The rule.
        every: Optimizer steps from one question to the rule to the next; in between, weights stay.
        on: Where the gradients meet: 'features', or 'parameters' for the backbone's own, which takes a backward pass
            for each task.
        heads: 'scaled' multiplies the gradients of a task's own head by the size of its weight, so that, where weights
            are positive, everything follows the gradient of the weighted sum; 'own' leaves them as they are.

    Attributes:
        held: The present weights (T,) of all tasks, a buffer.
        weighed: Which tasks (T,) the rule has weighed, a buffer; the others have what `Weighting.unseen` says.
        shown: What the rule was shown when it was last asked.
        asked_at: Optimizer steps done when it was, in this process.
    """

    held: Tensor
    weighed: Tensor

    def __init__(
        self,
        rule: Weighting,
        every: int = 1,
        on: Literal["features", "parameters"] = "features",
        heads: Literal["scaled", "own"] = "scaled",
    ) -> None:
        super().__init__()
        self.rule = rule
        self.every, self.on, self.own_heads = every, on, heads == "own"
        self.register_buffer("held", torch.ones(len(rule.tasks), dtype=torch.float64))
        self.register_buffer("weighed", torch.zeros(len(rule.tasks), dtype=torch.bool))
        self.shown: Step | None = None
        self.asked_at: int | None = None

    def asks(self, step: int) -> bool:
        """Return whether the rule is asked in the next batch, the optimizer having done so many steps."""
        if self.rule.needs_gram and len(self.rule.tasks) < 2:
            return False
        due = step % self.every == 0 or int(self.rule.asked) == 0
        return due and step != self.asked_at

    def cut(self, shared: Sequence[nn.Parameter], step: int, *, measure: bool) -> Cut | None:
        """Return where the features of the next batch are to be cut off from the backbone, if they are.

        Args:
            shared: What the features depend on and learns; if nothing does, gradients meet nowhere.
            step: Optimizer steps done.
            measure: Whether it is to be known how gradients meet, for a person to see.
        """
        compares = len(self.rule.tasks) > 1 and (measure or (self.rule.needs_gram and self.asks(step)))
        return Cut(shared, compares=True) if shared and compares else self.held_cut(shared)

    def held_cut(self, shared: Sequence[nn.Parameter]) -> Cut | None:
        """Return where features are to be cut off from the backbone for `held_total`, if they are."""
        if shared and (self.own_heads or bool((self.held < 0).any())):
            return Cut(shared, compares=False)
        return None

    def forward(
        self,
        losses: Mapping[str, Tensor],
        labelled: Mapping[str, Tensor],
        heads: Mapping[str, Sequence[Tensor]],
        cut: Cut | None,
        step: int,
        scale: Tensor | None = None,
    ) -> Balance:
        """Weigh the losses of a batch.

        There is one transfer from the device to the host, of a few numbers.

        Args:
            losses: Scalar losses by task, zero for a task without labels.
            labelled: Whether the batch has labels, scalar booleans by task.
            heads: By task, what of its own learns.
            cut: Where the heads' features come from, or None where they are not cut off.
            step: Optimizer steps done.
            scale: Scalar by which the total is multiplied before its backward pass, to be done here as well for what
                goes back before.

        Raises:
            UserError: A loss is not finite, or a plugin's rule does not do what a rule must.
        """
        found = None if cut is None else self._gradients(losses, heads, cut, scale)
        compares = cut is not None and cut.compares
        gram = torch.zeros(0, 0)
        if found is not None and compares:
            gram = gram_matrix([found.shared[task] for task in losses], found.meets)
            # Ranks' gradients of the same parameters are already averaged; those of features are of different images.
            gram = gram / (1 if self.on == "parameters" else ranks())
        values, counts, gram, factor = means_on_host(
            torch.stack([loss.detach() for loss in losses.values()]),
            torch.stack([labelled[task] for task in losses]),
            gram,
            torch.ones((), dtype=torch.float32) if found is None else found.scale,
        )
        present = counts > 0
        for task, value in zip(losses, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss of the task {task!r} became {value} at step {step}, so training stopped before it "
                    f"reached the weights; {_REMEDY}"
                )
        gram = gram / factor**2
        there = torch.arange(len(values))[present]
        between = gram[there][:, there] if compares else gram
        seen = Step(values[there], there, between if self.rule.needs_gram else between.new_zeros(0, 0))
        asked = self._ask(seen, step, gram, tuple(losses), can_overflow=scale is not None)
        total = self._total(losses, found, heads)
        # A rule that sees gradients learns from what it was asked with; others see every batch.
        learns = len(there) > 0 and (asked or not self.rule.needs_gram)
        objective = objective_of(self.rule, seen, step) if learns else None
        if objective is not None:
            # Only its gradient is wanted: the total stays the weighted sum of the losses.
            objective = (objective - objective.detach()).to(total)
        names = [task for task, is_there in zip(losses, present.tolist(), strict=True) if is_there]
        weights = dict(zip(losses, self.held.tolist(), strict=True))
        terms = _terms(names, dict(zip(losses, values.tolist(), strict=True)), weights)
        if compares:
            terms |= meeting(names, between, [weights[name] for name in names])
        return Balance(total, objective, terms)

    def held_total(
        self,
        losses: Mapping[str, Tensor],
        heads: Mapping[str, Sequence[Tensor]],
        cut: Cut | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the total of losses under the weights held, without a question to the rule.

        Args:
            losses: Scalar losses by task.
            heads: By task, what of its own learns.
            cut: As from `held_cut`, where the heads' features come from.
            scale: As of `forward`.
        """
        return self._total(losses, None if cut is None else self._gradients(losses, heads, cut, scale), heads)

    def _total(
        self, losses: Mapping[str, Tensor], found: _Gradients | None, heads: Mapping[str, Sequence[Tensor]]
    ) -> Tensor:
        weights = dict(zip(losses, self.held.tolist(), strict=True))
        if found is not None:
            return self._deliver(losses, weights, found, heads)
        return torch.stack([loss * self._of_head(weights[task]) for task, loss in losses.items()]).sum()

    def _of_head(self, weight: float) -> float:
        """Return what a head's own gradient is multiplied by, and, where no backbone learns, its loss."""
        # A rule may turn the shared features away from a task; its own head is never to unlearn it.
        return 1.0 if self.own_heads else abs(weight)

    def _ask(self, seen: Step, step: int, gram: Tensor, tasks: Sequence[str], *, can_overflow: bool) -> bool:
        """Ask the rule for new weights, where it is time and there is something to weigh, and return whether it was."""
        if not self.asks(step) or not len(seen.losses) or (self.rule.needs_gram and not seen.gram.numel()):
            return False
        if not seen.gram.isfinite().all():
            if can_overflow:
                return False  # the optimizer will see the infinity too, and leave this step out
            task = next(task for task, square in zip(tasks, gram.diagonal(), strict=True) if not square.isfinite())
            raise UserError(
                f"the gradient of the task {task!r} is not finite at step {step}, so training stopped before it "
                f"reached the weights; {_REMEDY}"
            )
        weights = weigh(self.rule, seen, step)
        self.held[seen.present] = weights
        self.weighed[seen.present] = True
        self.held[~self.weighed] = self.rule.unseen(weights)[~self.weighed]
        self.rule.asked += 1
        self.asked_at, self.shown = step, seen
        return True

    def look_again(self, losses: Mapping[str, Tensor]) -> None:
        """Show the rule the losses of the batch that it was last asked with, after the optimizer step.

        Args:
            losses: Scalar losses of all tasks.
        """
        assert self.shown is not None
        (values,) = means_on_host(torch.stack(list(losses.values())))
        values = values[self.shown.present]
        if values.isfinite().all():  # otherwise training stops at the next step, which will say so
            with in_plugin_of(self.rule, "look_again"):
                self.rule.look_again(self.shown, values)

    def _gradients(
        self, losses: Mapping[str, Tensor], heads: Mapping[str, Sequence[Tensor]], cut: Cut, scale: Tensor | None
    ) -> _Gradients:
        """Take each loss back to the features and, where gradients are to meet there, to the backbone's parameters."""
        first = next(iter(losses.values()))
        unit = torch.ones((), dtype=torch.float32, device=first.device) if scale is None else scale.detach()
        on_features = self.on == "features" or not cut.compares
        found = _Gradients(unit, cut.features if on_features else cut.backbone)
        # Backward passes run in the precision of their forward pass, whatever surrounds them.
        with torch.autocast(first.device.type, enabled=False):
            for task, loss in losses.items():
                own = list(heads[task])
                gradients = torch.autograd.grad(loss, [*cut.leaves, *own], unit.to(loss), allow_unused=True)
                found.shared[task], found.heads[task] = gradients[: len(cut.leaves)], gradients[len(cut.leaves) :]
            if not on_features:
                for number, task in enumerate(losses):
                    keep = number < len(losses) - 1
                    found.shared[task] = _through_backbone(cut, found.shared[task], keep_graph=keep)
        return found

    def _deliver(
        self,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float],
        found: _Gradients,
        heads: Mapping[str, Sequence[Tensor]],
    ) -> Tensor:
        """Return the weighted sum, whose backward pass starts at the features and at the heads' parameters."""
        into: list[Tensor] = list(found.meets)
        gradients = [
            _combine([(weights[task], found.shared[task][place]) for task in losses]) for place in range(len(into))
        ]
        for task in losses:
            factor = self._of_head(weights[task])
            into += heads[task]
            gradients += [None if g is None else g * factor for g in found.heads[task]]
        if ranks() > 1:
            # What no loss of this rank reaches, another's may: all ranks deliver to the same parameters.
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(into, gradients, strict=True)]
        value = torch.stack([loss.detach() * weights[task] for task, loss in losses.items()]).sum()
        return deliver(value, gradients, into, found.scale)


def deliver(
    value: Tensor, gradients: Sequence[Tensor | None], into: Sequence[Tensor], scale: Tensor | None = None
) -> Tensor:
    """Return a scalar whose backward pass gives tensors gradients that are known beforehand.

    Precision plugins, accumulation and DDP then see the one backward pass that they expect.

    Args:
        value: The scalar's value.
        gradients: One for each tensor, or None for zero; whoever goes on with them gets them multiplied by what the
            scalar is multiplied by.
        into: The tensors, which require gradients.
        scale: By which the gradients have been multiplied, a scalar, if they have.
    """
    unit = torch.ones((), device=value.device) if scale is None else scale
    delivered: Tensor = _Delivery.apply(value, unit, gradients, *into)
    return delivered


class _Delivery(torch.autograd.Function):
    """What `deliver` returns the result of."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, gradients: Sequence[Tensor | None], *into: Tensor) -> Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradient / ctx.scale.to(gradient)
        delivered = [None if g is None else g * factor.to(g) for g in ctx.gradients]
        del ctx.gradients
        return None, None, None, *delivered


def means_on_host(*values: Tensor) -> list[Tensor]:
    """Return tensors, averaged over ranks, on the host in double precision, with one transfer for all of them.

    Args:
        values: Of any shapes; the first is on the device.
    """
    device = values[0].device
    packed = over_ranks(torch.cat([value.to(device, most_precise(device)).flatten() for value in values]))
    parts = torch.split(packed.cpu().double(), [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def _through_backbone(cut: Cut, of_features: Sequence[Tensor | None], *, keep_graph: bool) -> Sequence[Tensor | None]:
    """Return the gradients of the backbone's parameters that belong to gradients of its features, mean over ranks."""
    reached = [(f, g) for f, g in zip(cut.features, of_features, strict=True) if g is not None]
    gradients = torch.autograd.grad(
        [feature for feature, _ in reached],
        cut.backbone,
        [gradient for _, gradient in reached],
        retain_graph=keep_graph,
        allow_unused=True,
    )
    if ranks() == 1:
        return gradients
    # What this rank's losses do not reach, another's may: each rank has its part in every average.
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(cut.backbone, gradients, strict=True)]
    return [over_ranks(gradient) for gradient in filled]


def _combine(weighted: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """Return the weighted sum of gradients of one tensor."""
    total = None
    for weight, gradient in weighted:
        if gradient is not None:
            total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
    return total


def gram_matrix(gradients: Sequence[Sequence[Tensor | None]], of: Sequence[Tensor]) -> Tensor:
    """Return the inner products (T, T) of T tasks' gradients, summed over all elements of all tensors.

    Args:
        gradients: For each task its gradient of each tensor, or None for zero.
        of: The tensors.
    """
    # In single precision at least, whatever the default is.
    precision = torch.promote_types(of[0].dtype, torch.float32)
    matrix = torch.zeros(len(gradients), len(gradients), dtype=precision, device=of[0].device)
    for place, tensor in enumerate(of):
        flat = [None if g[place] is None else _flat(g[place], tensor) for g in gradients]
        for i, first in enumerate(flat):
            for j, second in enumerate(flat[: i + 1]):
                if first is not None and second is not None:
                    matrix[i, j] += torch.dot(first, second)
    return matrix.tril() + matrix.tril(-1).T


def _flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient as a vector of floats, in its tensor's order in memory, so that most need no copy."""
    assert gradient is not None
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))


def meeting(names: Sequence[str], gram: Tensor, weights: Sequence[float]) -> dict[str, float]:
    """Return how gradients meet: each task's share of the weighted gradients' norm, and the cosine of each pair.

    Args:
        names: The tasks.
        gram: Inner products (T, T) of their gradients.
        weights: Their weights.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    weighted = norms * torch.tensor(weights, dtype=norms.dtype).abs()
    shares = weighted / weighted.sum()
    cosines = gram / torch.outer(norms, norms)
    found = {f"train/gradient_share/{name}": float(share) for name, share in zip(names, shares, strict=True)}
    for i, first in enumerate(names):
        found |= {f"train/cosine/{first}-{second}": float(cosines[i, j]) for j, second in enumerate(names) if j > i}
    return found


def _terms(names: Sequence[str], losses: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    terms = {"train/loss": sum(weights[name] * losses[name] for name in names)}
    terms |= {f"train/loss/{name}": losses[name] for name in names}
    return terms | {f"train/weight/{name}": weights[name] for name in names}
