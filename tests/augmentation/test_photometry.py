"""Light, colour and sharpness."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from mtl.augmentation.draws import Draws
from mtl.augmentation.photometry import (
    apply_colour,
    colour_matrix,
    gamma,
    gaussian_blur,
    jpeg,
    motion_blur,
    noise,
    posterise,
    solarise,
    vignette,
)

shapes = st.tuples(st.integers(1, 4), st.just(3), st.integers(1, 21), st.integers(1, 21))


def colour(image: Tensor, **changes: Tensor) -> Tensor:
    return apply_colour(image, colour_matrix(image.mean(dim=(2, 3)), **changes))


def normal(image: Tensor) -> Tensor:
    return Draws(0, 0, torch.arange(len(image))).normal_like("noise", image)


# Each operation, the strength that is nothing, and a strong one.
OPERATIONS = {
    "brightness": (lambda x, s: colour(x, brightness=s), 1.0, 1.6),
    "contrast": (lambda x, s: colour(x, contrast=s), 1.0, 0.3),
    "saturation": (lambda x, s: colour(x, saturation=s), 1.0, 0.2),
    "hue": (lambda x, s: colour(x, hue=s), 0.0, 1.2),
    "grey": (lambda x, s: colour(x, grey=s), 0.0, 1.0),
    "balance": (lambda x, s: colour(x, balance=s[:, None].expand(-1, 3)), 1.0, 0.7),
    "gamma": (gamma, 1.0, 2.2),
    "solarise": (solarise, math.inf, 0.0),
    "posterise": (posterise, 8.0, 1.0),
    "vignette": (vignette, 0.0, 1.0),
    "gaussian_blur": (lambda x, s: gaussian_blur(x, s, radius=4), 0.0, 1.5),
    "motion_blur": (lambda x, s: motion_blur(x, s, 0.3 + 0 * s, radius=4), 1.0, 7.0),
    "sigma": (lambda x, s: noise(x, normal(x), s, 0 * s), 0.0, 0.2),
    "shot": (lambda x, s: noise(x, normal(x), 0 * s, s), 0.0, 0.1),
    "jpeg": (jpeg, 100.0, 5.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_bit_for_bit_nothing_beside_others_that_change(name):
    operation, nothing, strong = OPERATIONS[name]
    image = torch.rand(3, 3, 17, 12) * 1.5 - 0.25  # as other operations may leave it
    changed = operation(image, torch.tensor([strong, nothing, strong]))
    assert torch.equal(changed[1], image[1])
    assert not torch.equal(changed[0], image[0]) and not torch.equal(changed[2], image[2])


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=30)
@given(shape=shapes, share=st.floats(0, 1, width=32))
def test_any_shape_and_strength_gives_numbers_and_samples_alone(name, shape, share):
    operation, nothing, strong = OPERATIONS[name]
    low, high = (1.5, strong) if math.isinf(nothing) else (nothing, strong)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
    strengths = torch.linspace(low + share * (high - low), high, shape[0])
    changed = operation(image, strengths)
    assert changed.shape == image.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    alone = operation(image[:1], strengths[:1])
    torch.testing.assert_close(changed[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"brightness": 0.7}, lambda x: V.adjust_brightness(x, 0.7)),
        ({"contrast": 0.4}, lambda x: V.adjust_contrast(x, 0.4)),
        ({"saturation": 0.3}, lambda x: V.adjust_saturation(x, 0.3)),
        ({"grey": 1.0}, lambda x: V.rgb_to_grayscale(x, num_output_channels=3)),
        (
            {"brightness": 0.8, "contrast": 0.6, "saturation": 0.5},
            lambda x: V.adjust_saturation(V.adjust_contrast(V.adjust_brightness(x, 0.8), 0.6), 0.5),
        ),
    ],
)
def test_colour_agrees_with_torchvision_where_nothing_clips(changes, theirs):
    image = torch.rand(4, 3, 9, 14)
    ours = colour(image, **{name: torch.full((4,), value) for name, value in changes.items()})
    # torchvision rounds the weight of red to four digits.
    torch.testing.assert_close(ours, torch.stack([theirs(sample) for sample in image]), rtol=0, atol=3e-4)


@given(st.floats(-math.pi, math.pi), st.floats(0, 2), st.tuples(*[st.floats(0, 1)] * 3))
def test_hue_and_saturation_turn_and_stretch_the_plane_of_yiq(angle, saturation, rgb):
    image = torch.tensor(rgb).view(1, 3, 1, 1)
    turned = colour(image, hue=torch.tensor([angle]), saturation=torch.tensor([saturation])).flatten().tolist()
    # colorsys has the weights to two digits.
    (y, i, q), (y2, i2, q2) = colorsys.rgb_to_yiq(*rgb), colorsys.rgb_to_yiq(*turned)
    expected = complex(i, q) * saturation * complex(math.cos(angle), -math.sin(angle))
    assert abs(y - y2) < 0.02 and abs(complex(i2, q2) - expected) < 0.01


@given(st.floats(-math.pi, math.pi))
def test_hue_keeps_luma_and_grey_and_turns_back(angle):
    image = torch.rand(1, 3, 4, 5)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    hue = torch.tensor([angle])
    turned = colour(image, hue=hue)
    torch.testing.assert_close((turned * luma).sum(1), (image * luma).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(colour(turned, hue=-hue), image, rtol=0, atol=1e-5)
    grey = image[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(colour(grey, hue=hue), grey, rtol=0, atol=1e-5)


def test_hue_agrees_with_a_turn_in_kornias_yuv():
    """I and Q are U and V, turned by 33 degrees and exchanged: a turn of the one is a turn of the other."""
    kornia = pytest.importorskip("kornia")
    image, angle = torch.rand(2, 3, 6, 7), 0.8
    y, u, v = kornia.color.rgb_to_yuv(image).unbind(1)
    turned = torch.stack(
        [y, math.cos(angle) * u - math.sin(angle) * v, math.sin(angle) * u + math.cos(angle) * v], dim=1
    )
    theirs = kornia.color.yuv_to_rgb(turned)
    ours = [colour(image, hue=torch.full((2,), sign * angle)) for sign in (1, -1)]
    assert min((mine - theirs).abs().max() for mine in ours) < 0.02


def test_hue_goes_from_red_towards_yellow_as_in_hsv():
    red = torch.tensor([0.6, 0.2, 0.2]).view(1, 3, 1, 1)
    turned = colour(red, hue=torch.tensor([0.5])).flatten().tolist()
    assert 0.02 < colorsys.rgb_to_hsv(*turned)[0] < 0.2


def test_all_changes_of_colour_are_one_matrix():
    """In the order of the documentation, one after the other."""
    image = torch.rand(5, 3, 8, 9)
    g = torch.Generator().manual_seed(1)
    draw = {name: torch.rand(5, generator=g) + 0.3 for name in ("saturation", "hue", "contrast", "brightness")}
    draw["grey"] = torch.rand(5, generator=g)
    draw["balance"] = torch.rand(5, 3, generator=g) + 0.5
    step = image
    for name in ("grey", "saturation", "hue", "contrast", "brightness", "balance"):
        step = colour(step, **{name: draw[name]})
    torch.testing.assert_close(colour(image, **draw), step, rtol=0, atol=1e-5)
    balanced = image * draw["balance"][:, :, None, None]
    torch.testing.assert_close(colour(image, balance=draw["balance"]), balanced)


def test_tones_agree_with_torchvision():
    image = torch.rand(1, 3, 20, 20)
    image[0, :, 0, :3] = torch.tensor([0.0, 0.5, 1.0])
    for value in (0.5, 1.7):
        torch.testing.assert_close(gamma(image, torch.tensor([value])), V.adjust_gamma(image, value))
    for value in (0.25, 0.5):
        assert torch.equal(solarise(image, torch.tensor([value])), V.solarize(image, value))
    for bits in (1, 3, 7):
        assert torch.equal(posterise(image, torch.tensor([bits])), V.posterize(image, bits))


def test_vignette_is_the_stated_parabola():
    image = torch.ones(2, 3, 301, 201)
    dark = vignette(image, torch.tensor([0.0, 0.6]))
    assert dark[1, 0, 150, 100] == 1
    half_diagonal = math.hypot(301, 201) / 2
    for row, column in ((0, 0), (300, 200), (150, 0), (20, 170)):
        r = math.hypot(row - 150, column - 100) / half_diagonal
        assert dark[1, 2, row, column].item() == pytest.approx(1 - 0.6 * r**2, abs=1e-6)
    torch.testing.assert_close(dark, dark.flip(2, 3))


def averaged(image: Tensor, weights: np.ndarray) -> np.ndarray:
    """Average (3, H, W) over those neighbours that exist, with scipy."""
    image = image.double().numpy()
    total = ndimage.correlate(image, weights[None], mode="constant")
    return total / ndimage.correlate(np.ones_like(image), weights[None], mode="constant")


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0])
def test_gaussian_blur_agrees_with_peers(sigma):
    kornia = pytest.importorskip("kornia")
    image = torch.rand(2, 3, 31, 24)
    ours = gaussian_blur(image, torch.full((2,), sigma), radius=6)
    # What they put beyond the border they invent: copies or a reflection.
    inner = (..., slice(6, -6), slice(6, -6))
    theirs = kornia.filters.gaussian_blur2d(image, (13, 13), (sigma, sigma))
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-5)
    theirs = V.gaussian_blur(image, [13, 13], [sigma, sigma])
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-5)
    line = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    np.testing.assert_allclose(ours[0], averaged(image[0], np.outer(line, line)), atol=1e-5)


def test_motion_blur_along_an_axis_is_a_running_mean():
    kornia = pytest.importorskip("kornia")
    image = torch.rand(3, 3, 15, 18)
    length, angle = torch.tensor([5.0, 3.0, 4.0]), torch.tensor([0.0, math.pi / 2, 0.0])
    ours = motion_blur(image, length, angle, radius=3)
    np.testing.assert_allclose(ours[0], averaged(image[0], np.ones((1, 5))), atol=1e-5)
    np.testing.assert_allclose(ours[1], averaged(image[1], np.ones((3, 1))), atol=1e-5)
    # An even length takes half of each end.
    np.testing.assert_allclose(ours[2], averaged(image[2], np.array([[0.5, 1, 1, 1, 0.5]])), atol=1e-5)
    theirs = kornia.filters.motion_blur(image[:1], 5, 0.0, 0.0)
    torch.testing.assert_close(ours[:1, ..., 3:-3], theirs[..., 3:-3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur"])
def test_blurs_make_nothing_darker_at_the_border(name):
    operation, _, strong = OPERATIONS[name]
    even = torch.full((1, 3, 5, 3), 0.7)
    torch.testing.assert_close(operation(even, torch.tensor([strong])), even)


@given(st.floats(1, 9), st.floats(0, 2 * math.pi))
def test_motion_blur_is_as_long_as_told_points_where_told_and_moves_nothing(length, angle):
    """The second moments of a point's picture are those of the line, but for the width of a pixel."""
    point = torch.zeros(1, 3, 21, 21)
    point[..., 10, 10] = 1
    blurred = motion_blur(point, torch.tensor([length]), torch.tensor([angle]), radius=5)[0, 0].double().numpy()
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    y, x = np.mgrid[-10:11, -10:11]
    assert abs((blurred * x).sum()) < 1e-5 and abs((blurred * y).sum()) < 1e-5
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    assert (blurred * across**2).sum() < 0.25
    assert (blurred * along**2).sum() == pytest.approx((length**2 - 1) / 12, abs=0.35 + 0.03 * length)


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur"])
def test_blurs_leave_a_ramp_where_it_is(name):
    operation, _, strong = OPERATIONS[name]
    ramp = (torch.arange(20)[:, None] * 0.02 + torch.arange(30) * 0.01).expand(1, 3, 20, 30)
    inner = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(operation(ramp, torch.tensor([strong]))[inner], ramp[inner], rtol=0, atol=1e-5)


def test_noise_has_the_stated_variance():
    level = torch.tensor([0.0, 0.25, 1.0])
    image = level.view(3, 1, 1, 1).expand(3, 3, 100, 100)
    sigma, shot = torch.tensor([0.1, 0.1, 0.0]), torch.tensor([0.02, 0.02, 0.02])
    added = noise(image, normal(image), sigma, shot) - image
    expected = sigma**2 + shot * level
    tolerance = 4 * (2 / added[0].numel()) ** 0.5
    torch.testing.assert_close(added.var(dim=(1, 2, 3)), expected, rtol=tolerance, atol=0)
    assert (added.mean(dim=(1, 2, 3)).abs() < 4 * (expected / added[0].numel()).sqrt()).all()


def picture(height: int, width: int) -> np.ndarray:
    """Return something like a photograph: smooth, with edges and a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)], axis=-1) * 60 + 128
    waves[height // 3 :, width // 2 :] += np.array([40, -30, 20])
    return (waves + rng.normal(0, 5, waves.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("quality", [10, 40, 75, 95])
@pytest.mark.parametrize("size", [(64, 48), (37, 51)])
def test_jpeg_loses_what_a_file_loses(quality, size):
    pixels = picture(*size)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    ours = jpeg(image, torch.tensor([float(quality)]))[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality, subsampling=0)
    theirs = np.asarray(Image.open(file)).astype(float)
    # Whatever comes out of a file is rounded to 8 bits, as luma and differences and again as colours.
    assert np.abs(ours - theirs).mean() < (0.65 if quality < 90 else 1.1)
    # What is lost is the same: the table, its scale and the blocks are right.
    assert np.corrcoef((ours - pixels).ravel(), (theirs - pixels).ravel())[0, 1] > (0.98 if quality < 90 else 0.9)


def heavy(image: Tensor, strengths: Tensor) -> Tensor:
    for name in ("contrast", "gamma", "solarise", "posterise", "vignette", "gaussian_blur", "motion_blur", "jpeg"):
        operation, nothing, strong = OPERATIONS[name]
        some = 1 - strengths * (1 - strong) if math.isinf(nothing) else nothing + strengths * (strong - nothing)
        image = operation(image, some)
    return noise(image, normal(image), 0.1 * strengths, 0.1 * strengths).clamp(0, 1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_all_of_it_compiles_as_one_region(backend):
    image, strengths = torch.rand(2, 3, 16, 13), torch.tensor([0.0, 0.5])
    compiled = torch.compile(heavy, fullgraph=True, backend=backend)(image, strengths)
    assert torch.equal(compiled[0], image[0])
    # A coefficient of the cosine transform that rounds the other way is the largest difference there can be.
    assert (compiled - heavy(image, strengths)).abs().mean() < 1e-3
    assert compiled.min() >= 0 and compiled.max() <= 1
