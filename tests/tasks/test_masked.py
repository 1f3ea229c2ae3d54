"""The task that fills in hidden patches, against loops over patches and what can be written down by hand."""

from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from mtl.config import MaskOptions
from mtl.errors import UserError
from mtl.tasks.masked import Masked

PATCH = 4
KINDS = list(product(("normalized", "raw"), ("l2", "l1")))
SIZES = [(8, 12), (9, 12), (7, 14), (3, 2)]
"""Of pictures; all but the first are no multiple of the patch."""


def make(target: str = "normalized", distance: str = "l2") -> Masked:
    return Masked(MaskOptions(target=target, distance=distance), PATCH)  # type: ignore[arg-type]


def draw(size: tuple[int, int], seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Return pictures as a loader's bytes in [0, 1], and outputs that hide another number of patches in each."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (batch, 3, *size), generator=generator) / 255
    rows, columns = (-(-side // PATCH) for side in size)
    hidden = torch.rand(batch, 1, rows, columns, generator=generator) < 0.5
    hidden[0, 0, -1, -1], hidden[-1, 0, 0, 0] = True, False
    pixels = torch.from_numpy(np.kron(hidden.numpy(), np.ones((PATCH, PATCH)))).float()
    colours = torch.randn(batch, 3, rows * PATCH, columns * PATCH, generator=generator)
    return image, torch.cat([colours, pixels], dim=1)


def wild(outputs: Tensor) -> Tensor:
    """Return the same outputs with nonsense for colours wherever a patch is visible."""
    nonsense = torch.tensor([torch.inf, torch.nan, -3e4]).reshape(1, 3, 1, 1)
    return torch.cat([torch.where(outputs[:, 3:] > 0, outputs[:, :3], nonsense), outputs[:, 3:]], dim=1)


def hidden_patches(image: Tensor, outputs: Tensor, target: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what is predicted of each hidden patch and what is wanted, both (3, patch, patch)."""
    right, below = (new - old for new, old in zip(outputs.shape[-1:-3:-1], image.shape[-1:-3:-1], strict=True))
    whole = np.pad(image.double().numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
    colours, hidden = np.split(outputs.double().numpy(), [3], axis=1)
    for sample, row, column in product(*map(range, (len(image), *(side // PATCH for side in whole.shape[-2:])))):
        place = (sample, slice(None), *(slice(PATCH * k, PATCH * (k + 1)) for k in (row, column)))
        if not hidden[place].any():
            continue
        wanted = whole[place]
        if target == "normalized":
            wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
        yield colours[place], wanted


def expected_loss(image: Tensor, outputs: Tensor, target: str, distance: str) -> float:
    power = 2 if distance == "l2" else 1
    return float(np.mean([(np.abs(p - w) ** power).mean() for p, w in hidden_patches(image, outputs, target)]))


class TestLoss:
    @pytest.mark.parametrize(("target", "distance"), KINDS)
    @pytest.mark.parametrize("size", SIZES)
    def test_is_what_a_loop_over_hidden_patches_finds(self, size: tuple[int, int], target: str, distance: str) -> None:
        image, outputs = draw(size)
        loss = make(target, distance).loss(outputs, {"image": image})
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected_loss(image, outputs, target, distance), rel=1e-5)

    @pytest.mark.parametrize(("target", "distance"), KINDS)
    def test_what_is_said_of_visible_patches_has_no_effect(self, target: str, distance: str) -> None:
        image, outputs = draw((9, 12))
        task = make(target, distance)
        plain, odd = outputs.clone().requires_grad_(), wild(outputs).requires_grad_()
        losses = [task.loss(leaf, {"image": image}) for leaf in (plain, odd)]
        gradients = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, (plain, odd), strict=True)]
        assert torch.equal(*losses)
        assert torch.equal(*gradients)
        colours, hidden = gradients[0].split([3, 1], dim=1)
        assert torch.equal(colours != 0, (outputs[:, 3:] > 0).expand_as(colours))
        assert not hidden.any()

    @pytest.mark.parametrize("distance", ["l2", "l1"])
    @pytest.mark.parametrize("batch", [{"image": draw((9, 12))[0]}, {}])
    def test_of_nothing_is_zero_and_has_a_gradient_of_zero(self, batch: dict[str, Tensor], distance: str) -> None:
        outputs = draw((9, 12))[1]
        if batch:
            outputs[:, 3] = 0
        outputs.requires_grad_()
        loss = make(distance=distance).loss(outputs, batch)
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, outputs)[0], torch.zeros_like(outputs))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("target", "distance"), KINDS)
    def test_of_half_precision_is_computed_in_single(self, target: str, distance: str, dtype: torch.dtype) -> None:
        image, outputs = draw((9, 12))
        # Squares of 300 are infinite in float16.
        half = (300 * outputs).to(dtype).clamp(-3e4, 3e4)
        half[:, 3] = outputs[:, 3]
        loss = make(target, distance).loss(half, {"image": image})
        assert loss.dtype == torch.float32
        assert torch.equal(loss, make(target, distance).loss(half.float(), {"image": image}))
        assert loss.isfinite()


class TestPrior:
    def test_mean_colour_is_that_of_all_pixels_however_they_are_stored_and_cut(self) -> None:
        stored = torch.randint(0, 256, (7, 3, 8, 12), dtype=torch.uint8)
        expected = stored.double().div(255).mean(dim=(0, 2, 3)).float()
        for chunks in (stored.split([1, 4, 2]), (stored.float() / 255).split(7)):
            task = make("raw")
            task.observe(iter(chunks))
            torch.testing.assert_close(task.mean_colour, expected)
            assert torch.equal(task.initial_bias(), task.mean_colour)
            again = make("raw")
            again.load_state_dict(task.state_dict())
            assert torch.equal(again.initial_bias(), task.initial_bias())

    def test_normalised_patches_keep_a_tint(self) -> None:
        """Each is normalised over its three colours together: where red is always above blue, it stays so."""
        pictures = torch.rand(5, 3, 8, 12, dtype=torch.float64) * 0.2 + torch.tensor([0.6, 0.4, 0.1]).view(1, 3, 1, 1)
        task = make("normalized")
        assert torch.equal(task.initial_bias(), torch.zeros(3))
        task.observe([pictures[:2].float(), pictures[2:].float()])
        patch, means = task.patch, []
        for picture in pictures:
            for row in range(0, 8, patch):
                for column in range(0, 12, patch):
                    values = picture[:, row : row + patch, column : column + patch]
                    means.append(((values - values.mean()) / values.std()).mean(dim=(1, 2)))
        expected = torch.stack(means).mean(dim=0).float()
        assert expected[0] > 0.5 > -0.5 > expected[2]
        torch.testing.assert_close(task.initial_bias(), expected, atol=1e-4, rtol=1e-4)

    def test_without_pictures_there_is_none(self) -> None:
        with pytest.raises(UserError, match="no picture for the task 'masked'"):
            make().observe([])

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("target", ["normalized", "raw"])
    def test_the_constant_hides_all_and_is_shaped_as_outputs_are(self, target: str, size: tuple[int, int]) -> None:
        image, outputs = draw(size)
        task = make(target)
        task.observe([image])
        constant = task.constant(image)
        assert constant.shape == outputs.shape
        assert (constant[:, 3] == 1).all()
        assert torch.equal(constant[:, :3], task.initial_bias().reshape(1, 3, 1, 1).expand_as(constant[:, :3]))

    def test_beside_a_prediction_the_constant_hides_the_same(self) -> None:
        image, outputs = draw((8, 12))
        task = make("raw", "l2")
        task.observe([image])
        beside = task.beside(outputs, image)
        assert torch.equal(beside[:, 3], outputs[:, 3]) and torch.equal(beside[:, :3], task.constant(image)[:, :3])
        # So what predicts the mean is as good as the constant, wherever the mask is.
        as_good = torch.cat([task.constant(image)[:, :3], outputs[:, 3:]], dim=1)
        assert scores(task, as_good, image) == scores(task, beside, image)

    @pytest.mark.parametrize("target", ["normalized", "raw"])
    def test_the_constant_explains_nothing(self, target: str) -> None:
        image = draw((8, 12))[0]
        task = make(target, "l2")
        task.observe([image])
        assert scores(task, task.constant(image), image)["r2"] == pytest.approx(0, abs=1e-5)

    def test_the_constant_s_squared_error_on_raw_colours_is_their_variance(self) -> None:
        image = draw((8, 12))[0]
        task = make("raw", "l2")
        task.observe([image])
        values = scores(task, task.constant(image), image)
        assert values["loss"] == pytest.approx(image.double().var(dim=(0, 2, 3), correction=0).mean().item(), rel=1e-6)
        assert values["r2"] == pytest.approx(0, abs=1e-6)

    def test_the_constant_s_absolute_error_on_uniform_pictures_is_their_distance_to_the_mean(self) -> None:
        image = torch.tensor([0.2, 0.3, 0.7]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
        task = make("raw", "l1")
        task.observe([image])
        assert scores(task, task.constant(image), image)["loss"] == pytest.approx((0.2 + 0.1 + 0.3) / 3, rel=1e-5)

    @pytest.mark.parametrize("distance", ["l2", "l1"])
    def test_the_constant_s_error_on_a_chessboard_of_pixels(self, distance: str) -> None:
        board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 0.5
        image = board.expand(2, 3, 8, 8)
        # Half of the n values are 1/4 below their mean, half above it, and the deviation divides by n - 1.
        n = 3 * PATCH**2
        each = 0.25 / (0.25**2 * n / (n - 1) + 1e-6) ** 0.5
        task = make("normalized", distance)
        expected = each**2 if distance == "l2" else each
        assert scores(task, task.constant(image), image)["loss"] == pytest.approx(expected, rel=1e-5)


def scores(task: Masked, *updates: Tensor) -> dict[str, float]:
    """Return the metrics of predictions and pictures, in turns."""
    metric = task.metrics()
    for prediction, image in zip(updates[::2], updates[1::2], strict=True):
        metric.update(prediction, image)
    return {name: float(value) for name, value in metric.compute().items()}


class TestMetric:
    @pytest.mark.parametrize(("target", "distance"), KINDS)
    def test_is_the_loss_and_the_share_of_variance_explained(self, target: str, distance: str) -> None:
        image, outputs = draw((9, 14))
        outputs[:, :3] *= 0.3
        values = scores(make(target, distance), outputs, image)
        assert set(values) == set(Masked.higher_is_better)
        assert values["loss"] == pytest.approx(expected_loss(image, outputs, target, distance), rel=1e-6)
        predicted, wanted = (np.stack(part) for part in zip(*hidden_patches(image, outputs, target), strict=True))
        around = wanted.mean(axis=(0, 2, 3), keepdims=True)
        explained = 1 - np.square(predicted - wanted).sum() / np.square(wanted - around).sum()
        assert values["r2"] == pytest.approx(explained, rel=1e-5)

    @pytest.mark.parametrize(("target", "distance"), KINDS)
    def test_batches_of_any_size_are_one(self, target: str, distance: str) -> None:
        image, outputs = draw((9, 14), batch=7)
        task = make(target, distance)
        parts = [part for pair in zip(outputs.split([1, 4, 2]), image.split([1, 4, 2]), strict=True) for part in pair]
        assert scores(task, *parts) == pytest.approx(scores(task, outputs, image), rel=1e-6)

    def test_visible_patches_do_not_count(self) -> None:
        image, outputs = draw((9, 14))
        assert scores(make(), wild(outputs), image) == scores(make(), outputs, image)

    def test_a_perfect_prediction(self) -> None:
        image, outputs = draw((8, 12))
        outputs[:, :3] = image
        task = make("raw")
        values = scores(task, outputs, image)
        assert values == {"loss": 0, "r2": 1}
        assert task.remaining_error(values) == 0

    def test_of_nothing_is_not_a_number(self) -> None:
        image, outputs = draw((8, 12))
        outputs[:, 3] = 0
        assert all(np.isnan(value) for value in scores(make(), outputs, image).values())

    def test_a_module_s_type_does_not_round_the_sums(self) -> None:
        image, outputs = draw((9, 14))
        metric = make().metrics()
        metric.update(outputs, image)
        before = metric.sums.clone(), metric.colours.clone()
        torch.nn.ModuleList([metric]).to(torch.bfloat16)
        assert metric.sums.dtype == metric.colours.dtype == torch.float64
        assert torch.equal(metric.sums, before[0]) and torch.equal(metric.colours, before[1])


class TestPictures:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("target", ["normalized", "raw"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_visible_pixels_are_the_picture_s_own_and_hidden_ones_grey(
        self, size: tuple[int, int], target: str, dtype: torch.dtype
    ) -> None:
        image, outputs = draw(size)
        panels = make(target).pictures(wild(outputs).to(dtype), image)
        assert list(panels) == ["masked: input", "masked: reconstruction", "masked: error"]
        assert all(panel.images.shape == (3, *size, 3) and panel.images.dtype == "uint8" for panel in panels.values())
        hidden = outputs[:, 3, : size[0], : size[1]].numpy() > 0
        own = (255 * image.double()).round().byte().permute(0, 2, 3, 1).numpy()
        seen, drawn, error = (panel.images for panel in panels.values())
        assert (seen[~hidden] == own[~hidden]).all() and (drawn[~hidden] == own[~hidden]).all()
        assert (seen[hidden] == 128).all()
        assert not error[~hidden].any()

    def test_hidden_pixels_are_as_predicted(self) -> None:
        image, outputs = draw((9, 14))
        outputs[:, :3] = torch.rand(outputs[:, :3].shape)
        panels = make("raw").pictures(outputs, image)
        hidden = outputs[:, 3, :9, :14].numpy() > 0
        predicted = (255 * outputs[:, :3, :9, :14].double()).round().byte().permute(0, 2, 3, 1).numpy()
        assert (panels["masked: reconstruction"].images[hidden] == predicted[hidden]).all()
        scale = panels["masked: error"].scale
        worst = np.abs((outputs[:, :3, :9, :14] - image).numpy()).mean(axis=1)[hidden].max()
        assert scale is not None and scale.low == 0 and scale.high == pytest.approx(worst, rel=1e-5)

    def test_normalised_patches_are_given_their_own_light_and_contrast(self) -> None:
        image, outputs = draw((8, 12))
        outputs[:, 3] = 1
        wanted = np.stack([wanted for _, wanted in hidden_patches(image, outputs, "normalized")])
        rows = wanted.reshape(3, 2, 3, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
        outputs[:, :3] = torch.from_numpy(rows.reshape(3, 3, 8, 12))
        panels = make("normalized").pictures(outputs, image)
        own = (255 * image).round().byte().permute(0, 2, 3, 1).numpy()
        assert (panels["masked: reconstruction"].images == own).all()

    def test_without_the_picture_only_raw_colours_can_be_drawn(self) -> None:
        outputs = draw((9, 14))[1]
        outputs[:, :3] = torch.rand(outputs[:, :3].shape)
        assert make("normalized").pictures(outputs, None) == {}
        (title, panel), *others = make("raw").pictures(outputs, None).items()
        assert title == "masked: reconstruction" and not others
        expected = (255 * outputs[:, :3] * outputs[:, 3:]).round().byte().permute(0, 2, 3, 1).numpy()
        assert (panel.images == expected).all()


class TestContract:
    def test_likelihood_is_that_of_the_distance(self) -> None:
        assert [make(distance=distance).likelihood for distance in ("l2", "l1")] == ["gaussian", "laplace"]

    @pytest.mark.parametrize("image", [False, True])
    def test_pictures_are_their_own_labels(self, image: bool) -> None:
        batch = {"depth": torch.ones(1, 1, 5, 7, device="meta")}
        batch |= {"image": torch.zeros(1, 3, 5, 7, device="meta")} if image else {}
        answer = make().labelled(batch)
        assert answer.shape == () and answer.dtype == torch.bool and answer.device.type == "meta"
        assert make().labelled({name: torch.zeros(1) for name in batch}).item() is image
        assert make().labelled({}).item() is False

    def test_predictions_are_outputs(self) -> None:
        outputs = draw((9, 14))[1]
        assert make().predict(outputs) is outputs

    @pytest.mark.parametrize(("method", "said"), [("soft", "hides other parts in every view"), ("encode", "no file")])
    def test_what_makes_no_sense_is_refused(self, method: Literal["soft", "encode"], said: str) -> None:
        with pytest.raises(UserError, match=f"the task 'masked' .*{said}"):
            getattr(make(), method)(draw((9, 14))[1])


LAYOUTS = {"unequal": (0.9, 0.2), "one hides nothing": (0.0, 0.5), "none": (0.0, 0.0)}
"""Shares of patches that are hidden on each of two ranks."""


def shared(layout: str) -> list[tuple[Tensor, Tensor]]:
    """Return each rank's pictures and outputs: one sample, and three."""
    image, outputs = draw((9, 14), seed=5, batch=4)
    noise = torch.rand(4, 1, 3, 4, generator=torch.Generator().manual_seed(6))
    noise = noise.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    shares = torch.tensor(LAYOUTS[layout])[[0, 1, 1, 1]].reshape(4, 1, 1, 1)
    outputs[:, 3:] = (noise < shares).float()
    return list(zip(image.split([1, 3]), outputs.split([1, 3]), strict=True))


def train(rank: int, folder: Path) -> None:
    """Write the losses of one of two ranks, and their gradients on its outputs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for layout in LAYOUTS:
        image, outputs = shared(layout)[rank]
        loss = make().loss(outputs.requires_grad_(), {"image": image})
        results[layout] = loss.detach(), torch.autograd.grad(loss, outputs)[0]
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_what_one_would(tmp_path: Path) -> None:
    multiprocessing.spawn(train, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for layout, shares in LAYOUTS.items():
        image, outputs = (torch.cat(parts) for parts in zip(*shared(layout), strict=True))
        expected = make().loss(outputs.requires_grad_(), {"image": image})
        (gradient,) = torch.autograd.grad(expected, outputs)
        assert (expected > 0) == any(shares)
        losses, gradients = zip(*(results[layout] for results in found), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), expected.detach())
        # Each output belongs to one rank, and has no gradient on the other.
        torch.testing.assert_close(torch.cat(gradients) / 2, gradient)
        assert [bool(loss) for loss in losses] == [share > 0 for share in shares]
