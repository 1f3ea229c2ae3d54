"""Transfer and multi-task learning for dense vision prediction.

The names below are the package's public ones. Those that need torch are imported when they are first used, so that
the command line can answer ``--help`` at once.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.config import Experiment
from mtl.errors import UserError
from mtl.registry import register_data_set, register_task, register_weighting

if TYPE_CHECKING:
    from mtl.prediction.predictor import Predictor

_ELSEWHERE = {
    "Backbone": "mtl.models.backbone",
    "DataInfo": "mtl.data.sample",
    "Depth": "mtl.tasks.depth",
    "Folder": "mtl.data.folder",
    "Head": "mtl.models.heads",
    "MultiTaskModel": "mtl.models.multitask",
    "MultiTaskModule": "mtl.training.module",
    "Normals": "mtl.tasks.normals",
    "Panel": "mtl.tasks.base",
    "Predictor": "mtl.prediction.predictor",
    "Scale": "mtl.tasks.base",
    "Scenes": "mtl.data.scenes",
    "Segmentation": "mtl.tasks.segmentation",
    "Source": "mtl.data.sample",
    "Step": "mtl.weighting.base",
    "Task": "mtl.tasks.base",
    "Weighting": "mtl.weighting.base",
    "initialise": "mtl.transfer.weights",
    "masked_mean": "mtl.tasks.base",
}

__all__ = [  # noqa: PLE0604  # all are strings
    "Experiment",
    "UserError",
    "load",
    "register_data_set",
    "register_task",
    "register_weighting",
    *_ELSEWHERE,
]


def load(run: str | Path, *, device: str = "auto", plugins: Sequence[str | Path] = (), **options: Any) -> "Predictor":
    """Return a run's best checkpoint, ready to predict images of any size.

    Args:
        run: The run's folder, such as ``runs/depth-1``.
        device: auto, cpu, cuda or mps.
        plugins: Files of your own code that the run was made with.
        options: As `Predictor` takes them.

    Raises:
        UserError: The run cannot be used.
    """
    if plugins:
        from mtl.plugins import load_plugins

        load_plugins([Path(file) for file in plugins])
    from mtl.prediction.predictor import Predictor
    from mtl.runs import load_run

    return Predictor(load_run(Path(run), {"device": device}), **options)


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE[name]), name)
