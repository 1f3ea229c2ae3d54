"""Every epoch of a training has an order and draws of its own, as Lightning runs it."""

from pathlib import Path

import pytest
from test_resume import train
from torch import Tensor

from mtl.cli import main
from mtl.training.module import MultiTaskModule


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, float]]]:
    """Return, for each epoch that Lightning counts, the epochs of the samples' draws and a number for each image."""
    found: dict[int, list[tuple[int, float]]] = {}
    original = MultiTaskModule.training_step

    def step(self: MultiTaskModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        rows = zip(batch["draw"][:, 0].tolist(), batch["image"].double().mean(dim=(1, 2, 3)).tolist(), strict=True)
        found.setdefault(self.trainer.current_epoch, []).extend(rows)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MultiTaskModule, "training_step", step)
    return found


def check(seen: dict[int, list[tuple[int, float]]], epochs: int) -> None:
    assert sorted(seen) == list(range(epochs))
    for epoch, rows in seen.items():
        assert {drawn for drawn, _ in rows} == {epoch}
    orders = {tuple(value for _, value in rows) for rows in seen.values()}
    assert len(orders) == epochs, "no two epochs show the same pictures in the same order"


FLAGS = ["--task", "depth", "--data.workers", "0"]


def test_of_one_fit(tiny: list[str], seen: dict[int, list[tuple[int, float]]]) -> None:
    assert main(["train", *tiny, *FLAGS, "--epochs", "3"], program="train.py") == 0
    check(seen, 3)
    assert len({frozenset(value for _, value in rows) for rows in seen.values()}) == 1, "each picture once an epoch"


def test_of_augmented_pictures(tiny: list[str], seen: dict[int, list[tuple[int, float]]]) -> None:
    assert main(["train", *tiny, *FLAGS, "--epochs", "2", "--augment", "light"], program="train.py") == 0
    check(seen, 2)
    values = [{value for _, value in rows} for rows in seen.values()]
    assert not values[0] & values[1], "no picture is changed in the same way twice"


def test_of_two_fits(tiny: list[str], seen: dict[int, list[tuple[int, float]]]) -> None:
    assert main(["train", *tiny, *FLAGS, "--epochs", "4", "--freeze", "--unfreeze-at", "2"], program="train.py") == 0
    check(seen, 4)


def test_of_a_run_that_goes_on(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[int, list[tuple[int, float]]]
) -> None:
    flags = [*tiny, *FLAGS, "--epochs", "3", "--checkpoint-every", "2"]
    train(flags, "cut", 8, monkeypatch)  # in the second of three epochs of six batches
    seen.clear()
    train(flags, "cut", None, monkeypatch, "--resume")
    assert sorted(seen) == [1, 2]
    assert all({drawn for drawn, _ in rows} == {epoch} for epoch, rows in seen.items())
