"""`study loss-weights`: the weights of a ratio, which points are Pareto-optimal, and what is refused."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.cli import main
from mtl.config import validate
from mtl.studies.comparison import Comparison, Held
from mtl.studies.jobs import Failure, Result
from mtl.studies.loss_weights import pareto, plan, report, weights_of
from mtl.studies.tables import Measure


@given(st.floats(1e-3, 1e3))
def test_weights_have_their_ratio_and_the_sum_of_equal_ones(ratio: float) -> None:
    alpha, beta = weights_of(ratio)
    assert alpha / beta == pytest.approx(ratio, rel=1e-4) and alpha + beta == pytest.approx(2, rel=1e-5)
    assert weights_of(1) == (1, 1)


def test_the_front_by_hand() -> None:
    points = [(1.0, 4.0), (2.0, 3.0), (2.0, 2.0), None, (3.0, 1.0), (0.5, 3.9), (2.0, 3.0)]
    assert pareto(points) == [True, True, False, False, True, False, True]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_weighing_and_no_walk_can_improve(points: list[tuple[int, int]]) -> None:
    best = pareto([(float(x), float(y)) for x, y in points])
    # From the right, a point is on the front where it is higher than all to its right, and highest at its own place.
    for (x, y), is_best in zip(points, best, strict=True):
        right = max((b for a, b in points if a > x), default=-1)
        assert is_best == (y > right and y == max(b for a, b in points if a == x))


def test_the_ratio_one_is_the_default_of_the_configuration() -> None:
    experiment = validate({"task": ["segmentation", "depth"]})
    single, half, one = plan(experiment, [0.5, 1.0], [0], Held(False, "gain", False))
    assert one.jobs[0][0].experiment == experiment
    weights = half.jobs[0][0].experiment.loss_weights
    assert weights == pytest.approx({"segmentation": 2 / 3, "depth": 4 / 3}, rel=1e-5)
    assert [job.experiment.task for job in single.jobs[0]] == [["segmentation"], ["depth"]]


def test_the_report_marks_what_is_pareto_optimal(tmp_path: Path) -> None:
    held, ratios = Held(False, "gain", False), [0.1, 1.0, 10.0]
    entries = plan(validate({"task": ["segmentation", "depth"]}), ratios, [0, 1], held)
    # Segmentation prefers 10:1; depth, where lower is better, 1:1, which beats 0.1:1 in both.
    measured = [(0.5, 0.30), (0.4, 0.28), (0.45, 0.26), (0.55, 0.35)]
    outcomes = {
        job: Result(tmp_path, {"segmentation/miou": miou, "depth/abs_rel": abs_rel + 0.01 * seed}, {})
        for entry, (miou, abs_rel) in zip(entries, measured, strict=True)
        for seed, jobs in enumerate(entry.jobs)
        for job in jobs
    }
    measures = [
        Measure("segmentation/miou", "segmentation", True, True),
        Measure("depth/abs_rel", "depth", False, True),
    ]
    text = report(Comparison(entries, outcomes, measures, held), ratios, tmp_path / "out")
    assert (tmp_path / "out" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 10:1 | 1.82 | 0.182 | yes | 2 |" in text and "| 0.1:1 | 0.182 | 1.82 | no | 2 |" in text
    rows = list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [row[:4] for row in rows[1:]] == [
        ["each alone (2 networks)", "", "", ""], ["0.1:1", "0.182", "1.82", "no"], ["1:1", "1", "1", "yes"],
        ["10:1", "1.82", "0.182", "yes"],
    ]  # fmt: skip


def test_rows_of_different_weights_have_different_names() -> None:
    ratios = [1e-6, 0.1, 1.0, 1.00001, 999_999.0, 1e6]
    entries = plan(validate({"task": ["segmentation", "depth"]}), ratios, [0], Held(False, "gain", False))
    labels = [entry.label for entry in entries[1:]]
    assert len(set(labels)) == len(ratios) and [float(label.partition(":")[0]) for label in labels] == ratios
    assert labels[1:3] == ["0.1:1", "1:1"]


def test_what_failed_is_no_point_of_the_front(tmp_path: Path) -> None:
    held = Held(False, "gain", False)
    entries = plan(validate({"task": ["segmentation", "depth"]}), [1.0], [0], held)
    outcomes = {job: Failure("no") for entry in entries for jobs in entry.jobs for job in jobs}
    measures = [
        Measure("segmentation/miou", "segmentation", True, True),
        Measure("depth/abs_rel", "depth", False, True),
    ]
    text = report(Comparison(entries, outcomes, measures, held), [1.0], tmp_path / "out")
    assert "| 1:1 (failed) | 1 | 1 | no | 0 | - | - |" in text
    assert (tmp_path / "out" / "picture.png").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ratios", "0", "1"], "--ratios 0: a ratio must be from 1e-06 to 1e+06"),
        (["--ratios", "inf"], "--ratios inf: a ratio must be from"),
        (["--ratios", "nan"], "--ratios nan: a ratio must be from"),
        (["--ratios", "1e308"], "--ratios 1e+308: a ratio must be from"),
        (["--ratios", "1", "1.0000001"], "--ratios 1 and 1.0000001 are the same weights, 1 and 1 in six digits"),
        (["--weighting-every", "2"], "--weighting-every 2 is for rules that compare gradients"),
        (["--weighting-options", "alpha=1"], "the rule 'fixed' has none"),
        (["--warmup", "100000"], "--warmup 100000 is not shorter than the training"),
        (["--ratios"], "--ratios names none"),
        (["--ratios", "2", "2"], "--ratios names 2.0 twice"),
        (["--task", "depth"], "name two"),
        (["--task", "segmentation", "depth", "normals"], "name two"),
        (["--weighting", "equal"], "leave them out"),
        (["--loss-weights", "depth=2"], "leave them out"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], sentence: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "loss-weights", *tiny, *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
