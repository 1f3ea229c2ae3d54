"""Heads: a segmentation-models-pytorch decoder, a last convolution, and an upsampling without shift."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional

from mtl.config import DECODERS
from mtl.errors import UserError, nearest
from mtl.models.backbone import Backbone, Pyramid, dpt_stride


class Decoder(NamedTuple):
    """How one of segmentation-models-pytorch's decoders is built.

    Attributes:
        build: From a backbone and a width to the module.
        channels: From a width to the channels of the decoder's output.
    """

    build: Callable[[Backbone, int], nn.Module]
    channels: Callable[[int], int]


def _halving(width: int) -> list[int]:
    """Return the channels of a U-Net's blocks, down to half the input's resolution.

    A fifth block at full resolution has no skip connection to add detail from, and costs as much as the four
    others together; the head's bilinear upsampling takes its place.
    """
    return [width >> level for level in range(4)]


_DECODERS: dict[str, Decoder] = {
    "unet": Decoder(lambda b, w: UnetDecoder(b.channels, _halving(w), n_blocks=4), lambda w: _halving(w)[-1]),
    "fpn": Decoder(
        lambda b, w: FPNDecoder(b.channels, pyramid_channels=w, segmentation_channels=w // 2), lambda w: w // 2
    ),
    "upernet": Decoder(lambda b, w: UPerNetDecoder(b.channels, decoder_channels=w), lambda w: w),
    "segformer": Decoder(lambda b, w: SegformerDecoder(b.channels, segmentation_channels=w), lambda w: w),
    "deeplabv3plus": Decoder(
        lambda b, w: DeepLabV3PlusDecoder(
            b.channels,
            encoder_depth=5,
            out_channels=w,
            atrous_rates=(12, 24, 36),
            output_stride=16,
            aspp_separable=True,
            aspp_dropout=0.5,
        ),
        lambda w: w,
    ),
    "dpt": Decoder(
        lambda b, w: DPTDecoder(
            b.channels,
            encoder_output_strides=[dpt_stride(stride) for stride in b.strides],
            encoder_has_prefix_tokens=b.encoder.has_prefix_tokens,
            intermediate_channels=(w, 2 * w, 4 * w, 4 * w),
            fusion_channels=w,
        ),
        lambda w: w,
    ),
}
assert tuple(_DECODERS) == DECODERS


def resolve_decoder(decoder: str, backbone: Backbone) -> str:
    """Return the decoder that `auto` stands for, or the one named if it suits the backbone.

    `auto` is unet, whose maps are aligned, and dpt for plain vision transformers.

    Raises:
        UserError: There is no such decoder, or it does not suit the backbone.
    """
    if decoder == "auto":
        decoder = "dpt" if backbone.plain else "unet"
    if decoder not in _DECODERS:
        raise UserError(
            f"--decoder: {decoder!r} is unknown{nearest(decoder, _DECODERS)}; there are {', '.join(DECODERS)}"
        )
    if backbone.plain != (decoder == "dpt"):
        plain, pyramid = ("maps of one size, as a plain vision transformer has", "dpt"), ("a pyramid of maps", "unet")
        kind, way = plain if backbone.plain else pyramid
        raise UserError(
            f"--decoder {decoder} does not fit {backbone.name!r}, which gives {kind}; use --decoder {way} or auto"
        )
    return decoder


def encoder_stride(decoder: str) -> int:
    """Return the output stride that a decoder wants of its encoder."""
    return 16 if decoder == "deeplabv3plus" else 32


class Head(nn.Module):
    """A decoder of its own, a last convolution, and bilinear upsampling to the input's size.

    The upsampling aligns the pixels' areas rather than the corners' centres (``align_corners=False``): labels
    resized in the usual way stay registered with it, while segmentation-models-pytorch's own head shifts them
    by up to half a stride.

    Args:
        backbone: The backbone whose pyramid this head will read.
        decoder: A resolved decoder's name.
        channels: Output channels.
        width: Channels of the decoder; 256 is segmentation-models-pytorch's own.
        dropout: Probability for every dropout of the head, its decoder's hidden ones included, and for one
            before the last convolution; None leaves the decoder's own and adds none.

    Raises:
        UserError: The decoder cannot have this width.
    """

    def __init__(
        self, backbone: Backbone, decoder: str, channels: int, width: int = 256, dropout: float | None = None
    ) -> None:
        super().__init__()
        if decoder == "fpn" and width % 64:
            raise UserError(
                f"--decoder-channels {width} is not a multiple of 64, which --decoder fpn needs for its group norms"
            )
        self.decoder = _DECODERS[decoder].build(backbone, width)
        if dropout is not None:
            for module in self.decoder.modules():
                if isinstance(module, nn.Dropout | nn.Dropout2d):
                    module.p = dropout
        self.dropout = nn.Dropout2d(dropout or 0.0)
        self.output = nn.Conv2d(_DECODERS[decoder].channels(width), channels, kernel_size=3, padding=1)

    def set_bias(self, bias: Tensor) -> None:
        """Set the output's bias (channels,), where training is to start."""
        with torch.no_grad():
            cast(Tensor, self.output.bias).copy_(bias)

    def forward(self, pyramid: Pyramid, size: tuple[int, int]) -> Tensor:
        """Return outputs (B, channels, H, W) for `size` = (H, W)."""
        features = self.decoder(pyramid.maps, pyramid.tokens) if pyramid.tokens else self.decoder(pyramid.maps)
        outputs = self.output(self.dropout(features))
        return functional.interpolate(outputs, size=size, mode="bilinear", align_corners=False)
