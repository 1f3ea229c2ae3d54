"""Several runs, passes or weights as one, on the command line: against what their members' outputs come to by hand."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from mtl.build import Surroundings, keep_samples, load_samples, make_loader, make_trainer
from mtl.cli import main
from mtl.data.loading import Key
from mtl.data.sample import Batch, as_floats
from mtl.ensembling.bagging import bootstrap
from mtl.runs import load_run
from mtl.training.module import MultiTaskModule

QUIET = Surroundings(say=lambda line: None)


def flags(root: Path) -> list[str]:
    """Return flags of a training of a few steps."""
    words = ["--data.size", "32", "32", "--data.train-samples", "12", "--data.val-samples", "6", "--batch-size", "4"]
    words += ["--data.cache-dir", str(root), "--decoder-channels", "16", "--logger", "csv", "--output-dir", str(root)]
    return [*words, "--max-steps", "6", "--validate-every", "6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Return the folders of two bagged runs of segmentation and depth that differ in their seeds."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--seeds", "2", "--name", "run", "--bootstrap", "--dropout", "0.3", "--snapshots", "2"]
    words += ["--monitor", "depth/abs_rel"]
    assert main(["train", *words, *flags(root)]) == 0
    yield [root / "run-seed0", root / "run-seed1"]


@pytest.fixture(scope="module")
def depth_run(runs: list[Path]) -> Path:
    """Return a run of depth alone, without dropout and bootstrap."""
    words = ["--task", "depth", "--name", "depth", "--dropout", "0"]
    assert main(["train", *words, *flags(runs[0].parent)]) == 0
    return runs[0].parent / "depth"


def measured(words: list[str], file: Path) -> dict[str, float]:
    assert main(["evaluate", *words, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def every(module: MultiTaskModule, split: str) -> Batch:
    """Return all samples of a split in one batch."""
    samples = load_samples(module.options, split, QUIET)  # type: ignore[arg-type]
    return as_floats(samples.__getitems__([Key(row, 0, row) for row in range(len(samples))]))


@torch.no_grad()
def answers(modules: list[MultiTaskModule], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the members' logits (M, B, C, H, W), probabilities, and depths (M, B, 1, H, W)."""
    outputs = [module.model(batch["image"]) for module in modules]
    logits = torch.stack([each["segmentation"] for each in outputs])
    depths = torch.stack([m.tasks["depth"].predict(o["depth"]) for m, o in zip(modules, outputs, strict=True)])
    return logits, logits.softmax(2), depths


class TestEvaluate:
    @pytest.mark.parametrize("kind", ["mean", "median", "logits", "vote"])
    def test_is_what_the_members_outputs_come_to_by_hand(self, kind: str, runs: list[Path], tmp_path: Path) -> None:
        found = measured([*map(str, runs), "--combine", kind], tmp_path / "m.json")
        modules = [load_run(run, {"device": "cpu"}) for run in runs]
        batch = every(modules[0], "validation")
        logits, probabilities, depths = answers(modules, batch)
        # Of two members the median is the mean, and a vote that is no draw has both of one opinion.
        classes = (logits.mean(0) if kind == "logits" else probabilities.mean(0)).argmax(1)
        if kind == "vote":
            one, other = probabilities.argmax(2)
            scores = probabilities.mean(0)
            chosen = scores.gather(1, torch.stack([one, other], 1)).argmax(1)
            classes = torch.where(chosen == 0, one, other)
        outputs = [module.model(batch["image"])["depth"] for module in modules]
        task = modules[0].tasks["depth"]
        depth = task.predict(torch.stack(outputs).mean(0)) if kind == "logits" else depths.mean(0)
        for name, prediction, target in (("segmentation", classes, "segmentation"), ("depth", depth, "depth")):
            metric = modules[0].tasks[name].metrics()
            metric.update(prediction.detach(), batch[target])
            for key, value in metric.compute().items():
                if value.isfinite():
                    assert found[f"{name}/{key}"] == pytest.approx(float(value), rel=1e-4), key

    def test_a_run_and_its_copy_are_the_run(self, runs: list[Path], tmp_path: Path) -> None:
        shutil.copytree(runs[0], tmp_path / "copy")
        alone = measured([str(runs[0])], tmp_path / "a.json")
        assert measured([str(runs[0]), str(tmp_path / "copy")], tmp_path / "b.json") == pytest.approx(alone, rel=1e-5)

    def test_mc_dropout_is_the_same_each_time(self, runs: list[Path], tmp_path: Path) -> None:
        words = [str(runs[0]), "--mc-dropout", "3"]
        first, second = (measured(words, tmp_path / f"{n}.json") for n in (1, 2))
        assert first == second != measured([str(runs[0])], tmp_path / "plain.json")

    def test_snapshots_are_members(self, runs: list[Path], tmp_path: Path) -> None:
        found = measured([str(runs[0]), "--snapshots"], tmp_path / "m.json")
        for number, path in enumerate(sorted(runs[0].glob("snapshot-*.ckpt"))):
            shutil.copytree(runs[0], folder := tmp_path / f"{number}")
            shutil.copy(path, folder / "best.ckpt")
        folders = [str(tmp_path / "0"), str(tmp_path / "1")]
        assert measured(folders, tmp_path / "two.json") == found

    def test_uncertainty_against_torchmetrics_and_by_hand(self, runs: list[Path], tmp_path: Path) -> None:
        words = [*map(str, runs), "--uncertainty", "--output-dir", str(tmp_path / "drawn")]
        found = measured(words, tmp_path / "m.json")
        modules = [load_run(run, {"device": "cpu"}) for run in runs]
        batch = every(modules[0], "validation")
        _, probabilities, depths = answers(modules, batch)
        judged, labels = probabilities.mean(0)[1::2], batch["segmentation"][1::2].long()
        temperature = found["segmentation/temperature"]
        for suffix, soft in (("", judged), ("_scaled", (judged.log() / temperature).softmax(1))):
            ece = multiclass_calibration_error(soft, labels, soft.shape[1], n_bins=15, norm="l1", ignore_index=255)
            assert found[f"segmentation/ece{suffix}"] == pytest.approx(float(ece), abs=1e-4)
        # It is the temperature that fits the other half, to which it was fitted, best.
        fitted, known = probabilities.mean(0)[::2].log(), batch["segmentation"][::2].long()
        loss = [
            float(torch.nn.functional.cross_entropy(fitted / (temperature * factor), known, ignore_index=255))
            for factor in (0.97, 1.0, 1.03)
        ]
        assert loss[1] == min(loss)
        valid = batch["depth"] > 1e-3
        spread, error = (depths[0] - depths[1]).abs() / 2, (depths.mean(0) - batch["depth"]).abs()
        share = (error <= 0.67449 * spread)[valid].float().mean()
        assert found["depth/coverage_50"] == pytest.approx(float(share), abs=2e-3)
        assert np.isfinite(found["depth/ause_abs_rel"])
        for name in ("reliability", "sparsification", "coverage"):
            assert np.asarray(Image.open(tmp_path / "drawn" / f"{name}.png")).std() > 10

    def test_views_have_an_uncertainty_too(self, runs: list[Path], tmp_path: Path) -> None:
        words = [str(runs[0]), "--tta", "--uncertainty", "--output-dir", str(tmp_path)]
        found = measured(words, tmp_path / "m.json")
        plain = measured([str(runs[0]), "--tta"], tmp_path / "plain.json")
        assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-5)
        assert "depth/ause_abs_rel" in found


class TestBagging:
    def test_training_draws_what_the_bootstrap_has_drawn(self, runs: list[Path]) -> None:
        options = load_run(runs[1], {"device": "cpu"}).options
        samples = load_samples(options, "train", QUIET)
        keep_samples(options, [samples], QUIET)
        loader = make_loader(samples, options, make_trainer(options, logger=False), training=True)
        drawn = Counter(key.row for batch in loader.batch_sampler for key in batch)
        assert drawn == Counter(bootstrap(12, 1).tolist())

    def test_out_of_bag_by_hand(self, runs: list[Path], tmp_path: Path) -> None:
        found = measured([*map(str, runs), "--split", "out-of-bag"], tmp_path / "m.json")
        modules = [load_run(run, {"device": "cpu"}) for run in runs]
        batch = every(modules[0], "train")
        _, _, depths = answers(modules, batch)
        metric = modules[0].tasks["depth"].metrics()
        for row in range(12):
            judges = [member for member in (0, 1) if row not in bootstrap(12, member)]
            if judges:
                metric.update(depths[judges, row].mean(0, keepdim=True), batch["depth"][row : row + 1])
        expected = {f"depth/{key}": float(value) for key, value in metric.compute().items()}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)

    def test_a_soup_has_no_bag(self, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["soup", *map(str, runs), "--name", "soup", "--output-dir", str(tmp_path)]
        assert main(words) == 0
        assert main(["evaluate", str(tmp_path / "soup"), "--split", "out-of-bag"]) == 2
        assert "is a soup" in capsys.readouterr().err
        # Nor is there anything to go on with.
        assert main(words) == 2
        assert "--resume" not in capsys.readouterr().err

    def test_out_of_bag_in_the_precision_asked_for(self, runs: list[Path], tmp_path: Path) -> None:
        words = [str(runs[0]), "--split", "out-of-bag"]
        exact = measured(words, tmp_path / "a.json")
        half = measured([*words, "--precision", "bf16-mixed"], tmp_path / "b.json")
        assert half != exact and half == pytest.approx(exact, rel=0.05, abs=0.05)


class TestPredict:
    def picture(self, folder: Path) -> Path:
        array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "photo.png")
        return folder / "photo.png"

    def test_several_runs_and_how_far_they_disagree(self, runs: list[Path], tmp_path: Path) -> None:
        picture = self.picture(tmp_path)
        words = [str(runs[0]), str(picture), "--output-dir", str(tmp_path / "out")]
        assert main(["predict", *words, "--with", str(runs[1])]) == 0
        modules = [load_run(run, {"device": "cpu"}) for run in runs]
        image = torch.from_numpy(np.asarray(Image.open(picture)) / np.float32(255)).permute(2, 0, 1)[None]
        _, probabilities, depths = answers(modules, {"image": image})
        stored = np.asarray(Image.open(tmp_path / "out" / "depth" / "photo.png")) / 1000
        assert np.abs(stored - depths.mean(0)[0, 0].numpy()).max() <= 0.0005 + 1e-5
        spread = np.load(tmp_path / "out" / "depth-uncertainty" / "photo.npy")
        assert spread == pytest.approx(depths.std(0, correction=0)[0, 0].numpy(), abs=1e-5)
        mean = probabilities.mean(0)[0]
        entropy = np.load(tmp_path / "out" / "segmentation-uncertainty" / "photo.npy")
        assert entropy == pytest.approx(-(mean * mean.log()).sum(0).numpy(), abs=1e-4)
        wide = Image.open(tmp_path / "out" / "photo.png").size
        assert main(["predict", *words]) == 0
        assert not list((tmp_path / "out" / "depth-uncertainty").iterdir()), "of a prediction that is replaced"
        assert Image.open(tmp_path / "out" / "photo.png").size != wide

    def test_mc_dropout_writes_the_same_maps_each_time(self, runs: list[Path], tmp_path: Path) -> None:
        picture, maps = self.picture(tmp_path), []
        for name in ("a", "b"):
            words = [str(runs[0]), str(picture), "--mc-dropout", "16", "--output-dir", str(tmp_path / name)]
            assert main(["predict", *words, "--combine", "median"]) == 0
            maps.append(np.load(tmp_path / name / "depth-uncertainty" / "photo.npy"))
        assert (maps[0] == maps[1]).all() and (maps[0] > 0).any()


class TestSoup:
    def test_uniform_is_the_mean_of_the_weights_and_a_run(self, runs: list[Path], tmp_path: Path) -> None:
        words = [*map(str, runs), "--name", "soup", "--output-dir", str(tmp_path)]
        assert main(["soup", *words]) == 0
        one, other, soup = (
            torch.load(run / "best.ckpt", weights_only=True)["state_dict"] for run in (*runs, tmp_path / "soup")
        )
        weights = [name for name in one if name.endswith(("weight", "bias"))]
        assert all(torch.allclose(soup[name], (one[name] + other[name]) / 2, atol=1e-6) for name in weights)
        assert measured([str(tmp_path / "soup")], tmp_path / "m.json").keys() >= {"gain"}
        assert main(["soup", *words]) == 2, "it exists"

    def test_greedy_is_no_worse_than_its_best_run_on_validation(
        self, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [*map(str, runs), "--kind", "greedy", "--name", "soup", "--output-dir", str(tmp_path)]
        assert main(["soup", *words]) == 0
        assert "validation" in capsys.readouterr().out
        alone = [measured([str(run)], tmp_path / "m.json")["depth/abs_rel"] for run in runs]
        assert measured([str(tmp_path / "soup")], tmp_path / "m.json")["depth/abs_rel"] <= min(alone) + 1e-6
        about = json.loads((tmp_path / "soup" / "soup.json").read_text())
        assert about["scores"] == pytest.approx(dict(zip(map(str, runs), alone, strict=True)), rel=1e-5)


REFUSED = [
    (["evaluate"], ["run's folder"]),
    (["evaluate", "{0}", "{1}", "--combine", "meen"], ["'meen'", "'mean'"]),
    (["evaluate", "{0}", "--combine", "mean"], ["--combine", "single run"]),
    (["evaluate", "{0}", "{0}"], ["twice"]),
    (["evaluate", "{0}", "nowhere"], ["nowhere", "run's folder"]),
    (["evaluate", "{0}", "{depth}"], ["same tasks"]),
    (["evaluate", "{0}", "--mc-dropout", "0"], ["--mc-dropout 0"]),
    (["evaluate", "{0}", "{1}", "--mc-dropout", "3"], ["--mc-dropout", "other runs"]),
    (["evaluate", "{depth}", "--mc-dropout", "3"], ["dropout", "--dropout 0.1"]),
    (["evaluate", "{depth}", "--snapshots"], ["--snapshots"]),
    (["evaluate", "{0}", "--tta", "--combine", "logits"], ["logits", "--tta"]),
    (["evaluate", "{depth}", "--tta", "--combine", "vote"], ["vote", "'depth'"]),
    (["evaluate", "{depth}", "--uncertainty"], ["--uncertainty", "--mc-dropout"]),
    (["evaluate", "{0}", "--output-dir", "x"], ["--output-dir", "--uncertainty"]),
    (["evaluate", "{depth}", "--split", "out-of-bag"], ["--bootstrap"]),
    (["evaluate", "{0}", "--split", "out-of-bag", "--data.train-samples", "5"], ["training samples"]),
    (["evaluate", "{0}", "--split", "out-of-bag", "--devices", "2"], ["--devices 2"]),
    (["train", "--seeds", "2", "--name", "a", "--resume", "{0}"], ["--resume", "--seeds"]),
    (["predict", "{0}", "a.png", "--with", "nowhere"], ["nowhere", "run's folder"]),
    (["predict", "{0}", "a.png", "--with", "{0}"], ["twice"]),
    (["predict", "{0}", "a.png", "--wiht", "{1}"], ["--wiht", "--with"]),
    (["train", "--seeds", "1", "--name", "a"], ["--seeds 1"]),
    (["train", "--seeds", "3"], ["--seeds 3", "--name"]),
    (["soup", "{0}"], ["two"]),
    (["soup", "{0}", "{0}", "--name", "a"], ["twice"]),
    (["soup", "{0}", "{1}"], ["--name"]),
    (["soup", "{0}", "{1}", "--name", "a", "--kind", "gredy"], ["'gredy'", "'greedy'"]),
    (["soup", "{0}", "{depth}", "--name", "a"], ["task"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: " ".join(value)[:50])
def test_bad_input_gets_one_sentence(
    words: list[str], said: list[str], runs: list[Path], depth_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(runs[0].parent.rglob("*"))
    capsys.readouterr()
    assert main([word.format(*runs, depth=depth_run) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    assert all(part in error for part in said), error
    assert sorted(runs[0].parent.rglob("*")) == before
