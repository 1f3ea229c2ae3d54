"""``python -m mtl evaluate``: measure a run again, or elsewhere."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl.cli.results import print_results
from mtl.cli.surroundings import surroundings
from mtl.cli.words import run_of, take_plugins
from mtl.config import DataOptions, Experiment, changed, load
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import Code, flags_of, parse, values_of, with_values

SPLITS = ("validation", "test")


@dataclasses.dataclass(kw_only=True)
class Run(Code):
    """The flags of every command that uses a finished run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The run's folder, such as runs/depth-1.")]


@dataclasses.dataclass(kw_only=True)
class _Evaluate(Run):
    split: Annotated[str, tyro.conf.arg(help="validation, or a data set's official test split.")] = "validation"
    json: Annotated[Path | None, tyro.conf.arg(help="Also write the metrics to this file: name to number.")] = None
    batch_size: Annotated[int | None, tyro.conf.arg(help="Samples in a batch (none: the run's).")] = None
    device: Annotated[str | None, tyro.conf.arg(help="auto, cpu, cuda or mps (none: the run's).")] = None
    devices: Annotated[int | None, tyro.conf.arg(help="How many devices (none: the run's).")] = None
    precision: Annotated[str | None, tyro.conf.arg(help="Lightning's precision (none: the run's).")] = None


def run(words: list[str], program: str, description: str) -> None:
    """Measure a run's best checkpoint."""
    take_plugins(words)
    # The run's own data are the defaults of --data.*, so that --help shows them and a flag changes one field.
    folder = run_of(words)
    stored = load(folder / "config.yaml") if folder else Experiment()
    data = flags_of(DataOptions, prefix=True)
    field = dataclasses.field(default_factory=lambda: with_values(data, stored.data.model_dump()))
    flags_type = dataclasses.make_dataclass("Evaluate", [("data", data, field)], bases=(_Evaluate,), kw_only=True)
    flags = parse(flags_type, None, words, program, description)
    check_run(folder, flags.run)
    if flags.split not in SPLITS:
        raise UserError(f"--split {flags.split!r}{nearest(flags.split, SPLITS)} is one of {', '.join(SPLITS)}")
    changes: dict[str, Any] = {name: getattr(flags, name) for name in ("batch_size", "device", "devices", "precision")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if (given := values_of(flags.data)) != stored.data.model_dump():
        # Other data are measured by themselves.
        changes |= {"data": given, "more_data": []}
    changed(stored, changes)  # refuses a wrong value before anything heavy is loaded
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        raise UserError(f"--json {flags.json}: its folder does not exist; make it first, or give another")
    here = surroundings()
    from mtl.experiment import evaluate

    outcome = evaluate(flags.run, changes, here, flags.split)
    print_results(outcome.results, outcome.constant)
    if flags.json is not None:
        numbers = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
        write_whole(flags.json, (json.dumps(numbers, indent=2) + "\n").encode())
        print(f"\nwritten to {flags.json}")


def check_run(found: Path | None, given: Path) -> None:
    """Refuse a folder that is not a run's.

    Args:
        found: The run that `run_of` found.
        given: What the command line says.

    Raises:
        UserError: They are not the same.
    """
    if found is None or found != given:
        raise UserError(f"{given} is not a run's folder, which holds config.yaml and best.ckpt")
