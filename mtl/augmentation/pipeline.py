"""Any albumentations pipeline, written in YAML, applied to single samples in the loader.

A pipeline is written as a list of transforms in their order::

    - HorizontalFlip                       # albumentations' own probability
    - Affine: {rotate: [-10, 10], scale: [0.8, 1.2], border_mode: 4, p: 0.7}
    - OneOf:
        transforms:
          - GaussianBlur: {blur_limit: [3, 5]}
          - MotionBlur
        p: 0.3

or as ``albumentations.to_dict`` writes it. Names are those of albumentations' classes, and nothing else is looked up
or imported.

albumentations knows nothing of cameras, and treats a mask as numbers. So it is given the picture and, in place of
labels, a map of which pixel each one shows, which is never interpolated; every label is then fetched through that
map, and is invalid where it shows nothing (whatever the border mode shows there, and whichever value ``fill_mask``
has). Beside it goes the camera:

=============================================== ==================== =================== ================== ==========
transforms                                      segmentation         depth               normals            intrinsics
=============================================== ==================== =================== ================== ==========
colour, blur, noise, weather                    stay                 stay                stay               stay
flips, quarter turns, D4, Transpose             move                 move                turn               K'
Affine, Rotate, SafeRotate, ShiftScaleRotate    move                 move                turn               K'
crops, pads, resizing                           move                 move                move               K'
Perspective                                     move                 z of R X            turn               K'
Elastic, Grid, Optical, ThinPlateSpline,        move                 move                move               unknown
PiecewiseAffine, GridElasticDeform,
RandomGridShuffle
CoarseDropout, Erasing, GridDropout, XYMasking  stay; invalid in the holes where ``fill_mask`` is given    stay
=============================================== ==================== =================== ================== ==========

A transform that moves pixel p to H p (homogeneous, homography or affine) is a camera that turned by R and got other
intrinsics K': H K = K' R with K' upper triangular, by RQ decomposition (Hartley & Zisserman 2004, "Multiple View
Geometry", A4.1.1). A point X becomes R X and a normal R n. For affine H, R is a turn or a mirror image in the
picture's plane: depth keeps its metres, and zoom, stretch and shear are all in K'. Where K is unknown, affine
transforms are taken for those of a camera with square pixels, and what Perspective does to depth and normals cannot
be told: it is an error. Bending keeps what each ray sees, depth and normals included, but no pinhole camera has such
rays.

What changes the image's type (the backbone normalises by itself), looks at boxes or masks, or wants other pictures
is refused by name, and so is a pipeline whose result has another size than its input's.
"""

import functools
import inspect
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.dropout.transforms import BaseDropout
from albumentations.augmentations.geometric.distortion import BaseDistortion
from pydantic import ValidationError
from scipy.linalg import rq

from mtl.data.sample import TARGETS, Sample
from mtl.errors import UserError, nearest

_CLASS = "__class_fullname__"

_TRIALS = 8
"""Draws at construction that have to end in a picture of the right size."""

_TIE = 1e-3
"""Distances in pixels that differ by less than this are equal up to rounding."""

_COMPOSITIONS: dict[type, tuple[str, ...]] = {
    A.Compose: ("p",),
    A.Sequential: ("p",),
    A.OneOf: ("p",),
    A.OneOrOther: ("p",),
    A.SomeOf: ("p", "n", "replace"),
    A.RandomOrder: ("p", "n", "replace"),
}
"""What composes transforms, with the arguments it takes beside them."""

_PROJECTIVE = (
    *(A.HorizontalFlip, A.VerticalFlip, A.Transpose, A.D4, A.RandomRotate90),
    *(A.Affine, A.Rotate, A.Perspective),
    *(A.RandomCrop, A.CenterCrop, A.Crop, A.RandomCropFromBorders, A.Pad, A.CropAndPad),
    *(A.RandomResizedCrop, A.RandomSizedCrop, A.Resize, A.RandomScale, A.LongestMaxSize, A.SmallestMaxSize),
)
"""What moves pixels by a homography. Subclasses are meant, too: SafeRotate and ShiftScaleRotate are affine."""

_BENDING = (BaseDistortion, A.GridElasticDeform, A.RandomGridShuffle)
"""What moves them in another way."""

_STILL = (A.ImageOnlyTransform, A.PixelDropout, A.NoOp)
"""What leaves labels where they are."""

_FLOAT = "changes the type of the image, which stays uint8: the backbone normalises by itself"
_OBJECTS = "looks for objects in masks or boxes, which samples do not have"
_OTHERS = "needs other pictures beside the sample"
_REFUSED: dict[type, str] = {
    **dict.fromkeys((A.Normalize, A.ToFloat, A.FromFloat, A.ToTensorV2, A.ToTensor3D), _FLOAT),
    **dict.fromkeys((A.MaskDropout, A.ConstrainedCoarseDropout, A.CropNonEmptyMaskIfExists), _OBJECTS),
    **dict.fromkeys((A.AtLeastOneBBoxRandomCrop, A.BBoxSafeRandomCrop, A.RandomSizedBBoxSafeCrop), _OBJECTS),
    A.RandomCropNearBBox: _OBJECTS,
    **dict.fromkeys((A.Mosaic, A.OverlayElements, A.TextImage), _OTHERS),
    **dict.fromkeys((A.FDA, A.HistogramMatching, A.PixelDistributionAdaptation), _OTHERS),
    A.Morphological: "grows and shrinks regions, which depth and normals cannot follow",
    A.SelectiveChannelTransform: "would leave the labels behind where it moves channels of the image",
    A.ReplayCompose: "records what it did for nobody: write Compose",
    A.Lambda: "runs code, which a file cannot hold",
}
"""Why not, of albumentations' transforms that a sample cannot go through."""

_SYMMETRIES = {
    "e": ((1, 0), (0, 1)),
    "r90": ((0, 1), (-1, 0)),
    "r180": ((-1, 0), (0, -1)),
    "r270": ((0, -1), (1, 0)),
    "v": ((1, 0), (0, -1)),
    "hvt": ((0, -1), (-1, 0)),
    "h": ((-1, 0), (0, 1)),
    "t": ((0, 1), (1, 0)),
}
"""Linear part, on (x, y), of the symmetries of the square, under albumentations' names; r90 is counterclockwise."""


@dataclass(frozen=True)
class _View:
    """What a picture on its way shows of the sample.

    Attributes:
        source: For each pixel 1 + the flat index of the sample's pixel that it shows, 0 for none; (H, W) float64,
            which OpenCV moves about.
        camera: Intrinsics (3, 3) float64, all zero where they are unknown.
        turn: Takes the sample's camera coordinates to this picture's, orthogonal (3, 3) float64; NaN if unknown.
    """

    source: np.ndarray
    camera: np.ndarray
    turn: np.ndarray


class Pipeline:
    """A change of samples that albumentations makes, as the content of a YAML file says.

    Every draw comes from the generator passed in. Instances travel to spawned workers.

    Args:
        spec: A list of transforms, each ``Name`` or ``{Name: {argument: value, ...}}``, or the dictionary that
            ``albumentations.to_dict`` makes of a pipeline.
        where: Where it was written, for messages: a file's name.
        size: Height and width in pixels of the samples, before and after.
        inverse_depth: Whether `depth` holds inverse depth, as in `mtl.data.sample.DataInfo`.

    Raises:
        UserError: It names an unknown or unsuitable transform or a wrong argument, or its results are no samples of
            this size.
    """

    def __init__(self, spec: Any, where: str, size: tuple[int, int], inverse_depth: bool = False) -> None:
        self.where, self.size, self.inverse_depth = where, size, inverse_depth
        root = spec["transform"] if isinstance(spec, Mapping) and "transform" in spec else spec
        if isinstance(root, list):
            root = {"Compose": {"transforms": root}}
        elif not isinstance(root, Mapping) or _CLASS not in root:
            raise UserError(
                f"{where}: a pipeline is a list of transforms, such as '- HorizontalFlip' and "
                "'- Affine: {rotate: 10}', or what albumentations.to_dict writes, with 'transform' on top"
            )
        built = _build(root, where)
        self._compose = built if isinstance(built, A.Compose) else A.Compose([built])
        camera = np.array([[size[1], 0, size[1] / 2], [0, size[1], size[0] / 2], [0, 0, 1]], np.float32)
        for seed in range(_TRIALS):
            generator = np.random.default_rng(seed)
            image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            try:
                self({"image": image, "intrinsics": camera}, generator)
            except UserError:
                raise
            except Exception as error:  # whatever a transform may raise that dislikes its arguments
                raise UserError(
                    f"{where}: the pipeline fails on a picture of {size[0]} x {size[1]}: {_reason(error)}"
                ) from error

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Return a changed copy of a sample.

        Raises:
            UserError: The result has another size, or a perspective meets depth or normals without intrinsics.
        """
        # Not `set_random_seed`: it would give every transform a generator of its own, and the same to all.
        self._compose.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        height, width = sample["image"].shape[:2]
        source = np.arange(1, height * width + 1, dtype=np.float64).reshape(height, width)
        camera = sample.get("intrinsics", np.zeros((3, 3))).astype(np.float64)
        result = self._compose(image=sample["image"], view=_View(source, camera, np.eye(3)))
        image, view = result["image"], result["view"]
        if image.shape != (*self.size, 3):
            raise UserError(
                f"{self.where}: the pipeline makes a picture of {' x '.join(map(str, image.shape))} out of one of "
                f"{height} x {width} x 3, where all have to be {self.size[0]} x {self.size[1]} x 3: end it with a "
                "transform that gives this size, such as RandomCrop or Resize"
            )
        changed = {**sample, "image": image}
        if view.source is source:
            return changed
        index = view.source.astype(np.intp)
        for name in TARGETS.keys() & sample.keys():
            values = sample[name].reshape(height * width, *sample[name].shape[2:])
            nothing = np.full_like(values[:1], TARGETS[name].invalid)
            changed[name] = np.concatenate([nothing, values]).take(index, axis=0)
        if np.isnan(view.turn).any() and changed.keys() & {"depth", "normals"}:
            raise UserError(
                f"{self.where}: Perspective turns the camera, and depth and normals can follow only where the "
                "intrinsics are known: give the data set intrinsics, take Affine in its place, or put Perspective "
                "before what bends the picture"
            )
        if "normals" in sample:
            changed["normals"] = (changed["normals"] @ view.turn.T).astype(np.float32)
        if "depth" in sample and not np.allclose(view.turn[2], (0, 0, 1), rtol=0, atol=1e-9):
            rows, columns = np.divmod(index - 1, width)
            ray = view.turn[2] @ np.linalg.inv(camera)
            nearing = ray[0] * columns + ray[1] * rows + ray[2]
            depth = changed["depth"] * (1 / nearing if self.inverse_depth else nearing)
            changed["depth"] = np.where((index > 0) & (nearing > 0), depth, 0).astype(np.float32)
        if "intrinsics" in sample:
            changed["intrinsics"] = view.camera.astype(np.float32)
        return changed


# Building


def _build(node: Any, where: str) -> A.BasicTransform | A.BaseCompose:
    """Return the transform, or the composition of transforms, that a node of the YAML file says."""
    name, arguments = _read(node, where)
    here = f"{where}: {name}"
    kind = _find(name, where)
    if kind in _COMPOSITIONS:
        known: tuple[str, ...] = ("transforms", *_COMPOSITIONS[kind])
    else:
        known = tuple(inspect.signature(kind.__init__).parameters)[1:]  # without self
    if isinstance(node, Mapping) and _CLASS in node:
        arguments = _without_repetitions(arguments, kind, known)
    for argument in arguments:
        if argument not in known or argument == "strict":
            raise UserError(
                f"{here} has no argument {argument!r}{nearest(str(argument), known)}; it takes {', '.join(known)}"
            )
    p = arguments.get("p", 1)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{here}: p is a probability from 0 to 1, not {p!r}")
    if kind in _COMPOSITIONS:
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not inner:
            raise UserError(f"{here} needs 'transforms', a list of at least one transform, not {inner!r}")
        built = [_build(child, where) for child in inner]
        arguments = {**arguments, "transforms": built}
        if kind is A.OneOf and not any(child.p for child in built):
            raise UserError(f"{here} chooses by the probabilities of its transforms, which are all 0: raise one")
        if isinstance(arguments.get("n"), int) and arguments["n"] > len(inner) and not arguments.get("replace"):
            raise UserError(f"{here}: n is {arguments['n']}, and there are only {len(inner)} transforms to choose from")
    else:
        _check_labels(arguments, here)
    # Otherwise albumentations goes on with default values where a check of its own fails.
    strict = {"strict": True} if "InitSchema" in vars(kind) else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one is an alias, or slow
            transform = kind(**arguments, **strict)
    except Exception as error:  # albumentations raises many kinds
        raise UserError(f"{here}: {_reason(error)}") from error
    if isinstance(transform, (*_PROJECTIVE, *_BENDING, BaseDropout)):
        follow = _project if isinstance(transform, _PROJECTIVE) else _carry
        # The view goes the way of albumentations' other targets; no public method takes a new kind.
        transform._key2func["view"] = functools.partial(follow, transform)
        if getattr(transform, "fill_mask", None) is not None:
            transform.fill_mask = 0.0  # no source, in a view
    return transform


def _read(node: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments from a node in either form."""
    if isinstance(node, str):
        return node, {}
    if isinstance(node, Mapping) and _CLASS in node:
        arguments = {key: value for key, value in node.items() if key != _CLASS}
        package, _, name = str(node[_CLASS]).rpartition(".")
        if package and package.split(".")[0] != "albumentations":
            raise UserError(f"{where}: {node[_CLASS]} is no transform of albumentations, and no other code is run")
        return name, arguments
    if isinstance(node, Mapping) and len(node) == 1:
        ((name, arguments),) = node.items()
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return name, dict(arguments or {})
    raise UserError(
        f"{where}: a transform is written 'Name' or 'Name: {{argument: value, ...}}', which {node!r} is not"
    )


def _find(name: str, where: str) -> Any:
    """Return the class of albumentations with a name, if samples can go through it."""
    kinds = {key: kind for key, kind in vars(A).items() if isinstance(kind, type)}
    usable = [key for key, kind in kinds.items() if kind in _COMPOSITIONS or _usable(kind)]
    if name in usable:
        return kinds[name]
    if kinds.get(name) in _REFUSED:
        raise UserError(f"{where}: {name} {_REFUSED[kinds[name]]}; leave it out")
    if issubclass(kinds.get(name, object), A.DualTransform):
        raise UserError(f"{where}: {name} is for other data than pictures with dense targets; leave it out")
    raise UserError(f"{where}: there is no transform {name!r} in albumentations {A.__version__}{nearest(name, usable)}")


def _usable(kind: type) -> bool:
    """Return whether a class is a transform that samples can go through."""
    abstract = (A.ImageOnlyTransform, BaseDropout, BaseDistortion)
    return (
        issubclass(kind, (*_STILL, *_PROJECTIVE, *_BENDING, BaseDropout))
        and kind not in _REFUSED
        and kind not in abstract
    )


def _without_repetitions(arguments: dict[str, Any], kind: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """Leave out what `albumentations.to_dict` writes but the class does not take.

    Those are arguments of base classes that the class itself derives from its own, and a Compose's unused ones.
    """
    inherited = {
        argument
        for base in kind.__mro__
        if "__init__" in vars(base)
        for argument in inspect.signature(base.__init__).parameters
    }
    if kind in _COMPOSITIONS:
        inherited = {key for key in inherited if not arguments.get(key) or key == "is_check_shapes"}
    return {key: value for key, value in arguments.items() if key in known or key not in inherited}


def _check_labels(arguments: Mapping[str, Any], here: str) -> None:
    """Refuse arguments that would make numbers of labels."""
    if arguments.get("mask_interpolation", cv2.INTER_NEAREST) not in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT):
        raise UserError(
            f"{here}: labels are never interpolated, so mask_interpolation is {cv2.INTER_NEAREST} (nearest) and not "
            f"{arguments['mask_interpolation']}: leave it out"
        )
    if arguments.get("area_for_downscale") == "image_mask":
        raise UserError(f"{here}: labels are never averaged, so area_for_downscale is 'image' and not 'image_mask'")
    if arguments.get("mask_drop_value") is not None:
        raise UserError(f"{here}: labels stay where single pixels are dropped: leave mask_drop_value out")


def _reason(error: Exception) -> str:
    """Return an error of albumentations in one line."""
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            return message
        return f"{first['loc'][0]}: {message}" + ("" if first["type"] == "missing" else f", not {first['input']!r}")
    return " ".join(str(error).split()) or type(error).__name__


# Following


def _carry(transform: A.DualTransform, view: _View, **params: Any) -> _View:
    """Follow what bends the picture or makes holes in it."""
    if isinstance(transform, BaseDropout):
        return replace(view, source=transform.apply_to_mask(view.source, **params))
    if isinstance(transform, BaseDistortion):
        source = _fetch(view.source, params["map_x"], params["map_y"])
    else:
        source = transform.apply_to_mask(view.source, **params)
    return replace(view, source=source, camera=np.zeros((3, 3)))


def _project(transform: A.DualTransform, view: _View, **params: Any) -> _View:
    """Follow a homography."""
    # Of its masks, only the size: albumentations' nearest neighbours are up to half a pixel beside its image.
    height, width = transform.apply_to_mask(np.zeros(view.source.shape, np.uint8), **params).shape
    matrix = _homography(transform, params, (height, width))
    rows, columns = np.indices((height, width), sparse=True)
    x, y, scale = (row[0] * columns + (row[1] * rows + row[2]) for row in np.linalg.inv(matrix))
    source = _fetch(view.source, x / scale, y / scale)
    known = view.camera[2, 2] != 0
    upper, turn = rq(matrix @ (view.camera if known else np.eye(3)))
    # H K = (K' S) (S R) for any signs S: those of a camera are positive.
    signs = np.diag(np.sign(np.diag(upper)))
    camera, turn = upper @ signs / abs(upper[2, 2]), signs @ turn
    if not known:
        affine = np.allclose(matrix[2] / matrix[2, 2], (0, 0, 1), rtol=0, atol=1e-12)
        camera, turn = view.camera, turn if affine else np.full((3, 3), np.nan)
    return _View(source, camera, turn @ view.turn)


def _fetch(source: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the pixels nearest to columns x and rows y, 0 outside.

    Halfway between two pixels (everywhere, when shrinking by two) rounding would always go the same way, and labels
    drift: on a chessboard it goes left and up on black, right and down on white.
    """
    tie = np.full(x.shape, _TIE, np.float32)
    tie[::2, ::2] = tie[1::2, 1::2] = -_TIE
    columns, rows = x.astype(np.float32) + tie, y.astype(np.float32) + tie
    return np.asarray(cv2.remap(source, columns, rows, cv2.INTER_NEAREST))


def _homography(transform: A.DualTransform, params: dict[str, Any], target: tuple[int, int]) -> np.ndarray:
    """Return what takes a pixel (x, y, 1) of the picture to one of the result, (3, 3) float64.

    Args:
        transform: One of `_PROJECTIVE`.
        params: Its draw.
        target: Height and width of the result.
    """
    height, width = params["shape"][:2]
    match transform:
        case A.HorizontalFlip():
            return _symmetry("h", height, width)
        case A.VerticalFlip():
            return _symmetry("v", height, width)
        case A.Transpose():
            return _symmetry("t", height, width)
        case A.RandomRotate90():
            return _symmetry(("e", "r90", "r180", "r270")[params["factor"]], height, width)
        case A.D4():
            return _symmetry(params["group_element"], height, width)
        case A.Affine():
            return np.asarray(params["matrix"], np.float64)
        case A.Rotate():
            box = [params[side] for side in ("x_min", "y_min", "x_max", "y_max")]
            crop = _window(box, target) if transform.crop_border else np.eye(3)
            return np.asarray(crop @ params["matrix"])
        case A.Perspective():
            scale = (width / params["max_width"], height / params["max_height"]) if transform.keep_size else (1, 1)
            return np.asarray(np.diag([*scale, 1]) @ params["matrix"])
        case A.Pad():
            box = [-params["pad_left"], -params["pad_top"], width + params["pad_right"], height + params["pad_bottom"]]
        case A.CropAndPad():
            left, top, right, bottom = params["crop_params"] or (0, 0, width, height)
            above, below, before, after = params["pad_params"] or (0, 0, 0, 0)
            box = [left - before, top - above, right + after, bottom + below]
        case _:
            left, top, right, bottom = params.get("crop_coords", (0, 0, width, height))
            pads = params.get("pad_params") or {"pad_left": 0, "pad_top": 0}
            before, above = pads["pad_left"], pads["pad_top"]
            box = [left - before, top - above, right - before, bottom - above]
    return _window(box, target)


def _window(box: Sequence[int], target: tuple[int, int]) -> np.ndarray:
    """Return the homography that enlarges a window to a target.

    Args:
        box: The window's left, top, right and bottom edge; pixel x reaches from edge x to edge x + 1, and its centre
            has the coordinate x.
        target: Height and width of the result.
    """
    left, top, right, bottom = box
    scale_x, scale_y = target[1] / (right - left), target[0] / (bottom - top)
    return np.array(
        [
            [scale_x, 0, (0.5 - left) * scale_x - 0.5],
            [0, scale_y, (0.5 - top) * scale_y - 0.5],
            [0, 0, 1],
        ]
    )


def _symmetry(name: str, height: int, width: int) -> np.ndarray:
    """Return the homography of a symmetry of the square."""
    linear = np.array(_SYMMETRIES[name])
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.maximum(0, -linear @ (width - 1, height - 1))
    return matrix
