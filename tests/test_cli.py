"""The command line as a person uses it."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mtl.cli import main
from mtl.config import load

ROOT = Path(__file__).parent.parent


def run(*words: str) -> int:
    return main(list(words), program="python -m mtl")


def picture_folder(root: Path, count: int = 12) -> Path:
    """Write a small data set in the `folder` layout, with consistent labels."""
    generator = np.random.default_rng(0)
    for kind in ("images", "segmentation", "depth"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        classes = np.zeros((32, 40), np.uint8)
        classes[16:, : 10 + number] = 1
        Image.fromarray(classes).save(root / "segmentation" / f"{number}.png")
        depth = np.where(classes == 1, 1500, 3000).astype(np.uint16)
        Image.fromarray(depth).save(root / "depth" / f"{number}.png")
        image = np.stack([classes * 120 + 60] * 3, -1) + generator.integers(0, 40, (32, 40, 3))
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{number}.png")
    (root / "dataset.yaml").write_text("classes: [wall, floor]\ndepth_scale: 0.001\n")
    return root


class TestHelp:
    def test_answers_at_once_because_it_imports_no_torch(self) -> None:
        code = "import sys; from mtl.cli import main; main(['train', '--help'], program='train.py')"
        check = f"import atexit, sys; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n{code}"
        result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
        assert result.stdout.rstrip().endswith("TORCH False")

    def test_shows_every_flag_of_the_main_job_in_groups(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            run("train", "--help")
        text = capsys.readouterr().out
        assert stopped.value.code in (0, None)
        flags = """--task --freeze --init --loss-weights --backbone --decoder --data.name --data.root --data.labels
            --epochs --max-steps --batch-size --optimizer --lr --momentum --weight-decay --schedule --warmup
            --precision --compile --device --devices --seed --logger --name --output-dir --resume --checkpoint-every
            --config --print-config --dropout""".split()
        assert [flag for flag in flags if flag not in text] == []
        assert "transfer options" in text and "data options" in text

    def test_without_a_command_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run() == 0
        assert "train" in capsys.readouterr().out


class TestConfiguration:
    def test_flags_override_the_file_and_a_mapping_replaces_its(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "some.yaml"
        file.write_text("task: depth\nlr: 0.1\nepochs: 3\ndata: {labels: {depth: 7}, size: [48, 64]}\n")
        words = ["train", "--config", str(file), "--lr", "0.2", "--data.val-samples", "9", "--print-config"]
        assert run(*words) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert (printed["task"], printed["lr"], printed["epochs"]) == (["depth"], 0.2, 3)
        assert printed["data"]["labels"] == {"depth": 7} and printed["data"]["size"] == [48, 64]
        assert printed["data"]["val_samples"] == 9
        assert run(*words, "--data.labels", "depth=2") == 0
        assert yaml.safe_load(capsys.readouterr().out)["data"]["labels"] == {"depth": 2}

    def test_loss_weights_are_the_lecture_s_alpha_and_beta(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("train", "--loss-weights", "segmentation=1", "depth=0.5", "--print-config") == 0
        assert yaml.safe_load(capsys.readouterr().out)["loss_weights"] == {"segmentation": 1.0, "depth": 0.5}


class TestMainJob:
    def test_trains_writes_its_folder_and_says_what_was_learned(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("train", "--task", "depth", "--freeze", "--max-steps", "12", *tiny) == 0
        folder = tmp_path / "runs" / "depth-frozen-1"
        text = capsys.readouterr().out
        assert "constant prediction" in text and "depth/abs_rel" in text and str(folder) in text
        assert f"python -m mtl evaluate {folder}" in text
        for name in ("config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "curves.png", "predictions.png"):
            assert (folder / name).stat().st_size > 0
        assert not (folder / "backbone.safetensors").exists(), "it is the one that went in"
        for name in ("curves.png", "predictions.png"):
            assert np.asarray(Image.open(folder / name)).std() > 10, "an empty picture"
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        assert [row["step"] for row in rows] == ["6", "10", "12"]
        assert run("train", "--task", "depth", "--freeze", "--max-steps", "1", *tiny) == 0
        assert (tmp_path / "runs" / "depth-frozen-2").is_dir(), "runs without a name are numbered"

    def test_the_run_s_configuration_repeats_it(self, tiny: list[str], tmp_path: Path) -> None:
        runs = tmp_path / "runs"
        assert run("train", "--epochs", "2", "--name", "first", *tiny) == 0
        assert run("train", "--config", str(runs / "first" / "config.yaml"), "--name", "second") == 0
        assert (runs / "first" / "metrics.csv").read_text() == (runs / "second" / "metrics.csv").read_text()

    def test_learns(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Depth and segmentation of pictures whose brightness tells both are learned together within a minute."""
        root = picture_folder(tmp_path / "pictures", 24)
        words = ["--data.name", "folder", "--data.root", str(root), "--data.size", "32", "40", "--init", "none"]
        words += ["--max-steps", "60", "--batch-size", "8", "--lr", "0.005", "--decoder-channels", "32"]
        words += ["--validate-every", "60", "--logger", "csv", "--output-dir", str(tmp_path), "--name", "run"]
        assert run("train", *words) == 0
        report = tmp_path / "metrics.json"
        assert run("evaluate", str(tmp_path / "run"), "--json", str(report)) == 0
        metrics = json.loads(report.read_text())
        assert metrics["gain"] > 0.5
        assert metrics["segmentation/miou"] > 0.8 and metrics["depth/abs_rel"] < 0.2

    def test_pretrain_then_transfer(self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Segmentation first; then its backbone, frozen, for depth, which leaves the backbone as it was."""
        runs = tmp_path / "runs"
        assert run("train", "--task", "segmentation", "--max-steps", "6", "--name", "first", *tiny) == 0
        again = [word for word in tiny if word not in ("--init", "none")]
        words = [
            "train",
            "--task",
            "depth",
            "segmentation",
            "--freeze",
            "--init",
            str(runs / "first"),
            "--name",
            "second",
        ]
        assert run(*words, "--max-steps", "6", *again) == 0
        assert "kept for segmentation, new for depth" in capsys.readouterr().out
        before, after = (
            torch.load(runs / name / "best.ckpt", weights_only=True)["state_dict"] for name in ("first", "second")
        )
        backbone = [name for name in before if name.startswith("model.backbone")]
        assert len(backbone) > 100 and all(torch.equal(before[name], after[name]) for name in backbone)
        exported = str(runs / "first" / "backbone.safetensors")
        assert run("train", "--task", "depth", "--init", exported, "--max-steps", "1", "--name", "third", *again) == 0

    def test_few_labels_of_one_task_and_many_of_the_other(self, tiny: list[str], tmp_path: Path) -> None:
        assert run("train", "--data.labels", "depth=3", "--max-steps", "6", "--name", "run", *tiny) == 0
        assert load(tmp_path / "runs" / "run" / "config.yaml").data.labels == {"depth": 3}

    def test_early_stopping(self, tiny: list[str], tmp_path: Path) -> None:
        """With a learning rate that changes nothing, nothing improves, and patience runs out."""
        words = ["train", "--task", "depth", "--freeze", "--epochs", "20", "--patience", "2", "--lr", "1e-30"]
        assert run(*words, "--monitor", "depth/rmse", "--weight-decay", "0", "--name", "run", *tiny) == 0
        checkpoint = torch.load(tmp_path / "runs" / "run" / "last.ckpt", weights_only=True)
        assert checkpoint["epoch"] < 10

    @pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
    def test_precision(self, tiny: list[str], precision: str) -> None:
        assert run("train", "--task", "depth", "--max-steps", "2", "--precision", precision, "--ema", "0.9", *tiny) == 0

    def test_evaluate_on_other_data(self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        runs = tmp_path / "runs"
        assert run("train", "--max-steps", "2", "--name", "run", *tiny) == 0
        values = []
        for words in ([], ["--data.domain", "studio"], []):
            report = tmp_path / "m.json"
            assert run("evaluate", str(runs / "run"), "--json", str(report), *words) == 0
            values.append(json.loads(report.read_text()))
        assert values[0] == values[2] != values[1]
        assert all(isinstance(value, float) for value in values[0].values())
        root = picture_folder(tmp_path / "pictures")
        words = ["--data.name", "folder", "--data.root", str(root)]
        assert run("evaluate", str(runs / "run"), *words) == 2
        assert "wall, floor" in capsys.readouterr().err


class Bomb:
    """Pickled, this writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "boom"))


class TestBadInput:
    """One sentence on stderr, exit status 2, and nothing written."""

    @pytest.mark.parametrize(
        ("words", "fragments"),
        [
            (["trian"], ["'trian'", "'train'"]),
            (["train", "--tsk", "depth"], ["--tsk", "--task"]),
            (["train", "depth"], ["'depth'"]),
            (["train", "--task", "dept"], ["'dept'", "'depth'"]),
            (["train", "--lr", "-1"], ["--lr", "-1"]),
            (["train", "--epochs", "0"], ["--epochs"]),
            (["train", "--lr", "fast"], ["--lr", "fast"]),
            (["train", "--loss-weights", "depth"], ["--loss-weights", "'depth'", "NAME=NUMBER"]),
            (["train", "--loss-weights", "depth=1", "depth=2"], ["--loss-weights", "'depth' is given twice"]),
            (["train", "--weighting-options", "alpha=1", "alpha=2"], ["--weighting-options", "'alpha' is given twice"]),
            (["train", "--weighting-options", "alpha=nan"], ["--weighting-options: alpha=nan must be a finite number"]),
            (["train", "--batch-size"], ["--batch-size"]),
            (["train", "--warmup", "1.5"], ["--warmup: '1.5' is not a whole number;"]),
            (["train", "--task", "depth", "--segmentation.loss", "dice"], ["--segmentation.loss", "learns depth"]),
            (["train", "--task", "masked", "--dropout", "0.1"], ["--dropout 0.1", "--task masked"]),
            (["train", "--optimizer", "adamm"], ["'adamm'", "'adam'"]),
            (["train", "--data.size", "8", "8"], ["--data.size"]),
            (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
            (["train", "--backbone", "resnet18"], ["--init shipped", "resnet18", "--init none"]),
            (["train", "--backbone", "resnet19", "--init", "none"], ["'resnet19'", "did you mean"]),
            (["train", "--decoder", "unett"], ["'unett'", "'unet'"]),
            (["train", "--decoder", "dpt", "--init", "none"], ["dpt", "--decoder unet"]),
            (["train", "--init", "no/such/run"], ["no/such/run"]),
            (["train", "--monitor", "depth/rms"], ["'depth/rms'", "'depth/rmse'"]),
            (["train", "--warmup", "9999"], ["--warmup 9999"]),
            (["train", "--precision", "16-mixed"], ["16-mixed", "bf16-mixed"]),
            (["train", "--device", "mps"], ["mps"]),
            (["train", "--data.labels", "depth=9999"], ["9999", "24"]),
            (["train", "--data.name", "folder", "--data.root", "no/such/folder"], ["no/such/folder"]),
            (["evaluate", "no/such/run"], ["no/such/run"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_is_refused_in_a_sentence(
        self,
        words: list[str],
        fragments: list[str],
        tiny: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        flags = list(tiny) if words[0] == "train" else []
        for flag in ("--init", "--data.size"):
            if flag in words or (flag == "--init" and "--backbone" in words and "resnet18" in words):
                position = flags.index(flag)
                del flags[position : position + (3 if flag == "--data.size" else 2)]
        if "folder" in words:
            flags = ["--output-dir", str(tmp_path / "runs")]
        assert run(*words, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and "Traceback" not in error
        assert all(fragment in error for fragment in fragments), error
        assert not (tmp_path / "runs").exists()

    def test_a_run_that_exists(self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "runs" / "taken").mkdir(parents=True)
        assert run("train", "--name", "taken", *tiny) == 2
        error = capsys.readouterr().err
        assert "taken exists" in error and "remove it" in error and "--name" in error
        assert list((tmp_path / "runs" / "taken").iterdir()) == [], "nothing is written into it"
        (tmp_path / "runs" / "taken" / "last.ckpt").touch()
        assert run("train", "--name", "taken", *tiny) == 2
        assert f"--resume {tmp_path / 'runs' / 'taken'}" in capsys.readouterr().err

    def test_a_checkpoint_with_code_in_it(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trace = tmp_path / "trace"
        for name, save in (("zip.ckpt", torch.save), ("plain.ckpt", lambda v, p: p.write_bytes(pickle.dumps(v)))):
            save({"state_dict": Bomb(trace)}, tmp_path / name)
            flags = [word for word in tiny if word not in ("--init", "none")]
            assert run("train", "--init", str(tmp_path / name), *flags) == 2
            assert name in capsys.readouterr().err
        assert not trace.exists()

    def test_a_truncated_checkpoint_to_resume(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("train", "--max-steps", "1", "--name", "run", *tiny) == 0
        last = tmp_path / "runs" / "run" / "last.ckpt"
        whole = last.read_bytes()
        for size in (0, 1000, 3000, 5000):
            last.write_bytes(whole[:size])
            before = {path.name: path.read_bytes() for path in last.parent.iterdir() if path.is_file()}
            capsys.readouterr()
            assert run("train", "--name", "run", "--resume", *tiny) == 2
            assert "last.ckpt is truncated, damaged" in capsys.readouterr().err
            assert before == {path.name: path.read_bytes() for path in last.parent.iterdir() if path.is_file()}

    def test_output_that_nobody_reads_on(self) -> None:
        script = f"{sys.executable} -m mtl train --help | head -1"
        done = subprocess.run(script, shell=True, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: ") and done.stderr == ""

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ("", "--loss-weights depth=0.5", "loss-weights is {'depth': 0.5} here and {} in"),
            ("--loss-weights segmentation=1 depth=0.5", "--loss-weights segmentation=1", "'depth': 0.5} in"),
            ("--loss-weights depth=0.5", "--loss-weights", "loss-weights is {} here and {'depth': 0.5} in"),
            ("--weighting stch", "--weighting-options mu=2", "weighting-options is {'mu': 2} here and {} in"),
            ("--weighting-options alpha=2", "--weighting-options beta=2", "{'beta': 2} here and {'alpha': 2} in"),
            ("--weighting-options alpha=2", "--weighting-options", "weighting-options is {} here"),
            ("", "--data.labels depth=5", "data.labels is {'depth': 5} here and {} in"),
            ("--data.labels depth=5 segmentation=5", "--data.labels depth=5", "data.labels is {'depth': 5} here"),
            ("", "--data.size 48 32", "data.size is (48, 32) here and (32, 32) in"),
        ],
    )
    def test_a_resumed_run_is_the_same_run(
        self, before: str, after: str, said: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "runs" / "run"
        folder.mkdir(parents=True)
        assert run("train", *tiny, *before.split(), "--print-config") == 0
        stored = capsys.readouterr().out
        (folder / "config.yaml").write_text(stored)
        (folder / "last.ckpt").touch()
        resume = ("train", "--resume", str(folder))
        # What is said again as it was is no change.
        assert run(*resume, *before.split(), "--print-config") == 0
        capsys.readouterr()
        assert run(*resume, *after.split()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: --resume: ") and said in error, error
        assert (folder / "config.yaml").read_text() == stored

    def test_a_label_outside_the_classes(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = picture_folder(tmp_path / "pictures")
        Image.fromarray(np.full((32, 40), 9, np.uint8)).save(root / "segmentation" / "3.png")
        words = ["--data.name", "folder", "--data.root", str(root), "--output-dir", str(tmp_path / "runs")]
        assert run("train", *words) == 2
        error = capsys.readouterr().err
        assert "3.png" in error and "9" in error and error.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    def test_a_task_without_a_label(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = picture_folder(tmp_path / "pictures")
        for path in (root / "depth").iterdir():
            path.unlink()
        (root / "depth").rmdir()
        assert run("train", "--task", "depth", "--data.name", "folder", "--data.root", str(root)) == 2
        assert "no train sample" in capsys.readouterr().err

    def test_a_loss_that_is_no_number_ends_training_by_name(
        self, tiny: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--task", "depth", "--lr", "1e30", "--optimizer", "sgd", "--max-steps", "30"]
        assert run("train", *words, *tiny) == 2
        error = capsys.readouterr().err
        assert "the loss of the task 'depth' became" in error and "--lr" in error
