"""A frozen backbone that thaws: two fits in one training."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from mtl.build import plan_fits
from mtl.cli import main
from mtl.config import Experiment, changed
from mtl.errors import UserError

WORDS = ["train", "--task", "depth", "--freeze", "--unfreeze-at", "2", "--epochs", "4", "--lr", "0.002"]


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def backbone(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("model.backbone.")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_is_one_fit_or_two() -> None:
    base = changed(Experiment(), {"epochs": 5, "batch_size": 10})
    assert plan_fits(base, 100) == [(False, 5, 50)]
    thawing = changed(base, {"freeze": True, "unfreeze_at": 2})
    assert plan_fits(thawing, 100) == [(False, 2, 20), (True, 3, 30)]
    assert plan_fits(changed(thawing, {"max_steps": 25}), 100) == [(False, 2, 20), (True, 1, 5)]
    with pytest.raises(UserError, match=r"20 steps.*15"):
        plan_fits(changed(thawing, {"max_steps": 15}), 100)


def test_the_backbone_stays_until_the_thaw_and_learns_from_there(tiny: list[str], tmp_path: Path) -> None:
    """The first fit is the training that --freeze alone makes of it, to the last bit; the second goes on from it."""
    assert main([*WORDS, "--name", "both", "--monitor", "depth/rmse", *tiny]) == 0
    probe = [*WORDS[:4], "--epochs", "2", "--lr", "0.002", "--name", "probe", *tiny]
    assert main(probe) == 0
    folder, frozen = tmp_path / "runs" / "both", tmp_path / "runs" / "probe"
    measured, alone = rows(folder), rows(frozen)
    for mine, theirs in zip(measured, alone, strict=False):
        assert {name: mine[name] for name in theirs} == theirs
    assert [row["step"] for row in measured if row["depth/rmse"]] == ["6", "12", "18", "24"]
    assert [row["epoch"] for row in measured if row["depth/rmse"]] == ["0.0", "1.0", "2.0", "3.0"]
    assert not equal(backbone(folder / "last.ckpt"), backbone(frozen / "last.ckpt")), "it has learned since"
    assert (folder / "backbone.safetensors").is_file() and not (frozen / "backbone.safetensors").exists()
    optimizer = torch.load(folder / "last.ckpt", weights_only=True)["optimizer_states"][0]
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    before = torch.load(frozen / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert held > sum(len(group["params"]) for group in before["param_groups"]) + 50


@pytest.mark.parametrize(
    "stop", [pytest.param(8, marks=pytest.mark.slow), 12, pytest.param(15, marks=pytest.mark.slow), 18]
)
def test_resuming_in_either_fit_or_between_them_gives_the_same(stop: int, tiny: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [*WORDS, "--checkpoint-every", "1", "--ema", "0.9", *tiny]
    assert main([*words, "--name", "whole"]) == 0
    # A kill right after a checkpoint.
    from mtl.training.callbacks import ResumePoint

    save = ResumePoint._save

    class KilledError(Exception):
        pass

    def save_and_die(self: ResumePoint, trainer: object) -> None:
        save(self, trainer)
        if trainer.global_step == stop:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(ResumePoint, "_save", save_and_die)
        main([*words, "--name", "cut"])
    shutil.rmtree(runs / "cut" / "wandb", ignore_errors=True)
    assert main(["train", "--resume", str(runs / "cut")]) == 0
    assert rows(runs / "cut") == rows(runs / "whole")
    for name in ("best.ckpt", "last.ckpt"):
        states = [torch.load(runs / run / name, weights_only=True)["state_dict"] for run in ("cut", "whole")]
        assert equal(*states)
