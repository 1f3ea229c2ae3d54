"""What a weighting rule is: from the tasks' losses to their weights in the sum."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Weighting(nn.Module, ABC):
    """A rule that combines the losses of several tasks.

    It is a module, so that what it learns or remembers (parameters, buffers) is optimized with everything else and
    travels in checkpoints. It never asks what a task is.

    Args:
        tasks: The tasks' names, in order.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weight of each task's loss: scalar tensors of floats, finite, 0 or more, and one of them positive.

        Args:
            losses: Scalar losses by task, attached to the graph: detach what is not to be differentiated. That of a
                batch without a label of the task is zero, and must not make a weight infinite.
        """
