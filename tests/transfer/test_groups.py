"""What an optimizer holds, against timm's own groups of whole models, and in a real optimizer."""

from fnmatch import fnmatch
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from mtl.config import SHIPPED_BACKBONE
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.transfer.groups import parameter_groups

SIZE = (64, 64)
FAMILIES = ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
LAYERS = {"vit_tiny_patch16_224": 13, "resnet18": 9, "vit_wee_patch16_reg1_gap_256": 15}


class Model(nn.Module):
    """A backbone and something behind it that learns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = Backbone(name, SIZE)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.log_variances = nn.Parameter(torch.zeros(2))


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each parameter's group, by the parameter's name; each is in one group only."""
    names = {id(p): n for n, p in model.named_parameters()}
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_learn_at_the_rates_that_timm_gives_them_in_a_whole_model(name: str) -> None:
    """The same weights, found by what they hold, have the scale and the decay of timm's own groups."""
    model = Model(name)
    full = timm.create_model(name, pretrained=False, **model.backbone.size_arguments)
    values = iter(range(1, 10_000))
    for parameter in full.parameters():
        nn.init.constant_(parameter, next(values))
    known = dict(full.named_parameters())
    for own, parameter in model.backbone.encoder.named_parameters():
        inner = own.removeprefix("model.")
        match = inner if inner in known else inner.replace("_", ".", 1)
        nn.init.constant_(parameter, full.get_parameter(match).flatten()[0].item())
    undecayed = full.no_weight_decay() if hasattr(full, "no_weight_decay") else ()
    theirs = {
        parameter.flatten()[0].item(): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(full, 0.05, no_weight_decay_list=undecayed, layer_decay=0.8)
        for parameter in group["params"]
    }
    groups = parameter_groups(model, 0.05, lr=0.3, backbone_lr=0.02, layer_decay=0.8)
    seen = set()
    for own, group in names_of(model, groups).items():
        if own.startswith("backbone."):
            scale, decay = theirs[model.get_parameter(own).flatten()[0].item()]
            assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.02 * scale), decay), own
            seen.add(scale)
        else:
            assert group["lr"] == 0.3
    assert max(seen) == pytest.approx(0.8) and len(seen) > 4


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_block_learns_at_d_and_the_stem_at_d_to_the_number_of_layers(name: str) -> None:
    model, layers = Model(name), LAYERS[name]
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, 0.0, lr=2.0, layer_decay=0.5)}
    assert rates["heads"] == rates["heads/no decay"] == 2.0
    for i in range(layers):
        assert rates[f"backbone/layer {i}"] == 2 * 0.5 ** (layers - i)
    assert max(int(n.split()[1].split("/")[0]) for n in rates if "layer" in n) == layers - 1


def test_the_schedule_moves_every_groups_own_rate() -> None:
    """As training makes it: what is in the optimizer is what learns, at each step."""
    model = Model("resnet18")
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, lr=1.0, backbone_lr=0.25, layer_decay=0.5), lr=9.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = {n: p.clone() for n, p in model.named_parameters()}
    for step in range(2):
        assert {g["name"]: g["lr"] for g in optimizer.param_groups if "layer 8" in g["name"]} == {
            "backbone/layer 8": 0.125 / (1 + step),
            "backbone/layer 8/no decay": 0.125 / (1 + step),
        }
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    moved = {n: float((before[n] - p).mean()) for n, p in model.named_parameters()}
    assert moved["head.0.weight"] == moved["log_variances"] == pytest.approx(1.5, rel=1e-5)
    assert moved["backbone.encoder.model.layer4.1.conv2.weight"] == pytest.approx(1.5 * 0.25 * 0.5, rel=1e-5)
    assert moved["backbone.encoder.model.layer4.0.conv1.weight"] == pytest.approx(1.5 * 0.25 * 0.5**2, rel=1e-5)
    assert moved["backbone.encoder.model.conv1.weight"] == pytest.approx(1.5 * 0.25 * 0.5**9, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"all": 0.1}),
        ({"backbone_lr": 0.02}, {"heads": 0.1, "backbone": 0.02}),
    ],
)
def test_without_layers_there_are_few_groups_in_order(options: dict[str, float], expected: dict[str, float]) -> None:
    orders = []
    for _ in range(2):
        model = Model(SHIPPED_BACKBONE)
        groups = parameter_groups(model, 0.05, lr=0.1, **options)
        orders.append([list(g["params"][0].shape) for g in groups] + [list(names_of(model, groups))])
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
            row for n, lr in expected.items() for row in ((n, lr, 0.05), (f"{n}/no decay", lr, 0.0))
        ]
        assert names_of(model, groups).keys() == dict(model.named_parameters()).keys()
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("vit_wee_patch16_reg1_gap_256", {"pos_embed", "reg_token"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("resnet18", set()),
    ],
)
def test_what_timm_names_is_without_decay(name: str, undecayed: set[str]) -> None:
    model = Model(name)
    found = names_of(model, parameter_groups(model, 0.05))
    for own, group in found.items():
        plain = model.get_parameter(own).dim() <= 1 or own.rpartition(".")[2] in undecayed
        assert group["weight_decay"] == (0.0 if plain else 0.05), own
    assert {n for n in undecayed if any(fnmatch(own, f"*{n}") for own in found)} == undecayed


def test_only_what_learns_is_held() -> None:
    model = Model("resnet18")
    model.backbone.freeze(2)
    found = names_of(model, parameter_groups(model, 0.05, layer_decay=0.5))
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["backbone.encoder.model.layer3.0.conv1.weight"]["lr"] == 0.5**4, "freezing shifts no layer"
    assert all(group["params"] for group in found.values())
    model.backbone.freeze()
    assert names_of(model, parameter_groups(model, 0.05)).keys() == {
        n for n, _ in model.named_parameters() if "bac" not in n
    }
    assert len(parameter_groups(nn.Linear(2, 2), 0.05)) == 2


def test_layers_that_timm_does_not_know_are_a_sentence() -> None:
    model = Model("poolformer_s12")
    assert len(parameter_groups(model, 0.05, backbone_lr=0.1)) == 4
    with pytest.raises(UserError, match="poolformer_s12: timm does not say which layers"):
        parameter_groups(model, 0.05, layer_decay=0.5)
