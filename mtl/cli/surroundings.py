"""What a run needs to know of the machine and the person: the one place that reads the environment."""

import logging
import netrc
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from mtl.config import Experiment
from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.build import Surroundings


def before_imports() -> None:
    """Set what a library reads when it is imported: albumentations would ask the network for a newer version."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def surroundings() -> "Surroundings":
    """Gather what a run needs to know of the machine, and keep libraries from talking over it."""
    before_imports()
    from mtl.build import Surroundings

    # After the import, which sets levels of its own.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|timm|segmentation_models_pytorch|wandb)(\..*)?")
    if rank() > 0:
        return Surroundings(_cache_dir(), "disabled", rank(), say=lambda line: None)
    return Surroundings(_cache_dir(), _wandb_mode(), progress=_ReadingBar())


FOLDER = "MTL_RUN_FOLDER"
"""Environment variable by which a distributed run's processes agree on its folder."""


def rank() -> int:
    """Return this process's place in a distributed run, as torchrun, SLURM or Lightning say it."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def folder_of_run(experiment: Experiment) -> Path:
    """Return the run's folder, on which all of its processes must agree.

    Raises:
        UserError: They were not started by the first of them, and the run has no name.
    """
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    if experiment.name is None:
        raise UserError("a run of several processes needs a --name, for them to agree on its folder")
    return experiment.output_dir / experiment.name


class _ReadingBar:
    """A progress bar for reading data, gone before Lightning's begins."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far reading has come."""
        from rich.progress import Progress

        if self._bar is None:
            self._bar = Progress(transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done)
        if done >= total:
            self._bar.stop()
            self._bar = None


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl"


def _wandb_mode() -> Any:
    """Return 'online' if W&B has a key to log in with, else 'offline', so that it never asks for one."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("online", "offline", "disabled"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def count_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
