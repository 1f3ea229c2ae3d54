"""Heads: where their pixels lie, odd sizes, dropout, and every decoder's gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.config import DECODERS
from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.models.heads import Head, encoder_stride, resolve_decoder
from mtl.models.multitask import MultiTaskModel

SIZE = (64, 96)


def make(decoder: str, size: tuple[int, int] = SIZE, width: int = 64, dropout: float | None = None) -> MultiTaskModel:
    """Return a model with one task of three channels."""
    name = "vit_tiny_patch16_224" if decoder == "dpt" else "mobilenetv4_conv_small"
    backbone = Backbone(name, size, encoder_stride(decoder))
    head = Head(backbone, resolve_decoder(decoder, backbone), channels=3, width=width, dropout=dropout)
    return MultiTaskModel(backbone, {"task": head})


def ramps(height: int, width: int) -> Tensor:
    """Return two images of three equal channels: the column of each pixel, and its row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows])[:, None].expand(-1, 3, -1, -1).float()


# The upsampling at the end


@pytest.mark.parametrize("stride", [2, 4])
def test_upsampling_keeps_a_ramp_where_it_is(stride: int) -> None:
    """A cell of `stride` pixels, the i-th from 0, has its centre at stride * i + (stride - 1) / 2."""
    head = Head(Backbone("mobilenetv4_conv_small", SIZE), "unet", channels=3, width=16)
    centres = functional.avg_pool2d(ramps(*SIZE), stride)
    head.decoder = Fixed(centres)
    head.output = nn.Identity()
    half = (stride - 1) / 2
    inside = (..., slice(stride, -stride), slice(stride, -stride))

    outputs = head(Pyramid([], []), SIZE)
    torch.testing.assert_close(outputs[inside], ramps(*SIZE)[inside])

    # The alternative puts the first cell's centre on the first pixel's: half a stride off at the border, less and
    # less towards the middle.
    corners = functional.interpolate(centres, size=SIZE, mode="bilinear", align_corners=True)
    columns = torch.arange(SIZE[1]).float()
    expected = half * (1 - 2 * columns / (SIZE[1] - 1))
    torch.testing.assert_close((corners - ramps(*SIZE))[0, 0, 10], expected, atol=1e-4, rtol=0)
    assert expected[stride] > 0.85 * half


class Fixed(nn.Module):
    """A decoder that always says the same."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.features


# Where the decoders' maps lie


class Averages(nn.Module):
    """A backbone whose maps are averages over the pixels that each of their cells covers."""

    channels = (3,) * 6
    strides = (1, 2, 4, 8, 16, 32)
    stride = 32
    plain = False
    name = "averages"

    def forward(self, image: Tensor) -> Pyramid:
        return Pyramid([functional.avg_pool2d(image, stride) for stride in self.strides], [])


def averaging_head(decoder: str) -> Head:
    """Return a head without normalisation whose layers average their inputs at the same place."""
    head = Head(Averages(), decoder, channels=3, width=64)
    for module in list(head.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.GroupNorm):
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            taps = module.weight.data.flatten(2) if module.weight.dim() > 2 else module.weight.data[..., None]
            taps[..., taps.shape[-1] // 2] = 1 / taps.shape[1]
    return head.eval()


def displacement(decoder: str, height: int, width: int) -> float:
    """Return by how many pixels an averaging model displaces a ramp, in the worst block of 32 x 32 pixels.

    Blocks at the border are left out: the last may be extended, the first has no neighbour to blend with.
    """
    model = MultiTaskModel(Averages(), {"task": averaging_head(decoder)})
    images = ramps(height, width)
    with torch.no_grad():
        outputs = model(images)["task"] / model(torch.ones_like(images))["task"]  # some decoders add instead
    assert outputs.shape[-2:] == (height, width)
    blocks = functional.avg_pool2d(outputs - images, 32)
    return float(
        max(
            blocks[0, :, :, 1 : width // 32 - 1].abs().max(),
            blocks[1, :, 1 : height // 32 - 1].abs().max(),
        )
    )


@pytest.mark.parametrize("size", [(128, 160), (97, 130), (240, 320)], ids=str)
@pytest.mark.parametrize("decoder", ["unet", "segformer"])
def test_aligned_decoders_displace_nothing(decoder: str, size: tuple[int, int]) -> None:
    assert displacement(decoder, *size) < 0.01


def test_displacement_sees_a_decoder_that_is_not_aligned() -> None:
    assert displacement("fpn", 128, 160) > 1


# Odd sizes


@pytest.mark.parametrize("size", [(97, 130), (240, 320), (33, 64), (64, 96)], ids=str)
def test_odd_sizes_are_extended_at_the_right_and_below(size: tuple[int, int]) -> None:
    height, width = size
    model = make("unet", size, width=16).eval()
    image = torch.rand(1, 3, height, width)
    edges = ((0, 0), (0, 0), (0, -height % 32), (0, -width % 32))
    extended = torch.from_numpy(np.pad(image.numpy(), edges, mode="edge"))
    with torch.no_grad():
        outputs, expected = model(image)["task"], model(extended)["task"]
    assert outputs.shape == (1, 3, height, width)
    assert expected.shape == (1, 3, *extended.shape[-2:])
    torch.testing.assert_close(outputs, expected[..., :height, :width], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch32_224", "tnt_s_legacy_patch16_224"])
def test_plain_transformers_take_odd_sizes(name: str) -> None:
    """At 80 x 112 a grid of 5 x 7 patches cannot be halved, which the dpt decoder does."""
    backbone = Backbone(name, (80, 112))
    model = MultiTaskModel(backbone, {"task": Head(backbone, "dpt", channels=2, width=16)}).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 80, 112))["task"].shape == (1, 2, 80, 112)


# Every decoder


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_of_every_decoder_learns(decoder: str) -> None:
    model = make(decoder)
    outputs = model(torch.rand(2, 3, *SIZE))["task"]
    assert outputs.shape == (2, 3, *SIZE)
    outputs.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert all(p.grad.any() for p in model.heads["task"].output.parameters())


def dropouts(head: Head) -> list[float]:
    """Return the probability of everything in a head that calls itself a dropout."""
    return [module.p for module in head.modules() if "Dropout" in type(module).__name__]


@pytest.mark.parametrize("decoder", DECODERS)
def test_dropout_reaches_all_of_a_head(decoder: str) -> None:
    model = make(decoder, dropout=0.5)
    head = model.heads["task"]
    assert set(dropouts(head)) == {0.5}
    image = torch.rand(2, 3, *SIZE)
    model.backbone.freeze()
    with torch.no_grad():
        pyramid = model.backbone(image)
        # Decoders may overwrite the list they are given.
        first, second = (head(Pyramid([*pyramid.maps], pyramid.tokens), SIZE) for _ in range(2))
        assert not torch.equal(first, second)
        head.eval()
        first, second = (head(Pyramid([*pyramid.maps], pyramid.tokens), SIZE) for _ in range(2))
        assert torch.equal(first, second)


def test_without_an_option_the_decoders_keep_their_own_dropout() -> None:
    own = {decoder: dropouts(make(decoder).heads["task"]) for decoder in ("unet", "fpn", "deeplabv3plus")}
    assert own == {"unet": [0.0], "fpn": [0.2, 0.0], "deeplabv3plus": [0.5, 0.0]}


def test_two_heads_do_not_disturb_each_other() -> None:
    """Heads share one pyramid, which no decoder may change."""
    backbone = Backbone("mobilenetv4_conv_small", SIZE)
    names = [name for name in DECODERS if name not in ("dpt", "deeplabv3plus")]
    heads = {name: Head(backbone, name, channels=2, width=64) for name in names}
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        together = MultiTaskModel(backbone, heads).eval()(image)
        for name, head in heads.items():
            alone = MultiTaskModel(backbone, {name: head}).eval()(image)
            torch.testing.assert_close(together[name], alone[name], rtol=0, atol=0)


# What does not fit


def test_auto_is_a_pyramid_decoder_or_dpt() -> None:
    assert resolve_decoder("auto", Backbone("mobilenetv4_conv_small", SIZE)) == "unet"
    assert resolve_decoder("auto", Backbone("vit_tiny_patch16_224", SIZE)) == "dpt"


@pytest.mark.parametrize(
    ("name", "decoder", "fragments"),
    [
        ("mobilenetv4_conv_small", "unnet", ["'unnet'", "did you mean 'unet'", "deeplabv3plus"]),
        ("mobilenetv4_conv_small", "dpt", ["mobilenetv4_conv_small", "a pyramid", "--decoder unet"]),
        ("vit_tiny_patch16_224", "unet", ["vit_tiny_patch16_224", "plain vision transformer", "--decoder dpt"]),
    ],
)
def test_decoders_that_do_not_fit_are_a_sentence(name: str, decoder: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_decoder(decoder, Backbone(name, (56, 56)))
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_a_width_that_fpn_cannot_have_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"--decoder-channels 96 .* multiple of 64"):
        make("fpn", width=96)
