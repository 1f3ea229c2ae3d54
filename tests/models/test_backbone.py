"""Backbones against timm's own features, and frozen ones against everything that might move them."""

import copy
import re
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import Batch, DataInfo
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.training.module import MultiTaskModule

SIZE = (64, 96)
PYRAMIDS = [
    "mobilenetv4_conv_small",
    "resnet18",
    "convnext_atto",
    "efficientnet_b0",
    "regnetx_002",
    "swin_tiny_patch4_window7_224",
    "hgnetv2_b0",
]
PLAIN = "vit_tiny_patch16_224"


def shake(module: nn.Module) -> None:
    """Give every parameter and statistic a value of its own, so that none can be mistaken for another."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))


def normalised(image: Tensor, name: str) -> Tensor:
    """Apply what timm's own data pipeline would."""
    config = timm.data.resolve_model_data_config(timm.create_model(name, pretrained=False))
    mean, std = (np.array(config[key], np.float64).reshape(3, 1, 1) for key in ("mean", "std"))
    return torch.from_numpy((image.double().numpy() - mean) / std).to(image.dtype)


# The pyramid


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_is_timms_own_features_of_the_normalised_image(name: str) -> None:
    # In double precision: normalising in two ways differs by a rounding, which a random network magnifies.
    backbone = Backbone(name, SIZE).eval().double()
    shake(backbone.encoder)
    sized = {"img_size": SIZE} if "swin" in name else {}
    reference = timm.create_model(name, pretrained=False, features_only=True, **sized).eval().double()
    reference.load_state_dict(backbone.encoder.model.state_dict())
    image = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        pyramid = backbone(image)
        expected = reference(normalised(image, name))
    if getattr(reference, "output_fmt", None) == "NHWC":
        expected = [features.permute(0, 3, 1, 2) for features in expected]

    height, width = SIZE
    shapes = [(2, c, height // s, width // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert [tuple(features.shape) for features in pyramid.maps] == shapes
    assert (pyramid.tokens, backbone.plain, backbone.stride) == ([], False, 32)
    assert backbone.strides[-len(expected) :] == reference.feature_info.reduction()
    torch.testing.assert_close(pyramid.maps[0], normalised(image, name), atol=1e-5, rtol=1e-5)
    for features, own in zip(pyramid.maps[-len(expected) :], expected, strict=True):
        torch.testing.assert_close(features, own, atol=1e-4, rtol=1e-4)
        assert features.std() > 1e-3


def test_a_plain_transformer_is_timms_own_features_of_the_normalised_image() -> None:
    backbone = Backbone(PLAIN, SIZE).eval()
    shake(backbone.encoder)
    reference = timm.create_model(
        PLAIN, pretrained=False, features_only=True, out_indices=(2, 5, 8, 11), dynamic_img_size=True
    ).eval()
    reference.model.load_state_dict(backbone.encoder.model.state_dict())
    image = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        pyramid = backbone(image)
        expected = reference(normalised(image, PLAIN))
    assert [tuple(features.shape) for features in pyramid.maps] == [(2, 192, 4, 6)] * 4
    assert [tuple(tokens.shape) for tokens in pyramid.tokens] == [(2, 1, 192)] * 4
    assert (backbone.channels, backbone.strides, backbone.plain) == ([192] * 4, [16] * 4, True)
    for features, own in zip(pyramid.maps, expected, strict=True):
        torch.testing.assert_close(features, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "resnet18"])
def test_dilation_takes_the_place_of_a_stride(name: str) -> None:
    backbone = Backbone(name, SIZE, output_stride=16).eval()
    assert (backbone.strides, backbone.stride) == ([1, 2, 4, 8, 16, 16], 16)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, *SIZE)).maps
    assert [SIZE[0] // features.shape[2] for features in maps] == backbone.strides


def test_a_backbone_of_one_size_is_built_for_the_extended_image() -> None:
    """Images of 97 x 130 reach the backbone as 128 x 160."""
    backbone = Backbone("swin_tiny_patch4_window7_224", (97, 130)).eval()
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 128, 160)).maps[-1].shape == (1, 768, 4, 5)


# Frozen


FREEZABLE = "nextvit_small"
"""Has batch norm and, in training, drop-path."""


def make_module(freeze: bool) -> MultiTaskModule:
    """Return a module with two tasks, and a dropout in the backbone beside what it has of its own."""
    experiment = validate(
        {
            **{"backbone": FREEZABLE, "freeze": freeze, "init": "none", "decoder_channels": 16, "lr": 0.01},
            **{"weight_decay": 0.1, "data": {"size": [32, 32]}},
        }
    )
    info = DataInfo("test", ("segmentation", "depth"), ("floor", "wall", "ball"))
    module = build_module(experiment, info, total_steps=10)
    stages = module.model.backbone.encoder.model
    first = next(name for name, _ in stages.named_children())
    setattr(stages, first, nn.Sequential(getattr(stages, first), nn.Dropout(0.2)))
    if freeze:
        module.model.backbone.freeze()
    return module


@pytest.fixture(scope="module")
def frozen() -> Iterator[MultiTaskModule]:
    yield make_module(freeze=True)


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "segmentation": torch.randint(0, 3, (2, 32, 32), generator=generator, dtype=torch.uint8),
        "depth": 1 + torch.rand(2, 1, 32, 32, generator=generator),
    }


def train(module: MultiTaskModule, steps: int) -> dict[str, bool]:
    """Train as Lightning would, with a validation in between; return which parameters had a gradient at the end."""
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(steps):
        module.train()
        optimizer.zero_grad()
        module.training_step(module.on_after_batch_transfer(make_batch(step), 0), step).backward()
        optimizer.step()
        module.eval()
        with torch.no_grad():
            module(module.on_after_batch_transfer(make_batch(99), 0)["image"])
    return {name: parameter.grad is not None for name, parameter in module.model.named_parameters()}


def contents(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def changed(backbone: Backbone, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}


def draws_in_training(backbone: Backbone) -> bool:
    backbone.train()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return not torch.equal(backbone(image).maps[-1], backbone(image).maps[-1])


def test_a_frozen_backbone_is_inert(frozen: MultiTaskModule) -> None:
    backbone = frozen.model.backbone
    assert any(isinstance(m, DropPath) for m in backbone.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    before, fingerprint = contents(backbone), backbone.fingerprint()
    heads = {name: p.clone() for name, p in frozen.model.heads.named_parameters()}

    had_gradient = train(frozen, steps=3)
    frozen.train()
    assert frozen.training and frozen.model.heads.training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert changed(backbone, before) == set()
    assert backbone.fingerprint() == fingerprint
    assert not draws_in_training(backbone)

    assert all(learned == name.startswith("heads.") for name, learned in had_gradient.items())
    moved = {name for name, p in frozen.model.heads.named_parameters() if not torch.equal(p, heads[name])}
    assert moved == set(heads)


def test_a_frozen_backbone_builds_no_graph(frozen: MultiTaskModule) -> None:
    frozen.train()
    image = torch.rand(1, 3, 32, 32, requires_grad=True)  # even where the image itself asks for one
    pyramid = frozen.model.backbone(image)
    assert not any(features.requires_grad or features.grad_fn for features in pyramid.maps)
    assert torch.is_grad_enabled()
    assert all(output.requires_grad for output in frozen.model(image.detach()).values())


def test_the_optimizer_does_not_hold_a_frozen_backbone(frozen: MultiTaskModule) -> None:
    held = {id(p) for group in frozen.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in frozen.model.heads.parameters()}


def test_the_same_backbone_moves_when_it_is_not_frozen() -> None:
    """Without this the tests above might show nothing."""
    module = make_module(freeze=False)
    backbone = module.model.backbone
    before, fingerprint = contents(backbone), backbone.fingerprint()
    assert all(train(module, steps=1).values())
    moved = changed(backbone, before)
    assert {name for name, _ in backbone.named_parameters()} <= moved
    assert any(name.endswith("running_mean") for name in moved)
    assert backbone.fingerprint() != fingerprint
    assert draws_in_training(backbone)


# Partly frozen


PARTLY: dict[str, tuple[int, str]] = {
    "resnet18": (2, r"model\.(conv1|bn1|layer1|layer2)\."),
    "mobilenetv4_conv_small": (2, r"model\.(conv_stem|bn1|blocks\.[01])\."),
    "convnext_atto": (1, r"model\.(stem_[01]|stages_0)\."),
    "efficientnet_b0": (3, r"model\.(conv_stem|bn1|blocks\.[012])\."),
    "regnetx_002": (3, r"model\.(stem|s1|s2|s3)\."),
    "swin_tiny_patch4_window7_224": (2, r"model\.(patch_embed|layers_0|layers_1)\."),
    "maxvit_rmlp_pico_rw_256": (1, r"model\.(stem|stages_0)\."),
    "mobilevit_xxs": (2, r"model\.(stem|stages_0|stages_1)\."),
    "hiera_tiny_224": (3, r"model\.model\.(pos_embed$|patch_embed\.|blocks\.[012]\.)"),
    "pvt_v2_b0": (1, r"model\.(patch_embed|stages_0)\."),
    "vit_tiny_patch16_224": (3, r"model\.(cls_token$|pos_embed$|patch_embed\.|blocks\.[012]\.)"),
    "vit_wee_patch16_reg1_gap_256": (4, r"model\.(reg_token$|pos_embed$|patch_embed\.|blocks\.[0123]\.)"),
}
"""By name how many stages to freeze, and a pattern, by hand, of what that is."""


def make_partly_frozen(name: str) -> tuple[Backbone, set[str]]:
    """Return a backbone with dropout wherever it can be, some stages of it frozen, and the names of what is."""
    stages, pattern = PARTLY[name]
    own = timm.get_pretrained_cfg(name).input_size[1:]
    backbone = Backbone(name, own if name.startswith(("hiera", "maxvit")) else (64, 64))
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        elif isinstance(module, DropPath):
            module.drop_prob = 0.3
    backbone.freeze(stages)
    return backbone, {n for n in backbone.encoder.state_dict() if re.match(pattern, n)}


@pytest.mark.parametrize("name", PARTLY)
def test_frozen_stages_are_inert_and_the_others_learn(name: str) -> None:
    backbone, frozen = make_partly_frozen(name)
    stages, _ = PARTLY[name]
    fingerprint = backbone.fingerprint(stages), backbone.fingerprint()
    before = {n: t.clone() for n, t in backbone.encoder.state_dict().items()}
    parameters = dict(backbone.encoder.named_parameters())
    assert {n for n, p in parameters.items() if not p.requires_grad} == frozen & parameters.keys()
    assert not backbone.frozen

    image = torch.rand(2, 3, *backbone.size, requires_grad=True)
    backbone.eval().train()
    maps = [m for m in backbone(image).maps if m.numel()]
    built = [m.requires_grad for m in maps]
    assert any(built) and not all(built), "some maps come from frozen stages alone, some do not"
    sum(m.square().mean() for m in maps if m.requires_grad).backward()
    assert image.grad is None
    assert all(p.grad is None for n, p in parameters.items() if n in frozen)
    learning = {n for n, p in parameters.items() if p.grad is not None}
    assert learning == parameters.keys() - frozen
    with torch.no_grad():
        for n in learning:
            parameters[n].sub_(0.1 * parameters[n].grad).mul_(1.01).add_(0.001)

    again = [m for m in backbone(image.detach()).maps if m.numel()]
    for features, later, has_graph in zip(maps, again, built, strict=True):
        # Neither a step nor chance changes what has no graph: that shows that nothing else was left without one.
        assert torch.equal(features, later) != has_graph
    changed = {n for n, t in backbone.encoder.state_dict().items() if not torch.equal(t, before[n])}
    assert changed >= learning and not changed & frozen
    assert backbone.fingerprint(stages) == fingerprint[0]
    assert backbone.fingerprint() != fingerprint[1]


def test_freezing_counts_stages_from_the_stem_on() -> None:
    """And each further stage leaves one map more without a graph."""
    bare = {}
    for stages in (1, 2, 3):
        backbone = Backbone("resnet18", (64, 64))
        backbone.freeze(stages)
        bare[stages] = [m.requires_grad for m in backbone(torch.rand(2, 3, 64, 64)).maps]
    assert bare == {n: [False] * (2 + n) + [True] * (4 - n) for n in (1, 2, 3)}


def test_what_lies_between_stages_is_in_evaluation_mode() -> None:
    backbone = Backbone(PLAIN, (64, 64))
    backbone.freeze(2)
    outer = copy.deepcopy(nn.Sequential(backbone)).train()  # a copy, as averages of weights are made on
    model = outer[0].encoder.model
    assert (model.pos_drop.training, model.patch_embed.training, model.norm_pre.training) == (False, False, False)
    assert [block.training for block in model.blocks] == [False] * 2 + [True] * 10
    assert [block.attn.proj_drop.training for block in model.blocks] == [False] * 2 + [True] * 10


@pytest.mark.parametrize("stages", [None, 3])
def test_a_thawed_backbone_learns_as_a_whole(stages: int | None) -> None:
    backbone = Backbone("mobilenetv4_conv_small", (64, 64))
    backbone.freeze(stages)
    backbone.thaw()
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    maps = backbone.train()(torch.rand(2, 3, 64, 64)).maps
    sum(m.square().mean() for m in maps if m.numel() and m.requires_grad).backward()
    assert all(module.training for module in backbone.modules())
    assert all(p.grad is not None for p in backbone.parameters())
    assert {n for n in before if "running_" in n} <= changed(backbone, before)


@pytest.mark.parametrize(
    ("name", "stages", "fragments"),
    [
        ("resnet18", 4, ["--freeze-stages 4", "resnet18 has 4 stages", "give 1 to 3", "--freeze for the whole"]),
        ("resnet18", 0, ["--freeze-stages 0", "give 1 to 3"]),
        (PLAIN, 13, ["--freeze-stages 13", "has 12 blocks", "give 1 to 11"]),
        ("poolformer_s12", 1, ["poolformer_s12", "does not say which stages", "leave out --freeze-stages"]),
    ],
)
def test_stages_that_are_not_there_are_a_sentence(name: str, stages: int, fragments: list[str]) -> None:
    backbone = Backbone(name, (64, 64))
    with pytest.raises(UserError) as caught:
        backbone.freeze(stages)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message
    assert all(p.requires_grad for p in backbone.parameters()) and backbone.frozen_stages == 0


# Fingerprint and normalisation


def test_the_fingerprint_sees_one_element_of_any_tensor() -> None:
    backbone = Backbone("mobilenetv4_conv_small", SIZE)
    seen = {backbone.fingerprint()}
    tensors = list(backbone.state_dict().values())
    chosen = [*tensors[:6], backbone.mean, backbone.std, tensors[-1]]
    for tensor in chosen:
        tensor.view(-1)[-1] += 1
        seen.add(backbone.fingerprint())
    assert len(seen) == 1 + len(chosen)
    other = Backbone("mobilenetv4_conv_small", SIZE)
    other.load_state_dict(backbone.state_dict())
    assert other.to(memory_format=torch.channels_last).fingerprint() in seen


def test_the_normalisation_travels_with_the_weights() -> None:
    backbone = Backbone("mobilenetv4_conv_small", SIZE)
    backbone.mean.fill_(0.25)
    other = Backbone("mobilenetv4_conv_small", SIZE)
    other.load_state_dict(backbone.state_dict())
    maps = other(torch.full((1, 3, *SIZE), 0.25)).maps
    assert not maps[0].any()


# What does not fit


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("mobilenetv4_conv_smal", ["'mobilenetv4_conv_smal'", "did you mean 'mobilenetv4_conv_small'"]),
        ("resnet18.tv_in1", ["'resnet18.tv_in1'", "did you mean 'resnet18.tv_in1k'"]),
        ("nothing like it", ["'nothing like it'", "timm"]),
        ("visformer_tiny", ["'visformer_tiny'", "strides 8, 16, 32", "choose another"]),
    ],
)
def test_what_is_no_backbone_is_a_sentence(name: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Backbone(name, SIZE)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


def test_a_model_without_feature_maps_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> nn.Module:
        raise RuntimeError("features_only not implemented for this model.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"'resnet18' gives no feature maps .*; choose another backbone"):
        Backbone("resnet18", SIZE)
