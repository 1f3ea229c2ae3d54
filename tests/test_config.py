from pathlib import Path

import pytest

from mtl.config import DECODERS, Experiment, changed, dump, load, validate
from mtl.errors import UserError

# Sweeps, which W&B's agent reads, hold flags and not fields.
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
CONFIGS = [path for path in CONFIGS if not path.name.startswith("sweep")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    experiment = load(path)
    assert validate(__import__("yaml").safe_load(dump(experiment))) == experiment


def test_scenes_is_the_default() -> None:
    assert load(next(path for path in CONFIGS if path.name == "scenes.yaml")) == Experiment()


def test_a_dumped_experiment_names_every_field(tmp_path: Path) -> None:
    experiment = changed(Experiment(), {"lr": 0.02, "data": {"size": (48, 64)}})
    path = tmp_path / "config.yaml"
    path.write_text(dump(experiment))
    assert load(path) == experiment
    assert experiment.data.size == (48, 64) and experiment.data.domain == Experiment().data.domain
    assert all(f"{field}:" in dump(experiment) for field in Experiment.model_fields)


REFUSED = [
    ({"epoch": 3}, ["'epoch'", "'epochs'"]),
    ({"task": "dept"}, ["'dept'", "'depth'", "segmentation"]),
    ({"task": ["depth", "depth"]}, ["twice"]),
    ({"task": []}, ["at least one"]),
    ({"lr": -1}, ["--lr", "-1", "greater than 0"]),
    ({"lr": float("nan")}, ["--lr", "nan"]),
    ({"lr": "fast"}, ["--lr", "'fast'", "number"]),
    ({"epochs": 0}, ["--epochs", "0"]),
    ({"batch_size": 0}, ["--batch-size"]),
    ({"max_steps": -5}, ["--max-steps", "-5"]),
    ({"dropout": 1.5}, ["--dropout", "1.5", "less than 1"]),
    ({"ema": 1.0}, ["--ema"]),
    ({"optimizer": "adaw"}, ["'adaw'", "'adamw'"]),
    ({"optimizer": "adamw", "momentum": 0.9}, ["--momentum", "sgd"]),
    ({"decoder": "unett"}, ["'unett'", "'unet'", *DECODERS]),
    ({"precision": "16-mixed", "device": "cpu"}, ["16-mixed", "bf16-mixed"]),
    ({"loss_weights": {"depth": 0}}, ["--loss-weights", "depth=0", "positive"]),
    ({"loss_weights": {"normals": 1}}, ["'normals'", "segmentation, depth"]),
    ({"loss_weights": {"depth": True}}, ["--loss-weights: depth=True must be a number"]),
    ({"loss_weights": {"depth": float("inf")}}, ["--loss-weights", "finite"]),
    ({"weighting_every": True}, ["--weighting-every: True is not a number"]),
    ({"epochs": True}, ["--epochs: True"]),
    ({"ema": False}, ["--ema: False"]),
    ({"data": {"size": [True, 64]}}, ["--data.size: [True, 64]"]),
    ({"data": {"labels": {"depth": True}}}, ["--data.labels: depth=True"]),
    ({"more_data": [{"train_samples": True}]}, ["more_data.0.train_samples: True"]),
    ({"weighting_options": 3}, ["--weighting-options is 3", "dictionary"]),
    ({"data": {"nam": "scenes"}}, ["'data.nam'", "'name'"]),
    ({"data": {"name": "foldr"}}, ["'foldr'", "'folder'"]),
    ({"data": {"name": "folder"}}, ["--data.root"]),
    ({"data": {"root": "x"}}, ["--data.root", "folder"]),
    ({"data": {"labels": {"depth": 0}}}, ["depth=0", "at least 1"]),
    ({"task": "segmentation", "data": {"labels": {"depth": 5}}}, ["'depth'", "segmentation"]),
    ({"data": {"size": (8, 64)}}, ["--data.size", "16"]),
    ({"data": 3}, ["--data", "3"]),
    ({"depth": {"min_depth": 2, "max_depth": 1}}, ["max_depth", "min_depth"]),
    ({"segmentation": {"loss": "dice", "label_smoothing": 0.1}}, ["label_smoothing", "dice"]),
    ({"name": "a/b"}, ["--name", "'a/b'"]),
    ({"freeze": True, "freeze_stages": 1}, ["--freeze", "--freeze-stages"]),
    ({"unfreeze_at": 1}, ["--unfreeze-at", "--freeze"]),
    ({"freeze": True, "unfreeze_at": 6, "epochs": 6}, ["--unfreeze-at 6", "--epochs 6"]),
    ({"freeze": True, "backbone_lr": 0.1}, ["--backbone-lr", "--freeze"]),
    ({"freeze": True, "layer_decay": 0.7}, ["--layer-decay", "--freeze"]),
    ({"layer_decay": 1.5}, ["--layer-decay", "1.5"]),
    ({"lora": 4, "freeze": True}, ["--lora", "--freeze"]),
    ({"lora": 4, "layer_decay": 0.7}, ["--lora", "--layer-decay"]),
    ({"lora": 0}, ["--lora", "0"]),
    ({"weighting": "fixd"}, ["'fixd'", "'fixed'"]),
    ({"data": {"name": "nyuv2"}}, ["--data.root"]),
    ({"data": {"name": "nyuv2", "root": "x", "classes": 12}}, ["--data.classes 12", "13 or 40"]),
    ({"data": {"name": "cityscapes", "root": "x", "classes": 13}}, ["--data.classes 13", "19 or 7"]),
    ({"data": {"classes": 13}}, ["--data.classes 13", "its own"]),
    ({"data": {"raw_depth": True}}, ["--data.raw-depth", "nyuv2"]),
    ({"data": {"targets": ["dept"]}}, ["'dept'", "'depth'"]),
    ({"data": {"targets": []}}, ["targets", "at least one"]),
    ({"data": {"ratio": 1}, "more_data": [{}]}, ["--data.ratio", "all of them"]),
    ({"more_data": [{"name": "scnes"}]}, ["more_data.0.name", "'scnes'", "'scenes'"]),
    ({"more_data": [{"size": [32, 32]}]}, ["more_data.0.size", "unknown"]),
    ({"more_data": {"name": "scenes"}}, ["more_data"]),
    ({"needs_plugins": ["my_task.py"], "task": "edges"}, ["my_task.py", "--plugin"]),
]


@pytest.mark.parametrize(("values", "fragments"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused_is_named(values: dict, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate(values, "some.yaml: ")
    message = str(caught.value)
    assert message.startswith("some.yaml: ")
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message and "http" not in message


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "nan", "-inf", "1e999", None, [1], {"a": 1}, True])
def test_an_option_of_a_rule_is_a_finite_number_or_a_word(given: object) -> None:
    with pytest.raises(UserError) as caught:
        validate({"weighting": "dwa", "weighting_options": {"temperature": given}})
    shown = "inf" if given == "1e999" else given
    assert str(caught.value) == f"--weighting-options: temperature={shown} must be a finite number or a word"


def test_numbers_and_words_of_rules_are_told_apart() -> None:
    given = {"a": "2", "b": "0.5", "c": "l2", "d": 3, "e": 0.25, "f": "1e-3"}
    read = validate({"weighting_options": given}).weighting_options
    assert read == {"a": 2, "b": 0.5, "c": "l2", "d": 3, "e": 0.25, "f": 1e-3}
    assert [type(value) for value in read.values()] == [int, float, str, int, float, float]


def test_a_truth_value_stays_one_where_one_is_wanted() -> None:
    assert validate({"freeze": True}).freeze and not validate({"channels_last": False}).channels_last


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("task: [depth", "line"), ("- depth", "list"), ("a: b: c", "line 1")],
)
def test_yaml_that_is_none(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        load(path)
    assert fragment in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        load(Path("nowhere.yaml"))
