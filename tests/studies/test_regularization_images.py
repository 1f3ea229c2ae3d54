"""The study on pictures: what it trains, what it reads, and what it refuses."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mtl.build import Surroundings, build_tasks, open_source
from mtl.cli import main
from mtl.config import Experiment, changed, validate
from mtl.errors import UserError
from mtl.runs import read_run
from mtl.studies.comparison import Held, check_entries, jobs_of
from mtl.studies.jobs import Failure, Job, Outcome, Result, folder_of
from mtl.studies.regularization.images import MEMBERS, choose, plain, plan, report, variants

SMALL = validate(
    {
        "task": ["segmentation", "depth"],
        "data": {"train_samples": 24, "val_samples": 4, "size": (64, 64), "workers": 0},
        "batch_size": 4,
        "max_steps": 12,
        "weight_decay": 0.3,
        "augment": "heavy",
        "ema": 0.5,
        "regularize": {"l2": 1.0},
    }
)
BASE = plain(SMALL, Surroundings())
HELD = Held(False, "gain", False)


def values_of(experiment: Experiment) -> dict[str, object]:
    """Return an experiment's values, the nested ones by their full names."""
    flat: dict[str, object] = {}
    for name, value in experiment.model_dump(mode="json").items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def test_the_baseline_does_not_regularize_and_is_validated_at_its_end():
    assert (BASE.weight_decay, BASE.augment, BASE.ema, BASE.init, BASE.dropout) == (0, "none", None, "none", 0)
    assert not any(values for name, values in BASE.regularize if name != "measure")
    assert BASE.validate_every == BASE.max_steps == 12 and BASE.patience is None
    # What is no regularization stays.
    assert (BASE.batch_size, BASE.lr, BASE.data) == (SMALL.batch_size, SMALL.lr, SMALL.data)


def test_each_row_changes_what_it_says_and_nothing_else():
    plainly = values_of(BASE)
    for variant in variants(SMALL)[1:]:
        experiment = changed(BASE, variant.changes)
        different = {name for name, value in values_of(experiment).items() if value != plainly[name]}
        wanted = {
            f"{name}.{each}" if isinstance(value, Mapping) else name
            for name, value in variant.changes.items()
            for each in (value if isinstance(value, Mapping) else [name])
        }
        assert different == wanted, variant
        assert different or variant.alone or variant.words


def test_all_rows_can_be_trained():
    chosen = choose(variants(SMALL), [], quick=False)
    check_entries(plan(BASE, chosen, [0], HELD, Path("runs")), Surroundings())
    quick = choose(variants(SMALL), [], quick=True)
    assert quick[0].mechanism is None and 8 < len(quick) < len(chosen)
    # 40 minutes are for so many trainings with three seeds.
    assert len(jobs_of(plan(BASE, quick, [0], HELD, Path("runs")))) <= 16


def test_what_an_experiment_does_not_have_is_left_out():
    alone = validate({"task": ["depth"], "backbone": "resnet18", "init": "none"})
    names = {variant.name for variant in variants(alone)}
    assert not names & {"label-smoothing", "transfer", "multi-task"} and "depth-jitter" in names
    start = next(one for one in variants(changed(alone, {"init": "imagenet"})) if one.name == "transfer")
    assert start.changes == {"init": "imagenet"}
    with pytest.raises(UserError, match=r"'label-smoothing' is none of this experiment's.*l2"):
        choose(variants(alone), ["label-smoothing"], quick=False)


def test_an_ensembles_members_are_trained_before_and_answer_with_the_baseline(tmp_path: Path):
    chosen = choose(variants(SMALL), ["ensemble"], quick=False)
    baseline, mean, median, _ = plan(BASE, chosen, [3], HELD, tmp_path)
    (job,) = mean.jobs[0]
    assert job.experiment == baseline.jobs[0][0].experiment and job.experiment.seed == 3
    assert len(job.after) == MEMBERS - 1 and len({one.experiment.seed for one in job.after} | {3}) == MEMBERS
    words = job.then[mean.files[1]]
    assert words[:2] == ("evaluate", "{run}")
    assert list(words[2 : MEMBERS + 1]) == [str(folder_of(one.experiment, tmp_path)) for one in job.after]
    assert words[MEMBERS + 1 :] == ("--split", "validation", "--combine", "mean", "--json", "{file}")
    assert "--split train" in " ".join(job.then[mean.files[0]])
    assert not set(mean.files) & set(median.files) and not set(mean.files) & set(baseline.files)
    # The members of all three rows are the same runs.
    assert len({folder_of(one.experiment, tmp_path) for one in jobs_of([baseline, mean, median])}) == MEMBERS


def made_up(folder: Path, failed: str) -> str:
    """Report on runs whose errors are by hand: 2 points less on others with weight decay, as many more without."""
    chosen = [one for one in choose(variants(SMALL), ["weight-decay", "multi-task", "ensemble"], False) if one.quick]
    seeds = [0, 1, 2]
    rows = plan(BASE, chosen, seeds, HELD, folder / "jobs")
    outcomes: dict[Job, Outcome] = {}
    for row in rows:
        for seed, jobs in zip(seeds, row.jobs, strict=True):
            for job in jobs:
                run = folder_of(job.experiment, folder / "jobs")
                run.mkdir(parents=True, exist_ok=True)
                test = 0.30 + 0.01 * seed + (-0.02 - 0.001 * seed) * (row.variant.name == "weight-decay")
                for file, error in zip(row.files, (0.10, test), strict=True):
                    metrics = {"segmentation/miou": 1 - error, "depth/abs_rel": 2 * error}
                    metrics = {k: v for k, v in metrics.items() if k.partition("/")[0] in job.experiment.task}
                    (run / file).write_text(json.dumps(metrics))
                cost = {"steps": 10, "seconds_per_step": 0.5, "parameters": 2_000_000}
                outcomes[job] = Failure("no") if (row.variant.name, seed) == (failed, 0) else Result(run, {}, cost)
    tasks = build_tasks(BASE, open_source(BASE, "train", Surroundings()).info)
    return report(rows, outcomes, tasks, BASE, HELD, 24, folder / "out")


def test_the_report(tmp_path: Path):
    text = made_up(tmp_path, failed="multi-task")
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    segmentation, depth = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["technique"] for row in segmentation] == [
        "baseline", "decoupled weight decay", "without multi-task learning", "ensemble of 3"
    ]  # fmt: skip
    for part, factor in ((segmentation, 1), (depth, 2)):
        assert float(part[0]["test"]) == pytest.approx(31 * factor)
        assert float(part[0]["gap"]) == pytest.approx(21 * factor)
        assert float(part[1]["difference"]) == pytest.approx(np.mean([-2, -2.1, -2.2]) * factor)
        assert part[1]["verdict"] == "helps" and part[3]["verdict"] == "not shown"
        assert part[2]["test of seed 0"] == ""  # it failed
    assert [float(row["seconds"]) for row in segmentation] == [5, 5, 10, 15]
    assert [float(row["parameters (M)"]) for row in segmentation] == [2, 2, 4, 6]
    assert "Depth: remaining error by abs_rel, in percent" in text and "no test split" in text
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 1


# On the command line


def test_it_measures_what_the_runs_are(tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "small.yaml"
    config.write_text(
        "task: [segmentation]\nbatch_size: 4\nmax_steps: 2\nlogger: csv\n"
        "data: {train_samples: 8, val_samples: 4, size: [64, 64], workers: 0}\n"
    )
    words = ["study", "regularization", "--config", str(config), "--output-dir", str(tmp_path / "runs")]
    words += ["--seeds", "0", "1", "--techniques", "dropout", "mc-dropout", "--device", "cpu"]
    assert main(words) == 0
    trained = [call for call in in_process if call[0] == "train"]
    assert len(trained) == 3 * 2  # Monte Carlo dropout is of a training that is there already
    rows = list(csv.DictReader((tmp_path / "runs" / "regularization" / "table.csv").read_text().splitlines()))
    assert [row["strength"] for row in rows] == ["", "p 0.1", "p 0.3", "p 0.3, 20 passes"]
    measured = {}
    for run in (tmp_path / "runs" / "jobs").glob("segmentation-*"):
        experiment, _ = read_run(run / "best.ckpt", {})
        found = [json.loads((run / f"plain-{split}.json").read_text()) for split in ("train", "validation")]
        measured[experiment.dropout, experiment.seed] = [100 * (1 - each["segmentation/miou"]) for each in found]
    for row, dropout in zip(rows, (0.0, 0.1, 0.3), strict=False):
        pairs = [measured[dropout, seed] for seed in (0, 1)]
        assert float(row["training"]) == pytest.approx(np.mean([pair[0] for pair in pairs]))
        assert float(row["test"]) == pytest.approx(np.mean([pair[1] for pair in pairs]))
    in_process.clear()
    assert main(words) == 0 and in_process == []
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--augment", "light"], "--augment: this study decides what regularizes"),
        (["--regularize.l2=1"], "--regularize.l2: this study decides"),
        (["--init", "none"], "--init: this study decides"),
        (["--weight_decay", "0"], "--weight-decay: this study decides"),
        (["--seeds", "3"], "--seeds 3: a single seed"),
        (["--techniques", "dropuot"], "--techniques 'dropuot' is none of this experiment's (did you mean 'dropout'?)"),
        (["--techniques", "l2", "l2"], "--techniques names l2 twice"),
        (["--task", "depth", "masked"], "--task masked: this study learns it by itself"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    words: list[str], sentence: str, tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "small.yaml"
    config.write_text("max_steps: 2\ndata: {train_samples: 24, val_samples: 4, size: [64, 64], workers: 0}\n")
    first = ["study", "regularization", "--config", str(config), "--output-dir", str(tmp_path / "runs")]
    assert main([*first, *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert in_process == [] and not (tmp_path / "runs").exists()


def test_mnist1d_has_a_recipe_of_its_own(capsys: pytest.CaptureFixture[str]):
    config = Path(__file__).parents[2] / "configs" / "mnist1d.yaml"
    assert main(["study", "regularization", "--config", str(config)]) == 2
    assert "leave --config out" in capsys.readouterr().err
