"""Families of encoders: each trains a step on images of odd sizes, sees each place where it is, or says why not."""

import pytest
import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import Tensor, nn
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.models.heads import Head, encoder_stride, resolve_decoder
from mtl.models.multitask import MultiTaskModel

SIZE = (72, 100)
"""Neither square nor multiples of any stride; extended to 96 x 128."""

CONVOLUTIONS = [
    "resnet18",
    "regnetx_002",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "ghostnet_050",
    "hrnet_w18_small",
    "dla46_c",
    "cs3darknet_s",  # gives a map of stride 2
    "darknet17",  # gives a map of stride 1
    "lcnet_050",
    "starnet_s050",
    "convnext_atto",
]
PYRAMIDS = [
    "swin_tiny_patch4_window7_224",  # one size, channels last
    "swinv2_cr_tiny_224",  # one size
    "maxvit_pico_rw_256",  # one size
    "coatnet_pico_rw_224",  # one size
    "hiera_tiny_224",  # one size, tokens in an order of their own
    "efficientformerv2_s0",  # one size
    "coat_lite_tiny",  # one size
    "tiny_vit_5m_224",
    "focalnet_tiny_srf",  # channels last inside
    "pvt_v2_b0",
    "mobilevit_xxs",
    "efficientvit_b0",
]
PLAIN = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "vit_wee_patch16_reg1_gap_256",  # a register
    "vit_tiny_patch16_dinov3_qkvb",  # rotary positions
    "vit_relpos_small_patch16_224",  # one size
    "eva02_tiny_patch14_224",  # a patch that is no power of two
    "xcit_nano_12_p16_224",  # a class token that is not given with the maps
    "cait_xxs24_224",  # the same
    "gmlp_ti16_224",  # one size
]
DILATED = ["resnet18", "convnext_atto", "mobilevit_xxs"]


def changes(backbone: Backbone, row: int, column: int) -> Tensor:
    """Return by how much each of 3 x 4 blocks changes in the finest map when one does in the image, (3, 4)."""
    side = 32 if 32 % backbone.stride == 0 else backbone.stride
    image = torch.rand(1, 3, 3 * side, 4 * side)
    other = image.clone()
    block = other[..., side * row : side * row + side, side * column : side * column + side]
    block.copy_(torch.rand_like(block))
    finest = next(i for i, channels in enumerate(backbone.channels) if channels > 3)  # neither the image nor missing
    backbone.eval()
    with torch.no_grad():
        difference = backbone(other).maps[finest] - backbone(image).maps[finest]
    return functional.adaptive_avg_pool2d(difference.abs().mean(1), (3, 4))[0]


@pytest.mark.parametrize(
    ("name", "decoder"),
    [(name, "auto") for name in CONVOLUTIONS + PYRAMIDS + PLAIN] + [(name, "deeplabv3plus") for name in DILATED],
)
def test_a_family_trains_a_step(name: str, decoder: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, SIZE, encoder_stride(decoder))
    resolved = resolve_decoder(decoder, backbone)
    assert resolved == ("deeplabv3plus" if decoder != "auto" else "dpt" if name in PLAIN else "unet")

    # A place of the image is the same place of the map: no axes are exchanged, no windows out of order.
    changed = changes(backbone, 2, 1)
    assert changed.argmax() == 2 * 4 + 1, changed

    model = MultiTaskModel(backbone, {"task": Head(backbone, resolved, channels=2, width=32)}).train()
    before = {parameter: value.clone() for parameter, value in model.named_parameters()}
    outputs = model(torch.rand(2, 3, *SIZE))["task"]
    assert outputs.shape == (2, 2, *SIZE)
    loss = functional.l1_loss(outputs, torch.rand(2, 2, *SIZE))
    loss.backward()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # Layers that start as the identity leave the rest of their branch without a gradient in the first step.
    for part in ("backbone", "heads"):
        names = [n for n in before if n.startswith(part)]
        assert len(moved.intersection(names)) > 0.2 * len(names)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# What does not fit


@pytest.mark.parametrize(
    ("name", "size", "decoder", "fragments"),
    [
        ("efficientformer_l1", (64, 96), "unet", ["64x96", "--data.size 224 224"]),
        ("mvitv2_tiny", (72, 100), "unet", ["72x100 (as 96x128)", "--data.size 224 224"]),
        ("legacy_xception", (64, 96), "unet", ["64x29x45", "64x32x48"]),
        ("levit_128s", (64, 96), "unet", ["strides 16, 32, 64", "4, 8, 16 and 32"]),
        ("crossvit_tiny_240", (64, 96), "unet", ["strides 12, 17", "4, 8, 16 and 32"]),
        ("ghostnet_050", (64, 96), "deeplabv3plus", ["output stride of 16", "dilation", "--decoder deeplabv3plus"]),
        ("swin_tiny_patch4_window7_224", (64, 96), "deeplabv3plus", ["output stride of 16", "dilation"]),
        ("vit_tiny_patch16_224", (64, 96), "fpn", ["--decoder fpn", "plain vision transformer", "--decoder dpt"]),
        ("resnet18", (64, 96), "dpt", ["--decoder dpt", "a pyramid", "--decoder unet"]),
    ],
)
def test_what_does_not_fit_is_a_sentence(name: str, size: tuple[int, int], decoder: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_decoder(decoder, Backbone(name, size, encoder_stride(decoder)))
    message = str(caught.value)
    assert all(fragment in message for fragment in [repr(name), *fragments]), message
    assert "__init__" not in message and "tensor" not in message and "\n" not in message


def test_the_size_that_a_refusal_proposes_is_taken() -> None:
    backbone = Backbone("efficientformer_l1", (224, 224))
    assert backbone.channels == [3, 0, 48, 96, 224, 448]


def test_a_layout_that_is_not_what_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = TimmUniversalEncoder.__init__

    def forget(self: nn.Module, *arguments: object, **options: object) -> None:
        build(self, *arguments, **options)
        self._is_channel_last = False

    monkeypatch.setattr(TimmUniversalEncoder, "__init__", forget)
    with pytest.raises(UserError, match=r"a map of 16x24x96 .* need 96x16x24"):
        Backbone("swin_tiny_patch4_window7_224", (64, 96))


def test_an_output_stride_that_is_ignored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def ignore(name: str, *arguments: object, output_stride: int = 32, **options: object) -> nn.Module:
        return create(name, *arguments, **options)

    monkeypatch.setattr(timm, "create_model", ignore)
    with pytest.raises(UserError, match="output stride of 16"):
        Backbone("resnet18", (64, 96), 16)
