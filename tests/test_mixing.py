"""Several data sets in one run."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import picture_folder

from mtl.build import Surroundings, load_samples, make_loader, make_trainer
from mtl.cli import main
from mtl.config import Experiment, load

SMALL = {"batch_size": 4, "decoder_channels": 16, "init": "none", "logger": "csv"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write a configuration of a folder's depth (11 for training) and rendered segmentation (30)."""
    root = picture_folder(tmp_path / "pictures")
    file = tmp_path / "mixed.yaml"
    main_set = {"name": "folder", "root": str(root), "targets": ["depth"], "size": [32, 32]}
    more = {"name": "scenes", "targets": ["segmentation"], "train_samples": 30, "val_samples": 5}
    content = {**SMALL, "output_dir": str(tmp_path / "runs"), "name": "run", "data": main_set, "more_data": [more]}
    file.write_text(yaml.safe_dump(content))
    return file


def batches(experiment: Experiment, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    samples = load_samples(experiment, "train", Surroundings())
    trainer = make_trainer(experiment, logger=False)
    loader = make_loader(samples, experiment, trainer, training=True)
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_each_set_gives_its_own_label_and_one_model_learns_both(mixed: Path, tmp_path: Path) -> None:
    seen = batches(load(mixed))
    depth = torch.cat([(batch["depth"] > 0).flatten(1).any(1) for batch in seen])
    classes = torch.cat([(batch["segmentation"] != 255).flatten(1).any(1) for batch in seen])
    assert (depth ^ classes).all(), "every sample has one label, and no sample both"
    assert len(depth) == 40, "each of the 41 samples once, less the incomplete batch"
    assert main(["train", "--config", str(mixed), "--epochs", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "run" / "metrics.csv").open()))
    assert float(rows[-1]["depth/abs_rel"]) > 0 and float(rows[-1]["segmentation/miou"]) > 0
    assert main(["evaluate", str(tmp_path / "runs" / "run")]) == 0
    assert main(["train", "--resume", str(tmp_path / "runs" / "run"), "--epochs", "3"]) == 0


def test_evaluation_is_of_all_sets_or_of_the_one_that_is_named(mixed: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(mixed), "--max-steps", "2"]) == 0
    run = str(tmp_path / "runs" / "run")

    def measured(*words: str) -> dict[str, float]:
        assert main(["evaluate", run, *words, "--json", str(tmp_path / "m.json")]) == 0
        return json.loads((tmp_path / "m.json").read_text())

    both = measured()
    assert measured("--data.workers", "0", "--data.cache", "none") == both, "how samples are read is no other data"
    alone = measured("--data.name", "scenes", "--data.targets", "segmentation", "--data.val-samples", "5")
    assert "depth/abs_rel" not in alone and alone["segmentation/miou"] == both["segmentation/miou"]


def test_ratios_and_the_length_of_an_epoch(mixed: Path) -> None:
    values = yaml.safe_load(mixed.read_text())
    values["data"]["ratio"], values["more_data"][0]["ratio"], values["epoch_samples"] = 3, 1, 80
    mixed.write_text(yaml.safe_dump(values))
    seen = batches(load(mixed))
    depth = torch.cat([(batch["depth"] > 0).flatten(1).any(1) for batch in seen])
    assert (len(depth), int(depth.sum())) == (80, 60)


def test_class_lists_that_disagree_are_refused(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(mixed.read_text())
    values["data"]["targets"] = ["depth", "segmentation"]
    mixed.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(mixed)]) == 2
    said = capsys.readouterr().err
    assert "class" in said and "scenes" in said and "targets" in said and said.count("\n") == 1


def test_a_set_without_the_target_asked_of_it_is_refused(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(mixed.read_text())
    values["data"]["targets"] = ["normals"]
    mixed.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(mixed)]) == 2
    assert "normals" in capsys.readouterr().err
