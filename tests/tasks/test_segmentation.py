"""Segmentation against closed forms, plain loops, torch, torchmetrics and smp."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mtl.config import SegmentationOptions
from mtl.data.decoding import LABEL_SIZES, read_segmentation
from mtl.data.sample import IGNORE_INDEX, DataInfo
from mtl.errors import UserError
from mtl.tasks.classes import cross_entropy
from mtl.tasks.colours import OKABE_ITO, class_colours
from mtl.tasks.segmentation import Segmentation, SegmentationMetric, dice_loss

CLASSES = ("wall", "floor", "chair", "sofa")
C = len(CLASSES)
seeds = st.integers(0, 2**32 - 1)


def make(classes: tuple[str, ...] = CLASSES, **options: Any) -> Segmentation:
    return Segmentation(SegmentationOptions(**options), DataInfo("rooms", ("segmentation",), classes))


def draw(seed: int, images: int = 3, size: int = 6, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return logits (images, C, size, size) and labels: some are ignored, and none is the last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, C, size, size, generator=generator)
    target = torch.randint(C - 1, (images, size, size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE_INDEX
    target[0, 0, 0] = 0
    return logits, target.to(torch.uint8)


def measure(*batches: tuple[Tensor, Tensor], classes: tuple[str, ...] = CLASSES) -> dict[str, float]:
    metric = SegmentationMetric(classes)
    for prediction, target in batches:
        metric.update(prediction, target)
    return {name: value.item() for name, value in metric.compute().items()}


def loop_metrics(prediction: np.ndarray, target: np.ndarray, classes: int = C) -> dict[str, float]:
    """Compute the metrics with sets of pixels, class by class."""

    def ious(p: np.ndarray, t: np.ndarray) -> list[float]:
        result = []
        for c in range(classes):
            labelled = t != IGNORE_INDEX
            union = np.sum(((p == c) | (t == c)) & labelled)
            result.append(np.sum((p == c) & (t == c)) / union if union else math.nan)
        return result

    labelled = target != IGNORE_INDEX
    iou = ious(prediction, target)
    recalls = [np.mean(prediction[target == c] == c) for c in range(classes) if np.any(target == c)]
    images = [np.nanmean(ious(p, t)) for p, t in zip(prediction, target, strict=True) if np.any(t != IGNORE_INDEX)]
    return {
        "miou": float(np.nanmean(iou)),
        "pixel_accuracy": float(np.mean(prediction[labelled] == target[labelled])),
        "mean_accuracy": float(np.mean(recalls)),
        "miou_image": float(np.mean(images)),
        **{f"iou/{name}": value for name, value in zip(CLASSES, iou, strict=False)},
    }


class TestMetric:
    def test_closed_form(self) -> None:
        target = torch.tensor([[[0, 0], [1, IGNORE_INDEX]], [[1, 1], [1, 1]]], dtype=torch.uint8)
        prediction = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 2]]])
        # Pooled: wall 1 of 2, floor 4 of 6, chair only predicted (0 of 1), sofa nowhere.
        # Images: (1/2 + 1/2) / 2 and (3/4 + 0) / 2.
        result = measure((prediction, target))
        assert math.isnan(result.pop("iou/sofa"))
        assert result == pytest.approx(
            {
                "miou": (1 / 2 + 4 / 6 + 0) / 3,
                "pixel_accuracy": 5 / 7,
                "mean_accuracy": (1 / 2 + 4 / 5) / 2,
                "miou_image": (1 / 2 + 3 / 8) / 2,
                "iou/wall": 1 / 2,
                "iou/floor": 4 / 6,
                "iou/chair": 0,
            }
        )

    @given(seeds, st.sampled_from([0.0, 0.3, 0.9]))
    @settings(max_examples=40, deadline=None)
    def test_agrees_with_loops(self, seed: int, ignored: float) -> None:
        logits, target = draw(seed, ignored=ignored)
        prediction = logits.argmax(1)
        expected = loop_metrics(prediction.numpy(), target.numpy())
        assert measure((prediction, target)) == pytest.approx(expected, rel=1e-6, nan_ok=True)

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_agrees_with_torchmetrics(self, seed: int) -> None:
        logits, target = draw(seed, size=50)
        prediction = logits.argmax(1)
        prediction[prediction == C - 1] = 0  # the last class is absent on both sides
        result = measure((prediction, target))
        options: dict[str, Any] = {"num_classes": C, "ignore_index": IGNORE_INDEX}
        jaccard = MulticlassJaccardIndex(**options)(prediction, target.long())
        accuracy = MulticlassAccuracy(**options, average="micro")(prediction, target.long())
        recall = MulticlassAccuracy(**options, average="macro")(prediction, target.long())
        assert result["miou"] == pytest.approx(jaccard.item(), rel=1e-6)
        assert result["pixel_accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)
        assert result["mean_accuracy"] == pytest.approx(recall.item(), rel=1e-6)

    @given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=20, deadline=None)
    def test_split_into_batches_does_not_matter(self, seed: int, sizes: list[int]) -> None:
        logits, target = draw(seed, images=sum(sizes))
        prediction = logits.argmax(1)
        split = measure(*zip(prediction.split_with_sizes(sizes), target.split_with_sizes(sizes), strict=True))
        whole = measure((prediction, target))
        assert split == pytest.approx(whole, rel=0, abs=0, nan_ok=True)

    def test_two_processes_make_one(self) -> None:
        logits, target = draw(1, images=5)
        first, second = SegmentationMetric(CLASSES), SegmentationMetric(CLASSES)
        first.update(logits[:2].argmax(1), target[:2])
        second.update(logits[2:].argmax(1), target[2:])
        first.merge_state(second)
        merged = {name: value.item() for name, value in first.compute().items()}
        assert merged == pytest.approx(measure((logits.argmax(1), target)), rel=0, abs=0, nan_ok=True)

    @given(seeds, st.integers(0, C - 1))
    @settings(max_examples=10, deadline=None)
    def test_predictions_at_ignored_pixels_do_not_matter(self, seed: int, garbage: int) -> None:
        logits, target = draw(seed)
        prediction = logits.argmax(1)
        changed = torch.where(target == IGNORE_INDEX, garbage, prediction)
        assert measure((changed, target)) == pytest.approx(measure((prediction, target)), rel=0, abs=0, nan_ok=True)

    def test_perfect(self) -> None:
        _, target = draw(0)
        result = measure((target.long() % IGNORE_INDEX, target))
        assert math.isnan(result.pop("iou/sofa"))
        assert set(result.values()) == {1.0}

    def test_image_without_labels_is_left_out(self) -> None:
        logits, target = draw(3, images=2)
        target[1] = IGNORE_INDEX
        assert measure((logits.argmax(1), target)) == pytest.approx(
            measure((logits[:1].argmax(1), target[:1])), rel=0, abs=0, nan_ok=True
        )

    @pytest.mark.filterwarnings("error")
    def test_nothing_labelled_is_nan(self) -> None:
        target = torch.full((2, 3, 3), IGNORE_INDEX, dtype=torch.uint8)
        assert all(math.isnan(value) for value in measure((torch.zeros(2, 3, 3).long(), target)).values())

    def test_255_classes(self) -> None:
        names = tuple(map(str, range(255)))
        target = torch.arange(256).reshape(1, 16, 16).to(torch.uint8)
        prediction = target.long().clamp(max=254)
        prediction[0, 0, 0] = 254
        result = measure((prediction, target), classes=names)
        # Class 0 is missed, class 254 has one right of two, the other 253 are right; 255 is ignored.
        assert result["miou"] == pytest.approx((253 + 1 / 2) / 255)
        assert result["pixel_accuracy"] == pytest.approx(254 / 255)

    def test_update_never_waits_for_the_device(self) -> None:
        # A meta tensor has no values: anything that asked for one would raise.
        metric = SegmentationMetric(CLASSES).to("meta")
        logits, target = draw(0)
        metric.update(logits.argmax(1).to("meta"), target.to("meta"))
        assert metric.confusion.device.type == "meta"

    def test_half_precision_module_keeps_exact_sums(self) -> None:
        logits, target = draw(5)
        metric = SegmentationMetric(CLASSES).to(torch.bfloat16)
        metric.update(logits.argmax(1), target)
        result = {name: value.item() for name, value in metric.compute().items()}
        assert result == pytest.approx(measure((logits.argmax(1), target)), rel=0, abs=0, nan_ok=True)


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_cross_entropy_agrees_with_torch_on_labelled_pixels(self, smoothing: float, weighted: bool) -> None:
        logits, target = draw(2)
        weights = torch.tensor([0.2, 1.0, 3.0, 0.5]) if weighted else None
        labelled = target != IGNORE_INDEX
        expected = F.cross_entropy(
            logits.permute(0, 2, 3, 1)[labelled], target[labelled].long(), weights, label_smoothing=smoothing
        )
        torch.testing.assert_close(cross_entropy(logits, target.long(), weights, smoothing), expected)

    def test_cross_entropy_of_one_pixel_is_unweighted(self) -> None:
        # The weight of a single pixel cancels, also where it is less than one.
        target = torch.full((1, 2, 2), IGNORE_INDEX)
        target[0, 0, 0] = 1
        loss = cross_entropy(torch.zeros(1, C, 2, 2), target, torch.full((C,), 0.1))
        assert loss.item() == pytest.approx(math.log(C))

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_dice_agrees_with_smp(self, seed: int) -> None:
        logits, target = draw(seed)
        present = [c for c in range(C) if (target == c).any()]
        reference = smp.losses.DiceLoss("multiclass", classes=present, ignore_index=IGNORE_INDEX)
        torch.testing.assert_close(dice_loss(logits, target.long()), reference(logits, target.long()))

    def test_dice_closed_form(self) -> None:
        # Uniform over 4 classes, 3 pixels wall and 1 floor: 2 (3/4) / (1 + 3) and 2 (1/4) / (1 + 1).
        target = torch.tensor([[[0, 0], [0, 1]]])
        expected = 1 - (1.5 / 4 + 0.5 / 2) / 2
        assert dice_loss(torch.zeros(1, C, 2, 2), target).item() == pytest.approx(expected)

    def test_both_is_the_sum(self) -> None:
        logits, target = draw(4)
        batch = {"segmentation": target}
        parts = [make(loss=loss).loss(logits, batch) for loss in ("cross_entropy", "dice")]
        torch.testing.assert_close(make(loss="both").loss(logits, batch), parts[0] + parts[1])

    def test_options_reach_the_loss(self) -> None:
        logits, target = draw(4)
        task = make(class_weights="balanced", label_smoothing=0.2)
        task.observe([target])
        expected = cross_entropy(logits, target.long(), task.class_weights, 0.2)
        torch.testing.assert_close(task.loss(logits, {"segmentation": target}), expected, rtol=0, atol=0)
        assert not torch.isclose(expected, make().loss(logits, {"segmentation": target}))

    @pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
    @pytest.mark.parametrize("missing", ["key", "labels"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_no_label_is_exactly_zero(self, loss: str, missing: str, dtype: torch.dtype) -> None:
        outputs = torch.full((2, C, 64, 64), 100.0, dtype=dtype, requires_grad=True)
        target = torch.full((2, 64, 64), IGNORE_INDEX, dtype=torch.uint8)
        value = make(loss=loss).loss(outputs, {} if missing == "key" else {"segmentation": target})
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.item() == 0 and not gradient.any()

    @pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
    @pytest.mark.parametrize("garbage", [1e4, -1e30])
    def test_outputs_at_ignored_pixels_do_not_matter(self, loss: str, garbage: float) -> None:
        logits, target = draw(7)
        task = make(loss=loss, label_smoothing=0.0 if loss == "dice" else 0.1)
        changed = torch.where((target == IGNORE_INDEX)[:, None], garbage, logits)
        changed[:, 0] = torch.where(target == IGNORE_INDEX, -garbage, logits[:, 0])
        results = []
        for outputs in (logits, changed):
            outputs = outputs.clone().requires_grad_()
            value = task.loss(outputs, {"segmentation": target})
            (gradient,) = torch.autograd.grad(value, outputs)
            results.append((value, gradient))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        assert not results[1][1].permute(0, 2, 3, 1)[target == IGNORE_INDEX].any()

    @pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
    def test_gradient(self, loss: str) -> None:
        logits, target = draw(8, images=2, size=2)
        task = make(loss=loss)
        assert torch.autograd.gradcheck(
            lambda outputs: task.loss(outputs, {"segmentation": target}), logits.double().requires_grad_()
        )

    @pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
    def test_bfloat16_outputs_are_computed_in_float32(self, loss: str) -> None:
        logits, target = draw(9)
        task, batch = make(loss=loss), {"segmentation": target}
        rounded = logits.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            value = task.loss(rounded, batch)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, task.loss(rounded.float(), batch))


class TestPrior:
    def test_balanced_weights_closed_form(self) -> None:
        # First image: 3 wall, 1 floor. Second: 2 floor, 2 chair. Third: 4 unlabelled.
        images = torch.tensor([[[0, 0], [0, 1]], [[1, 1], [2, 2]], [[IGNORE_INDEX] * 2] * 2]).to(torch.uint8)
        task = make(class_weights="balanced")
        task.observe([images[:1], images[1:]])
        frequencies = [3 / 4, 3 / 8, 2 / 4]  # median 1/2; the sofa never occurs
        expected = torch.tensor([*(0.5 / f for f in frequencies), 1.0])
        torch.testing.assert_close(task.class_weights, expected)
        torch.testing.assert_close(task.frequency, torch.tensor([3 / 8, 3 / 8, 2 / 8, 0]))

    def test_bias_starts_at_the_prior(self) -> None:
        task = make()
        _, target = draw(0, images=20)
        task.observe([target])
        bias = task.initial_bias()
        assert bias.shape == (C,) and bias.mean().abs() < 1e-6
        shares = [(target == c).sum() / (target != IGNORE_INDEX).sum() for c in range(C)]
        torch.testing.assert_close(bias.softmax(0), torch.stack(shares), atol=0.011, rtol=0)
        assert make().initial_bias().abs().max() == 0

    @given(seeds)
    @settings(max_examples=10, deadline=None)
    def test_constant_is_the_best_constant(self, seed: int) -> None:
        _, target = draw(seed)
        task = make()
        task.observe([target])
        constant = task.constant(target)
        assert constant.shape == target.shape and constant.dtype == torch.int64
        accuracies = [measure((torch.full_like(constant, c), target))["pixel_accuracy"] for c in range(C)]
        assert measure((constant, target))["pixel_accuracy"] == max(accuracies)

    def test_travels_in_the_state(self) -> None:
        task, other = make(), make()
        task.observe([draw(1)[1]])
        other.load_state_dict(task.state_dict())
        torch.testing.assert_close(other.initial_bias(), task.initial_bias(), rtol=0, atol=0)
        torch.testing.assert_close(other.class_weights, task.class_weights, rtol=0, atol=0)
        assert not torch.equal(other.class_weights, make().class_weights)

    def test_no_labels_at_all(self) -> None:
        for chunks in ([], [torch.full((2, 3, 3), IGNORE_INDEX, dtype=torch.uint8)]):
            with pytest.raises(UserError, match=r"no sample has a label for the task 'segmentation'.*'rooms'"):
                make().observe(chunks)

    def test_label_outside_the_classes(self) -> None:
        with pytest.raises(UserError, match="class index 9, but its 4 classes are 0 to 3"):
            make().observe([torch.tensor([[[0, 9]]], dtype=torch.uint8)])


class TestTask:
    def test_predicts_the_largest_logit(self) -> None:
        logits, _ = draw(0)
        prediction = make().predict(logits.bfloat16())
        assert prediction.dtype == torch.int64
        assert torch.equal(prediction, torch.from_numpy(logits.bfloat16().float().numpy().argmax(1)))

    def test_metric_names_and_directions(self) -> None:
        task = make()
        metric = task.metrics()
        metric.update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2))
        names = metric.compute().keys()
        assert {n if "/" not in n else n.split("/")[0] + "/*" for n in names} == task.higher_is_better.keys()
        assert task.main_metric in names
        assert task.remaining_error({"miou": 0.75}) == 0.25

    @pytest.mark.parametrize("names", [(), ("one",), tuple(map(str, range(256)))])
    def test_number_of_classes(self, names: tuple[str, ...]) -> None:
        with pytest.raises(UserError, match=f"names {len(names)} classes"):
            make(names)

    def test_class_names_differ(self) -> None:
        with pytest.raises(UserError, match="more than one class called 'a'"):
            make(("a", "b", "a"))

    def test_dice_has_no_weights_to_ignore(self) -> None:
        for options in ({"label_smoothing": 0.1}, {"class_weights": "balanced"}):
            with pytest.raises(ValueError, match="act on the cross-entropy"):
                SegmentationOptions.model_validate({"loss": "dice", **options})


class TestPictures:
    def test_colours(self) -> None:
        target = torch.tensor([[[0, 1], [2, IGNORE_INDEX]]], dtype=torch.uint8)
        prediction = torch.tensor([[[0, 2], [2, 1]]])
        panels = make().pictures(prediction, target)
        colours = class_colours(C)
        assert list(panels) == ["segmentation target", "segmentation prediction", "segmentation error"]
        assert all(panel.scale is None for panel in panels.values())
        drawn_target, drawn_prediction, error = (panel.images for panel in panels.values())
        assert (drawn_target == np.array([[[colours[0], colours[1]], [colours[2], [0, 0, 0]]]])).all()
        assert (drawn_prediction == colours[prediction.numpy()]).all()
        right, wrong = error[0, 0]
        assert right.tolist() == [128] * 3 and wrong.tolist() == [255] * 3
        assert (error[0, 1, 0] == right).all() and not error[0, 1, 1].any()
        assert all(p.dtype == np.uint8 and p.shape == (1, 2, 2, 3) for p in (drawn_target, drawn_prediction, error))

    def test_without_target(self) -> None:
        assert list(make().pictures(torch.zeros(1, 2, 2).long(), None)) == ["segmentation prediction"]

    @pytest.mark.parametrize("classes", [2, 13, 40, 255])
    def test_files_hold_indices_and_colours(self, classes: int, tmp_path: Path) -> None:
        task = make(tuple(f"class {i}" for i in range(classes)))
        prediction = torch.arange(3 * 85).view(3, 85) % classes
        ((suffix, content),) = task.encode(prediction).items()
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        assert content[24:26] == bytes([8, 3]), "IHDR says 8 bits a pixel and a palette"
        assert LABEL_SIZES["segmentation"](path) == (3, 85)
        assert (read_segmentation(path, classes, IGNORE_INDEX) == prediction.numpy()).all()
        with Image.open(path) as picture:
            assert (np.array(picture.convert("RGB")) == class_colours(classes)[prediction.numpy()]).all()

    def test_palette(self) -> None:
        colours = class_colours(256)
        assert (colours[:7] == OKABE_ITO).all()
        assert (class_colours(13) == colours[:13]).all()
        assert len(np.unique(colours, axis=0)) == 256
        # Thirteen classes, black and grey stay apart by a wide margin in plain sRGB as well.
        used = np.vstack([colours[:13], [[0, 0, 0], [128, 128, 128]]]).astype(float)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(used, 2)) > 40


class TestSoft:
    """What several views or models are averaged in."""

    @given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    @settings(max_examples=30, deadline=None)
    def test_the_likeliest_class_is_that_of_the_largest_logit(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Distinct within a pixel by more than rounding, in any order, on any offset.
        logits = torch.rand(2, C, 5, 7, generator=generator).argsort(dim=1) / 8 + torch.randint(9, (2, 1, 5, 7))
        soft = make().soft(logits.to(dtype))
        assert soft.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.allclose(soft.sum(dim=1), torch.ones_like(soft[:, 0])) and (soft >= 0).all()
        assert torch.equal(make().harden(soft), make().predict(logits.to(dtype)))

    def test_is_the_softmax(self) -> None:
        """The odds of two classes are the exponential of their logits' difference."""
        soft = make(("a", "b")).soft(torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1))
        assert soft.flatten().tolist() == pytest.approx([0.75, 0.25])
