"""Prediction at any size, with models whose answers are known in closed form."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.nn import functional

from mtl.build import build_module
from mtl.config import validate
from mtl.data.fitting import fit
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.prediction.predictor import ONE_PASS, Predictor
from mtl.training.module import MultiTaskModule

INFO = DataInfo("test", ("segmentation", "depth"), ("red", "green", "blue"))
SIZE = (24, 32)


class Local(nn.Module):
    """Stands in for a model: classes are told by the brightest channel, the depth's output is an affine map of it."""

    class Encoder(nn.Module):
        """What the predictor asks of a backbone."""

        def __init__(self, fixed: bool) -> None:
            super().__init__()
            self.size_arguments = {"img_size": SIZE} if fixed else {}

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.backbone = self.Encoder(fixed)
        self.factor = nn.Parameter(torch.tensor(10.0))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.seen.append(tuple(image.shape))
        return {"segmentation": image * self.factor, "depth": image[:, :1] * self.factor + 20}


def module(**fields: Any) -> MultiTaskModule:
    fields = {"init": "none", "decoder_channels": 16, "data": {"size": SIZE}} | fields
    return build_module(validate(fields), INFO, total_steps=0)


TEMPLATE = module()


def local(fixed: bool, **options: Any) -> tuple[Predictor, Local]:
    """Return a predictor around a stand-in."""
    TEMPLATE.model = Local(fixed)
    return Predictor(TEMPLATE, **options), TEMPLATE.model


def smooth(height: int, width: int) -> Tensor:
    """Return an image (3, H, W) that is affine in its coordinates, from 0.1 to 0.9."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return 0.1 + 0.8 * torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), (x + y[:, None]) / 2])


sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))
"""Odd, tiny, large, panoramic: training is at 24 x 32."""


class TestLocalModel:
    """A model that sees one pixel gives that pixel's answer, whatever the windows."""

    @settings(max_examples=60, deadline=None)
    @given(sizes, st.booleans(), st.sampled_from([0.0, 0.25, 0.6]), st.integers(1, 9), st.integers(0, 2**31))
    def test_native_windows_change_nothing(
        self, size: tuple[int, int], fixed: bool, overlap: float, batch_size: int, seed: int
    ) -> None:
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        predictor, model = local(fixed, scale="native", overlap=overlap, batch_size=batch_size)
        found = predictor.predict(image)
        assert found["segmentation"].dtype == torch.int64 and found["segmentation"].shape == size
        brightest = image.max(dim=0).values
        assert (image.gather(0, found["segmentation"][None])[0] == brightest).all()
        expected = functional.softplus(image[:1] / 255 * 10 + 20) + 1e-3
        assert found["depth"].shape == (1, *size) and torch.allclose(found["depth"], expected, atol=1e-5)
        if fixed:
            assert all(shape[2:] == SIZE for shape in model.seen), "nothing else may enter"
        assert all(shape[0] <= batch_size for shape in model.seen)

    @settings(max_examples=60, deadline=None)
    @given(sizes, st.booleans())
    @example((48, 64), False)
    @example((48, 640), True)
    def test_a_ramp_stays_in_its_place(self, size: tuple[int, int], fixed: bool) -> None:
        """There and back through the scale of training, coordinates are not shifted by 0.02 px.

        Averages over areas that cut through pixels ripple about the truth by up to 1/8 px, as in training; the ripple
        is the same from either end of the image, a shift would be of opposite sign.
        """
        image = smooth(*size)
        predictor, _ = local(fixed)
        output = (predictor.predict(image)["depth"] - 1e-3).double().expm1().log()  # undoes softplus
        x = ((output[0] - 20) / 10 - 0.1) / 0.8 * size[1] - 0.5
        # Beyond the centres of the outer pixels at either scale there is nothing to interpolate.
        scale = max(SIZE[0] / size[0], SIZE[1] / size[1])
        border = 1 + int(1 / scale)
        error = (x - torch.arange(size[1]))[:, border : size[1] - border]
        if error.numel():
            assert ((error + error.flip(1)) / 2).abs().max() < 0.02
            assert error.abs().max() < (0.02 if scale >= 1 or size == (48, 64) else 0.02 + 1 / 8)

    @pytest.mark.parametrize("size", [(24, 32), (240, 320), (12, 16), (37, 91), (300, 24)])
    def test_the_scale_is_that_of_training(self, size: tuple[int, int]) -> None:
        """What enters has in its middle the very pixels that `fit` makes for training."""
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = cv2.GaussianBlur(image, None, 3)
        predictor, model = local(fixed=False)
        entered: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        predictor.predict(image)
        if len(entered) > 1 or len(entered[0]) > 1:
            assert size == (300, 24)
            return
        height, width = entered[0].shape[2:]
        assert min(height / SIZE[0], width / SIZE[1]) == 1
        top, left = (height - SIZE[0]) // 2, (width - SIZE[1]) // 2
        trained = torch.from_numpy(fit({"image": image}, SIZE)["image"]).permute(2, 0, 1) / 255
        middle = entered[0][0, :, top : top + SIZE[0], left : left + SIZE[1]]
        # `fit` cuts whole source pixels, so the two may lie a fraction of a pixel apart.
        assert (middle - trained).abs().max() < (0.001 if size[0] * 4 == size[1] * 3 else 0.04)


class TestRealModel:
    @pytest.mark.parametrize(
        "fields", [{}, {"channels_last": False}, {"task": "depth"}, {"data": {"size": (40, 56)}}], ids=str
    )
    def test_one_pass_is_the_module_itself(self, fields: dict[str, Any]) -> None:
        predicting = module(**fields).eval()
        height, width = predicting.options.data.size
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch = predicting.on_after_batch_transfer({"image": image[None]}, 0)
        with torch.no_grad():
            expected = predicting(batch["image"])
        found = Predictor(predicting.train()).predict(image)
        assert found.keys() == expected.keys()
        for name, prediction in expected.items():
            if height % 32 or width % 32:
                # Cut out of what was padded, the same numbers lie differently in memory, and torch's softplus
                # differs in the last bit between the two.
                assert torch.allclose(found[name], prediction[0], rtol=2e-7, atol=0), name
            else:
                assert torch.equal(found[name], prediction[0]), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_types(self, dtype: torch.dtype) -> None:
        predicting = module().eval()
        image = torch.rand(3, 50, 70)
        expected = Predictor(predicting).predict(image)
        found = Predictor(predicting.to(dtype)).predict(image)
        assert found["depth"].is_floating_point() and found["depth"].shape == (1, 50, 70)
        assert (found["depth"] - expected["depth"]).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)
        predicting.float()

    def test_large_images_go_in_one_pass_up_to_a_limit_and_fixed_backbones_never(self) -> None:
        for fixed, size, largest in [
            (False, (48, 64), (48, 64)),
            (False, (48, 65), SIZE),
            (True, (48, 64), SIZE),
            (True, (10, 12), SIZE),
        ]:
            assert ONE_PASS == 4
            predictor, model = local(fixed, scale="native")
            predictor.predict(torch.rand(3, *size))
            assert {shape[2:] for shape in model.seen} == {largest}

    def test_a_transformer_of_one_size(self) -> None:
        predicting = module(backbone="swin_tiny_patch4_window7_224", data={"size": (32, 64)}, task="depth")
        assert "img_size" in predicting.model.backbone.size_arguments
        for size, scale in [((70, 150), "fit"), ((20, 90), "native")]:
            found = Predictor(predicting, scale=scale).predict(torch.rand(3, *size))["depth"]
            assert found.shape == (1, *size) and found.isfinite().all()

    def test_forty_classes_of_a_large_image_never_exist_as_one_map(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mtl.prediction.predictor._BAND", 2**17)
        names = tuple(f"class {i}" for i in range(40))
        many = build_module(
            validate({"init": "none", "task": "segmentation", "data": {"size": SIZE}, "decoder_channels": 16}),
            DataInfo("test", ("segmentation",), names),
            total_steps=0,
        )
        model = Local(fixed=False)
        model.forward = lambda image: {"segmentation": image[:, :1].expand(-1, 40, -1, -1)}  # type: ignore[method-assign]
        many.model = model
        largest = 0
        predict = many.tasks["segmentation"].predict

        def watch(outputs: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, outputs.numel())
            return predict(outputs)

        many.tasks["segmentation"].predict = watch
        found = Predictor(many).predict(np.zeros((150, 200, 3), np.uint8))["segmentation"]
        assert found.shape == (150, 200) and largest <= 2**17 < 40 * 150 * 200


class TestInputs:
    def test_every_form_of_an_image_is_the_same(self, tmp_path: Path) -> None:
        array = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
        path = tmp_path / "a.png"
        Image.fromarray(array).save(path)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        predictor, _ = local(fixed=False, scale="native")
        expected = predictor.predict(array)["depth"]
        for form in (path, str(path), Image.open(path), tensor, tensor.float() / 255, tensor.double() / 255):
            assert torch.allclose(predictor.predict(form)["depth"], expected, atol=1e-5)

    def test_pictures_are_turned_as_viewers_turn_them(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
        predictor, _ = local(fixed=False)
        for form in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
            assert predictor.predict(form)["segmentation"].shape == (40, 30)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_other_modes_become_rgb(self, mode: str) -> None:
        assert local(fixed=False)[0].predict(Image.new(mode, (40, 30)))["segmentation"].shape == (30, 40)

    @pytest.mark.parametrize(
        ("image", "words"),
        [
            ("nowhere.png", r"nowhere.png does not exist"),
            (".", "not a file"),
            (Image.new("I;16", (4, 4)), "more than 8 bits"),
            (np.zeros((4, 4, 3)), r"\(4, 4, 3\) float64"),
            (np.zeros((3, 4, 4), np.uint8), r"\(3, 4, 4\) uint8"),
            (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
            (torch.zeros(1, 3, 4, 4), r"\(1, 3, 4, 4\)"),
            (torch.zeros(3, 4, 4).int(), "int32"),
            (torch.full((3, 4, 4), 200.0), "divide by 255"),
            (torch.full((3, 4, 4), torch.nan), "nan"),
            (np.zeros((1, 4000, 3), np.uint8), "4000x1 .*would have to be enlarged to 96000x24"),
        ],
    )
    def test_what_is_no_image_is_a_sentence(self, image: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mtl.prediction.predictor._LARGEST", 2**20)
        with pytest.raises(UserError, match=words):
            local(fixed=False)[0].predict(image)

    @pytest.mark.parametrize("options", [{"scale": "double"}, {"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}])
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=str(next(iter(options.values())))):
            local(fixed=False, **options)
