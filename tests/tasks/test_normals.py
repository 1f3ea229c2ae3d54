"""Normals against rotations by known angles, closed forms, NumPy and the reader of the `folder` data set."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from mtl.augmentation.geometry import Warp, hflip, scale
from mtl.augmentation.resampling import warp
from mtl.data.decoding import read_normals
from mtl.data.sample import DataInfo, DepthConvention
from mtl.errors import UserError
from mtl.tasks.normals import SHORTEST, Normals, NormalsMetric, angles, directions

seeds = st.integers(0, 2**32 - 1)
RESOLUTION = 0.005 + 1e-4
"""Half a bin of the histogram, in degrees, and rounding."""


def make() -> Normals:
    return Normals(DataInfo("rooms", ("normals",)))


def field(vectors: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Return vectors (N, 3) as a batch (B, 3, H, W)."""
    return torch.from_numpy(vectors.reshape(*shape, 3)).permute(0, 3, 1, 2).float()


def draw(seed: int, images: int = 3, size: int = 9, invalid: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return predictions and labels (images, 3, size, size), a share of the labels invalid."""
    generator = torch.Generator().manual_seed(seed)
    target = directions(torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)).float()
    prediction = directions(target + 0.4 * torch.randn(target.shape, generator=generator))
    target = target * (torch.rand(images, 1, size, size, generator=generator) >= invalid)
    target[0, :, 0, 0] = torch.tensor([0.0, 0.6, -0.8])
    return prediction, target


def turned(degrees: np.ndarray, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return predictions and labels that SciPy has turned from one another by known angles (N,)."""
    random = np.random.default_rng(0)
    target = random.normal(size=(len(degrees), 3))
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    axis = np.cross(target, random.normal(size=target.shape))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    prediction = Rotation.from_rotvec(np.radians(degrees)[:, None] * axis).apply(target)
    return field(prediction, shape), field(target, shape)


def measure(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metric = NormalsMetric()
    for prediction, target in batches:
        metric.update(prediction, target)
    return {name: value.item() for name, value in metric.compute().items()}


def numpy_angles(prediction: Tensor, target: Tensor) -> list[np.ndarray]:
    """Return each image's angles in degrees at labelled pixels, by the arc cosine in double precision."""
    p, t = prediction.double().numpy(), target.double().numpy()
    lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
    with np.errstate(invalid="ignore"):
        degrees = np.degrees(np.arccos(np.clip((p * t).sum(axis=1) / lengths, -1, 1)))
    return [image[label] for image, label in zip(degrees, t.any(axis=1), strict=True)]


class TestAngles:
    @pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
    def test_known_rotations(self, scale: float) -> None:
        expected = np.array([0, 1e-4, 0.01, 0.3, 11.25, 45, 89.99, 90, 135, 179.9, 179.999, 180])
        prediction, target = turned(expected, (1, 1, 12))
        assert np.allclose(angles(scale * prediction, target).flatten(), expected, rtol=0, atol=2e-5)

    def test_what_is_no_direction_is_opposite(self) -> None:
        target = directions(torch.ones(1, 3, 1, 1))
        for prediction in (torch.zeros_like(target), torch.full_like(target, math.nan)):
            assert angles(prediction, target).item() == pytest.approx(180)


class TestMetric:
    def test_closed_form(self) -> None:
        degrees = np.array([0, 10, 20, 25, 60, 120.0])
        prediction, target = turned(degrees, (2, 1, 3))
        assert measure((prediction, target)) == pytest.approx(
            {
                "mean_angle": 235 / 6,
                "median_angle": 22.5,
                "rmse_angle": math.sqrt((100 + 400 + 625 + 3600 + 14400) / 6),
                "within_11.25": 2 / 6,
                "within_22.5": 3 / 6,
                "within_30": 4 / 6,
                "mean_angle_image": 235 / 6,
            },
            abs=1e-4,
        )
        # Without the first image's last label, images weigh differently, and the middle is one pixel.
        target[0, :, 0, 2] = 0
        result = measure((prediction, target))
        assert result["mean_angle"] == pytest.approx(215 / 5, abs=1e-4)
        assert result["mean_angle_image"] == pytest.approx((5 + 205 / 3) / 2, abs=1e-4)
        assert result["median_angle"] == pytest.approx(25, abs=RESOLUTION)

    @pytest.mark.parametrize("limit", [11.25, 22.5, 30])
    def test_shares_change_at_their_limit(self, limit: float) -> None:
        prediction, target = turned(limit + np.array([-1, -0.001, 0.001, 1]), (1, 2, 2))
        assert measure((prediction, target))[f"within_{limit:g}"] == 0.5

    @given(seeds, st.sampled_from([0.0, 0.3, 0.9]))
    @settings(max_examples=30, deadline=None)
    def test_agrees_with_numpy(self, seed: int, invalid: float) -> None:
        prediction, target = draw(seed, invalid=invalid)
        images = numpy_angles(prediction, target)
        pooled = np.concatenate(images)
        result = measure((prediction, target))
        assert result.pop("median_angle") == pytest.approx(np.median(pooled), abs=RESOLUTION)
        assert result == pytest.approx(
            {
                "mean_angle": pooled.mean(),
                "rmse_angle": np.sqrt((pooled**2).mean()),
                **{f"within_{limit:g}": (pooled < limit).mean() for limit in (11.25, 22.5, 30)},
                "mean_angle_image": np.mean([image.mean() for image in images if len(image)]),
            },
            abs=1e-4,
        )

    @given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=20, deadline=None)
    def test_split_into_batches_does_not_matter(self, seed: int, sizes: list[int]) -> None:
        prediction, target = draw(seed, images=sum(sizes))
        split = measure(*zip(prediction.split_with_sizes(sizes), target.split_with_sizes(sizes), strict=True))
        assert split == measure((prediction, target))

    def test_the_place_in_a_batch_does_not_round_an_angle(self) -> None:
        """In single precision this case differs: the last pixels of a batch are computed by other instructions."""
        sizes = [1, 5, 5, 5]
        prediction, target = draw(32815558, images=sum(sizes))
        split = measure(*zip(prediction.split_with_sizes(sizes), target.split_with_sizes(sizes), strict=True))
        assert split == measure((prediction, target))

    def test_two_processes_make_one(self) -> None:
        prediction, target = draw(1, images=5)
        first, second = NormalsMetric(), NormalsMetric()
        first.update(prediction[:2], target[:2])
        second.update(prediction[2:], target[2:])
        first.merge_state(second)
        assert {name: v.item() for name, v in first.compute().items()} == measure((prediction, target))

    @given(seeds, st.sampled_from([0.0, 1e30, math.inf, math.nan]))
    @settings(max_examples=20, deadline=None)
    def test_predictions_at_invalid_pixels_do_not_matter(self, seed: int, garbage: float) -> None:
        prediction, target = draw(seed)
        changed = torch.where(target.any(dim=1, keepdim=True), prediction, garbage)
        assert measure((changed, target)) == measure((prediction, target))

    def test_label_whose_components_sum_to_zero_counts(self) -> None:
        target = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1) / math.sqrt(2)
        assert measure((-target, target))["mean_angle"] == pytest.approx(180)

    def test_labels_rounded_in_storage_are_no_error(self) -> None:
        _, target = draw(2)
        # The arc cosine of their product, clamped to 1, would be off by up to 2 degrees.
        assert measure((target, target.half()))["mean_angle"] < 0.03

    def test_image_without_labels_is_left_out(self) -> None:
        prediction, target = draw(3, images=2)
        target[1] = 0
        assert measure((prediction, target)) == measure((prediction[:1], target[:1]))

    def test_perfect_and_opposite(self) -> None:
        target = directions(torch.randn(2, 3, 8, 8))
        best, worst = measure((target, target)), measure((-target, target))
        assert best == {name: float(name.startswith("within")) for name in best}
        assert worst == pytest.approx({name: 180 * (not name.startswith("within")) for name in worst}, abs=1e-3)

    @given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
    @settings(max_examples=10, deadline=None)
    @pytest.mark.filterwarnings("error")
    def test_nothing_valid_is_nan(self, images: int, height: int, width: int) -> None:
        result = measure((torch.ones(images, 3, height, width), torch.zeros(images, 3, height, width)))
        assert len(result) == 7 and all(math.isnan(value) for value in result.values())

    def test_update_never_waits_for_the_device(self) -> None:
        # A meta tensor has no values: anything that asked for one would raise.
        metric = NormalsMetric().to("meta")
        prediction, target = draw(0)
        metric.update(make().predict(prediction.to("meta")), target.to("meta"))
        assert metric.histogram.device.type == "meta"

    def test_half_precision_module_keeps_exact_sums(self) -> None:
        prediction, target = draw(5)
        metric = NormalsMetric().to(torch.bfloat16)
        for _ in range(3):
            metric.update(prediction, target)
        metric.half()
        assert {name: v.item() for name, v in metric.compute().items()} == measure(*[(prediction, target)] * 3)

    def test_many_pixels_lose_nothing(self) -> None:
        """Sums far beyond what float32 counts to: 10^9 pixels 90 degrees off, then one that is right."""
        metric = NormalsMetric()
        wrong, right = turned(np.array([90.0]), (1, 1, 1))
        metric.update(wrong, right)
        for state in (metric.sums, metric.histogram):
            state *= 10**9
        assert metric.compute()["rmse_angle"].item() == pytest.approx(90, rel=1e-6)
        before = metric.sums[0].item(), metric.sums[-1].item()
        metric.update(right, right)
        assert (metric.sums[0].item(), metric.sums[-1].item()) == (before[0] + 1, before[1] + 1)


class TestLoss:
    @pytest.mark.parametrize("length", [SHORTEST, 1.0, 300.0])
    def test_closed_form(self, length: float) -> None:
        degrees = np.array([0, 60, 90, 180.0])
        prediction, target = turned(degrees, (2, 1, 2))
        loss = make().loss(length * prediction, {"normals": target})
        assert loss.item() == pytest.approx(np.mean(1 - np.cos(np.radians(degrees))), abs=1e-6)
        target[1, :, 0, 1] = 0  # the opposite one: 0, 1/2 and 1 remain
        assert make().loss(prediction, {"normals": target}).item() == pytest.approx(0.5, abs=1e-6)

    @given(seeds)
    @settings(max_examples=10, deadline=None)
    def test_is_half_the_squared_distance(self, seed: int) -> None:
        prediction, target = draw(seed)
        squares = ((prediction - target) ** 2).sum(dim=1)[target.any(dim=1)]
        assert make().loss(7 * prediction, {"normals": target}).item() == pytest.approx(
            squares.double().mean().item() / 2, rel=1e-4
        )

    def test_length_of_labels_does_not_matter(self) -> None:
        prediction, target = draw(4)
        loss = make().loss(prediction, {"normals": target})
        torch.testing.assert_close(make().loss(prediction, {"normals": 1.01 * target}), loss)

    @pytest.mark.parametrize("missing", ["key", "labels"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("output", [0.0, 100.0])
    def test_no_label_is_exactly_zero(self, missing: str, dtype: torch.dtype, output: float) -> None:
        outputs = torch.full((2, 3, 64, 64), output, dtype=dtype, requires_grad=True)
        batch = {} if missing == "key" else {"normals": torch.zeros(2, 3, 64, 64)}
        value = make().loss(outputs, batch)
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.item() == 0 and not gradient.any()

    @pytest.mark.parametrize("garbage", [0.0, 1e30, -1e30, math.inf, math.nan])
    def test_outputs_at_invalid_pixels_do_not_matter(self, garbage: float) -> None:
        original, target = draw(7)
        valid = target.any(dim=1, keepdim=True)
        results = []
        for outputs in (original, torch.where(valid, original, garbage)):
            outputs = outputs.clone().requires_grad_()
            value = make().loss(outputs, {"normals": target})
            (gradient,) = torch.autograd.grad(value, outputs)
            results.append((value, gradient))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        assert not results[1][1][~valid.expand_as(target)].any()

    def test_gradient_at_zero_is_finite_and_turns_to_the_label(self) -> None:
        _, target = draw(0, images=1, invalid=0)
        outputs = torch.zeros_like(target, requires_grad=True)
        value = make().loss(outputs, {"normals": target})
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.item() == 1
        torch.testing.assert_close(-gradient * 81, target / SHORTEST, rtol=1e-5, atol=1e-3)

    def test_gradient_has_the_bound_of_the_shortest_output(self) -> None:
        _, target = draw(0, images=1, invalid=0)
        for length in (0.0, SHORTEST / 3, SHORTEST, 3 * SHORTEST):
            outputs = (length * directions(torch.randn(target.shape))).requires_grad_()
            (gradient,) = torch.autograd.grad(make().loss(outputs, {"normals": target}), outputs)
            assert (gradient * 81).norm(dim=1).max() <= 1.0001 / SHORTEST

    def test_gradient(self) -> None:
        prediction, target = draw(8, images=2, size=3)
        outputs = (2 * prediction).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda outputs: make().loss(outputs, {"normals": target.double()}), outputs)

    def test_descent_arrives(self) -> None:
        _, target = draw(6)
        outputs = torch.zeros_like(target, requires_grad=True)
        optimizer = torch.optim.Adam([outputs], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            make().loss(outputs, {"normals": target}).backward()
            optimizer.step()
        assert measure((make().predict(outputs.detach()), target))["mean_angle"] < 1

    def test_bfloat16_outputs_are_computed_in_float32(self) -> None:
        outputs, target = draw(9)
        task, outputs = make(), outputs.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            value = task.loss(outputs, {"normals": target})
            assert task.predict(outputs).dtype == torch.float32
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, task.loss(outputs.float(), {"normals": target}))


class TestPrior:
    @given(seeds, st.integers(1, 4))
    @settings(max_examples=10, deadline=None)
    def test_direction_of_the_sum_over_labelled_pixels(self, seed: int, chunk: int) -> None:
        _, target = draw(seed, images=4)
        stored = target.half()
        task = make()
        task.observe(torch.split(stored, chunk))
        total = target.double().numpy().sum(axis=(0, 2, 3))
        expected = total / np.linalg.norm(total)
        assert np.allclose(task.mean_direction.numpy(), expected, atol=2e-3)
        constant = task.constant(target)
        assert constant.shape == target.shape
        assert np.allclose(constant[2, :, 3, 1].numpy(), expected, atol=2e-3)

    def test_no_constant_has_less_loss(self) -> None:
        _, target = draw(3)
        task = make()
        task.observe([target])
        least = task.loss(task.constant(target), {"normals": target})
        for other in torch.randn(50, 3, 1, 1):
            assert task.loss(other.expand_as(target), {"normals": target}) >= least - 1e-6

    def test_directions_that_cancel_face_the_camera(self) -> None:
        task = make()
        task.observe([torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).reshape(2, 3, 1, 1)])
        assert task.mean_direction.tolist() == [0, 0, -1]

    def test_bias_is_predicted_as_the_mean(self) -> None:
        task = make()
        task.observe([draw(1)[1]])
        bias = task.initial_bias()
        assert bias.shape == (3,)
        torch.testing.assert_close(task.predict(bias.reshape(1, 3, 1, 1)).flatten(), task.mean_direction)

    def test_travels_in_the_state(self) -> None:
        task, other = make(), make()
        task.observe([draw(0)[1]])
        other.load_state_dict(task.state_dict())
        assert torch.equal(other.mean_direction, task.mean_direction)
        assert not torch.equal(other.mean_direction, make().mean_direction)

    def test_no_labels_at_all(self) -> None:
        for chunks in ([], [torch.zeros(2, 3, 3, 3)]):
            with pytest.raises(UserError, match=r"no sample has a label for the task 'normals'.*'rooms'"):
                make().observe(chunks)


class TestTask:
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
    @settings(deadline=None)
    def test_every_finite_output_is_predicted_as_its_direction(self, output: list[float]) -> None:
        vector = np.array(output)
        prediction = make().predict(torch.tensor(output).reshape(1, 3, 1, 1)).flatten().numpy()
        expected = vector / np.linalg.norm(vector) if vector.any() else np.array([0, 0, -1])
        # The smallest numbers of float32 have few digits, and some devices have none of them.
        if not vector.any() or np.abs(vector).max() > 1e-37:
            assert np.allclose(prediction, expected, atol=1e-6)
        assert np.linalg.norm(prediction) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_zero_faces_the_camera(self, dtype: torch.dtype) -> None:
        prediction = make().predict(torch.zeros(1, 3, 2, 2, dtype=dtype))
        assert prediction.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(prediction[0, :, 1, 0], torch.tensor([0, 0, -1], dtype=prediction.dtype))

    def test_metric_names_and_directions(self) -> None:
        task = make()
        metric = task.metrics()
        metric.update(*draw(0))
        result = metric.compute()
        assert result.keys() == task.higher_is_better.keys()
        assert task.main_metric in result
        assert all(higher == name.startswith("within") for name, higher in task.higher_is_better.items())
        assert task.remaining_error({"mean_angle": 20.5}) == 20.5


class TestPictures:
    def test_colours_of_known_surfaces(self) -> None:
        """In the literature's pictures a facing wall is light blue, a floor green, a right-facing wall red."""
        facing, floor, right = [0, 0, -1], [0, -1, 0], [1, 0, 0]
        target = torch.tensor([facing, floor, right, [0, 0, 0]]).float().T.reshape(1, 3, 1, 4)
        prediction = make().predict(torch.where(target.any(dim=1, keepdim=True), target, 1))
        pictures = make().pictures(prediction, target)
        assert list(pictures) == ["normals target", "normals prediction", "normals error"]
        expected = [[128, 128, 255], [128, 255, 128], [255, 128, 128]]
        assert pictures["normals target"].images[0, 0].tolist() == [*expected, [0, 0, 0]]
        assert pictures["normals prediction"].images[0, 0, :3].tolist() == expected
        assert pictures["normals target"].scale is None is pictures["normals prediction"].scale

    def test_error_is_darker_where_it_is_larger_and_black_where_unknown(self) -> None:
        prediction, target = turned(np.array([0, 30, 60, 90, 120, 45.0]), (1, 1, 6))
        target[..., 5] = 0
        error = make().pictures(prediction, target)["normals error"]
        assert error.scale is not None
        assert error.scale[:3] == (0, 90, "degrees")
        assert error.images.dtype == np.uint8 and error.images.shape == (1, 1, 6, 3)
        brightness = error.images[0, 0].sum(axis=-1, dtype=int)
        assert (np.diff(brightness[:4]) < 0).all() and brightness[4] == brightness[3] and brightness[5] == 0

    def test_without_target_or_labels(self) -> None:
        prediction, target = draw(0)
        assert list(make().pictures(prediction, None)) == ["normals prediction"]
        pictures = make().pictures(prediction, torch.zeros_like(target))
        assert not pictures["normals target"].images.any() and not pictures["normals error"].images.any()


class TestFiles:
    @given(seeds)
    @settings(max_examples=10, deadline=None)
    def test_the_folder_data_set_reads_it_back(self, tmp_path_factory: Any, seed: int) -> None:
        prediction = directions(torch.randn(1, 3, 20, 30, generator=torch.Generator().manual_seed(seed)))
        ((suffix, content),) = make().encode(prediction[0]).items()
        assert suffix == ".png"
        path: Path = tmp_path_factory.mktemp("normals") / "0.png"
        path.write_bytes(content)
        read = torch.from_numpy(read_normals(path)).permute(2, 0, 1)[None]
        assert read.shape == prediction.shape
        error = np.concatenate(numpy_angles(read, prediction))
        assert error.max() < 0.39 and error.mean() < 0.2


class TestSoft:
    """What several views or models are averaged in."""

    def test_is_the_prediction(self) -> None:
        outputs = torch.randn(2, 3, 5, 7) * torch.tensor([1e-20, 1, 1e20]).view(3, 1, 1)
        outputs[0, :, 0, 0] = 0
        assert torch.allclose(make().harden(make().soft(outputs)), make().predict(outputs), atol=1e-7)

    def test_opposite_votes_face_the_camera(self) -> None:
        one = directions(torch.randn(1, 3, 1, 1))
        assert make().harden((one - one) / 2).flatten().tolist() == [0, 0, -1]

    def test_mirror_image(self) -> None:
        """Undoes what augmentation does to labels; twice is not at all."""
        normals = directions(torch.randn(2, 3, 5, 7))
        mirror = Warp(hflip(torch.ones(2, dtype=torch.bool), (5, 7)), torch.zeros(2))
        seen = warp({"image": torch.zeros(2, 3, 5, 7), "normals": normals}, mirror)["normals"]
        assert torch.equal(make().mirrored(seen), normals) and not torch.equal(seen, normals)
        left = torch.tensor([[-0.6, 0.0, -0.8], [0.0, 0.0, -1.0]]).T.reshape(1, 3, 1, 2)
        assert make().mirrored(left)[0, :, 0].T.tolist() == pytest.approx(np.array([[0, 0, -1], [0.6, 0, -0.8]]))

    @pytest.mark.parametrize("zoom", [0.5, 1.25])
    @pytest.mark.parametrize("convention", ["metric", "canonical"])
    def test_undoes_what_augmentation_does_to_labels(self, zoom: float, convention: DepthConvention) -> None:
        size = (8, 12)
        normals = directions(torch.randn(4, 3, 1, 1)).expand(4, 3, *size)
        enlarge = Warp(scale(torch.full((4,), zoom), size), torch.zeros(4))
        seen = warp({"image": torch.zeros(4, 3, *size), "normals": normals}, enlarge, depth_convention=convention)
        middle, expected = seen["normals"][..., 4:5, 6:7], normals[..., 4:5, 6:7]
        assert torch.allclose(make().rescaled(middle, zoom, convention), expected, atol=1e-6)
        assert torch.allclose(middle, expected, atol=1e-6) == (convention == "metric"), "else there is nothing to undo"
