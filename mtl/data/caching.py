"""Where decoded samples are kept between their uses, so that a batch is a mere selection.

========= ====================================================================================
cache     a sample is decoded
========= ====================================================================================
`device`  once a run, and kept on the device that trains
`memory`  once a run, and kept in the host's memory
`disk`    once for all runs, into a file that is mapped into memory and read as it is needed
`none`    by the loader's workers, whenever it is used
========= ====================================================================================

All of them keep the types of `mtl.data.sample.Target.storage`, and `none` rounds to them, so that batches are the
same bit for bit.
"""

import hashlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import h5py
import numpy as np
import torch
from torch import Tensor

from mtl.data.sample import Batch
from mtl.errors import UserError

Cache = Literal["device", "memory", "disk", "none"]

DEVICE_SHARE = 4
"""One part in so many of a device's free memory may hold data unasked: model and activations need the rest."""


class Choice(NamedTuple):
    """Which cache to use.

    Attributes:
        cache: Which.
        reason: One line that says so to a person, and why.
    """

    cache: Cache
    reason: str


def choose(
    cache: Cache | Literal["auto"],
    bytes_needed: int,
    device: torch.device,
    cache_gb: float,
    *,
    loader_augments: bool = False,
) -> Choice:
    """Choose where to keep samples.

    'auto' is `device` where that is a GPU and the samples fit in a quarter of its free memory, else `memory` where
    they fit in `cache_gb`, else `none`. What is asked for by name is not held to these budgets.

    Args:
        cache: What was asked for.
        bytes_needed: What all samples of the run take (see `mtl.data.loading.bytes_in_memory`).
        device: Where training computes.
        cache_gb: Gigabytes (10^9 bytes) of the host's memory that 'auto' may fill.
        loader_augments: Whether the loader changes single samples, which it does in the host's memory.

    Raises:
        UserError: The samples cannot be kept on the device, though that was asked for.
    """
    needed = f"{bytes_needed / 1e9:.2f} GB"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if cache == "device":
        if loader_augments:
            raise UserError(
                "--data.cache device keeps samples where the loader cannot augment them one by one: use "
                "--data.cache memory, or an augmentation on the device"
            )
        if free is not None and bytes_needed > free:
            raise UserError(
                f"--data.cache device: the samples take {needed}, and {device} has {free / 1e9:.2f} GB free; use memory"
            )
    if cache != "auto":
        places = {
            "device": f"on {device}, {needed}",
            "memory": f"in memory, {needed}",
            "disk": f"on disk, {needed}",
            "none": "decoded at every use",
        }
        return Choice(cache, f"samples: {places[cache]}, as asked for")
    if free is not None and not loader_augments and bytes_needed <= free / DEVICE_SHARE:
        share = f"{bytes_needed / free:.1%} of its free memory ({1 / DEVICE_SHARE:.0%} may be used)"
        return Choice("device", f"samples: on {device}, {needed}, {share}")
    if bytes_needed <= cache_gb * 1e9:
        return Choice("memory", f"samples: in memory, {needed} of the {cache_gb:g} GB allowed (--data.cache-gb)")
    return Choice(
        "none",
        f"samples: decoded at every use, as {needed} are more than the {cache_gb:g} GB allowed (--data.cache-gb); "
        "--data.cache disk would decode them once",
    )


@runtime_checkable
class Fingerprinted(Protocol):
    """A data set that can tell whether it is still the one it was."""

    def fingerprint(self) -> str | None:
        """Return a text that changes whenever what `read` returns may have changed, or None where nobody knows."""
        ...


def digest(*parts: object) -> str:
    """Return a short name (32 digits) for plain values: other values, another name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def stamp(paths: Iterable[Path]) -> str:
    """Return a short name for files as they are now, from their paths, sizes and times of modification."""
    states = ((str(path.absolute()), path.stat()) for path in paths)
    return digest(*((path, state.st_size, state.st_mtime_ns) for path, state in states))


class Mapped(dict[str, Tensor]):
    """The tensors of a file, mapped into memory: only what is read of them takes any.

    They must not be written to. Pickled, this is the file's path, so that workers share the file however they start.

    Args:
        path: A file that `write` has written.

    Raises:
        OSError: There is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with h5py.File(path, locking=False) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            for name, values in file.items():
                mapped = np.memmap(path, values.dtype, "r", values.id.get_offset(), values.shape)
                super().__setitem__(name, torch.from_numpy(mapped))

    def __reduce__(self) -> tuple[type["Mapped"], tuple[Path]]:
        return Mapped, (self.path,)


def gather(chunks: Iterable[Batch], count: int, device: torch.device | None) -> Batch:
    """Put chunks of samples together on a device.

    Args:
        chunks: All with the same keys, types and shapes but the first axis.
        count: Number of samples of all chunks together.
        device: Where to keep them; None is the processor.
    """
    whole: Batch = {}
    start = 0
    for chunk in chunks:
        for name, values in chunk.items():
            if name not in whole:
                whole[name] = torch.empty((count, *values.shape[1:]), dtype=values.dtype, device=device)
            whole[name][start : start + len(values)] = values
        start += len(values)
    return whole


def write(path: Path, chunks: Iterable[Batch], count: int) -> None:
    """Write chunks of samples into one file (HDF5, one array a key), which is there only when it is whole.

    Args:
        path: The file. Its folder is made where it is missing.
        chunks: As for `gather`, which never are in memory all at once.
        count: Number of samples of all chunks together.

    Raises:
        UserError: The file cannot be written, or the disk is too small.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(partial, chunks, count)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--data.cache disk: {path} cannot be written ({error}); choose another --data.cache-dir or --data.cache"
        ) from error


def _write(path: Path, chunks: Iterable[Batch], count: int) -> None:
    with h5py.File(path, "w", locking=False) as file:
        start = 0
        for chunk in chunks:
            if start == 0:
                _check_room(path.parent, sum(values[0].nbytes for values in chunk.values()) * count)
            for name, values in chunk.items():
                stored = file.require_dataset(name, (count, *values.shape[1:]), values.numpy().dtype)
                stored[start : start + len(values)] = values.numpy()
            start += len(values)
    with path.open("rb+") as written:
        os.fsync(written.fileno())  # or a power cut could leave the name without the content


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--data.cache disk: the samples take {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free; "
            "choose another --data.cache-dir or --data.cache"
        )
