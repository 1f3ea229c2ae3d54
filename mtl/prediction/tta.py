"""Test-time augmentation: a model is asked about several views of an image, and its answers are averaged."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.signals import SignalBackbone
from mtl.training.module import MultiTaskModule

SCALES = (0.8, 1.25)
"""Scales beside the image's own. One is the other's inverse: depth that a model gets wrong by a power of the scale,
for want of having learnt a convention, is wrong by little in the mean."""

_FURTHEST = 4.0
"""The largest scale; the smallest is its inverse."""


class AveragedViews:
    """A trained model that looks at an image and at its mirror image, both at several scales.

    Each view's outputs become what can be averaged (`Task.soft`: probabilities, metres, unit vectors), are turned
    back into what they say of the image itself (`Task.mirrored`, `Task.rescaled` with the depth convention of the
    training) and resampled to its size; only the mean becomes a prediction (`Task.harden`). Images and answers are
    resampled so that the pixels' areas stay aligned, and averaged where they shrink: nothing is shifted, although
    a scaled side is a whole number of pixels. Six views at the default scales cost 6.4 times one.

    Args:
        module: Model and tasks; the caller puts it into evaluation mode.
        scales: Relative to the size of what is given, beside 1; none are needed for the mirror image alone.

    Raises:
        UserError: A scale is not allowed, or the backbone takes images of one size only, or signals.
    """

    def __init__(self, module: MultiTaskModule, scales: Sequence[float] = SCALES) -> None:
        for scale in scales:
            if not 1 / _FURTHEST <= scale <= _FURTHEST:
                raise UserError(
                    f"a scale of {scale:g} for test-time augmentation is not from {1 / _FURTHEST:g} to {_FURTHEST:g}"
                )
        self.module = module
        self.scales = tuple(dict.fromkeys((1.0, *scales)))
        backbone = module.model.backbone
        if isinstance(backbone, SignalBackbone):
            raise UserError(
                f"test-time augmentation is of pictures, and {backbone.name} takes signals, whose mirror images are"
                " others: leave it out"
            )
        if len(self.scales) > 1 and "img_size" in backbone.size_arguments:
            raise UserError(
                f"the backbone {backbone.name!r} takes images of one size only, so that test-time augmentation cannot"
                f" show it the scales {', '.join(f'{scale:g}' for scale in self.scales[1:])}: take the flip alone"
            )

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Return each task's prediction for images (B, 3, H, W) in [0, 1], as the module itself does for one view."""
        soft = self.soft(image)
        return {task.name: task.harden(soft[task.name]) for task in self.module.each_task()}

    @torch.no_grad()
    def soft(self, image: Tensor) -> dict[str, Tensor]:
        """Return the mean over views of each task's `Task.soft`, for images (B, 3, H, W) in [0, 1]."""
        sums: dict[str, Tensor] = {}
        for name, soft in self.each(image):
            sums[name] = sums[name] + soft if name in sums else soft
        return {name: total / (2 * len(self.scales)) for name, total in sums.items()}

    @torch.no_grad()
    def each(self, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield, view by view and by the tasks' names, what each view of images (B, 3, H, W) says of them."""
        for scale in self.scales:
            yield from self._at(scale, image)

    def _at(self, scale: float, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield, by the tasks' names, what the image and its mirror image at a scale say of the image itself."""
        height, width = image.shape[-2:]
        shown = _resize(image, (max(1, round(scale * height)), max(1, round(scale * width))))
        # As the sides are rounded: what the areas are scaled by, which is what the convention speaks of.
        factor = math.sqrt(shown.shape[-2] * shown.shape[-1] / (height * width))
        convention = self.module.options.augmentation.depth_convention or "metric"
        for flipped in (False, True):
            outputs = self.module.model(shown.flip(-1) if flipped else shown)
            for task in self.module.each_task():
                soft = task.soft(outputs[task.name])
                soft = task.mirrored(soft) if flipped else soft
                yield task.name, _resize(task.rescaled(soft, factor, convention), (height, width))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample floats (B, H, W) or (B, C, H, W) linearly, over areas where they shrink."""
    if maps.shape[-2:] == size:
        return maps
    # torch averages areas in no half precision on the CPU.
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    exact = exact if maps.dim() == 4 else exact[:, None]
    resized = functional.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=True)
    return (resized if maps.dim() == 4 else resized[:, 0]).to(maps.dtype)
