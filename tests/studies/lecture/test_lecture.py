"""The command: what is written, said and refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl.errors import UserError
from mtl.studies import lecture
from mtl.studies.lecture.plate import Plate

OF_SECONDS = ("l2", "flow", "batch-variance", "early-stopping", "bagging", "dropout", "noise")


def test_every_figure_is_a_picture_and_its_numbers(tmp_path: Path):
    captions = lecture.draw(tmp_path, OF_SECONDS, quick=True)
    for name in OF_SECONDS:
        assert captions[name].endswith(".")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
        rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        numbers = [float(row[key]) for row in rows for key in ("x", "y", "value") if row[key]]
        assert np.isfinite(numbers).all()
        assert len({row["panel"] for row in rows}) > 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".csv"}
    assert "luck" in captions["bagging"]
    assert "luck" in captions["early-stopping"]
    assert "0.0191" in captions["flow"]
    assert "0.0018" in captions["flow"]


def test_figures_are_the_same_each_time(tmp_path: Path):
    contents = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        lecture.draw(folder, ["bagging"], quick=True)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]


def test_run_makes_the_folder_and_says_what_figures_show(tmp_path: Path):
    lines: list[str] = []
    lecture.run(tmp_path / "new" / "folder", ["dropout"], lines.append)
    assert lines[0].startswith("dropout (")
    assert "kink" in lines[0]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["dropout.csv", "dropout.png"]


def test_without_names_every_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    for name in lecture.FIGURES:
        monkeypatch.setitem(lecture.FIGURES, name, lambda folder, quick, name=name: drawn.append((name, quick)) or "")
    lecture.run(tmp_path, [], lambda line: None)
    assert drawn == [(name, False) for name in lecture.FIGURES]


def test_an_unknown_figure_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UserError, match=r"'baging' is no figure \(did you mean 'bagging'\?\); there are prior, l2"):
        lecture.run(tmp_path / "new", ["dropout", "baging"], lambda line: None)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        lecture.run(tmp_path / "file", ["dropout"], lambda line: None)


def test_a_plate_writes_what_it_draws(tmp_path: Path):
    plate = Plate(1, 2)
    plate.panel("one", "a", "b").line("dots", [1, 2], [0.1, 1 / 3], style="o")
    other = plate.panel("two", "a", "b")
    other.surface("hill", np.array([0.0, 1.0]), np.array([5.0, 6.0]), np.array([[1.0, 2.0], [3.0, 4.0]]), [1, 2, 3, 4])
    other.spread("seeds", [7], np.array([[1.0, 3.0]]))
    assert plate.save(tmp_path, "name", "What it shows.") == "What it shows."
    assert (tmp_path / "name.csv").read_text().splitlines() == [
        "panel,series,x,y,value",
        *("one,dots,1,0.1,", "one,dots,2,0.3333333333,"),
        *("two,hill,0,5,1", "two,hill,1,5,2", "two,hill,0,6,3", "two,hill,1,6,4"),
        *("two,seeds,7,1,", "two,seeds,7,3,"),
    ]
