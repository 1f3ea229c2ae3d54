from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

import mtl.figures
from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.sample import DataInfo
from mtl.tasks.base import Task
from mtl.tasks.depth import Depth
from mtl.tasks.segmentation import Segmentation
from mtl.training import pictures
from mtl.training.history import History

INFO = DataInfo("test", ("segmentation", "depth"), ("wall", "floor"))


def tasks() -> list[Task]:
    return [Segmentation(SegmentationOptions(), INFO), Depth(DepthOptions(), INFO)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that are drawn from here on; they are written all the same."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: (figures.append(figure), mtl.figures.save(figure, path)))
    return figures


def test_a_figure_is_whole_or_not_there(tmp_path: Path) -> None:
    mtl.figures.save(Figure(figsize=(2, 1)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (220, 110) and picture.format == "PNG"
    broken = Figure()
    broken.text(0.5, 0.5, "$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        mtl.figures.save(broken, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_curves_show_what_was_probed_beside_what_was_validated(tmp_path: Path, drawn: list[Figure]) -> None:
    history = History(tmp_path / "metrics.csv")
    history.log_metrics({"probe/depth/abs_rel": 0.5}, 0)
    history.log_metrics({"train/loss/depth": 2.0}, 10)
    history.log_metrics({"depth/abs_rel": 0.3, "probe/depth/abs_rel": 0.25}, 20)
    _, depth = tasks()
    pictures.draw_curves(tmp_path / "curves.png", history, [depth], {"depth/abs_rel": 0.6}, probed=tasks())
    # Segmentation, which has no row, has no picture.
    titles = ["training loss", "depth/abs_rel (lower is better)", "probe/depth/abs_rel (lower is better)"]
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == titles
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()} for axis in axes]
    assert lines[1]["held out"] == [[20, 0.3]] and lines[1]["constant prediction"] == [[0, 0.6], [1, 0.6]]
    assert lines[2] == {"linear probe": [[0, 0.5], [20, 0.25]], "before training": [[0, 0.5], [1, 0.5]]}
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_without_a_probe_are_those_of_the_tasks(tmp_path: Path, drawn: list[Figure]) -> None:
    history = History(tmp_path / "metrics.csv")
    history.log_metrics({"depth/abs_rel": 0.3, "segmentation/miou": 0.4, "train/loss/depth": 1.0}, 5)
    pictures.draw_curves(tmp_path / "curves.png", history, tasks(), {}, probed=tasks())
    assert [axis.get_title().split()[0] for axis in drawn[0].axes] == ["training", "segmentation/miou", "depth/abs_rel"]
