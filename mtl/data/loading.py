"""From a data set's samples to batches, in an order and with draws that nothing but the seed decides."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mtl.data.caching import Cache, Fingerprinted, Mapped, digest, gather, write
from mtl.data.sample import ALL_TARGETS, Batch, DataInfo, Sample, Source
from mtl.errors import UserError

Augment = Callable[[Sample, np.random.Generator], Sample]
"""A random change of one sample, a pure function of the sample and the generator."""


class Key(NamedTuple):
    """Which sample to load, and where in training it is used.

    Attributes:
        row: Number of the sample among those that are loaded.
        epoch: Number of the epoch.
        position: Place in the epoch's order, counted over all ranks; -1 for a sample that only fills a batch
            up and whose labels do not count.
    """

    row: int
    epoch: int
    position: int


class Batches(Sampler[list[Key]]):
    """The batches of an epoch, as a function of (seed, epoch) alone.

    Position p of the epoch is the same sample on any number of ranks: each step of all ranks together takes the
    next ``batch_size * ranks`` positions, and each rank its share of them.

    Several data sets can be mixed in another ratio than that of their sizes. Each gets the same number of an
    epoch's positions in every epoch, its share rounded by largest remainder, and fills them from an endless
    sequence of permutations of its samples, which goes on where the epoch before ended. So over any number of
    epochs the samples of one set are drawn equally often, up to one. Last, all positions are shuffled; those of an
    incomplete step, which is dropped, count as drawn.

    Args:
        length: Number of samples.
        batch_size: Samples in a batch, on each rank.
        shuffle: Whether each epoch has an order of its own; otherwise that of the indices, every sample once.
        seed: Seed of the orders.
        rank: This process.
        ranks: Number of processes.
        parts: The samples (row numbers) of each data set, which together are all, or those that a bootstrap has drawn,
            as often; None is one set. This and what follows is for training, with `shuffle`.
        ratios: How often to draw from each of the parts, in any unit; None is in proportion to their sizes.
        epoch_length: Number of positions of an epoch; None is `length`.

    Raises:
        UserError: A part has no sample, or so small a ratio that an epoch has none of its samples.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        parts: Sequence[Sequence[int]] | None = None,
        ratios: Sequence[float] | None = None,
        epoch_length: int | None = None,
    ) -> None:
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.start = 0
        self.length = length if epoch_length is None else epoch_length
        self.shares: list[tuple[Sequence[int], int]] | None = None
        if parts is not None or ratios is not None or epoch_length is not None:
            if not shuffle:
                raise ValueError(
                    "without shuffle an epoch is every sample once: parts, ratios and epoch_length do nothing"
                )
            parts = [range(length)] if parts is None else parts
            self.shares = _shares(parts, [len(part) for part in parts] if ratios is None else ratios, self.length)

    @property
    def sampler(self) -> Self:
        """Return this: Lightning tells the epoch to what samples inside a batch sampler, and to nothing else."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        step = self.batch_size * self.ranks
        if not self.shuffle:
            return math.ceil(self.length / step)
        # In training an incomplete step is dropped, as its few samples would weigh more than the others and
        # feed normalisation with too little, unless it is all there is.
        return max(1, self.length // step)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        step = self.batch_size * self.ranks
        for number in range(self.start, len(self)):
            positions = range(number * step, min((number + 1) * step, self.length))
            # Ranks that would have fewer samples than others, or none, are filled up with unlabelled ones.
            shares = [positions[rank :: self.ranks] for rank in range(self.ranks)]
            batch = [Key(int(order[p]), self.epoch, p) for p in shares[self.rank]]
            yield batch + [Key(int(order[0]), self.epoch, -1)] * (len(shares[0]) - len(batch))

    def _order(self) -> np.ndarray:
        """Return the epoch's samples (length,) by position."""
        if not self.shuffle:
            return np.arange(self.length)
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.shares is None:
            return generator.permutation(self.length)
        drawn = [self._draw(number, *share) for number, share in enumerate(self.shares)]
        return generator.permutation(np.concatenate(drawn))

    def _draw(self, number: int, part: Sequence[int], share: int) -> np.ndarray:
        """Return the samples (share,) that a part gives to the epoch: a piece of its endless sequence."""
        begin, size = self.epoch * share, len(part)
        rounds = range(begin // size, -(-(begin + share) // size))
        # The last number keeps these draws apart from others of the same seed: missing ones count as zero.
        entropy = ([self.seed, number, turn, 1] for turn in rounds)
        sequence = np.concatenate([np.random.default_rng(key).permutation(part) for key in entropy])
        return sequence[begin - rounds.start * size :][:share]


class Samples(Dataset[Batch]):
    """A data set's samples as batches of tensors, in the types of storage.

    Each batch also has `draw` (B, 2), int64: the epoch and the position in it of each sample, -1 for one that only
    fills a batch up; and with images the samples' `intrinsics` (B, 3, 3), zero where a camera is unknown.

    Where the samples are kept (see `keep` and `mtl.data.caching`) makes no difference to a batch but the device it is
    on. Nothing is kept at first.

    Args:
        source: The data set.
        indices: Which of its samples to use.
        targets: Which labels to load; a label that a sample lacks becomes a target without a valid pixel.
        hidden: For each target, the samples (by index in the source) whose label is not to be used.
        augment: A random change of each sample, or None. It needs samples in the host's memory.
        seed: Seed of the augmentation's draws.

    Attributes:
        stored: All samples, where they are kept.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        targets: Iterable[str],
        *,
        hidden: dict[str, frozenset[int]] | None = None,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.indices, self.targets = source, list(indices), tuple(targets)
        self.hidden, self.augment, self.seed = hidden or {}, augment, seed
        self.stored: Batch | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return torch.device("cpu") if self.stored is None else next(iter(self.stored.values())).device

    def keep(
        self,
        cache: Cache,
        *,
        device: torch.device | None = None,
        folder: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Decode every sample once and keep what came of it.

        Args:
            cache: Where; 'none' keeps nothing.
            device: Where 'device' is; None is the processor.
            folder: Where 'disk' has its files.
            progress: Called with the numbers of samples decoded and to be decoded.

        Raises:
            UserError: The samples cannot be read, or not be kept there.
        """
        if cache == "none":
            self.stored = None
        elif cache == "disk":
            self.stored = self._on_disk(folder, progress)
        else:
            place = device if cache == "device" else None
            self.stored = gather(self._decode_all(progress), len(self), place)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return a batch: what a loader asks for in one call."""
        # One small copy to the device, and nothing waits for it.
        places = torch.tensor(keys).to(self.device, non_blocking=True)
        if self.stored is not None:
            batch = {name: values.index_select(0, places[:, 0]) for name, values in self.stored.items()}
        else:
            batch = self._decode([key.row for key in keys])
        if self.augment is not None:
            samples = [_unbatch({name: values[row] for name, values in batch.items()}) for row in range(len(keys))]
            for row, key in enumerate(keys):
                generator = np.random.default_rng([self.seed, key.epoch, max(key.position, 0)])
                samples[row] = self.augment(samples[row], generator)
            batch = _to_storage(collate(samples, self.targets))
        for row, key in enumerate(keys):
            if key.position < 0:
                for target in self.targets:
                    batch[target][row] = ALL_TARGETS[target].invalid
        batch["draw"] = places[:, 1:].contiguous()
        return batch

    def has(self, target: str) -> np.ndarray:
        """Return a boolean array, one a row: which samples have a label to use; every one has its image."""
        if target == "image":
            return np.ones(len(self), dtype=bool)
        hidden = self.hidden.get(target, frozenset())
        used = np.array([index not in hidden for index in self.indices], dtype=bool)
        found: np.ndarray = self.source.labelled(target)[self.indices] & used
        return found

    def labels(self, target: str, limit: int = 512, rows: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Yield labels of a target in chunks, in the host's memory and without augmentation.

        Args:
            target: The target's key, or 'image'.
            limit: How many of the samples that have one to read at most, spread evenly.
            rows: Which samples, in what order; None is all.
        """
        among = np.arange(len(self)) if rows is None else np.asarray(rows)
        having = among[self.has(target)[among]]
        spread = np.linspace(0, len(having) - 1, min(limit, len(having))).round().astype(int)
        rows = having[spread].tolist()
        for chunk in (rows[start : start + 16] for start in range(0, len(rows), 16)):
            if self.stored is not None:
                yield self.stored[target][chunk].cpu()
            else:
                yield self._decode(chunk)[target]

    def _decode(self, rows: Sequence[int]) -> Batch:
        """Read samples from the source."""
        indices = [self.indices[row] for row in rows]
        samples = self.source.read(indices, self.targets)
        for index, sample in zip(indices, samples, strict=True):
            for target in self.targets:
                if index in self.hidden.get(target, ()):
                    sample.pop(target, None)
        return _to_storage(collate(samples, self.targets))

    def _decode_all(self, progress: Callable[[int, int], None] | None) -> Iterator[Batch]:
        """Read every sample once, chunk by chunk."""
        rows = range(len(self))
        for chunk in (rows[start : start + 32] for start in range(0, len(rows), 32)):
            yield self._decode(chunk)
            if progress is not None:
                progress(chunk.stop, len(rows))

    def _on_disk(self, folder: Path | None, progress: Callable[[int, int], None] | None) -> Batch:
        """Return the samples from their file, which is written first where there is none to be trusted."""
        name = self.source.info.name
        known = self.source.fingerprint() if isinstance(self.source, Fingerprinted) else None
        if known is None:
            raise UserError(
                f"--data.cache disk: the data set {name} cannot tell when its samples change (it has no 'fingerprint'),"
                " so a file could be out of date; use --data.cache memory or none"
            )
        if folder is None:
            raise UserError("--data.cache disk needs a folder for its files; name one by --data.cache-dir")
        hidden = sorted((target, sorted(indices)) for target, indices in self.hidden.items())
        which = digest(name, known, self.indices, sorted(self.targets), hidden)
        path = folder / f"samples-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{which}.h5"
        try:
            found = Mapped(path)
        except OSError:
            found = None
        if found is None or not self._agrees(found):
            write(path, self._decode_all(progress), len(self))
            found = Mapped(path)
        return found

    def _agrees(self, stored: Batch) -> bool:
        """Return whether a few samples, decoded again, are as they were: the code that decodes may be another."""
        rows = sorted({0, len(self) // 2, len(self) - 1})
        fresh = self._decode(rows)
        return fresh.keys() == stored.keys() and all(
            len(stored[name]) == len(self) and torch.equal(stored[name][rows], values) for name, values in fresh.items()
        )


class Loader(DataLoader[Batch]):
    """A data loader that can go on from the middle of an epoch.

    Its state is the number of batches handed out in the running epoch; Lightning saves and restores it. The
    batches come lazily, because Lightning makes the iterator before it tells the sampler the epoch.

    Args:
        samples: What to load.
        batches: In which order.
        workers: Number of processes that load; samples kept on a device need none and allow none.
        pin_memory: Whether batches are to be copied to a GPU, and so are made in memory from which that needs no
            waiting, one ahead of the step that runs.

    Raises:
        UserError: There are workers for samples on a device.
    """

    batch_sampler: Batches

    def __init__(self, samples: Samples, batches: Batches, workers: int, pin_memory: bool = False) -> None:
        on_device = samples.device.type != "cpu"
        if on_device and workers:
            raise UserError(
                f"--data.workers {workers}: samples that are on {samples.device} already need no worker; leave it out, "
                "or use another --data.cache"
            )
        # A generator of the loader's own: the base class draws a seed for its workers at every epoch, and
        # would take it from the generator that dropout uses, once more after a resume than before it.
        super().__init__(
            samples,
            batch_sampler=batches,
            collate_fn=_identity,
            num_workers=workers,
            pin_memory=pin_memory and not on_device,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )
        self._handed_out = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the base class promises more than it needs
        resume, self._resume = self._resume, None
        going_on = resume is not None and resume["epoch"] == self.batch_sampler.epoch
        self.batch_sampler.start = self._handed_out = resume["batches"] if resume and going_on else 0
        batches: Iterator[Batch] = super().__iter__()
        # Workers are ahead anyway, and what a device has to select it queues behind the running step.
        if self.pin_memory and not self.num_workers:
            batches = _one_ahead(batches)
        try:
            for batch in batches:
                self._handed_out += 1
                yield batch
        except UserError as error:
            # A worker's comes with the worker's traceback before it.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("mtl.errors.UserError: ")) from None

    def state_dict(self) -> dict[str, Any]:
        """Return where in its epoch this loader is."""
        return {"epoch": self.batch_sampler.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a saved loader was, at the next iteration."""
        self._resume = dict(state)


def collate(samples: Sequence[Sample], targets: Iterable[str]) -> Batch:
    """Stack samples into a batch of the contract, channels first.

    Args:
        samples: Samples of one size. A missing label becomes a target without a valid pixel.
        targets: The targets that the batch is to have. With images come camera intrinsics, zero where unknown.
    """
    size: tuple[int, ...] = ()
    if "signal" in samples[0]:
        batch: Batch = {"signal": torch.from_numpy(np.stack([s["signal"] for s in samples])).unsqueeze(1)}
    else:
        batch = {"image": torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2)}
        unknown = np.zeros((3, 3), np.float32)
        batch["intrinsics"] = torch.from_numpy(np.stack([s.get("intrinsics", unknown) for s in samples]))
        size = tuple(batch["image"].shape[-2:])
    for target in targets:
        kind = ALL_TARGETS[target]
        shape = size if kind.channels in (None, 1) else (*size, kind.channels)
        missing = torch.full(shape, kind.invalid, dtype=kind.dtype).numpy()
        values = torch.from_numpy(np.stack([s.get(target, missing) for s in samples]))
        if kind.channels == 1:
            values = values.unsqueeze(1)
        elif kind.channels is not None:
            values = values.permute(0, 3, 1, 2)
        batch[target] = values
    return batch


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Divide whole things in proportion to weights: each gets its quota rounded down, the largest remainders one more.

    Also known as Hamilton's method. Among equal remainders, the first come first.

    Args:
        weights: At least 0, not all of them 0.
        total: How many to divide.
    """
    whole = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * total / whole for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: shares[k] - quotas[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def choose_labels(source: Source, target: str, count: int | None, seed: int) -> frozenset[int]:
    """Return the samples whose label of this target is not to be used, so that `count` remain.

    The choice is a function of (seed, target) and the number of labels: with the same seed, fewer labels are a
    subset of more.

    Args:
        source: The data set.
        target: The target's key.
        count: How many labels to use, or None for all.
        seed: Seed of the draw.
    """
    labelled = np.flatnonzero(source.labelled(target))
    if count is None or count >= len(labelled):
        return frozenset()
    order = np.random.default_rng([seed, *target.encode()]).permutation(labelled)
    return frozenset(order[count:].tolist())


def bytes_in_memory(size: tuple[int, int], targets: Iterable[str], samples: int, info: DataInfo) -> int:
    """Return how many bytes `Samples` takes to keep this many samples, of the given size where they are images."""
    of_targets = sum((ALL_TARGETS[t].channels or 1) * ALL_TARGETS[t].storage.itemsize for t in targets)
    if info.signal_length is not None:
        return (info.signal_length * torch.float32.itemsize + of_targets) * samples
    intrinsics = 9 * torch.float32.itemsize
    return (size[0] * size[1] * (3 + of_targets) + intrinsics) * samples


def default_workers(stored: bool, augmented: bool) -> int:
    """Return how many loader processes to use where nothing is said: none where a batch is a mere selection."""
    if stored and not augmented:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(parts: Sequence[Sequence[int]], ratios: Sequence[float], length: int) -> list[tuple[Sequence[int], int]]:
    """Return each part with how many of an epoch's positions it gets."""
    if len(parts) != len(ratios):
        raise ValueError(f"{len(ratios)} ratios for {len(parts)} parts")
    for number, part in enumerate(parts, start=1):
        if not len(part):
            raise UserError(f"data set {number} of {len(parts)} has no sample to train on: leave it out")
    shares = largest_remainder(ratios, length)
    for number, (share, ratio) in enumerate(zip(shares, ratios, strict=True), start=1):
        if share < 1:
            raise UserError(
                f"data set {number} of {len(parts)} gets none of the {length} samples of an epoch, as its ratio is "
                f"{ratio:g} out of {sum(ratios):g}: raise its ratio, make epochs longer, or leave it out"
            )
    return list(zip(parts, shares, strict=True))


def _unbatch(row: Batch) -> Sample:
    sample: Sample = {}
    for name, values in row.items():
        array = values.numpy()
        if name == "image" or (name in ALL_TARGETS and (ALL_TARGETS[name].channels or 1) > 1):
            array = array.transpose(1, 2, 0)
        elif name in ALL_TARGETS and ALL_TARGETS[name].channels == 1:
            array = array[0]
        sample[name] = array.astype(np.float32) if array.dtype == np.float16 else array
    return sample


def _to_storage(batch: Batch) -> Batch:
    """Return a batch in the types and the layout in which samples are kept."""
    return {
        name: values.to(ALL_TARGETS[name].storage if name in ALL_TARGETS else values.dtype).contiguous()
        for name, values in batch.items()
    }


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, each of which a thread makes while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _identity(batch: Any) -> Any:
    return batch
