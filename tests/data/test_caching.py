"""Wherever samples are kept, batches are the same; files of a cache are whole, true to their data set, and shared."""

import os
import pickle
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from test_cityscapes import written as streets  # noqa: F401 (a fixture)
from test_nyuv2 import write_arrays
from test_nyuv2 import written as rooms  # noqa: F401 (a fixture)

from mtl.augmentation.pipeline import Pipeline
from mtl.data.caching import Cache, choose, stamp
from mtl.data.cityscapes import Cityscapes
from mtl.data.combined import Combined
from mtl.data.folder import Folder
from mtl.data.loading import Batches, Key, Loader, Samples
from mtl.data.nyuv2 import NYUv2
from mtl.data.sample import TARGETS, Batch, DataInfo, Sample, Source
from mtl.data.scenes import Scenes
from mtl.errors import UserError

COUNT = 43
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PIPELINE = Pipeline(["HorizontalFlip", {"ColorJitter": {"p": 1}}, "GaussNoise"], "a test", (6, 10))
"""Random changes of geometry, colour and single pixels."""


class Noise:
    """A source of random samples, some without labels or camera, that counts how many it has decoded."""

    info = DataInfo("some noise", tuple(TARGETS), ("a", "b"))

    def __init__(self, version: int = 0, seed: int = 0) -> None:
        self.version, self.seed, self.decoded = version, seed, 0

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return str(index)

    def labelled(self, target: str) -> np.ndarray:
        return np.arange(COUNT) % 3 != list(TARGETS).index(target)

    def fingerprint(self) -> str | None:
        return str(self.version)

    def read(self, indices, targets) -> list[Sample]:
        samples = []
        for index in indices:
            self.decoded += 1
            random = np.random.default_rng([index, self.seed])
            maps = {
                "segmentation": random.integers(0, 2, (6, 10), dtype=np.uint8),
                "depth": random.uniform(0.5, 80, (6, 10)).astype(np.float32),
                "normals": random.normal(size=(6, 10, 3)).astype(np.float32),
            }
            sample = {"image": random.integers(0, 256, (6, 10, 3), dtype=np.uint8)}
            sample |= {target: maps[target] for target in targets if self.labelled(target)[index]}
            if index % 2:
                sample["intrinsics"] = random.uniform(1, 9, (3, 3)).astype(np.float32)
            samples.append(sample)
        return samples


def make(cache: Cache, folder: Path, source: Source | None = None, device: torch.device = CPU, **kwargs) -> Samples:
    kwargs = {"indices": range(2, COUNT), "targets": tuple(TARGETS), "hidden": {"depth": frozenset({4, 7})}} | kwargs
    samples = Samples(Noise() if source is None else source, **kwargs)
    samples.keep(cache, device=device, folder=folder)
    return samples


def same(first: Batch, second: Batch) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        other = second[name].cpu()
        assert (values.dtype, values.stride()) == (other.dtype, other.stride()), name
        assert torch.equal(values, other), name


def epoch(samples: Samples, epoch: int, *, shuffle: bool = True, rank: int = 0, after: int = 0) -> list[Batch]:
    """Return an epoch's batches, those of a loader that goes on after so many."""
    loader = Loader(samples, Batches(len(samples), 4, shuffle=shuffle, seed=5, rank=rank, ranks=2), workers=0)
    loader.load_state_dict({"epoch": epoch, "batches": after})
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


class TestBatches:
    @pytest.mark.parametrize("cache", ["device", "memory", "disk", pytest.param("gpu", marks=ON_GPU)])
    @pytest.mark.parametrize("augment", [None, PIPELINE])
    def test_are_the_same_bit_for_bit(self, tmp_path: Path, cache: str, augment: Pipeline | None) -> None:
        if cache == "gpu" and augment:
            pytest.skip("samples on a GPU are augmented there")
        device = CUDA if cache == "gpu" else CPU
        kept = make("device" if cache == "gpu" else cache, tmp_path, device=device, augment=augment)
        decoded = make("none", tmp_path, augment=augment)
        assert kept.stored is not None and decoded.stored is None
        for shuffle in (True, False):  # validation has samples that only fill up
            expected = epoch(decoded, 3, shuffle=shuffle, rank=1)
            for one, other in zip(expected, epoch(kept, 3, shuffle=shuffle, rank=1), strict=True):
                same(one, other)
            rest = epoch(kept, 3, shuffle=shuffle, rank=1, after=2)
            for one, other in zip(expected[2:], rest, strict=True):
                same(one, other)
        assert any((batch["draw"][:, 1] < 0).any() for batch in expected), "the test has seen no sample that fills up"

    def test_say_which_draw_each_sample_is(self, tmp_path: Path) -> None:
        samples = make("memory", tmp_path)
        order = Batches(len(samples), 4, shuffle=True, seed=5, rank=1, ranks=2)
        order.set_epoch(3)
        for keys, batch in zip(order, epoch(samples, 3, rank=1), strict=True):
            assert batch["draw"].dtype == torch.int64
            assert batch["draw"].tolist() == [[3, key.position] for key in keys]

    def test_leave_what_is_kept_alone(self, tmp_path: Path) -> None:
        for cache in ("device", "memory", "disk"):
            samples = make(cache, tmp_path)
            batch = samples.__getitems__([Key(1, 0, -1), Key(1, 0, 0)])
            for values in batch.values():
                values.fill_(1)
            same(samples.__getitems__([Key(1, 0, 0)]), make("none", tmp_path).__getitems__([Key(1, 0, 0)]))

    @pytest.mark.parametrize("target", TARGETS)
    def test_labels_are_the_same(self, tmp_path: Path, target: str) -> None:
        expected = list(make("none", tmp_path).labels(target, limit=20))
        for cache in ("device", "memory", "disk"):
            for one, other in zip(expected, make(cache, tmp_path).labels(target, limit=20), strict=True):
                assert torch.equal(one, other)


class TestDevice:
    """The meta device has no memory, but it says where everything is."""

    def test_all_of_a_batch_is_there(self, tmp_path: Path) -> None:
        samples = make("device", tmp_path, device=torch.device("meta"))
        batches = Batches(len(samples), 4, shuffle=True)
        batch = next(iter(Loader(samples, batches, workers=0, pin_memory=True)))
        assert {values.device.type for values in batch.values()} == {"meta"}

    def test_workers_have_nothing_to_do(self, tmp_path: Path) -> None:
        samples = make("device", tmp_path, device=torch.device("meta"))
        with pytest.raises(UserError, match=r"--data.workers 2: samples that are on meta"):
            Loader(samples, Batches(len(samples), 4, shuffle=True), workers=2)

    @ON_GPU
    def test_nothing_waits_for_the_gpu(self, tmp_path: Path) -> None:
        samples = make("device", tmp_path, device=CUDA)
        samples.__getitems__([Key(0, 0, 0)])
        torch.cuda.set_sync_debug_mode("error")
        try:
            samples.__getitems__([Key(3, 0, 0), Key(5, 0, -1)])
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestDisk:
    def test_every_sample_is_decoded_once_for_all_runs(self, tmp_path: Path) -> None:
        first, second = Noise(), Noise()
        make("disk", tmp_path / "new" / "folder", first)
        assert first.decoded == COUNT - 2
        samples = make("disk", tmp_path / "new" / "folder", second)
        epoch(samples, 0)
        assert second.decoded == 3, "a few are compared, and that is all"
        (file,) = (tmp_path / "new" / "folder").iterdir()
        assert file.name.startswith("samples-some-noise-") and file.suffix == ".h5"

    def test_other_contents_have_other_files(self, tmp_path: Path) -> None:
        make("disk", tmp_path)
        changes = [
            {"source": Noise(version=1)},
            {"indices": range(3, COUNT)},
            {"indices": [3, 2, *range(4, COUNT)]},
            {"targets": ("depth",)},
            {"hidden": {}},
            {"hidden": {"depth": frozenset({4})}},
            {"hidden": {"normals": frozenset({4, 7})}},
        ]
        for number, change in enumerate(changes, start=2):
            same(
                make("disk", tmp_path, **change).__getitems__([Key(2, 0, 0), Key(5, 0, 1)]),
                make("none", tmp_path, **change).__getitems__([Key(2, 0, 0), Key(5, 0, 1)]),
            )
            assert len(list(tmp_path.iterdir())) == number, change
        # The order of the targets and of hidden samples says nothing.
        make("disk", tmp_path, targets=tuple(reversed(TARGETS)), hidden={"depth": frozenset({7, 4})})
        assert len(list(tmp_path.iterdir())) == len(changes) + 1

    def test_samples_that_are_decoded_differently_now_are_written_again(self, tmp_path: Path) -> None:
        old, new = make("disk", tmp_path, Noise(seed=0)), make("disk", tmp_path, Noise(seed=1))
        assert len(list(tmp_path.iterdir())) == 1
        for samples, seed in ((old, 0), (new, 1)):  # who has the old file open still reads it
            expected = make("none", tmp_path, Noise(seed=seed))
            same(samples.__getitems__([Key(9, 0, 0)]), expected.__getitems__([Key(9, 0, 0)]))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: os.truncate(file, file.stat().st_size // 2),
            lambda file: os.truncate(file, 0),
            lambda file: file.write_bytes(b"nonsense" * 4096),
            lambda file: h5py.File(file, "w").close(),
        ],
    )
    def test_a_damaged_file_is_written_again(self, tmp_path: Path, damage: Callable[[Path], object]) -> None:
        make("disk", tmp_path)
        (file,) = tmp_path.iterdir()
        whole = file.stat().st_size
        damage(file)
        samples = make("disk", tmp_path)
        same(samples.__getitems__([Key(9, 0, 0)]), make("none", tmp_path).__getitems__([Key(9, 0, 0)]))
        assert file.stat().st_size == whole and list(tmp_path.iterdir()) == [file]

    def test_nothing_is_left_of_a_file_that_was_not_finished(self, tmp_path: Path) -> None:
        class Broken(Noise):
            def read(self, indices, targets) -> list[Sample]:
                if 40 in indices:
                    raise UserError("image 40 is damaged")
                return super().read(indices, targets)

        with pytest.raises(UserError, match="image 40 is damaged"):
            make("disk", tmp_path, Broken())
        assert list(tmp_path.iterdir()) == []

    def test_the_file_is_mapped_into_memory(self, tmp_path: Path) -> None:
        stored = make("disk", tmp_path).stored
        assert stored is not None
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs Linux' list of mapped files")
        (file,) = tmp_path.iterdir()
        assert str(file) in maps.read_text()

    def test_workers_get_the_files_name_and_not_its_content(self, tmp_path: Path) -> None:
        samples = make("disk", tmp_path, augment=PIPELINE)
        sent = bytes(ForkingPickler.dumps(samples.stored))
        assert len(sent) < 1000 < sum(values.nbytes for values in samples.stored.values())
        same(pickle.loads(sent), samples.stored)

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_workers_read_the_same(self, tmp_path: Path, context: str) -> None:
        samples = make("disk", tmp_path, indices=range(8))
        loader = Loader(samples, Batches(8, 4, shuffle=False), workers=1)
        loader.multiprocessing_context = context
        expected = Loader(make("none", tmp_path, indices=range(8)), Batches(8, 4, shuffle=False), workers=0)
        for one, other in zip(expected, loader, strict=True):
            same(one, other)

    def test_a_set_that_cannot_tell_when_it_changes_is_refused(self, tmp_path: Path) -> None:
        class Silent(Noise):
            fingerprint = None

        for source in (Silent(), Combined([(Noise(), None), (Silent(), None)])):
            with pytest.raises(
                UserError, match=r"the data set some noise.* no 'fingerprint'.* use --data.cache memory"
            ):
                make("disk", tmp_path, source)

    def test_where_nothing_can_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match=r"needs a folder .*--data.cache-dir"):
            make("disk", None)
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file/samples.* cannot be written \(.*; choose another --data.cache-dir"):
            make("disk", tmp_path / "file")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2000, 1000, 1000))
        with pytest.raises(UserError, match=r"the samples take 0.00 GB, and .* has 0.00 GB free"):
            make("disk", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestFingerprint:
    @pytest.fixture(params=["folder", "nyuv2", "nyuv2 arrays", "cityscapes", "cityscapes arrays"])
    def opened(
        self,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        rooms: Path,  # noqa: F811
        streets: Path,  # noqa: F811
    ) -> tuple[Callable[..., Source], Path]:
        """Return a data set, as a function of its size, and a file that it reads."""
        if request.param == "nyuv2":
            return (lambda size: NYUv2(rooms, split="train", size=size)), rooms / "nyu_depth_v2_labeled.mat"
        if request.param == "cityscapes":
            file = next(streets.glob("disparity/train/*/*.png"))
            return (lambda size: Cityscapes(streets, split="train", size=size)), file
        if request.param == "folder":
            for number in range(3):
                for name, values in (("images", np.zeros((6, 8, 3), np.uint8)), ("depth", np.ones((6, 8), np.float32))):
                    (tmp_path / name).mkdir(exist_ok=True)
                    if name == "images":
                        Image.fromarray(values).save(tmp_path / name / f"{number}.png")
                    else:
                        np.save(tmp_path / name / f"{number}.npy", values)
            return (lambda size: Folder(tmp_path, split="train", size=size)), tmp_path / "depth" / "1.npy"
        write_arrays(tmp_path / "train", 9)
        if request.param == "nyuv2 arrays":
            return (lambda size: NYUv2(tmp_path, split="train", size=size)), tmp_path / "train" / "normal" / "8.npy"
        write_arrays(tmp_path / "val", 2)
        return (lambda size: Cityscapes(tmp_path, split="all", size=size, classes=7)), tmp_path / "val/image/1.npy"

    def test_changes_with_size_and_files_alone(self, opened: tuple[Callable[..., Source], Path]) -> None:
        make_source, file = opened
        first = make_source((6, 8)).fingerprint()
        assert first == make_source((6, 8)).fingerprint() != make_source((8, 6)).fingerprint()
        state = file.stat()
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
        assert make_source((6, 8)).fingerprint() != first
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert make_source((6, 8)).fingerprint() == first

    def test_changes_with_what_is_asked_for(self, rooms: Path, streets: Path) -> None:  # noqa: F811
        size = (6, 8)
        sources: list[Source] = [
            *(NYUv2(rooms, split=split, size=size) for split in ("train", "validation", "all", "test")),
            NYUv2(rooms, split="train", size=size, classes=40),
            NYUv2(rooms, split="train", size=size, raw_depth=True),
            *(Cityscapes(streets, split=split, size=size) for split in ("train", "validation", "all")),
            Cityscapes(streets, split="train", size=size, classes=7),
            *(Scenes(count, domain="loft", seed=seed, size=(16, 16)) for count in (2, 3) for seed in (0, 1)),
            Scenes(2, domain="studio", seed=0, size=(16, 16)),
            Scenes(2, domain="loft", seed=0, size=(16, 32)),
            Scenes(2, domain="loft", seed=0, size=(16, 16), start=1),
            Combined([(Noise(), None)]),
            Combined([(Noise(version=1), None)]),
            Combined([(Noise(), ("depth",))]),
            Combined([(Noise(), ("depth",)), (Noise(version=1), None)]),
        ]
        fingerprints = [source.fingerprint() for source in sources]
        assert None not in fingerprints and len(set(fingerprints)) == len(sources)

    def test_a_folders_description_and_split_count(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for number in range(4):
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")

        def told(split: str = "train") -> str:
            return Folder(tmp_path, split=split, size=(6, 8)).fingerprint()

        seen = {told(), told("validation"), told("all")}
        (tmp_path / "dataset.yaml").write_text("intrinsics: {fx: 5, fy: 5, cx: 3, cy: 2}\n")
        seen.add(told())
        assert len(seen) == 4

    def test_a_stamp_changes_with_size_time_and_name(self, tmp_path: Path) -> None:
        file, other = tmp_path / "a", tmp_path / "b"
        for path, content in ((file, b"12"), (other, b"12")):
            path.write_bytes(content)
            os.utime(path, ns=(0, 10))
        seen = [stamp([file]), stamp([other]), stamp([file, other])]
        os.utime(file, ns=(0, 11))
        seen.append(stamp([file]))
        file.write_bytes(b"123")
        os.utime(file, ns=(0, 10))
        seen.append(stamp([file]))
        assert len(set(seen)) == 5


class TestChoice:
    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> torch.device:
        """A GPU with 8 GB free of 80."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 80 * 10**9))
        return torch.device("cuda", 1)

    @pytest.mark.parametrize(
        ("gigabytes", "augmented", "expected"),
        [
            (2.0, False, "device"),
            (2.0, True, "memory"),
            (2.001, False, "memory"),
            (4.0, False, "memory"),
            (4.001, False, "none"),
            (4.001, True, "none"),
        ],
    )
    def test_of_its_own_accord_keeps_to_the_budgets(
        self, gpu: torch.device, gigabytes: float, augmented: bool, expected: str
    ) -> None:
        assert choose("auto", int(gigabytes * 1e9), gpu, 4, loader_augments=augmented).cache == expected

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    @pytest.mark.parametrize(("gigabytes", "expected"), [(1, "memory"), (4, "memory"), (4.001, "none")])
    def test_without_a_gpu(self, device: str, gigabytes: float, expected: str) -> None:
        assert choose("auto", int(gigabytes * 1e9), torch.device(device), 4).cache == expected
        assert choose("auto", 1, torch.device(device), 0).cache == "none"

    @pytest.mark.parametrize("cache", ["device", "memory", "disk", "none"])
    def test_what_is_asked_for_is_done(self, gpu: torch.device, cache: Cache) -> None:
        for device in (gpu, CPU):
            assert choose(cache, 7 * 10**9, device, 0).cache == cache

    def test_says_what_and_why_in_a_line(self, gpu: torch.device) -> None:
        reasons = {
            "device": choose("auto", 10**9, gpu, 4).reason,
            "memory": choose("auto", 10**9, CPU, 4).reason,
            "none": choose("auto", 5 * 10**9, CPU, 4).reason,
            "asked": choose("disk", 5 * 10**9, CPU, 4).reason,
        }
        assert reasons == {
            "device": "samples: on cuda:1, 1.00 GB, 12.5% of its free memory (25% may be used)",
            "memory": "samples: in memory, 1.00 GB of the 4 GB allowed (--data.cache-gb)",
            "none": "samples: decoded at every use, as 5.00 GB are more than the 4 GB allowed (--data.cache-gb); "
            "--data.cache disk would decode them once",
            "asked": "samples: on disk, 5.00 GB, as asked for",
        }

    def test_what_cannot_be_is_refused(self, gpu: torch.device) -> None:
        with pytest.raises(UserError, match=r"samples take 9.00 GB, and cuda:1 has 8.00 GB free; use memory"):
            choose("device", 9 * 10**9, gpu, 4)
        with pytest.raises(UserError, match=r"--data.cache device .* augment"):
            choose("device", 1, gpu, 4, loader_augments=True)
