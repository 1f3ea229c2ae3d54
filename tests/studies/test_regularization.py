"""The study's numbers, its verdicts, and what it writes."""

import csv
import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mtl.cli import main
from mtl.studies.regularization import signals
from mtl.studies.regularization.recipe import Data, Published, Recipe
from mtl.studies.regularization.report import (
    Difference,
    Interval,
    Measured,
    Section,
    differences,
    holm,
    paired_p,
    tables,
    verdicts,
    write,
)
from mtl.studies.regularization.techniques import Technique
from mtl.studies.regularization.training import Parameters, logits

# Statistics


def test_holm_by_hand():
    # Of Holm's procedure: 4 x 0.005, 3 x 0.01, 2 x 0.03, and then no less than before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert found[::2] == pytest.approx([0.02, 0.02]) and math.isnan(found[1])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferronis(values: list[float]):
    adjusted = holm(values)
    for p, a in zip(values, adjusted, strict=True):
        assert p <= a <= min(1, len(values) * p) + 1e-12
    order = np.argsort(values)
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=8))
def test_the_interval_and_the_test_agree(pairs: list[tuple[float, float]]):
    new, old = zip(*pairs, strict=True)
    each, p = paired_p(new, old)
    if np.std(each) < 1e-3:
        return
    interval = Interval.of(each)
    assert interval is not None
    low, high = stats.t.interval(0.95, len(each) - 1, np.mean(each), stats.sem(each))
    assert (interval.mean - interval.half, interval.mean + interval.half) == pytest.approx((low, high))
    # A paired test at 5 % rejects where the differences' interval leaves out zero.
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (not low <= 0 <= high)


def test_pairs_without_a_number_are_left_out():
    each, p = paired_p([1.0, None, 3.0, 5.0], [0.5, 2.0, None, 4.0])
    assert each == [0.5, 1.0] and p == pytest.approx(stats.ttest_1samp([0.5, 1.0], 0).pvalue)
    assert paired_p([1.0, 2.0], [1.0, 2.0]) == ([0.0, 0.0], 1.0)
    assert math.isnan(paired_p([1.0], [2.0])[1])
    assert Interval.of([None, math.nan]) is None


@pytest.mark.parametrize(
    ("mean", "adjusted", "word"),
    [(-3, 0.049, "helps"), (3, 0.049, "hurts"), (-3, 0.05, "not shown"), (3, 0.9, "not shown"), (3, math.nan, "-")],
)
def test_the_verdict(mean: float, adjusted: float, word: str):
    assert Difference(Interval(mean, 1.0), 0.01, adjusted).verdict == word


# What is written

BASELINE = Measured("baseline", "", None, [0.0, 0.0, 1.0], [35.0, 36.0, 37.0], {"seconds": [2.0]})
HELPS = Measured("augmentation", "<both>", "More data", [1.0, 1.0, 1.0], [30.0, 31.1, 32.0], {"seconds": [3.0]})
NOTHING = Measured("SAM", "radius 1", "Wider minima", [0.0, None, 2.0], [36.0, None, 36.0], {"seconds": None})
HURTS = Measured("L2", "λ 1", "Wider minima", [50.0, 51.0, 52.0], [60.0, 61.0, 62.1], {"seconds": [1234.0]})
SECTION = Section("error in percent", [BASELINE, HELPS, NOTHING, HURTS])


def test_what_does_not_help_is_said_not_to():
    assert [one.verdict for one in differences(SECTION.rows)] == ["helps", "not shown", "hurts"]
    assert verdicts(SECTION) == [
        "Helps (1 of 3): augmentation, <both> (-5.0).",
        "Hurts (1 of 3): L2, λ 1 (+25.0).",
        "Not shown to help or to hurt (1 of 3): SAM, radius 1 (+0.0).",
    ]


def test_tables_are_grouped_and_begin_with_the_baseline():
    (first, more), (second, wide) = tables(SECTION)
    assert (first, second) == ("More data", "Wider minima")
    assert [line[0] for line in more[1:]] == ["baseline", "augmentation"]
    assert [line[0] for line in wide[1:]] == ["baseline", "SAM", "L2"]
    low, high = stats.t.interval(0.95, 2, 36, stats.sem([35, 36, 37]))
    assert more[1][2:6] == ["0.3 ± 1.4", f"36.0 ± {(high - low) / 2:.1f}", "35.7 ± 1.4", ""]
    assert wide[2][-1] == "-" and wide[3][-1] == "1,234"


def test_the_files(tmp_path: Path):
    text = write(tmp_path, "A study", [SECTION], ["A note & more."])
    assert (tmp_path / "table.md").read_text() == text
    assert "### More data" in text and "| augmentation | <both> | 1.0 ± 0.0 |" in text and "A note & more." in text
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["technique"] for row in rows] == ["baseline", "augmentation", "SAM", "L2"]
    assert float(rows[1]["difference"]) == pytest.approx(-4.9666667)
    assert float(rows[1]["p"]) == pytest.approx(stats.ttest_rel([30.0, 31.1, 32.0], [35.0, 36.0, 37.0]).pvalue)
    assert float(rows[3]["gap"]) == pytest.approx(np.mean([10, 10, 10.1]))
    assert [rows[2][f"test of seed {seed}"] for seed in range(3)] == ["36.0", "", "36.0"]
    page = (tmp_path / "report.html").read_text()
    assert "&lt;both&gt;" in page and "A note &amp; more." in page
    # One file: all that it shows is in it.
    assert re.findall(r'(?:src|href)="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert html.unescape(page).count("<both>") == 2  # in the sentence and in the table
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_several_errors_have_a_section_each(tmp_path: Path):
    text = write(tmp_path, "A study", [SECTION, SECTION._replace(title="another")], [])
    assert text.count("### Wider minima") == 2 and "## Another" in text
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 9


# What is measured

GENERATOR = torch.Generator().manual_seed(0)
TEST = Data(torch.randn(50, 40, generator=GENERATOR), torch.randint(10, (50,), generator=GENERATOR))
PUBLISHED = Published(TEST, Data(TEST.signals[:40], TEST.labels[:40]), TEST, TEST)


def networks(count: int) -> Parameters:
    """Return a linear layer behind two that only pass on what is positive, for each of so many seeds."""
    one = torch.eye(40).repeat(count, 1, 1)
    bias = torch.full((count, 1, 40), 9.0)
    last = torch.randn(count, 40, 10, generator=GENERATOR)
    return [one, bias, one, torch.zeros_like(bias), last, -9 * last.sum(1, keepdim=True)]


def row(**changes: object) -> Technique:
    return Technique("x", "x", "", "smooth", Recipe(), **changes)


def test_errors_and_gradients_of_one_network():
    members = [networks(2)]
    found = signals.measure(row(), members, [0, 1], PUBLISHED)
    weight = members[0][4]
    for seed in range(2):
        outputs = TEST.signals @ weight[seed]
        wrong = (outputs.argmax(1) != TEST.labels).float().mean().item()
        assert found["test"][seed] == found["training"][seed] == pytest.approx(100 * wrong)
        # Of a linear model the gradient is known: the weights times probability less label.
        error = outputs.softmax(1) - torch.nn.functional.one_hot(TEST.labels, 10)
        gradient = (error @ weight[seed].T).norm(dim=1).mean().item()
        assert found["input_gradient"][seed] == pytest.approx(gradient, rel=1e-3)
        assert found["sharpness"][seed] > 0
    assert found["parameters"] == 2 * (40 * 40 + 40) + 40 * 10 + 10
    held = signals.measure(Technique("x", "x", "", "smooth", Recipe(signals="train")), members, [0, 1], PUBLISHED)
    assert held["training"] != found["training"] and held["test"] == found["test"]


def test_errors_of_an_ensemble_and_of_a_soup():
    members = [networks(2) for _ in range(3)]
    outputs = torch.stack([logits(one, TEST.signals.expand(2, -1, -1)) for one in members])

    def error(scores: torch.Tensor) -> list[float]:
        return (100 * (scores.argmax(-1) != TEST.labels).double().mean(1)).tolist()

    mean = signals.measure(row(members=3), members, [0, 1], PUBLISHED)
    assert mean["test"] == pytest.approx(error(outputs.softmax(-1).mean(0)))
    assert mean["members"] == [pytest.approx(error(one)) for one in outputs]
    assert mean["sharpness"] is None and mean["parameters"] == 3 * (2 * (40 * 40 + 40) + 410)
    by_logits = signals.measure(row(members=3, kind="logits"), members, [0, 1], PUBLISHED)
    # The last layer is linear, so that the mean of these networks' weights has the mean of their logits.
    soup = signals.measure(row(members=3, soup=True), members, [0, 1], PUBLISHED)
    assert soup["test"] == by_logits["test"] == error(outputs.mean(0))
    assert soup["input_gradient"] == pytest.approx(by_logits["input_gradient"], rel=1e-3)
    assert soup["parameters"] == mean["parameters"] / 3 and soup["sharpness"] is not None
    assert signals.measure(row(members=3, kind="vote"), members, [0, 1], PUBLISHED)["input_gradient"] is None


def test_a_network_of_no_number_is_none():
    members = [[tensor * math.nan for tensor in networks(1)]]
    found = signals.measure(row(), members, [0], PUBLISHED)
    assert found["sharpness"] == [None] and found["input_gradient"] == [None]
    json.dumps(found, allow_nan=False)


# The whole

SHORT = Recipe(epochs=2, batch=200)


def test_it_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    words = ["l2", "early-stopping", "swa", "mc-dropout"]
    text = signals.run(tmp_path, words, [0, 1], None, 1, lines.append, SHORT)
    assert text == (tmp_path / "table.md").read_text() and "| L2 penalty | λ 0.0001 |" in text
    assert "| plain average of weights | from 50% on |" in text and "500 are for validation" in text
    files = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert len(files) == 1 + 4 + 5 + 2 + 3
    # One is lost, and measured again: alone.
    (lost,) = list((tmp_path / "results").glob("l2-*"))[:1]
    lost.unlink()
    lines.clear()
    again = signals.run(tmp_path, words, [0, 1], None, 1, lines.append, SHORT)
    assert lines[0] == "14 of 15 rows are measured already, and reused" and "L2 penalty: 1 rows" in lines[1]
    assert json.loads(lost.read_text())["test"] == pytest.approx(json.loads(files[lost])["test"], abs=0.3)
    assert all(path.read_bytes() == content for path, content in files.items() if path != lost)
    monkeypatch.setattr(signals, "Trainer", None)  # nothing is trained
    assert signals.run(tmp_path, words, [0, 1], None, 1, lines.append, SHORT) == again
    with pytest.raises(TypeError):
        signals.run(tmp_path, words, [0, 2], None, 1, lines.append, SHORT)


def test_ctrl_c_ends_trainings_at_their_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[int] = []
    tell = signals._tell

    def interrupted(watchers, stop, step, parameters):
        steps.append(step)
        if len(steps) == 3:
            stop.set()
        tell(watchers, stop, step, parameters)

    monkeypatch.setattr(signals, "_tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        signals.run(tmp_path, ["l2"], [0, 1], None, 2, lambda line: None, SHORT)
    assert len(steps) <= 4  # of two trainings at a time
    assert not list((tmp_path / "results").iterdir())


def test_the_lectures_figures_are_drawn_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["study", "lecture", "--figures", "l2", "--output-dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["l2.csv", "l2.png"]
    assert capsys.readouterr().out.startswith("l2 (")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["regularization", "--techniques", "dropuot"], "--techniques 'dropuot' is none (did you mean 'dropout'?)"),
        (["regularization", "--techniques", "l2", "l2"], "--techniques names l2 twice"),
        (["regularization", "--seeds", "3"], "--seeds 3: a single seed has no spread"),
        (["regularization", "--seeds", "3", "3"], "--seeds names 3 twice"),
        (["regularization", "--seeds", "-1", "3"], "--seeds"),
        (["regularization", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["regularization", "--root", "nowhere"], "nowhere does not exist"),
        (["lecture", "--figures", "dropuot"], "--figures 'dropuot' is no figure (did you mean 'dropout'?)"),
        (["lecture", "--figures", "l2", "l2"], "--figures names l2 twice"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", ["lecture", "regularization"])
def test_a_folder_that_cannot_be_made_is_refused(study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["study", study, "--output-dir", str(tmp_path / "file" / "out")]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_published_figures(tmp_path: Path):
    """Reference, ten seeds: 35.5 ± 1.2 % without, 32.1 ± 1.1 % with the lecture's augmentation."""
    signals.run(tmp_path, ["augmentation"], range(4), None, 1)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert float(rows[0]["test"]) == pytest.approx(35.5, abs=1.8)
    lecture = next(row for row in rows if row["strength"].startswith("the lecture's"))
    assert float(lecture["test"]) == pytest.approx(32.1, abs=1.7)
