"""One backbone, one head for each task."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.models.heads import Head
from mtl.models.signals import LinearHead, SignalBackbone
from mtl.models.statistics import kept_statistics

if TYPE_CHECKING:
    from mtl.pretraining.head import MaskedHead
    from mtl.pretraining.token_drop import Visible


class MultiTaskModel(nn.Module):
    """A shared backbone and a head for each task, of images or of signals.

    What is said below of images (B, 3, H, W) in [0, 1] and their size (H, W) holds for signals (B, 1, T) of the size
    (T,), too; their features are (B, F), and outputs (B, C), which have no places.

    Args:
        backbone: The shared encoder.
        heads: Each task's head, by the task's name.
        masked: What hides patches and predicts them, in a pass through the backbone of its own, or None.
    """

    def __init__(
        self,
        backbone: Backbone | SignalBackbone,
        heads: Mapping[str, Head | LinearHead],
        masked: "MaskedHead | None" = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.masked = masked

    @property
    def parts(self) -> "dict[str, tuple[str, Head | LinearHead | MaskedHead]]":
        """Return each task's head, and before it the head's name among this module's own."""
        heads: dict[str, tuple[str, Head | LinearHead | MaskedHead]] = {
            task: (f"heads.{task}", cast(Head, head)) for task, head in self.heads.items()
        }
        return heads if self.masked is None else {**heads, "masked": ("masked", self.masked)}

    def head(self, task: str) -> "Head | LinearHead | MaskedHead":
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
        return self.decode(self.encode(image), image.shape[2:])

    def encode(self, image: Tensor) -> Pyramid | Tensor:
        """Return the shared features of images (B, 3, H, W) in [0, 1].

        An image whose sides are not multiples of the backbone's stride is extended at its right and lower
        edges by repeating the last pixels, and the outputs are cut back. Every map of the pyramid then covers
        the image exactly, where otherwise the coarser maps would be stretched against the finer.

        Raises:
            UserError: The images are not floats.
        """
        if not image.is_floating_point():
            raise UserError(f"images must be floats in [0, 1], not {image.dtype}; divide bytes by 255")
        size = tuple(image.shape[2:])
        missing = [extended - side for extended, side in zip(self._extended(size), size, strict=True)]
        if any(missing):
            # The last axis first.
            image = functional.pad(image, [p for after in reversed(missing) for p in (0, after)], mode="replicate")
        features: Pyramid | Tensor = self.backbone(image)
        return features

    def decode(self, features: Pyramid | Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        """Return each task's outputs (B, C, H, W) for the features of images of `size` = (H, W)."""
        extended = self._extended(size)
        outputs = {name: head(features, extended) for name, head in self.heads.items()}
        if extended == tuple(size):
            return outputs
        return {name: whole[(..., *map(slice, size))] for name, whole in outputs.items()}

    def encode_masked(self, image: Tensor, mask: Tensor) -> "Visible | Pyramid":
        """Return the features of what is visible of images (B, 3, H, W) in [0, 1], of any size.

        Where there are other heads, which read whole images, running statistics stay those of whole images.

        Args:
            image: The images.
            mask: (B, h, w) bool, True where hidden, from the masked head's `draw`.
        """
        assert self.masked is not None and isinstance(self.backbone, Backbone)
        with kept_statistics(self.backbone) if len(self.heads) else nullcontext():
            return self.masked.encode(self.backbone, image, mask)

    def _extended(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the next multiples of the backbone's stride."""
        stride = self.backbone.stride
        return tuple(-(-side // stride) * stride for side in size)
