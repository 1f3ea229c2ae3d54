"""Changes of an image's light, colour and sharpness, which leave every target as it is.

Each function takes images (B, 3, H, W) float32 and a number for each sample, (B,), and returns new images; a sample
whose number says "nothing" comes back bit for bit. Values are nominally in [0, 1], but nothing is cut off on the way:
whoever applies several of these clamps once, at the end. There is no loop over samples and nothing waits for the
device, so that all of it can be one compiled region.

Colours are sRGB as stored, and grey is their luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as in Pillow and
torchvision. What averages over a pixel's neighbours averages over those that the image has.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)

_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]).double()
"""Luma and the two colour differences of NTSC (FCC 1953), which are zero for grey."""

_TURN = torch.tensor([[0, 0, 0], [0, 0, 1], [0, -1, 0]]).double()
"""A quarter turn of the colour differences, red towards yellow."""

_BASIS = torch.stack([torch.eye(3).double(), _LUMA.expand(3, 3), torch.linalg.inv(_TO_YIQ) @ _TURN @ _TO_YIQ]).float()
"""What a colour is mapped to: itself, its grey, its colour differences after a quarter turn."""


def colour_matrix(
    mean: Tensor,
    *,
    brightness: Tensor | None = None,
    contrast: Tensor | None = None,
    saturation: Tensor | None = None,
    hue: Tensor | None = None,
    grey: Tensor | None = None,
    balance: Tensor | None = None,
) -> Tensor:
    """Return all linear changes of colour as one matrix for each sample, (B, 3, 4), for `apply_colour`.

    Hue, saturation and grey leave luma as it is and act on a colour's two differences as one complex factor,
    saturation (1 - grey) exp(i hue). Contrast follows, then brightness, then the balance. Nothing is clamped in
    between, in which this differs from torchvision's and kornia's sequences; the hue is an angle in the YIQ plane
    and not that of HSV, which is not linear.

    Args:
        mean: Each image's mean colour (B, 3), such as ``image.mean(dim=(2, 3))``; contrast is about its grey.
        brightness: Factor of all values (B,); 1 is nothing, as for each that is None.
        contrast: Factor of the distance from the image's mean grey (B,); 1 is nothing.
        saturation: Factor of the distance from a pixel's own grey (B,); 1 is nothing.
        hue: Angle in radians (B,), from red towards yellow; 0 is nothing.
        grey: Share of each pixel's own grey that is mixed in (B,), from 0 to 1; 0 is nothing.
        balance: Factors of red, green and blue (B, 3); 1 is nothing.
    """
    one = torch.ones_like(mean[:, 0])
    chroma = one if saturation is None else saturation
    if grey is not None:
        chroma = chroma * (1 - grey)
    real, imaginary = (chroma, 0 * one) if hue is None else (chroma * hue.cos(), chroma * hue.sin())
    contrast = one if contrast is None else contrast
    basis = _BASIS.to(mean.device, non_blocking=True)
    # Each share is exactly 0 or 1 where nothing is to change, and so is the matrix.
    shares = torch.stack([real, 1 - real, imaginary], dim=1)
    linear = contrast[:, None, None] * (shares[:, :, None, None] * basis).sum(dim=1)
    offset = (1 - contrast) * (mean * basis[1, 0]).sum(dim=1)
    factors = (one if brightness is None else brightness)[:, None]
    if balance is not None:
        factors = factors * balance
    return factors[:, :, None] * torch.cat([linear, offset[:, None, None].expand(-1, 3, 1)], dim=2)


def apply_colour(image: Tensor, matrix: Tensor) -> Tensor:
    """Map each colour of a sample by a matrix (B, 3, 4), whose last column is added."""
    # Three fused multiplications and not a matrix product, which may be rounded to TF32.
    red, green, blue, offset = matrix[..., None, None].unbind(dim=2)
    mapped = torch.addcmul(offset, red, image[:, 0:1])
    return mapped.addcmul_(green, image[:, 1:2]).addcmul_(blue, image[:, 2:3])


def gamma(image: Tensor, exponent: Tensor) -> Tensor:
    """Raise values to a power (B,); 1 is nothing. Values below 0 become 0 where there is a change."""
    exponent = _of_pixels(exponent)
    return torch.where(exponent == 1, image, image.clamp(min=0).pow_(exponent))


def solarise(image: Tensor, threshold: Tensor) -> Tensor:
    """Turn values from a threshold (B,) upwards into their negative, 1 - value; infinity is nothing."""
    return torch.where(image >= _of_pixels(threshold), 1 - image, image)


def posterise(image: Tensor, bits: Tensor) -> Tensor:
    """Keep the first bits (B,) of values in [0, 1], which rounds down; 8 and more are nothing."""
    levels = _of_pixels(bits).to(image.dtype).exp2()
    kept = torch.minimum((image * levels).floor(), levels - 1) / levels
    return torch.where(levels >= 2**8, image, kept)


def vignette(image: Tensor, strength: Tensor) -> Tensor:
    """Darken towards the corners: by 1 - strength r², where r is 0 in the middle and 1 in the frame's corners.

    Args:
        image: (B, 3, H, W).
        strength: What the corners lose (B,), from 0, which is nothing, to 1.
    """
    height, width = image.shape[-2:]
    y = torch.arange(height, device=image.device, dtype=image.dtype) - (height - 1) / 2
    x = torch.arange(width, device=image.device, dtype=image.dtype) - (width - 1) / 2
    square = (y[:, None] ** 2 + x**2) / ((height**2 + width**2) / 4)
    return image * (1 - _of_pixels(strength) * square)


def gaussian_blur(image: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur with a Gaussian, cut off at a radius.

    Args:
        image: (B, 3, H, W).
        sigma: Standard deviation in pixels (B,), at most about a third of the radius; 0 is nothing.
        radius: Half the width of the kernel, in pixels, the same for all samples.
    """
    distance = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    smallest = torch.finfo(image.dtype).eps
    kernel = (-0.5 * (distance / sigma.clamp(min=smallest)[:, None]).square()).exp()
    blurred = _filter(_filter(image, kernel[:, :, None]), kernel[:, None, :])
    return torch.where(_of_pixels(sigma) > 0, blurred, image)


def motion_blur(image: Tensor, length: Tensor, angle: Tensor, radius: int) -> Tensor:
    """Blur along a line through each pixel, symmetrically, so that nothing moves on the whole.

    A pixel's weight is the product of two overlaps: along the line that of the pixel's width with the line, across
    it a tent as wide as bilinear interpolation's.

    Args:
        image: (B, 3, H, W).
        length: Length of the line in pixels (B,), at most 2 radius + 1; up to 1 is nothing.
        angle: Direction in radians (B,), from the x axis (right) towards the y axis (down).
        radius: Half the width of the kernel, in pixels, the same for all samples.
    """
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = cosine * offset + sine * offset[:, None]
    across = cosine * offset[:, None] - sine * offset
    kernel = ((length[:, None, None] + 1) / 2 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    return torch.where(_of_pixels(length) > 1, _filter(image, kernel), image)


def noise(image: Tensor, normal: Tensor, sigma: Tensor, shot: Tensor) -> Tensor:
    """Add what a sensor adds: noise of the variance σ² + s v at a value v, the second part that of counting photons.

    The sum of independent Gaussian and shot noise, the latter in its normal approximation (Foi et al. 2008,
    equation 4), from one field of numbers.

    Args:
        image: (B, 3, H, W).
        normal: Standard normal numbers in the shape of the image.
        sigma: Standard deviation σ at black (B,); 0 is none.
        shot: Variance s that white has beyond that (B,), one over the photons it stands for; 0 is none.
    """
    variance = _of_pixels(sigma.square()) + _of_pixels(shot) * image.clamp(min=0)
    return torch.addcmul(image, normal, variance.sqrt_())


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Lose what a JPEG file loses: round the cosine transforms of 8x8 blocks.

    The tables are those of ITU-T T.81, annex K, scaled as libjpeg does; colour differences keep their resolution
    (4:4:4), and what comes back is not rounded.

    Args:
        image: (B, 3, H, W), nominally in [0, 1].
        quality: libjpeg's quality (B,), from 1; 100 and more are nothing.
    """
    height, width = image.shape[-2:]
    device = image.device
    transform, tables, ycc = (constant.to(device, non_blocking=True) for constant in (_COSINES, _TABLES, _YCC))
    per_cent = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)
    steps = ((tables * per_cent[:, None, None] + 50) / 100).floor().clamp(1, 255)

    padded = F.pad(apply_colour(image, ycc[:1]).round(), (0, -width % 8, 0, -height % 8), mode="replicate")
    rows, columns = padded.shape[-2] // 8, padded.shape[-1] // 8
    blocks = padded.view(-1, 3, rows, 8, columns, 8).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    steps = steps[:, :, None]
    blocks = ((blocks @ transform.T) / steps).round() * steps @ transform
    padded = blocks.view(-1, 3, rows, columns, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
    lossy = apply_colour(padded[..., :height, :width], ycc[1:])
    return torch.where(_of_pixels(quality) < 100, lossy, image)


@torch.library.custom_op("mtl::filter_samples", mutates_args=())
def _filter(image: Tensor, kernels: Tensor) -> Tensor:
    """Average pixels with each sample's own weights (B, h, w), of odd sides, over those that the image has.

    An operation of its own, because inductor would have the convolution's input with channels last, 3 B of them,
    and lose more time in turning it than in filtering.
    """
    samples, channels, height, width = image.shape
    sides = kernels.shape[1:]
    middle = (sides[0] // 2, sides[1] // 2)
    weights = kernels[:, None].expand(-1, channels, *sides).reshape(samples * channels, 1, *sides)
    # One row or column speaks for all of them where the kernel is no wider.
    there = image.new_ones(1, samples, height if sides[0] > 1 else 1, width if sides[1] > 1 else 1)
    total = F.conv2d(image.flatten(0, 1)[None], weights, padding=middle, groups=samples * channels)
    weight = F.conv2d(there, kernels[:, None], padding=middle, groups=samples)
    return total.view(image.shape).div_(weight.transpose(0, 1))


@_filter.register_fake
def _(image: Tensor, _kernels: Tensor) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _of_pixels(numbers: Tensor) -> Tensor:
    """Return numbers of samples (B,) in a shape that broadcasts against images."""
    return numbers[:, None, None, None]


def _ycc() -> Tensor:
    """Return the matrices (2, 3, 4) to and from JFIF's Y - 128, Cb - 128 and Cr - 128 on the scale of 8 bits."""
    blue, red = (torch.eye(3).double()[k] - _LUMA for k in (2, 0))
    forward = 255 * torch.stack([_LUMA, blue / 1.772, red / 1.402])
    offset = torch.tensor([[128.0], [0], [0]]).double()
    backward = torch.linalg.inv(forward)
    return torch.stack([torch.cat([forward, -offset], 1), torch.cat([backward, backward @ offset], 1)]).float()


def _cosines() -> Tensor:
    """Return the orthonormal cosine transform of an 8x8 block as a matrix (64, 64)."""
    place = torch.arange(8, dtype=torch.float64)
    waves = (place[:, None] * (2 * place + 1) * (math.pi / 16)).cos() / 2
    waves[0] /= math.sqrt(2)
    return torch.kron(waves, waves).to(torch.float32)


_YCC = _ycc()
_COSINES = _cosines()

_OF_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""

_OF_CHROMA = """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""

_TABLES = torch.tensor([[float(step) for step in table.split()] for table in (_OF_LUMA, _OF_CHROMA, _OF_CHROMA)])
"""Steps of the 64 coefficients at quality 50, of Y, Cb and Cr."""
