"""Depth against closed forms, plain loops and torchmetrics."""

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchmetrics.regression import (
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    MeanSquaredLogError,
)

from mtl.augmentation import geometry
from mtl.augmentation.resampling import warp
from mtl.config import DepthOptions
from mtl.data.decoding import LABEL_SIZES, read_depth
from mtl.data.sample import DataInfo, DepthConvention
from mtl.errors import UserError
from mtl.tasks.depth import (
    POOLED,
    Depth,
    DepthMetric,
    berhu_loss,
    eigen_crop,
    gradient_loss,
    l1_loss,
    silog_loss,
)

LOSSES = ["l1", "silog", "berhu"]
INVERSE = Depth(DepthOptions(), DataInfo("streets", ("depth",), inverse_depth=True))
seeds = st.integers(0, 2**32 - 1)


def make(**options: Any) -> Depth:
    return Depth(DepthOptions(**options), DataInfo("rooms", ("depth",)))


def draw(seed: int, images: int = 3, size: int = 9, invalid: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return predictions and labels (images, 1, size, size) in metres, a share of the labels invalid."""
    generator = torch.Generator().manual_seed(seed)
    target = 0.5 + 9 * torch.rand(images, 1, size, size, generator=generator)
    prediction = target * (0.4 * torch.randn(target.shape, generator=generator)).exp()
    target[torch.rand(target.shape, generator=generator) < invalid] = 0
    target[0, 0, 0, 0] = 2.0
    return prediction, target


def measure(*batches: tuple[Tensor, Tensor], **options: Any) -> dict[str, float]:
    metric = DepthMetric(DepthOptions(**options))
    for prediction, target in batches:
        metric.update(prediction, target)
    return {name: value.item() for name, value in metric.compute().items()}


def numpy_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Compute the pooled metrics as BTS's evaluation script does, on the labelled pixels alone."""
    labelled = target.numpy() > 0
    p, t = prediction.double().numpy()[labelled], target.double().numpy()[labelled]
    ratio = np.maximum(t / p, p / t)
    log_error = np.log(p) - np.log(t)
    return {
        "abs_error": np.mean(np.abs(t - p)),
        "abs_rel": np.mean(np.abs(t - p) / t),
        "sq_rel": np.mean((t - p) ** 2 / t),
        "rmse": np.sqrt(np.mean((t - p) ** 2)),
        "rmse_log": np.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(np.log10(t) - np.log10(p))),
        "silog": 100 * np.std(log_error),
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
    }


def inverse(depth: Tensor) -> Tensor:
    """Return the outputs that are predicted as `depth`."""
    return (depth.double() - 1e-3).expm1().log()


class TestMetric:
    def test_closed_form(self) -> None:
        target = torch.tensor([[[[1.0, 2.0, 0.0]]], [[[4.0, 0.0, 0.0]]]])
        prediction = torch.tensor([[[[2.0, 2.0, 9.0]]], [[[3.0, 9.0, 9.0]]]])
        # Errors 1, 0 and -1; ratios 2, 1 and 4/3; logarithms ln 2, 0 and ln 3/4.
        result = measure((prediction, target))
        a, b = math.log(2), math.log(3 / 4)
        assert result == pytest.approx(
            {
                "abs_error": 2 / 3,
                "abs_rel": (1 + 1 / 4) / 3,
                "sq_rel": (1 + 1 / 4) / 3,
                "rmse": math.sqrt(2 / 3),
                "rmse_log": math.sqrt((a**2 + b**2) / 3),
                "log10": (math.log10(2) + math.log10(4 / 3)) / 3,
                "silog": 100 * math.sqrt((a**2 + b**2) / 3 - ((a + b) / 3) ** 2),
                "delta1": 1 / 3,
                "delta2": 2 / 3,
                "delta3": 2 / 3,
                "abs_error_image": (1 / 2 + 1) / 2,
                "abs_rel_image": (1 / 2 + 1 / 4) / 2,
                "sq_rel_image": (1 / 2 + 1 / 4) / 2,
                "rmse_image": (math.sqrt(1 / 2) + 1) / 2,
                "rmse_log_image": (math.sqrt(a**2 / 2) - b) / 2,
                "log10_image": (math.log10(2) / 2 + math.log10(4 / 3)) / 2,
                "silog_image": 100 * (a / 2 + 0) / 2,
                "delta1_image": (1 / 2 + 0) / 2,
                "delta2_image": (1 / 2 + 1) / 2,
                "delta3_image": (1 / 2 + 1) / 2,
            },
            abs=1e-6,
        )

    def test_delta_thresholds_are_exclusive(self) -> None:
        prediction = torch.tensor([1.25, 1.25**2, 1.25**3, 0.8]).reshape(1, 1, 1, 4)
        result = measure((prediction, torch.ones(1, 1, 1, 4)))
        # 1.25 itself is outside the first; 1 / 0.8 in float32 is just inside.
        assert [result[f"delta{k}"] for k in (1, 2, 3)] == [0.25, 0.5, 0.75]

    @given(seeds, st.sampled_from([0.0, 0.3, 0.9]))
    @settings(max_examples=30, deadline=None)
    def test_agrees_with_numpy_pooled_and_by_image(self, seed: int, invalid: float) -> None:
        prediction, target = draw(seed, invalid=invalid)
        labelled = [i for i in range(len(target)) if target[i].any()]
        images = [numpy_metrics(prediction[i], target[i]) for i in labelled]
        expected = numpy_metrics(prediction, target)
        expected |= {f"{name}_image": float(np.mean([image[name] for image in images])) for name in POOLED}
        assert measure((prediction, target)) == pytest.approx(expected, rel=1e-9, abs=1e-6)

    def test_agrees_with_torchmetrics(self) -> None:
        prediction, target = draw(11)
        p, t = prediction[target > 0], target[target > 0]
        result = measure((prediction, target))
        assert result["abs_error"] == pytest.approx(MeanAbsoluteError()(p, t).item(), rel=1e-6)
        assert result["abs_rel"] == pytest.approx(MeanAbsolutePercentageError()(p, t).item(), rel=1e-6)
        assert result["rmse"] == pytest.approx(MeanSquaredError(squared=False)(p, t).item(), rel=1e-6)
        # torchmetrics adds one before taking the logarithm.
        log_square = MeanSquaredLogError()(p - 1, t - 1).item()
        assert result["rmse_log"] == pytest.approx(math.sqrt(log_square), rel=1e-5)

    @given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=20, deadline=None)
    def test_split_into_batches_does_not_matter(self, seed: int, sizes: list[int]) -> None:
        prediction, target = draw(seed, images=sum(sizes))
        split = measure(*zip(prediction.split_with_sizes(sizes), target.split_with_sizes(sizes), strict=True))
        assert split == pytest.approx(measure((prediction, target)), rel=1e-12, abs=1e-9)

    def test_two_processes_make_one(self) -> None:
        prediction, target = draw(1, images=5)
        first, second = DepthMetric(DepthOptions()), DepthMetric(DepthOptions())
        first.update(prediction[:2], target[:2])
        second.update(prediction[2:], target[2:])
        first.merge_state(second)
        merged = {name: value.item() for name, value in first.compute().items()}
        assert merged == pytest.approx(measure((prediction, target)), rel=1e-12, abs=1e-9)

    @given(seeds, st.sampled_from([0.0, -1.0, 1e30, math.inf, math.nan]))
    @settings(max_examples=20, deadline=None)
    def test_predictions_at_invalid_pixels_do_not_matter(self, seed: int, garbage: float) -> None:
        prediction, target = draw(seed)
        changed = torch.where(target > 0, prediction, garbage)
        assert measure((changed, target)) == measure((prediction, target))

    def test_image_without_labels_is_left_out(self) -> None:
        prediction, target = draw(3, images=2)
        target[1] = 0
        assert measure((prediction, target)) == pytest.approx(measure((prediction[:1], target[:1])), rel=1e-12)

    def test_perfect(self) -> None:
        _, target = draw(0)
        result = measure((target + (target == 0), target))
        assert result == {name: float(name.startswith("delta")) for name in result}

    @given(seeds, st.floats(0.2, 5))
    @settings(max_examples=10, deadline=None)
    def test_silog_does_not_see_scale(self, seed: int, scale: float) -> None:
        prediction, target = draw(seed)
        changed, original = measure((scale * prediction, target)), measure((prediction, target))
        assert changed["silog"] == pytest.approx(original["silog"], rel=1e-5)
        assert changed["silog_image"] == pytest.approx(original["silog_image"], rel=1e-5)

    @pytest.mark.filterwarnings("error")
    def test_nothing_valid_is_nan(self) -> None:
        result = measure((torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)))
        assert len(result) == 20 and all(math.isnan(value) for value in result.values())

    def test_caps(self) -> None:
        target = torch.tensor([0.5, 1.0, 2.0, 8.0, 10.0, 20.0]).reshape(1, 1, 1, 6)
        prediction = torch.tensor([9.0, 9.0, 0.1, 50.0, 9.0, 9.0]).reshape(1, 1, 1, 6)
        # Only 2 and 8 lie strictly between the caps; the predictions there become 1 and 10.
        result = measure((prediction, target), min_depth=1.0, max_depth=10.0)
        assert result["abs_error"] == pytest.approx((1 + 2) / 2)
        assert result["abs_rel"] == pytest.approx((1 / 2 + 2 / 8) / 2)

    def test_eigen_crop_at_full_size_is_the_published_one(self) -> None:
        expected = torch.zeros(480, 640, dtype=torch.bool)
        expected[45:471, 41:601] = True
        assert torch.equal(eigen_crop(480, 640, torch.device("cpu")), expected)

    @pytest.mark.parametrize(("height", "width"), [(240, 320), (288, 384), (120, 160)])
    def test_eigen_crop_scales(self, height: int, width: int) -> None:
        crop = eigen_crop(height, width, torch.device("cpu"))
        rows, columns = crop.any(1).nonzero().flatten() / height, crop.any(0).nonzero().flatten() / width
        assert crop.sum() == len(rows) * len(columns)
        borders = torch.stack([rows[0], rows[-1] + 1 / height, columns[0], columns[-1] + 1 / width])
        expected = torch.tensor([45 / 480, 471 / 480, 41 / 640, 601 / 640])
        half_a_pixel = torch.tensor([0.5 / height, 0.5 / height, 0.5 / width, 0.5 / width])
        assert ((borders - expected).abs() <= half_a_pixel + 1e-6).all()

    def test_eigen_crop_at_half_size(self) -> None:
        expected = torch.zeros(240, 320, dtype=torch.bool)
        expected[22:235, 20:300] = True
        assert torch.equal(eigen_crop(240, 320, torch.device("cpu")), expected)

    def test_crop_is_applied(self) -> None:
        prediction, target = draw(0, images=2, size=48, invalid=0.1)
        # On 48 x 48: rows 4.5 to 47.1 and columns 3.075 to 45.075, by centre.
        cropped = torch.zeros_like(target)
        cropped[..., 4:47, 3:45] = target[..., 4:47, 3:45]
        assert measure((prediction, target), crop="eigen") == measure((prediction, cropped))
        assert measure((prediction, target)) != measure((prediction, cropped))

    @pytest.mark.parametrize("options", [{}, {"crop": "eigen", "max_depth": 10.0}])
    def test_update_never_waits_for_the_device(self, options: dict[str, Any]) -> None:
        # A meta tensor has no values: anything that asked for one would raise.
        metric = DepthMetric(DepthOptions(**options)).to("meta")
        prediction, target = draw(0)
        metric.update(prediction.to("meta"), target.to("meta"))
        assert metric.pixel_sums.device.type == "meta"

    def test_half_precision_module_keeps_exact_sums(self) -> None:
        prediction, target = draw(5)
        metric = DepthMetric(DepthOptions()).to(torch.bfloat16)
        for _ in range(3):
            metric.update(prediction, target)
        metric.half()
        result = {name: value.item() for name, value in metric.compute().items()}
        assert result == pytest.approx(measure((prediction, target)), rel=1e-12)


class TestLoss:
    def test_l1_closed_form(self) -> None:
        prediction, target = torch.tensor([1.0, 5.0, 100.0]), torch.tensor([2.0, 2.0, 1.0])
        assert l1_loss(prediction, target, torch.tensor([True, True, False])).item() == 2.0

    def test_berhu_closed_form(self) -> None:
        # Errors 5, 1 and 0.5, so c = 1: (25 + 1) / 2, 1 and 0.5. The invalid error of 100 sets no threshold.
        prediction = torch.tensor([7.0, 1.0, 2.5, 102.0], requires_grad=True)
        target, valid = torch.full((4,), 2.0), torch.tensor([True, True, True, False])
        loss = berhu_loss(prediction, target, valid)
        assert loss.item() == pytest.approx((13 + 1 + 0.5) / 3)
        # Its slope is 1 up to c and x / c beyond.
        (gradient,) = torch.autograd.grad(loss, prediction)
        torch.testing.assert_close(gradient, torch.tensor([5.0, -1.0, 1.0, 0.0]) / 3)

    def test_silog_closed_form(self) -> None:
        # Logarithms of the ratio 1 and 3: mean square 5, mean 2.
        prediction, target = torch.tensor([math.e, math.e**3, 9.0]), torch.ones(3)
        valid = torch.tensor([True, True, False])
        for focus in (0.0, 0.5, 0.85, 1.0):
            expected = 10 * math.sqrt(5 - focus * 4)
            assert silog_loss(prediction, target, valid, focus).item() == pytest.approx(expected)
        assert silog_loss(prediction, target, valid).item() == pytest.approx(10 * math.sqrt(5 - 0.85 * 4))

    @given(seeds, st.floats(0.1, 10))
    @settings(max_examples=20, deadline=None)
    def test_silog_with_full_focus_does_not_see_scale(self, seed: int, scale: float) -> None:
        prediction, target = draw(seed)
        valid, target = target > 0, torch.where(target > 0, target, 1)
        original = silog_loss(prediction, target, valid, 1.0)
        torch.testing.assert_close(silog_loss(scale * prediction, target, valid, 1.0), original, rtol=1e-4, atol=1e-4)

    @given(seeds)
    @settings(max_examples=10, deadline=None)
    def test_gradient_term_agrees_with_loops(self, seed: int) -> None:
        prediction, target = draw(seed, images=2, size=9)
        valid, target = target > 0, torch.where(target > 0, target, 1)
        error = np.log(prediction.double().numpy() / target.double().numpy())
        expected = 0.0
        for step in (1, 2, 4, 8):
            for down, right in ((step, 0), (0, step)):
                pairs = [
                    abs(error[b, 0, y + down, x + right] - error[b, 0, y, x])
                    for b in range(2)
                    for y in range(0, 9 - down, step)
                    for x in range(0, 9 - right, step)
                    if valid[b, 0, y, x] and valid[b, 0, y + down, x + right]
                ]
                expected += np.mean(pairs) if pairs else 0.0
        assert gradient_loss(prediction, target, valid).item() == pytest.approx(expected, rel=1e-4)

    def test_gradient_term_of_an_offset_is_zero_and_of_a_ramp_its_slope(self) -> None:
        _, target = draw(0, size=16, invalid=0)
        valid = target > 0
        assert gradient_loss(3 * target, target, valid).item() == pytest.approx(0, abs=1e-5)
        ramp = (0.01 * torch.arange(16.0)).exp()
        expected = 0.01 * (1 + 2 + 4 + 8)
        assert gradient_loss(target * ramp, target, valid).item() == pytest.approx(expected, rel=1e-3)

    def test_gradient_weight_reaches_the_loss(self) -> None:
        prediction, target = draw(3)
        outputs, batch = inverse(prediction), {"depth": target}
        valid, safe = target > 0, torch.where(target > 0, target, 1).double()
        term = gradient_loss(prediction.double(), safe, valid)
        difference = make(gradient_weight=0.5).loss(outputs, batch) - make().loss(outputs, batch)
        torch.testing.assert_close(difference, 0.5 * term)

    @pytest.mark.parametrize(("name", "function"), [("l1", l1_loss), ("silog", silog_loss), ("berhu", berhu_loss)])
    def test_option_selects_the_loss(self, name: str, function: Any) -> None:
        prediction, target = draw(4)
        p, t = prediction[target > 0], target[target > 0]
        expected = function(p, t, torch.ones_like(p, dtype=torch.bool))
        value = make(loss=name).loss(inverse(prediction), {"depth": target})
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("missing", ["key", "labels"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_no_label_is_exactly_zero(self, loss: str, missing: str, dtype: torch.dtype) -> None:
        outputs = torch.full((2, 1, 64, 64), 100.0, dtype=dtype, requires_grad=True)
        batch = {} if missing == "key" else {"depth": torch.zeros(2, 1, 64, 64)}
        value = make(loss=loss, gradient_weight=1.0).loss(outputs, batch)
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.item() == 0 and not gradient.any()

    @pytest.mark.parametrize("loss", LOSSES)
    def test_perfect_prediction_has_a_finite_gradient(self, loss: str) -> None:
        outputs = torch.zeros(1, 1, 4, 4, requires_grad=True)
        task = make(loss=loss, gradient_weight=1.0)
        value = task.loss(outputs, {"depth": task.predict(outputs).detach()})
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.item() == 0 and not gradient.any()

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("garbage", [0.0, 1e30, -1e30, math.inf, math.nan])
    def test_outputs_at_invalid_pixels_do_not_matter(self, loss: str, garbage: float) -> None:
        prediction, target = draw(7)
        task = make(loss=loss, gradient_weight=0.5)
        original = inverse(prediction).float()
        results = []
        for outputs in (original, torch.where(target > 0, original, garbage)):
            outputs = outputs.clone().requires_grad_()
            value = task.loss(outputs, {"depth": target})
            (gradient,) = torch.autograd.grad(value, outputs)
            results.append((value, gradient))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        assert not results[1][1][target == 0].any()

    @pytest.mark.parametrize("loss", ["l1", "silog"])
    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_gradient(self, loss: str, weight: float) -> None:
        prediction, target = draw(8, images=2, size=3)
        task = make(loss=loss, gradient_weight=weight)
        assert torch.autograd.gradcheck(
            lambda outputs: task.loss(outputs, {"depth": target}), inverse(prediction).requires_grad_()
        )

    @pytest.mark.parametrize("loss", LOSSES)
    def test_bfloat16_outputs_are_computed_in_float32(self, loss: str) -> None:
        prediction, target = draw(9)
        task, outputs = make(loss=loss, gradient_weight=0.5), inverse(prediction).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            value = task.loss(outputs, {"depth": target})
            assert task.predict(outputs).dtype == torch.float32
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, task.loss(outputs.float(), {"depth": target}))


class TestPrior:
    @given(seeds, st.integers(1, 4))
    @settings(max_examples=10, deadline=None)
    def test_mean_over_labelled_pixels(self, seed: int, chunk: int) -> None:
        _, target = draw(seed, images=4)
        stored = target.half()
        task = make()
        task.observe(torch.split(stored, chunk))
        labelled = stored.double().numpy()
        expected = labelled[labelled > 0].mean()
        assert task.mean_depth.item() == pytest.approx(expected, rel=1e-6)
        constant = task.constant(target)
        assert constant.shape == target.shape
        assert np.allclose(constant.numpy(), expected)

    def test_many_pixels_lose_nothing(self) -> None:
        # A float16 sum would overflow, a float32 running sum would stall.
        task = make()
        task.observe(torch.full((4, 1, 512, 512), value).half() for value in (60000.0, 0.5))
        assert task.mean_depth.item() == pytest.approx(30000.25, rel=1e-7)

    @pytest.mark.parametrize("depth", [0.05, 0.7, 2.84, 30.0, 2000.0])
    def test_bias_is_predicted_as_the_mean(self, depth: float) -> None:
        task = make()
        task.observe([torch.full((1, 1, 2, 2), depth)])
        bias = task.initial_bias()
        assert bias.shape == (1,)
        assert task.predict(bias.reshape(1, 1, 1, 1)).item() == pytest.approx(depth, rel=1e-5)

    def test_travels_in_the_state(self) -> None:
        task, other = make(), make()
        task.observe([draw(0)[1]])
        other.load_state_dict(task.state_dict())
        assert other.mean_depth.item() == task.mean_depth.item() != 1

    def test_no_labels_at_all(self) -> None:
        for chunks in ([], [torch.zeros(2, 1, 3, 3)]):
            with pytest.raises(UserError, match=r"no sample has a label for the task 'depth'.*'rooms'"):
                make().observe(chunks)


class TestTask:
    @given(st.floats(-1e4, 1e4, width=16))
    @settings(deadline=None)
    def test_prediction_is_positive_softplus(self, output: float) -> None:
        prediction = make().predict(torch.full((1, 1, 1, 1), output, dtype=torch.float16)).item()
        assert prediction >= 1e-3
        assert prediction == pytest.approx(np.logaddexp(0, output) + 1e-3, rel=1e-5)

    def test_metric_names_and_directions(self) -> None:
        task = make()
        metric = task.metrics()
        metric.update(*draw(0))
        result = metric.compute()
        assert result.keys() == task.higher_is_better.keys()
        assert task.main_metric in result
        assert {name for name, higher in task.higher_is_better.items() if higher} == {
            f"delta{k}{suffix}" for k in (1, 2, 3) for suffix in ("", "_image")
        }
        assert task.remaining_error({"abs_rel": 0.2}) == 0.2

    def test_caps_in_order(self) -> None:
        with pytest.raises(ValueError, match=r"max_depth 0.5 must be greater than min_depth 1"):
            DepthOptions(min_depth=1, max_depth=0.5)

    def test_options_reach_the_metric(self) -> None:
        prediction, target = draw(2)
        metric = make(max_depth=4.0).metrics()
        metric.update(prediction, target)
        expected = measure((prediction, target), max_depth=4.0)
        assert {name: value.item() for name, value in metric.compute().items()} == expected


class TestPictures:
    def test_range_and_invalid_pixels(self) -> None:
        target = torch.tensor([[[[1.0, 5.0], [3.0, 0.0]]]])
        prediction = torch.tensor([[[[1.0, 50.0], [2.5, 7.0]]]])
        panels = make().pictures(prediction, target)
        assert list(panels) == ["depth target", "depth prediction", "depth error"]
        assert [panel.scale for panel in panels.values()] == [
            (1, 5, "m", "viridis"), (1, 5, "m", "viridis"), (0, 45, "m", "YlOrRd"),
        ]  # fmt: skip
        drawn_target, drawn_prediction, error = (panel.images for panel in panels.values())
        # The same depth has the same colour in both, and beyond the range is the range's end.
        assert (drawn_target[0, 0] == drawn_prediction[0, 0]).all()
        assert not drawn_target[0, 1, 1].any() and not error[0, 1, 1].any()
        assert drawn_prediction[0, 1, 1].any()
        valid = np.array([[True, True], [True, False]])
        assert drawn_target[0][valid].any(axis=-1).all() and error[0][valid].any(axis=-1).all()
        assert all(p.images.dtype == np.uint8 and p.images.shape == (1, 2, 2, 3) for p in panels.values())

    def test_colours_are_those_of_the_scale(self) -> None:
        """Looking a colour up on the scale gives the depth back, to half a step of the colormap."""
        depth = 0.5 + 7 * torch.rand(1, 1, 8, 8, dtype=torch.float64)
        ((images, scale),) = make().pictures(depth, None).values()
        assert scale is not None
        steps = matplotlib.colormaps[scale.colormap](np.arange(256), bytes=True)[:, :3].astype(int)
        index = np.abs(images[0][..., None, :].astype(int) - steps).sum(axis=-1).argmin(axis=-1)
        shown = scale.low + (index + 0.5) / 256 * (scale.high - scale.low)
        assert np.abs(shown - depth[0, 0].numpy()).max() <= (scale.high - scale.low) / 256 * 1.01

    def test_without_target_or_labels(self) -> None:
        prediction = torch.tensor([[[[1.0, 2.0]]]])
        panels = make().pictures(prediction, None)
        assert list(panels) == ["depth prediction"] and panels["depth prediction"].scale == (1, 2, "m", "viridis")
        panels = make().pictures(prediction, torch.zeros(1, 1, 1, 2))
        assert panels["depth prediction"].scale == (1, 2, "m", "viridis")
        assert not panels["depth target"].images.any()

    def test_inverse_depth_has_no_unit(self) -> None:
        panels = INVERSE.pictures(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        assert all(title.startswith("depth") and "inverse depth" in title for title in panels)
        assert all(panel.scale is not None and panel.scale.unit == "" for panel in panels.values())


class TestEncode:
    @settings(max_examples=25)
    @given(st.floats(1e-3, 3e4), seeds)
    def test_reads_back_to_half_a_unit(self, largest: float, seed: int) -> None:
        depth = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(seed)) * (largest - 1e-3) + 1e-3
        depth[0, 2, 3] = largest
        files = make().encode(depth)
        unit = json.loads(files.pop(".json", b'{"metres_per_unit": 0.001}'))["metres_per_unit"]
        stored = np.array(Image.open(io.BytesIO(files.pop(".png"))))
        assert not files and stored.dtype == np.uint16 and stored.shape == (5, 7)
        assert np.abs(stored * unit - depth[0].double().numpy()).max() <= unit / 2 * (1 + 1e-9) or unit > largest
        assert stored.all(), "0 is no measurement"
        assert (unit == 0.001) if largest < 65.535 else (0.5 * 65535 <= stored.max() <= 65535)

    def test_the_folder_data_set_reads_it(self, tmp_path: Path) -> None:
        for depth, scale in [(torch.linspace(0.5, 65.4, 12), None), (torch.linspace(0.5, 300, 12), 0.008)]:
            files = make().encode(depth.view(1, 3, 4))
            (tmp_path / "a.png").write_bytes(files[".png"])
            assert json.loads(files.get(".json", b"null")) == (scale and {"metres_per_unit": scale})
            assert LABEL_SIZES["depth"](tmp_path / "a.png") == (3, 4)
            read = read_depth(tmp_path / "a.png", scale)
            assert np.allclose(read, depth.view(3, 4).numpy(), atol=(scale or 0.001) / 2 + 1e-5)

    def test_inverse_depth_states_its_scale(self) -> None:
        depth = torch.tensor([[[0.001, 0.25], [0.5, 3.0]]])
        files = INVERSE.encode(depth)
        (unit,) = json.loads(files[".json"]).values()
        assert list(json.loads(files[".json"])) == ["inverse_depth_per_unit"]
        stored = np.array(Image.open(io.BytesIO(files[".png"])))
        assert np.allclose(stored * unit, depth[0].numpy(), atol=unit / 2 * 1.001) and unit < 1e-4

    def test_what_is_no_number_is_no_measurement(self) -> None:
        files = make().encode(torch.tensor([[[math.nan, 2.0, math.inf]]]))
        assert np.array(Image.open(io.BytesIO(files[".png"]))).tolist() == [[0, 2000, 0]] and ".json" not in files


class TestSoft:
    """What several views or models are averaged in."""

    def test_is_the_prediction(self) -> None:
        outputs = 30 * torch.randn(2, 1, 5, 7)
        assert torch.equal(make().harden(make().soft(outputs)), make().predict(outputs))

    @pytest.mark.parametrize("task", [make(), INVERSE], ids=["depth", "inverse depth"])
    @pytest.mark.parametrize("zoom", [0.5, 1.25])
    @pytest.mark.parametrize("convention", ["metric", "canonical"])
    def test_undoes_what_augmentation_does_to_labels(
        self, task: Depth, zoom: float, convention: DepthConvention
    ) -> None:
        """A model that has learnt the labels of enlarged pictures says nothing new of the picture itself."""
        size = (8, 12)
        depth = torch.linspace(1, 9, 4).view(4, 1, 1, 1).expand(4, 1, *size)
        enlarge = geometry.Warp(geometry.scale(torch.full((4,), zoom), size), torch.zeros(4))
        batch = {"image": torch.zeros(4, 3, *size), "depth": depth}
        seen = warp(batch, enlarge, depth_convention=convention, inverse_depth=task.inverse)["depth"]
        middle = seen[..., 4:5, 6:7]
        assert torch.allclose(task.rescaled(middle, zoom, convention), depth[..., 4:5, 6:7], rtol=1e-5)
        assert torch.allclose(middle, depth[..., 4:5, 6:7]) == (convention == "metric"), "else there is nothing to undo"
