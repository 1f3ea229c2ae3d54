import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtl import exporting
from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.exporting import Exported, export
from mtl.models.backbone import Pyramid
from mtl.training.module import MultiTaskModule

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES = ("wall", "floor", "chair")
INFO = DataInfo("test", ("segmentation", "depth"), CLASSES)


def module(**fields) -> MultiTaskModule:
    """Return a small model whose normalisation layers have statistics and whose outputs vary over the image."""
    fields = {"init": "none", "decoder_channels": 16, "data": {"size": (64, 64)}} | fields
    made = build_module(validate(fields), INFO, total_steps=100)
    with torch.no_grad():
        for _ in range(3):
            made.model(torch.rand(4, 3, 64, 64) ** 2)
        for head in made.model.heads.values():
            head.output.weight.mul_(5)
    return made


def predictions(of: MultiTaskModule, image: Tensor) -> dict[str, np.ndarray]:
    of.eval()
    with torch.no_grad():
        return {task: answer.numpy() for task, answer in of(image).items()}


Answer = Callable[[Tensor], dict[str, np.ndarray]]


def open_onnx(path: Path) -> Answer:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))


def open_torch(path: Path) -> Answer:
    program = torch.export.load(path).module()
    return lambda image: {task: answer.numpy() for task, answer in program(image).items()}


OPEN = {"onnx": open_onnx, "torch": open_torch}


class Written(NamedTuple):
    """One export of the shipped backbone, frozen, in training mode, for images that have to be padded."""

    module: MultiTaskModule
    state: dict[str, Tensor]
    modes: dict[str, bool]
    exported: dict[str, Exported]
    answers: dict[str, Answer]


SIZE = (40, 56)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.manual_seed(0)
    trained = module().train()
    trained.model.backbone.freeze()
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    exported = export(trained, tmp_path_factory.mktemp("run") / "made" / "export", ["onnx", "torch"], size=SIZE)
    return Written(
        trained,
        state,
        {name: part.training for name, part in trained.named_modules()},
        {each.format: each for each in exported},
        {each.format: OPEN[each.format](each.path) for each in exported},
    )


class TestAProgram:
    @pytest.mark.parametrize("format", ["onnx", "torch"])
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_answers_as_the_trained_model_does_for_any_number_of_images(
        self, written: Written, format: str, count: int
    ) -> None:
        image = torch.rand(count, 3, *SIZE)
        found = written.answers[format](image)
        expected = predictions(written.module, image)
        assert list(found) == ["segmentation", "depth"]
        assert np.ptp(expected["depth"]) > 0.01  # an answer that ignores the image would pass otherwise
        assert len(np.unique(expected["segmentation"])) > 1
        np.testing.assert_array_equal(found["segmentation"], expected["segmentation"])
        np.testing.assert_allclose(found["depth"], expected["depth"], rtol=1e-5)
        assert found["segmentation"].dtype == np.int64 and found["depth"].dtype == np.float32

    def test_is_all_of_its_folder(self, written: Written) -> None:
        onnx, pt2 = written.exported["onnx"].path, written.exported["torch"].path
        assert {path.name for path in onnx.parent.iterdir()} == {"model.onnx", "model.pt2"} == {onnx.name, pt2.name}

    def test_says_what_a_reader_must_know(self, written: Written) -> None:
        session = onnxruntime.InferenceSession(written.exported["onnx"].path)
        in_onnx = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        extra = {"about.json": ""}
        torch.export.load(written.exported["torch"].path, extra_files=extra)
        assert json.loads(extra["about.json"]) == in_onnx
        assert in_onnx["tasks"] == ["segmentation", "depth"]
        assert in_onnx["classes"] == {"segmentation": list(CLASSES)}
        assert in_onnx["units"] == {"segmentation": "class index", "depth": "m"}
        assert in_onnx["size"] == list(SIZE) and in_onnx["raw"] is False
        assert [item.shape for item in session.get_inputs()] == [["batch", 3, *SIZE]]
        assert [item.shape for item in session.get_outputs()] == [["batch", *SIZE], ["batch", 1, *SIZE]]

    def test_names_no_folder_of_the_machine_it_was_made_on(self, written: Written) -> None:
        for exported in written.exported.values():
            assert str(Path(exporting.__file__).parent).encode() not in exported.path.read_bytes()

    def test_reports_differences_of_the_size_of_rounding(self, written: Written) -> None:
        for exported in written.exported.values():
            assert exported.difference["segmentation"] == 0
            assert 0 <= exported.difference["depth"] < 1e-5
        assert str(written.exported["torch"]).endswith(
            "model.pt2 for images of 40x56; largest difference from the model: "
            "segmentation 0.0% of pixels, depth 0.0e+00 m"
        )

    def test_leaves_the_module_as_it_was(self, written: Written) -> None:
        frozen = {name: name.startswith("model.backbone") for name in written.modes}
        assert written.modes == {name: not still for name, still in frozen.items()}
        assert all(p.requires_grad for p in written.module.model.heads.parameters())
        for name, tensor in written.module.state_dict().items():
            assert torch.equal(tensor, written.state[name]), name
            assert tensor.stride() == written.state[name].stride(), name


class TestRaw:
    def test_returns_the_heads_outputs_of_a_compiled_model(self, tmp_path: Path) -> None:
        trained = module(backbone="test_efficientnet").eval()
        image = torch.rand(3, 3, 64, 64)
        with torch.no_grad():
            expected = trained.model(image)
        trained.model.compile(backend=lambda *_: pytest.fail("an export is not of what torch.compile made"))
        (exported,) = export(trained, tmp_path, ["torch"], raw=True)
        found = open_torch(exported.path)(image)
        assert found["segmentation"].shape == (3, len(CLASSES), 64, 64)
        for task, output in expected.items():
            np.testing.assert_allclose(found[task], output.numpy(), rtol=1e-5, atol=1e-5)
        assert exported.units == {"segmentation": "", "depth": ""}


class TestOtherModels:
    def test_a_plain_transformer_in_half_precision(
        self,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        """The program computes in float32 with the rounded weights; the exporters say nothing meanwhile."""
        trained = module(backbone="test_vit", task="depth").bfloat16()
        export(trained, tmp_path, ["onnx"])
        assert capfd.readouterr() == ("", "") and not recwarn.list
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
        assert logging.root.manager.disable == logging.NOTSET
        assert next(trained.parameters()).dtype == torch.bfloat16
        image = torch.rand(2, 3, 64, 64)
        expected = predictions(trained.float(), image)["depth"]
        np.testing.assert_allclose(open_onnx(tmp_path / "model.onnx")(image)["depth"], expected, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("backbone", "decoder"),
        [
            *(("mobilenetv4_conv_small", name) for name in ("fpn", "upernet", "segformer", "deeplabv3plus")),
            ("vit_tiny_patch16_224", "dpt"),
            ("resnet18", "fpn"),
            ("swin_tiny_patch4_window7_224", "upernet"),
            ("convnextv2_atto", "unet"),
        ],
    )
    def test_every_decoder_and_kind_of_backbone(self, tmp_path: Path, backbone: str, decoder: str) -> None:
        trained = module(backbone=backbone, decoder=decoder, decoder_channels=64)
        image = torch.rand(2, 3, 64, 64)
        expected = predictions(trained, image)
        for exported in export(trained, tmp_path, ["onnx", "torch"]):
            found = OPEN[exported.format](exported.path)(image)
            assert (found["segmentation"] != expected["segmentation"]).mean() < 1e-3
            np.testing.assert_allclose(found["depth"], expected["depth"], rtol=1e-4)


@torch.library.custom_op("mtl_tests::same", mutates_args=())
def same(x: Tensor) -> Tensor:
    """An operator that torch.export knows and ONNX does not."""
    return x.clone()


same.register_fake(torch.empty_like)


class Pixels(nn.Module):
    """An encoder without layers."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return [image]


class Bent(nn.Module):
    """A head of one layer that does something to its outputs."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.output, self.bend = nn.Conv2d(3, 1, kernel_size=1), bend

    def forward(self, pyramid: Pyramid, size: tuple[int, int]) -> Tensor:
        return self.bend(self.output(pyramid.maps[0]))


def small(bend: Callable[[Tensor], Tensor] = torch.tanh) -> MultiTaskModule:
    """Return a module whose model has a layer or two and is soon exported."""
    made = module(task="depth", backbone="test_efficientnet")
    made.model.backbone.encoder = Pixels()
    made.model.heads["depth"] = Bent(bend)
    return made


def refused(folder: Path, of: MultiTaskModule, formats: list[exporting.Format], **options) -> str:
    """Return the sentence with which an export is refused; it has left nothing behind."""
    with pytest.raises(UserError) as caught:
        export(of, folder / "export", formats, **options)
    assert list(folder.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRefusals:
    def test_an_operator_that_onnx_lacks_is_named_and_no_format_is_written(self, tmp_path: Path) -> None:
        message = refused(tmp_path, small(lambda x: same(x)), ["torch", "onnx"])
        assert "test_efficientnet" in message and "unet" in message
        assert (
            "operator mtl_tests.same" in message and "No ONNX function found" in message and "--format torch" in message
        )

    def test_a_choice_that_depends_on_the_image(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        message = refused(tmp_path, small(lambda x: x if x.sum() > 0 else -x), ["torch"])
        assert "data-dependent" in message and "another --backbone or --decoder" in message
        assert capfd.readouterr() == ("", "")

    def test_a_program_for_one_batch_size_alone(self, tmp_path: Path) -> None:
        message = refused(tmp_path, small(lambda x: x.reshape(int(x.shape[0]), 1, 64, 64)), ["torch"])
        assert "batch" in message

    def test_a_program_that_answers_differently(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bias that is off by a hundredth is found."""
        trained, trace = small(), exporting._trace

        def trace_another(program, *size: int):
            with torch.no_grad():
                program.model.heads["depth"].output.bias += 1e-2
                traced = trace(program, *size)
            return traced

        monkeypatch.setattr(exporting, "_trace", trace_another)
        message = refused(tmp_path, trained, ["torch"])
        assert "does not answer depth as the model does" in message

    def test_a_model_whose_training_failed(self, tmp_path: Path) -> None:
        assert "not finite" in refused(tmp_path, small(lambda x: x / 0), ["torch"])

    def test_a_size_that_the_backbone_was_not_built_for(self, tmp_path: Path) -> None:
        fixed = small(lambda x: x.reshape(len(x), 1, 64, 64))
        assert "--size 64 128" in refused(tmp_path, fixed, ["torch"], size=(64, 128))

    def test_weights_that_do_not_fit_into_one_onnx_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exporting, "_LARGEST_ONNX", 10)
        assert "--format torch" in refused(tmp_path, small(), ["onnx"])

    def test_missing_packages_are_named_before_any_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trained, found = small(), exporting.find_spec
        monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else found(name))
        monkeypatch.setattr(exporting, "_trace", None)
        message = refused(tmp_path, trained, ["onnx"])
        assert "needs onnxscript, which is not installed" in message
        assert "pip install onnx onnxscript onnxruntime" in message

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="--output-dir"):
            export(small(), tmp_path / "file" / "export", ["torch"])


class TestTies:
    """Classes may differ only where the model's own outputs leave it open which is best."""

    @pytest.mark.parametrize(("lead", "same"), [(1e-4, True), (1e-2, False)])
    def test_a_class_may_differ_where_the_best_two_are_as_good(self, lead: float, same: bool) -> None:
        segmentation = module(task="segmentation").tasks["segmentation"]
        outputs = torch.tensor([[1.0, 1.0 - lead, 0.0], [0.0, 0.5, 1.0]]).T.reshape(1, 3, 2, 1)
        answers = segmentation.predict(outputs)
        assert answers.flatten().tolist() == [0, 2]
        example = exporting._Example(torch.empty(0), {"segmentation": outputs}, {"segmentation": answers})
        answer = torch.tensor([1, 2]).reshape(1, 2, 1)
        assert exporting._compare(segmentation, answer, example) == (0.5, same)
