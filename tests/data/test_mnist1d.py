"""MNIST-1D: the recipe against the published arrays, and files that are not what they should be."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtl.data.mnist1d import CLASSES, MNIST1D, Arrays, generate, load_mnist1d, read_npz, read_pickle
from mtl.data.sample import Sample
from mtl.errors import UserError

published = pytest.mark.skipif(
    "MTL_MNIST1D" not in os.environ, reason="MTL_MNIST1D names no folder with mnist1d_frozen.npz and mnist1d_data.pkl"
)


def small(count: int = 16) -> dict[str, np.ndarray]:
    """Return arrays like MNIST-1D's, only fewer."""
    random = np.random.default_rng(0)
    signals = {name: random.normal(size=(count, 40)) for name in ("x", "x_test")}
    return {**signals, "y": np.arange(count) % 10, "y_test": np.arange(count)[::-1] % 10}


def same(arrays: Arrays, expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(getattr(arrays, name), expected[name]) for name in Arrays._fields)


class TestRecipe:
    def test_published_counts_labels_and_checksums(self) -> None:
        """The numbers are of the published file, read with NumPy's own functions."""
        generate.cache_clear()
        np.random.seed(7)
        before = np.random.get_state()[1].copy()
        arrays = generate()
        assert np.array_equal(np.random.get_state()[1], before), "the global generator is not the recipe's"
        assert np.bincount(arrays.y).tolist() == [398, 396, 411, 394, 394, 402, 401, 404, 402, 398]
        assert np.bincount(arrays.y_test).tolist() == [102, 104, 89, 106, 106, 98, 99, 96, 98, 102]
        assert arrays.y[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
        assert arrays.x[0, :2] == pytest.approx([-0.3320056673693902, -0.4719103656557236], abs=1e-12)
        assert arrays.x_test[-1, -1] == pytest.approx(1.193151836835276, abs=1e-12)
        # A sum in which the place of every value counts.
        checksums = [(x.ravel() * np.sin(np.arange(x.size))).sum() for x in (arrays.x, arrays.x_test)]
        assert checksums == pytest.approx([113.64999164216985, 289.0427011475683], abs=1e-9)

    def test_what_all_share_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            generate().x[0, 0] = 0
        load_mnist1d(None, "all")[0].zero_()
        assert generate().x.any() and load_mnist1d(None, "all")[0].any()

    @published
    def test_the_frozen_arrays_to_rounding(self) -> None:
        with np.load(Path(os.environ["MTL_MNIST1D"]) / "mnist1d_frozen.npz") as frozen:
            for name, array in generate()._asdict().items():
                assert array.dtype == frozen[name].dtype and np.abs(array - frozen[name]).max() < 1e-12

    @published
    def test_both_files_hold_the_same_bits(self) -> None:
        root = Path(os.environ["MTL_MNIST1D"])
        with np.load(root / "mnist1d_frozen.npz") as frozen:
            assert same(read_npz(root / "mnist1d_frozen.npz"), frozen)
            assert same(read_pickle(root / "mnist1d_data.pkl"), frozen)
        signals, labels = load_mnist1d(root, "all")
        made, made_labels = load_mnist1d(None, "all")
        assert torch.equal(labels, made_labels) and (signals - made).abs().max() < 1e-6


class TestSplits:
    def test_shapes_and_types(self) -> None:
        for split, count in {"train": 3500, "validation": 500, "all": 4000, "test": 1000}.items():
            signals, labels = load_mnist1d(None, split)
            assert signals.shape == (count, 1, 40) and signals.dtype == torch.float32
            assert labels.shape == (count,) and labels.dtype == torch.int64

    def test_train_and_validation_divide_the_published_training_signals(self) -> None:
        parts = [load_mnist1d(None, split) for split in ("train", "validation")]
        for whole, *pieces in zip(load_mnist1d(None, "all"), *parts, strict=True):
            assert torch.equal(torch.cat(pieces), whole)
        published = [torch.from_numpy(array) for array in (generate().x_test, generate().y_test)]
        for ours, theirs in zip(load_mnist1d(None, "test"), published, strict=True):
            torch.testing.assert_close(ours.squeeze(), theirs, check_dtype=False, rtol=1e-6, atol=1e-6)

    def test_no_signal_is_in_two_splits(self) -> None:
        rows = torch.cat([load_mnist1d(None, split)[0] for split in ("train", "validation", "test")])
        assert len(torch.unique(rows.flatten(1), dim=0)) == 5000

    def test_unknown(self) -> None:
        with pytest.raises(UserError, match="no split 'val'; choose one of train, validation, all, test"):
            load_mnist1d(None, "val")  # type: ignore[arg-type]


class TestSource:
    def test_a_sample_is_its_signal_and_its_label(self) -> None:
        source = MNIST1D(split="validation")
        signals, labels = load_mnist1d(None, "validation")
        assert len(source) == 500 and source.name(3) == "validation/3"
        assert source.info.targets == ("label",) and source.info.classes == CLASSES
        for row, sample in zip([7, 0], source.read([7, 0], ["label", "depth"]), strict=True):
            assert sample.keys() == {"signal", "label"}
            assert sample["signal"].shape == (40,) and sample["signal"].dtype == np.float32
            assert sample["label"].shape == () and sample["label"].dtype == np.int64
            assert np.array_equal(sample["signal"], signals[row, 0]) and sample["label"] == labels[row]
        assert source.read([0], [])[0].keys() == {"signal"}

    def test_samples_are_copies(self) -> None:
        source = MNIST1D(split="test")
        changed, again = (source.read([0], ["label"])[0] for _ in range(2))
        changed["signal"] += 1
        changed["label"] += 1
        fresh: Sample = source.read([0], ["label"])[0]
        assert all(np.array_equal(fresh[key], again[key]) for key in again)

    def test_labelled(self) -> None:
        source = MNIST1D(split="test")
        assert source.labelled("label").all() and not source.labelled("depth").any()
        assert source.labelled("label").shape == (1000,) and source.labelled("label").dtype == bool

    def test_fingerprint_is_of_the_content(self, tmp_path: Path) -> None:
        content = small()
        np.savez(tmp_path / "first.npz", **content)
        np.savez(tmp_path / "again.npz", **content)
        content["y"][0] += 1
        np.savez(tmp_path / "other.npz", **content)
        first, again, other = (
            MNIST1D(tmp_path / f"{n}.npz", split="all").fingerprint() for n in ("first", "again", "other")
        )
        assert first == again != other
        assert MNIST1D(split="train").fingerprint() != MNIST1D(split="validation").fingerprint()


class TestFiles:
    def test_a_folder_s_archive_goes_before_its_pickle(self, tmp_path: Path) -> None:
        first, second = small(16), small(24)
        (tmp_path / "mnist1d_data.pkl").write_bytes(pickle.dumps(second))
        assert len(load_mnist1d(tmp_path, "all")[0]) == 24
        np.savez_compressed(tmp_path / "mnist1d_frozen.npz", **first)
        assert len(load_mnist1d(tmp_path, "all")[0]) == 16

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("", "holds neither mnist1d_frozen.npz nor mnist1d_data.pkl"),
            ("nothing", "nothing does not exist"),
            ("data.csv", "data.csv is neither .npz nor .pkl"),
        ],
    )
    def test_nothing_to_read(self, tmp_path: Path, name: str, said: str) -> None:
        (tmp_path / "data.csv").write_text("1,2")
        with pytest.raises(UserError, match=said):
            load_mnist1d(tmp_path / name, "train")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"y_test": None}, "has no array 'y_test'"),
            (
                {"x": np.zeros((16, 39))},
                r"'x' holds float64 of shape \(16, 39\), but signals are floats",
            ),
            ({"x_test": np.zeros((16, 40), int)}, "'x_test' holds int64"),
            ({"x": np.zeros((4, 40)), "y": np.zeros(4, int)}, "at least 8"),
            ({"x": np.full((16, 40), np.nan)}, "'x' has values that are not finite"),
            ({"y": np.arange(15) % 10}, r"'y' holds int64 of shape \(15,\), but .* each of the 16"),
            ({"y_test": np.zeros(16)}, "'y_test' holds float64"),
            ({"y": np.arange(16)}, "'y' has the label 10, but labels are 0 to 9"),
            ({"y": np.arange(16) - 1}, "'y' has the label -1"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".npz", ".pkl"])
    def test_arrays_that_cannot_be(self, tmp_path: Path, suffix: str, changes: dict[str, Any], said: str) -> None:
        content = {name: array for name, array in (small() | changes).items() if array is not None}
        path = tmp_path / f"data{suffix}"
        if suffix == ".npz":
            np.savez(path, **content)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=f"data{suffix}.*{said}"):
            load_mnist1d(path, "train")

    def test_archive_of_objects_or_none_at_all(self, tmp_path: Path) -> None:
        path = tmp_path / "data.npz"
        np.savez(path, **{**small(), "y": np.array([None] * 16)})
        with pytest.raises(UserError, match=r"data.npz cannot be read"):
            read_npz(path)
        for content in (b"", b"no archive", pickle.dumps(small())):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"data.npz cannot be read"):
                read_npz(path)

    def test_truncated_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "data.npz"
        np.savez_compressed(path, **small())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"data.npz cannot be read"):
            read_npz(path)


class Calls:
    """Pickled, this calls a function when it is unpickled by anyone who runs pickled code."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class TestPickle:
    @pytest.mark.parametrize("protocol", [3, 4])
    def test_today_s_arrays(self, tmp_path: Path, protocol: int) -> None:
        """Their names have moved within NumPy since the published file was made."""
        path = tmp_path / "data.pkl"
        path.write_bytes(pickle.dumps(small(), protocol=protocol))
        assert same(read_pickle(path), small())

    def test_big_endian_arrays(self, tmp_path: Path) -> None:
        path = tmp_path / "data.pkl"
        path.write_bytes(pickle.dumps({name: v.astype(v.dtype.newbyteorder(">")) for name, v in small().items()}))
        assert same(read_pickle(path), small())
        signals, _ = load_mnist1d(path, "all")
        torch.testing.assert_close(signals[:, 0].double(), torch.from_numpy(small()["x"]), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("where", ["instead", "inside", "key"])
    def test_no_code_runs(self, tmp_path: Path, protocol: int, where: str) -> None:
        path, trace = tmp_path / "data.pkl", tmp_path / "trace"
        malicious = Calls(os.system, f"touch {trace}")
        content = {"instead": malicious, "inside": {**small(), "t": malicious}, "key": {malicious: 1}}[where]
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=r"data.pkl asks for '[\w.]+', which MNIST-1D's arrays do not need"):
            read_pickle(path)
        assert not trace.exists()
        if where == "instead":  # The file does what it says it does.
            pickle.loads(path.read_bytes())
            assert trace.exists()

    @pytest.mark.parametrize("asked", ["builtins eval", "numpy load", "numpy ndarray.tofile", "numpy.core a"])
    def test_no_other_name_is_known(self, tmp_path: Path, asked: str) -> None:
        path = tmp_path / "data.pkl"
        module, name = asked.split()
        for content in (
            f"c{module}\n{name}\n.".encode(),
            b"\x80\x04" + pickle.dumps(module, 0)[:-1] + pickle.dumps(name, 0)[:-1] + b"\x93.",
        ):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"asks for '{module}.{name}', "):
                read_pickle(path)

    @pytest.mark.parametrize(
        ("array", "said"),
        [
            (np.array([None] * 16), "type 'O8'"),
            (np.zeros(16, np.dtype([("a", "f8"), ("b", "O")])), "type 'V16'"),
            (np.zeros((16, 40), np.float32), "type 'f4'"),
            (np.asfortranarray(np.ones((16, 40))), "not plain numbers"),
        ],
    )
    def test_other_arrays(self, tmp_path: Path, array: np.ndarray, said: str) -> None:
        path = tmp_path / "data.pkl"
        path.write_bytes(pickle.dumps({**small(), "x": array}))
        with pytest.raises(UserError, match=f"data.pkl cannot be read .*{said}"):
            read_pickle(path)

    def test_no_dictionary(self, tmp_path: Path) -> None:
        path = tmp_path / "data.pkl"
        path.write_bytes(pickle.dumps(list(small().values())))
        with pytest.raises(UserError, match="holds a list, but MNIST-1D is a dictionary"):
            read_pickle(path)

    @given(st.data())
    @example(None)
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_damage_is_a_sentence_or_does_not_matter(self, tmp_path: Path, data: Any) -> None:
        whole = bytearray(pickle.dumps(small(8), protocol=3))
        if data is None:
            whole[whole.index(b"q\x01")] = ord("r")  # a number for the memory that is very large
        elif data.draw(st.booleans(), label="truncated"):
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        else:
            # What is between is one array's numbers.
            numbers = [*range(200), *range(2700, 2900), *range(len(whole) - 200, len(whole))]
            for place in data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=4)):
                whole[place] = data.draw(st.integers(0, 255))
        path = tmp_path / "data.pkl"
        path.write_bytes(whole)
        try:
            assert read_pickle(path).x.shape == (8, 40)
        except UserError as error:
            assert "data.pkl" in str(error) and "\n" not in str(error)
