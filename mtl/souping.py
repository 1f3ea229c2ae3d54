"""Soups: the mean of several runs' weights as a run of its own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mtl.build import (
    Surroundings,
    check_monitor,
    keep_samples,
    load_samples,
)
from mtl.config import changed, dump
from mtl.data.sample import DataInfo
from mtl.ensembling.soups import Soup, State, check_alike, greedy_soup, reestimate, uniform_soup
from mtl.errors import UserError, nearest
from mtl.evaluation import measure
from mtl.experiment import new_folder, plain_inputs
from mtl.files import write_whole
from mtl.runs import SOUP_FILE, device_of, read_run, restored
from mtl.training.module import MultiTaskModule
from mtl.transfer.weights import find_checkpoint, load_checkpoint, require

SoupKind = Literal["uniform", "greedy"]
"""The mean of all runs, or of those that do not make it worse on the held-out validation samples."""


class _AsTrained(dict[str, Any]):
    """The weights of one run, whose statistics of batch norm are its own."""


def make_soup(
    runs: Sequence[Path], kind: SoupKind, name: str, output_dir: Path, surroundings: Surroundings, device: str = "auto"
) -> Path:
    """Average the weights of runs, and write what comes of it as the folder of a run.

    The statistics of batch norm are measured anew for averaged weights, on training samples of the first run without
    augmentation. A greedy soup is chosen by the first run's --monitor on its held-out validation samples.

    Args:
        runs: The runs' folders.
        kind: Which of them are averaged.
        name: Of the new run.
        output_dir: Where its folder is made.
        surroundings: Where.
        device: auto, cpu, cuda or mps.

    Returns:
        The folder.

    Raises:
        UserError: The runs' weights have no mean, or the folder exists.
    """
    if kind not in get_args(SoupKind):
        raise UserError(f"--kind {kind!r}{nearest(kind, get_args(SoupKind))} is one of {', '.join(get_args(SoupKind))}")
    if len(runs) < 2:
        raise UserError("a soup is the mean of two runs' weights or more; name their folders")
    paths = {path.resolve(): find_checkpoint(path) for path in runs}
    if len(paths) < len(runs):
        raise UserError("a run is named twice, and would count twice; name each once")
    checkpoints = list(paths.values())
    changes = {"device": device, "devices": 1, "compile": False}
    experiment, first = read_run(checkpoints[0], changes)
    target = changed(experiment, {"name": name, "output_dir": str(output_dir)})
    folder = new_folder(target)
    check_alike((str(path.parent), _read(path)) for path in checkpoints)
    training = load_samples(experiment, "train", surroundings)
    keep_samples(experiment, [training], surroundings)
    module = restored(checkpoints[0], experiment, first, DataInfo(**first["data"]))
    module.to(device_of(experiment))

    def settle(state: State) -> None:
        module.load_state_dict(dict(state))
        module.to(device_of(experiment)).eval()
        if not isinstance(state, _AsTrained) and len(module.model.heads):
            with torch.no_grad():
                reestimate(module.model, plain_inputs(module, training))

    say = surroundings.say
    about: dict[str, Any] = {"kind": kind, "runs": [str(path) for path in runs]}
    if kind == "uniform":
        settle(uniform_soup(_read(path)["state_dict"] for path in checkpoints))
        say(f"the mean of the weights of {len(runs)} runs; whether it is any good is to be measured")
    else:
        soup = _choose(module, checkpoints, settle, surroundings)
        settle(_AsTrained(soup.state) if len(soup.ingredients) == 1 else soup.state)
        scores = {str(path.parent): score for path, score in soup.scores.items()}
        chosen = [str(path.parent) for path in soup.ingredients]
        for run, score in scores.items():
            say(f"  {experiment.monitor} {score:.4f}  {run}{'  in the soup' if run in chosen else ''}")
        say(
            f"  {experiment.monitor} {soup.score:.4f}  the soup, on the held-out validation samples by which its runs "
            "were chosen: measure it on others, such as an official test split"
        )
        about |= {"chosen": chosen, "monitor": experiment.monitor, "scores": scores, "score": soup.score}
    folder.mkdir(parents=True)
    write_whole(folder / "config.yaml", dump(target).encode())
    write_whole(folder / SOUP_FILE, (json.dumps(about, indent=2) + "\n").encode())
    state = {
        key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in module.state_dict().items()
    }
    content: dict[str, Any] = {
        key: first[key] for key in ("data", "constant", "thawed_at", "global_step") if key in first
    }
    content |= {"state_dict": state, "experiment": target.model_dump(mode="json")}
    torch.save(content, unfinished := folder / ".best.ckpt")
    unfinished.replace(folder / "best.ckpt")
    return folder


def _choose(
    module: MultiTaskModule, checkpoints: Sequence[Path], settle: Callable[[State], None], surroundings: Surroundings
) -> Soup[Path]:
    """Return the greedy soup of some checkpoints by the module's monitor."""
    options = module.options
    validation = load_samples(options, "validation", surroundings)
    keep_samples(options, [validation], surroundings)

    def score(state: State) -> float:
        settle(state)
        # A gain is one over the first run's constant prediction for all of them, so that they can be compared.
        return measure(module, validation, options)[options.monitor]

    def load(path: Path) -> State:
        return _AsTrained(_read(path)["state_dict"])

    return greedy_soup(checkpoints, load, score, higher_is_better=check_monitor(options, module))


def _read(path: Path) -> Mapping[str, Any]:
    """Return a checkpoint that has what a soup takes of it."""
    checkpoint = load_checkpoint(path)
    require(checkpoint, path, "experiment", "data", "state_dict", "global_step")
    return checkpoint
