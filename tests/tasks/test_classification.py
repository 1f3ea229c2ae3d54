"""Classification against torch, torchmetrics and what was written down by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from mtl.data.sample import IGNORE_INDEX, DataInfo
from mtl.errors import UserError
from mtl.tasks.classification import Classification, ClassificationMetric
from mtl.tasks.colours import class_colours

CLASSES = ("cat", "dog", "fox")
INFO = DataInfo("pets", ("label",), CLASSES)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, count: int = 40, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return logits (count, 3) and labels (count,), the first two known, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    unknown = torch.rand(count, generator=generator) < ignored
    unknown[:2] = False
    return 2 * torch.randn(count, 3, generator=generator), torch.where(unknown, IGNORE_INDEX, labels)


def measure(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metric = Classification(INFO).metrics()
    for prediction, target in batches:
        metric.update(prediction, target)
    return {name: value.item() for name, value in metric.compute().items()}


class TestLoss:
    @given(seeds, st.sampled_from([0.0, 0.1, 0.9]))
    @settings(max_examples=20, deadline=None)
    def test_is_the_cross_entropy_with_smoothed_labels(self, seed: int, smoothing: float) -> None:
        """Szegedy et al. 2016, section 7: the label is one-hot, with a share of the uniform distribution."""
        logits, target = draw(seed)
        known = target != IGNORE_INDEX
        labels = (1 - smoothing) * F.one_hot(target[known], 3) + smoothing / 3
        expected = -(labels * logits[known].log_softmax(dim=1)).sum(dim=1).mean()
        loss = Classification(INFO, smoothing).loss(logits, {"label": target})
        torch.testing.assert_close(loss, expected)

    def test_ignored_samples_have_no_gradient(self) -> None:
        logits, target = draw(1)
        logits.requires_grad_()
        Classification(INFO, 0.1).loss(logits, {"label": target}).backward()
        assert torch.equal(logits.grad.any(dim=1), target != IGNORE_INDEX)

    @pytest.mark.parametrize("labels", [{}, {"label": torch.full((40,), IGNORE_INDEX)}])
    def test_without_labels_it_is_zero_and_attached(self, labels: dict[str, Tensor]) -> None:
        logits = draw(2)[0].requires_grad_()
        task = Classification(INFO)
        loss = task.loss(logits, labels)
        loss.backward()
        assert loss == 0 and not logits.grad.any() and not task.labelled(labels)

    def test_labelled_by_a_single_sample(self) -> None:
        labels = torch.full((40,), IGNORE_INDEX)
        labels[7] = 0
        known = Classification(INFO).labelled({"label": labels})
        assert known.shape == () and known.dtype == torch.bool and known

    def test_half_precision_is_computed_in_single(self) -> None:
        logits, target = draw(3)
        task, rounded = Classification(INFO), logits.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            loss, soft = task.loss(rounded, {"label": target}), task.soft(rounded)
        assert loss.dtype == soft.dtype == torch.float32
        torch.testing.assert_close(loss, task.loss(rounded.float(), {"label": target}))


class TestPrior:
    def test_frequencies_and_the_majority(self) -> None:
        task = Classification(INFO)
        task.observe([torch.tensor([2, 0, IGNORE_INDEX]), torch.tensor([2, 2], dtype=torch.uint8)])
        torch.testing.assert_close(task.frequency, torch.tensor([0.25, 0.0, 0.75]))
        constant = task.constant(torch.tensor([0, 1, 2, IGNORE_INDEX]))
        assert constant.dtype == torch.int64 and constant.tolist() == [2, 2, 2, 2]
        again = Classification(INFO)
        again.load_state_dict(task.state_dict())
        assert torch.equal(again.constant(constant), constant)

    def test_bias_starts_at_the_prior(self) -> None:
        task = Classification(INFO)
        assert not task.initial_bias().any()
        task.observe([torch.tensor([0] * 6 + [1] * 4)])
        bias = task.initial_bias()
        assert bias.shape == (3,) and bias.isfinite().all() and bias.mean().abs() < 1e-6
        torch.testing.assert_close(task.soft(bias[None])[0], torch.tensor([0.6, 0.4, 0.0]), atol=0.01, rtol=0)

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            ([], "no sample has a label for the task 'classification' .* 'pets'"),
            ([torch.full((3,), IGNORE_INDEX)], "no sample has a label"),
            ([torch.tensor([0, 3])], "labels of 'pets' hold the class index 3, but its 3 classes are 0 to 2"),
            ([torch.tensor([0, -1])], "hold the class index -1"),
        ],
    )
    def test_labels_that_cannot_be(self, labels: list[Tensor], said: str) -> None:
        with pytest.raises(UserError, match=said):
            Classification(INFO).observe(labels)


class TestPrediction:
    def test_soft_is_probabilities_and_hard_is_the_likeliest(self) -> None:
        task, (logits, _) = Classification(INFO), draw(4)
        soft = task.soft(logits)
        assert soft.shape == logits.shape
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(40))
        torch.testing.assert_close(soft.log() - soft.log().mean(1, True), logits - logits.mean(1, True))
        assert task.predict(logits).dtype == torch.int64 and task.predict(logits).shape == (40,)
        assert torch.equal(task.harden(soft), task.predict(logits))

    def test_a_mean_of_models_is_of_probabilities(self) -> None:
        """Two that lean to the first class are outweighed by one that is sure of another."""
        task = Classification(INFO)
        logits = torch.tensor([[[0.1, 0.0, -9.0]], [[0.1, 0.0, -9.0]], [[-9.0, 2.0, -9.0]]])
        assert task.harden(task.soft(logits.flatten(0, 1)).mean(dim=0, keepdim=True)).item() == 1

    def test_a_mirror_image_is_of_the_same_class(self) -> None:
        task = Classification(INFO)
        soft = task.soft(draw(5)[0])
        assert torch.equal(task.mirrored(soft), soft) and torch.equal(task.rescaled(soft, 2.0), soft)

    def test_file_is_the_name_of_the_class(self) -> None:
        assert Classification(INFO).encode(torch.tensor(2)) == {".txt": b"fox\n"}


class TestMetric:
    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_torch_and_torchmetrics(self, seed: int) -> None:
        logits, target = draw(seed)
        task = Classification(INFO)
        results = measure(*zip(task.soft(logits).split(13), target.split(13), strict=True))
        accuracy = MulticlassAccuracy(3, average="micro", ignore_index=IGNORE_INDEX)(logits, target).item()
        assert results["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert results["error"] == pytest.approx(1 - accuracy, abs=1e-6)
        expected = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX).item()
        assert results["cross_entropy"] == pytest.approx(expected, rel=1e-5)
        assert task.remaining_error(results) == results["error"]

    def test_of_classes_alone_there_is_no_cross_entropy(self) -> None:
        task, (logits, target) = Classification(INFO), draw(6)
        soft, hard = measure((task.soft(logits), target)), measure((task.predict(logits), target))
        assert math.isnan(hard.pop("cross_entropy"))
        assert hard == {name: soft[name] for name in hard}

    def test_a_certain_mistake_is_finite(self) -> None:
        assert measure((torch.tensor([[1.0, 0.0]]), torch.tensor([1])))["cross_entropy"] == pytest.approx(
            126 * math.log(2)
        )

    def test_nothing_labelled(self) -> None:
        soft = Classification(INFO).soft(draw(7)[0])
        assert all(math.isnan(value) for value in measure((soft, torch.full((40,), IGNORE_INDEX))).values())

    def test_the_majority_is_the_best_constant(self) -> None:
        task, (_, target) = Classification(INFO), draw(8)
        task.observe([target])
        errors = [measure((torch.full_like(target, c), target))["error"] for c in range(3)]
        assert measure((task.constant(target), target))["error"] == min(errors) < max(errors)

    def test_names(self) -> None:
        assert set(measure()) == set(Classification.higher_is_better)
        assert isinstance(Classification(INFO).metrics(), ClassificationMetric)


class TestPictures:
    def test_a_cell_a_class(self) -> None:
        prediction, target = torch.tensor([0, 2, 1]), torch.tensor([0, 1, IGNORE_INDEX])
        panels = Classification(INFO).pictures(prediction, target)
        names = ["target", "prediction", "error"]
        assert list(panels) == [f"classification {name}" for name in names]
        cells = {}
        for name, panel in zip(names, panels.values(), strict=True):
            images = panel.images
            assert images.dtype == np.uint8 and images.shape == (3, 8, 24, 3)
            cells[name] = images[:, 0, ::8]
            assert np.array_equal(cells[name].repeat(8, axis=1)[:, None].repeat(8, axis=1), images)
        black, colours = (0, 0, 0), [tuple(colour) for colour in class_colours(3).tolist()]

        def row(place: int | None, colour: tuple[int, ...] = black) -> list[tuple[int, ...]]:
            return [colour if c == place else black for c in range(3)]

        def tuples(name: str) -> list[list[tuple[int, ...]]]:
            return [[tuple(cell) for cell in sample] for sample in cells[name].tolist()]

        assert tuples("target") == [row(0, colours[0]), row(1, colours[1]), row(None)]
        assert tuples("prediction") == [row(0, colours[0]), row(2, colours[2]), row(1, colours[1])]
        assert tuples("error") == [row(0, (128, 128, 128)), row(2, (255, 255, 255)), row(None)]

    def test_without_a_target_the_prediction_alone(self) -> None:
        assert list(Classification(INFO).pictures(torch.tensor([1]), None)) == ["classification prediction"]


class TestRefused:
    @pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
    def test_smoothing(self, smoothing: float) -> None:
        with pytest.raises(UserError, match=r"label_smoothing of .*at least 0 and less than 1"):
            Classification(INFO, smoothing)

    @pytest.mark.parametrize("count", [0, 1, 256])
    def test_number_of_classes(self, count: int) -> None:
        with pytest.raises(UserError, match=f"'pets' names {count} classes, but .* 2 to 255"):
            Classification(DataInfo("pets", ("label",), tuple(map(str, range(count)))))
