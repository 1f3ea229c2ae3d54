"""The study of backbones: what it finds of small ones, what it notices, and the table it makes."""

import re

import pytest
import timm
import torch
from torch import Tensor

from mtl.config import DECODERS
from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.models.heads import Head
from mtl.studies.backbones import FAMILIES, Row, markdown, study, train_step

SIZE = (64, 64)


# What it finds


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def rows(said: list[str]) -> list[Row]:
    names = ["lcnet_050", "ghostnet_050", "levit_128s", "vit_tiny_patch16_224.augreg_in21k"]
    state = torch.get_rng_state()
    rows = study(names, DECODERS, SIZE, said.append)
    assert torch.equal(torch.get_rng_state(), state)
    return rows


def test_which_combinations_train(rows: list[Row]) -> None:
    trained = {row.name: [decoder for decoder, reason in row.reasons.items() if not reason] for row in rows}
    assert trained == {
        "lcnet_050": ["unet", "fpn", "upernet", "segformer", "deeplabv3plus"],
        "ghostnet_050": ["unet", "fpn", "upernet", "segformer"],
        "levit_128s": [],
        "vit_tiny_patch16_224.augreg_in21k": ["dpt"],
    }
    assert all(tuple(row.reasons) == DECODERS for row in rows)


def test_families_and_parameters(rows: list[Row]) -> None:
    lcnet = timm.create_model("lcnet_050", features_only=True)
    assert rows[0].parameters == sum(parameter.numel() for parameter in lcnet.parameters())
    assert rows[2].parameters is None
    assert [row.family for row in rows] == ["LCNet", "GhostNet", "LeViT", "vision_transformer"]


def test_it_says_a_line_for_each_backbone(rows: list[Row], said: list[str]) -> None:
    assert len(said) == len(rows)
    assert said[1].startswith("2/4  ghostnet_050: unet fpn upernet segformer (")
    assert said[2].startswith("3/4  levit_128s: none (")


def test_an_unknown_backbone_is_refused_before_anything_is_trained() -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="timm has no model 'lcnet_05'"):
        study(["lcnet_050", "lcnet_05"], DECODERS, SIZE, said.append)
    assert said == []


def test_it_knows_many_families() -> None:
    assert len(FAMILIES) > 140
    assert len(set(FAMILIES.values())) == len(FAMILIES)
    assert all(timm.is_model(name) for name in FAMILIES)


# What it notices


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("lcnet_050", SIZE)


def test_a_step_changes_the_weights(backbone: Backbone) -> None:
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    train_step(backbone, "auto", SIZE)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())


def spoil(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make heads go wrong."""
    forward = Head.forward

    def spoilt(self: Head, pyramid: Pyramid, size: tuple[int, int]) -> Tensor:
        if what == "graph":
            pyramid = Pyramid([features.detach() for features in pyramid.maps], pyramid.tokens)
        outputs = forward(self, pyramid, size)
        if what == "size":
            return outputs[..., 1:, :]
        if what == "loss":
            return outputs * float("nan")
        if what == "gradient":
            return outputs + torch.where(outputs.isfinite(), 0 * (outputs - outputs).sqrt(), 0)
        if what == "bias":
            return outputs.detach() + sum(p.sum() for n, p in self.named_parameters() if n != "output.bias") * 0
        if what == "zero":
            return outputs * 0
        return outputs

    monkeypatch.setattr(Head, "forward", spoilt)


@pytest.mark.parametrize(
    ("what", "fragments"),
    [
        ("size", ["the error", "64"]),
        ("loss", ["a loss of nan", "gradients that are not finite", "weights that are not finite"]),
        ("gradient", ["gradients that are not finite", "weights that are not finite"]),
        ("graph", ["no gradient for backbone."]),
        ("bias", ["no gradient for", "heads.task.output.bias", "gradients of zero in all of heads"]),
        ("zero", ["gradients of zero in all of backbone and gradients of zero in all of heads"]),
    ],
)
def test_what_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch, what: str, fragments: list[str]) -> None:
    backbone = Backbone("lcnet_050", SIZE)
    train_step(backbone, "unet", SIZE)  # whose gradients are not those of the next step
    spoil(monkeypatch, what)
    with pytest.raises(UserError) as caught:
        train_step(backbone, "unet", SIZE)
    message = str(caught.value)
    assert all(fragment in message for fragment in ["--decoder unet", "'lcnet_050'", "64x64", *fragments]), message
    assert "\n" not in message


def test_what_goes_wrong_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "loss")
    (row,) = study(["lcnet_050"], ["unet", "segformer"], SIZE, lambda line: None)
    assert all("a loss of nan" in reason for reason in row.reasons.values())


# The table


def test_the_table_has_one_sentence_for_each_reason() -> None:
    def misfit(decoder: str, name: str) -> str:
        return f"--decoder {decoder} does not fit {name!r}, which is flat; use --decoder dpt or auto"

    rows = [
        Row("Net", "net_a", 1_260_000, {"unet": "", "fpn": "", "dpt": "--backbone: 'net_a' has no tokens"}, 1.0),
        Row("Net 2", "net_b", 240_000, {"unet": "", "fpn": "", "dpt": "--backbone: 'net_b' has no tokens"}, 1.0),
        Row("ViT", "vit", 85_990_000, {"unet": misfit("unet", "vit"), "fpn": misfit("fpn", "vit"), "dpt": ""}, 1.0),
        Row("Odd", "odd", None, dict.fromkeys(["unet", "fpn", "dpt"], "--backbone: the maps of 'odd' are odd"), 1.0),
    ]
    assert (
        markdown(rows)
        == """\
| family | model | parameters (M) | unet | fpn | dpt |
| --- | --- | ---: | --- | --- | --- |
| Net | `net_a` | 1.3 | yes | yes | no (1) |
| Net 2 | `net_b` | 0.2 | yes | yes | no (1) |
| ViT | `vit` | 86.0 | no (2) | no (2) | yes |
| Odd | `odd` |  | no (3) | no (3) | no (3) |

1. This backbone has no tokens.
2. This decoder does not fit this backbone, which is flat; use --decoder dpt or auto.
3. The maps of this backbone are odd.
"""
    )


def test_each_reason_of_a_study_has_a_sentence(rows: list[Row]) -> None:
    table, _, notes = markdown(rows).partition("\n\n")
    used = {int(number) for number in re.findall(r"no \((\d+)\)", table)}
    assert [int(note.partition(".")[0]) for note in notes.splitlines()] == sorted(used) == list(range(1, len(used) + 1))
    assert not any(row.name in notes for row in rows)
    assert len(re.findall(r"no \(|yes", table)) == len(rows) * len(DECODERS)


def test_no_rows_make_no_table() -> None:
    assert markdown([]) == ""
