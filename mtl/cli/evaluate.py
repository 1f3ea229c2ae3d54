"""``python -m mtl evaluate``: measure a run again, or elsewhere."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from mtl.cli.results import print_results
from mtl.cli.surroundings import surroundings
from mtl.cli.words import check_output, run_of, take_plugins
from mtl.config import DataOptions, Experiment, SourceOptions, changed, load
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import Code, flags_of, parse, values_of, with_values, word_or

if TYPE_CHECKING:
    from mtl.ensembling.combine import Kind
    from mtl.ensembling.runs import Combining

SPLITS = ("validation", "test", "train", "out-of-bag")


@dataclasses.dataclass(kw_only=True)
class Run(Code):
    """The flags of every command that uses a finished run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The run's folder, such as runs/depth-1.")]


Views = Annotated[
    str | None,
    word_or("flip", "[flip|full]"),
    tyro.conf.arg(help="Test-time augmentation: average over mirror images (flip), or over scales as well (full)."),
]
"""The flag --tta."""

VIEWS: dict[str, tuple[float, ...] | bool] = {"flip": (), "full": True}
"""What each value of --tta stands for, as `Predictor` takes it."""


@dataclasses.dataclass(kw_only=True)
class Together:
    """The flags by which several answers become one."""

    combine: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="{mean,median,logits,vote}",
            help="How several answers become one (none: mean); logits is the mean before softmax, vote the most "
            "frequent class.",
        ),
    ] = None
    mc_dropout: Annotated[
        int | None, tyro.conf.arg(metavar="PASSES", help="Combine so many passes with dropout on, as in training.")
    ] = None
    snapshots: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Combine the snapshots of a run with --snapshots.")
    ] = False
    tta: Views = None


@dataclasses.dataclass(kw_only=True)
class _Evaluate(Code, Together):
    runs: Annotated[
        list[Path],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN ...", help="Folder of a run, such as runs/depth-1, or of several that answer as one."
        ),
    ] = dataclasses.field(default_factory=list)
    split: Annotated[
        str,
        tyro.conf.arg(
            help="validation, a data set's official test split, train: the training samples without augmentation, or "
            "out-of-bag: those that runs with --bootstrap have not drawn."
        ),
    ] = "validation"
    uncertainty: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Also measure, and draw, whether the uncertainty is to be believed."),
    ] = False
    output_dir: Annotated[
        Path | None, tyro.conf.arg(help="Where --uncertainty draws (none: RUN/uncertainty, of the first run).")
    ] = None
    json: Annotated[Path | None, tyro.conf.arg(help="Also write the metrics to this file: name to number.")] = None
    batch_size: Annotated[int | None, tyro.conf.arg(help="Samples in a batch (none: the run's).")] = None
    device: Annotated[str | None, tyro.conf.arg(help="auto, cpu, cuda or mps (none: the run's).")] = None
    devices: Annotated[int | None, tyro.conf.arg(help="How many devices (none: the run's).")] = None
    precision: Annotated[str | None, tyro.conf.arg(help="Lightning's precision (none: the run's).")] = None


_HEADINGS = {"validation": "held out", "train": "training", "out-of-bag": "out of bag"}
"""What to call the samples of a --split."""


def run(words: list[str], program: str, description: str) -> None:
    """Measure a run's best checkpoint, or those of several runs as one."""
    take_plugins(words)
    folder = run_of(words)
    flags, stored = _parse(folder, words, program, description)
    if not flags.runs:
        raise UserError("name a run's folder, such as runs/depth-1, or several whose answers are to be combined")
    for other in flags.runs:
        check_run(other)
    if flags.runs[0] != folder:  # another run stands among the words, as the value of a flag
        flags, stored = _parse(flags.runs[0], words, program, description)
    if flags.split not in SPLITS:
        raise UserError(f"--split {flags.split!r}{nearest(flags.split, SPLITS)} is one of {', '.join(SPLITS)}")
    if flags.output_dir is not None and not flags.uncertainty:
        raise UserError("--output-dir is where --uncertainty draws; add that, or leave it out")
    if flags.uncertainty and flags.split == "out-of-bag":
        raise UserError("--uncertainty is measured on held-out samples; leave --split out-of-bag out")
    changes: dict[str, Any] = {name: getattr(flags, name) for name in ("batch_size", "device", "devices", "precision")}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes["data"], changes["more_data"] = _data(values_of(flags.data), stored)
    changed(stored, changes)  # refuses a wrong value before anything heavy is loaded
    if flags.json is not None:
        check_output("--json", flags.json)
    here = surroundings()
    from mtl.evaluation import evaluate, evaluate_unseen

    run, *others = flags.runs
    combining = combining_of(flags, others)
    if flags.split == "out-of-bag":
        outcome = evaluate_unseen(run, changes, here, combining)
    else:
        pictures = flags.output_dir or run / "uncertainty"
        outcome = evaluate(run, changes, here, flags.split, combining, pictures if flags.uncertainty else None)
    print_results(outcome.results, outcome.constant, _HEADINGS.get(flags.split, flags.split))
    if flags.json is not None:
        numbers = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
        write_whole(flags.json, (json.dumps(numbers, indent=2) + "\n").encode())
        print(f"\nwritten to {flags.json}")


def _parse(folder: Path | None, words: list[str], program: str, description: str) -> tuple[Any, Experiment]:
    """Return the flags, and the run's experiment, whose data are the defaults of --data.*."""
    stored = load(folder / "config.yaml") if folder else Experiment()
    data = flags_of(DataOptions, prefix=True)
    field = dataclasses.field(default_factory=lambda: with_values(data, stored.data.model_dump()))
    flags = dataclasses.make_dataclass("Evaluate", [("data", data, field)], bases=(_Evaluate,), kw_only=True)
    return parse(flags, None, words, program, description), stored


def _data(given: dict[str, Any], stored: Experiment) -> tuple[dict[str, Any], list[Any]]:
    """Return the options of the data to measure on, and of further data sets.

    Other data than the run's are measured by themselves, and what only the run's own data set knows is left behind.
    """
    own = stored.data.model_dump()
    differs = {name for name in SourceOptions.model_fields if given[name] != own[name]}
    if not differs:
        return given, [source.model_dump() for source in stored.more_data]
    if "name" in differs:
        defaults = {name: info.get_default() for name, info in SourceOptions.model_fields.items()}
        given |= {name: value for name, value in defaults.items() if name not in differs}
    return given | {"ratio": None}, []


def combining_of(flags: Together, others: Sequence[Path]) -> "Combining":
    """Return what is to answer, as the flags say.

    Raises:
        UserError: They do not go together.
    """
    from mtl.ensembling.runs import Combining

    kind = cast("Kind | None", flags.combine)  # which `Combining` checks
    return Combining(others, flags.snapshots, flags.mc_dropout, views_of(flags.tta), kind)


def views_of(tta: str | None) -> tuple[float, ...] | bool:
    """Return what a value of --tta stands for.

    Raises:
        UserError: It is none of them.
    """
    if tta is not None and tta not in VIEWS:
        raise UserError(f"--tta {tta!r}{nearest(tta, VIEWS)} is one of {', '.join(VIEWS)}")
    return False if tta is None else VIEWS[tta]


def check_run(given: Path) -> None:
    """Refuse a folder that is not a run's.

    Raises:
        UserError: It is not.
    """
    if not (given / "config.yaml").is_file():
        raise UserError(f"{given} is not a run's folder, which holds config.yaml and best.ckpt")
