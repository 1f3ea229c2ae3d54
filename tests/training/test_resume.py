"""A run that was stopped anywhere and went on is, bit for bit, the run that never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import mtl.experiment
from mtl.cli import main
from mtl.transfer.weights import load_checkpoint

FLAGS = ["--task", "depth", "segmentation", "--dropout", "0.2", "--augment", "light", "--data.workers", "0"]


class _PowerCutError(Exception):
    pass


class _Cut(Callback):
    """Stop everything when so many batches have been trained on."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, *args) -> None:
        if self.batches == 0:
            raise _PowerCutError
        self.batches -= 1


def train(flags: list[str], name: str, cut: int | None, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    original = mtl.experiment._callbacks
    with monkeypatch.context() as patch:
        if cut is not None:
            patch.setattr(mtl.experiment, "_callbacks", lambda *a: [*original(*a), _Cut(cut)])
            with pytest.raises(_PowerCutError):
                main(["train", *flags, "--name", name, *more], program="train.py")
        else:
            assert main(["train", *flags, "--name", name, *more], program="train.py") == 0


def same(first: Path, second: Path) -> None:
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (load_checkpoint(folder / name) for folder in (first, second))
        assert one["global_step"] == other["global_step"]
        assert one["state_dict"].keys() == other["state_dict"].keys()
        for key, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][key]), (name, key)


VARIANTS = {
    "epochs": ["--epochs", "3"],
    "steps": ["--max-steps", "16", "--checkpoint-every", "5"],
    "ema": ["--epochs", "3", "--checkpoint-every", "2", "--ema", "0.9", "--freeze"],
    "accumulate": ["--epochs", "3", "--checkpoint-every", "1", "--accumulate", "2", "--optimizer", "sgd"],
    "uncertainty": ["--epochs", "3", "--checkpoint-every", "2", "--weighting", "uncertainty"],
    "famo": ["--epochs", "3", "--checkpoint-every", "2", "--weighting", "famo", "--accumulate", "2"],
    "gradvac": ["--max-steps", "18", "--checkpoint-every", "2", "--weighting", "gradvac", "--weighting-every", "3"],
    "gradnorm": ["--epochs", "3", "--checkpoint-every", "2", "--weighting", "gradnorm", "--weighting-on", "parameters"],
    "masked": [
        *("--task", "masked", "--data.size", "64", "64", "--epochs", "3", "--checkpoint-every", "2"),
        *("--dropout", "0", "--mask.probe-every", "2"),
    ],
    "joint": [
        *("--task", "depth", "masked", "--data.size", "64", "64", "--max-steps", "16", "--checkpoint-every", "5"),
        *("--data.labels", "depth=6", "--data.labelled-share", "0.5", "--ema", "0.9", "--accumulate", "2"),
        *("--mask.probe-every", "3"),
    ],
    "regularized": [
        *("--init", "shipped", "--max-steps", "16", "--checkpoint-every", "5", "--drop-path", "0.1", "--swa", "0.4"),
        *("--regularize.l2-sp", "0.01", "--regularize.sam", "0.05", "--regularize.weight-noise", "0.001"),
        *("--regularize.depth-jitter", "0.1", "--regularize.measure", "3"),
    ],
    "validate": ["--max-steps", "16", "--checkpoint-every", "4", "--validate-every", "4"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_cut_off_goes_on_as_if_it_had_not_been(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    flags = [*tiny, *FLAGS, *VARIANTS[variant]]
    runs = tmp_path / "runs"
    train(flags, "whole", None, monkeypatch)
    # Six batches an epoch: cut in the middle of the second epoch, and again right before the third.
    train(flags, "cut", 8, monkeypatch)
    train(flags, "cut", 4, monkeypatch, "--resume")
    train(flags, "cut", None, monkeypatch, "--resume", str(runs / "cut"))
    same(runs / "whole", runs / "cut")


def test_a_killed_process_goes_on(tiny: list[str], tmp_path: Path) -> None:
    """SIGKILL, which no handler sees, at an arbitrary moment after the first checkpoint."""
    flags = [*tiny, *FLAGS, "--max-steps", "40", "--checkpoint-every", "3"]
    command = [sys.executable, "-m", "mtl", "train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "--name", "cut"], env=environment, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "runs" / "cut" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run ended before it was killed"
    subprocess.run([*command, "--name", "cut", "--resume"], env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "--name", "whole"], env=environment, check=True, stdout=subprocess.DEVNULL)
    same(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


def test_another_learning_rate_would_be_another_run(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*tiny, "--task", "depth", "--epochs", "1", "--name", "run"]
    assert main(["train", *flags], program="train.py") == 0
    assert main(["train", *flags, "--resume", "--lr", "0.5"], program="train.py") == 2
    assert "lr is 0.5 here and 0.001" in capsys.readouterr().err


def test_nothing_to_resume(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*tiny, "--task", "depth", "--epochs", "1"]
    assert main(["train", *flags, "--resume", "nowhere"], program="train.py") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["train", *flags, "--resume", "--name", "fresh"], program="train.py") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (tmp_path / "runs" / "fresh" / "last.ckpt").exists()
