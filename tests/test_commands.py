"""What comes before and after training, on the command line as a person uses it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtl
from mtl.cli import main
from mtl.data.folder import Folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a run of all three tasks."""
    root = tmp_path_factory.mktemp("trained")
    words = ["--task", "segmentation", "depth", "normals", "--data.size", "32", "48", "--data.train-samples", "16"]
    words += ["--data.val-samples", "4", "--data.cache-dir", str(root), "--batch-size", "4", "--decoder-channels", "16"]
    words += ["--max-steps", "3", "--logger", "csv", "--output-dir", str(root), "--name", "run"]
    assert main(["train", *words]) == 0
    yield root / "run"


def photographs(folder: Path) -> list[Path]:
    """Write pictures of several sizes and formats."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for name, size in (("tall.png", (90, 40)), ("wide.jpg", (33, 200)), ("tiny.bmp", (5, 9))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
        paths.append(folder / name)
    return paths


class TestTestTimeAugmentation:
    def test_evaluate_and_predict_average_views(self, trained: Path, tmp_path: Path) -> None:
        for tta in ([], ["--tta"], ["--tta", "full"]):
            file = tmp_path / f"{len(tta)}.json"
            assert main(["evaluate", str(trained), *tta, "--json", str(file)]) == 0
        measured = [json.loads((tmp_path / f"{n}.json").read_text())["depth/abs_rel"] for n in (0, 1, 2)]
        assert len(set(measured)) > 1 and max(measured) < 2 * min(measured)
        picture = photographs(tmp_path / "photos")[0]
        assert main(["predict", str(trained), str(picture), "--tta", "--output-dir", str(tmp_path / "out")]) == 0
        averaged = mtl.load(trained, device="cpu", tta=True).predict(picture)
        single = mtl.load(trained, device="cpu").predict(picture)
        assert not torch.equal(averaged["depth"], single["depth"])
        assert torch.allclose(averaged["normals"].norm(dim=0), torch.ones(90, 40), atol=1e-4)


class TestPredict:
    def test_writes_pages_and_labels_of_each_picture_at_its_own_size(self, trained: Path, tmp_path: Path) -> None:
        pictures = photographs(tmp_path / "photos")
        out = tmp_path / "out"
        words = [str(tmp_path / "photos"), "--output-dir", str(out)]
        assert main(["predict", str(trained), *words]) == 0
        for path in pictures:
            size = Image.open(path).size
            for kind in ("segmentation", "depth", "normals"):
                assert Image.open(out / kind / f"{path.stem}.png").size == size
            assert np.asarray(Image.open(out / f"{path.stem}.png")).std() > 10
        (tmp_path / "photos").rename(out / "images")
        folder = Folder(out, split="all", size=(32, 48))
        assert folder.info.targets == ("segmentation", "depth", "normals") and len(folder) == 3
        sample = folder.read([0], ["segmentation", "depth"])[0]
        assert (sample["depth"] > 0).all() and sample["segmentation"].max() < len(folder.info.classes)

    def test_python_and_the_command_agree(self, trained: Path, tmp_path: Path) -> None:
        picture = photographs(tmp_path / "photos")[0]
        assert main(["predict", str(trained), str(picture), "--output-dir", str(tmp_path / "out")]) == 0
        predictions = mtl.load(trained, device="cpu").predict(picture)
        stored = np.asarray(Image.open(tmp_path / "out" / "depth" / "tall.png")) / 1000
        assert np.abs(stored - predictions["depth"][0].numpy()).max() <= 0.0005 + 1e-6
        classes = np.asarray(Image.open(tmp_path / "out" / "segmentation" / "tall.png"))
        assert (classes == predictions["segmentation"].numpy()).all()

    def test_what_cannot_be_read_is_named_and_the_others_are_done(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures = photographs(tmp_path / "photos")
        pictures[1].write_bytes(pictures[1].read_bytes()[:300])
        out = tmp_path / "out"
        assert main(["predict", str(trained), str(tmp_path / "photos" / "*"), "--output-dir", str(out)]) == 2
        said = capsys.readouterr().err
        assert "wide.jpg" in said and said.count("\n") == 1
        assert (out / "tall.png").exists() and (out / "tiny.png").exists() and not (out / "wide.png").exists()

    def test_one_run_s_backbone_predicts_at_native_scale_too(self, trained: Path, tmp_path: Path) -> None:
        picture = photographs(tmp_path / "photos")[1]
        words = ["--scale", "native", "--overlap", "0.5", "--output-dir", str(tmp_path / "out")]
        assert main(["predict", str(trained), str(picture), *words]) == 0
        assert (tmp_path / "out" / "wide.png").exists()


def test_preview_draws_samples_before_any_training(tmp_path: Path, tiny: list[str]) -> None:
    file = tmp_path / "preview.png"
    words = ["--task", "segmentation", "depth", "normals", "--augment", "light", "--output", str(file)]
    assert main(["preview", *words, "--count", "3", *tiny]) == 0
    assert np.asarray(Image.open(file)).std() > 10
    assert not (tmp_path / "runs").exists()


def test_export_writes_a_program_that_answers_as_the_run_does(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--format", "torch", "--output-dir", str(tmp_path)]) == 0
    assert "largest difference" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "model.pt2").module()
    image = torch.rand(2, 3, 32, 48)
    expected = mtl.load(trained, device="cpu").module(image)
    answers = program(image)
    assert torch.allclose(answers["depth"], expected["depth"], atol=1e-5)
    assert torch.allclose(answers["normals"], expected["normals"], atol=1e-5)


REFUSED = [
    (["predict"], ["run's folder"]),
    (["predict", "{run}"], ["pictures", "{run}"]),
    (["predict", "{run}", "nowhere.jpg"], ["nowhere.jpg"]),
    (["predict", "nowhere", "a.jpg"], ["nowhere", "run's folder"]),
    (["predict", "{run}", "*.nothing"], ["*.nothing"]),
    (["predict", "{run}", "a.jpg", "--scale", "fitt"], ["'fitt'", "'fit'"]),
    (["predict", "{run}", "a.jpg", "--overlap", "1"], ["--overlap"]),
    (["predict", "{run}", "a.jpg", "--batch-size", "0"], ["--batch-size"]),
    (["predict", "{run}", "a.jpg", "--device", "cpx"], ["'cpx'", "'cpu'"]),
    (["export"], ["run's folder"]),
    (["export", "{run}", "--format", "onx"], ["'onx'", "'onnx'"]),
    (["export", "{run}", "--size", "8", "8"], ["--size", "16"]),
    (["preview", "--output", "a.jpg"], ["--output", ".png"]),
    (["preview", "--output", "nowhere/a.png"], ["--output", "folder"]),
    (["preview", "--count", "0"], ["--count"]),
    (["evaluate", "{run}", "--tta", "flp"], ["'flp'", "'flip'"]),
    (["evaluate", "{run}", "--split", "tset"], ["'tset'", "'test'"]),
    (["evaluate", "{run}", "--split", "test"], ["--split test", "'scenes'"]),
    (["study", "backbone"], ["'backbone'", "'backbones'"]),
    (["study", "backbones", "--decoders", "unett"], ["'unett'", "'unet'"]),
    (["study", "backbones", "--names", "resnet_18"], ["'resnet_18'", "'resnet18'"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_bad_input_gets_one_sentence(
    words: list[str], said: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.rglob("*"))
    assert main([word.format(run=trained) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert all(part.format(run=trained) in error for part in said), error
    assert sorted(trained.rglob("*")) == before
