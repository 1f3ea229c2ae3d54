"""What tests share: tiny experiments, run as a person would run them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before albumentations is imported

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: more threads than cores are many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests away from the person's W&B account; share rendered rooms among tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Return what makes a folder of a name and fills it, once for all processes of this test run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                part = Path(tempfile.mkdtemp(dir=root))
                fill(part)
                part.rename(root / name)
        return root / name

    return make


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return flags of a training that takes a second or two."""
    return [
        *("--data.size", "32", "32", "--data.train-samples", "24", "--data.val-samples", "6"),
        *("--batch-size", "4", "--decoder-channels", "16", "--init", "none", "--logger", "csv"),
        *("--output-dir", str(tmp_path / "runs")),
    ]
