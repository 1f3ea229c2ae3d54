"""Patches, targets and losses against what can be written down by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtl.pretraining.targets import hidden_loss, patch_target, patchify, reconstruct, resize_mask, unpatchify

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))


def half_hidden(batch: int, height: int, width: int) -> Tensor:
    """Return a mask that hides half of each image's patches, rounded down."""
    order = torch.rand(batch, height * width).argsort(1)
    return (order < height * width // 2).view(batch, height, width)


def test_a_patch_is_ordered_by_row_column_and_colour() -> None:
    image = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            block = image[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert patches[1, 3 * row + column].tolist() == block.permute(1, 2, 0).flatten().tolist()


@given(SIZES)
def test_patches_put_together_are_the_image(sizes: tuple[int, int, int, int]) -> None:
    batch, height, width, patch = sizes
    image = torch.rand(batch, 3, height * patch, width * patch)
    assert torch.equal(unpatchify(patchify(image, patch), (height, width)), image)


def test_normalised_patches_have_mean_zero_and_unbiased_variance_one() -> None:
    image = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    patches = patch_target(image, 8).double()
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 6, dtype=torch.float64), atol=1e-6, rtol=0)
    scaled = patchify(image, 8)
    one = scaled.var(-1, unbiased=True)
    torch.testing.assert_close(patches.var(-1, unbiased=True), one / (one + 1e-6), atol=1e-5, rtol=0)


def test_a_uniform_patch_is_zero_and_no_infinity() -> None:
    assert torch.equal(patch_target(torch.full((1, 3, 8, 8), 0.25), 4), torch.zeros(1, 4, 48))


def test_a_normalised_target_ignores_light_and_contrast_and_a_raw_one_does_not() -> None:
    image = torch.rand(2, 3, 16, 16)
    changed = 0.2 + 0.5 * image
    torch.testing.assert_close(patch_target(changed, 8), patch_target(image, 8), atol=1e-3, rtol=1e-3)
    assert torch.equal(patch_target(changed, 8, "raw"), patchify(changed, 8))


@pytest.mark.parametrize(("distance", "each"), [("l2", [4.0, 9.0]), ("l1", [2.0, 3.0])])
def test_the_loss_is_the_mean_over_hidden_patches(distance: str, each: list[float]) -> None:
    target = torch.rand(2, 4, 12)
    off = torch.tensor([[2.0, 100.0, 100.0, 100.0], [100.0, 100.0, 100.0, -3.0]])
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    prediction = (target + off.unsqueeze(-1)).requires_grad_()
    loss = hidden_loss(prediction, target, mask, distance)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.tensor(sum(each) / 2))
    loss.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad.abs().sum(-1) > 0, mask.flatten(1)), "visible patches have no say"


def test_the_loss_of_nothing_hidden_is_zero() -> None:
    prediction = torch.rand(2, 4, 12, requires_grad=True)
    loss = hidden_loss(prediction, torch.rand(2, 4, 12), torch.zeros(2, 2, 2, dtype=torch.bool))
    loss.backward()
    assert prediction.grad is not None
    assert loss == 0
    assert torch.equal(prediction.grad, torch.zeros(2, 4, 12))


def test_the_mean_of_ranks_losses_is_that_of_the_whole_batch() -> None:
    prediction, target, mask = torch.rand(6, 12, 12), torch.rand(6, 12, 12), half_hidden(6, 3, 4)
    whole = hidden_loss(prediction, target, mask)
    ranks = [hidden_loss(prediction[i : i + 2], target[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(ranks).mean(), whole)


def test_half_precision_predictions_are_compared_in_full() -> None:
    target = torch.full((1, 1, 3 * 256**2), 1.0)
    prediction = (target - 2**-7).bfloat16()
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    assert hidden_loss(prediction, target, mask).item() == 2**-14


@pytest.mark.parametrize("target", ["normalized", "raw"])
def test_a_perfect_prediction_is_the_picture(target: str) -> None:
    image, mask = torch.rand(2, 3, 16, 24), half_hidden(2, 2, 3)
    prediction = patch_target(image, 8, target)  # type: ignore[arg-type]
    torch.testing.assert_close(reconstruct(prediction, image, mask, target), image)  # type: ignore[arg-type]
    # Of visible patches nothing but their own pixels is shown.
    wild = torch.where(mask.flatten(1).unsqueeze(-1), prediction, 1e3)
    torch.testing.assert_close(reconstruct(wild, image, mask, target), image)  # type: ignore[arg-type]


@given(SIZES)
def test_a_mask_on_a_finer_grid_hides_the_same_pixels(sizes: tuple[int, int, int, int]) -> None:
    batch, height, width, factor = sizes
    mask = torch.rand(batch, height, width) < 0.5
    finer = resize_mask(mask, (height * factor, width * factor))
    assert torch.equal(finer, torch.kron(mask.int(), torch.ones(factor, factor, dtype=torch.int32)) > 0)


@pytest.mark.parametrize("grid", [(4, 5), (5, 6), (1, 3), (4, 9)])
def test_a_mask_that_does_not_fit_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"2x3 patches does not fit a grid of {grid[0]}x{grid[1]}"):
        resize_mask(torch.zeros(1, 2, 3, dtype=torch.bool), grid)
