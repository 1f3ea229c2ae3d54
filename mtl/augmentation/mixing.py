"""Hiding parts of a picture, and putting several pictures of a batch into one.

Everything here changes the whole batch (see `mtl.data.sample`; the image is already float) and returns a new one.
Pieces keep their place in the frame and their scale, so that metric depth, normals and, where the cameras are the
same, the intrinsics stay true. Where pieces of pictures with different intrinsics meet, no single pinhole camera
took the result, and the intrinsics become zero: unknown.

Whom a sample is mixed with depends, by nature, on who shares its batch. With the numbers of
`mtl.augmentation.draws`, which belong to positions of the epoch, the same batch is always mixed in the same way, in
whatever order it comes: on resume and with any number of workers. Another number of ranks or another batch size
deals the samples to other batches, and then other pictures meet.

Boxes are (left, top, right, bottom) in fractions of the frame's width and height. A pixel is inside if its centre
is, where the centre of column j is (j + 0.5) / width.
"""

from typing import Literal

import torch
from torch import Tensor

from mtl.data.sample import TARGETS, Batch


def place_boxes(area: Tensor, aspect: Tensor, place: Tensor) -> Tensor:
    """Return boxes (..., 4) that lie within the frame.

    Args:
        area: Share of the frame that a box covers (...), from 0 to 1.
        aspect: Its width over its height (...), relative to the frame's; what would be wider or higher than the
            frame is cut to it, and then covers less.
        place: Two numbers in [0, 1] (..., 2): where between the frame's sides it is, horizontally and vertically.
    """
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).clamp(max=1)
    corner = place * (1 - size)
    return torch.cat([corner, corner + size], dim=-1)


def partners(keys: Tensor, count: int = 1) -> Tensor:
    """Return for each sample the indices of others in its batch, (B, count) int64.

    The samples stand in a circle in the order of their keys, and a sample's partners are the next ones: so each
    serves equally often, none is its own partner (before the circle is exhausted), and the order of the batch makes
    no difference.

    Args:
        keys: One random number for each sample (B,).
        count: How many partners each gets.
    """
    order = keys.argsort(stable=True)
    place = order.argsort()
    steps = torch.arange(1, count + 1, device=keys.device)
    return order[(place[:, None] + steps) % len(keys)]


def erase(batch: Batch, boxes: Tensor, fill: Tensor, targets: Literal["keep", "ignore"] = "keep") -> Batch:
    """Fill boxes of the image (DeVries & Taylor 2017, "Cutout"; Zhong et al. 2020, "Random erasing").

    Targets stay by default: the point is that what is hidden be inferred from what is around it, as it must be
    behind a lens flare or a speck of dirt. For boxes too large for that, 'ignore' takes the labels inside out of
    the loss, and what is learned is to be undisturbed around them.

    Args:
        batch: Its image is (B, 3, H, W) float.
        boxes: (B, K, 4), K for each sample; an empty one erases nothing.
        fill: What they are filled with, in a shape that broadcasts against the image: each image's mean
            ``image.mean(dim=(2, 3), keepdim=True)``, zeros, or noise.
        targets: What becomes of the targets inside: 'keep' or 'ignore'.
    """
    inside = _inside(boxes, batch["image"]).any(dim=1)
    erased = {**batch, "image": torch.where(inside[:, None], fill, batch["image"])}
    if targets == "ignore":
        for key in _targets(batch):
            erased[key] = _invalidate(key, batch[key], inside)
    return erased


def cutmix(batch: Batch, partner: Tensor, boxes: Tensor) -> Batch:
    """Put a box of another sample, image and targets, in the same place (Yun et al. 2019, "CutMix").

    Args:
        batch: A batch.
        partner: Index in the batch of each sample's partner (B,).
        boxes: (B, 4); an empty one changes nothing.
    """
    return _assemble(batch, partner[:, None], _inside(boxes[:, None], batch["image"]))


def mosaic(batch: Batch, others: Tensor, centre: Tensor) -> Batch:
    """Put four samples into one, each in a corner of the frame (after Bochkovskiy et al. 2020, "YOLOv4").

    The sample itself keeps the upper left part. Unlike YOLO's, the parts are not scaled: it is geometry's part to
    have scaled the pictures before.

    Args:
        batch: A batch.
        others: Indices in the batch of those that fill upper right, lower left and lower right (B, 3).
        centre: Where the parts meet (B, 2), x and y in fractions of the frame; (1, 1) changes nothing.
    """
    x, y = centre[:, None].unbind(dim=2)
    low, high = torch.zeros_like(x), torch.ones_like(x)
    right, below, both = (torch.cat(box, dim=1) for box in ((x, low, high, y), (low, y, x, high), (x, y, high, high)))
    return _assemble(batch, others, _inside(torch.stack([right, below, both], dim=1), batch["image"]))


def mixup(batch: Batch, partner: Tensor, share: Tensor, faint: float = 0.25) -> Batch:
    """Average images (Zhang et al. 2018, "mixup"), and keep the targets that remain true.

    A mean of two labels is no label here: a pixel has one class, and there is no surface halfway between two. The
    targets are those of the sample with the larger share. Where the other is faint, a reflection in a window, they
    stand as they are. Otherwise the picture shows both, and a target stands only where both samples agree in it:
    that is right for classes, and leaves of depth and normals next to nothing. So draw most shares beyond 1 - faint
    where these are learned.

    Args:
        batch: Its image is (B, 3, H, W) float.
        partner: Index in the batch of each sample's partner (B,).
        share: Weight of the sample itself (B,), from 0 to 1; 1 changes nothing.
        faint: The largest weight at which a picture does not count against the other's targets.
    """
    image = batch["image"]
    own = share[:, None, None, None]
    mixed = {**batch, "image": torch.addcmul(own * image, 1 - own, image[partner])}
    # Whose the targets are, and of whom they may be contradicted.
    rows = torch.arange(len(share), device=share.device)
    leader, other = torch.where(share >= 0.5, rows, partner), torch.where(share >= 0.5, partner, rows)
    both = torch.minimum(share, 1 - share) > faint
    for key in _targets(batch):
        value = batch[key][leader]
        differs = value != batch[key][other]
        if TARGETS[key].channels is not None:
            differs = differs.any(dim=1)
        mixed[key] = _invalidate(key, value, differs & both[:, None, None])
    if "intrinsics" in batch:
        camera = batch["intrinsics"][leader]
        differs = (camera != batch["intrinsics"][other]).any(dim=2).any(dim=1)
        mixed["intrinsics"] = camera.masked_fill((differs & both)[:, None, None], 0)
    return mixed


def _assemble(batch: Batch, others: Tensor, masks: Tensor) -> Batch:
    """Show other samples (B, K) where their masks (B, K, H, W) are true, the last one on top."""
    assembled = dict(batch)
    for key in ("image", *_targets(batch)):
        value = batch[key]
        for k in range(others.shape[1]):
            mask = masks[:, k] if value.ndim == 3 else masks[:, k, None]
            assembled[key] = torch.where(mask, value[others[:, k]], assembled[key])
    if "intrinsics" in batch:
        assembled["intrinsics"] = _common_camera(batch["intrinsics"], others, masks)
    return assembled


def _common_camera(intrinsics: Tensor, others: Tensor, masks: Tensor) -> Tensor:
    """Return the intrinsics (B, 3, 3) of the samples that are seen, where these have the same, else zero."""
    seen = masks.flatten(2).any(dim=2)
    own = ~masks.any(dim=1).flatten(1).all(dim=1)
    seen = torch.cat([own[:, None], seen], dim=1)
    cameras = torch.cat([intrinsics[:, None], intrinsics[others]], dim=1)
    # Any of those seen can stand for all.
    first = seen.to(torch.uint8).argmax(dim=1)
    camera = cameras[torch.arange(len(first), device=first.device), first]
    same = (cameras == camera[:, None]).all(dim=3).all(dim=2) | ~seen
    return torch.where(same.all(dim=1)[:, None, None], camera, 0)


def _inside(boxes: Tensor, image: Tensor) -> Tensor:
    """Return which pixels of an image (B, 3, H, W) have their centres in boxes (B, K, 4), as booleans (B, K, H, W)."""
    height, width = image.shape[-2:]
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    left, top, right, bottom = boxes[..., None].unbind(dim=2)
    return ((y >= top) & (y < bottom))[..., None] & ((x >= left) & (x < right))[..., None, :]


def _targets(batch: Batch) -> list[str]:
    """Return the keys of the dense targets that a batch has."""
    return [key for key in TARGETS if key in batch]


def _invalidate(key: str, target: Tensor, where: Tensor) -> Tensor:
    """Return a target without its labels where a mask (B, H, W) is true."""
    kind = TARGETS[key]
    return target.masked_fill(where if kind.channels is None else where[:, None], kind.invalid)
