"""Several data sets as one."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, zip_longest

import numpy as np

from mtl.data.caching import Fingerprinted, digest
from mtl.data.sample import TARGETS, DataInfo, Sample, Source
from mtl.errors import UserError, nearest


class Combined:
    """The samples of several data sets, one set after the other.

    Each set gives the labels that it is asked for and has; its other samples have none of that target, as in a
    single data set with few labels. All sets must have been opened with the same size.

    Attributes:
        info: Names joined by `` + ``, the targets that any part gives, the classes of the parts that give
            segmentation, and the kind of depth of those that give depth.
        parts: The range of indices of each data set's samples.
    """

    def __init__(self, parts: Sequence[tuple[Source, tuple[str, ...] | None]]) -> None:
        """Put data sets together.

        Args:
            parts: At least one data set, each with the targets to use from it, or None for all it has.

        Raises:
            UserError: A data set lacks a target that is asked of it, or labels of one target do not mean the
                same in all sets that give it.
        """
        self._sources = [source for source, _ in parts]
        self._used = [_used(source.info, targets) for source, targets in parts]
        ends = accumulate((len(source) for source in self._sources), initial=0)
        self.parts = [range(start, end) for start, end in pairwise(ends)]
        segmentation, depth = self._giving("segmentation"), self._giving("depth")
        for other in segmentation[1:]:
            _check_classes(segmentation[0], other)
        for other in depth[1:]:
            _check_depth(depth[0], other)
        self.info = DataInfo(
            name=" + ".join(source.info.name for source in self._sources),
            targets=tuple(target for target in TARGETS if self._giving(target)),
            classes=segmentation[0].classes if segmentation else (),
            inverse_depth=depth[0].inverse_depth if depth else False,
        )

    def __len__(self) -> int:
        """Return the number of samples of all sets together."""
        return self.parts[-1].stop

    def name(self, index: int) -> str:
        """Return ``SET:NAME``."""
        part, inner = self._place(index)
        source = self._sources[part]
        return f"{source.info.name}:{source.name(inner)}"

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): which samples have a label of this target that is to be used."""
        return np.concatenate(
            [
                source.labelled(target) if target in used else np.zeros(len(source), dtype=bool)
                for source, used in zip(self._sources, self._used, strict=True)
            ]
        )

    def fingerprint(self) -> str | None:
        """Return a text that changes with any of the sets, or None where one of them cannot tell."""
        known = [source.fingerprint() if isinstance(source, Fingerprinted) else None for source in self._sources]
        return None if None in known else digest(known, self._used)

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Read samples, asking each set once, and return them in the order of the indices."""
        wanted = tuple(targets)
        places = [self._place(index) for index in indices]
        samples: dict[int, Sample] = {}
        for part, (source, used) in enumerate(zip(self._sources, self._used, strict=True)):
            asked = [position for position, place in enumerate(places) if place[0] == part]
            if asked:
                read = source.read([places[p][1] for p in asked], [t for t in wanted if t in used])
                samples.update(zip(asked, read, strict=True))
        return [samples[position] for position in range(len(places))]

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's data set and its index there."""
        part = bisect_right(self.parts, index, key=lambda indices: indices.stop)
        return part, index - self.parts[part].start

    def _giving(self, target: str) -> list[DataInfo]:
        """Return what is known of the data sets that give a target."""
        return [source.info for source, used in zip(self._sources, self._used, strict=True) if target in used]


def _used(info: DataInfo, targets: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the targets to use from a data set."""
    if targets is None:
        return info.targets
    for target in targets:
        if target not in info.targets:
            raise UserError(
                f"the data set {info.name} has no {target!r}{nearest(target, info.targets)}: 'targets' must be among "
                f"those it has ({', '.join(info.targets) or 'none'})"
            )
    return targets


def _check_classes(first: DataInfo, second: DataInfo) -> None:
    """Refuse two sets of which one class index means different things."""
    if first.classes == second.classes:
        return
    pairs = enumerate(zip_longest(first.classes, second.classes))
    index, (ours, theirs) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    if ours is None or theirs is None:
        difference = f"{len(first.classes)} and {len(second.classes)} of them"
    else:
        difference = f"class {index} is {ours!r} in the one and {theirs!r} in the other"
    raise UserError(
        f"the data sets {first.name} and {second.name} have different segmentation classes ({difference}): take "
        f"segmentation from one of them only, with 'targets: [depth]' for the other in the YAML, or make the lists "
        "of classes agree"
    )


def _check_depth(first: DataInfo, second: DataInfo) -> None:
    """Refuse metres beside inverse depth."""
    if first.inverse_depth == second.inverse_depth:
        return
    inverse, metric = (first, second) if first.inverse_depth else (second, first)
    raise UserError(
        f"the depth of the data set {inverse.name} is inverse depth without a unit, that of {metric.name} is in "
        "metres: take depth from one of them only, with 'targets: [segmentation]' for the other in the YAML"
    )
