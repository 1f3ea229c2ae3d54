"""Augmentation on the batch's device: what is drawn for each sample, and in which order it acts.

One warp first (`mtl.augmentation.resampling`: every geometric change composed, each map resampled once), then light
and colour (`mtl.augmentation.photometry`), then what takes several samples (`mtl.augmentation.mixing`). A sample's
parameters are a function of (seed, epoch, position in the epoch) and of nothing else (`mtl.augmentation.draws`).
"""

import math

import torch
from torch import Tensor, nn

from mtl.augmentation import geometry, mixing, photometry
from mtl.augmentation.draws import Draws
from mtl.augmentation.geometry import Warp
from mtl.augmentation.resampling import warp
from mtl.config import PROBABILITIES, STRENGTHS, AugmentationOptions
from mtl.data.sample import Batch

SHARES = {
    "blur": 0.3,
    "motion_blur": 0.2,
    "noise": 0.5,
    "shot": 0.3,
    "vignette": 0.5,
    "perspective": 0.5,
    "pincushion": 0.5,
}
"""Share of the samples that a change acts on, where that is not all of them."""

_PLACES = {"motion_blur": 2, "scale": 3, "crop": 3, "translate": 2, "shear": 2, "perspective": 8, "balance": 3}
"""How many numbers a change draws for a sample, where that is not one."""

_GEOMETRIC = ("hflip", "vflip", "rotate", "scale", "crop", "stretch", "translate", "shear", "perspective", "pincushion")
_COLOUR = ("brightness", "contrast", "saturation", "hue", "balance", "grayscale")
_ERASED = 3
"""Boxes of a sample that is erased."""


class Augmentation(nn.Module):
    """Random changes of whole batches, a pure function of the batch and its `draw`.

    Args:
        options: Resolved: every field has its value, as `mtl.config.resolve_augmentation` gives them.
        seed: Seed of the draws.
        inverse_depth: Whether the data's `depth` is inverse depth.
    """

    def __init__(self, options: AugmentationOptions, seed: int, *, inverse_depth: bool = False) -> None:
        super().__init__()
        self.options, self.seed, self.inverse_depth = options, seed, inverse_depth
        values = {name: getattr(options, name) or 0.0 for name in STRENGTHS}
        magnitude = 1.0 if options.magnitude is None else options.magnitude
        # A probability cannot exceed one, and a stretch of the strength does not make sense of it.
        self.strengths = {
            name: min(1.0, value * magnitude) if name in PROBABILITIES else value * magnitude
            for name, value in values.items()
            if value * magnitude > 0
        }
        # The last number of each change decides whether it acts at all.
        self._shapes = {name: (_PLACES.get(name, 1) + 1,) for name in self.strengths}
        for name, count in (("erase", 4 * _ERASED), ("cutmix", 4), ("mosaic", 2), ("mixup", 1)):
            if name in self.strengths:
                self._shapes[name] = (count + 2,)

    def forward(self, batch: Batch) -> Batch:
        """Return a changed batch.

        Args:
            batch: As `mtl.data.sample` defines it, its image (B, 3, H, W) of floats in [0, 1], with `draw` (B, 2)
                int64: each sample's epoch, the same for all, and its position in the epoch.
        """
        if not self.strengths:
            return batch
        draws = Draws(self.seed, batch["draw"][0, 0], batch["draw"][:, 1])
        drawn = draws.uniforms(self._shapes)
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        if any(name in self.strengths for name in _GEOMETRIC):
            batch = warp(
                batch,
                Warp(self._matrix(drawn, size), self._amount(drawn, "pincushion")),
                fill=self.options.fill or "reflection",
                depth_convention=self.options.depth_convention or "metric",
                inverse_depth=self.inverse_depth,
                interpolation=self.options.interpolation or "bilinear",
                antialias=self._uses("scale", "stretch", "shear", "perspective", "pincushion"),
            )
        batch = {**batch, "image": self._photometry(batch["image"], drawn, draws)}
        return self._mix(batch, drawn)

    def compile_photometry(self) -> None:
        """Compile what is made of many small operations; the warp is a few large ones, which gain nothing."""
        self._photometry = torch.compile(self._photometry)  # type: ignore[method-assign]

    def _uses(self, *names: str) -> bool:
        return any(name in self.strengths for name in names)

    def _acts(self, drawn: dict[str, Tensor], name: str) -> Tensor:
        """Return which samples (B,) a change acts on."""
        share = self.strengths[name] if name in PROBABILITIES else SHARES.get(name, 1.0)
        return drawn[name][:, -1] < share

    def _amount(self, drawn: dict[str, Tensor], name: str, place: int = 0, *, signed: bool = True) -> Tensor:
        """Return by how much a change acts on each sample (B,), uniform up to its strength, zero where it does not."""
        if name not in self.strengths:
            return torch.zeros_like(next(iter(drawn.values()))[:, 0])
        number = drawn[name][:, place]
        number = 2 * number - 1 if signed else number
        return torch.where(self._acts(drawn, name), number * self.strengths[name], 0)

    def _factor(self, drawn: dict[str, Tensor], name: str, place: int = 0, *, signed: bool = True) -> Tensor:
        """Return a factor for each sample (B,), log-uniform between 1 / (1 + strength) and 1 + strength."""
        if name not in self.strengths:
            return torch.ones_like(next(iter(drawn.values()))[:, 0])
        number = drawn[name][:, place]
        number = 2 * number - 1 if signed else number
        return torch.where(self._acts(drawn, name), (number * math.log1p(self.strengths[name])).exp(), 1)

    def _matrix(self, drawn: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Return the composed geometry (B, 3, 3): what turns and bends the picture first, where it ends up last."""
        height, width = size
        some = next(iter(drawn.values()))
        matrices = [geometry.translation(torch.zeros_like(some[:, 0]), torch.zeros_like(some[:, 0]))]
        for name, flip in (("hflip", geometry.hflip), ("vflip", geometry.vflip)):
            if name in self.strengths:
                matrices.append(flip(self._acts(drawn, name), size))
        if self._uses("perspective"):
            most = torch.tensor([width / 2, height / 2], device=some.device)
            moved = torch.stack([self._amount(drawn, "perspective", place) for place in range(8)], 1)
            matrices.append(geometry.perspective(moved.view(-1, 4, 2) * most, size))
        if self._uses("shear"):
            slopes = [(self._amount(drawn, "shear", place) * (math.pi / 180)).tan() for place in range(2)]
            matrices.append(geometry.shear(slopes[0], slopes[1], size))
        if self._uses("stretch"):
            factor = self._factor(drawn, "stretch")
            matrices.append(geometry.stretch(torch.ones_like(factor), factor, size))
        if self._uses("rotate"):
            matrices.append(geometry.rotation(self._amount(drawn, "rotate") * (math.pi / 180), size))
        if self._uses("scale", "crop"):
            zoom = self._factor(drawn, "scale") * self._factor(drawn, "crop", signed=False)
            matrices.append(geometry.scale(zoom, size))
            # Anywhere within the frame, if the picture is now smaller, and any part of it, if it is larger.
            place = drawn["scale" if "scale" in self.strengths else "crop"]
            slack = (zoom - 1).abs()
            x, y = ((place[:, k] - 0.5) * slack * side for k, side in ((-2, width), (-3, height)))
            matrices.append(geometry.translation(x, y))
        if self._uses("translate"):
            x, y = (self._amount(drawn, "translate", k) * side for k, side in ((0, width), (1, height)))
            matrices.append(geometry.translation(x, y))
        return geometry.compose(*matrices)

    def _photometry(self, image: Tensor, drawn: dict[str, Tensor], draws: Draws) -> Tensor:
        """Change light, colour and sharpness, and clamp once."""
        before = image
        if self._uses(*_COLOUR):
            channels = [1 + self._amount(drawn, "balance", place) for place in range(3)]
            matrix = photometry.colour_matrix(
                image.mean(dim=(2, 3)),
                brightness=1 + self._amount(drawn, "brightness"),
                contrast=1 + self._amount(drawn, "contrast"),
                saturation=1 + self._amount(drawn, "saturation"),
                hue=self._amount(drawn, "hue") * (2 * math.pi),
                grey=self._acts(drawn, "grayscale").float() if self._uses("grayscale") else None,
                balance=torch.stack(channels, dim=1),
            )
            image = photometry.apply_colour(image, matrix)
        if self._uses("gamma"):
            image = photometry.gamma(image, self._factor(drawn, "gamma"))
        if self._uses("solarize"):
            number = drawn["solarize"][:, 0]
            image = photometry.solarise(image, torch.where(self._acts(drawn, "solarize"), 0.5 + number / 2, torch.inf))
        if self._uses("posterize"):
            bits = 3 + (3 * drawn["posterize"][:, 0]).floor()
            image = photometry.posterise(image, torch.where(self._acts(drawn, "posterize"), bits, 8))
        if self._uses("blur"):
            radius = math.ceil(3 * self.strengths["blur"])
            image = photometry.gaussian_blur(image, self._amount(drawn, "blur", signed=False), radius)
        if self._uses("motion_blur"):
            length = self._amount(drawn, "motion_blur", signed=False)
            angle = drawn["motion_blur"][:, 1] * math.pi
            image = photometry.motion_blur(image, length, angle, math.ceil(self.strengths["motion_blur"] / 2))
        if self._uses("vignette"):
            image = photometry.vignette(image, self._amount(drawn, "vignette", signed=False).clamp(max=1))
        if self._uses("jpeg"):
            quality = 20 + 70 * drawn["jpeg"][:, 0]
            image = photometry.jpeg(image, torch.where(self._acts(drawn, "jpeg"), quality, 100))
        if self._uses("noise", "shot"):
            sigma, shot = (self._amount(drawn, name, signed=False) for name in ("noise", "shot"))
            image = photometry.noise(image, draws.normal_like("pixels", image), sigma, shot)
        return image if image is before else image.clamp(0, 1)

    def _mix(self, batch: Batch, drawn: dict[str, Tensor]) -> Batch:
        """Put several samples into one picture, and hide parts of it."""
        if self._uses("mosaic"):
            number = drawn["mosaic"]
            centre = torch.where(self._acts(drawn, "mosaic")[:, None], 0.25 + number[:, :2] / 2, 1)
            batch = mixing.mosaic(batch, mixing.partners(number[:, -2], 3), centre)
        if self._uses("cutmix"):
            number = drawn["cutmix"]
            area = torch.where(self._acts(drawn, "cutmix"), 0.1 + 0.4 * number[:, 0], 0)
            boxes = mixing.place_boxes(area, 2 ** (2 * number[:, 1] - 1), number[:, 2:4])
            batch = mixing.cutmix(batch, mixing.partners(number[:, -2])[:, 0], boxes)
        if self._uses("mixup"):
            number = drawn["mixup"]
            share = torch.where(self._acts(drawn, "mixup"), 1 - 0.25 * number[:, 0], 1)
            batch = mixing.mixup(batch, mixing.partners(number[:, -2])[:, 0], share)
        if self._uses("erase"):
            number = drawn["erase"][:, : 4 * _ERASED].view(-1, _ERASED, 4)
            area = torch.where(self._acts(drawn, "erase")[:, None], 0.01 + 0.05 * number[..., 0], 0)
            boxes = mixing.place_boxes(area, 2 ** (2 * number[..., 1] - 1), number[..., 2:])
            batch = mixing.erase(batch, boxes, batch["image"].mean(dim=(2, 3), keepdim=True))
        return batch
