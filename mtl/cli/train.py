"""``python train.py``: train, or go on with a run."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel

from mtl import registry
from mtl.cli.results import print_results
from mtl.cli.surroundings import FOLDER, folder_of_run, rank, surroundings
from mtl.cli.words import base_of, check_used, take_plugins, with_yaml_only
from mtl.config import Experiment, TransferGroup, changed, dump, load, validate
from mtl.errors import UserError
from mtl.flags import Configured, parse, train_flags, values_of, with_values, word_or

if TYPE_CHECKING:
    from mtl.evaluation import Outcome

MAY_CHANGE = {
    "epochs", "max_steps", "patience", "device", "devices", "compile", "logger", "project", "checkpoint_every",
    "name", "output_dir", "needs_plugins",
}  # fmt: skip
"""Fields that may differ when a run goes on; any other would make it another run."""

LENGTH = ("epochs", "max_steps", "patience")
"""Those of them that say when a training ends."""


@dataclasses.dataclass
class _Files(Configured):
    resume: Annotated[
        str | None,
        word_or("auto", "[auto|RUN]"),
        tyro.conf.arg(
            help="Go on with a run; auto is the one of --name, else the newest, and a new run if there is none."
        ),
    ] = None
    seeds: Annotated[
        int | None,
        tyro.conf.arg(help="Train so many runs that differ in --seed, called NAME-seed0 and so on: an ensemble."),
    ] = None
    print_config: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Print the configuration that results, and stop."),
    ] = False


def run(words: list[str], program: str, description: str) -> None:
    """Train, and say where everything is and what to try next."""
    take_plugins(words)
    flags = train_flags(_Files)
    base = base_of(words)
    given = _parse(flags, base, words, program, description)
    resume = None
    if given["seeds"] is not None:
        if given["resume"] not in (None, "auto"):
            raise UserError(
                f"--resume {given['resume']}: with --seeds it goes on with the runs of --name; leave its value out"
            )
    elif given["resume"] is not None:
        if given["config"] is not None:
            raise UserError("--resume goes on with the run's own configuration; leave --config out")
        resume = _run_to_resume(given["resume"], given["name"], Path(given["output_dir"]))
    if resume is not None:
        base = load(resume / "config.yaml")
        given = _parse(flags, base, words, program, description)
    for name in ("plugin", "config"):
        given.pop(name)
    print_config, seeds, goes_on = given.pop("print_config"), given.pop("seeds"), given.pop("resume") is not None
    plugins = [str(path) for path in registry.plugins.values()]
    experiment = validate(with_yaml_only(given, base) | {"needs_plugins": plugins})
    check_used(words, experiment.task)
    if resume is not None:
        _check_same_run(base, experiment, resume)
        experiment = changed(experiment, {"name": base.name, "output_dir": base.output_dir})
    if print_config:
        print(dump(experiment), end="")
        return
    if seeds is not None:
        _train_seeds(_with_seeds(experiment, seeds), goes_on)
        return
    here = surroundings()
    from mtl.experiment import new_folder, train

    if resume is None:
        if rank() == 0:
            # Lightning starts the other processes of this machine by this very command line.
            os.environ[FOLDER] = str(new_folder(experiment))
        here = dataclasses.replace(here, folder=folder_of_run(experiment))
    outcome = train(experiment, here, resume)
    if rank() > 0:
        return
    _report(experiment, outcome)
    print("next, for example:")
    for command, purpose in _suggestions(experiment, outcome.folder, outcome.labels):
        print(f"  {command}\n      {purpose}")


def _with_seeds(experiment: Experiment, count: int) -> list[Experiment]:
    """Return experiments that differ in their seeds and names alone.

    Raises:
        UserError: There are too few, or they cannot be told apart or be trained one after another.
    """
    if count < 2:
        raise UserError(f"--seeds {count}: an ensemble has two runs or more; leave it out for one")
    if experiment.name is None:
        raise UserError(f"--seeds {count} needs a --name, after which the runs are called NAME-seed0 and so on")
    if experiment.devices > 1:
        raise UserError(
            f"--seeds trains one run after another on one device; leave --devices {experiment.devices} out, or start "
            "each by its own --seed"
        )
    seeds = range(experiment.seed, experiment.seed + count)
    return [changed(experiment, {"seed": seed, "name": f"{experiment.name}-seed{seed}"}) for seed in seeds]


def _train_seeds(experiments: list[Experiment], goes_on: bool) -> None:
    """Train one run after another, and say how to combine them.

    Args:
        experiments: The runs.
        goes_on: Whether those that are finished are kept, and those that were stopped gone on with.

    Raises:
        UserError: Before any training: a run exists that is not to be gone on with, or is another.
    """
    here = surroundings()
    from mtl.experiment import new_folder, train

    folders = [experiment.output_dir / str(experiment.name) for experiment in experiments]
    for experiment, folder in zip(experiments, folders, strict=True):
        if not goes_on and folder.exists():
            raise UserError(
                f"{folder} exists; choose another --name, or add --resume to keep the runs that are finished and go on "
                "with the others"
            )
        if (folder / "config.yaml").is_file():
            _check_same_run(load(folder / "config.yaml"), experiment, folder)
    for experiment, folder in zip(experiments, folders, strict=True):
        print(f"\n{folder}")
        if _is_finished(folder, experiment):
            print("is finished, and kept")
            continue
        resume = _run_to_resume("auto", experiment.name, experiment.output_dir) if folder.exists() else None
        place = dataclasses.replace(here, folder=resume or new_folder(experiment))
        _report(experiment, train(experiment, place, resume))
    code = "".join(f" --plugin {file}" for file in registry.plugins.values())
    first, *others = map(str, folders)
    print("next, for example:")
    together = " ".join([first, *others])
    print(f"  python -m mtl evaluate {together}{code} --combine mean --uncertainty\n      measures them as one")
    # Where each seed chooses which samples have labels, no two have drawn from the same ones.
    if experiments[0].bootstrap and not experiments[0].data.labels:
        print(f"  python -m mtl evaluate {together}{code} --split out-of-bag")
        print("      measures each training sample by the runs that have not drawn it")
    print(f"  python -m mtl predict {first} IMAGES --with {' '.join(others)}{code}")
    print("      predicts pictures of your own with all of them, and how far they disagree")


def _is_finished(folder: Path, experiment: Experiment) -> bool:
    """Return whether a run has come to its end, and is not to be longer now."""
    if not (folder / "predictions.png").is_file():  # the last that a run writes
        return False
    stored = load(folder / "config.yaml")
    return all(getattr(stored, name) == getattr(experiment, name) for name in LENGTH)


def _report(experiment: Experiment, outcome: "Outcome") -> None:
    """Say how good a run is, and where everything of it is."""
    print_results(outcome.results, outcome.constant)
    print(f"\n{outcome.steps} steps, {outcome.seconds:.0f} s; everything is in {outcome.folder}:")
    backbone = "" if experiment.backbone_stays or experiment.signals else "  backbone.safetensors"
    more = "weighting.png  " if len(experiment.task) > 1 else ""
    more += "reconstructions/  " if "masked" in experiment.task else ""
    print(f"  curves.png  predictions.png  {more}metrics.csv  config.yaml  best.ckpt  last.ckpt{backbone}")


def _parse(flags: type, base: Experiment, words: list[str], program: str, description: str) -> dict[str, Any]:
    default = with_values(flags, base.model_dump())
    return values_of(parse(flags, default, words, program, description))


def _run_to_resume(word: str, name: str | None, output_dir: Path) -> Path | None:
    """Return the folder of the run to go on with, or None if 'auto' finds none.

    Raises:
        UserError: The run named does not exist or cannot be resumed.
    """
    if word == "auto":
        runs = [output_dir / name] if name else [path.parent for path in output_dir.glob("*/last.ckpt")]
        runs = [run for run in runs if (run / "last.ckpt").is_file()]
        newest = max(runs, key=lambda run: (run / "last.ckpt").stat().st_mtime, default=None)
        print(f"resuming {newest}" if newest else "nothing to resume; starting a new run")
        if newest is None and name and (output_dir / name).is_dir():
            from mtl.experiment import numbered

            aside = numbered(output_dir / f"{name}-stopped")
            (output_dir / name).rename(aside)
            print(f"{output_dir / name} was stopped before its first checkpoint, and is now {aside}")
        return newest
    run = Path(word) if Path(word).is_dir() else output_dir / word
    if not (run / "last.ckpt").is_file() or not (run / "config.yaml").is_file():
        raise UserError(
            f"--resume {word}: {run} holds no last.ckpt and config.yaml to go on from; give the folder of a run that "
            "has come to its first checkpoint"
        )
    return run


def _check_same_run(stored: Experiment, experiment: Experiment, run: Path) -> None:
    before, after = _flat(stored), _flat(experiment)
    for name, value in after.items():
        if value != before[name] and name not in MAY_CHANGE:
            raise UserError(
                f"--resume: {name.replace('_', '-')} is {value} here and {before[name]} in {run}, which would be "
                f"another run; leave it out, or start a new run with --init {run}"
            )


def _flat(options: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return the values of all fields by dotted names; a mapping, whose names differ from run to run, is one value."""
    flat: dict[str, Any] = {}
    for name, value in options:
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return flat


def _suggestions(experiment: Experiment, folder: Path, labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return commands worth trying next, and what each does."""
    code = "".join(f" --plugin {file}" for file in registry.plugins.values())
    again = f"python train.py{code} --config {folder / 'config.yaml'} --name {folder.name}"
    if experiment.task == ["masked"]:
        task = next((name for name in ("depth", "segmentation", "normals") if name in labels), "depth")
        monitor = " --monitor gain" if experiment.monitor.startswith("masked/") else ""
        data = "" if task in labels else " --data.name folder --data.root LABELLED"
        then = f"{again}-{task} --task {task}{data}{monitor} --init {folder}"
        scratch = f"{again}-scratch --task {task}{data}{monitor} --init none"
        lines = [
            (then, f"learns {task} from here"),
            (scratch, "the same from scratch, to see what this is worth"),
        ]
        if _plain_transfer(experiment):
            frozen = then.replace(f"{again}-{task}", f"{again}-{task}-frozen", 1)
            lines.insert(1, (f"{frozen} --freeze", "the same, and leaves the backbone as it is"))
        return lines
    if experiment.signals:
        lines = [(f"python -m mtl evaluate {folder} --split test", "measures the best checkpoint on the test signals")]
        if experiment.augment == "none":
            lines.append((f"{again}-augmented --augment lecture", "the same with random shifts and scales"))
        return lines
    lines = [(f"python -m mtl predict {folder} IMAGES{code}", "predicts pictures of your own, of any size")]
    lines.append((f"python -m mtl evaluate {folder}{code} --json metrics.json", "measures the best checkpoint again"))
    if experiment.bootstrap:
        lines.append((f"python -m mtl evaluate {folder}{code} --split out-of-bag", "measures on the samples not drawn"))
    if experiment.snapshots:
        lines.append((f"python -m mtl evaluate {folder}{code} --snapshots", "measures the snapshots as one"))
    if experiment.dropout or experiment.drop_path:
        lines.append((f"python -m mtl predict {folder} IMAGES{code} --mc-dropout 20", "says how sure it is, too"))
    if experiment.backbone_stays:
        lines.append((f"{again}-tuned --no-freeze --init {folder}", "goes on from here with the whole network"))
        lines.append((f"{again}-random --init none", "the same on a random backbone, to see what this one is worth"))
    elif _plain_transfer(experiment):
        lines.append((f"{again}-frozen --freeze --init {folder}", "keeps this backbone and trains the heads alone"))
    if experiment.task in (["depth"], ["segmentation"]):
        lines.append((f"{again}-both --task segmentation depth", "learns both tasks on one backbone"))
    return lines


def _plain_transfer(experiment: Experiment) -> bool:
    """Return whether nothing is said of how the backbone learns, which --freeze would contradict."""
    return not experiment.model_dump(include=set(TransferGroup.model_fields) - {"init"}, exclude_defaults=True)
