"""One backbone, one head for each task."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.models.heads import Head
from mtl.pretraining.statistics import kept_statistics

if TYPE_CHECKING:
    from mtl.pretraining.head import MaskedHead
    from mtl.pretraining.token_drop import Visible


class MultiTaskModel(nn.Module):
    """A shared backbone and a head for each task.

    Args:
        backbone: The shared encoder.
        heads: Each task's head, by the task's name.
        masked: What hides patches and predicts them, in a pass through the backbone of its own, or None.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head], masked: "MaskedHead | None" = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.masked = masked

    @property
    def parts(self) -> "dict[str, tuple[str, Head | MaskedHead]]":
        """Return each task's head, and before it the head's name among this module's own."""
        heads: dict[str, tuple[str, Head | MaskedHead]] = {
            task: (f"heads.{task}", cast(Head, head)) for task, head in self.heads.items()
        }
        return heads if self.masked is None else {**heads, "masked": ("masked", self.masked)}

    def head(self, task: str) -> "Head | MaskedHead":
        """Return a task's head."""
        return self.parts[task][1]

    def before_features(self) -> list[nn.Parameter]:
        """Return what the features depend on and learns: the backbone's parameters, and a token in hidden pixels."""
        covers = [] if self.masked is None or self.masked.cover is None else list(self.masked.cover.parameters())
        return [p for p in (*self.backbone.parameters(), *covers) if p.requires_grad]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile backbone and heads, each by itself: training may need the features between them."""
        parts = [self.backbone, *self.heads.values(), *([] if self.masked is None else [self.masked])]
        for part in parts:
            part.compile(*args, **kwargs)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return each task's outputs (B, C, H, W) for images (B, 3, H, W) in [0, 1].

        Raises:
            UserError: The images are not floats.
        """
        return self.decode(self.encode(image), (image.shape[-2], image.shape[-1]))

    def encode(self, image: Tensor) -> Pyramid:
        """Return the shared features of images (B, 3, H, W) in [0, 1].

        An image whose sides are not multiples of the backbone's stride is extended at its right and lower
        edges by repeating the last pixels, and the outputs are cut back. Every map of the pyramid then covers
        the image exactly, where otherwise the coarser maps would be stretched against the finer.

        Raises:
            UserError: The images are not floats.
        """
        if not image.is_floating_point():
            raise UserError(f"images must be floats in [0, 1], not {image.dtype}; divide bytes by 255")
        height, width = self._extended((image.shape[-2], image.shape[-1]))
        padding = (0, width - image.shape[-1], 0, height - image.shape[-2])
        if any(padding):
            image = functional.pad(image, padding, mode="replicate")
        pyramid: Pyramid = self.backbone(image)
        return pyramid

    def decode(self, pyramid: Pyramid, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return each task's outputs (B, C, H, W) for the features of images of `size` = (H, W)."""
        extended = self._extended(size)
        return {name: head(pyramid, extended)[..., : size[0], : size[1]] for name, head in self.heads.items()}

    def encode_masked(self, image: Tensor, mask: Tensor) -> "Visible | Pyramid":
        """Return the features of what is visible of images (B, 3, H, W) in [0, 1], of any size.

        Where there are other heads, which read whole images, running statistics stay those of whole images.

        Args:
            image: The images.
            mask: (B, h, w) bool, True where hidden, from the masked head's `draw`.
        """
        assert self.masked is not None
        with kept_statistics(self.backbone) if len(self.heads) else nullcontext():
            return self.masked.encode(self.backbone, image, mask)

    def _extended(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the next multiples of the backbone's stride."""
        stride = self.backbone.stride
        return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride
