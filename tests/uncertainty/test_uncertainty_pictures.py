"""Pictures: whole files that show what they are given, and maps whose colours are their numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.sample import DataInfo
from mtl.tasks.colours import number_colours
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation
from mtl.uncertainty.calibration import Reliability
from mtl.uncertainty.coverage import Coverage
from mtl.uncertainty.pictures import draw_coverage, draw_reliability, draw_sparsification, draw_uncertainty
from mtl.uncertainty.sparsification import Sparsification


def info(inverse: bool = False) -> DataInfo:
    return DataInfo("test", ("segmentation", "depth", "normals"), ("a", "b", "c"), inverse)


@pytest.mark.parametrize(
    ("task", "high", "unit"),
    [
        (Segmentation(SegmentationOptions(), info()), math.log(3), "nats"),
        (Depth(DepthOptions(), info()), 0.8, "m"),
        (Depth(DepthOptions(), info(inverse=True)), 0.8, ""),
        (Normals(info()), 0.8, "degrees"),
    ],
)
def test_maps_have_their_tasks_scale(task: Segmentation | Depth | Normals, high: float, unit: str) -> None:
    values = torch.tensor([[[0.0, 0.8], [0.4, 0.2]]])
    ((title, panel),) = draw_uncertainty(task, values).items()
    assert title == f"{task.name} uncertainty"
    assert panel.scale is not None
    assert (panel.scale.low, panel.scale.high, panel.scale.unit) == (0, pytest.approx(high), unit)
    expected = number_colours(values.numpy(), 0, panel.scale.high, panel.scale.colormap)
    assert panel.images.shape == (1, 2, 2, 3) and np.array_equal(panel.images, expected)


def test_what_is_no_number_does_not_spoil_the_scale() -> None:
    values = torch.tensor([[[math.nan, math.inf, 2.0]]])
    (panel,) = draw_uncertainty(Normals(info()), values).values()
    assert panel.scale is not None and panel.scale.high == 2


STEP = np.linspace(0, 1, 5)
HALF = np.array([math.nan, 0.5, 0.7])


@pytest.mark.parametrize("kind", ["reliability", "sparsification", "coverage"])
def test_curves_are_drawn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    path = tmp_path / "picture.png"
    if kind == "reliability":
        draw_reliability(path, {"run": Reliability(HALF, HALF / 2, np.array([0, 0.4, 0.6]))})
        expected = [(HALF[1:], HALF[1:] / 2)]
    elif kind == "sparsification":
        draw_sparsification(path, {"run": Sparsification(STEP, 1 - STEP / 2, 1 - STEP)}, "abs_rel")
        expected = [(STEP, 1 - STEP / 2), (STEP, 1 - STEP)]
    else:
        draw_coverage(path, {"run": Coverage(STEP, STEP**2)})
        expected = [(STEP, STEP**2)]
    lines = [line.get_xydata() for line in drawn[0].axes[0].lines]
    for x, y in expected:
        assert any(line.shape == (len(x), 2) and np.array_equal(line, np.stack([x, y], 1)) for line in lines)
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None and "run" in [text.get_text() for text in legend.get_texts()]
    with Image.open(path) as picture:
        assert np.unique(np.asarray(picture)).size > 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]
