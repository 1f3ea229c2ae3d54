"""Several data sets as one, against the sets themselves."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.data.combined import Combined
from mtl.data.loading import Batches, Loader, Samples
from mtl.data.sample import DataInfo, Sample, Source
from mtl.data.scenes import CLASSES, Scenes
from mtl.errors import UserError

MAPS = {
    "segmentation": lambda index: np.full((4, 6), index % 2, np.uint8),
    "depth": lambda index: np.full((4, 6), 1 + index, np.float32),
    "normals": lambda index: np.full((4, 6, 3), 3**-0.5, np.float32),
}


class Numbered:
    """A set whose images say which set and sample they are; every `every`-th sample has labels."""

    def __init__(
        self,
        mark: int,
        count: int,
        targets: tuple[str, ...],
        *,
        name: str | None = None,
        classes: tuple[str, ...] = ("a", "b"),
        every: int = 1,
        inverse_depth: bool = False,
    ) -> None:
        self.mark, self.count, self.every = mark, count, every
        classes = classes if "segmentation" in targets else ()
        self.info = DataInfo(name or f"set{mark}", targets, classes, inverse_depth)
        self.asked: list[tuple[list[int], tuple[str, ...]]] = []

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index:03}"

    def labelled(self, target: str) -> np.ndarray:
        return (np.arange(self.count) % self.every == 0) & (target in self.info.targets)

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        wanted = tuple(targets)
        self.asked.append((list(indices), wanted))
        samples: list[Sample] = []
        for index in indices:
            sample = {"image": np.full((4, 6, 3), (self.mark, index, 0), np.uint8)}
            sample |= {t: MAPS[t](index) for t in wanted if self.labelled(t)[index]}
            samples.append(sample)
        return samples


def marks(samples: list[Sample]) -> list[tuple[int, int]]:
    return [tuple(sample["image"][0, 0, :2].tolist()) for sample in samples]


class TestContents:
    def test_is_a_source(self) -> None:
        source: Source = Combined([(Numbered(1, 3, ("depth",)), None)])
        assert len(source) == 3 and source.info == DataInfo("set1", ("depth",))

    def test_info_names_and_ranges(self) -> None:
        combined = Combined(
            [
                (Numbered(1, 3, ("depth", "normals")), ("normals", "depth")),
                (Numbered(2, 0, ("depth",)), None),
                (Numbered(3, 4, ("segmentation",)), None),
            ]
        )
        assert combined.info == DataInfo("set1 + set2 + set3", ("segmentation", "depth", "normals"), ("a", "b"))
        assert combined.parts == [range(3), range(3, 3), range(3, 7)]
        assert len(combined) == 7
        assert [combined.name(i) for i in (0, 2, 3, 6)] == ["set1:000", "set1:002", "set3:000", "set3:003"]

    def test_labels_left_out_are_not_there(self) -> None:
        first, second = Numbered(1, 4, ("segmentation", "depth"), every=2), Numbered(2, 3, ("segmentation", "depth"))
        combined = Combined([(first, ("segmentation",)), (second, ("depth",))])
        assert combined.labelled("segmentation").tolist() == [True, False, True, False] + [False] * 3
        assert combined.labelled("depth").tolist() == [False] * 4 + [True] * 3
        assert not combined.labelled("normals").any() and len(combined.labelled("normals")) == 7
        assert combined.labelled("depth").dtype == bool
        samples = combined.read(range(7), iter(("segmentation", "depth")))
        for target in ("segmentation", "depth"):
            assert [target in sample for sample in samples] == combined.labelled(target).tolist()

    def test_nothing_at_all_can_be_used_of_a_set(self) -> None:
        combined = Combined([(Numbered(1, 2, ("depth",)), ()), (Numbered(2, 1, ("segmentation",)), None)])
        assert combined.info.targets == ("segmentation",)
        assert combined.read([1], ["depth"])[0].keys() == {"image"}

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
    @settings(max_examples=50, deadline=None)
    def test_reads_what_the_sets_hold_in_the_order_asked(self, sizes: list[int], data: st.DataObject) -> None:
        sets = [Numbered(mark, size, ("depth",)) for mark, size in enumerate(sizes)]
        combined = Combined([(numbered, None) for numbered in sets])
        whole = [(mark, index) for mark, size in enumerate(sizes) for index in range(size)]
        assert len(combined) == len(whole)
        asked = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12)) if whole else []
        samples = combined.read(asked, ("depth", "segmentation"))
        assert marks(samples) == [whole[i] for i in asked]
        assert [combined.name(i) for i in asked] == [f"set{whole[i][0]}:{whole[i][1]:03}" for i in asked]
        # Each set that has any of them is asked once, and for nothing that it does not give.
        for mark, numbered in enumerate(sets):
            mine = [whole[i][1] for i in asked if whole[i][0] == mark]
            assert numbered.asked == ([(mine, ("depth",))] if mine else [])

    def test_rooms_of_two_looks(self) -> None:
        sets = [Scenes(2, domain=domain, seed=0, size=(32, 32)) for domain in ("studio", "loft")]
        combined = Combined([(sets[0], ("segmentation",)), (sets[1], ("depth",))])
        assert combined.info.classes == CLASSES
        (third, first) = combined.read([2, 0], ("segmentation", "depth"))
        assert np.array_equal(third["image"], sets[1].read([0], ())[0]["image"])
        assert np.array_equal(first["segmentation"], sets[0].read([0], ("segmentation",))[0]["segmentation"])
        assert "segmentation" not in third and "depth" not in first

    def test_one_batch_holds_both_and_each_label_only_where_it_is(self) -> None:
        sets = [Numbered(1, 3, ("segmentation",)), Numbered(2, 9, ("depth",))]
        combined = Combined([(numbered, None) for numbered in sets])
        samples = Samples(combined, range(12), ("segmentation", "depth"))
        loader = Loader(samples, Batches(12, 4, shuffle=True, parts=combined.parts, ratios=[1, 1]), workers=0)
        origin = []
        for batch in loader:
            first = batch["image"][:, 0, 0, 0] == 1
            assert ((batch["segmentation"] != 255).all(dim=(1, 2)) == first).all()
            assert ((batch["depth"] == 0).all(dim=(1, 2, 3)) == first).all()
            origin += first.tolist()
        assert len(origin) == 12 and sum(origin) == 6


class TestBadInput:
    def test_a_target_that_a_set_does_not_have(self) -> None:
        with pytest.raises(UserError, match=r"set1 has no 'deth' \(did you mean 'depth'\?\).*\(depth, normals\)"):
            Combined([(Numbered(1, 3, ("depth", "normals")), ("deth",))])

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            (("wall", "sofa", "bed"), "class 1 is 'floor' in the one and 'sofa' in the other"),
            (("floor", "wall", "bed"), "class 0 is 'wall' in the one and 'floor' in the other"),
            (("wall", "floor"), "3 and 2 of them"),
            (("wall", "floor", "bed", "lamp"), "3 and 4 of them"),
        ],
    )
    def test_class_lists_that_disagree(self, other: tuple[str, ...], difference: str) -> None:
        first = Numbered(1, 3, ("segmentation", "depth"), name="rooms", classes=("wall", "floor", "bed"))
        second = Numbered(2, 3, ("segmentation", "depth"), name="flats", classes=other)
        with pytest.raises(UserError) as caught:
            Combined([(first, None), (Numbered(3, 1, ("depth",)), None), (second, None)])
        message = str(caught.value)
        assert "rooms and flats have different segmentation classes" in message and difference in message
        assert "targets: [depth]" in message
        # The way out that it names is one.
        assert Combined([(first, None), (second, ("depth",))]).info.classes == first.info.classes
        assert Combined([(first, ("depth",)), (second, None)]).info.classes == other

    def test_metres_beside_inverse_depth(self) -> None:
        metric = Numbered(1, 3, ("segmentation", "depth"), name="rooms")
        inverse = Numbered(2, 3, ("segmentation", "depth"), name="streets", inverse_depth=True)
        for parts in ([(metric, None), (inverse, None)], [(inverse, None), (metric, None)]):
            with pytest.raises(UserError, match=r"depth of the data set streets is inverse .* that of rooms"):
                Combined(parts)
        assert Combined([(metric, ("segmentation",)), (inverse, None)]).info.inverse_depth
        assert not Combined([(metric, None), (inverse, ("segmentation",))]).info.inverse_depth
        assert Combined([(inverse, None), (inverse, ("depth",))]).info.inverse_depth
