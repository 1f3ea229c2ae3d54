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
from mtl.data.caching import Fingerprinted
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.plugin_checks import check_task, check_weighting, open_data_set, weigh
from mtl.plugins import load_plugins
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
        rule = registry.weightings["inverse"]({"a": "gaussian", "b": "gaussian"})
        x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        losses = x ** torch.tensor([2.0, 3.0])
        weights = rule(step(losses.detach()))
        (gradient,) = torch.autograd.grad((weights * losses).sum(), x)
        expected = torch.tensor([2 / 2.0, 3 / 3.0], dtype=torch.float64)  # d/dx (2 ln x0 + 3 ln x1)
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
    ("import sys\nsys.exit(0)\n", ["line 2", "SystemExit: 0"]),
    ("import sys\n\nsys.exit('enough')\n", ["line 3", "SystemExit: enough"]),
    *(
        (f"import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = {name!r}\n", [repr(name), "ModuleDict"])
        for name in ("train", "keys", "training", "float", "_modules")
    ),
    ("import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 3\n", ["3", "letters"]),
    (
        "import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'a'\n    target = ['depth']\n",
        ["['depth']", "segmentation, depth, normals"],
    ),
    (
        "import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'a'\n    higher_is_better = ['abs_rel']\n",
        ["'a'", "['abs_rel']", "dictionary"],
    ),
    (
        "import mtl\n@mtl.register_task\nclass A(mtl.Depth):\n    name = 'a'\n    main_metric = ['abs_rel']\n",
        ["'a'", "['abs_rel']", "higher_is_better lacks"],
    ),
]


@pytest.mark.parametrize(("code", "said"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_in_a_sentence(code: str, said: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(code)
    with pytest.raises(UserError) as error:
        load_plugins([file])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ["wrong.py", *said])


def test_leaving_is_no_success_and_a_relative_path_has_lines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quiet.py").write_text("import sys\nsys.exit()\n")
    assert run("train", "--plugin", "quiet.py") == 2
    assert capsys.readouterr().err == "error: quiet.py, line 2: running it raised SystemExit\n"


def test_ctrl_c_in_a_plugin_is_the_person_s(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugins([file])


@pytest.mark.parametrize(
    "words",
    [
        ["--plugin", EDGES, STRIPES],
        ["--plugin", EDGES, "--plugin", STRIPES],
        [f"--plugin={EDGES}", f"--plugin={STRIPES}"],
        ["--plugin", EDGES, "--lr", "0.1", "--plugin", STRIPES],
    ],
)
def test_plugins_add_up(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--task", "edges", "--data.name", "stripes", "--weighting", "inverse", "--print-config"]
    assert run("train", *words, *wanted) == 0
    assert yaml.safe_load(capsys.readouterr().out)["needs_plugins"] == [EDGES, STRIPES]


def test_two_configurations_are_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("task: [depth]\n")
    words = ["--config", str(tmp_path / "a.yaml"), "--lr", "0.1", f"--config={tmp_path / 'b.yaml'}"]
    assert run("train", *words, "--print-config") == 2
    said = capsys.readouterr().err
    assert "--config" in said and "a.yaml" in said and "b.yaml" in said and said.count("\n") == 1


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--plugin", str(tmp_path / "none.py")) == 2
    assert "none.py" in capsys.readouterr().err


CHANGES = [
    ("def loss(self, outputs, batch):\n        return outputs.mean()", ["loss", "where nothing is labelled"]),
    ("def loss(self, outputs, batch):\n        return 0.0", ["loss", "scalar tensor"]),
    ("def loss(self, outputs, batch):\n        return batch['nothing']", ["loss", "KeyError"]),
    ("def predict(self, outputs):\n        return outputs.nothing", ["predict", "AttributeError"]),
    ("def initial_bias(self):\n        return torch.zeros(3)", ["initial_bias", "(1,)"]),
    ("def initial_bias(self):\n        return torch.tensor([float('nan')])", ["initial_bias", "nan", "finite"]),
    ("def initial_bias(self):\n        return 0.5", ["initial_bias", "tensor"]),
    ("def remaining_error(self, metrics):\n        return None", ["remaining_error", "None", "finite"]),
    ("def remaining_error(self, metrics):\n        return float('nan')", ["remaining_error", "nan", "finite"]),
    ("def remaining_error(self, metrics):\n        return -metrics['f1']", ["remaining_error", "0 or more"]),
    ("def loss(self, outputs, batch):\n        import sys\n        sys.exit()", ["loss", "SystemExit"]),
    ("def metrics(self):\n        return {}", ["metrics", "torchmetrics"]),
    ("def pictures(self, prediction, target):\n        return {'a': mtl.Panel(prediction)}", ["pictures"]),
]


@pytest.mark.parametrize(("method", "said"), CHANGES, ids=range(len(CHANGES)))
def test_a_task_that_breaks_its_contract_is_refused_before_training(
    method: str, said: list[str], tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = method.split("(")[0].removeprefix("def ")
    code = (EXAMPLES / "edges.py").read_text()
    file = tmp_path / "mine.py"
    file.write_text(code.replace(f"def {name}(self", f"{method}\n\n    def old_{name}(self"))
    assert run("train", "--plugin", str(file), "--task", "edges", *tiny) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in ["mine.py", "'edges'", *said])
    assert not (tmp_path / "runs").exists()


ON_REAL_BATCHES = [
    # Only batches of training are of 32 x 32 pixels.
    ("        edge, known = edges_of(batch", "loss of the task 'edges'"),
    ("        return outputs[:, 0].float().sigmoid()", "predict of the task 'edges'"),
    ("        edge, known = edges_of(target)\n        found", "metrics' update of the task 'edges'"),
    ("        right, wrong, missed", "metrics' compute of the task 'edges'"),
]


@pytest.mark.parametrize(("place", "said"), ON_REAL_BATCHES, ids=["loss", "predict", "update", "compute"])
def test_what_only_a_real_batch_raises_is_said_in_a_sentence(
    place: str, said: str, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = (EXAMPLES / "edges.py").read_text()
    assert code.count(place) == 1
    real = {"loss": "outputs.shape[-1] == 32", "predict": "outputs.shape[-1] == 32", "update": "target.shape[-1] == 32"}
    condition = real.get(said.removeprefix("metrics' ").split()[0], "self.counts.sum() > 2 * 2 * 16 * 24")
    file = tmp_path / "mine.py"
    file.write_text(code.replace(place, f"        if {condition}:\n            [][0]\n{place}"))
    line = file.read_text().splitlines().index("            [][0]") + 1
    assert run("train", "--plugin", str(file), "--task", "edges", "--max-steps", "2", *tiny) == 2
    expected = f"{file}, line {line}: {said} raised IndexError: list index out of range"
    assert f"error: {expected}\n" == capsys.readouterr().err


def step(losses: torch.Tensor) -> mtl.Step:
    return mtl.Step(losses, torch.arange(len(losses)), torch.zeros(0, 0, dtype=torch.float64))


def rule(body: str, tmp_path: Path, *, before: str = "") -> mtl.Weighting:
    """Return a plugin's rule for the tasks 'a' and 'b', of the lines of its forward."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    file = tmp_path / "rules.py"
    file.write_text(
        "import torch\nimport mtl\n\n@mtl.register_weighting('mine')\nclass Rule(mtl.Weighting):\n"
        f"{before}    def forward(self, step):\n{lines}"
    )
    load_plugins([file])
    return registry.weightings["mine"]({"a": "gaussian", "b": "laplace"})


RULES = [
    ("return None", ["NoneType", "tensor of 2 weights"]),
    ("return [1.0, 1.0]", ["a list", "tensor of 2 weights"]),
    ("return torch.tensor(1.0)", ["()", "2 floats"]),
    ("return torch.ones(3)", ["(3,)", "2 floats"]),
    ("return torch.ones(2)", ["where 'a' has no labels", "(2,)", "1 floats"]),
    ("return torch.ones(len(step.losses), dtype=torch.int64)", ["int64", "floats"]),
    ("return -step.losses", ["'a'", "-1.0", "0 or more"]),
    ("return step.losses * float('nan')", ["'a'", "nan", "finite"]),
    ("return step.losses * float('inf')", ["'a'", "inf", "finite"]),
    ("return 0 * step.losses", ["every task", "the weight 0"]),
    ("return step.losses['nothing']", ["line 7", "IndexError"]),
    ("raise SystemExit", ["line 7", "SystemExit"]),
]


@pytest.mark.parametrize(("body", "said"), RULES, ids=range(len(RULES)))
def test_a_rule_that_breaks_its_contract_is_refused(body: str, said: list[str], tmp_path: Path) -> None:
    made = rule(body, tmp_path)
    with pytest.raises(UserError) as error:
        check_weighting(made, ["a", "b"])
    assert "\n" not in str(error.value) and str(error.value).count("rules.py") == 1
    assert all(part in str(error.value) for part in ["'mine'", *said])


LEARNT = """\
    def __init__(self, tasks):
        super().__init__(tasks)
        self.logits = torch.nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("calls", torch.zeros(()))

"""
OBJECTIVE = """\
    def objective(self, step):
        return (self.logits[step.present].softmax(0) * step.losses).sum()

"""


def test_a_rule_that_learns_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    body = "self.calls += 1\nreturn self.logits[step.present].softmax(0)"
    made = rule(body, tmp_path, before=LEARNT + OBJECTIVE)
    check_weighting(made, ["a", "b"])
    assert made.calls == 0 and not made.logits.any() and made.logits.grad is None
    weights = weigh(made, step(torch.tensor([1.0, 2.0])), 0)
    assert weights.tolist() == [0.5, 0.5] and made.calls == 1 and not weights.requires_grad


BROKEN = [
    (
        "    def objective(self, step):\n        raise ValueError('no')\n\n",
        "",
        ["objective", "ValueError: no"],
    ),
    ("    def objective(self, step):\n        return step.losses\n\n", "", ["objective", "finite scalar"]),
    ("    def end_epoch(self):\n        raise ValueError('no')\n\n", "", ["line 7", "ValueError: no"]),
    ("    needs_second_forward = True\n\n", "", ["no look_again"]),
    ("", "self.n = getattr(self, 'n', 0) + 1\n", ["not in its state_dict", "buffers"]),
]


@pytest.mark.parametrize(("before", "body", "said"), BROKEN, ids=range(len(BROKEN)))
def test_whatever_a_rule_has_is_tried(before: str, body: str, said: list[str], tmp_path: Path) -> None:
    made = rule(body + "return step.losses + getattr(self, 'n', 0)", tmp_path, before=before)
    with pytest.raises(UserError) as error:
        check_weighting(made, ["a", "b"])
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in said)


def test_what_a_rule_does_to_the_losses_it_is_shown_stays_with_it(tmp_path: Path) -> None:
    made, shown = (
        rule("step.losses.zero_()\nstep.present.add_(7)\nreturn step.losses + 1", tmp_path),
        step(torch.ones(2)),
    )
    assert (
        weigh(made, shown, 0).tolist() == [1, 1]
        and shown.losses.tolist() == [1, 1]
        and shown.present.tolist() == [0, 1]
    )


def test_a_rule_with_parameters_and_nothing_to_learn_them_by_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mine' has parameters, and its objective must be a scalar that teaches"):
        check_weighting(rule("return self.logits[step.present].softmax(0)", tmp_path, before=LEARNT), ["a", "b"])


def test_a_zero_weight_is_allowed_and_a_negative_one_from_gradients(tmp_path: Path) -> None:
    check_weighting(rule("return step.losses * (step.present == len(step.present) - 1)", tmp_path), ["a"])
    body = "assert step.gram.shape == (len(step.losses),) * 2\nreturn 1.5 - step.losses * len(step.losses)"
    check_weighting(rule(body, tmp_path, before="    needs_gram = True\n\n"), ["a", "b"])


def test_a_wrong_rule_leaves_no_folder_and_a_late_one_says_its_step(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rule("return 1.0", tmp_path)
    words = ["--plugin", str(tmp_path / "rules.py"), "--weighting", "mine", "--task", "depth", "--max-steps", "9"]
    assert run("train", *words, *tiny) == 2
    assert "tensor of 1 weights" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    rule("return 0 * step.losses + 4.5 - 1.1 * self.asked", tmp_path)
    assert run("train", *words, *tiny) == 2
    said = capsys.readouterr().err
    assert "'mine' gives 'depth' the weight -1.0 at step 5" in said and said.count("\n") == 1


def test_the_package_s_own_tasks_pass_the_check() -> None:
    info = DataInfo("data", ("segmentation", "depth", "normals"), ("a", "b", "c"))
    for task in (Segmentation(SegmentationOptions(), info), Depth(DepthOptions(), info), Normals(info)):
        check_task(task)


def stripes(tmp_path: Path, place: str, change: str) -> Path:
    """Return a plugin with the example's data set, of which one line is another."""
    code = (EXAMPLES / "stripes.py").read_text()
    assert code.count(place) == 1
    file = tmp_path / "mine.py"
    file.write_text(code.replace(place, change))
    load_plugins([file])
    return file


READ = "return [self._one(self.first + index, set(targets)) for index in indices]"
GIVE = "return sample | {target: labels[target] for target in targets & labels.keys()}"
SOURCES = [
    (READ, "return [self._one(index, set(targets)) for index in indices][:3]", ["3 samples", "4 are asked"]),
    (READ, "return None", ["read of", "NoneType"]),
    (READ, "return [0 for _ in indices]", ["'image'"]),
    (GIVE, "return sample | ({'depth': labels['depth'][:-1]} if number == 2 else {})", ["'depth'", "'2'", "(31, 32)"]),
    (GIVE, "return sample | ({'depth': labels['depth'] * np.float64(1)} if number > 2 else {})", ["'3'", "float64"]),
    (GIVE, "return sample | {'depth': labels['depth'].tolist()}", ["'depth'", "a list", "array"]),
    (GIVE, "return sample | {'depth': labels['depth'] * np.float32('nan')}", ["'depth'", "not finite"]),
    (GIVE, "return sample | {'segmentation': labels['segmentation'] + np.uint8(1)}", ["class 2", "there are 2"]),
    (GIVE, "return sample | {'intrinsics': np.eye(3)}", ["'intrinsics'", "float64 (3, 3)", "float32 (3, 3)"]),
    (GIVE, "return sample | {'deph': labels['depth']}", ["'deph'", "depth, normals"]),
    (GIVE, "return sample | {'depth': labels['dept']}", ["line 37", "KeyError: 'dept'"]),
    (GIVE, "return sample if number < 3 else exit()", ["line 37", "read of", "SystemExit"]),
    (
        "return np.full(len(self), target in self.info.targets)",
        "return [True] * 16",
        ["labelled", "boolean array of 16"],
    ),
    ("return 16", "return 0", ["no sample"]),
    ('return f"{self.first + index}"', "return nothing", ["line 23: name of", "NameError"]),
]


@pytest.mark.parametrize(("place", "change", "said"), SOURCES, ids=range(len(SOURCES)))
def test_every_sample_of_a_data_set_is_checked(place: str, change: str, said: list[str], tmp_path: Path) -> None:
    stripes(tmp_path, place, change)
    with pytest.raises(UserError) as error:
        source = open_data_set("stripes", None, "train", (32, 32))
        source.name(0)
        source.read([0, 1, 2, 3], ["depth", "segmentation"])
    assert "\n" not in str(error.value) and str(error.value).count("mine.py") == 1
    assert all(part in str(error.value) for part in ["'stripes'", *said])


def test_a_right_data_set_answers_as_it_would_unchecked() -> None:
    """Except that it is not asked for what it does not have."""
    load_plugins([Path(STRIPES)])
    checked = open_data_set("stripes", None, "train", (32, 32))
    plain = registry.data_sets["stripes"](None, split="train", size=(32, 32))
    assert checked.info == plain.info and len(checked) == 16 and checked.name(3) == "3"
    assert checked.labelled("depth").all() and not checked.labelled("normals").any()
    samples = checked.read([5, 1], ["depth", "normals"]), plain.read([5, 1], ["depth"])
    for ours, theirs in zip(*samples, strict=True):
        assert ours.keys() == {"image", "depth"}
        assert all((ours[key] == theirs[key]).all() for key in theirs)
    assert isinstance(checked, Fingerprinted) and checked.fingerprint() is None


def test_a_data_set_keeps_its_samples_and_its_fingerprint(tmp_path: Path) -> None:
    code = (
        "if not hasattr(self, 'kept'):\n            self.kept = self._one(0, set(targets))\n"
        "        return [self.kept for _ in indices]\n\n    def fingerprint(self):\n        return 'v1'"
    )
    stripes(tmp_path, READ, code)
    source = open_data_set("stripes", None, "train", (32, 32))
    del source.read([0], ["depth"])[0]["depth"]
    assert "depth" in source.read([0], ["depth"])[0]
    known = [open_data_set("stripes", None, "train", size).fingerprint() for size in ((32, 32), (32, 32), (32, 64))]
    assert known[0] == known[1] != known[2], "of another size they are other samples"


def test_a_split_that_is_not_there_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--plugin", STRIPES, "--data.name", "stripes", "--data.size", "32", "32", "--init", "none"]
    words += ["--max-steps", "1", "--batch-size", "4", "--decoder-channels", "16", "--logger", "csv"]
    assert run("train", *words, "--output-dir", str(tmp_path), "--name", "run") == 0
    capsys.readouterr()
    assert run("evaluate", str(tmp_path / "run"), "--plugin", STRIPES, "--split", "test") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --split test: the data set 'stripes' seems to have no test split")
    assert "stripes.py, line 17" in said and "KeyError: 'test'" in said and said.count("\n") == 1


@pytest.mark.parametrize("raised", ["KeyError(split)", "ValueError(split)", "mtl.UserError(split)"])
def test_however_a_data_set_refuses_a_split(raised: str, tmp_path: Path) -> None:
    stripes(
        tmp_path,
        "        self.first, ",
        f"        if split == 'test':\n            raise {raised}\n        self.first, ",
    )
    with pytest.raises(UserError, match=r"^--split test: .*'stripes' seems to have no test split"):
        open_data_set("stripes", None, "test", (32, 32))


def test_other_errors_of_a_test_split_are_not_called_a_missing_split(tmp_path: Path) -> None:
    stripes(tmp_path, "        self.first, ", "        nothing\n        self.first, ")
    with pytest.raises(UserError, match="NameError") as error:
        open_data_set("stripes", None, "test", (32, 32))
    assert "--split" not in str(error.value)


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
