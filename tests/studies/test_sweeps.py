"""The sweep files give the program, through W&B's own agent's words, flags that it takes."""

import itertools
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from mtl.cli import main
from mtl.config import validate
from mtl.studies.tasks import RULES

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs").glob("sweep*.yaml"))


def commands(sweep: dict) -> list[tuple[dict, list[str]]]:
    """Return each point of the grid, and the command line that W&B's agent makes of it."""
    names, values = zip(*((name, each["values"]) for name, each in sweep["parameters"].items()), strict=True)
    found = []
    for point in itertools.product(*values):
        arguments = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        known = {**create_sweep_command_args({"args": arguments}), "env": [], "program": [sweep["program"]]}
        words = [
            word
            for part in sweep["command"]
            for word in (known[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part])
        ]
        found.append((dict(zip(names, point, strict=True)), words))
    return found


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_the_grid_is_a_command_line_of_the_program(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] == "grid"
    points = commands(sweep)
    for point, words in points:
        assert words[:2] == ["python", "train.py"]
        assert main(["train", *words[2:], "--print-config"], program="train.py") == 0
        experiment = validate(yaml.safe_load(capsys.readouterr().out))
        assert experiment.seed == point["seed"]
        if "weighting" in point:
            assert experiment.weighting == point["weighting"]
        if "task" in point:
            assert experiment.task == [point["task"]]
        if "loss-weights" in point:
            name, _, weight = point["loss-weights"].partition("=")
            assert experiment.loss_weights == {name: float(weight)}
    assert len(points) == len({str(point) for point, _ in points}) > 5


def test_the_sweep_has_the_rules_of_the_study() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    assert tuple(sweep["parameters"]["weighting"]["values"]) == RULES
