"""`study pretraining`: what is trained from what, the verdict, the report against the runs' own files, and refusals."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mtl.build import Surroundings, build_tasks
from mtl.cli import main
from mtl.cli.jobs import read_study
from mtl.cli.study import PRETRAINING_QUICK, _Pretraining
from mtl.config import Experiment, changed, load, validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.studies import pretraining_report
from mtl.studies.comparison import Comparison, Held, check_entries, jobs_of, measures_of
from mtl.studies.jobs import Failure, Job, Result, folder_of
from mtl.studies.pretraining import METHODS, QUICK_METHODS, Row, Setting, find_methods, plan, settle
from mtl.studies.pretraining_report import judge, report
from mtl.studies.tables import Spread
from mtl.tasks.base import Task
from mtl.training.history import History
from mtl.transfer.weights import load_checkpoint

HELD = Held(test=False, monitor="gain", patience=False)

SMALL = {"data": {"size": (64, 64), "train_samples": 24, "val_samples": 6}, "batch_size": 4, "max_steps": 20}


def rows_of(
    values: dict, labels: Sequence[int] = (5, 10), names: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = (0,)
) -> list[Row]:
    """Return the plan of an experiment, whose runs are to be in a folder 'jobs'."""
    experiment = changed(validate(values), {"init": "none", "epoch_samples": 24})
    return plan(Setting(experiment, 200, 24), labels, names, seeds, tasks_of(experiment), HELD, Path("jobs"))


def tasks_of(experiment: Experiment) -> list[Task]:
    return build_tasks(experiment, DataInfo("made up", ("segmentation", "depth"), ("wall", "floor")))


def only(rows: list[Row], name: str, labels: int = 5, task: str = "depth", seed: int = 0) -> Job:
    """Return the job of a cell."""
    row = next(row for row in rows if row.method is METHODS[name] and row.labels == labels)
    return next(job for job in row.jobs[seed] if job.experiment.task[0] == task)


# The trainings


def test_all_rows_take_the_same_steps_of_the_same_batches_from_the_same_labels() -> None:
    rows = rows_of(SMALL | {"augment": "light", "lr": 0.01})
    assert [(row.label, row.labels) for row in rows] == [(m.label, n) for n in (5, 10) for m in METHODS.values()]
    for row in rows:
        for job, task in zip(row.jobs[0], ("segmentation", "depth"), strict=True):
            one = job.experiment
            assert (one.max_steps, one.batch_size, one.epoch_samples, one.augment, one.lr) == (20, 4, 24, "light", 0.01)
            assert one.data.labels == {task: row.labels}
            assert one.task == ([task, "masked"] if row.method.joint else [task])
            assert one.freeze == row.label.endswith("frozen")
            assert one.data.labelled_share == (0.5 if row.method.joint else None)
            assert one.monitor == ({"depth": "depth/abs_rel", "segmentation": "segmentation/miou"}[task]
                                   if row.method.joint else "gain")  # fmt: skip


def test_a_seed_has_one_pretraining_for_all_tasks_and_numbers_of_labels() -> None:
    rows = rows_of(SMALL, seeds=(3, 4))
    for name, method in METHODS.items():
        jobs = [job for row in rows if row.method is method for seed in row.jobs for job in seed]
        if method.teacher is None:
            assert all(job.after == () and job.experiment.init == "none" for job in jobs), name
            continue
        assert all(len(job.after) == 1 for job in jobs)
        assert len({job.after[0] for job in jobs}) == 2
        for job in jobs:
            before = job.after[0].experiment
            assert before.task == [method.teacher] and before.seed == job.experiment.seed
            assert Path(job.experiment.init) == folder_of(before, Path("jobs"))
            assert (before.init, before.max_steps, before.validate_every, before.freeze) == ("none", 200, 200, False)
            assert before.data.labels == {} and before.data.domain == ("loft" if method.masked else "studio")
    names = [job.name for job in jobs_of(rows)]
    assert len(names) == len(set(names)) == 2 * (2 + 2 * 2 * 6)
    assert names.index("masked before, seed 4") > names.index("jointly with masked: depth, 10 labels, seed 3")


def test_what_concerns_one_row_leaves_the_runs_of_the_others_as_they_are() -> None:
    given = {"mask": {"ratio": 0.5}, "layer_decay": 0.75, "weighting": "uncertainty", "patience": 3}
    plain, other = rows_of(SMALL | {"patience": 3}), rows_of(SMALL | given)
    same = {
        name
        for name in METHODS
        if folder_of(only(plain, name).experiment, Path("jobs"))
        == folder_of(only(other, name).experiment, Path("jobs"))
    }
    assert same == {"scratch", "segmentation-frozen"}
    tuned, frozen, joint = (only(other, name).experiment for name in ("masked-fine-tuned", "masked-frozen", "joint"))
    assert (tuned.layer_decay, frozen.layer_decay, joint.layer_decay) == (0.75, None, None)
    assert (tuned.weighting, joint.weighting) == ("fixed", "uncertainty")
    assert joint.mask.ratio == 0.5 and tuned.mask.ratio is None
    before = only(other, "masked-frozen").after[0].experiment
    assert (before.mask.ratio, before.weighting, before.patience, before.layer_decay) == (0.5, "fixed", None, None)
    # The features are tried by the study itself, unless somebody asks for it.
    assert before.mask.probe_every == joint.mask.probe_every == 0
    asked = rows_of(SMALL | {"mask": {"probe_every": 3}})
    assert only(asked, "masked-frozen").after[0].experiment.mask.probe_every == 3


def test_loss_weights_are_those_of_the_joint_row() -> None:
    rows = rows_of(SMALL | {"loss_weights": {"depth": 3.0}})
    assert only(rows, "joint").experiment.loss_weights == {"depth": 3.0}
    assert only(rows, "joint", task="segmentation").experiment.loss_weights == {}
    assert only(rows, "scratch").experiment.loss_weights == {}


def test_masked_pretraining_takes_pictures_whose_labels_are_not_used() -> None:
    data = SMALL["data"] | {"targets": ["depth"]}
    job = only(rows_of(SMALL | {"data": data, "task": ["depth"]}, names=["masked-frozen"]), "masked-frozen")
    assert job.experiment.data.targets == ["depth"] and job.after[0].experiment.data.targets is None


def test_lengths_do_not_depend_on_the_number_of_labels() -> None:
    given = {"data": SMALL["data"], "batch_size": 4, "epochs": 3}
    setting = settle(validate(given), None, Surroundings())
    one = setting.experiment
    assert (setting.images, one.max_steps, one.epoch_samples, one.validate_every) == (24, 18, 24, 6)
    assert setting.pretrain_steps == 180
    setting = settle(validate(given | {"max_steps": 7, "validate_every": 2}), 11, Surroundings())
    assert (setting.experiment.max_steps, setting.experiment.validate_every, setting.pretrain_steps) == (7, 2, 11)


def folder_data(root: Path, *targets: str) -> dict:
    """Write pictures with labels, and return what names them as an experiment's data."""
    for number in range(10):
        for folder, pixel in (("images", np.full((32, 32, 3), number * 9)), ("segmentation", np.full((32, 32), 1)),
                              ("depth", np.full((32, 32), 900 + number))):  # fmt: skip
            if folder in ("images", *targets):
                kind = np.uint16 if folder == "depth" else np.uint8
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixel.astype(kind)).save(root / folder / f"{number}.png")
    (root / "dataset.yaml").write_text("classes: [wall, floor]\ndepth_scale: 0.001\n")
    return {"data": {"name": "folder", "root": str(root), "size": (32, 32)}}


def test_a_backbone_that_has_seen_all_segmentation_labels_is_not_tried_on_few(tmp_path: Path) -> None:
    data = folder_data(tmp_path, "segmentation", "depth")
    rows = rows_of(data | {"max_steps": 9})
    tasks = {row.label: [job.experiment.task[0] for job in row.jobs[0]] for row in rows}
    assert tasks.pop("segmentation, then frozen") == tasks.pop("segmentation, then fine-tuned") == ["depth"]
    assert all(each == ["segmentation", "depth"] for each in tasks.values())
    before = only(rows, "segmentation-frozen").after[0].experiment
    assert before.data == validate(data).data and before.task == ["segmentation"]


@pytest.mark.parametrize(
    ("targets", "task", "reason"),
    [
        (["depth"], ["depth"], "the data set has no segmentation labels"),
        (["segmentation", "depth"], ["segmentation"], "has seen all segmentation labels says nothing"),
        (["segmentation", "depth"], ["segmentation", "depth"], None),
    ],
)
def test_rows_for_which_there_are_no_data(
    targets: list[str], task: list[str], reason: str | None, tmp_path: Path
) -> None:
    experiment = validate(folder_data(tmp_path, *targets) | {"task": task})
    found = find_methods(experiment, [], tuple(METHODS), Surroundings())
    assert found == list(METHODS if reason is None else QUICK_METHODS)
    named = ["scratch", "segmentation-frozen"]
    if reason is None:
        assert find_methods(experiment, named, (), Surroundings()) == named
        return
    with pytest.raises(UserError, match=f"--methods segmentation-frozen: .*{reason}"):
        find_methods(experiment, named, (), Surroundings())


def test_every_number_of_labels_is_looked_at_before_the_first_training() -> None:
    check_entries(rows_of(SMALL, labels=[5, 24], names=["scratch"]), Surroundings())
    with pytest.raises(UserError, match="segmentation=25"):
        check_entries(rows_of(SMALL, labels=[5, 25], names=["scratch"]), Surroundings())


def test_a_pretraining_is_looked_at_as_well() -> None:
    # Its warm-up would be as long as itself; what follows is longer.
    experiment = changed(validate(SMALL), {"warmup": 5, "init": "none"})
    rows = plan(Setting(experiment, 5, 24), [5], ["masked-frozen"], [0], tasks_of(experiment), HELD, Path())
    with pytest.raises(UserError, match="--warmup 5"):
        check_entries(rows, Surroundings())


# The verdict


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "words"),
    [
        (0.51, True, "beats"), (0.49, True, "does not differ by more than the spread from"),
        (-0.51, True, "is worse than"), (-0.51, False, "beats"),
        (-0.49, False, "does not differ by more than the spread from"), (0.51, False, "is worse than"),
    ],
)  # fmt: skip
def test_the_verdict_by_hand(difference: float, higher_is_better: bool, words: str) -> None:
    assert judge(Spread(difference, 0.5, 3), higher_is_better) == words


def test_one_seed_has_no_spread_to_judge_by() -> None:
    assert judge(Spread(5.0, math.nan, 1), True) is None


# The report

DEPTH = {"scratch": [[0.50, 0.54], [0.40, 0.42]], "masked-fine-tuned": [[0.40, 0.45], [0.43, 0.41]]}
"""Of each method, for each number of labels, AbsRel of each seed."""


def made_up(folder: Path, abs_rel: dict[str, list[list[float]]], **more: object) -> str:
    """Report on made-up runs; NaN is a run that failed, and mIoU is AbsRel less 0.1."""
    experiment = validate({"max_steps": 20, "epoch_samples": 24, "init": "none", **more})
    setting, tasks = Setting(experiment, 200, 24), tasks_of(experiment)
    seeds = range(len(abs_rel["scratch"][0]))
    rows = plan(setting, [5, 10], list(abs_rel), seeds, tasks, HELD, folder / "jobs")
    outcomes: dict[Job, Result | Failure] = {}
    for row in rows:
        name = next(name for name, method in METHODS.items() if method is row.method)
        for seed, jobs in enumerate(row.jobs):
            value = abs_rel[name][(5, 10).index(row.labels)][seed]
            for job in jobs:
                metrics = {"depth/abs_rel": value, "segmentation/miou": value - 0.1, "masked/loss": 9.0}
                own = {k: v for k, v in metrics.items() if k.partition("/")[0] in job.experiment.task}
                cost = {"steps": 20, "seconds_per_step": 0.5, "device": "X", "memory_of": "GPU"}
                outcomes[job] = Failure("no") if math.isnan(value) else Result(folder, own, cost)
                for before in job.after:
                    seconds = {"steps": 200, "seconds_per_step": 0.5 + 0.1 * seed}
                    outcomes[before] = Result(folder, {}, seconds)
    measures = [measure for measure in measures_of(tasks) if measure.main]
    return report(Comparison(rows, outcomes, measures, HELD), rows, tasks, setting, folder / "out")


def test_the_report(tmp_path: Path) -> None:
    text = made_up(tmp_path, DEPTH, task=["depth"])
    assert "| depth/abs_rel | 5 labels ↓ | 10 labels ↓ |" in text
    assert "| from scratch | 0.520 ± 0.028 | **0.410** ± 0.014 |" in text
    assert "| masked, then fine-tuned | **0.425** ± 0.035 | 0.420 ± 0.014 |" in text
    # Of seeds that differ by 0.04 and 0.05 among themselves, each gains 0.1 and 0.09.
    deviation = np.std([0.1, 0.09], ddof=1)
    assert ("- depth/abs_rel, 5 labels: *masked, then fine-tuned* **beats** *from scratch*: a difference of -0.095 ± "
            f"{deviation:.2g}.") in text  # fmt: skip
    assert "10 labels: *masked, then fine-tuned* **does not differ by more than the spread from** *from" in text
    # 200 steps of 0.5 and of 0.6 s, then 20 of 0.5 s.
    assert "had 200 steps a seed on pictures enlarged by a factor of up to 2, and took 110 ± 14" in text
    assert "110 ± 14 seconds, what followed 10 ± 0;" in text
    assert "in 20 steps of 16 samples" in text and "5 labels" in text and "failed" not in text
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert (tmp_path / "out" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [(line["method"], line["labels"], line["seeds"]) for line in lines] == [
        ("from scratch", "5", "2"), ("masked, then fine-tuned", "5", "2"),
        ("from scratch", "10", "2"), ("masked, then fine-tuned", "10", "2"),
    ]  # fmt: skip
    assert [float(line["depth/abs_rel"]) for line in lines] == pytest.approx([0.52, 0.425, 0.41, 0.42])
    assert float(lines[0]["depth/abs_rel (standard deviation)"]) == pytest.approx(np.std([0.5, 0.54], ddof=1))


def test_runs_that_failed_and_cells_that_make_no_sense(tmp_path: Path) -> None:
    data = folder_data(tmp_path / "data", "segmentation", "depth")
    values = {name: [[0.5, math.nan], [math.nan, math.nan]] for name in ("scratch", "masked-fine-tuned")}
    values["segmentation-frozen"] = [[0.5, 0.4], [0.4, 0.3]]
    text = made_up(tmp_path, values, **data)
    assert "| segmentation, then frozen | - | - |" in text  # of segmentation
    assert "| segmentation, then frozen | **0.450** ± 0.071 | 0.350 ± 0.071 |" in text  # of depth
    assert (
        "5 labels: whether *masked, then fine-tuned* beats *from scratch* cannot be told without several seeds" in text
    )
    assert "10 labels: whether" not in text and "10 labels: *masked" not in text
    assert "| from scratch (1 failed) | 5 | 1 |" in text and "| from scratch (failed) | 10 | 0 |" in text
    assert "Some trainings failed" in text and "is no question (-)" in text


def test_the_picture_is_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pretraining_report, "save", lambda figure, path: drawn.append(figure))
    made_up(tmp_path, DEPTH)
    (figure,) = drawn
    assert len(figure.axes) == 2
    for axes, wanted in zip(figure.axes, ([1 - 0.42, 1 - 0.31], [0.52, 0.41]), strict=True):
        scratch, masked = axes.containers
        assert axes.get_xscale() == "log" and scratch.get_label() == "from scratch"
        assert scratch.lines[0].get_xdata() == pytest.approx([5, 10], rel=0.05)
        assert scratch.lines[0].get_ydata() == pytest.approx(wanted)
        low, high = scratch.lines[2][0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * np.std([0.5, 0.54], ddof=1))
    assert masked.lines[0].get_ydata() == pytest.approx([0.425, 0.42])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["from scratch", "masked, then fine-tuned"]


# On the command line


@pytest.fixture
def small(tiny: list[str]) -> list[str]:
    """Return flags of a study that takes seconds."""
    return [*tiny, "--data.size", "64", "64", "--max-steps", "2", "--pretrain-steps", "3", "--mask.decoder-width", "32"]


def test_the_study_reports_what_the_runs_measured(
    small: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small, "--task", "depth", "--seeds", "4", "--methods"]
    names = ["scratch", "masked-frozen", "masked-fine-tuned", "joint"]
    assert main(["study", "pretraining", *words, *names, "--labels", "5"]) == 0
    assert len(in_process) == 1 + 4
    runs = tmp_path / "runs"
    rows = list(csv.DictReader((runs / "pretraining" / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [METHODS[name].label for name in names]
    measured = [History(path).column("depth/abs_rel")[1][-1] for path in (runs / "jobs").glob("depth-*/metrics.csv")]
    assert sorted(float(row["depth/abs_rel"]) for row in rows) == pytest.approx(sorted(measured), rel=1e-12)
    assert "cannot be told without several seeds" in capsys.readouterr().out
    assert (runs / "pretraining" / "picture.png").read_bytes()[:4] == b"\x89PNG"

    # A frozen backbone is that of the pretraining, and a fine-tuned one is not.
    def backbone(folder: Path) -> dict[str, torch.Tensor]:
        state = load_checkpoint(folder / "last.ckpt")["state_dict"]
        return {name: value for name, value in state.items() if name.startswith("model.backbone.")}

    (before,) = (runs / "jobs").glob("masked-*")
    learned = backbone(before)
    same = []
    for folder in (runs / "jobs").glob("depth-*"):
        other = backbone(folder)
        if all(torch.equal(value, other[name]) for name, value in learned.items()):
            same.append(folder)
    assert len(same) == 1 and f"init: {before}" in (same[0] / "config.yaml").read_text()

    # More labels are learned from without another pretraining.
    in_process.clear()
    assert main(["study", "pretraining", *words, "masked-frozen", "--labels", "5", "7"]) == 0
    assert len(in_process) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--labels", "5", "5"], "--labels names 5 twice"),
        (["--labels", "0", "5"], "--labels 0 must be at least 1"),
        (["--labels", "5", "25"], "--labels 25: scenes/loft has only 24 training images with labels for 'depth'"),
        (["--labels", "24"], "--labels 24: these are all training images, and the method 'joint'"),
        (["--pretrain-steps", "0"], "--pretrain-steps 0 must be at least 1"),
        (["--methods", "scrach"], "--methods 'scrach' is none (did you mean 'scratch'?)"),
        (["--methods", "joint", "joint"], "--methods names joint twice"),
        (["--methods", "scratch"], "--pretrain-steps is for other rows than --methods scratch"),
        (["--methods", "segmentation-frozen"], "--mask.* is for other rows"),
        (["--methods", "masked-frozen", "--weighting", "equal"], "--weighting and --loss-weights are for other rows"),
        (["--methods", "masked-frozen", "--layer-decay", "0.5"], "--backbone-lr and --layer-decay are for other rows"),
        (["--task", "depth", "masked"], "--task masked: this study learns it by itself"),
        (["--init", "shipped"], "--init shipped: this study decides"),
        (["--init", "runs/other"], "--init runs/other: this study decides"),
        (["--freeze"], "--freeze: this study decides"),
        (["--freeze-stages", "1"], "--freeze-stages: this study decides"),
        (["--lora", "2"], "--lora: this study decides"),
        (["--data.labels", "depth=5"], "--data.labels: this study tries several numbers"),
        (["--data.labelled-share", "0.5"], "--data.labelled-share is for --task masked"),
        (["--mask.method", "tokens"], "--mask.method tokens"),
        (["--mask.patch", "40"], "40"),
        (["--weighting", "cagrad", "--weighting-options", "alfa=1"], "alfa"),
        (["--warmup", "2"], "--warmup 2 is not shorter than the training"),
        (["--monitor", "depth/rmsee"], "--monitor 'depth/rmsee' is not measured"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    words: list[str],
    sentence: str,
    small: list[str],
    tmp_path: Path,
    in_process: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", "pretraining", *small, "--labels", "5", "--task", "depth", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert in_process == [] and not (tmp_path / "runs").exists()


def test_several_data_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("more_data: [{name: scenes, scene_seed: 1}]\n")
    assert main(["study", "pretraining", "--config", str(config), "--output-dir", str(tmp_path / "runs")]) == 2
    assert "more_data: this study counts the labels of a single data set" in capsys.readouterr().err


def test_quick_is_small_unless_flags_say_otherwise() -> None:
    def read(*words: str) -> tuple:
        return read_study(_Pretraining, PRETRAINING_QUICK, list(words), "study pretraining", "")

    plain, quick, mixed = read(), read("--quick"), read("--quick", "--data.size", "96", "96", "--labels", "7")
    assert plain[1].max_steps is None and plain[0].labels == [] and plain[0].pretrain_steps is None
    assert (quick[1].max_steps, quick[1].data.size, quick[1].logger) == (150, (64, 64), "csv")
    assert mixed[1].data.size == (96, 96) and mixed[0].labels == [7] and mixed[1].max_steps == 150


@pytest.mark.parametrize("name", ["pretrain", "pretrain_nyuv2"])
def test_the_configurations_pretrain(name: str) -> None:
    experiment = load(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    assert experiment.task == ["masked"] and experiment.init == "none" and experiment.weight_decay == 0.05
