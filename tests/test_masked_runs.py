"""Masked pretraining as a person uses it: pretrain, look, transfer, and take the weights elsewhere."""

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from mtl.cli import main
from mtl.models.backbone import Backbone
from mtl.runs import load_run
from mtl.transfer.weights import load_checkpoint, read_weights

BACKBONES = {
    "tokens": ["--backbone", "vit_tiny_patch16_224", "--mask.decoder-depth", "1"],
    "convolution": ["--backbone", "mobilenetv4_conv_small"],
    "input": ["--backbone", "mobilevitv2_050"],
}
"""A small backbone for each way of masking."""


def run(*words: str) -> int:
    return main(list(words), program="python -m mtl")


def column(path: Path, name: str) -> list[float]:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    return [*tiny, "--data.size", "64", "64", "--mask.decoder-width", "32"]


def pictures(root: Path, count: int = 12) -> Path:
    """Write a data set of pictures alone, each of one colour."""
    (root / "images").mkdir(parents=True)
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (count, 3))):
        Image.new("RGB", (80, 64), tuple(colour.tolist())).save(root / "images" / f"{number}.png")
    return root


class TestPretraining:
    @pytest.mark.parametrize("method", BACKBONES)
    def test_pretrain_then_transfer_here_and_in_timm(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
    ) -> None:
        runs = tmp_path / "runs"
        backbone, its_masking = BACKBONES[method][:2], BACKBONES[method][2:]
        flags = [*tiny, "--data.size", "64", "64", *backbone, "--max-steps", "8"]
        masked = ["--task", "masked", "--mask.decoder-width", "32", *its_masking]
        assert run("train", *flags, *masked, "--name", "pretrained") == 0
        said = capsys.readouterr().out
        assert "backbone.safetensors" in said and f"--init {runs / 'pretrained'}" in said
        folder = runs / "pretrained"
        losses = column(folder / "metrics.csv", "masked/loss")
        assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
        probed = column(folder / "metrics.csv", "probe/depth/abs_rel")
        assert len(probed) == 3, "before the training and after each epoch"
        drawn = sorted((folder / "reconstructions").glob("*.png"))
        assert [path.name for path in drawn] == ["step-000006.png", "step-000008.png"]

        assert run("train", *flags, "--task", "depth", "--freeze", "--init", str(folder), "--name", "frozen") == 0
        assert "heads: new for depth" in capsys.readouterr().out
        before, after = (load_checkpoint(runs / name / "best.ckpt")["state_dict"] for name in ("pretrained", "frozen"))
        kept = [name for name in before if name.startswith("model.backbone.")]
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)

        # The file is in 16 bits: compared with what it holds, both ways of loading it are exact.
        file = folder / "backbone.safetensors"
        ours = Backbone(BACKBONES[method][1], (64, 64)).eval()
        state, about = read_weights(file)
        assert about["provenance"]["experiment"]["task"] == ["masked"] and about["provenance"]["steps"] == 8
        assert run("train", *flags, "--task", "depth", "--init", str(file), "--name", "file", "--max-steps", "1") == 0
        image = torch.rand(1, 3, 64, 64)
        arguments = {"dynamic_img_size": True} if method == "tokens" else {}
        theirs = timm.create_model(
            ours.name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **arguments
        ).eval()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name
        ours.load_state_dict({n.removeprefix("model.backbone."): before[n] for n in kept})
        normalised = (image - ours.mean) / ours.std
        with torch.no_grad():
            last = ours(image).maps[-1]
            if method == "tokens":
                features = theirs.forward_intermediates(normalised, indices=1, intermediates_only=True, norm=False)[-1]
            else:
                overlay = {"file": str(file)}
                maps = timm.create_model(ours.name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
                features = maps.eval()(normalised)[-1]
        assert torch.allclose(features, last, atol=0.02 * float(last.abs().max()))

    def test_the_final_norm_of_a_plain_transformer_is_trained_and_kept(self, quick: list[str], tmp_path: Path) -> None:
        flags = [*quick, *BACKBONES["tokens"], "--max-steps", "8", "--lr", "0.01"]
        assert run("train", *flags, "--task", "masked", "--name", "run", "--mask.probe-every", "0") == 0
        with safe_open(tmp_path / "runs" / "run" / "backbone.safetensors", framework="pt") as file:
            weight = file.get_tensor("norm.weight").float()
        trained = load_checkpoint(tmp_path / "runs" / "run" / "best.ckpt")["state_dict"][
            "model.masked.decoder.norm.weight"
        ]
        assert not torch.equal(weight, torch.ones_like(weight)) and torch.allclose(weight, trained, atol=1e-3)
        assert "probe/" not in (tmp_path / "runs" / "run" / "metrics.csv").read_text()

    def test_pictures_alone_suffice_and_of_several_data_sets(
        self, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = pictures(tmp_path / "one"), pictures(tmp_path / "two", 8)
        only = [word for word in quick if word not in ("--data.train-samples", "24", "--data.val-samples", "6")]
        several = tmp_path / "several.yaml"
        several.write_text(f"data: {{name: folder, root: {first}}}\nmore_data: [{{name: folder, root: {second}}}]\n")
        words = ["train", "--config", str(several), *only, "--task", "masked", "--epochs", "2", "--name", "run"]
        assert run(*words) == 0, capsys.readouterr().err
        folder = tmp_path / "runs" / "run"
        assert len(column(folder / "metrics.csv", "masked/loss")) == 2
        assert "probe/" not in (folder / "metrics.csv").read_text(), "there is no label to probe with"

    def test_learning_that_what_is_hidden_is_like_what_is_not(self, quick: list[str], tmp_path: Path) -> None:
        root = pictures(tmp_path / "data", 40)
        only = [word for word in quick if word not in ("--data.train-samples", "24", "--data.val-samples", "6")]
        words = ["train", *only, "--data.name", "folder", "--data.root", str(root), "--task", "masked", "--name", "run"]
        words += [*BACKBONES["tokens"], "--max-steps", "60", "--validate-every", "60", "--mask.target", "raw"]
        assert run(*words) == 0
        # The mean colour explains nothing of held-out pictures, each of another colour; what is visible does.
        assert column(tmp_path / "runs" / "run" / "metrics.csv", "gain")[-1] > 0.15


class TestJointly:
    def test_few_labels_and_all_pictures(self, quick: list[str], tmp_path: Path) -> None:
        flags = [*quick, "--data.labels", "depth=6", "segmentation=4", "--data.labelled-share", "0.5"]
        words = ["train", *flags, "--task", "segmentation", "depth", "masked", "--epochs", "2", "--name", "run"]
        assert run(*words) == 0
        folder = tmp_path / "runs" / "run"
        header = (folder / "metrics.csv").read_text().splitlines()[0]
        for name in ("segmentation/miou", "depth/abs_rel", "masked/loss", "train/weight/masked"):
            assert name in header
        module = load_run(folder, {})
        assert {task.name for task in module.each_task()} == {"segmentation", "depth"}
        assert run("evaluate", str(folder)) == 0
        Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
        assert run("predict", str(folder), str(tmp_path / "photo.png"), "--output-dir", str(tmp_path / "out")) == 0
        assert not (tmp_path / "out" / "masked").exists() and (tmp_path / "out" / "depth" / "photo.png").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--freeze"], ["masked", "--freeze", "leave one of the two out"]),
            (["--mask.patch", "20"], ["--mask.patch 20", "32"]),
            (["--mask.ratio", "0.01"], ["--mask.ratio 0.01", "none of the 4 patches"]),
            (["--mask.ratio", "1"], ["--mask.ratio", "less than 1"]),
            (["--mask.method", "tokens"], ["--mask.method tokens", "mobilenetv4_conv_small", "--mask.method input"]),
            (["--mask.method", "token"], ["--mask.method", "did you mean 'tokens'"]),
            (["--mask.decoder-depth", "2"], ["--mask.decoder-depth 2"]),
            (["--mask.decoder-width", "33"], ["--mask.decoder-width", "multiple of 32"]),
            (["--data.labels", "masked=3"], ["masked", "pictures alone"]),
            (["--data.labelled-share", "0.5"], ["--data.labelled-share", "beside tasks with labels"]),
            (["--data.size", "32", "32"], ["a single patch", "--data.size"]),
            (["--monitor", "masked/los"], ["masked/los", "masked/loss"]),
            (["--mask.probe-every", "-1"], ["--mask.probe-every"]),
        ],
    )
    def test_of_what_cannot_be_pretrained(
        self, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
    ) -> None:
        assert run("train", *quick, "--task", "masked", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert [part for part in parts if part not in error] == [], error
        assert not (tmp_path / "runs").exists()

    def test_of_a_share_of_labels_where_all_have_one(
        self, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("train", *quick, "--task", "depth", "masked", "--data.labelled-share", "0.5") == 2
        assert "each of the 24 training samples has a label, as for 'depth'" in capsys.readouterr().err

    def test_of_predicting_with_what_predicts_nothing(
        self, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("train", *quick, "--task", "masked", "--max-steps", "2", "--name", "run") == 0
        folder = tmp_path / "runs" / "run"
        Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
        capsys.readouterr()
        assert run("evaluate", str(folder)) == 0
        assert "masked/loss" in capsys.readouterr().out
        for words in (["predict", str(folder), str(tmp_path / "photo.png")], ["export", str(folder)]):
            assert run(*words) == 2
            assert f"--init {folder}" in capsys.readouterr().err
        assert run("evaluate", str(folder), "--tta") == 2
        assert "--tta" in capsys.readouterr().err
