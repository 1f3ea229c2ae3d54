"""Files of predictions, read back by Pillow and by the `folder` data set."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from mtl.build import build_module
from mtl.config import validate
from mtl.data.folder import Folder
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.prediction.files import find_images, predict_files
from mtl.prediction.predictor import Predictor

CLASSES = ("wall", "floor", "où")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    fields = {"init": "none", "decoder_channels": 16, "data": {"size": (32, 48)}}
    info = DataInfo("test", ("segmentation", "depth"), CLASSES)
    return Predictor(build_module(validate(fields), info, total_steps=0))


def write(path: Path, size: tuple[int, int] = (50, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Return everything below a folder, with the files' contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


class TestFindImages:
    def test_folders_globs_and_files(self, tmp_path: Path) -> None:
        for name in ("a10.png", "a2.JPG", "a1.png", ".hidden.png", "in/b.png", "odd[1].png"):
            write(tmp_path / name)
        (tmp_path / "notes.txt").write_text("")
        (tmp_path / "folder.png").mkdir()
        names = lambda *words: [p.name for p in find_images([str(tmp_path / w) for w in words])]  # noqa: E731
        assert names(".") == ["a1.png", "a2.JPG", "a10.png", "odd[1].png"]
        assert names("*.png") == ["a1.png", "a10.png", "odd[1].png"]
        assert names("**/*.png") == ["a1.png", "a10.png", "in/b.png".split("/")[1], "odd[1].png"]
        assert names("odd[1].png", "a10.png", "a*") == ["odd[1].png", "a10.png", "a1.png", "a2.JPG"], "each once"
        assert names("notes.txt") == ["notes.txt"], "named, it is for reading it to fail"

    @pytest.mark.parametrize(
        ("word", "words"),
        [
            ("nowhere", "nowhere does not exist"),
            ("empty", "holds no image"),
            ("*.gif", r"no image matches '.*\*.gif'"),
        ],
    )
    def test_a_word_for_nothing_is_a_sentence(self, word: str, words: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        write(tmp_path / "a.png")
        with pytest.raises(UserError, match=words):
            find_images([str(tmp_path / "a.png"), str(tmp_path / word)])

    @pytest.mark.parametrize("word", ["", "  "])
    def test_an_empty_word_is_not_this_folder(self, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.png")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=f"^{word!r} names no image: name one"):
            find_images([word])


class TestPredictFiles:
    def test_writes_what_was_predicted(self, predictor: Predictor, tmp_path: Path) -> None:
        shapes = {"plain": (50, 40), "portrait": (20, 90), "panorama": (300, 20), "tiny": (2, 3), "thin": (300, 1)}
        images = [write(tmp_path / "in" / f"{name}.png", size) for name, size in shapes.items()]
        out, said = tmp_path / "new" / "out", []
        result = predict_files(predictor, images, out, said.append)
        assert not result.failures and list(result.pages) == images
        assert "5 of 5" in said[-1] and str(out) in said[-1]
        for image in images:
            expected = predictor.predict(image)
            with Image.open(out / "segmentation" / image.name) as stored:
                assert (np.array(stored) == expected["segmentation"].numpy()).all()
            with Image.open(out / "depth" / image.name) as stored:
                assert np.abs(np.array(stored) / 1000 - expected["depth"][0].numpy()).max() < 0.00051
            with Image.open(result.pages[image]) as page:
                assert 300 < max(page.size) < 2000 and 0.4 < page.width / page.height < 5
        hidden = [p.name for p in out.rglob("*") if p.name.startswith(".")]
        assert hidden == [".predicted.jsonl"], "no temporary file is left"

    def test_they_are_labels_for_the_folder_data_set(self, predictor: Predictor, tmp_path: Path) -> None:
        images = [write(tmp_path / f"{name}.png") for name in "abc"]
        out = tmp_path / "out"
        predict_files(predictor, images, out, lambda line: None)
        assert yaml.safe_load((out / "dataset.yaml").read_text(encoding="utf-8")) == {"classes": list(CLASSES)}
        (out / "images").mkdir()
        for image in images:
            (out / "images" / image.name).write_bytes(image.read_bytes())
        source = Folder(out, split="all", size=(40, 50))
        assert source.info.targets == ("segmentation", "depth") and source.info.classes == CLASSES
        (sample,) = source.read([1], source.info.targets)
        expected = predictor.predict(images[1])
        assert (sample["segmentation"] == expected["segmentation"].numpy()).all()
        assert np.abs(sample["depth"] - expected["depth"][0].numpy()).max() < 0.00051
        with pytest.raises(UserError, match="labels would be overwritten"):
            predict_files(predictor, images, out, lambda line: None)

    def test_images_that_cannot_be_read_are_named_and_the_others_done(
        self, predictor: Predictor, tmp_path: Path
    ) -> None:
        images = [tmp_path / "broken.jpg", write(tmp_path / "good.png"), tmp_path / "deep.png"]
        images[0].write_bytes(b"\xff\xd8\xff not a picture")
        Image.new("I;16", (4, 4)).save(images[2])
        said: list[str] = []
        result = predict_files(predictor, images, tmp_path / "out", said.append)
        assert list(result.pages) == [images[1]] and list(result.failures) == [images[0], images[2]]
        reasons = list(result.failures.values())
        assert [line for line in said if line in reasons] == reasons, "each is said, and once"
        for image, reason in result.failures.items():
            assert str(image) in reason and str(image) in result.complaint and reason not in result.complaint
        assert "2 of 3" in result.complaint and "\n" not in result.complaint
        assert {p.name for p in (tmp_path / "out" / "depth").iterdir()} == {"good.png"}

    def test_equal_stems_get_names_of_their_own(self, predictor: Predictor, tmp_path: Path) -> None:
        names = ["a/x.png", "b/x.png", "b/X.jpg", "c/x-2.png"]
        said: list[str] = []
        result = predict_files(predictor, [write(tmp_path / n) for n in names], tmp_path / "out", said.append)
        assert [page.name for page in result.pages.values()] == ["x.png", "x-3.png", "X-4.png", "x-2.png"]
        assert any("b/x.png is written as x-3" in line and "a/x.png" in line for line in said)
        assert len(list((tmp_path / "out" / "depth").iterdir())) == 4

    def test_an_earlier_prediction_is_replaced_with_all_its_files(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image, other, out = write(tmp_path / "a.png"), write(tmp_path / "a.b.png"), tmp_path / "out"
        depth = predictor.tasks[1]
        with monkeypatch.context() as far:
            far.setattr(depth, "predict", lambda outputs: torch.full_like(outputs, 200.0))
            predict_files(predictor, [image, other], out, lambda line: None)
        unit = json.loads((out / "depth" / "a.json").read_text())["metres_per_unit"]
        assert abs(np.array(Image.open(out / "depth" / "a.png")) * unit - 200).max() < unit
        predict_files(predictor, [image], out, lambda line: None)
        assert {p.name for p in (out / "depth").iterdir()} == {"a.png", "a.b.png", "a.b.json"}
        expected = predictor.predict(image)["depth"][0].numpy()
        assert np.abs(np.array(Image.open(out / "depth" / "a.png")) / 1000 - expected).max() < 0.00051
        lines = (out / ".predicted.jsonl").read_text().count("\n")
        predict_files(predictor, [image], out, lambda line: None)
        assert (out / ".predicted.jsonl").read_text().count("\n") == lines, "what is the same is noted once"

    @pytest.mark.parametrize(
        "name",
        ["depth/a.npy", "depth/a.png", "depth/a.json", "segmentation/a_left.png", "depth/other.png", "a.png"],
    )
    def test_what_no_prediction_wrote_stays(self, predictor: Predictor, name: str, tmp_path: Path) -> None:
        image, out = write(tmp_path / "a.png"), tmp_path / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"mine")
        before = snapshot(out)
        with pytest.raises(UserError, match=rf"^--output-dir [^\n]*out holds [^\n]*{name}, which is not[^\n]*away$"):
            predict_files(predictor, [image], out, lambda line: None)
        assert snapshot(out) == before

    def test_somebodys_description_stays(self, predictor: Predictor, tmp_path: Path) -> None:
        image, out = write(tmp_path / "a.png"), tmp_path / "out"
        out.mkdir()
        (out / "dataset.yaml").write_text("classes: [wall, floor, où]\ndepth_scale: 0.001\n", encoding="utf-8")
        before = snapshot(out)
        with pytest.raises(UserError, match=r"out holds [^\n]*dataset\.yaml, which is not"):
            predict_files(predictor, [image], out, lambda line: None)
        assert snapshot(out) == before
        (out / "dataset.yaml").write_text("classes: [wall, floor, où]\n", encoding="utf-8")
        predict_files(predictor, [image], out, lambda line: None)  # it would be written just so
        assert (out / "a.png").is_file()

    @pytest.mark.parametrize("name", ["a.png", "depth/a.png", "segmentation/a.png", "dataset.yaml"])
    def test_what_was_corrected_after_a_prediction_stays(self, predictor: Predictor, name: str, tmp_path: Path) -> None:
        image, other, out = write(tmp_path / "a.png"), write(tmp_path / "b.png"), tmp_path / "out"
        predict_files(predictor, [image], out, lambda line: None)
        (out / name).write_bytes(b"corrected by hand")
        before = snapshot(out)
        with pytest.raises(UserError, match=rf"holds [^\n]*{name}, which is not, or no longer, what"):
            predict_files(predictor, [image], out, lambda line: None)
        assert snapshot(out) == before
        if name != "dataset.yaml":
            predict_files(predictor, [other], out, lambda line: None)
            assert snapshot(out).items() >= {k: v for k, v in before.items() if k.name != ".predicted.jsonl"}.items()

    def test_a_prediction_that_was_stopped_starts_again(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever it stopped: the disk may have been full in the middle of a line, or between two files."""
        import mtl.prediction.files as module

        image, out = write(tmp_path / "a.png"), tmp_path / "out"
        write_whole = module.write_whole

        def full(path: Path, content: bytes) -> None:
            if path.parent.name == "segmentation":
                raise OSError(28, "No space left on device", str(path))
            write_whole(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_whole", full)
            with pytest.raises(UserError, match=r"segmentation/a.png cannot be written \(No space left"):
                predict_files(predictor, [image], out, lambda line: None)
        assert (out / "a.png").is_file() and not (out / "segmentation" / "a.png").exists()
        with (out / ".predicted.jsonl").open("a") as record:
            record.write('{"name": "b", "files": {"b.pn')
        for _ in range(2):
            assert not predict_files(predictor, [image], out, lambda line: None).failures
        assert all(line[:1] == "{" for line in (out / ".predicted.jsonl").read_text().splitlines())
        predict_files(predictor, [image, write(tmp_path / "b.png")], out, lambda line: None)
        predict_files(predictor, [tmp_path / "b.png"], out, lambda line: None)

    def test_a_picture_of_too_many_pixels_is_said_to_be_so(self, predictor: Predictor, tmp_path: Path) -> None:
        image = tmp_path / "huge.png"
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        image.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")
        (reason,) = predict_files(predictor, [image], tmp_path / "out", lambda line: None).failures.values()
        assert reason.startswith(f"{image} has more than 179 million pixels") and "truncated" not in reason

    def test_where_it_must_not_write_is_a_sentence(self, predictor: Predictor, tmp_path: Path) -> None:
        image = write(tmp_path / "in" / "depth" / "a.png")
        (tmp_path / "file").write_text("")
        before = sorted(tmp_path.rglob("*"))
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match="is a file; choose another folder"):
                predict_files(predictor, [image], out, print)
        for out in (tmp_path / "in" / "depth", tmp_path / "in"):
            with pytest.raises(UserError, match=r"holds .*a.png, which is to be predicted"):
                predict_files(predictor, [image], out, print)
        assert sorted(tmp_path.rglob("*")) == before

    def test_pages_show_the_prediction_in_its_colours(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The legend names the classes that occur, and the page's pixels have their colours."""
        from mtl.tasks.colours import class_colours

        seen: dict[str, Any] = {}
        import mtl.prediction.files as module

        draw = module.draw_predictions

        def spy(path: Path, panels: Any, classes: Any, present: Any) -> None:
            seen.update(panels=panels, classes=classes, present=list(present))
            draw(path, panels, classes, present)

        def halves(outputs: Tensor) -> Tensor:
            classes = torch.zeros(outputs.shape[0], *outputs.shape[2:], dtype=torch.int64)
            classes[..., outputs.shape[3] // 2 :] = 2
            return classes

        monkeypatch.setattr(module, "draw_predictions", spy)
        monkeypatch.setattr(predictor.tasks[0], "predict", halves)
        result = predict_files(predictor, [write(tmp_path / "a.png", (1500, 1000))], tmp_path / "out", print)
        assert seen["present"] == [0, 2] and seen["classes"] == CLASSES
        assert all(panel.images.shape == (1, 683, 1024, 3) for panel in seen["panels"].values())
        with Image.open(next(iter(result.pages.values()))) as page:
            counts = {tuple(colour[:3]): count for count, colour in page.convert("RGB").getcolors(2**24) or []}
        left, absent, right = (counts.get(tuple(map(int, colour)), 0) for colour in class_colours(3))
        assert left > 10_000 and right > 10_000 and abs(left - right) < 0.05 * left and absent < 500
