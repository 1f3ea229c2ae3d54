"""Tables, and the three conventions of Δm, against numbers worked out by hand and against the papers' formulas."""

import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.studies.tables import Column, Measure, Spread, Table, delta, delta_note

NYUV2 = [
    # name, higher is better, main, alone, together, gain by hand
    ("segmentation/miou", True, True, 0.40, 0.44, +0.10),
    ("segmentation/pixel_accuracy", True, False, 0.60, 0.57, -0.05),
    ("depth/abs_error", False, False, 0.50, 0.45, +0.10),
    ("depth/abs_rel", False, True, 0.20, 0.21, -0.05),
    ("normals/mean_angle", False, True, 20.0, 18.0, +0.10),
    ("normals/median_angle", False, False, 10.0, 11.0, -0.10),
    ("normals/within_11.25", True, False, 0.30, 0.33, +0.10),
    ("normals/within_22.5", True, False, 0.50, 0.50, 0.0),
    ("normals/within_30", True, False, 0.80, 0.84, +0.05),
]
MEASURES = [Measure(name, name.partition("/")[0], higher, main) for name, higher, main, *_ in NYUV2]
ALONE = {row[0]: row[3] for row in NYUV2}
TOGETHER = {row[0]: row[4] for row in NYUV2}


def test_the_three_conventions_by_hand() -> None:
    found = delta(TOGETHER, ALONE, MEASURES)
    assert found.main == pytest.approx(100 * (0.10 - 0.05 + 0.10) / 3)  # 5.0
    assert found.all == pytest.approx(-100 * 0.25 / 9)  # -2.78: lower is better
    assert found.by_task == pytest.approx(100 * (0.025 + 0.025 + 0.03) / 3)  # 2.67
    assert delta(ALONE, ALONE, MEASURES) == pytest.approx((0, 0, 0))


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=9, max_size=9))
def test_the_three_conventions_as_the_papers_write_them(pairs: list[tuple[float, float]]) -> None:
    base, multi = np.array(pairs).T
    names = [measure.name for measure in MEASURES]
    found = delta(dict(zip(names, multi, strict=True)), dict(zip(names, base, strict=True)), MEASURES)
    higher = np.array([measure.higher_is_better for measure in MEASURES])
    main = np.array([measure.main for measure in MEASURES])
    tasks = np.array([measure.task for measure in MEASURES])
    change = (multi - base) / base
    # Vandenhende et al.: l_t is 1 where a lower value is better; Nash-MTL: delta_k is 1 where a higher one is.
    assert found.main == pytest.approx(100 * np.mean(((-1.0) ** (~higher) * change)[main]), rel=1e-9, abs=1e-9)
    assert found.all == pytest.approx(100 * np.mean((-1.0) ** higher * change), rel=1e-9, abs=1e-9)
    each = [np.mean(((-1.0) ** (~higher) * change)[tasks == task]) for task in ("segmentation", "depth", "normals")]
    assert found.by_task == pytest.approx(100 * np.mean(each), rel=1e-9, abs=1e-9)


def test_metrics_that_are_not_usual_count_only_as_main_ones() -> None:
    more = [*MEASURES, Measure("depth/rmse", "depth", False, usual=False)]
    assert delta({**TOGETHER, "depth/rmse": 9.0}, {**ALONE, "depth/rmse": 1.0}, more) == delta(
        TOGETHER, ALONE, MEASURES
    )


def test_a_missing_metric_or_a_zero_leaves_no_number() -> None:
    missing = {name: value for name, value in TOGETHER.items() if name != "depth/abs_error"}
    found = delta(missing, ALONE, MEASURES)
    assert found.main == pytest.approx(5.0) and math.isnan(found.all) and math.isnan(found.by_task)
    zero = delta(TOGETHER, {**ALONE, "segmentation/miou": 0.0}, MEASURES)
    assert math.isnan(zero.main) and math.isnan(zero.all)


def test_the_note_names_conventions_and_metrics() -> None:
    note = delta_note(MEASURES)
    for words in ("Vandenhende", "Nash-MTL", "lower is better", "LibMTL", "depth/abs_error"):
        assert words in note
    assert "segmentation/miou, depth/abs_rel, normals/mean_angle, one a task" in note


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_a_spread_is_the_sample_standard_deviation(values: list[float]) -> None:
    spread = Spread.of([*values, math.nan, None])
    assert spread is not None and spread.seeds == len(values)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


def test_one_number_has_no_deviation_and_none_no_spread() -> None:
    one = Spread.of([3.0])
    assert one is not None and one.mean == 3 and math.isnan(one.deviation)
    assert Spread.of([math.nan, None]) is None


def table() -> Table:
    columns = [Column("rule"), Column("error", "lower"), Column("share", "higher", 1), Column("steps", digits=0)]
    return Table(
        columns,
        [
            ["one", Spread.of([0.1, 0.2, 0.3]), Spread.of([0.5]), Spread.of([1200.4])],
            ["two", Spread.of([0.25]), Spread.of([0.52]), Spread.of([-0.2])],
            ["three (failed)", None, None, "n/a"],
        ],
        ["A note."],
    )


def test_markdown() -> None:
    assert table().markdown() == (
        "| rule | error ↓ | share ↑ | steps |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| one | **0.200** ± 0.100 | **0.5** | 1200 |\n"
        "| two | 0.250 | **0.5** | 0 |\n"  # a tie, as far as is shown
        "| three (failed) | - | - | n/a |\n"
        "\nA note.\n"
    )


def test_csv_has_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(table().csv())))
    assert [row["rule"] for row in rows] == ["one", "two", "three (failed)"]
    assert float(rows[0]["error"]) == pytest.approx(0.2, abs=1e-15)
    assert float(rows[0]["error (standard deviation)"]) == pytest.approx(0.1, abs=1e-15)
    assert rows[0]["error (n)"] == "3" and rows[1]["error (standard deviation)"] == ""
    assert (rows[2]["error"], rows[2]["steps"]) == ("", "n/a")
