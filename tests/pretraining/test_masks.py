"""Masks: exact counts, and draws that belong to a sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.augmentation.draws import Draws
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.pretraining.masks import check_patch, draw_masks, extend, grid_of, hidden_count, hide


def draws(count: int = 4, seed: int = 3, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, torch.arange(count))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.floats(0.0, 0.99), st.booleans(), st.integers(0, 2**40))
def test_every_picture_hides_exactly_the_ratio(height: int, width: int, ratio: float, blocks: bool, seed: int) -> None:
    count = round(ratio * height * width)
    if count == height * width or (count == 0 and ratio > 0):
        with pytest.raises(UserError, match=r"--mask\.ratio"):
            draw_masks(draws(seed=seed), (height, width), ratio, blocks=blocks)
        return
    masks = draw_masks(draws(seed=seed), (height, width), ratio, blocks=blocks)
    assert masks.shape == (4, height, width) and masks.dtype == torch.bool
    assert masks.flatten(1).sum(1).tolist() == [count] * 4


@pytest.mark.parametrize("blocks", [False, True])
def test_a_mask_belongs_to_a_sample_not_to_its_batch(blocks: bool) -> None:
    whole = draw_masks(Draws(3, 5, torch.tensor([7, 2, 9])), (7, 9), 0.6, blocks=blocks)
    alone = draw_masks(Draws(3, torch.tensor(5), torch.tensor([9])), (7, 9), 0.6, blocks=blocks)
    assert torch.equal(whole[2:], alone)
    others = [
        draw_masks(Draws(seed, epoch, torch.tensor([place])), (7, 9), 0.6, blocks=blocks)
        for seed, epoch, place in [(4, 5, 9), (3, 6, 9), (3, 5, 8)]
    ]
    assert not any(torch.equal(alone, other) for other in others)


def test_every_patch_is_hidden_as_often_as_the_ratio_says() -> None:
    shares = draw_masks(draws(4000), (4, 6), 0.75).float().mean(0)
    # Five standard deviations of a share of 4000.
    assert (shares - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_blocks_hide_neighbours_together_and_every_place_at_times() -> None:
    def joined(masks: torch.Tensor) -> float:
        across = masks[:, :, 1:] & masks[:, :, :-1]
        return float(across.float().mean())

    blocks, single = (draw_masks(draws(500), (14, 14), 0.4, blocks=way) for way in (True, False))
    # Patches on their own: 0.4 squared. Of a picture hidden in blocks most hidden patches have a hidden neighbour.
    assert joined(single) == pytest.approx(0.16, abs=0.01)
    assert joined(blocks) > 0.3
    shares = blocks.float().mean(0)
    assert shares.min() > 0 and shares[4:10, 4:10].mean() > shares[0, 0]


def test_the_blocks_are_rectangles() -> None:
    # At a ratio that one block of 8 % fills, up to the cut of its last row.
    for mask in draw_masks(draws(50), (14, 14), 16 / 196, blocks=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box[:-1].all()


def test_hide_takes_the_patches_that_mae_removes() -> None:
    noise = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    # As in MAE's random_masking: sort, keep the first, and unshuffle.
    shuffle = noise.flatten(1).argsort(1)
    reference = torch.ones(3, 20)
    reference[:, :5] = 0
    reference = reference.gather(1, shuffle.argsort(1)).view(3, 4, 5)
    assert torch.equal(hide(noise, 15), reference.bool())


def test_ratios_that_make_no_sense_are_refused() -> None:
    assert hidden_count((7, 7), 0.6) == 29 and hidden_count((7, 7), 0) == 0
    for ratio, word in [(1.0, "less than 1"), (-0.1, "from 0"), (0.9, "hides all of the 4"), (0.1, "hides none")]:
        with pytest.raises(UserError, match=word):
            hidden_count((2, 2), ratio)


def test_pictures_are_extended_to_whole_patches() -> None:
    image = torch.rand(2, 3, 40, 64)
    extended = extend(image, 32)
    assert grid_of((40, 64), 32) == (2, 2) and extended.shape == (2, 3, 64, 64)
    assert torch.equal(extended[:, :, :40], image)
    assert torch.equal(extended[:, :, 40:], image[:, :, 39:40].expand(-1, -1, 24, -1))
    assert extend(extended, 32) is extended


def test_a_patch_is_made_of_whole_positions() -> None:
    backbone = Backbone("resnet10t", (64, 64))
    check_patch(backbone, 32)
    check_patch(backbone, 64)
    for patch in (16, 48, 0):
        with pytest.raises(UserError, match=rf"--mask\.patch {patch}: .* give 32 or a multiple"):
            check_patch(backbone, patch)
