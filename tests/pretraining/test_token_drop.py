"""Token drop against the plain backbone, and against attention that is masked instead."""

from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from mtl.models.backbone import Backbone
from mtl.pretraining.token_drop import can_drop_tokens, encode_visible, visible_indices, visible_tokens

VIT = "vit_tiny_patch16_224"
EVA = "eva02_tiny_patch14_224"
FAMILIES = [
    VIT,
    EVA,  # rotary table, one for all heads
    "vit_tiny_patch16_dinov3_qkvb",  # rotary, registers
    "vit_small_patch16_rope_mixed_224",  # rotary, one for each block and head
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "deit3_small_patch16_224",  # positions for patches only
    "vit_wee_patch16_reg1_gap_256",  # registers without a class token
    "vit_pe_core_tiny_patch16_384",  # a norm before the blocks
]


@cache
def make(name: str) -> Backbone:
    """Return a backbone of which no tensor is zero, cut after two blocks."""
    torch.manual_seed(0)
    backbone = Backbone(name, (64, 96)).eval()
    model = backbone.encoder.model
    model.blocks = model.blocks[:2]
    backbone.encoder._output_indices = [0, 0, 1, 1]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone


def draw(backbone: Backbone, batch: int = 2, share: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return images and masks."""
    height, width = (side // backbone.strides[-1] for side in backbone.size)
    order = torch.rand(batch, height * width).argsort(1)
    return torch.rand(batch, 3, *backbone.size), (order < int(share * height * width)).view(batch, height, width)


def cut(name: str) -> Backbone:
    """Return such a backbone, to be changed."""
    make.cache_clear()
    return make(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_hidden_gives_the_plain_backbones_features(name: str) -> None:
    backbone = make(name)
    image, mask = draw(backbone, share=0.0)
    with torch.no_grad():
        visible, (maps, prefixes) = visible_tokens(backbone, image, mask), backbone(image)
    torch.testing.assert_close(visible.tokens.transpose(1, 2), maps[-1].flatten(2), rtol=1e-5, atol=1e-5)
    assert visible.grid == tuple(maps[-1].shape[-2:])
    if prefixes[-1] is not None:
        torch.testing.assert_close(visible.prefix, prefixes[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_pixels_change_nothing_and_visible_ones_do(name: str) -> None:
    backbone = make(name)
    image, mask = draw(backbone)
    hidden = functional.interpolate(mask[:, None].float(), backbone.size) > 0
    with torch.no_grad():
        one = visible_tokens(backbone, image, mask)
        other = visible_tokens(backbone, torch.where(hidden, torch.rand_like(image), image), mask)
        third = visible_tokens(backbone, torch.where(hidden, image, torch.rand_like(image)), mask)
    assert one.tokens.shape[1] == int((~mask[0]).sum())
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.prefix, other.prefix)
    assert not torch.allclose(one.tokens, third.tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_tokens_are_those_that_attention_would_be_masked_from(name: str) -> None:
    """timm's own forward over all tokens, none of which may look at a hidden one."""
    backbone = make(name)
    model = backbone.encoder.model
    image, mask = draw(backbone)
    kept = functional.pad(~mask.flatten(1), (model.num_prefix_tokens, 0), value=True)
    with torch.no_grad():
        visible = visible_tokens(backbone, image, mask)
        everything = model.forward_features((image - backbone.mean) / backbone.std, attn_mask=kept[:, None, None, :])
    expected = everything[kept].view(len(image), -1, everything.shape[-1])
    own = torch.cat([visible.prefix, visible.tokens], dim=1)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [VIT, "vit_small_patch16_rope_mixed_224"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    backbone = cut(name).train()
    image, mask = draw(backbone)
    gradients = []
    for checkpointing in (False, True):
        backbone.encoder.model.set_grad_checkpointing(checkpointing)
        backbone.zero_grad()
        visible_tokens(backbone, image, mask).tokens.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(backbone.named_parameters()).keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize("name", [VIT, EVA])
def test_half_precision_is_close_to_full(name: str) -> None:
    backbone = make(name)
    image, mask = draw(backbone)
    with torch.no_grad():
        full = visible_tokens(backbone, image, mask).tokens
        with torch.autocast("cpu", torch.bfloat16):
            half = visible_tokens(backbone, image, mask).tokens
    assert (half - full).norm() < 0.03 * full.norm()


def test_the_compiler_takes_it_as_one_graph() -> None:
    backbone = make("vit_tiny_patch16_dinov3_qkvb")
    image, mask = draw(backbone)
    indices = visible_indices(mask)
    compiled = torch.compile(encode_visible, fullgraph=True, backend="eager")
    with torch.no_grad():
        one, other = compiled(backbone, image, indices), encode_visible(backbone, image, indices)
    torch.testing.assert_close(one.tokens, other.tokens)
    assert one.grid == other.grid


def test_what_is_frozen_builds_no_graph() -> None:
    backbone = cut(VIT)
    image, mask = draw(backbone)
    assert visible_tokens(backbone, image, mask).tokens.requires_grad
    backbone.freeze()
    assert not visible_tokens(backbone, image, mask).tokens.requires_grad
    backbone.thaw()
    backbone.freeze(1)
    visible_tokens(backbone, image.requires_grad_(), mask).tokens.sum().backward()
    assert image.grad is None
    learned = {name for name, parameter in backbone.encoder.model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in backbone.encoder.model.named_parameters() if name.startswith("blocks.1.")}
    make.cache_clear()


def test_a_coarser_mask_hides_several_patches() -> None:
    backbone = make(VIT)
    image = draw(backbone)[0]
    coarse = torch.tensor([[[True, False, True], [True, True, True]]]).expand(2, -1, -1)
    visible = visible_tokens(backbone, image, coarse)
    assert visible.indices.tolist() == [[2, 3, 8, 9]] * 2  # of 4 x 6


def test_positions_of_another_size_are_resampled() -> None:
    """An image of another size than the backbone was built with."""
    backbone = make(VIT)
    image = torch.rand(2, 3, 128, 32)
    with torch.no_grad():
        visible = visible_tokens(backbone, image, torch.zeros(2, 8, 2, dtype=torch.bool))
        maps = backbone(image).maps
    torch.testing.assert_close(visible.tokens.transpose(1, 2), maps[-1].flatten(2), rtol=1e-5, atol=1e-5)


def test_indices_are_those_of_visible_patches_in_order() -> None:
    mask = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    assert visible_indices(mask).tolist() == visible_indices(mask, 2).tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("mask", [[[True, False], [False, False]], [[True, True], [True, True]]])
def test_unequal_or_empty_masks_are_refused(mask: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match=r"equally many patches visible, at least one, not [01] to [02]"):
        visible_indices(torch.tensor(mask).unsqueeze(1))


@pytest.mark.parametrize(
    ("name", "can"),
    [
        *((name, True) for name in FAMILIES),
        ("vit_base_patch16_siglip_224", True),
        ("vit_base_patch14_reg4_dinov2", True),
        ("vit_base_patch16_18x2_224", True),
        ("vit_base_patch32_clip_224", True),
        ("vit_tiny_r_s16_p8_224", False),  # convolutions in front
        ("vit_base_mci_224", False),
        ("beit_base_patch16_224", False),  # a bias for every two positions
        ("vit_relpos_medium_patch16_224", False),
        ("samvit_base_patch16", False),  # windows
        ("naflexvit_base_patch16_gap", False),  # packed sequences
        ("swin_tiny_patch4_window7_224", False),
        ("resnet10t", False),
    ],
)
def test_which_backbones_can(name: str, can: bool) -> None:
    with torch.device("meta"):
        encoder = SimpleNamespace(model=timm.create_model(name))
    assert can_drop_tokens(SimpleNamespace(encoder=encoder)) == can  # type: ignore[arg-type]


def test_a_convolutional_encoder_cannot() -> None:
    assert not can_drop_tokens(Backbone("resnet10t", (64, 64)))
