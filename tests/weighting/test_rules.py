"""Rules by name: their options, what the README says of them, and trainings with everything else switched on."""

import csv
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from mtl.build import build_balancer, build_tasks
from mtl.cli import main
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.weighting.fixed import Fixed
from mtl.weighting.rules import RULES, make_rule, options_of

README = (Path(__file__).parents[2] / "README.md").read_text()
INFO = DataInfo("test", ("segmentation", "depth", "normals"), ("wall", "floor"))


@pytest.mark.parametrize("name", RULES)
def test_the_readme_tells_each_rule_s_options_and_defaults(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| [^|]* \| ([^|]*)\|$", README, re.MULTILINE)
    said = dict(word.split("=") for word in re.findall(r"[\w]+=[\w.+]+", row))
    options = {} if name == "fixed" else options_of(RULES[name])
    assert said.keys() == options.keys()
    for option, parameter in options.items():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert str(parameter.default) in (said[option], said[option] + ".0")


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("cagrad", {"d": 1}, ["'cagrad'", "no 'd'", "c, rescale"]),
        ("equal", {"c": 1}, ["'equal'", "no 'c'", "has none"]),
        ("cagrad", {"c": "much"}, ["c=much", "'cagrad'", "number"]),
        ("mgda", {"normalizer": "l3"}, ["normalizer=l3", "'none', 'l2', 'loss' or 'loss+'"]),
        ("stch", {"warmup": 1.5}, ["warmup=1.5", "integer"]),
        ("dwa", {"temperature": 0}, ["temperature=0"]),
        ("fixed", {"weights": 1}, ["--loss-weights"]),
    ],
)
def test_a_wrong_option_is_a_sentence(rule: str, options: dict, said: list[str]) -> None:
    experiment = validate({"weighting": rule, "weighting_options": options})
    with pytest.raises(UserError) as error:
        build_balancer(experiment, build_tasks(experiment, INFO))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in ["--weighting-options", *said])


def test_options_take_effect_in_the_type_that_the_rule_wants() -> None:
    likelihoods = {"a": "gaussian", "b": "laplace"}
    assert make_rule("cagrad", likelihoods, {"c": 1}).c == 1.0
    assert make_rule("mgda", likelihoods, {"normalizer": "loss+"}).normalizer == "loss+"
    assert make_rule("random", likelihoods, {}, seed=7).seed == 7


@pytest.mark.parametrize(("given", "read"), [("3", "3"), ("fast", "fast"), ("0.5", "0.5")])
def test_a_rule_that_wants_words_gets_digits_as_one(given: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moded(Fixed):
        def __init__(self, tasks: Mapping[str, str], mode: str = "", other: str | None = None) -> None:
            super().__init__(tasks, {})
            self.modes = mode, other

    monkeypatch.setitem(RULES, "moded", Moded)
    options = validate({"weighting_options": {"mode": given, "other": given}}).weighting_options
    rule = make_rule("moded", {"a": "gaussian"}, options)
    assert isinstance(rule, Moded) and rule.modes == (read, read)


RUNS = {
    "gradients": "--weighting mgda --weighting-options normalizer=l2 --accumulate 2 --clip 1 --precision bf16-mixed",
    "parameters": "--weighting pcgrad --weighting-on parameters --weighting-every 2 --ema 0.9 --optimizer sgd",
    "losses": "--weighting famo --head-weighting own --clip 0.1 --freeze-stages 1 --precision bf16-true",
    "learned": "--weighting uncertainty --clip 0.1 --unfreeze-at 1 --freeze --ema 0.9",
}


@pytest.mark.parametrize("kind", RUNS)
def test_trains_with_everything_else(kind: str, tiny: list[str], tmp_path: Path) -> None:
    words = ["--task", "segmentation", "depth", "normals", "--epochs", "2", "--name", "run", *RUNS[kind].split()]
    assert main(["train", *tiny, *words, "--batch-size", "2"], program="train.py") == 0
    run = tmp_path / "runs" / "run"
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert (run / "weighting.png").exists()
    recorded = [row for row in rows if row["train/loss"]]
    assert all(float(row["train/weight/depth"]) > 0 for row in recorded)
    cosines = [row["train/cosine/segmentation-depth"] for row in recorded if row["train/cosine/segmentation-depth"]]
    assert cosines and all(-1 <= float(cosine) <= 1 for cosine in cosines)
    assert main(["evaluate", str(run)], program="mtl") == 0
