"""How the answers of several members become one, and how far apart they are."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mtl.errors import UserError, nearest
from mtl.tasks.base import Task
from mtl.tasks.normals import Normals

Kind = Literal["mean", "median", "logits", "vote"]
"""How answers are combined; `Task.soft` makes of a member's outputs what can be averaged.

======== ==================================================================================================
`mean`   mean of the members' probabilities, depths or unit vectors
`median` the same, median of each number by itself; between the middle two where the members are even in number.
         Probabilities are divided by their sum; where that is zero, as members are sure of different classes,
         their mean stands
`logits` mean of the heads' raw outputs, of which softmax and the like are taken then
`vote`   the class that most members predict, and of several with as many votes the one with the highest mean
         probability, of those the lowest index. As probabilities: the shares of the votes, with the mean
         probabilities as one voter more
======== ==================================================================================================

A median of vectors depends on the axes; `mean` does not.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Combined(NamedTuple):
    """What members say together. Shapes: B images of H x W pixels.

    The uncertainty is that of the members' mean, whatever the kind, so that those of several kinds can be compared:

    ======== =============================== ============================================= =======
    task     uncertainty                     disagreement                                  unit
    ======== =============================== ============================================= =======
    classes  entropy of the mean probability mutual information of class and member: that  nat
                                             entropy less the mean of the members' own
    normals  the angle whose cosine is the   the same                                      degree
             members' mean cosine to their
             mean direction
    others   standard deviation (of n, not   the same                                      its own
             n - 1), of channels the root of
             their mean square
    ======== =============================== ============================================= =======

    For classes the entropy has two parts: what the members agree is uncertain, and the mutual information, which more
    data or a larger model would remove (Depeweg et al. 2018, section 3; BALD, Houlsby et al. 2011). For small angles
    that of the normals is the root of the mean square of the angles to the mean direction.

    Attributes:
        prediction: As `Task.predict` returns it.
        soft: What it was made of: ``task.harden(soft)`` is the prediction.
        uncertainty: (B, H, W).
        disagreement: (B, H, W), the part of it that comes of the members' being of several opinions.
    """

    prediction: Tensor
    soft: Tensor
    uncertainty: Tensor
    disagreement: Tensor


def check_kind(kind: str, task: Task) -> None:
    """Refuse a way of combining that does not exist, or not for a task.

    Raises:
        UserError: Which, and what there is.
    """
    if kind not in KINDS:
        raise UserError(f"answers cannot be combined by {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
    if kind == "vote" and not task.class_names:
        raise UserError(
            f"a vote is for tasks that predict classes, which {task.name!r} does not; combine its answers by mean, "
            "median or logits"
        )


class Combination:
    """Takes members' answers one after another, and says what they come to.

    Only sums are kept, in single precision at least, whatever the number of members; a median needs all answers.

    Args:
        task: Whose answers.
        kind: How to combine them.

    Raises:
        UserError: The task's answers cannot be combined so.
    """

    def __init__(self, task: Task, kind: Kind = "mean") -> None:
        check_kind(kind, task)
        self.task, self.kind = task, kind
        self._count = 0
        # Of the members' soft answers, by Welford's recurrence: mean, and sum of squared distances from it.
        self._mean: Tensor | None = None
        self._squares = self._entropies = self._votes = self._outputs = torch.zeros(())
        self._all: list[Tensor] = []

    @torch.no_grad()
    def add(self, outputs: Tensor, task: Task | None = None) -> None:
        """Take a member's answer.

        Args:
            outputs: What the member's head returns, (B, C, H, W).
            task: The member's own task, where what it has learnt from the training labels may differ.
        """
        self._take((task or self.task).soft(outputs))
        if self.kind == "logits":
            self._outputs = self._outputs + outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    @torch.no_grad()
    def add_soft(self, soft: Tensor) -> None:
        """Take a member's answer as `Task.soft` returns it, such as a mean over views.

        Raises:
            UserError: What came before it was to be combined.
        """
        if self.kind == "logits":
            raise UserError(
                "answers to several views of an image are averaged as probabilities, depths or directions, so that "
                "members' outputs before that cannot be: combine by mean, median or vote, or leave the views out"
            )
        self._take(soft)

    def _take(self, soft: Tensor) -> None:
        soft = soft.to(torch.promote_types(soft.dtype, torch.float32))
        classes = len(self.task.class_names)
        if classes and soft.shape[1:2] != (classes,):
            raise UserError(
                f"what the task {self.task.name!r} averages has the shape {tuple(soft.shape)}, and not one probability "
                f"for each of its {classes} classes along the second axis: its class must say so in the method soft"
            )
        if self._mean is None:
            self._mean = torch.zeros_like(soft)
        self._count += 1
        change = soft - self._mean
        self._mean = self._mean + change / self._count
        if classes:
            self._entropies = self._entropies + entropy(soft)
        else:
            self._squares = self._squares + change * (soft - self._mean)
        if self.kind == "vote":
            vote = self.task.harden(soft)[:, None]
            self._votes = self._votes + torch.zeros_like(soft).scatter_(1, vote, 1)
        elif self.kind == "median":
            self._all.append(soft)

    @torch.no_grad()
    def result(self) -> Combined:
        """Return what the members so far say together.

        Raises:
            UserError: There is none.
        """
        if self._mean is None:
            raise UserError(f"there is no answer of the task {self.task.name!r} to combine: give at least one member")
        soft = self._soft(self._mean)
        uncertainty = self._uncertainty(self._mean)
        disagreement = uncertainty
        if self.task.class_names:
            disagreement = (uncertainty - self._entropies / self._count).clamp(min=0)
        return Combined(self.task.harden(soft), soft, uncertainty, disagreement)

    def _soft(self, mean: Tensor) -> Tensor:
        if self.kind == "logits":
            return self.task.soft(self._outputs / self._count)
        if self.kind == "vote":
            # The mean's shares are less than a vote, but where all members agree: they decide between equals alone.
            return (self._votes + mean) / (self._count + 1)
        if self.kind == "median":
            ordered = torch.stack(self._all).sort(dim=0).values
            median = (ordered[(self._count - 1) // 2] + ordered[self._count // 2]) / 2
            if not self.task.class_names:
                return median
            total = median.sum(dim=1, keepdim=True)
            return torch.where(total > 0, median / total, mean)
        return mean

    def _uncertainty(self, mean: Tensor) -> Tensor:
        if self.task.class_names:
            return entropy(mean)
        variance = self._squares / self._count
        if isinstance(self.task, Normals):
            # The mean of unit vectors has the length of their mean cosine c to its direction, and the mean of their
            # squared distances from it is 1 - c², here without the cancellation.
            cosine = torch.linalg.vector_norm(mean, dim=1)
            return torch.atan2(variance.sum(dim=1).clamp(min=0).sqrt(), cosine).rad2deg()
        variance = variance.clamp(min=0)
        return (variance.mean(dim=1) if variance.dim() == 4 else variance).sqrt()


def combine(kind: Kind, outputs: Iterable[Tensor], task: Task) -> Combined:
    """Return what several members say together of the same images.

    Args:
        kind: How to combine.
        outputs: Each member's outputs (B, C, H, W), one after another.
        task: Whose outputs.

    Raises:
        UserError: The task's answers cannot be combined so, or there are none.
    """
    combination = Combination(task, kind)
    for answer in outputs:
        combination.add(answer)
    return combination.result()


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats (B, ...) of probabilities (B, C, ...)."""
    nats: Tensor = torch.special.entr(probabilities).sum(dim=1)
    return nats
