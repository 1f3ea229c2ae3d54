"""Prediction of images of any size."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mtl.data.fitting import resample
from mtl.ensembling.ensemble import Together
from mtl.errors import UserError
from mtl.prediction.images import Picture, pixels
from mtl.prediction.tta import SCALES, AveragedViews
from mtl.prediction.windows import Cover, blend, cover, resize
from mtl.tasks.base import Task
from mtl.training.module import MultiTaskModule

ONE_PASS = 4
"""An image of up to this many times the pixels of training goes through the model whole, where the backbone takes
any size."""

_LARGEST = 2**25
"""The most pixels to which an image is enlarged."""

_BAND = 2**24
"""Outputs that are turned into predictions at once, all channels counted."""


class Predictor:
    """A trained model that takes images of any size and answers at that size.

    An image is first brought to the scale of training, just as training samples are (`mtl.data.fitting`): it is
    scaled until it covers the size of training, but nothing is cut off. That is the scale at which the network
    knows textures and sizes, on which metric depth depends. What is larger than the size of training then goes
    through the model in overlapping windows of that size, unless the backbone takes any size and the image is not
    much larger. Windows are blended before anything else is made of the heads' outputs, and the outputs are
    resampled to the image's own size before they become predictions: so classes are decided, and normals
    normalised, last. With test-time augmentation this holds of the mean over views in place of the outputs, and of
    several members of what they say together, and how uncertain that is.

    Args:
        module: Model and tasks; it is put into evaluation mode. Its device and type are used.
        scale: 'fit' brings images to the scale of training; 'native' leaves them as they are.
        overlap: Share of its length by which a window overlaps the next, at least 0 and less than 1.
        batch_size: Windows in a batch.
        tta: Whether to ask about each window's mirror image, and about both at other scales, and to average
            (`AveragedViews`): True for the usual scales, or these scales beside 1, of which there may be none.
        answers: What answers in the module's place, in place of `tta`: several models, passes or views.

    Raises:
        UserError: An option is not allowed, or not with this backbone.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        *,
        scale: Literal["fit", "native"] = "fit",
        overlap: float = 0.25,
        batch_size: int = 8,
        tta: bool | Sequence[float] = False,
        answers: Together | AveragedViews | None = None,
    ) -> None:
        if scale not in ("fit", "native"):
            raise UserError(f"the scale {scale!r} is not one of fit, native")
        if not 0 <= overlap < 1:
            raise UserError(f"an overlap of {overlap} is not a share of a window, from 0 to less than 1")
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} windows is none: take at least 1")
        if answers is not None and tta is not False:
            raise UserError("what answers in the model's place decides about views of an image: leave tta out")
        self.module = module
        self.tasks = list(module.each_task())
        self.scale = scale
        self.overlap = overlap
        self.batch_size = batch_size
        self._views = answers if tta is False else AveragedViews(module, SCALES if tta is True else tta)
        self._size = module.options.data.size
        self._fixed = "img_size" in module.model.backbone.size_arguments

    @torch.no_grad()
    def predict(self, image: Picture) -> dict[str, Tensor]:
        """Return each task's prediction, by the task's name, at the image's own height and width.

        Args:
            image: A file's path, a Pillow image, an array (H, W, 3) uint8, or a tensor (3, H, W) uint8 or floats in
                [0, 1]; sRGB.

        Returns:
            What the tasks predict, without the axis of a batch, on the CPU: segmentation (H, W) int64, depth
            (1, H, W) in metres, normals (3, H, W).

        Raises:
            UserError: The image cannot be read, or is too elongated to be brought to the scale of training.
        """
        return self.predict_with_uncertainty(image)[0]

    @torch.no_grad()
    def predict_with_uncertainty(self, image: Picture) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `predict` does, and each task's uncertainty where several answers are combined.

        Returns:
            The predictions, and by the tasks' names maps (H, W) float32 as `mtl.ensembling.combine.Combined` defines
            them, on the CPU; without several answers there is none.

        Raises:
            UserError: As `predict` does.
        """
        self.module.eval()
        array = pixels(image)
        size = (array.shape[0], array.shape[1])
        scaled = torch.from_numpy(resample(array, self._scaled(size))).permute(2, 0, 1)
        height, width = scaled.shape[1:]
        window = self._window(height, width)
        rows, columns = cover(height, window[0], self.overlap), cover(width, window[1], self.overlap)
        strips = blend(self._answers(scaled, rows, columns), rows, columns)
        shapes = [self._shape(task) for task in self.tasks]
        channels = [math.prod(shape) for shape in shapes]
        if isinstance(self._views, Together):
            channels += [1] * len(self.tasks)
        bands = resize(strips, (height, width), size, max(1, _BAND // (sum(channels) * max(width, size[1]))))
        parts: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        uncertain: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        for band in bands:
            answers = band.split_with_sizes(channels)
            for task, shape, answer in zip(self.tasks, shapes, answers, strict=False):
                predict = task.predict if self._views is None else task.harden
                parts[task.name].append(predict(answer.reshape(1, *shape, *answer.shape[1:]))[0].cpu())
            for task, answer in zip(self.tasks, answers[len(self.tasks) :], strict=False):
                uncertain[task.name].append(answer[0].float().cpu())
        predictions, maps = (
            {name: torch.cat(bands, dim=-2) for name, bands in found.items() if bands} for found in (parts, uncertain)
        )
        return predictions, maps

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width at which an image of this size goes through the model."""
        if self.scale == "native":
            return size
        factor = max(target / available for target, available in zip(self._size, size, strict=True))
        # By the definition of the factor, no side ends up shorter than that of training.
        height, width = (max(t, round(s * factor)) for t, s in zip(self._size, size, strict=True))
        if height * width > max(_LARGEST, size[0] * size[1]):
            raise UserError(
                f"an image of {size[1]}x{size[0]} pixels (width x height) would have to be enlarged to {width}x{height}"
                " for the scale of training: cut it into less elongated ones, or use the scale 'native'"
            )
        return height, width

    def _window(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the windows for an image of this size."""
        if not self._fixed and height * width <= ONE_PASS * self._size[0] * self._size[1]:
            return height, width
        return self._size

    def _shape(self, task: Task) -> tuple[int, ...]:
        """Return the axes of a task's answers between those of the batch and of the image."""
        if self._views is None:
            return (task.channels,)
        device = next(self.module.model.parameters()).device
        return tuple(task.soft(torch.zeros(1, task.channels, 1, 1, device=device)).shape[1:-2])

    def _answers(self, image: Tensor, rows: Cover, columns: Cover) -> Iterator[Tensor]:
        """Yield (C, rows.window, columns.window) for each window, all tasks' channels in a row.

        They are the heads' outputs, or with test-time augmentation the means of what can be averaged. Of several
        members, each task's uncertainty follows after all tasks' channels.
        """
        parameter = next(self.module.model.parameters())
        layout = torch.channels_last if self.module.options.channels_last else torch.contiguous_format
        # A backbone that takes but one size gets small images extended as the model itself would extend them.
        least = self._size if self._fixed else (0, 0)
        padding = (0, max(0, least[1] - columns.window), 0, max(0, least[0] - rows.window))
        places = itertools.product(rows.starts, columns.starts)
        while chunk := list(itertools.islice(places, self.batch_size)):
            windows = torch.stack([image[:, y : y + rows.window, x : x + columns.window] for y, x in chunk])
            batch = windows.to(parameter.device).to(parameter.dtype)
            if image.dtype == torch.uint8:
                batch = batch / 255
            if any(padding):
                batch = functional.pad(batch, padding, mode="replicate")
            maps = self._ask(batch.contiguous(memory_format=layout))
            joined = torch.cat([_with_channels(answer) for answer in maps], dim=1)
            yield from joined[..., : rows.window, : columns.window]

    def _ask(self, batch: Tensor) -> list[Tensor]:
        """Return the maps (B, H, W) or (B, C, H, W) to blend: one a task, then the tasks' uncertainty, if any."""
        if isinstance(self._views, Together):
            together = self._views.combine(batch)
            combined = [together[task.name] for task in self.tasks]
            return [answer.soft for answer in combined] + [answer.uncertainty for answer in combined]
        answers = self.module.model(batch) if self._views is None else self._views.soft(batch)
        return [answers[task.name] for task in self.tasks]


def _with_channels(maps: Tensor) -> Tensor:
    """Return (B, C, H, W) for that or (B, H, W)."""
    return maps if maps.dim() == 4 else maps[:, None]
