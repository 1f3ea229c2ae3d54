"""Users' own code: the examples of the README, and files that are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

import mtl
from mtl import registry
from mtl.cli import main
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.plugins import check_task, load_plugins
from mtl.tasks.depth import Depth, DepthOptions
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation, SegmentationOptions

EXAMPLES = Path(__file__).parent / "examples"
EDGES, STRIPES = str(EXAMPLES / "edges.py"), str(EXAMPLES / "stripes.py")


@pytest.fixture(autouse=True)
def _forget() -> None:
    registry.clear()


def run(*words: str) -> int:
    return main(list(words))


class TestExamples:
    def test_a_task_of_one_s_own_trains_is_measured_and_predicts(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--plugin", EDGES, "--task", "edges", "depth", "--max-steps", "30", "--name", "run", "--lr", "0.01"]
        assert run("train", *words, *tiny) == 0
        said = capsys.readouterr().out
        assert "edges/f1" in said and f"--plugin {EDGES}" in said, "what to try next needs the plugin too"
        folder = tmp_path / "runs" / "run"
        assert yaml.safe_load((folder / "config.yaml").read_text())["needs_plugins"] == [EDGES]
        report = tmp_path / "metrics.json"
        assert run("evaluate", str(folder), "--plugin", EDGES, "--json", str(report)) == 0
        assert 0 < json.loads(report.read_text())["edges/f1"] <= 1
        predictor = mtl.load(folder, plugins=[EDGES])
        prediction = predictor.predict(torch.rand(3, 40, 50))
        assert prediction["edges"].shape == (40, 50) and prediction["depth"].shape == (1, 40, 50)

    def test_edges_are_where_classes_change(self) -> None:
        """Independent of pooling: compare every pixel with its eight neighbours by hand."""
        load_plugins([Path(EDGES)])
        edges_of = sys.modules["mtl_plugin_edges"].edges_of
        classes = torch.randint(0, 3, (1, 7, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        edge, known = edges_of(classes)
        for row in range(7):
            for column in range(9):
                patch = classes[0, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                assert bool(edge[0, row, column]) == (len(patch.unique()) > 1)
        assert known.all() and not edges_of(torch.full_like(classes, 255))[1].any()

    def test_a_data_set_and_a_rule_of_one_s_own_learn(self, tmp_path: Path) -> None:
        words = ["--plugin", STRIPES, "--data.name", "stripes", "--weighting", "inverse", "--data.size", "32", "32"]
        words += ["--init", "none", "--max-steps", "40", "--batch-size", "8", "--lr", "0.01", "--logger", "csv"]
        words += ["--decoder-channels", "16", "--output-dir", str(tmp_path), "--name", "run"]
        assert run("train", *words) == 0
        report = tmp_path / "metrics.json"
        assert run("evaluate", str(tmp_path / "run"), "--plugin", STRIPES, "--json", str(report)) == 0
        measured = json.loads(report.read_text())
        assert measured["segmentation/miou"] > 0.6 and measured["depth/abs_rel"] < 0.3
        assert "train/weight/depth" in (tmp_path / "run" / "metrics.csv").read_text()

    def test_the_rule_s_gradient_is_that_of_the_sum_of_logs(self) -> None:
        load_plugins([Path(STRIPES)])
        rule = registry.weightings["inverse"](["a", "b"])
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        losses = {"a": x[0] ** 2, "b": x[1] ** 3}
        weights = rule(losses)
        (gradient,) = torch.autograd.grad(sum(weights[t] * losses[t] for t in losses), x)
        expected = torch.tensor([2 / 2.0, 3 / 3.0])  # d/dx (2 ln x0 + 3 ln x1)
        assert torch.allclose(gradient, expected)


class TestOnlyFromAPerson:
    def test_a_run_says_which_plugin_it_needs_and_never_reads_it(
        self, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("train", "--plugin", EDGES, "--task", "edges", "--max-steps", "1", "--name", "run", *tiny) == 0
        folder = tmp_path / "runs" / "run"
        capsys.readouterr()
        for words in (["evaluate", str(folder)], ["train", "--resume", str(folder)], ["export", str(folder)]):
            assert run(*words) == 2
            said = capsys.readouterr().err
            assert "edges.py" in said and "--plugin" in said and said.count("\n") == 1

    @pytest.mark.parametrize("line", ["plugin: [evil.py]", "plugins: evil.py", "plugin: evil.py"])
    def test_a_yaml_cannot_name_code(self, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
        (tmp_path / "config.yaml").write_text(f"{line}\n")
        assert run("train", "--config", str(tmp_path / "config.yaml")) == 2
        assert "unknown field" in capsys.readouterr().err and not (tmp_path / "harm").exists()


WRONG = [
    ("def broken(:\n", ["line 1", "SyntaxError"]),
    ("import mtl\nraise ValueError('not today')\n", ["line 2", "ValueError", "not today"]),
    ("import nowhere_to_be_found\n", ["line 1", "nowhere_to_be_found"]),
    ("x = 1\n", ["adds nothing", "register_task"]),
    ("import mtl\n@mtl.register_task\nclass A(mtl.Task):\n    name = 'a'\n", ["'a'", "lacks", "loss", "metrics"]),
    ("import mtl\n@mtl.register_task\nclass A:\n    name = 'a'\n", ["'a'", "subclass", "Task"]),
    ("import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'depth'\n", ["'depth'", "already"]),
    ("import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'a b'\n", ["'a b'", "letters"]),
    (
        "import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'a'\n    target = 'dept'\n",
        ["'dept'", "'depth'"],
    ),
    ("import mtl\nmtl.register_data_set('mine')(3)\n", ["'mine'", "int"]),
    ("import mtl\n@mtl.register_weighting('mine')\nclass R(mtl.Weighting):\n    pass\n", ["'mine'", "forward"]),
]


@pytest.mark.parametrize(("code", "said"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_in_a_sentence(code: str, said: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(code)
    with pytest.raises(UserError) as error:
        load_plugins([file])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ["wrong.py", *said])


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--plugin", str(tmp_path / "none.py")) == 2
    assert "none.py" in capsys.readouterr().err


CHANGES = [
    ("def loss(self, outputs, batch):\n        return outputs.mean()", ["loss", "where nothing is labelled"]),
    ("def loss(self, outputs, batch):\n        return 0.0", ["loss", "scalar tensor"]),
    ("def loss(self, outputs, batch):\n        return batch['nothing']", ["loss", "KeyError"]),
    ("def predict(self, outputs):\n        return outputs.nothing", ["predict", "AttributeError"]),
    ("def initial_bias(self):\n        return torch.zeros(3)", ["initial_bias", "(1,)"]),
    ("def metrics(self):\n        return {}", ["metrics", "torchmetrics"]),
    ("def pictures(self, prediction, target):\n        return {'a': mtl.Panel(prediction)}", ["pictures"]),
]


@pytest.mark.parametrize(("method", "said"), CHANGES, ids=[said[0] for _, said in CHANGES])
def test_a_task_that_breaks_its_contract_is_refused_before_training(
    method: str, said: list[str], tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = method.split("(")[0].removeprefix("def ")
    code = (EXAMPLES / "edges.py").read_text()
    file = tmp_path / "mine.py"
    file.write_text(code.replace(f"def {name}(self", f"{method}\n\n    def old_{name}(self"))
    if name == "metrics":
        file.write_text(file.read_text())
    assert run("train", "--plugin", str(file), "--task", "edges", *tiny) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in ["mine.py", "'edges'", *said])
    assert not (tmp_path / "runs").exists()


def test_the_package_s_own_tasks_pass_the_check() -> None:
    info = DataInfo("data", ("segmentation", "depth", "normals"), ("a", "b", "c"))
    for task in (Segmentation(SegmentationOptions(), info), Depth(DepthOptions(), info), Normals(info)):
        check_task(task)


def test_the_public_names_are_there_and_the_command_line_stays_light() -> None:
    assert all(getattr(mtl, name) is not None for name in mtl.__all__)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = mtl.nothing_here
    code = "import sys, mtl, mtl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_s_own_loop() -> None:
    """The README's example for those who have a loop of their own: from names of the package to a falling loss."""
    backbone = mtl.Backbone("resnet10t", size=(64, 64))
    task = mtl.Normals(mtl.DataInfo("mine", targets=("normals",)))
    model = mtl.MultiTaskModel(backbone, {task.name: mtl.Head(backbone, "unet", task.channels, width=16)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    image = torch.rand(2, 3, 64, 64)
    up = functional.one_hot(torch.ones(2, 64, 64, dtype=torch.long), 3).permute(0, 3, 1, 2)
    batch = {"normals": -up.float()}
    losses = []
    for _ in range(20):
        loss = task.loss(model(image)[task.name], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
