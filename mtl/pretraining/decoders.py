"""Light decoders from a masked view's features to its pixels; thrown away after pretraining."""

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import LayerNorm, LayerNorm2d
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import checkpoint, checkpoint_seq
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.pretraining.masks import check_patch
from mtl.pretraining.targets import patchify, resize_mask, unpatchify
from mtl.pretraining.token_drop import Visible
from mtl.transfer.layers import full_model

_HEAD = 32
"""Channels of each head of attention, as in MAE's decoder."""

_NARROWEST = 64
"""Channels that a fine level has at least: a patch of 4 x 4 pixels has 48 values."""


class TokenDecoder(nn.Module):
    """MAE's decoder: visible tokens and mask tokens, each with its position, through a small transformer.

    He et al. 2022, Masked Autoencoders Are Scalable Vision Learners (https://arxiv.org/abs/2111.06377), section 3.
    Theirs has a width of 512 and a depth of 8; in their Table 1 a narrower or shallower one is as good for fine-tuning,
    and less so for frozen features.

    Args:
        backbone: A plain vision transformer.
        patch: Side in pixels of the patches to predict, a multiple of the transformer's own.
        width: Channels, a multiple of 32.
        depth: Transformer blocks.

    Attributes:
        norm: The encoder's final norm, which a `Backbone` lacks: a new one, of the kind that timm's model has.
        grad_checkpointing: Whether the blocks recompute their activations instead of storing them.

    Raises:
        UserError: The width or the patch is no such multiple.
    """

    def __init__(self, backbone: Backbone, patch: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        if width % _HEAD:
            raise UserError(f"--mask.decoder-width {width} is not a multiple of {_HEAD}, which each head of it has")
        own = backbone.strides[-1]
        check_patch(backbone, patch)
        self.patch = patch
        self.grad_checkpointing = False
        self.embed = nn.Linear(backbone.channels[-1], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, width // _HEAD, qkv_bias=True) for _ in range(depth)))
        self.last_norm = LayerNorm(width)
        self.predict = nn.Linear(width, own * own * 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        norm = full_model(backbone.name).norm
        self._of_timm = any(True for _ in norm.parameters())
        self.norm = norm.to_empty(device="cpu") if self._of_timm else LayerNorm(backbone.channels[-1])
        self.norm.reset_parameters()

    def forward(self, visible: Visible) -> Tensor:
        """Return predictions of all patches (B, N, patch * patch * 3), ordered as in `mtl.pretraining.targets`."""
        prefixes = visible.prefix.shape[1]
        tokens = self.embed(self.norm(torch.cat([visible.prefix, visible.tokens], dim=1)))
        width = tokens.shape[-1]
        positions = build_sincos2d_pos_embed(list(visible.grid), width, device=tokens.device)
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), len(positions), -1)
        patches = hidden.scatter(1, visible.indices.unsqueeze(-1).expand(-1, -1, width), tokens[:, prefixes:])
        tokens = torch.cat([tokens[:, :prefixes], patches + positions.to(patches.dtype)], dim=1)
        tokens = checkpoint_seq(self.blocks, tokens) if self.grad_checkpointing else self.blocks(tokens)
        return _regroup(self.predict(self.last_norm(tokens[:, prefixes:])), visible.grid, self.patch)

    def set_bias(self, bias: Tensor) -> None:
        """Set the last layer's bias to a colour (3,)."""
        with torch.no_grad():
            self.predict.bias.view(-1, 3).copy_(bias)

    def timm_tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors that were trained here and not in its `Backbone`, by timm's names.

        It is the final norm, and nothing where timm's model has none (but one after pooling, which has seen nothing).
        """
        return {f"norm.{name}": value for name, value in self.norm.state_dict().items()} if self._of_timm else {}


class PyramidDecoder(nn.Module):
    """A small U-Net from a pyramid of feature maps to pixels.

    Each level from stride 4 on (of a plain transformer's equal maps the last) is normalised at each position by
    itself and brought to a width, which halves with the stride; going up, a transposed convolution without overlap
    and a ConvNeXt block join it to the next. As in SparK (Tian et al. 2023, https://arxiv.org/abs/2301.03580) a
    learned token for each level stands where a patch is hidden, as the encoder has nothing to say there; the block is
    the one that FCMAE decodes with (Woo et al. 2023, https://arxiv.org/abs/2301.00808).

    Args:
        backbone: The backbone whose pyramid this will read.
        patch: Side in pixels of the patches to predict, a multiple of the coarsest map's stride.
        width: Channels of the coarsest level.
        fill: Whether features at hidden positions are replaced by tokens. Where the encoder sees mask tokens
            itself ("input"), what it makes of them is what is decoded.

    Attributes:
        grad_checkpointing: Whether the blocks recompute their activations instead of storing them.

    Raises:
        UserError: The patch is no such multiple.
    """

    def __init__(self, backbone: Backbone, patch: int, width: int = 256, *, fill: bool = True) -> None:
        super().__init__()
        last = {stride: level for level, stride in enumerate(backbone.strides) if stride >= 4}
        strides = sorted(last, reverse=True)
        check_patch(backbone, patch)
        self.patch = patch
        self.grad_checkpointing = False
        self.levels = [last[stride] for stride in strides]
        self.stride = strides[-1]
        channels = [backbone.channels[level] for level in self.levels]
        widths = [max(width >> step, min(width, _NARROWEST)) for step in range(len(strides))]
        self.laterals = nn.ModuleList(
            nn.Sequential(LayerNorm2d(inner), nn.Conv2d(inner, outer, kernel_size=1))
            for inner, outer in zip(channels, widths, strict=True)
        )
        self.tokens = nn.ParameterList(torch.zeros(1, outer, 1, 1) for outer in widths) if fill else None
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, kernel_size=above // below, stride=above // below)
            for coarse, fine, above, below in zip(widths, widths[1:], strides, strides[1:], strict=False)
        )
        self.blocks = nn.ModuleList(ConvNeXtBlock(outer, ls_init_value=None) for outer in widths)
        self.predict = nn.Conv2d(widths[-1], self.stride**2 * 3, kernel_size=1)
        for token in self.tokens or ():
            nn.init.normal_(token, std=0.02)

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Return predictions of all patches (B, N, patch * patch * 3), ordered as in `mtl.pretraining.targets`.

        Args:
            maps: The pyramid's maps.
            mask: (B, h, w) bool, True where hidden.
        """
        features: Tensor | None = None
        for step, level in enumerate(self.levels):
            lateral = self.laterals[step](maps[level])
            if self.tokens is not None:
                hidden = resize_mask(mask, (lateral.shape[-2], lateral.shape[-1])).unsqueeze(1)
                lateral = torch.where(hidden, self.tokens[step].to(lateral.dtype), lateral)
            joined = lateral if features is None else lateral + self.ups[step - 1](features)
            block = self.blocks[step]
            features = checkpoint(block, joined) if self.grad_checkpointing else block(joined)
        return patchify(functional.pixel_shuffle(self.predict(features), self.stride), self.patch)

    def set_bias(self, bias: Tensor) -> None:
        """Set the last layer's bias to a colour (3,)."""
        with torch.no_grad():
            cast(Tensor, self.predict.bias).view(3, -1).copy_(bias.unsqueeze(-1))

    def timm_tensors(self) -> dict[str, Tensor]:
        """Return nothing: no tensor of the encoder is trained here."""
        return {}


def _regroup(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Return patches (B, h * w, p * p * 3) of a grid (h, w) as patches of another size."""
    if patches.shape[-1] == patch * patch * 3:
        return patches
    return patchify(unpatchify(patches, grid), patch)
