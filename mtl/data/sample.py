"""The contract between data sets, augmentation, tasks and models.

A *batch* is a dictionary of tensors, a *sample* is the same for one image (or one signal, which has no channels), as
NumPy arrays with channels last (which is what image libraries read and write):

============== ========================== ========================== ================ ==============
key            batch (torch)              sample (NumPy)             unit             invalid
============== ========================== ========================== ================ ==============
`image`        (B, 3, H, W) uint8         (H, W, 3) uint8            sRGB             --
`segmentation` (B, H, W) uint8            (H, W) uint8               class index      255
`depth`        (B, 1, H, W) float32       (H, W) float32             metre            0
`normals`      (B, 3, H, W) float32       (H, W, 3) float32          unit vector      (0, 0, 0)
`intrinsics`   (B, 3, 3) float32          (3, 3) float32             pixel            all zero
`signal`       (B, 1, T) float32          (T,) float32               standardised     --
`label`        (B,) int64                 () int64                   class index      255
`draw`         (B, 2) int64               --                         --               position -1
============== ========================== ========================== ================ ==============

Depth is the distance along the optical axis. Normals live in the camera's frame, x right, y down,
z forward, so that a surface facing the camera has z < 0. Pixel (column 0, row 0) has its centre at
the image coordinate (0, 0), which is where `intrinsics` puts its principal point's origin.

A sample is either a picture, with `image` and any of what follows it, or a signal, with `signal` and `label`.

`draw` is where in training a sample is used: its epoch, and its position in the epoch's order. Loaders give depth
and normals as float16, in which they are kept; `as_floats` makes of a batch what is computed with.

A label that does not exist is a target without a valid pixel. That is how samples with only some
of the labels share a batch: a loss averages over valid pixels, and a task with none contributes
exactly zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = 255
"""The class index that means "no label"."""

DepthConvention = Literal["metric", "canonical"]
"""What enlarging a picture means: a longer focal length, or that everything has come nearer."""

Sample = dict[str, np.ndarray]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """How one target is stored.

    Attributes:
        channels: Size of the channel axis of a batch, or `None` where there is no such axis.
        dtype: Type of a batch on the device.
        storage: Type in which a whole data set is kept in memory.
        invalid: Value that means "no label here".
    """

    channels: int | None
    dtype: torch.dtype
    storage: torch.dtype
    invalid: float


TARGETS: dict[str, Target] = {
    "segmentation": Target(None, torch.uint8, torch.uint8, IGNORE_INDEX),
    "depth": Target(1, torch.float32, torch.float16, 0.0),
    "normals": Target(3, torch.float32, torch.float16, 0.0),
}
"""The dense targets of the contract, by key."""

ALL_TARGETS: dict[str, Target] = {**TARGETS, "label": Target(None, torch.int64, torch.int64, IGNORE_INDEX)}
"""The same, and the target that has one value for a whole sample, without height and width."""


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set without reading its samples.

    Attributes:
        name: A short name for messages and titles.
        targets: Keys of the targets that at least one sample has.
        classes: Names of the classes of `segmentation` or `label`, in the order of their indices.
        inverse_depth: Whether `depth` holds inverse depth, without a unit, in place of metres: what is twice as far
            has half the value.
        signal_length: Number T of values, where samples are signals; None where they are pictures.
    """

    name: str
    targets: tuple[str, ...]
    classes: tuple[str, ...] = ()
    inverse_depth: bool = False
    signal_length: int | None = None

    @property
    def input(self) -> str:
        """The key of what a model is given."""
        return "image" if self.signal_length is None else "signal"


class Source(Protocol):
    """A data set: a fixed number of samples, each of one given size.

    Reading a sample is a pure function of its index, so that any worker on any machine reads the
    same one.
    """

    info: DataInfo

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def name(self, index: int) -> str:
        """Return what a person would call this sample, such as its file's stem."""
        ...

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): which samples have any label of this target."""
        ...

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Return samples with their input and those of `targets` that each has; a missing label's key is absent."""
        ...


def as_floats(batch: Batch) -> Batch:
    """Return a loader's batch with floats: images in [0, 1], depth and normals in single precision."""
    floats = {name: v.float() if name in ("image", "depth", "normals") else v for name, v in batch.items()}
    if "image" in floats:
        floats["image"] = floats["image"] / 255
    return floats
