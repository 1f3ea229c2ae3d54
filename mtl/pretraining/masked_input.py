"""Masked input: a learned patch in place of what is hidden, for any encoder."""

import torch
from torch import Tensor, nn

from mtl.models.backbone import Backbone, Pyramid
from mtl.pretraining.targets import resize_mask
from mtl.pretraining.twins import twin


class MaskedInput(nn.Module):
    """What any backbone makes of pictures whose hidden patches are replaced by a learned one.

    SimMIM (Xie et al. 2022, https://arxiv.org/abs/2111.09886, section 3.2) puts a learned vector behind the patch
    embedding. A learned patch of pixels in front of it is turned into such a vector by an embedding that keeps patches
    apart, and has a meaning for every other stem as well; no encoder needs to be opened.

    Args:
        patch: Side of a patch in pixels.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        # In the units of a backbone's normalised input, where 0 is the mean colour.
        self.token = nn.Parameter(torch.zeros(3, patch, patch))

    def forward(self, backbone: Backbone, image: Tensor, mask: Tensor) -> Pyramid:
        """Return the pyramid, in which hidden positions hold what the backbone makes of its surroundings.

        Args:
            backbone: Any; frozen parts are inert as ever.
            image: (B, 3, H, W) in [0, 1], H and W as many patches as the mask has.
            mask: (B, h, w) bool, True where hidden.

        Raises:
            ValueError: The mask's patches do not fit the image.
        """
        covered = self.cover(backbone, image, mask)
        # What gradient checkpointing computes anew is to be as it is here, where statistics may be kept, and not later.
        pyramid: Pyramid = (twin(backbone) if backbone._compiled_call_impl is None else backbone)(covered)
        return pyramid

    def cover(self, backbone: Backbone, image: Tensor, mask: Tensor) -> Tensor:
        """Return images (B, 3, H, W) with the learned patch in place of those hidden."""
        (height, width), patch = mask.shape[1:], self.token.shape[-1]
        if image.shape[-2:] != (height * patch, width * patch):
            raise ValueError(
                f"a mask of {height}x{width} patches of {patch} pixels does not fit an image of "
                f"{image.shape[-2]}x{image.shape[-1]}"
            )
        pixels = (self.token * backbone.std + backbone.mean).repeat(1, 1, height, width).to(image.dtype)
        return torch.where(resize_mask(mask, (image.shape[-2], image.shape[-1])).unsqueeze(1), pixels, image)
