"""Adapters: what they change and what not, layer by layer, and weights with and without them."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import DropPath
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.models.heads import Head, resolve_decoder
from mtl.models.multitask import MultiTaskModel
from mtl.transfer.lora import add_lora, merge, merged_state
from mtl.transfer.weights import initialise, save_backbone

VIT = "vit_tiny_patch16_224"
FULL = ("qkv", "proj", "fc1", "fc2")
FAMILIES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    VIT: (48, FULL, ()),
    "vit_wee_patch16_reg1_gap_256": (56, FULL, ()),
    "vit_small_patch16_dinov3": (48, FULL, ()),
    "eva02_tiny_patch14_224": (36, ("proj", "fc1", "fc2"), ("qkv",)),
    "beit_base_patch16_224": (36, ("proj", "fc1", "fc2"), ("qkv",)),
    "swin_tiny_patch4_window7_224": (48, FULL, ()),
    "swinv2_tiny_window8_256": (36, ("proj", "fc1", "fc2"), ("qkv",)),
    "hiera_tiny_224": (48, FULL, ()),
    "pvt_v2_b0": (40, ("q", "kv", "proj", "fc1", "fc2"), ()),
    "mobilevit_xxs": (36, FULL, ()),
}
"""By name how many linear layers have adapters, which those are, and which have none."""


def make(name: str) -> Backbone:
    """Return a backbone in which every weight matters to every image, in evaluation mode."""
    backbone = Backbone(name, (224, 224) if name == "hiera_tiny_224" else (64, 64)).eval()
    for module in backbone.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:  # some norms and scales of residual branches begin at zero
                parameter.abs_().add_(0.1 + 0.05 * torch.rand_like(parameter))
    return backbone


def train(backbone: Backbone, image: Tensor) -> None:
    """Take a step with a gradient of every adapter's matrix, as the matrices B begin at zero."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    maps = backbone.train()(image).maps
    torch.stack([m.pow(2).mean() + m[..., 0].sum() * 0.01 for m in maps if m.requires_grad]).sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad / parameter.grad.norm().clamp(min=1e-9))
    backbone.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_learn_beside_weights_that_stay(name: str) -> None:
    count, kinds, without = FAMILIES[name]
    backbone = make(name)
    image = torch.rand(1, 3, *backbone.size)
    plain = {n: t.clone() for n, t in backbone.encoder.state_dict().items()}
    with torch.no_grad():
        before = backbone(image).maps
    adapters = add_lora(backbone, 2)
    assert (len(adapters.layers), {n.rpartition(".")[2] for n in adapters.layers}) == (count, set(kinds))
    assert {n.rpartition(".")[2] for n in adapters.left_out} == set(without)
    with torch.no_grad():
        for one, other in zip(before, backbone(image).maps, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    learning = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * count and all(".lora_A." in n or ".lora_B." in n for n in learning)
    assert all(min(p.shape) == 2 for p in learning.values()), "of the rank"
    train(backbone, image)
    assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == [], "every adapter has an effect"

    # Nothing but the adapters has changed, statistics included.
    state = {n.replace(".base_layer", ""): t for n, t in backbone.encoder.state_dict().items() if "lora_" not in n}
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[n], plain[n]) for n in plain)

    merged, other = merged_state(backbone), Backbone(name, backbone.size).eval()
    assert {n for n in plain if not torch.equal(merged[n], plain[n])} == {f"{n}.weight" for n in adapters.layers}
    other.encoder.load_state_dict(merged)
    with torch.no_grad():
        maps, expected = backbone(image).maps[-1], other(image).maps[-1]
    # Rounding is all that is between them; what the adapters do is far more.
    assert (maps - expected).norm() < 1e-4 * maps.norm()
    assert (maps - before[-1]).norm() > 100 * (maps - expected).norm()


def test_a_layer_is_w_plus_b_a_with_a_scale_of_one() -> None:
    backbone = make(VIT)
    add_lora(backbone, 3)
    layer = backbone.encoder.model.blocks[4].mlp.fc1
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (down.shape, up.shape) == ((3, 192), (768, 3))
    assert down.any() and not up.any()
    nn.init.normal_(up)
    inputs = torch.rand(5, 192)
    by_hand = inputs @ layer.base_layer.weight.T + layer.base_layer.bias + (inputs @ down.T) @ up.T
    torch.testing.assert_close(layer(inputs), by_hand)
    merged = merged_state(backbone)["model.blocks.4.mlp.fc1.weight"]
    torch.testing.assert_close(merged, layer.base_layer.weight + up @ down)


def test_dropout_goes_on_and_statistics_do_not() -> None:
    backbone = make("mobilevit_xxs")
    add_lora(backbone, 2)
    backbone.train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    drops = [m for m in backbone.modules() if isinstance(m, nn.Dropout)]
    assert norms and not any(m.training for m in norms)
    assert drops and all(m.training for m in drops)


def test_the_report_names_what_has_no_adapter() -> None:
    assert str(add_lora(make(VIT), 1)) == "adapters beside 48 linear layers of the backbone"
    said = str(add_lora(make("eva02_tiny_patch14_224"), 1))
    assert said.startswith("adapters beside 36 linear layers") and "none beside 12 (qkv)" in said


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv4_conv_small", "poolformer_s12"])
def test_a_backbone_without_attention_is_a_sentence(name: str) -> None:
    backbone = Backbone(name, (64, 64))
    with pytest.raises(UserError, match=rf"--lora 4: {name} has no transformer blocks .* choose a transformer"):
        add_lora(backbone, 4)
    assert all(p.requires_grad for p in backbone.parameters()) and backbone.training


@pytest.mark.parametrize(("name", "full"), [(VIT, 192), ("pvt_v2_b0", 256)])
def test_a_rank_that_no_weight_has_is_a_sentence(name: str, full: int) -> None:
    """The largest is that of the widest stage."""
    backbone = Backbone(name, (64, 64))
    with pytest.raises(UserError, match=rf"^--lora {full + 1}: the largest rank [^\n]*{name} can have is {full};"):
        add_lora(backbone, full + 1)
    assert all(p.requires_grad for p in backbone.parameters())
    assert add_lora(backbone, full).layers


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora needs the package peft, .* pip install peft"):
        add_lora(Backbone(VIT, (64, 64)), 4)


def test_a_merge_without_adapters_changes_nothing() -> None:
    state = make(VIT).encoder.state_dict()
    assert merge(state).keys() == state.keys()
    assert all(merge(state)[n] is t for n, t in state.items())


# Weights


def model_of(name: str) -> MultiTaskModel:
    backbone = make(name)
    head = Head(backbone, resolve_decoder("auto", backbone), channels=1, width=16)
    return MultiTaskModel(backbone, {"depth": head}).eval()


def adapted(name: str) -> MultiTaskModel:
    model = model_of(name)
    add_lora(model.backbone, 2)
    train(model.backbone, torch.rand(1, 3, *model.backbone.size))
    return model


def save_run(model: MultiTaskModel, path: Path) -> None:
    state = {f"model.{n}": t for n, t in model.state_dict().items()}
    torch.save({"state_dict": state, "experiment": {"backbone": model.backbone.name}}, path)


def test_an_adapted_run_gives_its_weights_to_a_model_without_adapters(tmp_path: Path) -> None:
    old, new = adapted(VIT), model_of(VIT)
    save_run(old, tmp_path / "best.ckpt")
    report = initialise(new, str(tmp_path))
    assert (report.heads, report.left_out) == (["depth"], [])
    assert report.loaded == len(new.backbone.state_dict())
    image = torch.rand(1, 3, *old.backbone.size)
    with torch.no_grad():
        torch.testing.assert_close(new(image)["depth"], old(image)["depth"], rtol=1e-4, atol=1e-4)
    # And to one that is to have adapters of its own, of whatever rank: they come after.
    with torch.no_grad():
        expected = new(image)["depth"]
        add_lora(new.backbone, 5)
        torch.testing.assert_close(new(image)["depth"], expected)


@pytest.mark.parametrize("name", [VIT, "pvt_v2_b0"])
def test_a_saved_backbone_is_a_plain_one_for_timm(name: str, tmp_path: Path) -> None:
    old = adapted(name).backbone
    save_backbone(old, tmp_path / "own.safetensors", {})
    with safe_open(tmp_path / "own.safetensors", framework="pt") as file:
        state = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    full = timm.create_model(name, pretrained=False, **old.size_arguments)
    assert not full.load_state_dict(state, strict=False).unexpected_keys
    new = model_of(name)
    initialise(new, str(tmp_path / "own.safetensors"))
    image = torch.rand(1, 3, *old.size)
    with torch.no_grad():
        maps, expected = new.backbone(image).maps[-1], old(image).maps[-1]
    assert (maps - expected).norm() < 0.01 * expected.norm(), "as far as 16 bits go"


def test_an_adapter_of_which_a_half_is_missing_is_a_sentence(tmp_path: Path) -> None:
    old = adapted(VIT)
    save_run(old, tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del checkpoint["state_dict"]["model.backbone.encoder.model.blocks.0.attn.qkv.lora_B.default.weight"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"1 of \d+ tensors are missing .*blocks\.0\.attn\.qkv\.weight"):
        initialise(model_of(VIT), str(tmp_path / "old.ckpt"))
