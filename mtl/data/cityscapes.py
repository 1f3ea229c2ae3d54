"""Cityscapes (Cordts et al., CVPR 2016): 5000 labelled pictures of streets, in either of two layouts.

The official one, in 2048 x 1024, which has 19 or 7 classes, depth in metres and the camera's intrinsics:

.. code-block:: text

    ROOT/leftImg8bit/{train,val}/CITY/CITY_SEQ_FRAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png
    ROOT/disparity/{train,val}/CITY/CITY_SEQ_FRAME_disparity.png
    ROOT/camera/{train,val}/CITY/CITY_SEQ_FRAME_camera.json

`gtFine`, `disparity` and `camera` may be absent or have fewer files, but a disparity needs its camera.

MTAN's and LibMTL's, in 256 x 128 or 512 x 256, which has 19 or 7 classes and **inverse** depth without a unit:

.. code-block:: text

    ROOT/{train,val}/{image,label_7,label_19,depth}/0.npy ...    see `mtl.data.arrays`; `label` is `label_7`

**Splits.** "train" is the official train, 2975 pictures of 18 cities, "validation" the official val, 500 pictures of
3 other cities, "all" is both. The labels of the official test pictures are not public, so the field compares on val.

**Classes.** The 19 that are evaluated; or the 7 categories of those 19, as the official category score counts them.
All other labels are ignored. MTAN does not document how its 7 came about; they are taken to be these, in this order.

**Depth.** A stored p > 0 is a disparity of (p - 1) / 256 pixels (README of cityscapesScripts), and depth is
baseline * fx / disparity. Disparities under a sixteenth of a pixel, 7.6 km and more, are below what stereo matching
resolves and count as unmeasured. Inverse depth is averaged as it is when a sample is fitted; it needs tasks that
know of it (`DataInfo.inverse_depth`): what is zoomed in by s has s times the inverse depth, not 1 / s.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from mtl.data.arrays import Arrays, Stored
from mtl.data.caching import digest, stamp
from mtl.data.decoding import LABEL_SIZES, image_size, read_depth, read_image, read_segmentation, reason
from mtl.data.fitting import fit
from mtl.data.sample import IGNORE_INDEX, TARGETS, DataInfo, Sample
from mtl.errors import UserError

Split = Literal["train", "validation", "all", "test"]

EVALUATED = (
    *((7, "road", "flat"), (8, "sidewalk", "flat")),
    *((11, "building", "construction"), (12, "wall", "construction"), (13, "fence", "construction")),
    *((17, "pole", "object"), (19, "traffic light", "object"), (20, "traffic sign", "object")),
    *((21, "vegetation", "nature"), (22, "terrain", "nature"), (23, "sky", "sky")),
    *((24, "person", "human"), (25, "rider", "human")),
    *((26, "car", "vehicle"), (27, "truck", "vehicle"), (28, "bus", "vehicle")),
    *((31, "train", "vehicle"), (32, "motorcycle", "vehicle"), (33, "bicycle", "vehicle")),
)
"""Id, name and category of the evaluated classes, in the order of their trainIds (labels.py of cityscapesScripts)."""

CLASSES = {
    19: tuple(name for _, name, _ in EVALUATED),
    7: tuple(dict.fromkeys(category for _, _, category in EVALUATED)),
}
"""Names of the classes, in the order of their indices."""

_IDS = 34
"""Number of ids in labelIds, from 0 to 33."""

_SIZE = (1024, 2048)
"""Height and width of every picture; disparities and cameras hold for this size alone."""

_FINEST = 1 / 16
"""The least disparity, in pixels, that is a measurement."""

_FOLDERS = {"train": ("train",), "validation": ("val",), "all": ("train", "val")}
"""The official parts that make up each split."""

_FILES = {
    "image": ("leftImg8bit", "_leftImg8bit.png"),
    "segmentation": ("gtFine", "_gtFine_labelIds.png"),
    "depth": ("disparity", "_disparity.png"),
    "intrinsics": ("camera", "_camera.json"),
}
"""Where the official layout has the files of each key, and how their names end."""


class Cityscapes:
    """Cityscapes, fitted to one size; see `mtl.data.cityscapes` for its layouts and splits.

    In the official layout a sample also has `intrinsics` where there is a camera file.

    Attributes:
        info: Name, targets, class names, and whether depth is inverse depth (it is in the .npy layout).
    """

    def __init__(self, root: Path, *, split: Split, size: tuple[int, int], classes: int = 19) -> None:
        """Find the files and check names, sizes and types.

        Args:
            root: The folder that holds `leftImg8bit`, or `train` and `val`.
            split: Which samples to take; "test" has no public labels and is refused.
            size: Height and width of every sample in pixels.
            classes: 19 or 7.

        Raises:
            UserError: A file is missing or cannot be what its folder says, or the layout lacks what was asked for.
        """
        if classes not in CLASSES:
            raise UserError(f"Cityscapes has 19 or 7 classes, not {classes}")
        if split == "test":
            raise UserError(
                "the labels of Cityscapes' test pictures are not public: evaluate on 'validation', or send predictions "
                "to the benchmark's server"
            )
        self._size = size
        self._stored: Stored
        official = (root / "leftImg8bit").is_dir()
        if official:
            self._stored = _Official(root, _FOLDERS[split], classes)
        elif (root / "train" / "image").is_dir():
            folders = {"segmentation": _label_folder(root, classes), "depth": "depth"}
            self._stored = Arrays([root / name for name in _FOLDERS[split]], folders, classes)
        else:
            raise UserError(
                f"the data folder {root} holds neither leftImg8bit/ nor train/image/ with .npy files"
                if root.is_dir()
                else f"the data folder {root} does not exist"
            )
        self.info = DataInfo(
            name="Cityscapes",
            targets=tuple(target for target in TARGETS if self.labelled(target).any()),
            classes=CLASSES[classes],
            inverse_depth=not official,
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._stored.names)

    def name(self, index: int) -> str:
        """Return city, sequence and frame in the official layout, else folder and number."""
        return self._stored.names[index]

    def labelled(self, target: str) -> np.ndarray:
        """Return a boolean array (N,): which samples have this target."""
        return np.array(self._stored.labelled(target), dtype=bool)

    def fingerprint(self) -> str:
        """Return a text that changes with the files, the classes and the size."""
        return digest(self._size, self._stored.fingerprint())

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        """Read samples and fit them to size.

        Args:
            indices: Which samples.
            targets: Which labels, where there are any.

        Raises:
            UserError: A file is damaged, or its values make no sense.
        """
        samples = self._stored.read(indices, tuple(targets))
        return [_fit_inverse(s, self._size) if self.info.inverse_depth else fit(s, self._size) for s in samples]


def _fit_inverse(sample: Sample, size: tuple[int, int]) -> Sample:
    """Fit a sample whose depth is inverse depth: `fit` averages the reciprocal of what it takes for depth."""
    if "depth" not in sample:
        return fit(sample, size)
    fitted = fit({**sample, "depth": _reciprocal(sample["depth"])}, size)
    return {**fitted, "depth": _reciprocal(fitted["depth"])}


def _reciprocal(values: np.ndarray) -> np.ndarray:
    """Return 1 / values, and 0 for 0."""
    result = np.zeros_like(values)
    np.divide(1, values, out=result, where=values > 0)
    return result


def _label_folder(root: Path, classes: int) -> str:
    """Return the name of the .npy layout's folder of labels.

    Raises:
        UserError: There are labels, but of other classes.
    """
    there = {path.name for path in (root / "train").glob("label*")}
    wanted = [f"label_{classes}", *(["label"] if classes == 7 else [])]
    if found := [name for name in wanted if name in there]:
        return found[0]
    other = 7 if classes == 19 else 19
    if there & {f"label_{other}", *(["label"] if other == 7 else [])}:
        raise UserError(
            f"{root / 'train'} holds no {wanted[0]}/, but labels of {other} classes: ask for {other} classes"
        )
    return wanted[0]


class _Official:
    """The official layout.

    Attributes:
        names: City, sequence and frame of each picture.
    """

    def __init__(self, root: Path, parts: Sequence[str], classes: int) -> None:
        self._samples = [files for part in parts for files in _find(root, part)]
        for files in self._samples:
            _check_headers(files)
        self.names = [files["image"].name.removesuffix(_FILES["image"][1]) for files in self._samples]
        self._classes = np.full(256, IGNORE_INDEX, np.uint8)
        for train_id, (identifier, _, category) in enumerate(EVALUATED):
            self._classes[identifier] = train_id if classes == 19 else CLASSES[7].index(category)

    def labelled(self, target: str) -> list[bool]:
        """Return which pictures have this target."""
        return [target in files for files in self._samples]

    def fingerprint(self) -> str:
        """Return a text that changes with the files and with how they are read."""
        return digest(self._classes.tolist(), stamp(path for files in self._samples for path in files.values()))

    def read(self, indices: Iterable[int], targets: Iterable[str]) -> list[Sample]:
        """Read pictures."""
        wanted = tuple(targets)
        return [self._read(self._samples[index], wanted) for index in indices]

    def _read(self, files: dict[str, Path], targets: Sequence[str]) -> Sample:
        sample = {"image": read_image(files["image"])}
        camera = _Camera.load(files["intrinsics"]) if "intrinsics" in files else None
        if camera:
            sample["intrinsics"] = camera.matrix()
        if "segmentation" in targets and "segmentation" in files:
            sample["segmentation"] = self._classes[_read_ids(files["segmentation"])]
        if "depth" in targets and "depth" in files and camera:
            sample["depth"] = _read_disparity(files["depth"], camera.extrinsic.baseline * camera.intrinsic.fx)
        return sample


def _find(root: Path, part: str) -> list[dict[str, Path]]:
    """Return the files of each picture of an official part, by key."""
    kind, ending = _FILES["image"]
    images = sorted((root / kind / part).glob(f"*/*{ending}"))
    if not images:
        raise UserError(f"{root / kind / part} holds no picture CITY/*{ending}: unpack {kind}_trainvaltest.zip there")
    samples = [{"image": image} for image in images]
    for key in ("segmentation", "depth", "intrinsics"):
        label_kind, label_ending = _FILES[key]
        labels = {path.name: path for path in (root / label_kind / part).glob(f"*/*{label_ending}")}
        found = 0
        for files in samples:
            stem = files["image"].name.removesuffix(ending)
            if path := labels.get(f"{stem}{label_ending}"):
                files[key] = path
                found += 1
        if labels and not found:
            raise UserError(
                f"no file in {root / label_kind / part} belongs to a picture in {root / kind / part} (such as "
                f"{min(labels)} beside {images[0].name}): the names must begin alike"
            )
    for files in samples:
        if "depth" in files and "intrinsics" not in files:
            raise UserError(
                f"{files['depth']} has no camera file, which its depth needs: unpack camera_trainvaltest.zip in "
                f"{root}, or remove the disparity"
            )
    return samples


def _check_headers(files: dict[str, Path]) -> None:
    """Raise a `UserError` if a file's header tells that it cannot be used."""
    for key, path in files.items():
        if key == "intrinsics":
            continue
        height, width = image_size(path) if key == "image" else LABEL_SIZES[key](path)
        if (height, width) != _SIZE:
            raise UserError(
                f"{path} is {width}x{height} pixels, but all of Cityscapes is {_SIZE[1]}x{_SIZE[0]}, for which its "
                "cameras and disparities hold: use the original files, or read resized ones as a 'folder'"
            )


def _read_ids(path: Path) -> np.ndarray:
    """Decode labelIds (H, W) uint8."""
    ids = read_segmentation(path, classes=256, ignore_index=255)
    wrong = ids >= _IDS
    if wrong.any():
        raise UserError(
            f"{path} has the value {ids[wrong][0]} in {np.count_nonzero(wrong)} pixels, but labelIds are 0 to "
            f"{_IDS - 1}: use the original file (255 is found in labelTrainIds)"
        )
    return ids


def _read_disparity(path: Path, baseline_fx: float) -> np.ndarray:
    """Decode depth (H, W) float32 in metres.

    Args:
        path: 16-bit PNG.
        baseline_fx: Baseline in metres times focal length in pixels.
    """
    disparity = read_depth(path, scale=1 / 256) - np.float32(1 / 256)
    depth = np.zeros_like(disparity)
    np.divide(np.float32(baseline_fx), disparity, out=depth, where=disparity >= _FINEST)
    return depth


class _Extrinsic(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    baseline: PositiveFloat


class _Intrinsic(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    fx: PositiveFloat
    fy: PositiveFloat
    u0: float
    v0: float


class _Camera(BaseModel):
    """What is used of a camera file; lengths in metres and in pixels of the stored picture."""

    model_config = ConfigDict(frozen=True)

    extrinsic: _Extrinsic
    intrinsic: _Intrinsic

    @classmethod
    def load(cls, path: Path) -> "_Camera":
        """Read a camera file.

        Raises:
            UserError: It is no JSON, or lacks a field.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({reason(error)})") from error
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, problem["loc"]))
            what = f"field '{field}': {problem['msg']}" if field else problem["msg"]
            raise UserError(
                f"{path} is not a camera file of Cityscapes ({what}): unpack camera_trainvaltest.zip again"
            ) from error

    def matrix(self) -> np.ndarray:
        """Return the intrinsics (3, 3) float32."""
        camera = self.intrinsic
        return np.array([[camera.fx, 0, camera.u0], [0, camera.fy, camera.v0], [0, 0, 1]], np.float32)
