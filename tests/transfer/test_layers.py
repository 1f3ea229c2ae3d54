"""Stages and layers of encoders against timm's own grouping of whole models, and what lies in between by hand."""

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from mtl.errors import UserError
from mtl.transfer.layers import find_layers, find_stages, timm_name

STAGES = {
    "vovnet39a": 4,
    "hgnetv2_b0": 4,
    "dla34": 6,
    "nfnet_l0": 4,
    "densenet121": 5,
    "ghostnet_050": 8,
    "efficientvit_b0": 4,
    "edgenext_xx_small": 4,
    "fastvit_t8": 4,
    "davit_tiny": 4,
    "mvitv2_tiny": 4,
    "coat_tiny": 17,
    "sam2_hiera_tiny": 12,
    "legacy_xception": 13,
    "eva02_tiny_patch14_224": 12,
    "xcit_nano_12_p16_224": 12,
}
"""Stages of families: blocks where timm has no coarser groups."""


def encoder_of(name: str) -> nn.Module:
    """Return timm's features-only model, wrapped as segmentation-models-pytorch does, with no memory for weights."""
    encoder = nn.Module()
    with torch.device("meta"):
        encoder.model = timm.create_model(name, pretrained=False, features_only=True)
    return encoder


def drawn(module: nn.Module) -> dict[tuple[float, ...], str]:
    """Return the names of the parameters that are drawn at random, by their values."""
    values = {name: tuple(p.detach().flatten()[:6].tolist()) for name, p in module.named_parameters() if p.numel() > 5}
    return {some: name for name, some in values.items() if len(set(some)) > 1}


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_grouped_as_in_timms_whole_model(name: str) -> None:
    """Two models made from one seed have the same weights, whatever those are called."""
    encoder = nn.Module()
    torch.manual_seed(5)
    encoder.model = timm.create_model(name, pretrained=False, features_only=True)
    torch.manual_seed(5)
    full = timm.create_model(name, pretrained=False)
    own, known = drawn(encoder), drawn(full)
    common = own.keys() & known.keys()
    assert len(common) > 0.95 * len(own) > 9
    stages = find_stages(name, encoder)
    assert stages.total == STAGES[name]
    assert stages.tensors.keys() == encoder.state_dict().keys()
    for found, coarse in ((find_layers(name, encoder), False), (stages.tensors, True)):
        theirs = group_parameters(full, full.group_matcher(coarse=coarse), reverse=True)
        pairs = {(theirs[known[some]], found[own[some]]) for some in common}
        assert len({group for group, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)
        assert [number for _, number in sorted(pairs)] == sorted(number for _, number in pairs), "in timm's order"
        assert min(pairs) == (0, 0)


def test_modules_without_parameters_belong_where_they_lie() -> None:
    stages = find_stages("resnet18", encoder_of("resnet18")).modules
    assert {
        "model.act1": 0,
        "model.maxpool": 0,
        "model.layer1.1.act2": 1,
        "model.layer4.0.bn1": 4,
    }.items() <= stages.items()
    assert "model" not in stages and "" not in stages

    stages = find_stages("vit_tiny_patch16_224", encoder_of("vit_tiny_patch16_224")).modules
    expected = {"pos_drop": 0, "blocks.0.attn.attn_drop": 1, "blocks.11.drop_path2": 12}
    assert {f"model.model.{n}": stage for n, stage in expected.items()}.items() <= stages.items()


def test_statistics_belong_to_their_layer_and_tied_weights_to_one() -> None:
    stages = find_stages("resnet18", encoder_of("resnet18"))
    assert stages.tensors["model.layer2.0.bn1.running_mean"] == 2
    assert stages.tensors["model.bn1.num_batches_tracked"] == 0
    tied = find_stages("coat_tiny", encoder_of("coat_tiny")).tensors
    names = [n for n in tied if n.endswith("cpe1.proj.weight") or n.endswith("serial_blocks1.0.cpe.proj.weight")]
    assert len(names) == 2 and len({tied[n] for n in names}) == 1


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ("model.layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("model.stages_0.blocks.1.norm.weight", "stages.0.blocks.1.norm.weight"),
        ("model.features_denseblock1.conv.weight", "features.denseblock1.conv.weight"),
        ("model.base_layer.0.weight", "base_layer.0.weight"),
        ("model.stem_conv1.weight", "stem.conv1.weight"),
        ("model.model.pos_embed", "pos_embed"),
        ("model.body.blocks.1.weight", "blocks.1.weight"),
        ("model.patch_embed_1.weight", "patch_embed.1.weight"),
        ("model.stages_0.weight", None),
    ],
)
def test_names(own: str, theirs: str | None) -> None:
    assert timm_name(own, {theirs, "stages.1.weight", "weight"}) == theirs


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_s18"])
def test_a_model_that_timm_does_not_group_is_a_sentence(name: str) -> None:
    encoder = encoder_of(name)
    with pytest.raises(UserError, match=rf"{name}: timm does not say which stages .* --freeze-stages or choose"):
        find_stages(name, encoder)
    with pytest.raises(UserError, match=rf"{name}: timm does not say which layers .* --layer-decay or choose"):
        find_layers(name, encoder)


def test_a_layer_that_timm_does_not_have_is_a_sentence() -> None:
    encoder = encoder_of("resnet18")
    encoder.model.added = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"resnet18: .* does not say where added\.weight belongs"):
        find_stages("resnet18", encoder)
