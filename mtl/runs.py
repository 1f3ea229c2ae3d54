"""Finished runs: what their folders hold, and their models back from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtl.build import adapt, build_module, check_machine
from mtl.config import Experiment, changed, validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.training.module import MultiTaskModule
from mtl.transfer.weights import find_checkpoint, load_checkpoint, load_weights, require

SOUP_FILE = "soup.json"
"""File in the folder of a soup: which runs' weights it is the mean of."""


def load_run(run: Path, changes: Mapping[str, Any]) -> MultiTaskModule:
    """Return a run's best checkpoint, ready to predict, on the experiment's device.

    Args:
        run: The run's folder.
        changes: Fields of the run's experiment to change, such as ``{"device": "cpu"}``.

    Returns:
        The module, without what has learned to predict hidden patches.

    Raises:
        UserError: The run cannot be used, or predicts nothing but those, or takes signals.
    """
    module = load_predicting(find_checkpoint(run), changes)
    check_pictures(module, run)
    return module


def check_pictures(module: MultiTaskModule, run: Path) -> None:
    """Refuse a model of signals.

    Raises:
        UserError: It is.
    """
    if module.options.signals:
        raise UserError(
            f"{run} has learned from signals, and predict and export are for pictures; python -m mtl evaluate {run} "
            "measures it"
        )


def load_predicting(path: Path, changes: Mapping[str, Any]) -> MultiTaskModule:
    """Return the model of a run's checkpoint, as `load_run` does that of its best.

    Raises:
        UserError: The checkpoint cannot be used, or predicts nothing but hidden patches.
    """
    experiment, checkpoint = read_run(path, {"compile": False, "devices": 1, **changes})
    module = restored(path, experiment, checkpoint, DataInfo(**checkpoint["data"]))
    forget_masked(module, path.parent)
    return module.to(device_of(experiment)).eval()


def forget_masked(module: MultiTaskModule, run: Path) -> None:
    """Drop what has learned to predict hidden patches, which there is nothing of to predict or to combine.

    Raises:
        UserError: The run has learned nothing else.
    """
    if module.options.task == ["masked"]:
        raise UserError(
            f"{run} has learned from pictures alone, and predicts nothing of them; train a task on it first, as by "
            f"python train.py --task depth --init {run}"
        )
    module.forget_masked()


def device_of(experiment: Experiment) -> torch.device:
    """Return the device that an experiment's is, where 'auto' leaves the choice."""
    if experiment.device != "auto":
        return torch.device(experiment.device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def read_run(path: Path, changes: Mapping[str, Any]) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment of a run's checkpoint with some fields changed, and the checkpoint.

    Raises:
        UserError: The checkpoint is not one of this package, or the experiment is none for this machine.
    """
    checkpoint = load_checkpoint(path)
    experiment = changed(stored_experiment(checkpoint, path), changes)
    require(checkpoint, path, "state_dict", "data", "global_step")
    check_machine(experiment)
    return experiment, checkpoint


def restored(path: Path, experiment: Experiment, checkpoint: Mapping[str, Any], info: DataInfo) -> MultiTaskModule:
    """Return the module that a checkpoint was made of, with its weights.

    Raises:
        UserError: The weights do not fit.
    """
    module = build_module(experiment, info, total_steps=0)
    adapt(module)
    load_weights(module, checkpoint["state_dict"], path)
    return module


def stored_experiment(checkpoint: Mapping[str, Any], path: Path) -> Experiment:
    """Return the experiment that made a checkpoint.

    Raises:
        UserError: The checkpoint is not one of this package.
    """
    if "experiment" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of this package; give the folder of a run")
    return validate(checkpoint["experiment"], f"{path}: ")
