"""Runs many trainings, each in a process of its own, several at a time, and none of them twice.

A run's folder is named by a digest of all that its result depends on, so that any study finds what another has
trained. A run that was stopped goes on from its last checkpoint; one that fails is reported, and the others go on.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mtl
from mtl import registry
from mtl.config import Experiment, changed, dump
from mtl.data.caching import stamp
from mtl.files import write_whole
from mtl.training.cost import COST_FILE
from mtl.training.history import History

FINISHED_FILE = "finished.json"
"""File in a run's folder that says that it is complete, with the last checkpoint's metrics."""

_WRITTEN_LAST = "predictions.png"
"""What a training writes when all of it is done."""

_WITHOUT_EFFECT = {"name", "output_dir", "logger", "project", "checkpoint_every", "device", "needs_plugins"}
_DATA_WITHOUT_EFFECT = {"cache", "cache_gb", "cache_dir", "workers"}
"""Fields on which a run's result does not depend."""

PROGRAM = (sys.executable, "-m", "mtl")
"""How the program is called."""

_PATIENCE = 15.0
"""Seconds that a process which was asked to end is given, before it is ended."""

_LINES = 3
"""How many of a failed process's last lines are shown."""


@dataclass(frozen=True, eq=False)
class Job:
    """One training, and what follows it.

    Attributes:
        name: What to call it.
        experiment: What to train; `name` and `output_dir` are the runner's to choose.
        after: Jobs that must be done before, such as that whose folder (`folder_of`) is this one's `init`.
        then: Commands of the program to run on the finished run, by the name of the file in its folder that each
            writes; ``{run}`` and ``{file}`` stand for the paths.
    """

    name: str
    experiment: Experiment
    after: "tuple[Job, ...]" = ()
    then: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: Its folder, with the files that `Job.then` names.
        metrics: The last checkpoint's on the validation samples, by full name; those that are finite.
        cost: What `mtl.training.cost.Cost` has measured.
    """

    folder: Path
    metrics: dict[str, float]
    cost: dict[str, Any]

    def read(self, name: str) -> Any:
        """Return the content of a JSON file in the folder, such as one of `Job.then`."""
        return json.loads((self.folder / name).read_text())


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        reason: The last lines that it wrote.
    """

    reason: str


Outcome = Result | Failure
Slot = Mapping[str, str]
"""A place where one job runs at a time: the environment variables that give it its share of the machine."""


class Progress(NamedTuple):
    """How far a running job is.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps of the whole training; 0 where not known yet.
        seconds: An estimate of the time it still takes, or None.
    """

    step: int
    steps: int
    seconds: float | None


def make_slots(experiment: Experiment, jobs: int | None, environment: Mapping[str, str]) -> Sequence[Slot]:
    """Return places for jobs to run in at the same time, each with its share of threads and of GPUs.

    Args:
        experiment: Which kind of device a job takes, and how many.
        jobs: How many places; None is one for each GPU (or group of `devices` GPUs), else one for each two cores.
        environment: The environment variables, whose limits hold.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups: list[str] = []
    if experiment.device in ("auto", "cuda") and torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus, each = visible.split(","), experiment.devices
        groups = [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]
    count = jobs or len(groups) or max(1, cores // 2)
    # Two processes of two threads each on two cores wait for one another most of the time.
    threads = max(1, cores // count)
    if (limit := environment.get("OMP_NUM_THREADS", "")).isdecimal():
        threads = min(threads, max(1, int(limit)))
    slots = [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]
    for number, slot in enumerate(slots):
        if groups:
            slot["CUDA_VISIBLE_DEVICES"] = groups[number % len(groups)]
    return slots


def folder_of(experiment: Experiment, runs: Path) -> Path:
    """Return the folder of a training among other runs, named by its tasks and a digest of all that decides its result.

    Args:
        experiment: The training.
        runs: The folder of all runs.
    """
    values = experiment.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    values["data"] = {name: value for name, value in values["data"].items() if name not in _DATA_WITHOUT_EFFECT}
    files = [*registry.plugins.values()]
    for source in (values["data"], *values["more_data"]):
        for name in ("root", "description"):
            source[name] = source[name] and str(Path(source[name]).resolve())
        files += [Path(source["description"])] if source["description"] else []
    values["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    start = Path(experiment.init)
    if start.parent.resolve() == runs.resolve():
        values["init"] = start.name  # another job's run, itself named by its content
    elif start.is_dir():
        values["init"] = stamp(sorted(start.glob("best.ckpt")) or sorted(start.glob("last.ckpt")))
    elif start.is_file():
        values["init"] = stamp([start])
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return runs / f"{'-'.join(experiment.task)}-{digest[:12]}"


class Runner:
    """Runs jobs.

    Args:
        runs: The folder of all runs, of this study and others.
        slots: Where jobs run, see `make_slots`.
        environment: The environment variables of the processes.
        say: Called with each line for a person.
        show: Called twice a second with how far each running job is, by its name.
    """

    def __init__(
        self,
        runs: Path,
        slots: Sequence[Slot],
        environment: Mapping[str, str],
        say: Callable[[str], None] = print,
        show: Callable[[Mapping[str, Progress]], None] = lambda running: None,
    ) -> None:
        self.runs, self.say, self.show = runs, say, show
        self._slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self._slots.put(slot)
        self._count = len(slots)
        path = [str(Path(mtl.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        self._environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = threading.Event()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs that are not done yet, and those that they need; what is equal is run once.

        An interrupt (Ctrl-C) ends the processes; running the same jobs again goes on.

        Returns:
            What became of each job.
        """
        todo: dict[Path, Job] = {}
        for job in _with_needs(jobs):
            folder = folder_of(job.experiment, self.runs)
            # The same training in two places of a study: one run, followed by whatever either wants.
            known = todo.get(folder, job)
            todo[folder] = Job(known.name, job.experiment, (*known.after, *job.after), {**known.then, **job.then})
        done: dict[Path, Outcome] = {}
        for folder, job in todo.items():
            if (result := _finished(folder, job)) is not None:
                done[folder] = result
        if done:
            self.say(f"{len(done)} of {len(todo)} trainings are finished already, and reused")
        waiting = {folder: job for folder, job in todo.items() if folder not in done}
        self._stopped.clear()
        with ThreadPoolExecutor(self._count) as pool:
            try:
                self._run(waiting, done, pool)
            except BaseException:
                self._stop()
                raise
        return [done[folder_of(job.experiment, self.runs)] for job in jobs]

    def _run(self, waiting: dict[Path, Job], done: dict[Path, Outcome], pool: ThreadPoolExecutor) -> None:
        """Run the waiting jobs, each once what it needs is done, until none is left."""
        total = len(waiting) + len(done)
        running: dict[Future[Outcome], tuple[Path, Job]] = {}
        began: dict[Path, float] = {}
        times: list[float] = []
        while waiting or running:
            for folder, job in list(waiting.items()):
                needs = [done.get(folder_of(other.experiment, self.runs)) for other in job.after]
                if any(isinstance(need, Failure) for need in needs):
                    done[folder] = Failure("a training that it needs failed")
                    self.say(f"[{len(done)}/{total}] {job.name}: left out, as a training that it needs failed")
                    del waiting[folder]
                elif None not in needs and len(running) < self._count:
                    running[pool.submit(self._perform, job, folder)] = (folder, job)
                    began[folder] = time.monotonic()
                    del waiting[folder]
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                folder, job = running.pop(future)
                outcome = done[folder] = future.result()
                times.append(time.monotonic() - began[folder])
                left = len(waiting) + len(running)
                about = f"; about {_duration(statistics.mean(times) * left / self._count)} left" if left else ""
                self.say(f"[{len(done)}/{total}] {job.name}: {_line(outcome, times[-1])}{about}")
            self.show({job.name: _progress(folder) for folder, job in running.values()})

    def _perform(self, job: Job, folder: Path) -> Outcome:
        """Train, or go on with a training, and run what follows it."""
        slot = self._slots.get()
        try:
            with self._locked(folder) as lock:
                log = self._beside(folder, "log")
                if not (folder / FINISHED_FILE).is_file():
                    failure = self._call(self._training(job, folder), slot, log, lock)
                    if failure is not None:
                        return failure
                    if not (folder / _WRITTEN_LAST).is_file():
                        # Lightning ends a process that is asked to terminate with status 0.
                        return Failure(f"it was asked to end before it was done; the next start goes on ({log})")
                    content = {"metrics": _last_metrics(folder)}
                    write_whole(folder / FINISHED_FILE, (json.dumps(content, indent=2) + "\n").encode())
                for name, words in job.then.items():
                    file = folder / name
                    if not file.is_file():
                        words = [word.format(run=folder, file=file) for word in words]
                        failure = self._call(words, slot, log, lock)
                        if failure is not None:
                            return failure
                result = _finished(folder, job)
                return Failure(f"it did not write {', '.join(job.then)}") if result is None else result
        finally:
            self._slots.put(slot)

    def _training(self, job: Job, folder: Path) -> list[str]:
        """Return the words of the command that trains, or that goes on where a process was stopped."""
        if (folder / "last.ckpt").is_file() and (folder / "config.yaml").is_file():
            return ["train", "--resume", str(folder), "--device", job.experiment.device]
        if folder.exists():
            shutil.rmtree(folder)  # stopped before its first checkpoint
        plugins = [str(path) for path in registry.plugins.values()]
        own = {"name": folder.name, "output_dir": str(self.runs), "needs_plugins": plugins}
        config = self._beside(folder, "yaml")
        write_whole(config, dump(changed(job.experiment, own)).encode())
        return ["train", "--config", str(config)]

    def _call(self, words: Sequence[str], slot: Slot, log: Path, lock: int) -> Failure | None:
        """Run a command of the program to its end, and return a failure if it was one."""
        plugins = ["--plugin", *map(str, registry.plugins.values())] if registry.plugins else []
        command = [*PROGRAM, *words, *plugins]
        with log.open("ab") as output:
            start = output.tell()
            with self._guard:
                if self._stopped.is_set():
                    return Failure("stopped")
                child = subprocess.Popen(
                    command,
                    env={**self._environment, **slot},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # an interrupt from the keyboard is for the study alone
                    pass_fds=[lock],  # an orphan keeps its run locked
                )
                self._children.add(child)
            status = child.wait()
            with self._guard:
                self._children.discard(child)
        if status == 0:
            return None
        said = log.read_bytes()[start:].decode(errors="replace").split("\n")
        lines = [line.rpartition("\r")[2].rstrip() for line in said if line.strip()][-_LINES:]
        if status < 0:
            lines.append(f"ended by the signal {signal.Signals(-status).name}")
        return Failure("\n".join([*lines, f"(exit status {status}; all of it is in {log})"]))

    def _stop(self) -> None:
        """End all processes."""
        with self._guard:
            self._stopped.set()
            children = list(self._children)
        until = time.monotonic() + _PATIENCE
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for child in children:
                # The group of a process that is not waited for yet is still its own.
                if child.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, sent)
            while any(child.returncode is None for child in children) and time.monotonic() < until:
                time.sleep(0.05)

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[int]:
        """Hold a run's lock, which a process of another study, or one that outlived its study, may have."""
        with self._beside(folder, "lock").open("w") as file:
            said = False
            while not self._stopped.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not said:
                        self.say(f"{folder} is being trained by another process; waiting for it")
                        said = True
                    self._stopped.wait(1)
            yield file.fileno()

    def _beside(self, folder: Path, kind: str) -> Path:
        """Return a file of the runner's own that belongs to a run."""
        path = self.runs / "logs" / f"{folder.name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _with_needs(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs, each after those that it needs."""
    return [each for job in jobs for each in (*_with_needs(job.after), job)]


def _finished(folder: Path, job: Job) -> Result | None:
    """Return a run's result if all of it is there."""
    if not all((folder / name).is_file() for name in (FINISHED_FILE, *job.then)):
        return None
    cost = folder / COST_FILE
    return Result(
        folder,
        json.loads((folder / FINISHED_FILE).read_text())["metrics"],
        json.loads(cost.read_text()) if cost.is_file() else {},
    )


def _last_metrics(folder: Path) -> dict[str, float]:
    """Return what a run's last validation measured."""
    rows = History(folder / "metrics.csv").rows
    measured = [
        {name: value for name, value in rows[step].items() if not name.startswith("train/") and name != "epoch"}
        for step in sorted(rows)
    ]
    return next((row for row in reversed(measured) if row), {})


def _progress(folder: Path) -> Progress:
    """Return how far a run is, by the file that it writes."""
    try:
        cost = json.loads((folder / COST_FILE).read_text())
    except FileNotFoundError:
        return Progress(0, 0, None)
    step, steps, each = cost["step"], cost["steps"], cost["seconds_per_step"]
    return Progress(step, steps, None if each is None else each * (steps - step))


def _line(outcome: Outcome, seconds: float) -> str:
    if isinstance(outcome, Failure):
        return f"FAILED after {_duration(seconds)}:\n{outcome.reason}\n"
    return f"done in {_duration(seconds)}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
