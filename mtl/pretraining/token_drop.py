"""Token drop: a plain vision transformer that computes nothing but the visible patches."""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from timm.models import checkpoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mtl.models.backbone import Backbone
from mtl.pretraining.targets import resize_mask


class Visible(NamedTuple):
    """What a plain vision transformer says about the visible patches of B images.

    Attributes:
        prefix: Its P class, distillation and register tokens (B, P, C).
        tokens: The n visible patches (B, n, C), as the last block left them: without the final norm.
        indices: Where those are in the grid, row by row (B, n), ascending.
        grid: Height and width of the grid, in patches of the transformer's own size.
    """

    prefix: Tensor
    tokens: Tensor
    indices: Tensor
    grid: tuple[int, int]


Encode = Callable[[Backbone, Tensor, Tensor], Visible]
"""What does as `encode_visible` does."""


def can_drop_tokens(backbone: Backbone) -> bool:
    """Return whether a backbone can be computed on its visible patches alone.

    That takes a patch embedding that keeps patches apart (which the convolutions in front of hybrids do not), and
    attention that does not care how many tokens there are: positions added to the tokens or rotary, rather than a
    bias between every two positions (BEiT), windows (SAM) or packed sequences (NaFlex).
    """
    model = getattr(backbone.encoder, "model", None)
    return isinstance(model, VisionTransformer | Eva) and type(model.patch_embed) is PatchEmbed


def visible_indices(mask: Tensor, count: int | None = None) -> Tensor:
    """Return where the visible patches are (B, n), row by row, ascending.

    Args:
        mask: (B, h, w) bool, True where hidden.
        count: How many are visible in each image, where that is known: without it a device's queue is waited for.

    Raises:
        ValueError: Images have different numbers of visible patches, or none.
    """
    if count is None:
        fewest, most = torch.stack((~mask).flatten(1).sum(1).aminmax()).tolist()
        if not 0 < fewest == most:
            raise ValueError(f"masks must leave equally many patches visible, at least one, not {fewest} to {most}")
        count = int(most)
    return mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def visible_tokens(backbone: Backbone, image: Tensor, mask: Tensor, encode: Encode | None = None) -> Visible:
    """Compute a plain vision transformer's last block on the visible patches alone.

    Hidden pixels reach nothing: whatever they are, the result is the same to the last bit.

    Args:
        backbone: One that `can_drop_tokens`.
        image: (B, 3, H, W) in [0, 1], H and W multiples of the mask's patches.
        mask: (B, h, w) bool, True where hidden, with equally many hidden in each image; its patches may be several
            of the transformer's own in height and width.
        encode: `encode_visible` in a compiled form, or None for itself.

    Raises:
        ValueError: Images have different numbers of visible patches, or the mask's grid does not fit the image.
    """
    patch = backbone.strides[-1]
    mask = resize_mask(mask, (image.shape[-2] // patch, image.shape[-1] // patch))
    return (encode or encode_visible)(backbone, image, visible_indices(mask))


def encode_visible(backbone: Backbone, image: Tensor, indices: Tensor) -> Visible:
    """Do what `visible_tokens` does for given patches, in a way that torch.compile takes as one graph.

    The steps are those of timm's ``forward_features`` with ``patch_drop`` (He et al. 2022, Masked Autoencoders Are
    Scalable Vision Learners, section 3), whose choice of patches cannot be told from outside: positions are added to
    all tokens first, and a rotary table loses the same rows that the tokens do. What is frozen builds no graph.

    Args:
        backbone: One that `can_drop_tokens`.
        image: (B, 3, H, W) in [0, 1].
        indices: Result of `visible_indices` for the grid of the transformer's own patches.
    """
    model = backbone.encoder.model
    patch = backbone.strides[-1]
    prefixes = model.num_prefix_tokens
    if backbone.frozen_stages:
        image = image.detach()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone.frozen):
        tokens, rope = _embed(model, (image - backbone.mean) / backbone.std)
        rows = indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        tokens = torch.cat([tokens[:, :prefixes], tokens[:, prefixes:].gather(1, rows)], dim=1)
        tokens = model.norm_pre(tokens)
        for block, rope_rows in zip(model.blocks, _rope_rows(rope, tokens, indices), strict=False):
            arguments = {} if rope_rows is None else {"rope": rope_rows}
            tokens = checkpoint(block, tokens, **arguments) if model.grad_checkpointing else block(tokens, **arguments)
    grid = (image.shape[-2] // patch, image.shape[-1] // patch)
    return Visible(tokens[:, :prefixes], tokens[:, prefixes:], indices, grid)


def _embed(model: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return all tokens with their positions, prefix first, and the rotary table where there is one."""
    patches = model.patch_embed(image)
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(patches)
        return tokens, rope
    return model._pos_embed(patches), None


def _rope_rows(rope: Tensor | None, tokens: Tensor, indices: Tensor) -> Iterator[Tensor | None]:
    """Return, block after block, the rotary table of the visible patches, with an axis for the heads.

    Args:
        rope: One for all blocks and heads (N, D), one for each ("mixed": depth x heads x N x D), or None.
        tokens: The visible tokens, for their number of images.
        indices: (B, n).
    """
    if rope is None:
        return repeat(None)
    visible: Tensor = apply_keep_indices_nlc(tokens, rope, indices)
    return iter(visible.unbind(1)) if rope.ndim == 4 else repeat(visible.unsqueeze(1))
