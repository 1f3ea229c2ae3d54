"""What studies of several tasks share: each task by itself, whose metrics count, and how rows of a table come about."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.build import (
    Surroundings,
    build_balancer,
    build_module,
    build_tasks,
    check_machine,
    check_monitor,
    check_schedule,
    load_samples,
    open_source,
    plan_fits,
    target_of,
)
from mtl.config import Experiment, SourceOptions, TaskGroup, validate
from mtl.data.loading import Samples
from mtl.errors import UserError
from mtl.files import write_whole
from mtl.studies.jobs import Job, Outcome, Result
from mtl.studies.tables import DELTA_COLUMNS, USUAL, Cell, Column, Delta, Measure, Spread, Table, delta, delta_note
from mtl.tasks.base import Task

OF_GRADIENTS = ("weighting_every", "weighting_on")
"""Fields that concern the rules alone that compare gradients."""

OF_RULES = (*OF_GRADIENTS, "weighting_options")
"""Fields that concern some rules, and that others refuse."""

SUMMED: dict[str, Any] = {name: TaskGroup.model_fields[name].default for name in ("weighting", *OF_RULES)}
"""Fields of an experiment that sums the losses."""


@dataclass(frozen=True)
class Held:
    """Which samples' metrics a study reports, and of which checkpoint.

    Attributes:
        test: Whether the best checkpoint by the validation samples is measured on the official test split. Otherwise
            the last checkpoint is measured on the validation samples, by which then nothing is chosen.
        monitor: The metric that chooses checkpoints.
        patience: Whether training may end early by that metric.
    """

    test: bool
    monitor: str
    patience: bool

    @property
    def then(self) -> dict[str, tuple[str, ...]]:
        """Return what follows a training, see `mtl.studies.jobs.Job`."""
        words = ("evaluate", "{run}", "--split", "test", "--json", "{file}")
        return {"test.json": words} if self.test else {}

    def metrics(self, result: Result) -> dict[str, float]:
        """Return the metrics of a run that count."""
        return result.read("test.json") if self.test else result.metrics

    @property
    def note(self) -> str:
        """Return the sentence that says so."""
        if self.test:
            return (
                f"Measured on the official test split, with the checkpoint that {self.monitor} on the validation "
                "samples, which are others, has chosen."
            )
        early = f", but for the end of training by {self.monitor} (--patience)" if self.patience else ""
        return (
            "Measured on the validation samples, with each run's last checkpoint: the data set has no test split, and "
            f"nothing was chosen by these samples{early}."
        )


def prepare(experiment: Experiment, surroundings: Surroundings) -> tuple[list[Task], Held]:
    """Refuse what cannot be trained, before anything is, and return the tasks and which metrics count.

    What concerns the weighting rule and the schedule is for `check_entries`, which knows each training's.

    Raises:
        UserError: The experiment does not fit together, or its data cannot be used.
    """
    check_machine(experiment)
    info = load_samples(experiment, "train", surroundings).source.info
    load_samples(experiment, "validation", surroundings)
    module = build_module(with_seed(experiment, experiment.seed, SUMMED), info, total_steps=1)
    check_monitor(experiment, module)
    try:
        source = open_source(experiment, "test", surroundings)
        test = all(source.labelled(target_of(task)).any() for task in experiment.task)
    except UserError:
        test = False
    return list(module.each_task()), Held(test, experiment.monitor, experiment.patience is not None)


def alone(experiment: Experiment, task: str) -> Experiment:
    """Return the experiment with one of its tasks alone, and without what concerns the others.

    A checkpoint is chosen by the gain where the experiment's own metric is another task's. Of several data sets those
    stay whose labels the task may use.

    Raises:
        UserError: What is left is not an experiment.
    """
    values, default = (each.model_dump(mode="json") for each in (experiment, Experiment()))
    for name in TaskGroup.model_fields.keys() - {"needs_plugins"}:
        values[name] = default[name]
    values["task"] = [task]
    for other in experiment.task:
        if other != task and other in Experiment.model_fields:
            values[other] = default[other]
    if experiment.monitor.partition("/")[0] != task:
        values["monitor"] = "gain"
    data = values["data"]
    data["labels"] = {name: count for name, count in data["labels"].items() if name == task}
    target = target_of(task)
    own = [source for source in experiment.sources if source.targets is None or target in source.targets]
    first, *more = [source.model_dump(mode="json", include=set(SourceOptions.model_fields)) for source in own]
    values["data"] = data | first | ({} if more else {"ratio": None})
    values["more_data"] = more
    return validate(values, f"the task {task!r} alone: ")


def with_seed(experiment: Experiment, seed: int, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Return the experiment with another seed and other top-level fields.

    Raises:
        UserError: A value is not allowed.
    """
    return validate(experiment.model_dump(mode="json") | dict(changes or {}) | {"seed": seed})


def measures_of(tasks: Iterable[Task]) -> list[Measure]:
    """Return the metrics that pool pixels over all samples, but those of single classes."""
    found = []
    for task in tasks:
        directions = task.higher_is_better
        names = [name for name in directions if name == task.main_metric or not name.endswith(("/*", "_image"))]
        usual = USUAL.get(task.name, tuple(names))
        found += [
            Measure(f"{task.name}/{name}", task.name, directions[name], name == task.main_metric, name in usual)
            for name in names
        ]
    return found


@dataclass
class Entry:
    """One row of a comparison: the same training under several seeds.

    Attributes:
        label: What it is.
        jobs: For each seed, the jobs that together learn all tasks: one, or one for each task.
    """

    label: str
    jobs: list[list[Job]]


def single_tasks(experiment: Experiment, seeds: Sequence[int], held: Held) -> Entry:
    """Return the trainings of each task alone.

    Raises:
        UserError: A task cannot be trained alone.
    """
    each = {task: alone(experiment, task) for task in experiment.task}
    return Entry(
        f"each alone ({len(each)} networks)",
        [
            [Job(f"{task} alone, seed {seed}", with_seed(one, seed), then=held.then) for task, one in each.items()]
            for seed in seeds
        ],
    )


def jobs_of(entries: Sequence[Entry]) -> list[Job]:
    """Return the jobs of all entries, those of the first seed first, each after those that it needs."""
    found = [job for jobs in zip(*(entry.jobs for entry in entries), strict=True) for one in jobs for job in one]
    return list(dict.fromkeys(each for job in found for each in (*job.after, job)))


def check_entries(entries: Sequence[Entry], surroundings: Surroundings) -> None:
    """Refuse schedules, rules and rules' options that cannot be trained, before the first training.

    Seeds change none of these, and so the first one's trainings are looked at.

    Raises:
        UserError: A training's steps do not suffice for its schedule, or its rule cannot be used.
    """
    samples: dict[str, Samples] = {}
    for job in jobs_of([dataclasses.replace(entry, jobs=entry.jobs[:1]) for entry in entries]):
        experiment = job.experiment
        key = f"{' '.join(experiment.task)} {experiment.data.model_dump_json()}"
        if key not in samples:
            samples[key] = load_samples(experiment, "train", surroundings)
        check_schedule(experiment, min(fit.steps for fit in plan_fits(experiment, len(samples[key]))))
        build_balancer(experiment, build_tasks(experiment, samples[key].source.info))


class Comparison:
    """Entries that learn all tasks, measured against the one that learns each task alone.

    Args:
        entries: The first one's jobs learn each task alone.
        outcomes: What became of each job.
        measures: The metrics.
        held: Which samples' metrics count.
    """

    def __init__(
        self, entries: Sequence[Entry], outcomes: Mapping[Job, Outcome], measures: Sequence[Measure], held: Held
    ) -> None:
        self.entries, self.outcomes, self.measures, self.held = entries, outcomes, measures, held
        spreads = {measure.name: self.spread(entries[0], measure.name) for measure in measures}
        self.reference = {name: spread.mean for name, spread in spreads.items() if spread is not None}

    def runs(self, entry: Entry) -> list[list[Result]]:
        """Return the finished runs of each seed for which all are finished."""
        seeds = [[self.outcomes[job] for job in jobs] for jobs in entry.jobs]
        finished = [[run for run in runs if isinstance(run, Result)] for runs in seeds]
        return [runs for runs, wanted in zip(finished, seeds, strict=True) if len(runs) == len(wanted)]

    def metrics(self, entry: Entry) -> list[dict[str, float]]:
        """Return the metrics of each seed."""
        return [{k: v for run in runs for k, v in self.held.metrics(run).items()} for runs in self.runs(entry)]

    def values(self, entry: Entry, name: str) -> list[float]:
        """Return a metric of each seed that has it."""
        return [metrics[name] for metrics in self.metrics(entry) if name in metrics]

    def spread(self, entry: Entry, name: str) -> Spread | None:
        """Return a metric's spread over the seeds."""
        return Spread.of(self.values(entry, name))

    def each_delta(self, entry: Entry) -> list[Delta]:
        """Return what learning together gains over the mean of each task alone, for each seed."""
        return [delta(metrics, self.reference, self.measures) for metrics in self.metrics(entry)]

    def deltas(self, entry: Entry) -> list[Spread | None]:
        """Return the spread over seeds of each convention of `mtl.studies.tables.Delta`."""
        each = self.each_delta(entry)
        return [Spread.of(one[place] for one in each) for place in range(len(DELTA_COLUMNS))]

    def cost(self, entry: Entry) -> list[Spread | None]:
        """Return millions of parameters, seconds a step, and peak memory in MB.

        Of several networks, the sums of the first two, and the largest memory.
        """
        costs = [[run.cost for run in runs] for runs in self.runs(entry)]
        known = [run for run in costs if all(run)]
        sizes = [sum(cost["parameters"] for cost in run) / 1e6 for run in known]
        return [
            Spread.of(sizes[:1]),  # the same for every seed
            Spread.of(_sum(cost["seconds_per_step"] for cost in run) for run in known),
            Spread.of(max((cost["peak_memory_bytes"] or 0) / 1e6 for cost in run) or None for run in known),
        ]

    def label(self, entry: Entry) -> str:
        """Return the entry's label, which says where seeds have failed."""
        failed = len(entry.jobs) - len(self.runs(entry))
        if not failed:
            return entry.label
        return f"{entry.label} (failed)" if failed == len(entry.jobs) else f"{entry.label} ({failed} failed)"

    def table(
        self, title: str, more: Mapping[Column, Sequence[Cell]], measures: Sequence[Measure], *, metrics_alone: bool
    ) -> Table:
        """Return a table of the entries.

        Args:
            title: The first column's title.
            more: Further columns to come after it, with a cell for each entry.
            measures: The metrics that are columns.
            metrics_alone: Whether Δm and costs are left out.
        """
        metrics = [Column(measure.name, "higher" if measure.higher_is_better else "lower") for measure in measures]
        costs = (Column("parameters (M)", digits=2), Column("s/step"), Column("peak memory (MB)", digits=0))
        columns = [Column(title), *more, Column("seeds"), *metrics]
        table = Table(columns if metrics_alone else [*columns, *DELTA_COLUMNS, *costs])
        for number, entry in enumerate(self.entries):
            row: list[Cell] = [self.label(entry), *(cells[number] for cells in more.values())]
            row += [str(len(self.runs(entry))), *(self.spread(entry, measure.name) for measure in measures)]
            table.rows.append(row if metrics_alone else [*row, *self.deltas(entry), *self.cost(entry)])
        return table

    def write(self, folder: Path, title: str, more: Mapping[Column, Sequence[Cell]] | None = None) -> str:
        """Write ``table.md`` and ``table.csv``, and return the former's content.

        Args:
            folder: Where; it is made.
            title: The first column's title.
            more: Further columns to come after it, with a cell for each entry.
        """
        folder.mkdir(parents=True, exist_ok=True)
        more = more or {}
        usual = [measure for measure in self.measures if measure.usual or measure.main]
        short = self.table(title, more, usual, metrics_alone=False)
        short.notes = self.notes()
        text = short.markdown()
        if len(usual) < len(self.measures):
            every = self.table(title, more, self.measures, metrics_alone=True)
            text += "\nEvery metric:\n\n" + every.markdown()
        write_whole(folder / "table.md", text.encode())
        every = self.table(title, more, self.measures, metrics_alone=False)
        write_whole(folder / "table.csv", every.csv().encode())
        return text

    def notes(self) -> list[str]:
        """Return what a reader of the table must know."""
        runs = [run for entry in self.entries for runs in self.runs(entry) for run in runs]
        devices = sorted({run.cost["device"] for run in runs if run.cost})
        memory = sorted({run.cost["memory_of"] for run in runs if run.cost})
        cost = f" on {' and '.join(devices)}; memory is that of the {' or '.join(memory)}" if devices else ""
        return [
            "Mean ± sample standard deviation over seeds; an arrow says which direction is better.",
            self.held.note,
            delta_note(self.measures),
            f"{self.entries[0].label}: parameters and seconds of its networks add up, memory is the largest one's. "
            f"Seconds are the median of a run's steps{cost}.",
        ]


def _sum(values: Iterable[float | None]) -> float | None:
    """Return a sum, or None where a part is unknown."""
    parts = list(values)
    return None if None in parts else sum(part for part in parts if part is not None)
