"""Masked input: hidden pixels are unseen, whatever the encoder."""

import pytest
import torch

from mtl.models.backbone import Backbone
from mtl.pretraining.masked_input import MaskedInput

NAMES = ["swin_tiny_patch4_window7_224", "edgenext_xx_small", "resnet10t"]
SIZE = (64, 64)


@pytest.fixture(scope="module", params=NAMES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return Backbone(request.param, SIZE).double()


def shown() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    return torch.rand(2, 3, *SIZE, dtype=torch.float64, generator=generator), mask


def pyramid(module: torch.nn.Module, *args: object) -> list[torch.Tensor]:
    """Return the maps, with the same layers dropped each time."""
    torch.manual_seed(0)
    return module(*args).maps


@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_change_nothing(backbone: Backbone, training: bool) -> None:
    backbone.train(training)
    masked = MaskedInput(32).double()
    image, mask = shown()
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    maps = [pyramid(masked, backbone, each, mask) for each in (image, torch.where(hidden, 1 - image, image))]
    for first, second in zip(*maps, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("training", [False, True])
def test_with_nothing_hidden_it_is_the_plain_backbone(backbone: Backbone, training: bool) -> None:
    backbone.train(training)
    image, mask = shown()
    masked = pyramid(MaskedInput(32).double(), backbone, image, torch.zeros_like(mask))
    for first, second in zip(masked, pyramid(backbone, image), strict=True):
        assert torch.equal(first, second)


def test_the_token_stands_in_the_normalised_picture_and_learns() -> None:
    backbone = Backbone("resnet10t", SIZE)
    masked = MaskedInput(32)
    torch.nn.init.normal_(masked.token)
    image, mask = shown()
    maps = masked(backbone, image.float(), mask).maps
    torch.testing.assert_close(maps[0][0, :, :32, :32], masked.token)
    torch.testing.assert_close(maps[0][1, :, 32:, 32:], masked.token)
    torch.testing.assert_close(
        maps[0][0, :, :32, 32:], ((image.float() - backbone.mean) / backbone.std)[0, :, :32, 32:]
    )
    maps[-1].square().sum().backward()
    assert masked.token.grad is not None and masked.token.grad.abs().sum() > 0


def test_a_mask_that_does_not_fit_is_refused() -> None:
    image, mask = shown()
    with pytest.raises(ValueError, match="2x2 patches of 16 pixels does not fit an image of 64x64"):
        MaskedInput(16)(Backbone("resnet10t", SIZE), image.float(), mask)
