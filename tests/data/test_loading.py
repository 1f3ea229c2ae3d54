import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.augmentation.pipeline import Pipeline
from mtl.data.loading import (
    Batches,
    Key,
    Loader,
    Samples,
    bytes_in_memory,
    choose_labels,
    collate,
    largest_remainder,
)
from mtl.data.sample import TARGETS, DataInfo, Sample
from mtl.errors import UserError

PIPELINE = Pipeline(["HorizontalFlip", {"ColorJitter": {"p": 1}}, "GaussNoise"], "a test", (8, 12))
"""Random changes of geometry, colour and single pixels."""


class Numbers:
    """A source whose sample i is made of the number i, with depth labels on even samples alone."""

    info = DataInfo("numbers", ("segmentation", "depth"), ("a", "b"))

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def labelled(self, target: str) -> np.ndarray:
        return np.arange(self.count) % 2 == 0 if target == "depth" else np.full(self.count, target == "segmentation")

    def read(self, indices, targets) -> list[Sample]:
        samples = []
        for index in indices:
            noise = np.random.default_rng(index)
            sample = {"image": noise.integers(0, 256, (8, 12, 3), dtype=np.uint8)}
            sample["image"][0, 0] = index
            if "segmentation" in targets:
                sample["segmentation"] = noise.integers(0, 2, (8, 12), dtype=np.uint8)
            if "depth" in targets and index % 2 == 0:
                sample["depth"] = np.full((8, 12), 1 + index / 8, np.float32)
            samples.append(sample)
        return samples


def make(cache: str = "memory", augment=None, **kwargs) -> Samples:
    samples = Samples(Numbers(), range(23), ("segmentation", "depth"), augment=augment, seed=3, **kwargs)
    samples.keep(cache)
    return samples


def indices(batches: Batches) -> list[int]:
    return [key.row for batch in batches for key in batch]


class TestOrder:
    def test_is_a_function_of_seed_and_epoch(self) -> None:
        first, second = Batches(23, 4, shuffle=True, seed=1), Batches(23, 4, shuffle=True, seed=1)
        second.set_epoch(5)
        list(second)
        second.set_epoch(0)
        assert indices(first) == indices(second)
        second.set_epoch(1)
        assert indices(first) != indices(second)
        assert indices(first) != indices(Batches(23, 4, shuffle=True, seed=2))

    def test_an_epoch_uses_each_sample_at_most_once_and_drops_the_incomplete_step(self) -> None:
        seen = indices(Batches(23, 4, shuffle=True))
        assert len(seen) == 20 == len(set(seen))

    def test_fewer_samples_than_a_batch_are_one_batch(self) -> None:
        assert sorted(indices(Batches(3, 16, shuffle=True))) == [0, 1, 2]

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_together_take_the_same_steps_as_one(self, ranks: int) -> None:
        """A step of R ranks with batch B/R is a step of one rank with batch B, positions included."""
        whole = list(Batches(48, 6, shuffle=True, seed=7))
        shares = [list(Batches(48, 6 // ranks, shuffle=True, seed=7, rank=r, ranks=ranks)) for r in range(ranks)]
        for step, batch in enumerate(whole):
            assert sorted(batch) == sorted(key for share in shares for key in share[step])

    def test_validation_sees_each_sample_once_on_any_number_of_ranks(self) -> None:
        shares = [list(Batches(23, 4, shuffle=False, rank=r, ranks=3)) for r in range(3)]
        assert len({len(share) for share in shares}) == 1, "ranks would wait for one another for ever"
        assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
        real = [key.row for share in shares for batch in share for key in batch if key.position >= 0]
        assert sorted(real) == list(range(23))


def split(sizes: list[int]) -> list[list[int]]:
    """Return row numbers of sets of these sizes, interleaved where a list of ranges would hide a mistake."""
    rows = np.random.default_rng(0).permutation(sum(sizes)).tolist()
    return [rows[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]


def drawn(parts: list[list[int]], epochs: int, **kwargs) -> list[list[int]]:
    """Return each epoch's rows, all positions of it."""
    batches = Batches(sum(map(len, parts)), 1, shuffle=True, parts=parts, **kwargs)
    seen = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        seen.append(indices(batches))
    return seen


class TestMixture:
    def test_without_parts_orders_are_those_of_numpy(self) -> None:
        batches = Batches(7, 1, shuffle=True, seed=5)
        batches.set_epoch(3)
        assert indices(batches) == np.random.default_rng([5, 3]).permutation(7).tolist()

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
    @settings(max_examples=50, deadline=None)
    def test_every_sample_of_a_set_is_drawn_equally_often(self, sizes: list[int], data: st.DataObject) -> None:
        parts = split(sizes)
        ratios = data.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
        length = data.draw(st.integers(120, 200))
        count: Counter[int] = Counter()
        for seen in drawn(parts, 4, ratios=ratios, epoch_length=length, seed=data.draw(st.integers(0, 9))):
            assert len(seen) == length
            shares = [sum(row in part for row in seen) for part in map(set, parts)]
            assert all(abs(s - length * r / sum(ratios)) < 1 for s, r in zip(shares, ratios, strict=True))
            count.update(seen)
            for part in parts:
                times = [count[row] for row in part]
                assert max(times) - min(times) <= 1

    def test_a_small_share_goes_through_the_set_before_it_repeats(self) -> None:
        parts = split([10, 6])
        first = [[row for row in seen if row in parts[0]] for seen in drawn(parts, 5, ratios=[2, 14])]
        assert [len(seen) for seen in first] == [2] * 5
        assert sorted(row for seen in first for row in seen) == sorted(parts[0])

    def test_in_proportion_to_sizes_an_epoch_is_every_sample_once(self) -> None:
        for seen in drawn(split([5, 9, 3]), 3):
            assert sorted(seen) == list(range(17))

    def test_an_epoch_of_one_set_can_be_shorter_and_longer(self) -> None:
        short, long = (Batches(10, 1, shuffle=True, epoch_length=length) for length in (4, 25))
        seen = []
        for epoch in range(5):
            short.set_epoch(epoch)
            assert len(short) == 4
            seen += indices(short)
        assert Counter(seen) == dict.fromkeys(range(10), 2)
        assert len(long) == 25 and set(Counter(indices(long)).values()) == {2, 3}

    def test_sets_are_shuffled_among_one_another_and_epochs_differ(self) -> None:
        parts = split([200, 200])
        first, second = drawn(parts, 2)
        assert first != second
        # The number of switches between two sets of 200 in random order has mean 200 and deviation 10.
        member = np.isin(first, parts[0])
        assert abs(np.count_nonzero(member[1:] != member[:-1]) - 200) < 50

    def test_rounds_seeds_and_sets_have_orders_of_their_own(self) -> None:
        def order(seed: int, part: int, turn: int) -> list[int]:
            batches = Batches(60, 1, shuffle=True, seed=seed, parts=[range(30), range(30, 60)])
            return (batches._draw(part, range(30), 60)[30 * turn :][:30]).tolist()

        orders = [order(seed, part, turn) for seed in (0, 1) for part in (0, 1) for turn in (0, 1)]
        orders.append(np.random.default_rng([0, 0]).permutation(30).tolist())  # that of the epoch
        assert len({tuple(order) for order in orders}) == len(orders)

    def test_epochs_can_be_entered_in_any_order(self) -> None:
        parts = split([7, 4])
        kwargs = {"ratios": [1, 3], "epoch_length": 10, "seed": 3}
        forward = drawn(parts, 6, **kwargs)
        batches = Batches(11, 1, shuffle=True, parts=parts, **kwargs)
        for epoch in (5, 2, 0, 4):
            batches.set_epoch(epoch)
            assert indices(batches) == forward[epoch]

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_together_take_the_same_steps_as_one(self, ranks: int) -> None:
        mixture = {"shuffle": True, "seed": 7, "parts": split([30, 11]), "ratios": [1, 2], "epoch_length": 50}
        whole = Batches(41, 6, **mixture)
        shares = [Batches(41, 6 // ranks, rank=rank, ranks=ranks, **mixture) for rank in range(ranks)]
        for epoch in (0, 3):
            for batches in (whole, *shares):
                batches.set_epoch(epoch)
            steps = list(zip(whole, *shares, strict=True))
            assert len(steps) == 50 // 6
            for batch, *pieces in steps:
                assert sorted(batch) == sorted(key for piece in pieces for key in piece)

    def test_goes_on_in_the_middle_of_an_epoch(self) -> None:
        def loader() -> Loader:
            parts = split([15, 8])
            return Loader(make(), Batches(23, 4, shuffle=True, parts=parts, ratios=[1, 1], epoch_length=30), 0)

        whole = loader()
        whole.batch_sampler.set_epoch(2)
        iterator = iter(whole)
        for _ in range(3):
            next(iterator)
        resumed = loader()
        resumed.load_state_dict(whole.state_dict())
        resumed.batch_sampler.set_epoch(2)
        rest = list(resumed)
        assert len(rest) == 30 // 4 - 3
        for expected, got in zip(iterator, rest, strict=True):
            assert all(torch.equal(expected[name], got[name]) for name in expected)

    def test_a_set_that_is_never_drawn_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"data set 2 of 2 gets none of the 20 .* ratio is 0.01 out of 1"):
            Batches(20, 4, shuffle=True, parts=split([15, 5]), ratios=[0.99, 0.01])
        with pytest.raises(UserError, match=r"data set 1 of 2 has no sample"):
            Batches(5, 4, shuffle=True, parts=[[], list(range(5))])

    def test_what_would_be_ignored_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without shuffle"):
            Batches(5, 4, shuffle=False, epoch_length=10)
        with pytest.raises(ValueError, match="2 ratios for 1 parts"):
            Batches(5, 4, shuffle=True, ratios=[1, 2])


class TestLargestRemainder:
    def test_textbook(self) -> None:
        """Wikipedia's example of Hamilton's method: 100 000 votes, 10 seats."""
        assert largest_remainder([47_000, 16_000, 15_800, 12_000, 6_100, 3_100], 10) == [5, 2, 1, 1, 1, 0]

    def test_equal_remainders_go_to_the_first(self) -> None:
        assert largest_remainder([0.1, 0.1, 0.1], 5) == [2, 2, 1]

    @given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(0, 10**6))
    @settings(deadline=None)
    def test_each_is_its_quota_up_to_less_than_one(self, weights: list[float], total: int) -> None:
        shares = largest_remainder(weights, total)
        assert sum(shares) == total
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


class TestSamples:
    def test_a_batch_is_what_the_source_has_in_the_types_of_storage(self) -> None:
        batch = make("none").__getitems__([Key(0, 4, 7), Key(2, 4, -1)])
        source = Numbers().read([0, 2], ("segmentation", "depth"))
        assert batch.keys() == {"image", "segmentation", "depth", "intrinsics", "draw"}
        assert batch["image"].shape == (2, 3, 8, 12) and batch["image"].dtype == torch.uint8
        assert np.array_equal(batch["image"].permute(0, 2, 3, 1), [sample["image"] for sample in source])
        assert batch["segmentation"].shape == (2, 8, 12) and batch["segmentation"].dtype == torch.uint8
        assert np.array_equal(batch["segmentation"][0], source[0]["segmentation"])
        assert batch["depth"].shape == (2, 1, 8, 12) and batch["depth"].dtype == torch.float16
        assert np.array_equal(batch["depth"][0, 0], source[0]["depth"].astype(np.float16))
        assert torch.equal(batch["intrinsics"], torch.zeros(2, 3, 3))
        assert torch.equal(batch["draw"], torch.tensor([[4, 7], [4, -1]]))

    def test_a_missing_label_is_a_target_without_a_valid_pixel(self) -> None:
        batch = make().__getitems__([Key(1, 0, 0)])
        assert (batch["depth"] == 0).all() and (batch["segmentation"] < 2).all()

    def test_hidden_labels_are_not_used(self) -> None:
        samples = make(hidden={"segmentation": frozenset({4})})
        batch = samples.__getitems__([Key(4, 0, 0), Key(6, 0, 1)])
        assert (batch["segmentation"][0] == 255).all() and (batch["segmentation"][1] < 2).all()
        assert (batch["depth"] > 0).all()

    def test_fillers_have_no_labels_and_leave_the_store_alone(self) -> None:
        samples = make()
        batch = samples.__getitems__([Key(0, 0, -1), Key(0, 0, 3)])
        assert (batch["depth"][0] == 0).all() and (batch["segmentation"][0] == 255).all()
        assert (batch["depth"][1] > 0).all()
        assert (samples.stored["depth"][0] > 0).all()

    def test_augmentation_is_a_function_of_seed_epoch_and_position(self) -> None:
        samples = make(augment=PIPELINE)
        alone = samples.__getitems__([Key(5, 2, 11)])["image"][0]
        among = samples.__getitems__([Key(3, 2, 10), Key(5, 2, 11), Key(8, 2, 12)])["image"][1]
        assert torch.equal(alone, among)
        assert not torch.equal(alone, samples.__getitems__([Key(5, 3, 11)])["image"][0])
        assert not torch.equal(alone, samples.__getitems__([Key(5, 2, 12)])["image"][0])

    def test_what_is_said_to_fit_in_memory_is_what_it_takes(self) -> None:
        stored = make().stored
        taken = sum(values.nbytes for values in stored.values())
        assert taken == bytes_in_memory((8, 12), ("segmentation", "depth"), 23, Numbers.info)
        assert {name: values.dtype for name, values in stored.items() if name in TARGETS} == {
            "segmentation": torch.uint8,
            "depth": torch.float16,
        }

    @pytest.mark.parametrize("cache", ["memory", "none"])
    def test_labels_are_of_the_samples_that_have_one(self, cache: str) -> None:
        samples = make(cache, hidden={"depth": frozenset({2, 4})})
        depth = torch.cat(list(samples.labels("depth")))
        having = [0, *range(6, 23, 2)]
        assert depth[:, 0, 0, 0].tolist() == [1 + index / 8 for index in having]
        few = torch.cat(list(samples.labels("depth", limit=3)))
        assert few[:, 0, 0, 0].tolist() == [1, 1 + 12 / 8, 1 + 22 / 8]
        assert list(make(hidden={"depth": frozenset(range(23))}).labels("depth")) == []


class TestLoader:
    @pytest.mark.parametrize("cache", ["memory", "none"])
    def test_workers_do_not_change_what_is_loaded(self, cache: str) -> None:
        def load(workers: int) -> list:
            samples = make(cache, PIPELINE)
            return list(Loader(samples, Batches(23, 4, shuffle=True, seed=1), workers))

        for here, there in zip(load(0), load(2), strict=True):
            assert all(torch.equal(here[name], there[name]) for name in here)

    @pytest.mark.parametrize(("workers", "pinned"), [(0, False), (0, True), (2, False)])
    def test_goes_on_in_the_middle_of_an_epoch(self, workers: int, pinned: bool) -> None:
        def loader() -> Loader:
            samples = make(augment=PIPELINE)
            return Loader(samples, Batches(23, 4, shuffle=True), workers, pinned)

        whole = loader()
        whole.batch_sampler.set_epoch(2)
        batches, states = [], []
        for batch in whole:
            batches.append(batch)
            states.append(whole.state_dict())
        resumed = loader()
        resumed.load_state_dict(states[1])
        resumed.batch_sampler.set_epoch(2)
        rest = list(resumed)
        assert len(rest) == len(batches) - 2
        for expected, got in zip(batches[2:], rest, strict=True):
            assert all(torch.equal(expected[name], got[name]) for name in expected)
        resumed.batch_sampler.set_epoch(3)
        assert len(list(resumed)) == len(batches), "the epoch after starts at its beginning"

    @pytest.mark.parametrize("pinned", [False, True])
    def test_batches_that_go_to_a_gpu_are_made_one_ahead(self, pinned: bool) -> None:
        made: Counter[int] = Counter()

        def count(sample: Sample, generator: np.random.Generator) -> Sample:
            made[0] += 1
            return sample

        iterator = iter(Loader(make(augment=count), Batches(23, 4, shuffle=True), 0, pinned))
        next(iterator)
        ahead, deadline = (8 if pinned else 4), time.monotonic() + 10
        while made[0] < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert made[0] == ahead
        assert len(list(iterator)) == 4 and made[0] == 20

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        list(Loader(make(), Batches(23, 4, shuffle=True), 0))
        assert torch.equal(before, torch.get_rng_state())


class TestChoice:
    def test_keeps_the_number_asked_for_and_is_drawn_by_seed(self) -> None:
        source = Numbers()
        hidden = choose_labels(source, "depth", 5, seed=0)
        kept = set(np.flatnonzero(source.labelled("depth"))) - hidden
        assert len(kept) == 5
        assert hidden == choose_labels(source, "depth", 5, seed=0) != choose_labels(source, "depth", 5, seed=1)

    def test_fewer_labels_are_a_subset_of_more(self) -> None:
        assert choose_labels(Numbers(), "depth", 7, 0) < choose_labels(Numbers(), "depth", 3, 0)

    def test_all_where_nothing_is_said(self) -> None:
        assert choose_labels(Numbers(), "depth", None, 0) == choose_labels(Numbers(), "depth", 99, 0) == frozenset()


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_batch_has_intrinsics_whether_or_not_its_samples_have(cache: str) -> None:
    class Cameras(Numbers):
        def read(self, indices, targets) -> list[Sample]:
            samples = super().read(indices, targets)
            samples[0] |= {"intrinsics": np.eye(3, dtype=np.float32)} if indices[0] == 0 else {}
            return samples

    samples = Samples(Cameras(40), range(40), ())
    samples.keep(cache)
    for row in (0, 39):
        batch = samples.__getitems__([Key(row, 0, 0)])
        assert torch.equal(batch["intrinsics"], torch.eye(3)[None] * (row == 0))


def test_intrinsics_come_along_and_are_zero_where_unknown() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    batch = collate([{"image": image, "intrinsics": np.eye(3, dtype=np.float32)}, {"image": image}], ())
    assert torch.equal(batch["intrinsics"], torch.stack([torch.eye(3), torch.zeros(3, 3)]))
