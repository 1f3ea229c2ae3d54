"""The command line: turns flags and YAML into an experiment, and errors into one sentence and exit status 2."""

import dataclasses
import json
import logging
import math
import netrc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlparse

import tyro

from mtl.config import TASKS, DataOptions, Experiment, changed, dump, load, validate
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import flags_of, parse, train_flags, values_of, with_values

if TYPE_CHECKING:
    from mtl.build import Surroundings

DESCRIPTIONS = {
    "train": "Train one task or several on one shared backbone; write the run's folder.",
    "evaluate": "Measure a run's best checkpoint on held-out samples, of its own data or of other data.",
}

MAY_CHANGE = {
    "epochs", "max_steps", "patience", "device", "devices", "compile", "logger", "project", "checkpoint_every",
    "name", "output_dir",
}  # fmt: skip
"""Fields that may differ when a run goes on; any other would make it another run."""


def main(words: Sequence[str] | None = None, program: str = "python -m mtl") -> int:
    """Run a command and return its exit status: 0, or 2 if what the user gave cannot be used."""
    command, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    commands: dict[str, Callable[[list[str], str], None]] = {"train": _train, "evaluate": _evaluate}
    try:
        if command in ("-h", "--help"):
            print(f"usage: {program} {{{','.join(commands)}}} [-h] [OPTIONS]\n")
            print("\n".join(f"  {name:10} {DESCRIPTIONS[name]}" for name in commands))
        elif command not in commands:
            raise UserError(f"{command!r} is no command{nearest(command, commands)}; there are {', '.join(commands)}")
        else:
            commands[command](rest, program if program == "train.py" else f"{program} {command}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(words: list[str], program: str) -> None:
    flags = train_flags()
    base = _base_of(words)
    given = _parse_train(flags, base, words, program)
    resume = None
    if given["resume"] is not None:
        if given["config"] is not None:
            raise UserError("--resume goes on with the run's own configuration; leave --config out")
        resume = _run_to_resume(given["resume"], given["name"], Path(given["output_dir"]))
    if resume is not None:
        base = load(resume / "config.yaml")
        given = _parse_train(flags, base, words, program)
    for name in ("config", "resume"):
        given.pop(name)
    print_config = given.pop("print_config")
    experiment = validate(given)
    rank = _rank()
    if resume is not None:
        _check_same_run(base, experiment, resume)
        experiment = changed(experiment, {"name": base.name, "output_dir": base.output_dir})
    if print_config:
        print(dump(experiment), end="")
        return
    surroundings = _surroundings()
    from mtl.experiment import new_folder, train

    if resume is None:
        if rank == 0:
            # Lightning starts the other processes of this machine by this very command line.
            os.environ[_FOLDER] = str(new_folder(experiment))
        surroundings = dataclasses.replace(surroundings, folder=_folder_of_run(experiment))
    outcome = train(experiment, surroundings, resume)
    if rank > 0:
        return
    _print_results(outcome.results, outcome.constant)
    print(f"\n{outcome.steps} steps, {outcome.seconds:.0f} s; everything is in {outcome.folder}:")
    backbone = "" if experiment.freeze else "  backbone.safetensors"
    print(f"  curves.png  predictions.png  metrics.csv  config.yaml  best.ckpt  last.ckpt{backbone}")
    print("next, for example:")
    for command, purpose in _suggestions(experiment, outcome.folder):
        print(f"  {command}\n      {purpose}")


def _parse_train(flags: type, base: Experiment, words: list[str], program: str) -> dict[str, Any]:
    default = with_values(flags, base.model_dump())
    return values_of(parse(flags, default, words, program, DESCRIPTIONS["train"]))


def _base_of(words: Sequence[str]) -> Experiment:
    """Return the experiment of the file that `--config` names, whose values are the flags' defaults."""
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or position + 1 < len(words)):
            return load(Path(value if equals else words[position + 1]))
    return Experiment()


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
        return newest
    run = Path(word) if Path(word).is_dir() else output_dir / word
    if not (run / "last.ckpt").is_file() or not (run / "config.yaml").is_file():
        raise UserError(f"--resume {word}: {run} holds no last.ckpt and config.yaml to go on from; give a run's folder")
    return run


def _check_same_run(stored: Experiment, experiment: Experiment, run: Path) -> None:
    before, after = stored.model_dump(mode="json"), experiment.model_dump(mode="json")
    for name, value in after.items():
        if value != before[name] and name not in MAY_CHANGE:
            raise UserError(
                f"--resume: {name.replace('_', '-')} is {value} here and {before[name]} in {run}, which would be "
                f"another run; leave it out, or start a new run with --init {run}"
            )


@dataclasses.dataclass
class _Evaluate:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The run's folder, such as runs/depth-1.")]
    json: Annotated[Path | None, tyro.conf.arg(help="Also write the metrics to this file: name to number.")] = None
    batch_size: Annotated[int | None, tyro.conf.arg(help="Samples in a batch (none: the run's).")] = None
    device: Annotated[str | None, tyro.conf.arg(help="auto, cpu, cuda or mps (none: the run's).")] = None
    devices: Annotated[int | None, tyro.conf.arg(help="How many devices (none: the run's).")] = None
    precision: Annotated[str | None, tyro.conf.arg(help="Lightning's precision (none: the run's).")] = None


def _evaluate(words: list[str], program: str) -> None:
    # The run's own data are the defaults of --data.*, so that --help shows them and a flag changes one field.
    run = next((Path(word) for word in words if (Path(word) / "config.yaml").is_file()), None)
    stored = load(run / "config.yaml") if run else Experiment()
    data = flags_of(DataOptions, prefix=True)
    field = dataclasses.field(default_factory=lambda: with_values(data, stored.data.model_dump()))
    flags_type = dataclasses.make_dataclass("Evaluate", [("data", data, field)], bases=(_Evaluate,))
    flags = parse(flags_type, None, words, program, DESCRIPTIONS["evaluate"])
    if run is None or run != flags.run:
        raise UserError(f"{flags.run} is not a run's folder, which holds config.yaml and best.ckpt")
    changes = {name: getattr(flags, name) for name in ("batch_size", "device", "devices", "precision")}
    changes = {name: value for name, value in changes.items() if value is not None} | {"data": values_of(flags.data)}
    changed(stored, changes)  # refuses a wrong value before anything heavy is loaded
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        raise UserError(f"--json {flags.json}: its folder does not exist; make it first, or give another")
    surroundings = _surroundings()
    from mtl.experiment import evaluate

    outcome = evaluate(run, changes, surroundings)
    _print_results(outcome.results, outcome.constant)
    if flags.json is not None:
        numbers = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
        write_whole(flags.json, (json.dumps(numbers, indent=2) + "\n").encode())
        print(f"\nwritten to {flags.json}")


def _surroundings() -> "Surroundings":
    """Gather what a run needs to know of the machine, and keep libraries from talking over it."""
    # Must be set before albumentations is imported, which otherwise asks the network for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from mtl.build import Surroundings

    # After the import, which sets levels of its own.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|timm|segmentation_models_pytorch|wandb)(\..*)?")
    if _rank() > 0:
        return Surroundings(_cache_dir(), "disabled", _rank(), say=lambda line: None)
    return Surroundings(_cache_dir(), _wandb_mode(), progress=_ReadingBar())


_FOLDER = "MTL_RUN_FOLDER"
"""Environment variable by which a distributed run's processes agree on its folder."""


def _rank() -> int:
    """Return this process's place in a distributed run, as torchrun, SLURM or Lightning say it."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def _folder_of_run(experiment: Experiment) -> Path:
    if _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
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


def _print_results(results: dict[str, float], constant: dict[str, float]) -> None:
    """Print the metrics beside a constant prediction's; single classes and means over images are in the files alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "held out", "constant prediction", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in results.items():
        if "/iou/" not in name and not name.endswith("_image") and math.isfinite(value):
            beside = constant.get(name)
            table.add_row(name, f"{value:.4f}", "" if beside is None else f"{beside:.4f}")
    Console().print(table)


def _suggestions(experiment: Experiment, folder: Path) -> list[tuple[str, str]]:
    """Return commands worth trying next, and what each does."""
    again = f"python train.py --config {folder / 'config.yaml'} --name {folder.name}"
    lines = [(f"python -m mtl evaluate {folder} --json metrics.json", "measures the best checkpoint again")]
    if experiment.freeze:
        lines.append((f"{again}-tuned --no-freeze --init {folder}", "goes on from here with the whole network"))
        lines.append((f"{again}-random --init none", "the same on a random backbone, to see what this one is worth"))
    else:
        lines.append((f"{again}-frozen --freeze --init {folder}", "keeps this backbone and trains the heads alone"))
    if len(experiment.task) == 1:
        lines.append((f"{again}-both --task {' '.join(TASKS)}", "learns both tasks on one backbone"))
    return lines
