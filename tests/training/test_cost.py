"""cost.json against what is known of a training: its steps, its parameters, and the time that they took."""

import json
import resource
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

import mtl.experiment
from mtl.cli import main
from mtl.training.cost import Cost
from mtl.transfer.weights import load_checkpoint


class _Slow(Callback):
    """Make every batch take a while longer, and the third of them far longer."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        time.sleep(1.5 if batch_idx == 3 else 0.2)


def test_steps_parameters_time_and_memory(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = mtl.experiment._callbacks
    path = tmp_path / "measured.json"
    monkeypatch.setattr(mtl.experiment, "_callbacks", lambda *a: [*original(*a), Cost(path, 9), _Slow()])
    words = ["--task", "depth", *tiny, "--freeze", "--max-steps", "9", "--accumulate", "2", "--device", "cpu"]
    began = time.monotonic()
    assert main(["train", *words, "--name", "run"], program="train.py") == 0
    whole = time.monotonic() - began
    cost = json.loads(path.read_text())
    assert (cost["step"], cost["steps"]) == (9, 9)
    assert 0.4 < cost["seconds_per_step"] < min(1.5, whole / 9)  # a step is two batches; the median, not the mean
    state = load_checkpoint(tmp_path / "runs" / "run" / "best.ckpt")["state_dict"]
    buffers = ("running_mean", "running_var", "num_batches_tracked", "backbone.mean", "backbone.std")
    sizes = {
        name: value.numel() for name, value in state.items() if name.startswith("model.") and not name.endswith(buffers)
    }
    assert cost["parameters"] == sum(sizes.values())
    assert cost["learning"] == sum(size for name, size in sizes.items() if name.startswith("model.heads."))
    assert cost["memory_of"] == "process" and cost["device"] == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 50e6 < cost["peak_memory_bytes"] <= peak
