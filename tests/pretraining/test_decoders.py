"""Decoders: what they read, what they predict, and that they can learn."""

from functools import cache

import pytest
import torch
from timm.layers import LayerNorm
from timm.layers.norm import RmsNorm
from torch import Tensor
from torch.nn import functional

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.pretraining.decoders import PyramidDecoder, TokenDecoder
from mtl.pretraining.targets import hidden_loss, patch_target, unpatchify
from mtl.pretraining.token_drop import Visible, visible_tokens

VIT = "vit_tiny_patch16_224"
SIZE = (64, 96)


@cache
def make(name: str) -> Backbone:
    torch.manual_seed(0)
    return Backbone(name, SIZE).eval()


def describe(name: str, channels: int) -> Backbone:
    """Return what a decoder asks of a plain transformer, without its weights."""
    backbone = Backbone.__new__(Backbone)
    torch.nn.Module.__init__(backbone)
    backbone.name, backbone.channels, backbone.strides = name, [channels] * 4, [16] * 4
    return backbone


def draw_mask(batch: int, height: int, width: int) -> Tensor:
    return (torch.rand(batch, height * width).argsort(1) < height * width // 2).view(batch, height, width)


def wake(module: torch.nn.Module) -> None:
    """Leave nothing at zero, where it would hide what it multiplies."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# Tokens


def test_each_patch_is_predicted_at_its_place() -> None:
    """The same tokens in another order, with their places, are the same picture; at other places another."""
    backbone = make(VIT)
    decoder = TokenDecoder(backbone, 16, width=32, depth=2)
    wake(decoder)
    visible = visible_tokens(backbone, torch.rand(2, 3, *SIZE), draw_mask(2, 4, 6))
    order = torch.randperm(12)
    with torch.no_grad():
        expected = decoder(visible)
        shuffled = decoder(visible._replace(tokens=visible.tokens[:, order], indices=visible.indices[:, order]))
        elsewhere = decoder(visible._replace(indices=visible.indices[:, order]))
    assert expected.shape == (2, 24, 16 * 16 * 3)
    torch.testing.assert_close(shuffled, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(elsewhere, expected, rtol=1e-2, atol=1e-2)


def test_hidden_patches_are_told_apart_by_their_positions_alone() -> None:
    backbone = make(VIT)
    decoder = TokenDecoder(backbone, 16, width=32, depth=1)
    wake(decoder)
    visible = visible_tokens(backbone, torch.rand(1, 3, *SIZE), draw_mask(1, 4, 6))
    with torch.no_grad():
        decoder.mask_token.add_(1.0)
        before = decoder(visible)
        hidden = torch.ones(24, dtype=torch.bool).scatter(0, visible.indices[0], False)
        prediction = before[0][hidden]
    assert prediction.std(0).mean() > 0.01, "no two positions have the same sines"


def test_a_coarser_patch_is_the_same_picture() -> None:
    backbone = make(VIT)
    fine, coarse = TokenDecoder(backbone, 16, 32, 1), TokenDecoder(backbone, 32, 32, 1)
    coarse.load_state_dict(fine.state_dict())
    mask = draw_mask(2, 2, 3)
    visible = visible_tokens(backbone, torch.rand(2, 3, *SIZE), mask)
    with torch.no_grad():
        one, other = fine(visible), coarse(visible)
    assert other.shape == (2, 6, 32 * 32 * 3)
    assert torch.equal(unpatchify(one, (4, 6)), unpatchify(other, (2, 3)))


@pytest.mark.parametrize(
    ("name", "kind", "names"),
    [
        (VIT, LayerNorm, {"norm.weight", "norm.bias"}),
        ("vit_tiny_patch16_dinov3_qkvb", LayerNorm, {"norm.weight", "norm.bias"}),
        ("vit_base_patch16_xp_224", RmsNorm, {"norm.weight"}),
        ("eva02_tiny_patch14_224", LayerNorm, set()),  # timm's has one after pooling only
    ],
)
def test_the_final_norm_is_of_timms_kind(name: str, kind: type, names: set[str]) -> None:
    decoder = TokenDecoder(describe(name, 64), 16, 32, 1)
    assert isinstance(decoder.norm, kind)
    assert decoder.timm_tensors().keys() == names
    for key, value in decoder.norm.named_parameters():
        assert torch.equal(value, torch.full_like(value, key == "weight"))


def test_recomputed_activations_of_the_decoder_give_the_same_gradients() -> None:
    backbone = make(VIT)
    decoder = TokenDecoder(backbone, 16, 32, 2)
    with torch.no_grad():
        visible = visible_tokens(backbone, torch.rand(2, 3, *SIZE), draw_mask(2, 4, 6))
    gradients = []
    for decoder.grad_checkpointing in (False, True):
        decoder.zero_grad()
        decoder(visible).square().sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(decoder.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_the_decoder_of_the_paper() -> None:
    """512 wide and 8 deep: 26 million parameters with a ViT-B, as in MAE's own code (models_mae.py)."""
    decoder = TokenDecoder(describe("vit_base_patch16_224", 768), 16, 512, 8)
    block = 4 * (512 * 512 + 512) + 2 * 4 * 512 * 512 + 5 * 512 + 4 * 512
    expected = 2 * 768 + 768 * 512 + 512 + 512 + 8 * block + 2 * 512 + 512 * 768 + 768
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected
    assert {module.num_heads for module in decoder.modules() if hasattr(module, "num_heads")} == {16}


# Pyramids

PYRAMIDS = ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224", "mobilenetv4_conv_small", VIT]


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_every_level_is_read_where_it_is_visible(name: str, fill: bool) -> None:
    """Hidden features change no prediction where a token stands for them; each visible map, image apart, does."""
    backbone = make(name)
    patch = max(backbone.strides)
    decoder = PyramidDecoder(backbone, patch, 32, fill=fill)
    wake(decoder)
    image, mask = torch.rand(2, 3, *SIZE), draw_mask(2, SIZE[0] // patch, SIZE[1] // patch)
    with torch.no_grad():
        maps = backbone(image).maps
        prediction = decoder(maps, mask)
        assert prediction.shape == (2, mask[0].numel(), patch * patch * 3)
        read = []
        for level, features in enumerate(maps):
            if not features.numel():
                continue
            hidden = functional.interpolate(mask[:, None].float(), features.shape[-2:]) > 0
            for at in (hidden, ~hidden):
                changed = [*maps]
                changed[level] = torch.where(at, torch.randn_like(features), features)
                read.append(not torch.equal(decoder(changed, mask), prediction))
    used = [level for level, stride in enumerate(backbone.strides) if stride >= 4 and backbone.channels[level]]
    used = used[-1:] if backbone.plain else used
    levels = [level for level in range(len(maps)) if backbone.channels[level]]
    assert read == [said for level in levels for said in ((level in used) and not fill, level in used)]


@pytest.mark.parametrize("name", ["resnet10t", VIT])
def test_predictions_lie_where_their_features_are(name: str) -> None:
    """A single odd feature of the coarsest map is seen about its own place, in either axis."""
    backbone = make(name)
    patch = max(backbone.strides)
    decoder = PyramidDecoder(backbone, patch, 32)
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    sizes = [(4 * patch // stride, 8 * patch // stride) for stride in backbone.strides]
    maps = [torch.zeros(1, channels, *size) for channels, size in zip(backbone.channels, sizes, strict=True)]
    with torch.no_grad():
        plain = decoder(maps, mask)
        maps[-1][0, :, 1, 6] = torch.randn(backbone.channels[-1])
        change = (decoder(maps, mask) - plain).square().sum(-1).view(4, 8)
    assert divmod(int(change.argmax()), 8) == (1, 6)


@pytest.mark.parametrize("name", ["resnet10t", VIT])
def test_every_parameter_learns(name: str) -> None:
    backbone = make(name)
    patch = 32
    image, mask = torch.rand(2, 3, *SIZE), draw_mask(2, SIZE[0] // patch, SIZE[1] // patch)
    target = patch_target(image, patch)
    maps = backbone(image).maps
    for fill in (True, False):
        decoder = PyramidDecoder(backbone, patch, 32, fill=fill)
        hidden_loss(decoder(maps, mask), target, mask).backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


@pytest.mark.parametrize("kind", ["tokens", "pyramid"])
def test_a_decoder_learns_a_picture_by_heart(kind: str) -> None:
    """From features that say where everything is, and one picture that is there to be learnt."""
    torch.manual_seed(0)
    backbone = make(VIT if kind == "tokens" else "resnet10t")
    patch = 16 if kind == "tokens" else 32
    image = functional.interpolate(torch.rand(1, 3, 8, 12), SIZE, mode="bilinear")
    target, mask = patch_target(image, patch), draw_mask(1, SIZE[0] // patch, SIZE[1] // patch)
    with torch.no_grad():
        inputs = (visible_tokens(backbone, image, mask),) if kind == "tokens" else (backbone(image).maps, mask)
    decoder = TokenDecoder(backbone, patch, 64, 2) if kind == "tokens" else PyramidDecoder(backbone, patch, 64)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = hidden_loss(decoder(*inputs), target, mask)
        loss.backward()
        optimizer.step()
    assert loss < 0.15, "of a variance of 1"


def test_other_sizes_than_the_backbones_own() -> None:
    backbone = make("resnet10t")
    image = torch.rand(1, 3, 128, 32)
    mask = torch.zeros(1, 4, 1, dtype=torch.bool)
    assert PyramidDecoder(backbone, 32, 32)(backbone(image).maps, mask).shape == (1, 4, 3072)


@pytest.mark.parametrize(
    ("name", "kind", "patch"), [(VIT, TokenDecoder, 24), (VIT, PyramidDecoder, 8), ("resnet10t", PyramidDecoder, 16)]
)
def test_patches_that_cut_through_positions_are_a_sentence(name: str, kind: type, patch: int) -> None:
    with pytest.raises(UserError, match=rf"^--mask.patch {patch}[^\n]*{name}[^\n]*$"):
        kind(make(name), patch)


def test_a_width_that_heads_do_not_divide_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^--mask.decoder-width 100 is not a multiple of 32[^\n]*$"):
        TokenDecoder(make(VIT), 16, width=100)


def test_there_may_be_no_prefix() -> None:
    visible = Visible(torch.zeros(2, 0, 192), torch.rand(2, 3, 192), torch.arange(3).expand(2, -1), (2, 3))
    assert TokenDecoder(make(VIT), 16, 32, 1)(visible).shape == (2, 6, 768)
