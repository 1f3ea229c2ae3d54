"""One backbone, one head for each task."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.models.heads import Head


class MultiTaskModel(nn.Module):
    """A shared backbone and a head for each task.

    Args:
        backbone: The shared encoder.
        heads: Each task's head, by the task's name.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def head(self, task: str) -> Head:
        """Return a task's head."""
        return cast(Head, self.heads[task])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return each task's outputs (B, C, H, W) for images (B, 3, H, W) in [0, 1].

        An image whose sides are not multiples of the backbone's stride is extended at its right and lower
        edges by repeating the last pixels, and the outputs are cut back. Every map of the pyramid then covers
        the image exactly, where otherwise the coarser maps would be stretched against the finer.

        Raises:
            UserError: The images are not floats.
        """
        if not image.is_floating_point():
            raise UserError(f"images must be floats in [0, 1], not {image.dtype}; divide bytes by 255")
        height, width = image.shape[-2:]
        stride = self.backbone.stride
        padding = (0, -width % stride, 0, -height % stride)
        if any(padding):
            image = functional.pad(image, padding, mode="replicate")
        pyramid = self.backbone(image)
        size = (image.shape[-2], image.shape[-1])
        return {name: head(pyramid, size)[..., :height, :width] for name, head in self.heads.items()}
