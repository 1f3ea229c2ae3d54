"""The head of the task `masked`: it hides patches of pictures and predicts them from the rest."""

from typing import Any

import torch
from torch import Tensor, nn

from mtl.augmentation.draws import Draws
from mtl.config import MaskOptions
from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.pretraining.decoders import PyramidDecoder, TokenDecoder
from mtl.pretraining.masked_convolution import masked_features
from mtl.pretraining.masked_input import MaskedInput
from mtl.pretraining.masks import check_patch, draw_masks, extend, grid_of, hidden_count
from mtl.pretraining.methods import Method, check_method, method_of
from mtl.pretraining.targets import resize_mask, unpatchify
from mtl.pretraining.token_drop import Visible, encode_visible, visible_tokens

_RATIOS: dict[Method, float] = {"tokens": 0.75, "convolution": 0.6, "input": 0.6}
"""Shares to hide as in MAE, SparK and FCMAE, and SimMIM."""

_DEPTH = 4
"""Blocks of a transformer that decodes tokens."""


class MaskedHead(nn.Module):
    """What hides patches of a backbone's pictures, each family's in its own way, and predicts what they hide.

    A pass is `draw`, `encode`, and the module itself. The backbone is lent to `encode` and not part of the module, so
    that the parameters here are those to be thrown away, except `timm_tensors`.

    Args:
        backbone: The backbone to be trained.
        options: What to hide, and the decoder's size.
        patch: Side in pixels of the patches that are hidden, a multiple of the coarsest map's stride.

    Attributes:
        method: How: "tokens", "convolution" or "input", see `mtl.pretraining.methods`.
        patch: Side of a patch in pixels.
        ratio: Share of the patches that are hidden, but for rounding to whole patches.
        target: What is predicted of them, see `mtl.pretraining.targets`.
        cover: What stands in hidden pixels where the encoder sees them ("input"), else None.

    Raises:
        UserError: The method, the patch or the decoder's depth does not suit the backbone.
    """

    def __init__(self, backbone: Backbone, options: MaskOptions, patch: int) -> None:
        super().__init__()
        check_patch(backbone, patch)
        if options.method == "auto":
            self.method = method_of(backbone)
        else:
            check_method(backbone, options.method)
            self.method = options.method
        if options.decoder_depth is not None and self.method != "tokens":
            raise UserError(
                f"--mask.decoder-depth {options.decoder_depth}: {backbone.name!r} is masked by the method "
                f"{self.method!r}, whose decoder has no transformer; leave the option out"
            )
        self.patch = patch
        self.ratio = _RATIOS[self.method] if options.ratio is None else options.ratio
        self.blocks, self.target = options.blocks, options.target
        self.cover = MaskedInput(patch) if self.method == "input" else None
        width, depth = options.decoder_width, options.decoder_depth or _DEPTH
        self.decoder: TokenDecoder | PyramidDecoder = (
            TokenDecoder(backbone, patch, width, depth)
            if self.method == "tokens"
            else PyramidDecoder(backbone, patch, width, fill=self.method == "convolution")
        )
        self._encode_visible = encode_visible

    def summary(self, size: tuple[int, int]) -> str:
        """Say in a line what is hidden of images of `size` = (H, W) pixels."""
        rows, columns = grid_of(size, self.patch)
        count = hidden_count((rows, columns), self.ratio)
        return f"masked ({self.method}): {count} of {rows * columns} patches of {self.patch} pixels are hidden"

    def draw(self, draws: Draws, size: tuple[int, int]) -> Tensor:
        """Return masks (B, h, w) bool for images of `size` = (H, W) pixels, True where hidden.

        Args:
            draws: The random numbers of B samples.
            size: Height and width; the last patches may reach beyond them.

        Raises:
            UserError: The ratio hides all of the patches, or none.
        """
        return draw_masks(draws, grid_of(size, self.patch), self.ratio, blocks=self.blocks)

    def encode(self, backbone: Backbone, image: Tensor, mask: Tensor) -> Visible | Pyramid:
        """Return what the backbone makes of images whose hidden patches it does not see.

        Args:
            backbone: The one that this was made for; frozen parts are inert as ever.
            image: (B, 3, H, W) in [0, 1], extended to whole patches here.
            mask: (B, h, w) bool, as from `draw`: equally many are hidden in each image.

        Raises:
            ValueError: Images have different numbers of visible patches, or the mask's grid does not fit the image.
            UserError: Maps inside a convolutional backbone have sizes that no patches fit.
        """
        image = extend(image, self.patch)
        if self.method == "tokens":
            return visible_tokens(backbone, image, mask, self._encode_visible)
        features = masked_features if self.cover is None else self.cover
        pyramid: Pyramid = features(backbone, image, mask)
        return pyramid

    def forward(self, features: Visible | Pyramid, mask: Tensor) -> Tensor:
        """Return outputs (B, 4, H', W') of at least single precision, at the size of the extended images.

        Three channels are predicted colours, in the space of the target; the fourth is 1 where hidden, else 0.

        Args:
            features: Result of `encode`.
            mask: The same mask (B, h, w).
        """
        patches = self.decoder(features) if isinstance(features, Visible) else self.decoder(features.maps, mask)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        colours = unpatchify(patches, (mask.shape[1], mask.shape[2]))
        hidden = resize_mask(mask, (colours.shape[-2], colours.shape[-1])).unsqueeze(1)
        return torch.cat([colours, hidden.to(colours.dtype)], dim=1)

    def set_bias(self, bias: Tensor) -> None:
        """Set the colour (3,) that is predicted everywhere by the last layer's bias, where training is to start."""
        self.decoder.set_bias(bias)

    def timm_tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors that are trained here and not in its `Backbone`, by timm's names."""
        return self.decoder.timm_tensors()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder on visible tokens and the decoder; masked convolution, which is all hooks, stays eager.

        Where pixels are covered, the encoder is the backbone's own program, compiled or not.
        """
        self._encode_visible = torch.compile(encode_visible, *args, **kwargs)
        self.decoder.compile(*args, **kwargs)

    def checkpoint_gradients(self) -> None:
        """Let the decoder recompute activations in the backward pass instead of storing them."""
        self.decoder.grad_checkpointing = True
