"""NYU Depth v2 (Silberman et al., ECCV 2012): 1449 labelled pictures of rooms, in either of two layouts.

The official one, in 640 x 480, which has 13 or 40 classes, in-painted and raw depth, and the camera's intrinsics:

.. code-block:: text

    ROOT/nyu_depth_v2_labeled.mat    pictures, depth, 894 classes, scenes (MATLAB 7.3, which is HDF5)
    ROOT/splits.mat                  the official split: 795 pictures for training, 654 for testing
    ROOT/classMapping40.mat          the 40 classes of Gupta et al. (CVPR 2013) for the 894

MTAN's and LibMTL's, in 384 x 288, which has 13 classes, in-painted depth and normals:

.. code-block:: text

    ROOT/train/{image,label,depth,normal}/0.npy ... 794.npy    see `mtl.data.arrays`
    ROOT/val/{image,label,depth,normal}/0.npy ... 653.npy      the official test pictures

**Splits.** Neighbouring pictures show the same room, and the official test pictures are for a last figure, not for
choosing between models. So "train" and "validation" divide the official training pictures, "all" is both, and the
test pictures are read only as "test" (papers that follow MTAN choose by them, under the name "val"). Validation is
every eighth scene, in the order in which scenes appear; the .npy layout does not tell scenes, so there it is every
eighth block of eight pictures, whose rooms may go on in the block beside it.

**Classes.** The 13 are those of Couprie et al. (2013), from the 40 by the table of SceneNet (McCormac et al. 2017,
class13Mapping.mat of github.com/ankurhanda/nyuv2-meta-data). What has no label is ignored.

**Normals** of the .npy layout are turned into the frame of `mtl.data.sample`, whatever theirs is.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import scipy.io

from mtl.data.arrays import Arrays, Stored
from mtl.data.caching import digest, stamp
from mtl.data.decoding import reason
from mtl.data.fitting import fit
from mtl.data.sample import IGNORE_INDEX, TARGETS, DataInfo, Sample
from mtl.errors import UserError

Split = Literal["train", "validation", "all", "test"]

_CLASSES_13 = tuple("bed books ceiling chair floor furniture objects picture sofa table tv wall window".split())
_CLASSES_40 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat"),
    *("clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box"),
    *("whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure"),
    *("other furniture", "other prop"),
)
CLASSES = {13: _CLASSES_13, 40: _CLASSES_40}
"""Names of the classes, in the order of their indices."""

THIRTEEN_OF_FORTY = (
    *(11, 4, 5, 0, 3, 8, 9, 11, 12, 5),
    *(7, 5, 12, 9, 5, 12, 5, 6, 6, 4),
    *(6, 2, 1, 5, 10, 6, 6, 6, 6, 6),
    *(6, 5, 6, 6, 6, 6, 6, 6, 5, 6),
)
"""For each of the 40 classes, its class among the 13."""

INTRINSICS = ((518.86, 0, 325.58), (0, 519.47, 253.74), (0, 0, 1))
"""The colour camera of the official layout, from the toolbox's camera_params.m."""

_MAT, _SPLITS, _MAPPING = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"

_ORIGINS = {
    _SPLITS: "horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat",
    _MAPPING: "github.com/ankurhanda/nyuv2-meta-data/raw/master/classMapping40.mat",
}

_VARIABLES = {
    "images": ("uint8", (3, 640, 480)),
    "depths": ("float32", (640, 480)),
    "rawDepths": ("float32", (640, 480)),
    "labels": ("uint16", (640, 480)),
}
"""Type and shape of each picture's variables; h5py sees MATLAB's axes in reverse order."""

_HOLD_OUT = 8
"""Of every so many groups of pictures, the first is for validation."""

_BLOCK = 8
"""Pictures in a group where their scenes are not known."""

_FARTHEST = 100.0
"""Metres that no room has: beyond it, the unit is another."""


class NYUv2:
    """NYU Depth v2, fitted to one size; see `mtl.data.nyuv2` for its layouts and splits.

    In the official layout a sample also has `intrinsics`.

    Attributes:
        info: Name, targets and class names.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: Split,
        size: tuple[int, int],
        classes: int = 13,
        raw_depth: bool = False,
    ) -> None:
        """Find the files and check what can be known without reading pictures.

        Args:
            root: The folder that holds nyu_depth_v2_labeled.mat, or `train` and `val`.
            split: Which samples to take.
            size: Height and width of every sample in pixels.
            classes: 13 or 40; only 13 in the .npy layout.
            raw_depth: Whether depth is what the sensor measured, in place of the in-painted depth; only in the
                official layout.

        Raises:
            UserError: A file is missing or not NYUv2's, or the layout lacks what was asked for.
        """
        if classes not in CLASSES:
            raise UserError(f"NYUv2 has 13 or 40 classes, not {classes}")
        self._size = size
        self._stored: Stored
        if (root / _MAT).is_file():
            self._stored = stored = _Official(root, classes, raw_depth)
            training, testing = stored.official()
            ours = testing if split == "test" else training
            groups: Sequence[Hashable] = [stored.scenes[index] for index in ours]
        elif (root / "train" / "image").is_dir():
            if classes != 13 or raw_depth:
                raise UserError(
                    f"the .npy files in {root} have 13 classes and in-painted depth only: for 40 classes or raw depth, "
                    f"use {_MAT}"
                )
            folders = {"segmentation": "label", "depth": "depth", "normals": "normal"}
            self._stored = Arrays([root / ("val" if split == "test" else "train")], folders, classes)
            ours = list(range(len(self._stored.names)))
            groups = [index // _BLOCK for index in ours]
        else:
            raise UserError(
                f"the data folder {root} holds neither {_MAT} nor train/image/ with .npy files"
                if root.is_dir()
                else f"the data folder {root} does not exist"
            )
        if split in ("train", "validation"):
            held_out = set(list(dict.fromkeys(groups))[::_HOLD_OUT])
            if len(held_out) == len(set(groups)):
                raise UserError(
                    f"nothing is left for training: the {len(ours)} training pictures in {root} are of one room or "
                    "block, and validation takes the first of every eight"
                )
            ours = [i for i, g in zip(ours, groups, strict=True) if (g in held_out) == (split == "validation")]
        self._indices = ours
        self.info = DataInfo(
            name="NYUv2",
            targets=tuple(target for target in TARGETS if self.labelled(target).any()),
            classes=CLASSES[classes],
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._indices)

    def name(self, index: int) -> str:
        """Return the picture's number from 1 in the official layout, else its folder and file."""
        return self._stored.names[self._indices[index]]

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): which samples have this target."""
        return np.array(self._stored.labelled(target), dtype=bool)[self._indices]

    def fingerprint(self) -> str:
        """Return a text that changes with the files, the choice of samples and the size."""
        return digest(self._indices, self._size, self._stored.fingerprint())

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Read samples and fit them to size.

        Args:
            indices: Which samples.
            targets: Which labels, where there are any.

        Raises:
            UserError: A file is damaged, or its values make no sense.
        """
        samples = self._stored.read([self._indices[index] for index in indices], tuple(targets))
        for index, sample in zip(indices, samples, strict=True):
            depth = sample.get("depth", np.zeros(0))
            if 2 * np.count_nonzero(depth > _FARTHEST) > np.count_nonzero(depth):
                raise UserError(
                    f"picture {self.name(index)} of NYUv2 has a median depth of {np.median(depth[depth > 0]):.4g}, "
                    "but depth is in metres: divide it by its unit"
                )
        return [fit(sample, self._size) for sample in samples]


class _Official:
    """The official layout.

    The file is opened for each read, in a quarter of a millisecond: an open one survives neither a fork nor pickling.

    Attributes:
        names: Number of each picture, from 1.
        scenes: Name of each picture's scene.
    """

    def __init__(self, root: Path, classes: int, raw_depth: bool) -> None:
        self._root, self._path = root, root / _MAT
        self._depth = "rawDepths" if raw_depth else "depths"
        with _reading(self._path), h5py.File(self._path) as file:
            count = self._check(file)
            self.scenes = [_scene(file, reference) for reference in file["scenes"][:].ravel()]
        if len(self.scenes) != count:
            raise UserError(
                f"{self._path} has {count} images but 'scenes' of {len(self.scenes)}: it is not NYUv2's, or damaged"
            )
        self.names = [f"{number:04d}" for number in range(1, count + 1)]
        self._classes = self._mapping(classes)

    def official(self) -> tuple[list[int], list[int]]:
        """Return the indices of the official pictures for training and of those for testing.

        Raises:
            UserError: They are not of these pictures, or a picture is there twice.
        """
        path = self._root / _SPLITS
        remedy = f"get it from {_ORIGINS[_SPLITS]}"
        training, testing = (self._part(path, variable, remedy) for variable in ("trainNdxs", "testNdxs"))
        if both := sorted(set(training) & set(testing)):
            raise UserError(
                f"{path} has {len(both)} pictures both in 'trainNdxs' and 'testNdxs', such as {both[0] + 1}, so that "
                f"training would see what it is tested on: {remedy}"
            )
        return training, testing

    def _part(self, path: Path, variable: str, remedy: str) -> list[int]:
        """Return the indices of a part of the split, whose pictures are numbered from 1."""
        numbers = _matlab(path, variable)
        if numbers.min() < 1 or numbers.max() > len(self.names):
            raise UserError(
                f"{path} has pictures {numbers.min()} to {numbers.max()}, but {self._path} holds {len(self.names)}: "
                "they do not belong together"
            )
        different, counts = np.unique(numbers, return_counts=True)
        if (counts > 1).any():
            raise UserError(f"{path} has picture {different[counts > 1][0]} more than once in {variable!r}: {remedy}")
        return [int(number) - 1 for number in numbers]

    def labelled(self, target: str) -> list[bool]:
        """Return which pictures have this target."""
        return [target in ("segmentation", "depth")] * len(self.names)

    def fingerprint(self) -> str:
        """Return a text that changes with the file and with how it is read."""
        return digest(self._classes.tolist(), self._depth, stamp([self._path]))

    def read(self, indices: Iterable[int], targets: Iterable[str]) -> list[Sample]:
        """Read pictures."""
        wanted = tuple(targets)
        with _reading(self._path), h5py.File(self._path) as file:
            return [self._read(file, index, wanted) for index in indices]

    def _read(self, file: h5py.File, index: int, targets: Sequence[str]) -> Sample:
        sample: Sample = {
            "image": np.ascontiguousarray(file["images"][index].T),
            "intrinsics": np.array(INTRINSICS, np.float32),
        }
        where = f"picture {self.names[index]} in {self._path}"
        if "segmentation" in targets:
            labels = file["labels"][index].T
            if labels.max() >= len(self._classes):
                raise UserError(
                    f"{where} has the label {labels.max()}, but {self._root / _MAPPING} maps 1 to "
                    f"{len(self._classes) - 1}: they do not belong together"
                )
            sample["segmentation"] = self._classes[labels]
        if "depth" in targets:
            depth = np.ascontiguousarray(file[self._depth][index].T)
            wrong = ~(np.isfinite(depth) & (depth >= 0))
            if wrong.any():
                raise UserError(
                    f"{where} has a depth of {depth[wrong][0]:.4g} in {np.count_nonzero(wrong)} pixels of "
                    f"'{self._depth}': the file is damaged, so get it again"
                )
            sample["depth"] = depth
        return sample

    def _check(self, file: h5py.File) -> int:
        """Return the number of pictures.

        Raises:
            UserError: Variables are missing, or not of NYUv2's shapes and types.
        """
        if missing := [name for name in (*_VARIABLES, "scenes") if name not in file]:
            raise UserError(
                f"{self._path} has no variable {missing[0]!r}: it is not NYUv2's labelled set, which has "
                f"{', '.join(_VARIABLES)} and scenes"
            )
        count = len(file["images"])
        for name, (dtype, shape) in _VARIABLES.items():
            variable = file[name]
            if (variable.dtype, variable.shape) != (dtype, (count, *shape)):
                raise UserError(
                    f"{self._path} has {name!r} of {variable.dtype} and shape {variable.shape}, but NYUv2 has {dtype} "
                    f"and {(count, *shape)}: it is another file under this name"
                )
        return count

    def _mapping(self, classes: int) -> np.ndarray:
        """Return a table from the numbers in `labels`, from 0, to the class (uint8)."""
        path = self._root / _MAPPING
        forty = _matlab(path, "mapClass")
        if forty.min() < 1 or forty.max() > 40:
            raise UserError(
                f"{path} maps to classes {forty.min()} to {forty.max()}, but there are 1 to 40: get it from "
                f"{_ORIGINS[_MAPPING]}"
            )
        ours = np.arange(40) if classes == 40 else np.array(THIRTEEN_OF_FORTY)
        return np.array([IGNORE_INDEX, *ours[forty - 1]], np.uint8)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what h5py raises for a file that is damaged or no HDF5 into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as HDF5 ({reason(error)}): it is truncated or not NYUv2's labelled set of 2.8 GB, "
            "so get it again"
        ) from error


def _scene(file: h5py.File, reference: h5py.Reference) -> str:
    """Return the name of a scene, a MATLAB string behind a reference, without the letter of its part."""
    name = "".join(map(chr, file[reference][:].ravel()))
    return re.sub(r"(?<=\d)[a-z]$", "", name)


def _matlab(path: Path, variable: str) -> np.ndarray:
    """Return a variable of a small MATLAB file as a vector of whole numbers."""
    remedy = f"get it from {_ORIGINS[path.name]}"
    if not path.is_file():
        raise UserError(f"{path} does not exist, but {_MAT} needs it beside it: {remedy}")
    try:
        content = scipy.io.loadmat(path, variable_names=[variable])
    except Exception as error:  # SciPy raises almost anything for a damaged file
        raise UserError(f"{path} cannot be read as a MATLAB file ({reason(error)}): {remedy}") from error
    values = np.asarray(content.get(variable, ())).ravel()
    if values.size == 0 or values.dtype.kind not in "iuf" or np.any(values != np.floor(values)):
        raise UserError(f"{path} has no whole numbers under the name {variable!r}: {remedy}")
    return values.astype(np.int64)
