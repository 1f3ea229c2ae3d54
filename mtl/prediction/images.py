"""What may be given as an image to predict."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mtl.data.decoding import image_size, read_image
from mtl.errors import UserError

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file's path, a Pillow image, an array (H, W, 3) uint8, or a tensor (3, H, W) uint8 or floats in [0, 1]."""


def pixels(image: Picture) -> np.ndarray:
    """Return an image's pixels (H, W, 3), uint8 or float32 in [0, 1].

    Files and Pillow images are turned as their EXIF data says, and become RGB.

    Raises:
        UserError: The file cannot be read, or this is no such image.
    """
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}; name an image")
        image_size(path)  # refuses more than 8 bits, which Pillow would cut off
        return read_image(path)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UserError(f"the image has pixels of more than 8 bits (mode {image.mode}): convert it to RGB")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an array must be (H, W, 3) uint8, and this is {image.shape} {image.dtype}")
        return image
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise UserError(f"a tensor must be (3, H, W), and this is {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"a tensor must be uint8 or floats in [0, 1], and this is {image.dtype}")
    if image.is_floating_point():
        image = image.float()
    array: np.ndarray = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    if array.dtype == np.float32 and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"a tensor of floats must be in [0, 1], and this is from {array.min():.3g} to {array.max():.3g}: "
            "divide by 255, or give uint8"
        )
    return array
