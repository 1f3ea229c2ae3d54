"""What the studies that consist of trainings share on the command line: flags, progress, and failures."""

import dataclasses
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

from mtl import registry
from mtl.cli.words import base_of, take_plugins, with_yaml_only
from mtl.config import Experiment, changed, validate
from mtl.errors import UserError
from mtl.flags import Configured, parse, train_flags, values_of, with_values

if TYPE_CHECKING:
    from mtl.studies.jobs import Job, Outcome, Progress


RUNS = "jobs"
"""Folder of all studies' runs in the output folder."""

_OTHER = "choose another --name or --output-dir"


@dataclasses.dataclass
class Trainings(Configured):
    """A study's own flags; those of a training follow."""

    quick: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Small pictures and few steps: under 40 minutes on two cores; other flags override it."),
    ] = False
    seeds: Annotated[list[int], tyro.conf.arg(help="The seeds, each of which is a training of its own.")] = (
        dataclasses.field(default_factory=lambda: [0, 1, 2])
    )
    jobs: Annotated[
        int | None, tyro.conf.arg(help="Trainings at a time (none: one for each GPU, else for each two cores).")
    ] = None


def read_study(
    kind: type[Trainings], quick: Mapping[str, Any], words: list[str], program: str, description: str
) -> tuple[Any, Experiment]:
    """Return a study's own flags, and the experiment that it varies.

    Args:
        kind: The study's flags.
        quick: What --quick changes of the experiment.
        words: The command line.
        program: The program's name, for the help.
        description: What the study does, for the help.

    Raises:
        UserError: Something that was given cannot be used.
    """
    take_plugins(words)
    flags = train_flags(kind)
    base = base_of(words)
    if "--quick" in words:
        base = changed(base, quick)
    given = values_of(parse(flags, with_values(flags, base.model_dump()), words, program, description))
    own = kind(**{item.name: given.pop(item.name) for item in dataclasses.fields(kind)})
    plugins = [str(path) for path in registry.plugins.values()]
    experiment = validate(with_yaml_only(given, base) | {"needs_plugins": plugins})
    check_seeds(own.seeds)
    if experiment.seed != 0:
        raise UserError(
            f"--seed {experiment.seed}: a study has several seeds; name them by --seeds, and leave this at 0"
        )
    if own.jobs is not None and own.jobs < 1:
        raise UserError(f"--jobs {own.jobs} must be at least 1")
    return own, experiment


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are none, named twice, or negative.

    Raises:
        UserError: They are.
    """
    if not seeds:
        raise UserError("--seeds names none; give some, such as --seeds 0 1 2")
    check_different("--seeds", seeds)
    if min(seeds) < 0:
        raise UserError(f"--seeds {min(seeds)} must not be negative")


def check_different(flag: str, values: Sequence[object]) -> None:
    """Refuse values of which one is named twice.

    Raises:
        UserError: One is.
    """
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{flag} names {twice} twice; name each once")


def results_folder(experiment: Experiment, name: str) -> Path:
    """Return the folder for a study's results: by --name, or the study's own name.

    Raises:
        UserError: It is a run's or the runs', or what a study writes cannot be written.
    """
    folder, runs = experiment.output_dir / (experiment.name or name), experiment.output_dir / RUNS
    if folder == runs:
        raise UserError(f"--name {RUNS}: {runs} is the folder of all studies' runs; choose another --name")
    for wanted in (folder, runs / "logs"):
        check_folder(wanted)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run's folder; choose another --name for the study")
    return folder


def check_folder(folder: Path, other: str = _OTHER) -> None:
    """Refuse a folder that cannot be written to, or that cannot be made.

    Raises:
        UserError: It is.
    """
    there = folder.absolute()
    while True:
        try:
            there.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            there = there.parent
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}); {other}") from None
    if not there.is_dir():
        raise UserError(f"{there} is no folder, and {folder} is to be one; move it away, or {other}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written to, and the study writes to {folder}; {other}")


def run_jobs(jobs: "Sequence[Job]", experiment: Experiment, count: int | None) -> "dict[Job, Outcome]":
    """Run a study's trainings in the folder `RUNS` beside its results, and show how far they are.

    Args:
        jobs: The trainings.
        experiment: What they vary.
        count: How many at a time, see `Trainings.jobs`.

    Returns:
        What became of each.
    """
    from mtl.studies.jobs import Runner, make_slots

    slots = make_slots(experiment, count, os.environ)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the trainings, too
    try:
        with _Bars() as bars:
            runner = Runner(experiment.output_dir / RUNS, slots, os.environ, bars.say, bars.show)
            return dict(zip(jobs, runner.run(jobs), strict=True))
    finally:
        signal.signal(signal.SIGTERM, before)


def check_outcomes(outcomes: "Mapping[Job, Outcome]") -> None:
    """Say which trainings failed.

    Raises:
        UserError: Some did.
    """
    from mtl.studies.jobs import Failure

    failed = [job.name for job, outcome in outcomes.items() if isinstance(outcome, Failure)]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} trainings failed ({'; '.join(failed)}), and are missing from the table; "
            "the same command tries them again"
        )


class _Bars:
    """A bar for each running job, and lines above them; where the output is no terminal, the lines alone."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=Console(soft_wrap=True), transient=True)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self._progress.console.print(line, markup=False, highlight=False)

    def show(self, running: "Mapping[str, Progress]") -> None:
        """Show how far the running jobs are, and no others."""
        for name in self._bars.keys() - running.keys():
            self._progress.remove_task(self._bars.pop(name))
        for name, progress in running.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=None, left="")
            left = "" if progress.seconds is None else f"{progress.seconds:.0f} s left"
            self._progress.update(self._bars[name], completed=progress.step, total=progress.steps or None, left=left)
