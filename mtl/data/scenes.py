"""The embedded data set: furnished rooms with exact labels, ray-cast from a domain, a seed and an index.

Two domains share one distribution of geometry: `studio` has paint, stripes and checks in all hues under even
white light, `loft` bricks, planks and plaster in mostly warm tones under a strong warm lamp. No class can be
told by its colour or texture alone. Everything is a pure function of (domain, seed, index), the same on every
machine and in any batch; the image's size changes how finely a scene is seen, not what is in it.
"""

import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtl.data.caching import digest
from mtl.data.materials import DOMAINS, Domain
from mtl.data.raycast import cast, pinhole, to_tensors
from mtl.data.rooms import CLASSES, build
from mtl.data.sample import TARGETS, Batch, DataInfo, Sample
from mtl.errors import UserError, nearest

__all__ = ["CLASSES", "DOMAINS", "RENDERER_VERSION", "Domain", "Scenes", "render"]

RENDERER_VERSION = 1
"""Raised whenever a pixel of any scene changes, so that no older cache is taken for the present one."""

_CPU_TILE = 1 << 15
"""Pixels at once. Intermediate arrays stay in the processor's cache, and are so small that torch leaves each
operation to one thread (its grain size). Threads that each render tiles of their own need not wait for one
another thousands of times, which on a busy machine is ten times as fast."""
_GPU_TILE = 1 << 22

_Arrays = dict[str, np.ndarray]


def render(
    indices: Sequence[int],
    *,
    domain: Domain,
    seed: int,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Batch:
    """Render scenes by their numbers.

    Args:
        indices: B numbers, at least one, each at least 0.
        domain: Which look.
        seed: Which world; at least 0.
        size: Height H and width W in pixels, at least 16.
        device: Where to compute, and where the result is.

    Returns:
        `image` (B, 3, H, W) uint8, `segmentation` (B, H, W) uint8 (indices of `CLASSES`), `depth`
        (B, 1, H, W) float32 in metres along the optical axis, `normals` (B, 3, H, W) float32 in the
        camera's frame, and `intrinsics` (B, 3, 3) float32 in pixels.

    Raises:
        UserError: For an unknown domain, a negative seed or a size that is too small.
    """
    _validate(domain, seed, size)
    device = torch.device(device)
    scene = to_tensors(build(indices, domain, seed), device)
    intrinsics = pinhole(scene, size)
    batch = {
        "image": torch.empty(len(indices), 3, *size, dtype=torch.uint8, device=device),
        "segmentation": torch.empty(len(indices), *size, dtype=torch.uint8, device=device),
        "depth": torch.empty(len(indices), 1, *size, device=device),
        "normals": torch.empty(len(indices), 3, *size, device=device),
    }

    def cast_tile(tile: tuple[slice, slice]) -> None:
        images, rows = tile
        part = {key: array[images] for key, array in scene.items()}
        out = {key: array[images, ..., rows, :] for key, array in batch.items()}
        cast(part, intrinsics[images], rows.start, out)

    on_cpu = device.type == "cpu"
    tiles = _tiles(len(indices), size, _CPU_TILE if on_cpu else _GPU_TILE)
    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1) as pool:
        list(pool.map(cast_tile, tiles))  # Raises what a tile raised.
    return batch | {"intrinsics": intrinsics}


def _tiles(count: int, size: tuple[int, int], pixels: int) -> list[tuple[slice, slice]]:
    """Cut images into pieces of at most so many pixels: some whole images, or some rows of one."""
    height, width = size
    rows = min(height, max(1, pixels // width))
    images = max(1, pixels // (height * width))
    return [
        (slice(i, min(i + images, count)), slice(top, min(top + rows, height)))
        for i in range(0, count, images)
        for top in range(0, height, rows)
    ]


class Scenes:
    """A range of scenes as a data set (see `mtl.data.sample.Source`), fully labelled.

    Depth and normals have the precision of float16, in which they are kept, whether there is a cache or not.
    """

    def __init__(
        self,
        count: int,
        *,
        domain: Domain,
        seed: int,
        size: tuple[int, int],
        start: int = 0,
        cache_dir: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Describe the data set; nothing is rendered yet.

        Args:
            count: Number of samples.
            domain: Which look.
            seed: Which world; at least 0.
            size: Height and width in pixels, at least 16.
            start: Scene number of sample 0, so that ranges that do not overlap share no scene.
            cache_dir: Folder in which the whole range is kept once it is rendered, which happens at the first
                `read`. Without it, `read` renders what it is asked for.
            progress: Told (samples done, samples in all) while the whole range is rendered.

        Raises:
            UserError: For an unknown domain or a number that is too small.
        """
        _validate(domain, seed, size)
        if count < 1:
            raise UserError(f"scenes: the number of samples is {count}, but must be at least 1.")
        if start < 0:
            raise UserError(f"scenes: the first scene's number is {start}, but must be at least 0.")
        self.info = DataInfo(name=f"scenes/{domain}", targets=tuple(TARGETS), classes=CLASSES)
        self._count, self._domain, self._seed, self._size, self._start = count, domain, seed, size, start
        self._cache_dir, self._progress = cache_dir, progress

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._count

    def name(self, index: int) -> str:
        """Return domain, seed and scene number, such as ``studio-0-000012``."""
        return f"{self._domain}-{self._seed}-{self._number(index):06d}"

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): all true for the dense targets."""
        return np.full(self._count, target in self.info.targets)

    def fingerprint(self) -> str:
        """Return a text that says which scenes these are, and by which renderer."""
        return digest(RENDERER_VERSION, self._domain, self._seed, self._start, self._count, self._size)

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Return samples with `image`, `intrinsics` and the targets asked for.

        Raises:
            IndexError: If an index is not in [0, N).
            UserError: If the cache's folder cannot be written.
        """
        numbers = [self._number(index) for index in indices]
        if not numbers:
            return []
        if self._cache_dir is None:
            arrays, rows = self._render(numbers), list(range(len(numbers)))
        else:
            arrays, rows = self._everything, [number - self._start for number in numbers]
        wanted = set(targets) | {"image", "intrinsics"}
        return [{key: _sample(array[row]) for key, array in arrays.items() if key in wanted} for row in rows]

    def _number(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count} scenes")
        return self._start + int(index)

    def _render(self, numbers: Sequence[int]) -> _Arrays:
        """Return scenes as they are kept: channels last, in the types of storage."""
        batch = render(numbers, domain=self._domain, seed=self._seed, size=self._size)
        for key, target in TARGETS.items():
            batch[key] = batch[key].to(target.storage)
        batch["depth"] = batch["depth"][:, 0]
        for key in ("image", "normals"):
            batch[key] = batch[key].permute(0, 2, 3, 1)
        return {key: tensor.contiguous().numpy() for key, tensor in batch.items()}

    @cached_property
    def _everything(self) -> _Arrays:
        """The whole range, from the cache if it is there, else rendered and put there."""
        assert self._cache_dir is not None
        which = f"{self._domain}-seed{self._seed}-{self._start}+{self._count}"
        stem = f"scenes-v{RENDERER_VERSION}-{which}-{self._size[0]}x{self._size[1]}"
        path = self._cache_dir / f"{stem}.safetensors"
        arrays = _load(path, stem)
        if arrays is None:
            arrays = self._render_everything()
            _save(path, stem, arrays)
        return arrays

    def _render_everything(self) -> _Arrays:
        arrays: _Arrays = {}
        step = 64
        for done in range(0, self._count, step):
            stop = min(done + step, self._count)
            for key, part in self._render(range(self._start + done, self._start + stop)).items():
                whole = arrays.setdefault(key, np.empty((self._count, *part.shape[1:]), part.dtype))
                whole[done:stop] = part
            if self._progress is not None:
                self._progress(stop, self._count)
        return arrays


def _validate(domain: str, seed: int, size: tuple[int, int]) -> None:
    if domain not in DOMAINS:
        raise UserError(
            f"scenes: there is no domain {domain!r}{nearest(domain, DOMAINS)}; choose one of {', '.join(DOMAINS)}."
        )
    if not 0 <= seed < 2**64:
        raise UserError(f"scenes: the seed is {seed}, but must be at least 0 and less than 2**64.")
    if min(size) < 16:
        raise UserError(f"scenes: the size is {size[0]}x{size[1]}, but both sides must be at least 16 pixels.")


def _sample(stored: np.ndarray) -> np.ndarray:
    """Return a copy of what is kept, in a sample's type."""
    return stored.astype(np.float32 if stored.dtype == np.float16 else stored.dtype)


def _signature(stem: str, arrays: _Arrays) -> dict[str, str]:
    """Return what a cache file says about itself: a whole file of this data set has nothing else to say."""
    about = {key: [str(a.dtype), a.shape, zlib.crc32(a.data)] for key, a in sorted(arrays.items())}
    return {"scenes": stem, "arrays": json.dumps(about)}


def _load(path: Path, stem: str) -> _Arrays | None:
    """Return the cache, or None if there is none, or none to be trusted."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return arrays if file.metadata() == _signature(stem, arrays) else None
    except (OSError, SafetensorError):
        return None


def _save(path: Path, stem: str, arrays: _Arrays) -> None:
    """Write the cache, under its name only when it is whole: another process may be doing the same."""
    partial = path.with_name(f".{stem}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(arrays, partial, metadata=_signature(stem, arrays))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"scenes: what was rendered cannot be kept in {path.parent} ({error}); choose another folder."
        ) from error
