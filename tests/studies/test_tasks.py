"""`study tasks`: each task alone and together, the table against the runs' own files, and what is refused."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mtl import registry
from mtl.cli import main
from mtl.cli.jobs import results_folder
from mtl.config import validate
from mtl.errors import UserError
from mtl.studies.comparison import Comparison, Held, alone, jobs_of, measures_of
from mtl.studies.jobs import Failure, Job, Outcome, Result, Runner
from mtl.studies.tables import Measure
from mtl.studies.tasks import QUICK_RULES, RULES, plan
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation
from mtl.training.history import History

MEASURES = [Measure("segmentation/miou", "segmentation", True, True), Measure("depth/abs_rel", "depth", False, True)]


def test_all_default_rules_exist() -> None:
    assert set(QUICK_RULES) <= set(RULES) <= set(registry.WEIGHTINGS)


# The trainings


def test_a_task_alone_leaves_nothing_of_the_others() -> None:
    both = validate(
        {
            "task": ["segmentation", "depth"], "loss_weights": {"depth": 2.0}, "lr": 0.5, "monitor": "depth/rmse",
            "segmentation": {"loss": "dice"}, "depth": {"loss": "berhu"},
            "data": {"labels": {"depth": 5, "segmentation": 7}, "size": (32, 48)},
        }
    )  # fmt: skip
    depth, segmentation = alone(both, "depth"), alone(both, "segmentation")
    assert depth.task == ["depth"] and depth.loss_weights == {} and depth.lr == 0.5
    assert depth.depth.loss == "berhu" and depth.segmentation.loss == "cross_entropy"
    assert depth.data.labels == {"depth": 5} and depth.data.size == (32, 48)
    assert (depth.monitor, segmentation.monitor) == ("depth/rmse", "gain")
    # What another study asks of the task, with other tasks beside it, is the same run.
    other = validate({"task": ["normals", "depth"], "lr": 0.5, "monitor": "depth/rmse", "depth": {"loss": "berhu"},
                      "data": {"labels": {"depth": 5}, "size": (32, 48)}})  # fmt: skip
    assert alone(other, "depth") == depth


def test_a_task_alone_takes_its_own_data_sets() -> None:
    both = validate(
        {
            "data": {"name": "scenes", "targets": ["depth"], "ratio": 1, "size": (32, 48), "workers": 0},
            "more_data": [{"name": "scenes", "scene_seed": 1, "targets": ["segmentation"], "ratio": 2}],
        }
    )
    assert alone(both, "depth").more_data == [] and alone(both, "depth").data.scene_seed == 0
    segmentation = alone(both, "segmentation")
    assert segmentation.more_data == [] and segmentation.data.scene_seed == 1
    assert segmentation.data.ratio is None and segmentation.data.size == (32, 48) and segmentation.data.workers == 0


def test_the_plan() -> None:
    held = Held(test=False, monitor="gain", patience=False)
    experiment = validate({"task": ["segmentation", "depth"], "loss_weights": {"depth": 0.5}})
    entries = plan(experiment, ["fixed", "pcgrad"], [3, 5], held)
    names = [job.name for job in jobs_of(entries)]
    assert names == [
        "segmentation alone, seed 3", "depth alone, seed 3", "fixed, seed 3", "pcgrad, seed 3",
        "segmentation alone, seed 5", "depth alone, seed 5", "fixed, seed 5", "pcgrad, seed 5",
    ]  # fmt: skip
    fixed, pcgrad = (entries[place].jobs[1][0].experiment for place in (1, 2))
    assert (fixed.weighting, fixed.loss_weights, fixed.seed) == ("fixed", {"depth": 0.5}, 5)
    assert (pcgrad.weighting, pcgrad.loss_weights, pcgrad.seed) == ("pcgrad", {}, 5)


def test_what_concerns_gradients_is_said_to_the_rules_that_compare_them() -> None:
    held = Held(test=False, monitor="gain", patience=False)
    common = {"task": ["segmentation", "depth"]}
    given = validate(common | {"weighting_on": "parameters", "weighting_every": 2})
    single, equal, mgda = plan(given, ["equal", "mgda"], [0], held)
    experiment = mgda.jobs[0][0].experiment
    assert (experiment.weighting_on, experiment.weighting_every) == ("parameters", 2)
    assert mgda.label == "mgda (on parameters, every 2)" and mgda.jobs[0][0].name == f"{mgda.label}, seed 0"
    # The others are the same trainings as without, and so found again by a study on features.
    plain = plan(validate(common), ["equal", "mgda"], [0], held)
    assert [entry.label for entry in plain] == [single.label, "equal", "mgda"]
    for one, other in ((single, plain[0]), (equal, plain[1])):
        assert [job.experiment for job in one.jobs[0]] == [job.experiment for job in other.jobs[0]]
    _, options = plan(validate(common | {"weighting_options": {"alpha": 1}}), ["gradnorm"], [0], held)
    assert options.label == "gradnorm (alpha=1)"
    assert options.jobs[0][0].experiment.weighting_options == {"alpha": 1}


def test_where_there_is_a_test_split_the_best_checkpoint_is_measured_on_it(tmp_path: Path) -> None:
    held = Held(test=True, monitor="gain", patience=False)
    assert held.then["test.json"][:4] == ("evaluate", "{run}", "--split", "test")
    (tmp_path / "test.json").write_text('{"depth/abs_rel": 0.1}')
    run = Result(tmp_path, {"depth/abs_rel": 0.2}, {})
    assert held.metrics(run) == {"depth/abs_rel": 0.1}
    assert Held(False, "gain", False).metrics(run) == {"depth/abs_rel": 0.2}
    assert "test split" in held.note and "nothing was chosen" in Held(False, "gain", False).note
    assert "--patience" in Held(False, "gain", True).note


def test_the_metrics_of_the_literature() -> None:
    measures = measures_of([Segmentation, Depth, Normals])  # type: ignore[list-item]  # what classes say
    usual = [measure.name for measure in measures if measure.usual]
    assert len(usual) == 9  # Nash-MTL's nine of NYUv2
    directions = {"miou": 1, "pixel_accuracy": 1, "abs_error": 0, "abs_rel": 0, "mean_angle": 0, "median_angle": 0,
                  "within_11.25": 1, "within_22.5": 1, "within_30": 1}  # fmt: skip
    assert {measure.name.partition("/")[2]: measure.higher_is_better for measure in measures if measure.usual} == {
        name: bool(higher) for name, higher in directions.items()
    }
    assert [measure.name for measure in measures if measure.main] == [
        "segmentation/miou", "depth/abs_rel", "normals/mean_angle",
    ]  # fmt: skip
    assert not any("_image" in measure.name or "/iou/" in measure.name for measure in measures)


# The table


def comparison(miou: dict[str, list[float | None]], abs_rel: dict[str, list[float | None]]) -> Comparison:
    """Return a comparison of made-up runs; the key 'alone' has each task alone, and None is a run that failed."""
    held = Held(False, "gain", False)
    rules = [name for name in miou if name != "alone"]
    experiment = validate({"task": ["segmentation", "depth"]})
    entries = plan(experiment, rules, range(len(miou["alone"])), held)
    outcomes = {}
    for entry, name in zip(entries, ["alone", *rules], strict=True):
        for seed, jobs in enumerate(entry.jobs):
            values = {"segmentation/miou": miou[name][seed], "depth/abs_rel": abs_rel[name][seed]}
            for job in jobs:
                own = {k: v for k, v in values.items() if k.partition("/")[0] in job.experiment.task}
                cost = {"parameters": 10**6 * (1 + len(own)), "seconds_per_step": 0.1 * (1 + len(own)),
                        "peak_memory_bytes": 10**9 * len(own), "memory_of": "GPU", "device": "X"}  # fmt: skip
                missing = None in own.values()
                outcomes[job] = Failure("no") if missing else Result(Path(), own, cost)  # type: ignore[arg-type]
    return Comparison(entries, outcomes, MEASURES, held)


def test_the_gain_is_over_the_mean_of_the_single_tasks_and_its_spread_over_seeds(tmp_path: Path) -> None:
    made = comparison(
        {"alone": [0.38, 0.42], "equal": [0.44, 0.48], "pcgrad": [None, 0.40]},
        {"alone": [0.22, 0.18], "equal": [0.20, 0.16], "pcgrad": [0.1, 0.25]},
    )
    single, good, odd = made.entries
    assert made.reference == pytest.approx({"segmentation/miou": 0.40, "depth/abs_rel": 0.20})
    each = [100 * (0.10 + 0.0) / 2, 100 * (0.20 + 0.20) / 2]  # of the two seeds: 5 and 20
    main = made.deltas(good)[0]
    assert main is not None and main == pytest.approx((np.mean(each), np.std(each, ddof=1), 2))
    none = made.deltas(single)[0]
    assert none is not None and none.mean == pytest.approx(0) and none.deviation > 0
    assert made.deltas(odd)[0] == pytest.approx((-12.5, math.nan, 1), nan_ok=True)
    assert [made.label(entry) for entry in made.entries] == ["each alone (2 networks)", "equal", "pcgrad (1 failed)"]
    # Two networks: 2 + 2 million parameters and 0.2 + 0.2 s, the larger memory; one: 3 million and 0.3 s.
    assert [spread.mean for spread in made.cost(single) if spread] == pytest.approx([4.0, 0.4, 1000])
    assert [spread.mean for spread in made.cost(good) if spread] == pytest.approx([3.0, 0.3, 2000])


def test_a_rule_that_fails_throughout_is_marked_and_without_single_tasks_there_is_no_gain(tmp_path: Path) -> None:
    bad = comparison({"alone": [0.4], "dwa": [None]}, {"alone": [0.2], "dwa": [None]})
    text = bad.write(tmp_path, "weighting")
    assert "| dwa (failed) | 0 | - | - | - | - | - | - | - | - |" in text
    without = comparison({"alone": [None], "equal": [0.4]}, {"alone": [0.2], "equal": [0.2]})
    assert without.deltas(without.entries[1]) == [None, None, None]
    assert "| equal | 1 | 0.400 | 0.200 | - | - | - |" in without.write(tmp_path, "weighting").replace("**", "")


# On the command line


def test_the_study_reports_what_the_runs_measured(
    tiny: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "--max-steps", "3", "--rules", "equal", "pcgrad", "--seeds", "4"]
    assert main(["study", "tasks", *words]) == 0
    runs = tmp_path / "runs"
    folders = {folder.name.rpartition("-")[0]: folder for folder in (runs / "jobs").glob("*-*")}
    assert len(in_process) == 4 and set(folders) == {"segmentation", "depth", "segmentation-depth"}
    rows = list(csv.DictReader((runs / "tasks" / "table.csv").read_text().splitlines()))
    assert [row["weighting"] for row in rows] == ["each alone (2 networks)", "equal", "pcgrad"]
    for name, task in (("segmentation/miou", "segmentation"), ("depth/rmse", "depth")):
        last = History(folders[task] / "metrics.csv").column(name)[1][-1]
        assert float(rows[0][name]) == pytest.approx(last, rel=1e-12)
    gains = [float(row["Δm, main metrics (%)"]) for row in rows]
    single, equal = rows[0], rows[1]
    by_hand = 50 * (
        float(equal["segmentation/miou"]) / float(single["segmentation/miou"])
        - float(equal["depth/abs_rel"]) / float(single["depth/abs_rel"])
    )
    assert gains[0] == pytest.approx(0, abs=1e-9) and gains[1] == pytest.approx(by_hand)
    assert (runs / "tasks" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    table = (runs / "tasks" / "table.md").read_text()
    assert "nothing was chosen by these samples" in table and "Vandenhende" in table
    assert "| pcgrad |" in capsys.readouterr().out

    # Another rule, with one more run: what is there is reused, also by another study.
    in_process.clear()
    assert main(["study", "tasks", *words[:-3], "fixed", "--seeds", "4", "--name", "again"]) == 0
    assert len(in_process) == 1
    in_process.clear()
    assert main(["study", "loss-weights", *words[:-5], "--ratios", "1", "--seeds", "4"]) == 0
    assert in_process == [] and (runs / "loss-weights" / "picture.png").is_file()


def test_a_failed_training_is_named_and_the_table_is_still_written(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Runner, jobs: Sequence[Job]) -> list[Outcome]:
        done = Result(tmp_path, {"depth/abs_rel": 0.5, "normals/mean_angle": 9.0}, {})
        return [Failure("no") if job.experiment.weighting == "equal" else done for job in jobs]

    monkeypatch.setattr(Runner, "run", run)
    words = [*tiny, "--rules", "equal", "fixed", "--seeds", "0", "--task", "depth", "normals"]
    assert main(["study", "tasks", *words]) == 2
    assert "1 of 4 trainings failed (equal, seed 0)" in capsys.readouterr().err
    table = (tmp_path / "runs" / "tasks" / "table.md").read_text()
    assert "| equal (failed) | 0 |" in table and "| fixed | 1 |" in table


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rules", "pcgrade"], "--rules 'pcgrade' is no weighting rule (did you mean 'pcgrad'?)"),
        (["--rules", "equal", "equal"], "--rules names equal twice"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
        (["--seeds"], "--seeds names none"),
        (["--seed", "3"], "--seed 3: a study has several seeds"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--task", "depth"], "--task depth: this study compares"),
        (["--weighting", "equal"], "--weighting equal: this study tries several rules"),
        (["--monitor", "depth/rmsee"], "--monitor 'depth/rmsee' is not measured (did you mean 'depth/rmse'?)"),
        (["--warmup", "100000", "--rules", "mgda"], "--warmup 100000 is not shorter than the training of"),
        (["--freeze", "--unfreeze-at", "5", "--max-steps", "3"], "--unfreeze-at 5 comes after"),
        (["--rules", "mgda", "gradnorm", "--weighting-options", "alpha=1"], "this study tries 2 rules"),
        (["--weighting-options", "alpha=1"], "this study tries 11 rules"),
        (["--rules", "cagrad", "--weighting-options", "alfa=1"], "alfa"),
        (["--rules", "equal", "dwa", "--weighting-every", "2"], "--weighting-every 2 is for rules that compare"),
        (["--rules", "equal", "--weighting-on", "parameters"], "none of --rules equal does"),
        (["--name", "jobs"], "--name jobs:"),
        (["--rule", "equal"], "--rule is no flag (did you mean '--rules'?)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    words: list[str],
    sentence: str,
    tiny: list[str],
    tmp_path: Path,
    in_process: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", "tasks", *tiny, *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert in_process == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["runs", "runs/tasks", "runs/jobs", "runs/jobs/logs"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_trained(
    file: str, tiny: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert main(["study", "tasks", *tiny, "--rules", "equal", "--seeds", "0"]) == 2
    error = capsys.readouterr().err
    assert f"{path} is no folder" in error and error.count("\n") == 1
    assert in_process == [] and path.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        results_folder(validate({"name": "x" * 300, "output_dir": str(tmp_path)}), "tasks")
    assert results_folder(validate({"output_dir": str(tmp_path / "new" / "deep")}), "tasks").name == "tasks"
    assert list(tmp_path.iterdir()) == []


WRONG_SHAPE = """
import mtl
import torch

@mtl.register_weighting("one-short")
class OneShort(mtl.Weighting):
    def forward(self, step):
        return torch.ones(len(step.losses) - 1)
"""


def test_a_rule_of_a_plugin_is_tried_before_anything_is_trained(
    tiny: list[str],
    tmp_path: Path,
    in_process: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(registry.clear)
    (tmp_path / "mine.py").write_text(WRONG_SHAPE)
    words = ["--plugin", str(tmp_path / "mine.py"), "--rules", "equal", "one-short", "--seeds", "0"]
    assert main(["study", "tasks", *tiny, *words]) == 2
    error = capsys.readouterr().err
    assert "mine.py" in error and "must give 2 floats" in error and error.count("\n") == 1
    assert in_process == [] and not (tmp_path / "runs").exists()


def test_quick_is_small_unless_flags_say_otherwise(tiny: list[str]) -> None:
    from mtl.cli.jobs import read_study
    from mtl.cli.study import QUICK, _Tasks

    def read(*words: str) -> tuple:
        return read_study(_Tasks, QUICK, list(words), "study tasks", "")

    plain, quick, mixed = read(), read("--quick"), read("--quick", "--max-steps", "7", "--seeds", "9")
    assert plain[1].max_steps is None and plain[0].seeds == [0, 1, 2]
    assert quick[1].max_steps == QUICK["max_steps"] and quick[1].logger == "csv"
    assert quick[1].data.size == tuple(QUICK["data"]["size"])
    assert mixed[1].max_steps == 7 and mixed[0].seeds == [9]
    assert mixed[1].data.size == quick[1].data.size
