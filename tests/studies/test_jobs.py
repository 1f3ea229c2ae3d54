"""Jobs: reuse by content, resume, failures, shares of the machine, and an end to all children on an interrupt.

Most of these run a stand-in for the program that trains nothing and notes how it was called; the last one trains.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from mtl import registry
from mtl.cli import main
from mtl.config import Experiment, changed, load, validate
from mtl.studies import jobs
from mtl.studies.jobs import Failure, Job, Progress, Result, Runner, folder_of, make_slots

STAND_IN = """
import json, os, pathlib, sys, time
import yaml

command, *words = sys.argv[1:]
with pathlib.Path(os.environ["CALLS"]).open("a") as calls:
    calls.write(json.dumps([command, words, os.environ["OMP_NUM_THREADS"], time.time()]) + "\\n")
if command == "train":
    if words[0] == "--resume":
        folder = pathlib.Path(words[1])
        config = yaml.safe_load((folder / "config.yaml").read_text())
    else:
        config = yaml.safe_load(pathlib.Path(words[1]).read_text())
        folder = pathlib.Path(config["output_dir"]) / config["name"]
        folder.mkdir()  # as the program, it refuses a folder that exists
        (folder / "config.yaml").write_text(pathlib.Path(words[1]).read_text())
    if config["project"] == "fails":
        print("the data are read")
        print("error: --data.root is no folder", file=sys.stderr)
        sys.exit(2)
    if config["project"] == "sleeps" and words[0] != "--resume":
        (folder / "last.ckpt").touch()
        time.sleep(60)
    if config["project"] == "leaves":
        sys.exit(0)
    time.sleep(0.2)
    (folder / "predictions.png").touch()
    seed = config["seed"]
    (folder / "metrics.csv").write_text(f"step,epoch,train/loss,depth/rmse,gain\\n1,0,9,,\\n2,0,8,{seed}.5,0.1\\n")
else:
    pathlib.Path(words[words.index("--json") + 1]).write_text(json.dumps({"depth/rmse": 7}))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list]]:
    """Put the stand-in in the program's place, and return what reads how it was called."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(jobs, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    file = tmp_path / "calls"
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def depth(seed: int = 0, **changes: object) -> Experiment:
    return validate({"task": ["depth"], "seed": seed, **changes})


def runner(tmp_path: Path, said: list[str] | None = None, slots: int = 2, **arguments: object) -> Runner:
    each = [{"OMP_NUM_THREADS": str(number + 1)} for number in range(slots)]
    said = [] if said is None else said
    return Runner(tmp_path / "runs", each, os.environ, said.append, **arguments)


# Which runs are the same


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"}, {"output_dir": "elsewhere"}, {"logger": "csv"}, {"project": "other"}, {"device": "cpu"},
        {"checkpoint_every": 3}, {"data": {"cache": "disk", "cache_dir": "there", "workers": 1}},
    ],
)  # fmt: skip
def test_what_decides_no_result_does_not_name_the_folder(changes: dict, tmp_path: Path) -> None:
    assert folder_of(changed(depth(), changes), tmp_path) == folder_of(depth(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"lr": 0.1}, {"max_steps": 3}, {"init": "none"}, {"weighting": "equal"}, {"devices": 2},
        {"data": {"size": (64, 96)}}, {"data": {"labels": {"depth": 5}}}, {"more_data": [{"scene_seed": 1}]},
    ],
)  # fmt: skip
def test_what_decides_the_result_does(changes: dict, tmp_path: Path) -> None:
    assert folder_of(changed(depth(), changes), tmp_path) != folder_of(depth(), tmp_path)


def test_files_count_by_their_content(tmp_path: Path) -> None:
    description = tmp_path / "dataset.yaml"
    data = {"name": "folder", "root": str(tmp_path), "description": str(description)}
    description.write_text("border: 1\n")
    before = folder_of(depth(data=data), tmp_path)
    assert folder_of(depth(data=data), tmp_path) == before
    description.write_text("border: 2\n")
    assert folder_of(depth(data=data), tmp_path) != before
    relative = {**data, "root": os.path.relpath(tmp_path)}
    assert folder_of(depth(data=relative), tmp_path) == folder_of(depth(data=data), tmp_path)
    plain = folder_of(depth(), tmp_path)
    registry.plugins["own.py"] = description
    try:
        assert folder_of(depth(), tmp_path) != plain
    finally:
        registry.clear()


def test_weights_to_start_from_count_as_they_are_and_those_of_a_job_by_its_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.ckpt").write_bytes(b"1")
    before = folder_of(depth(init=str(run)), tmp_path / "runs")
    (run / "best.ckpt").write_bytes(b"12")
    assert folder_of(depth(init=str(run)), tmp_path / "runs") != before
    job = tmp_path / "runs" / "depth-1"
    before = folder_of(depth(init=str(job)), tmp_path / "runs")
    job.mkdir(parents=True)
    (job / "best.ckpt").write_bytes(b"1")
    assert folder_of(depth(init=str(job)), tmp_path / "runs") == before


# The machine's shares


@pytest.mark.parametrize(
    ("cores", "given", "jobs_wanted", "expected"),
    [(2, {}, None, ["2"]), (2, {}, 2, ["1", "1"]), (8, {}, None, ["2"] * 4), (1, {}, 3, ["1"] * 3),
     (8, {"OMP_NUM_THREADS": "1"}, 2, ["1", "1"])],
)  # fmt: skip
def test_cores_are_shared_out(
    cores: int, given: Mapping[str, str], jobs_wanted: int | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    slots = make_slots(depth(device="cpu"), jobs_wanted, given)
    assert [slot["OMP_NUM_THREADS"] for slot in slots] == expected
    assert not any("CUDA_VISIBLE_DEVICES" in slot for slot in slots)


@pytest.mark.parametrize(
    ("visible", "devices", "jobs_wanted", "expected"),
    [({}, 1, None, ["0", "1", "2", "3"]), ({"CUDA_VISIBLE_DEVICES": "2,5"}, 1, None, ["2", "5"]),
     ({}, 2, None, ["0,1", "2,3"]), ({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2, ["3", "3"])],
)  # fmt: skip
def test_gpus_are_shared_out(
    visible: Mapping[str, str],
    devices: int,
    jobs_wanted: int | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    slots = make_slots(depth(devices=devices), jobs_wanted, visible)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected


# Running them


def test_each_is_run_once_and_then_reused(tmp_path: Path, calls: Callable[[], list[list]]) -> None:
    said: list[str] = []
    wanted = [Job("a", depth(0)), Job("b", depth(1)), Job("a again", depth(0, name="other"))]
    first = runner(tmp_path, said).run(wanted)
    assert [outcome.metrics["depth/rmse"] for outcome in first] == [0.5, 1.5, 0.5]
    assert first[0].metrics == {"depth/rmse": 0.5, "gain": 0.1}
    assert len(calls()) == 2 and {call[2] for call in calls()} == {"1", "2"}
    assert first[0].folder == first[2].folder != first[1].folder
    assert "[1/2] " in said[0] and "done in" in said[0]
    # Another study: one training more, and something to follow a finished one.
    then = {"test.json": ("evaluate", "{run}", "--json", "{file}")}
    second = runner(tmp_path, said).run([Job("c", depth(2)), Job("x", depth(0), then=then), Job("y", depth(1))])
    assert [call[0] for call in calls()[2:]].count("train") == 1 and len(calls()) == 4
    assert isinstance(second[1], Result) and second[1].read("test.json") == {"depth/rmse": 7}
    assert any("1 of 3 trainings are finished already" in line for line in said)


def test_a_failure_is_named_with_its_last_lines_and_the_others_go_on(
    tmp_path: Path, calls: Callable[[], list[list]]
) -> None:
    said: list[str] = []
    bad = Job("bad", depth(1, project="fails"))
    wanted = [bad, Job("needs it", depth(2), after=(bad,)), Job("good", depth(0))]
    outcomes = runner(tmp_path, said).run(wanted)
    assert isinstance(outcomes[0], Failure) and isinstance(outcomes[1], Failure) and isinstance(outcomes[2], Result)
    assert "error: --data.root is no folder" in outcomes[0].reason and "exit status 2" in outcomes[0].reason
    log = next(word for word in outcomes[0].reason.split() if word.endswith(".log)"))[:-1]
    assert "the data are read" in Path(log).read_text()
    assert any("bad: FAILED" in line and "--data.root is no folder" in line for line in said)
    assert any("needs it: left out" in line for line in said)
    assert len(calls()) == 2
    runner(tmp_path).run([Job("bad", depth(1))])  # tried again, in the folder that it left behind
    assert len(calls()) == 3


def test_what_a_job_needs_comes_first(tmp_path: Path, calls: Callable[[], list[list]]) -> None:
    first = Job("first", depth(0))
    start = folder_of(first.experiment, tmp_path / "runs")
    second = Job("second", depth(1, init=str(start)), after=(first,))
    outcomes = runner(tmp_path).run([second])
    assert isinstance(outcomes[0], Result)
    configs = [Path(call[1][1]).read_text() for call in calls()]
    assert len(configs) == 2 and str(start) not in configs[0] and f"init: {start}" in configs[1]
    assert calls()[1][3] - calls()[0][3] > 0.2


def test_an_interrupt_ends_the_children_and_the_next_start_goes_on(
    tmp_path: Path, calls: Callable[[], list[list]]
) -> None:
    wanted = [Job("long", depth(0, project="sleeps")), Job("other", depth(1))]
    folder = folder_of(wanted[0].experiment, tmp_path / "runs")

    def interrupt(running: Mapping[str, Progress]) -> None:
        if (folder / "last.ckpt").exists():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, slots=1, show=interrupt).run(wanted)
    assert time.monotonic() - began < 20  # the child, asleep for a minute, was ended
    outcomes = runner(tmp_path, slots=1).run(wanted)
    assert all(isinstance(outcome, Result) for outcome in outcomes)
    assert [call[1][0] for call in calls()] == ["--config", "--resume", "--config"]
    assert calls()[1][1] == ["--resume", str(folder), "--device", "auto"]


def test_a_run_in_the_hands_of_an_orphan_is_waited_for(tmp_path: Path, calls: Callable[[], list[list]]) -> None:
    said: list[str] = []
    job = Job("a", depth(0))
    lock = runner(tmp_path)._beside(folder_of(job.experiment, tmp_path / "runs"), "lock")
    code = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as orphan:
        assert orphan.stdout is not None
        orphan.stdout.readline()
        outcome = runner(tmp_path, said).run([job])[0]
        assert orphan.wait() == 0
    assert isinstance(outcome, Result) and any("another process" in line for line in said)


def test_a_killed_child_is_a_failure_that_names_the_signal(tmp_path: Path, calls: Callable[[], list[list]]) -> None:
    made = runner(tmp_path)
    job = Job("a", depth(0, project="sleeps"))

    def kill() -> None:
        while not (folder_of(job.experiment, tmp_path / "runs") / "last.ckpt").exists():
            time.sleep(0.05)
        os.kill(next(iter(made._children)).pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = made.run([job])[0]
    thread.join()
    assert isinstance(outcome, Failure) and "SIGKILL" in outcome.reason


def test_a_child_that_leaves_before_its_end_is_not_taken_for_finished(
    tmp_path: Path, calls: Callable[[], list[list]]
) -> None:
    outcome = runner(tmp_path).run([Job("a", depth(0, project="leaves"))])[0]
    assert isinstance(outcome, Failure) and "before it was done" in outcome.reason
    assert isinstance(runner(tmp_path).run([Job("a", depth(0))])[0], Result)


# The program itself


def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--task", "depth", *tiny, "--max-steps", "24", "--checkpoint-every", "4", "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of more threads are rounded otherwise
    try:
        assert main(["train", *words, "--name", "whole"], program="train.py") == 0
    finally:
        torch.set_num_threads(threads)
    whole = tmp_path / "runs" / "whole"
    experiment = changed(load(whole / "config.yaml"), {"name": None})
    folder = folder_of(experiment, tmp_path / "runs")

    def interrupt(running: Mapping[str, Progress]) -> None:
        if (folder / "last.ckpt").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, slots=1, show=interrupt).run([Job("depth", experiment)])
    assert not (folder / "curves.png").exists()
    outcome = runner(tmp_path, slots=1).run([Job("depth", experiment)])[0]
    assert isinstance(outcome, Result)
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert outcome.metrics["depth/abs_rel"] > 0 and "train/lr" not in outcome.metrics
