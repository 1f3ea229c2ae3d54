"""Regularization by the command line: what a run leaves behind."""

from pathlib import Path

import pytest
import torch

from mtl.cli import main
from mtl.training.history import History
from mtl.transfer.weights import load_checkpoint

SIGNALS = [
    *("--data.name", "mnist1d", "--backbone", "mnist1d_mlp", "--task", "classification", "--init", "none"),
    *("--logger", "csv", "--batch-size", "16", "--epoch-samples", "128", "--data.workers", "0"),
]


def run(*words: str) -> int:
    return main(["train", *SIGNALS, *words], program="train.py")


def test_all_at_once_are_recorded_and_leave_snapshots(tmp_path: Path) -> None:
    flags = [f"--regularize.{name}" for name in ("l2", "l1", "gradient-norm", "batch-variance", "sam", "weight-noise")]
    words = [word for flag in flags for word in (flag, "0.001")]
    more = ["--accumulate", "2", "--max-steps", "10", "--snapshots", "2", "--dropout", "0.1", "--swa", "0.3"]
    assert run(*words, *more, "--regularize.measure", "3", "--output-dir", str(tmp_path), "--name", "run") == 0
    history = History(tmp_path / "run" / "metrics.csv")
    for name in ("l2", "l1", "gradient_norm", "batch_variance"):
        steps, values = history.column(f"train/penalty/{name}")
        assert steps == [10] and values[0] > 0
    assert history.column("train/gradient_norm_squared")[0] == history.column("train/batch_variance")[0] == [3, 6, 9]
    total = sum(values[-1] for name in history.rows[10] if name.startswith(("train/loss/", "train/penalty/"))
                for _, values in [history.column(name)])  # fmt: skip
    assert history.rows[10]["train/loss"] == pytest.approx(total, rel=1e-5)
    kept = [load_checkpoint(tmp_path / "run" / f"snapshot-{number}.ckpt") for number in (1, 2)]
    assert [checkpoint["global_step"] for checkpoint in kept] == [5, 10]
    last = load_checkpoint(tmp_path / "run" / "last.ckpt")
    raw = last["average"]["raw"]
    assert all(torch.equal(kept[1]["state_dict"]["model." + name], value) for name, value in raw.items())
    assert any(not torch.equal(last["state_dict"]["model." + name], value) for name, value in raw.items())


def test_the_average_is_that_of_the_steps_from_its_share_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a mean in double precision over weights noted down after each step."""
    from mtl.training.callbacks import Recorder

    noted = []
    original = Recorder.on_train_batch_end

    def note(self, trainer, pl_module, *args, **kwargs) -> None:
        noted.append({name: value.double().clone() for name, value in pl_module.model.state_dict().items()})
        original(self, trainer, pl_module, *args, **kwargs)

    monkeypatch.setattr(Recorder, "on_train_batch_end", note)
    assert run("--max-steps", "8", "--swa", "0.5", "--output-dir", str(tmp_path), "--name", "run") == 0
    last = load_checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"]
    assert len(noted) == 8
    for name in noted[0]:
        mean = torch.stack([weights[name] for weights in noted[3:]]).mean(dim=0)
        torch.testing.assert_close(last["model." + name].double(), mean, rtol=1e-5, atol=1e-6)
