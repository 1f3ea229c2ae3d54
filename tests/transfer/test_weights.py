"""Initial weights against timm's own loading, and files that are not what they should be."""

import collections
import itertools
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl.build import build_module
from mtl.config import SHIPPED_BACKBONE, validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.models.heads import Head, resolve_decoder
from mtl.models.multitask import MultiTaskModel
from mtl.training.module import MultiTaskModule
from mtl.transfer.weights import (
    Report,
    initialise,
    load_checkpoint,
    load_weights,
    read_weights,
    require,
    save_backbone,
    timm_names,
)

SIZE = (64, 96)
SMALL = "mobilenetv4_conv_small"
VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
FAMILIES = [SMALL, "resnet10t", "convnext_atto", "regnetx_002", "hgnetv2_b0", VIT]

FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "w.safetensors": save_file,
    "w.pth": torch.save,
    "w.tar": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "w.bin": lambda state, path: torch.save(collections.OrderedDict(model=state), path),
}


def make(name: str, size: tuple[int, int] = SIZE) -> MultiTaskModel:
    """Return a model with a task."""
    backbone = Backbone(name, size)
    head = Head(backbone, resolve_decoder("auto", backbone), channels=1, width=16)
    return MultiTaskModel(backbone, {"depth": head}).eval()


def random_state(name: str, **options: Any) -> dict[str, Tensor]:
    """Return the state of timm's full model in 16 bits, every tensor of it with values of its own."""
    state = timm.create_model(name, pretrained=False, **options).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
    return {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def assert_as_timm(model: MultiTaskModel, path: Path, **options: Any) -> None:
    """Compare with the features of the model that timm itself makes of a file."""
    name = model.backbone.name
    reference = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options
    ).eval()
    image = torch.rand(1, 3, *SIZE)
    mean, std = (torch.tensor(timm.get_pretrained_cfg(name).to_dict()[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        maps, expected = model.backbone(image).maps, reference((image - mean) / std)
    if getattr(reference, "output_fmt", None) == "NHWC":
        expected = [features.permute(0, 3, 1, 2) for features in expected]
    for features, own in zip(maps[-len(expected) :], expected, strict=True):
        torch.testing.assert_close(features, own, atol=1e-4, rtol=1e-4)


# timm's files


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_weights_give_timms_features(name: str, tmp_path: Path) -> None:
    state = random_state(name)
    fingerprints = set()
    for file, write in FORMATS.items():
        write(state, tmp_path / file)
        model = make(name)
        before = model.backbone.fingerprint()
        report = initialise(model, str(tmp_path / file))
        after = model.backbone.fingerprint()
        assert after != before
        fingerprints.add(after)

        own = len(model.backbone.encoder.state_dict())
        assert (report.loaded, len(report.left_out), report.reshaped) == (own, len(state) - own, [])
        assert (report.heads, report.new_heads) == ([], ["depth"])
        classifier = timm.get_pretrained_cfg(name).classifier
        assert {f"{classifier}.weight", f"{classifier}.bias"} <= set(report.left_out)
        for said in (f"{own} tensors from {tmp_path / file}", f"{len(state) - own} left out", "new for depth"):
            assert said in str(report)
    assert len(fingerprints) == 1
    options = {"out_indices": (2, 5, 8, 11), "dynamic_img_size": True} if name == VIT else {}
    assert_as_timm(model, tmp_path / "w.safetensors", **options)


def test_position_embeddings_of_another_size_are_resampled_as_timm_does(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    save_file(random_state(VIT, img_size=128, num_classes=7), path)
    model = make(VIT)
    report = initialise(model, str(path))
    assert report.reshaped == ["pos_embed"]
    assert "1 fitted to another shape (pos_embed)" in str(report)
    assert_as_timm(model, path, out_indices=(2, 5, 8, 11), dynamic_img_size=True, num_classes=7)


def test_relative_positions_of_another_window_are_resampled_as_timm_does(tmp_path: Path) -> None:
    """At 64 x 96 pixels the last stages have fewer positions than a window of 7 x 7."""
    path = tmp_path / "swin.safetensors"
    save_file(random_state(SWIN), path)
    model = make(SWIN)
    report = initialise(model, str(path))
    assert report.reshaped
    assert all(name.endswith("relative_position_bias_table") for name in report.reshaped)
    assert_as_timm(model, path, img_size=SIZE)


def test_a_transformer_without_a_classifier_is_enough(tmp_path: Path) -> None:
    """As self-supervised weights come."""
    state = {key: tensor for key, tensor in random_state(VIT).items() if not key.startswith("head.")}
    save_file(state, tmp_path / "vit.safetensors")
    assert initialise(make(VIT), str(tmp_path / "vit.safetensors")).left_out == ["norm.bias", "norm.weight"]


# A backbone of our own


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_backbone_comes_back_within_half_precision(name: str, tmp_path: Path) -> None:
    model, other = make(name), make(name)
    backbone, path = model.backbone, tmp_path / "own.safetensors"
    backbone.mean.copy_(torch.tensor([0.1, 0.25, 1 / 3]).view(1, 3, 1, 1))
    backbone.std.copy_(torch.tensor([0.7, 0.55, 2 / 3]).view(1, 3, 1, 1))
    save_backbone(backbone, path, {"steps": 12})
    report = initialise(other, str(path))

    # What the encoder lacks is in the file, as timm takes nothing less, and is the same in every file.
    unused = timm.create_model(name, pretrained=False).state_dict().keys() - state_names(backbone)
    assert (set(report.left_out), report.reshaped) == (unused, [])
    assert f"{timm.get_pretrained_cfg(name).classifier}.weight" in unused
    assert torch.equal(other.backbone.mean, backbone.mean)
    assert torch.equal(other.backbone.std, backbone.std)
    for key, tensor in backbone.encoder.state_dict().items():
        torch.testing.assert_close(other.backbone.encoder.state_dict()[key], tensor, rtol=2**-11, atol=2**-25)
    assert other.backbone.encoder.state_dict().keys() == backbone.encoder.state_dict().keys()

    # Anyone with timm and safetensors can read it.
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["mtl"])
    assert (about["backbone"], about["provenance"]) == (name, {"steps": 12})
    timm.create_model(name, pretrained=False).load_state_dict(state)
    save_backbone(other.backbone, tmp_path / "again.safetensors", {})
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], state[key]) for key in unused)
    (tmp_path / "again.safetensors").unlink()
    assert path.stat().st_size < 2.1 * sum(tensor.numel() for tensor in state.values()) + 100_000
    assert [file.name for file in tmp_path.iterdir()] == ["own.safetensors"]


def state_names(backbone: Backbone) -> set[str]:
    """Return timm's names of what a backbone has."""
    return set(timm_names(backbone, backbone.encoder.state_dict()).values())


SAVED = [
    *("resnet18", "convnext_atto", "convnextv2_atto", SMALL, "efficientnet_b0", "regnety_002", VIT, SWIN),
    *("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "hiera_tiny_224", "maxvit_pico_rw_256"),
    pytest.param("maxvit_tiny_tf_224", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_backbone_is_timms_own_model(name: str, tmp_path: Path) -> None:
    """It is loaded strictly by timm and by --init, and both give the features of what was saved."""
    backbone, path = Backbone(name, SIZE).eval(), tmp_path / "own.safetensors"
    with torch.no_grad():
        for tensor in backbone.encoder.state_dict().values():
            if tensor.is_floating_point():  # as it comes back, and nothing at its initial value
                tensor.copy_((tensor * (1 + 0.1 * torch.rand_like(tensor)) + 0.01 * torch.rand_like(tensor)).half())
    save_backbone(backbone, path, {})
    reference = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **backbone.size_arguments
    ).eval()
    image = torch.rand(1, 3, *backbone.size)
    with torch.no_grad():
        maps = backbone(image).maps
        for tensor in backbone.encoder.state_dict().values():
            tensor.zero_()
        initialise(MultiTaskModel(backbone, {}), str(path))
        again = backbone(image).maps
        # The last of them is what comes before the final norm.
        own = reference.forward_intermediates((image - backbone.mean) / backbone.std, intermediates_only=True)
    for features, expected in zip(again, maps, strict=True):
        assert torch.equal(features, expected)
    assert own[-1].shape == maps[-1].shape
    torch.testing.assert_close(own[-1], maps[-1], rtol=1e-4, atol=1e-4)
    with safe_open(path, framework="pt") as file:
        arguments = json.loads(file.metadata()["mtl"])["arguments"]
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()} == backbone.size_arguments


def test_saving_changes_no_random_number(tmp_path: Path) -> None:
    backbone = Backbone(SMALL, SIZE)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    save_backbone(backbone, tmp_path / "own.safetensors", {})
    assert torch.equal(torch.rand(4), expected)


def test_what_was_trained_elsewhere_is_saved_too(tmp_path: Path) -> None:
    backbone, path = Backbone(VIT, SIZE), tmp_path / "own.safetensors"
    others = {"norm.weight": torch.rand(192).half().float(), "norm.bias": torch.rand(192).half().float()}
    save_backbone(backbone, path, {}, others)
    norm = timm.create_model(VIT, pretrained=True, pretrained_cfg_overlay={"file": str(path)}).norm
    assert torch.equal(norm.weight, others["norm.weight"])
    assert torch.equal(norm.bias, others["norm.bias"])
    path.unlink()
    for wrong in ({"norm.weight": torch.rand(7)}, {"last.weight": torch.rand(192)}):
        with pytest.raises(UserError, match=rf"^[^\n]*own {VIT} has no tensors {next(iter(wrong))} of [^\n]*$"):
            save_backbone(backbone, path, {}, wrong)
    assert not path.exists()


def test_a_saved_backbone_fits_its_own_kind_only(tmp_path: Path) -> None:
    save_backbone(Backbone(SMALL, SIZE), tmp_path / "own.safetensors", {})
    expect(tmp_path / "own.safetensors", "holds weights of mobilenetv4_conv_small", "is resnet18", name="resnet18")


# Checkpoints of our own


def make_module(*tasks: str, classes: int = 3) -> MultiTaskModule:
    torch.manual_seed(torch.seed() % 2**31)
    experiment = validate({"task": list(tasks), "data": {"size": [32, 32]}, "decoder_channels": 16, "init": "none"})
    info = DataInfo("test", ("segmentation", "depth"), tuple(f"class {i}" for i in range(classes)))
    return build_module(experiment, info, total_steps=1)


def save_run(module: MultiTaskModule, path: Path) -> None:
    """Write what Lightning writes, as far as weights go."""
    path.parent.mkdir(exist_ok=True)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 5, "pytorch-lightning_version": "2"}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_heads_of_common_tasks_are_kept_and_others_new(tmp_path: Path) -> None:
    old, new = make_module("depth"), make_module("segmentation", "depth")
    save_run(old, tmp_path / "run" / "best.ckpt")
    fresh = {name: tensor.clone() for name, tensor in new.model.heads["segmentation"].state_dict().items()}
    report = initialise(new.model, str(tmp_path / "run"))
    assert equal(new.model.backbone, old.model.backbone)
    assert equal(new.model.heads["depth"], old.model.heads["depth"])
    assert all(torch.equal(t, fresh[n]) for n, t in new.model.heads["segmentation"].state_dict().items())
    assert (report.heads, report.new_heads, report.left_out) == (["depth"], ["segmentation"], [])
    assert "heads: kept for depth, new for segmentation" in str(report)


def test_heads_without_a_task_are_left_out(tmp_path: Path) -> None:
    old, new = make_module("segmentation", "depth"), make_module("depth")
    save_run(old, tmp_path / "old.ckpt")
    report = initialise(new.model, str(tmp_path / "old.ckpt"))
    assert equal(new.model.heads["depth"], old.model.heads["depth"])
    assert len(report.left_out) == len(old.model.heads["segmentation"].state_dict())
    assert all(name.startswith("model.heads.segmentation.") for name in report.left_out)


def test_a_head_with_other_classes_is_new(tmp_path: Path) -> None:
    old, new = make_module("segmentation", classes=3), make_module("segmentation", classes=4)
    save_run(old, tmp_path / "old.ckpt")
    report = initialise(new.model, str(tmp_path / "old.ckpt"))
    assert equal(new.model.backbone, old.model.backbone)
    assert (report.heads, report.new_heads) == ([], ["segmentation"])


def test_a_run_stands_for_its_best_checkpoint_then_its_last(tmp_path: Path) -> None:
    best, last, new = make_module("depth"), make_module("depth"), make_module("depth")
    save_run(last, tmp_path / "last.ckpt")
    initialise(new.model, str(tmp_path))
    assert equal(new.model, last.model)
    save_run(best, tmp_path / "best.ckpt")
    initialise(new.model, str(tmp_path))
    assert equal(new.model, best.model)


def test_weights_go_back_into_the_module_they_came_from(tmp_path: Path) -> None:
    old, new = make_module("segmentation", "depth"), make_module("segmentation", "depth")
    save_run(old, tmp_path / "best.ckpt")
    checkpoint = load_checkpoint(tmp_path / "best.ckpt")
    require(checkpoint, tmp_path / "best.ckpt", "state_dict", "experiment", "data", "thawed_at", "constant")
    load_weights(new, checkpoint["state_dict"], tmp_path / "best.ckpt")
    assert equal(new, old)


def test_a_checkpoint_that_lacks_entries_is_a_sentence() -> None:
    path = Path("runs/x/last.ckpt")
    require({"constant": {}, "thawed_at": None}, path, "constant", "thawed_at")  # of little value, but there
    with pytest.raises(UserError, match=r"^runs/x/last.ckpt lacks 'data', 'generators', which a run's [^\n]*$"):
        require({"state_dict": {}, "global_step": 1}, path, "state_dict", "data", "global_step", "generators")


Change = Callable[[dict[str, Any]], object]
SPOILT: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop("1.weight"), r"5 tensors: 1 missing \(1\.weight\);"),
    "shape": (lambda s: s.update({"0.bias": torch.zeros(4)}), r"1 of another shape \(0\.bias\);"),
    "no tensor": (lambda s: s.update({"0.bias": "x"}), r"1 of another shape \(0\.bias\);"),
    "unknown": (lambda s: s.update(a=1, b=2, c=3), r"3 unknown \(a, b, \.\.\.\);"),
    "all": (
        lambda s: (s.pop("1.bias"), s.update({"0.weight": torch.zeros(2, 3), "new": torch.zeros(1)})),
        r"1 missing \(1\.bias\), 1 of another shape \(0\.weight\), 1 unknown \(new\);",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_weights_that_do_not_fit_are_a_sentence_and_change_nothing(case: str) -> None:
    change, words = SPOILT[case]
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module.register_buffer("prior", torch.zeros(1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state: dict[str, Any] = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(UserError, match=rf"^best.ckpt does not fit [^\n]*{words}[^\n]*$"):
        load_weights(module, state, Path("best.ckpt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_state_dict_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^best.ckpt holds no tensors by name, but a int;"):
        load_weights(nn.Linear(1, 1), 3, Path("best.ckpt"))
    for value in (3, {}, {"w": "x"}, {1: torch.zeros(1)}):
        torch.save({"experiment": {"backbone": SMALL}, "state_dict": value}, tmp_path / "own.ckpt")
        expect(tmp_path / "own.ckpt", "holds no tensors by name")


# What cannot be used


def expect(source: Path | str, *fragments: str, name: str = SMALL) -> None:
    """Expect one sentence that names what was given and says these things, and a model left as it was."""
    model = make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        initialise(model, str(source))
    message = str(caught.value)
    for fragment in (str(source), *fragments):
        assert fragment in message, message
    assert "\n" not in message
    assert len(message) < 300 + 2 * len(str(source))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_weights_of_another_model(tmp_path: Path) -> None:
    save_file(random_state("resnet10t"), tmp_path / "resnet.safetensors")
    expect(tmp_path / "resnet.safetensors", "does not fit backbone mobilenetv4_conv_small", "tensors are missing")


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_weights_of_another_size_of_model(name: str, tmp_path: Path) -> None:
    """They hold shapes to fit, and much at which timm's own fitting stumbles."""
    state = random_state("vit_small_patch16_224", img_size=128) if name == VIT else random_state(SWIN)
    if name == SWIN:
        state["layers.2.blocks.9.attn.relative_position_bias_table"] = torch.zeros(169, 12)
    save_file(state, tmp_path / "other.safetensors")
    expect(tmp_path / "other.safetensors", f"does not fit backbone {name}", "have another shape", name=name)


def test_missing_tensors(tmp_path: Path) -> None:
    state = random_state(SMALL)
    del state["conv_stem.weight"], state["bn1.running_mean"]
    save_file(state, tmp_path / "w.safetensors")
    expect(tmp_path / "w.safetensors", "2 of ", "missing", "conv_stem.weight", "bn1.running_mean")


def test_wrong_shapes(tmp_path: Path) -> None:
    state = random_state(SMALL)
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1].contiguous()
    save_file(state, tmp_path / "w.safetensors")
    expect(tmp_path / "w.safetensors", "1 of ", "another shape", "conv_stem.weight")


def test_a_checkpoint_of_another_backbone_or_decoder_size(tmp_path: Path) -> None:
    module = make_module("depth")
    save_run(module, tmp_path / "old.ckpt")
    expect(tmp_path / "old.ckpt", f"holds weights of {SHIPPED_BACKBONE}", "is resnet18", name="resnet18")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del checkpoint["state_dict"]["model.backbone.mean"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    expect(tmp_path / "old.ckpt", "1 of ", "missing", "mean")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    contents: dict[str, tuple[bytes, str]] = {
        "empty.ckpt": (b"", "not a checkpoint"),
        "empty.safetensors": (b"", "not a safetensors file"),
        "text.ckpt": (b"hello, this is a text\n", "not a checkpoint"),
        "notes.ckpt": (b"task: depth\nfreeze: true\n", "not a checkpoint"),
        "text.safetensors": (b"hello, this is a text\n", "not a safetensors file"),
        "picture.pth": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        "bytes.bin": (bytes(range(256)) * 4, "not a checkpoint"),
    }
    for name, (content, fragment) in contents.items():
        (tmp_path / name).write_bytes(content)
        expect(tmp_path / name, fragment)


def test_torch_files_that_hold_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    expect(tmp_path / "list.pt", "holds a list")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    expect(tmp_path / "tensor.pt", "holds a Tensor")
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "notes.pt")
    expect(tmp_path / "notes.pt", "no tensors by name")
    torch.save({"experiment": "mine", "state_dict": {"w": torch.zeros(3)}}, tmp_path / "other.pt")
    expect(tmp_path / "other.pt", "does not fit backbone", "missing")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    expect(tmp_path / "run", "neither best.ckpt nor last.ckpt")
    expect(tmp_path / "nothing.ckpt", "there is no such file or run", "shipped, imagenet, none")
    expect("imagnet", "there is no such file or run (did you mean 'imagenet'?)")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        load_checkpoint(tmp_path / "nothing.ckpt")


def test_truncated_files(tmp_path: Path) -> None:
    """Every prefix of a small file, and none of them is taken for whole."""
    state = {"w": torch.rand(40), "n": torch.arange(5)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for whole in (tmp_path / "w.safetensors", tmp_path / "new.pt", tmp_path / "old.pt"):
        content = whole.read_bytes()
        cut = tmp_path / f"cut{whole.suffix}"
        for length in range(0, len(content), 1 if len(content) < 1000 else 7):
            cut.write_bytes(content[:length])
            with pytest.raises(UserError) as caught:
                read_weights(cut)
            message = str(caught.value)
            assert str(cut) in message
            # A name of torch's own that is cut off looks like somebody else's.
            assert "damaged" in message or (whole.stem == "old" and "pickled code" in message)
            assert "\n" not in message
        assert read_weights(whole)[0].keys() == state.keys()


def test_damaged_files_are_a_sentence_or_still_whole(tmp_path: Path) -> None:
    """Wherever a byte is wrong, torch's reader raises something of its own, or does not notice."""
    torch.save({"w": torch.rand(40)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "whole.pt").read_bytes()
    refused = 0
    for position, flip in itertools.product(range(0, len(content), 3), (0x01, 0x55)):
        damaged = bytearray(content)
        damaged[position] ^= flip
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            read_weights(tmp_path / "damaged.pt")
        except UserError:
            refused += 1
    assert refused > 50


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


class ShellTrap(Trap):
    """One whose function is in a module that torch blocks, about which it has words of their own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.path}",)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Trap, ShellTrap])
def test_code_in_a_file_never_runs(kind: type[Trap], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap, state = kind(sprung), {"w": torch.zeros(3)}
    torch.save(trap, tmp_path / "whole.pt")
    torch.save({"state_dict": state, "hyper_parameters": trap}, tmp_path / "beside.ckpt")
    torch.save({"state_dict": state | {"v": trap}}, tmp_path / "inside.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(trap, protocol=2))
    for name in ("whole.pt", "beside.ckpt", "inside.pth", "plain.pt"):
        expect(tmp_path / name, "holds pickled code, which is never run")
    (tmp_path / "best.ckpt").write_bytes((tmp_path / "beside.ckpt").read_bytes())
    with pytest.raises(UserError, match="holds pickled code, which is never run"):
        initialise(make(SMALL), str(tmp_path))
    (tmp_path / "modern.pt").write_bytes(pickle.dumps(trap, protocol=5))
    expect(tmp_path / "modern.pt", "holds pickled code, which is never run")
    content = (tmp_path / "beside.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    expect(tmp_path / "cut.ckpt", "truncated, damaged or not a checkpoint")
    (tmp_path / "modern.safetensors").write_bytes(pickle.dumps(trap))
    expect(tmp_path / "modern.safetensors", "not a safetensors file")
    assert not sprung.exists()

    pickle.loads((tmp_path / "modern.pt").read_bytes())  # the trap is one
    assert sprung.exists()


# Weights that come from elsewhere


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put the hub where nobody answers; return its cache on this machine."""
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(hub, "ENDPOINT", nobody)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_imagenet_without_a_network_soon_names_the_way_out(unreachable: Path) -> None:
    start = time.monotonic()
    expect("imagenet", "resnet18", "cannot be fetched", "--init PATH", "shipped or none", name="resnet18")
    assert time.monotonic() - start < 15  # the hub's client would retry for three times as long


def test_imagenet_weights_fetched_before_need_no_network(unreachable: Path) -> None:
    state = random_state("resnet10t")
    revision = "0" * 40
    folder = unreachable / f"models--{timm.get_pretrained_cfg('resnet10t').hf_hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(state, folder / "snapshots" / revision / "model.safetensors")
    model = make("resnet10t")
    report = initialise(model, "imagenet")
    assert report.left_out == ["fc.bias", "fc.weight"]
    assert_as_timm(model, folder / "snapshots" / revision / "model.safetensors")


def test_imagenet_for_a_model_that_has_no_weights() -> None:
    expect("imagenet", "timm has no weights of ghostnet_050", "--init PATH", name="ghostnet_050")


def test_shipped_is_for_its_own_backbone() -> None:
    expect("shipped", f"weights of {SHIPPED_BACKBONE}, not of resnet10t", "--init imagenet", "none", name="resnet10t")


def test_none_changes_nothing() -> None:
    model = make(SMALL)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = initialise(model, "none")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert report == Report("random", new_heads=["depth"])
    assert str(report) == "backbone: random; heads: new for depth"
