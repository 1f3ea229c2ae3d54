"""One typed configuration for everything: what to learn, from which weights, on which data, and how.

Nothing here imports torch, so that the command line can answer ``--help`` at once. The fields of `Experiment`
are the flags of the command line and the keys of the YAML files; what their values mean for one another is
checked here where that needs no model and no data, and where they are used otherwise.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from mtl import registry
from mtl.errors import UserError, nearest

SHIPPED_BACKBONE = "mobilenetv4_conv_small"
"""The timm name of the backbone whose weights come with the package."""

DECODERS = ("unet", "fpn", "upernet", "segformer", "deeplabv3plus", "dpt")
"""The decoders of segmentation-models-pytorch that a head can be built from."""

SIGNAL_BACKBONES = ("mnist1d_linear", "mnist1d_mlp", "mnist1d_mlp_2x200", "mnist1d_cnn", "mnist1d_gru")
"""The backbones for signals; all others are timm's, for pictures."""

TARGETS = ("segmentation", "depth", "normals")
"""The dense targets that a data set can have."""

CLASS_COUNTS = {"nyuv2": (13, 40), "cityscapes": (19, 7)}
"""The numbers of classes that a data set's labels come in, the default first."""

YAML_ONLY = ("needs_plugins", "more_data", "loader")
"""Fields without a flag."""


def _known(value: str, kind: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is not a {kind}{nearest(value, allowed)}; there are {', '.join(allowed)}")
    return value


def number_or_word(text: str) -> int | float | str:
    """Return a number where a text is one, else the text itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class Options(BaseModel):
    """A group of fields: no unknown keys, and each field's docstring is its help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, and so to pydantic, True is 1; to a person who writes 'yes' for a number it is a mistake.
        kind = cls.model_fields[str(info.field_name)].annotation
        if not {int, float} & {kind, *get_args(kind)}:
            return value
        named = value if isinstance(value, dict) else {"": value}
        for name, given in named.items():
            if any(isinstance(part, bool) for part in (given if isinstance(given, list | tuple) else [given])):
                raise ValueError(f"{name}={given} must be a number" if name else f"{given} is not a number")
        return value


class SegmentationOptions(Options):
    """How the segmentation head learns and is measured."""

    loss: Literal["cross_entropy", "dice", "both"] = "cross_entropy"
    """The loss: cross-entropy, soft Dice over the classes present, or their sum."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label's probability spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """'balanced' weights classes by median frequency, so that rare ones count (Eigen and Fergus, 2015)."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.loss == "dice" and (self.label_smoothing > 0 or self.class_weights != "none"):
            raise ValueError(
                "label_smoothing and class_weights act on the cross-entropy, which the loss 'dice' does not have; "
                "choose the loss 'cross_entropy' or 'both', or leave them out"
            )
        return self


class DepthOptions(Options):
    """How the depth head learns and is measured."""

    loss: Literal["l1", "silog", "berhu"] = "l1"
    """The loss: absolute error in metres, scale-invariant log error, or reverse Huber."""
    gradient_weight: float = Field(0.0, ge=0)
    """Weight of a term that matches the spatial gradients of prediction and target at four scales."""
    min_depth: float = Field(1e-3, gt=0)
    """Evaluation ignores nearer targets and clamps predictions to this, in metres."""
    max_depth: float | None = Field(None, gt=0)
    """Evaluation ignores farther targets and clamps predictions to this, in metres (none: no cap)."""
    crop: Literal["none", "eigen"] = "none"
    """'eigen' evaluates inside the NYU crop of Eigen et al. (2014), scaled to the image."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_depth is not None and self.max_depth <= self.min_depth:
            raise ValueError(f"max_depth {self.max_depth} must be greater than min_depth {self.min_depth}")
        return self


class ClassificationOptions(Options):
    """How whole samples are classified."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label's probability spread over all classes."""


class MaskOptions(Options):
    """What the task `masked` hides of a picture, and what it predicts there."""

    method: Literal["auto", "tokens", "convolution", "input"] = "auto"
    """How: visible tokens alone (plain vision transformers), masked convolutions (convnets), or a learned token in
    the picture (any); auto is the first of these that the backbone allows."""
    ratio: float | None = Field(None, gt=0, lt=1)
    """Share of the patches to hide (none: 0.75 for tokens, else 0.6)."""
    patch: int | None = Field(None, ge=1)
    """Side of a patch in pixels, a multiple of the backbone's stride (none: that stride)."""
    blocks: bool = False
    """Hide rectangles of patches in place of patches independent of one another."""
    target: Literal["normalized", "raw"] = "normalized"
    """What is predicted: pixels less their patch's mean, over its deviation, or pixels as they are."""
    distance: Literal["l2", "l1"] = "l2"
    """The loss: squared or absolute difference."""
    decoder_width: int = Field(256, ge=32, multiple_of=32)
    """Channels of the decoder, which is thrown away afterwards."""
    decoder_depth: int | None = Field(None, ge=1)
    """Blocks of the transformer that decodes tokens (none: 4); the other methods' decoder has none."""
    probe_every: int | None = Field(None, ge=0)
    """Epochs between trials of the features: linear heads, trained for seconds on what labels there are (none: ten
    trials in all; 0: never)."""


class RegularizeOptions(Options):
    """What is added to the loss, or to the way it is followed, to narrow the gap between training and test error."""

    l2: float = Field(0.0, ge=0)
    """Add this times the sum of squared weights to the loss; norms and biases do not count. Sgd's own --weight-decay
    of twice this is the same, adamw's is not."""
    l1: float = Field(0.0, ge=0)
    """Add this times the sum of absolute weights; beside l2 it is the elastic net."""
    l2_sp: float = Field(0.0, ge=0)
    """Add this times the squared distance from the pretrained weights (L2-SP); l2 and l1 then count for the heads
    alone."""
    gradient_norm: float = Field(0.0, ge=0)
    """Gradient descent's own regularizer: add this over 4, times the squared norm of the loss's gradient. With
    --accumulate that of each batch, which is on average this and batch-variance of the whole."""
    batch_variance: float = Field(0.0, ge=0)
    """SGD's own regularizer: add this over 4, times the variance of the gradient over the batches that --accumulate, 2
    or more, makes a step of."""
    sam: float = Field(0.0, ge=0)
    """Follow the gradient at the worst point within this distance of the weights (SAM), such as 0.05."""
    weight_noise: float = Field(0.0, ge=0)
    """Standard deviation of noise on the weights, fresh at each step and gone after it."""
    depth_jitter: float = Field(0.0, ge=0, le=1)
    """Standard deviation of noise on the logarithm of depth labels."""
    measure: int | None = Field(None, ge=1)
    """Steps between measurements of the gradient's squared norm and, with --accumulate, its variance over batches
    (none: never)."""


class SourceOptions(Options):
    """Which data set, and what of it."""

    name: str = "scenes"
    """The data set: scenes (rooms rendered on the fly), folder (your own), nyuv2, cityscapes, mnist1d (signals), or a
    plugin's."""
    root: Path | None = None
    """Where the data set's files are (none: mnist1d is generated); data/README.md shows each layout."""
    description: Path | None = None
    """YAML with a folder's classes, depth scale and split (none: ROOT/dataset.yaml)."""
    targets: list[str] | None = None
    """Use only these labels of the data set: segmentation, depth, normals (none: all it has)."""
    ratio: float | None = Field(None, gt=0)
    """How often samples are drawn from this data set, relative to the ratios of the others (none: its size)."""
    classes: int | None = None
    """How many classes: 13 or 40 of nyuv2, 19 or 7 of cityscapes (none: the first of these)."""
    raw_depth: bool = False
    """Use nyuv2's depth as measured, with holes, in place of the in-painted one."""
    domain: Literal["studio", "loft"] = "loft"
    """Which of the two looks the rendered rooms have."""
    train_samples: int = Field(800, ge=1)
    """How many rendered rooms to train on."""
    val_samples: int = Field(200, ge=1)
    """How many other rendered rooms to validate on."""
    scene_seed: int = Field(0, ge=0)
    """Which rooms are rendered; --seed leaves them as they are."""

    @field_validator("name")
    @classmethod
    def _known_name(cls, value: str) -> str:
        return _known(value, "data set", registry.data_sets.names)

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            raise ValueError("name at least one target, or leave it out to use all")
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a target is named twice")
        return None if value is None else [_known(target, "target", TARGETS) for target in value]

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if self.name in ("folder", "nyuv2", "cityscapes") and self.root is None:
            raise ValueError(f"data set {self.name!r} needs --data.root, the folder that holds its files")
        if self.name == "scenes" and self.root is not None:
            raise ValueError("--data.root belongs to data sets of files; add --data.name folder, nyuv2 or cityscapes")
        if self.name != "folder" and self.description is not None:
            raise ValueError("--data.description belongs to --data.name folder")
        if self.name != "scenes":
            for field in ("domain", "train_samples", "val_samples", "scene_seed"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    flag = field.replace("_", "-")
                    raise ValueError(f"--data.{flag} belongs to --data.name scenes, not {self.name}; leave it out")
        allowed = CLASS_COUNTS.get(self.name, ())
        if self.classes is not None and self.classes not in allowed:
            choice = f"has {' or '.join(map(str, allowed))} classes" if allowed else "has classes of its own"
            raise ValueError(f"--data.classes {self.classes}: data set {self.name!r} {choice}")
        if self.raw_depth and self.name != "nyuv2":
            raise ValueError(f"--data.raw-depth belongs to --data.name nyuv2, not {self.name}")
        return self


class DataOptions(SourceOptions):
    """Which pictures and labels."""

    size: tuple[int, int] = (128, 128)
    """Height and width in pixels that every sample is fitted to."""
    labels: dict[str, int] = {}
    """Use this many labelled training images of a task, drawn by --seed (depth=50)."""
    labelled_share: float | None = Field(None, gt=0, lt=1)
    """With masked beside other tasks: share of training samples that have a label of these (none: as it comes)."""
    cache: Literal["auto", "device", "memory", "disk", "none"] = "auto"
    """Where decoded samples are kept: auto is the device or memory where they fit, else none (decode each time)."""
    cache_gb: float = Field(4.0, ge=0)
    """The most gigabytes that auto keeps in memory."""
    cache_dir: Path | None = None
    """Where rendered rooms and decoded samples are kept between runs (none: the user's cache folder)."""
    workers: int | None = Field(None, ge=0)
    """Loader processes (none: 0 where samples are in memory, else one per core)."""

    @field_validator("labels")
    @classmethod
    def _positive_labels(cls, value: dict[str, int]) -> dict[str, int]:
        for task, count in value.items():
            if count < 1:
                raise ValueError(f"{task}={count} must be at least 1")
        return value

    @field_validator("size")
    @classmethod
    def _positive_size(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 16:
            raise ValueError("height and width must be at least 16 pixels")
        return value


class AugmentationOptions(Options):
    """How strong each random change is at most; what is not given is as --augment has it, and 0 leaves it out.

    Signals have shift, scale and noise; pictures all but shift.
    """

    magnitude: float | None = Field(None, ge=0)
    """One knob for all: factor on every strength and probability (none: 1)."""
    hflip: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that are mirrored left and right."""
    vflip: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that are mirrored top and bottom."""
    rotate: float | None = Field(None, ge=0, le=180)
    """Turn by up to so many degrees either way."""
    crop: float | None = Field(None, ge=0, le=9)
    """Enlarge by a factor of up to 1 + this, and keep any part: a random crop."""
    scale: float | None = Field(None, ge=0, le=9)
    """Enlarge or shrink by a factor of up to 1 + this, to any place; a signal's values: by one between 1 - this and
    1 + this."""
    shift: float | None = Field(None, ge=0, le=1)
    """Share of the signals that are shifted circularly, by any number of places."""
    stretch: float | None = Field(None, ge=0, le=9)
    """Stretch or squeeze vertically by a factor of up to 1 + this."""
    translate: float | None = Field(None, ge=0, le=1)
    """Move by up to this share of width and height."""
    shear: float | None = Field(None, ge=0, le=60)
    """Slant by up to so many degrees in both directions."""
    perspective: float | None = Field(None, ge=0, le=0.9)
    """Move each corner by up to this share of half the width and height."""
    pincushion: float | None = Field(None, ge=0, le=0.9)
    """Lens distortion, pincushion and barrel, with a coefficient of up to this either way."""
    brightness: float | None = Field(None, ge=0, le=1)
    """Change brightness by a factor between 1 - this and 1 + this."""
    contrast: float | None = Field(None, ge=0, le=1)
    """Change contrast by a factor between 1 - this and 1 + this."""
    saturation: float | None = Field(None, ge=0, le=1)
    """Change saturation by a factor between 1 - this and 1 + this."""
    hue: float | None = Field(None, ge=0, le=0.5)
    """Turn the hue by up to this share of the colour circle either way."""
    balance: float | None = Field(None, ge=0, le=1)
    """Colour balance: a factor between 1 - this and 1 + this for each of red, green and blue."""
    grayscale: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that lose their colour."""
    gamma: float | None = Field(None, ge=0, le=9)
    """Raise values to a power of between 1 / (1 + this) and 1 + this."""
    solarize: float | None = Field(None, ge=0, le=1)
    """Share of the pictures whose bright values turn into their negative."""
    posterize: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that keep 3 to 5 bits of each colour."""
    blur: float | None = Field(None, ge=0, le=20)
    """Gaussian blur with a standard deviation of up to so many pixels."""
    motion_blur: float | None = Field(None, ge=0, le=60)
    """Blur along a line of up to so many pixels."""
    vignette: float | None = Field(None, ge=0, le=1)
    """Darken the corners by up to this share."""
    noise: float | None = Field(None, ge=0, le=1)
    """Gaussian noise with a standard deviation of up to this, where white is 1; on a signal of just this."""
    shot: float | None = Field(None, ge=0, le=1)
    """Shot noise: the variance that white has, up to this."""
    jpeg: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that get the blocks of a JPEG file of low quality."""
    erase: float | None = Field(None, ge=0, le=1)
    """Share of the pictures in which boxes are hidden (cutout, random erasing)."""
    cutmix: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that get a box of another one, targets included."""
    mixup: float | None = Field(None, ge=0, le=1)
    """Share of the pictures over which another one lies faintly."""
    mosaic: float | None = Field(None, ge=0, le=1)
    """Share of the pictures that are put together from four."""
    fill: Literal["reflection", "zeros", "mean"] | None = None
    """What surrounds a picture that was moved: its reflection, black, or its mean colour (none: reflection)."""
    depth_convention: Literal["metric", "canonical"] | None = None
    """Under zoom: metric leaves depth and changes the camera, canonical divides depth by it (none: metric)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How images are resampled (none: bilinear)."""
    loader: list[Any] | dict[str, Any] | None = None
    """A pipeline of albumentations that changes single samples in the loader; in YAML alone."""


PROBABILITIES = (
    "hflip", "vflip", "shift", "grayscale", "solarize", "posterize", "jpeg", "erase", "cutmix", "mixup", "mosaic"
)  # fmt: skip
"""The strengths of `AugmentationOptions` that are shares of the samples."""

STRENGTHS = tuple(
    name
    for name in AugmentationOptions.model_fields
    if name not in ("magnitude", "shift", "fill", "depth_convention", "interpolation", "loader")
)
"""The changes of pictures that `AugmentationOptions` gives a strength."""

SIGNAL_STRENGTHS = ("shift", "scale", "noise")
"""The changes of signals."""

POLICIES: dict[str, dict[str, float]] = {
    "none": {},
    "light": {
        "hflip": 0.5, "crop": 0.3, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.03, "gamma": 0.1,
    },
    "heavy": {
        "hflip": 0.5, "vflip": 0.05, "rotate": 10, "crop": 0.5, "scale": 0.25, "stretch": 0.2, "shear": 5,
        "perspective": 0.15, "pincushion": 0.15, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
        "balance": 0.2, "grayscale": 0.1, "gamma": 0.3, "blur": 1.5, "vignette": 0.5, "noise": 0.05, "erase": 0.2,
    },
    "lecture": {
        "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "translate": 0.1, "shear": 10, "perspective": 0.5,
    },
}  # fmt: skip
"""The strengths of each value of --augment."""

SIGNAL_POLICIES: dict[str, dict[str, float]] = {"none": {}, "lecture": {"shift": 1.0, "scale": 0.2}}
"""The same for signals."""


class TaskGroup(Options):
    """What to learn."""

    needs_plugins: list[str] = []
    """Names of the files of users' code that this was made with; the code itself comes from --plugin alone."""
    task: list[str] = ["segmentation", "depth"]
    """One task or several, learned together on one backbone: segmentation, depth, normals, masked (pretraining on
    pictures alone), classification (of signals), or a plugin's."""
    weighting: str = "fixed"
    """How the tasks' losses are combined: fixed (a sum with --loss-weights), another rule, or a plugin's."""
    loss_weights: dict[str, float] = {}
    """Weights of the tasks' losses in their sum (segmentation=1 depth=0.5); 1 where not named."""
    weighting_options: dict[str, int | float | str] = {}
    """Options of the rule (alpha=2); README.md lists each rule's."""
    weighting_every: int = Field(1, ge=1)
    """Optimizer steps between two questions to a rule that compares gradients; in between, weights stay."""
    weighting_on: Literal["features", "parameters"] = "features"
    """Where gradients are compared: the shared features, or the backbone's parameters, a backward pass a task."""
    head_weighting: Literal["scaled", "own"] = "scaled"
    """Whether a head's own gradient is scaled by its task's weight, or left as it is."""

    @field_validator("needs_plugins")
    @classmethod
    def _plugins_given(cls, value: list[str]) -> list[str]:
        for name in value:
            if Path(name).name not in registry.plugins:
                raise ValueError(f"this was made with code in {name}, which a person must name: add --plugin {name}")
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("task")
    @classmethod
    def _known_tasks(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(registry.tasks.names)}")
        for task in value:
            _known(task, "task", registry.tasks.names)
        if len(set(value)) < len(value):
            raise ValueError("a task is named twice")
        return value

    @field_validator("weighting_options", mode="before")
    @classmethod
    def _numbers_or_words(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        options = {name: number_or_word(given) if isinstance(given, str) else given for name, given in value.items()}
        for name, given in options.items():
            infinite = isinstance(given, float) and not math.isfinite(given)
            if infinite or isinstance(given, bool) or not isinstance(given, int | float | str):
                raise ValueError(f"{name}={given} must be a finite number or a word")
        return options

    @field_validator("weighting")
    @classmethod
    def _known_weighting(cls, value: str) -> str:
        return _known(value, "weighting rule", registry.weightings.names)

    @field_validator("loss_weights")
    @classmethod
    def _positive_weights(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        tasks = info.data.get("task", registry.tasks.names)
        for task, weight in value.items():
            if task not in tasks:
                raise ValueError(f"{task!r} is not one of this run's tasks ({', '.join(tasks)}){nearest(task, tasks)}")
            if not 0 < weight < float("inf"):
                raise ValueError(f"{task}={weight} must be positive and finite")
        if value and info.data.get("weighting", "fixed") != "fixed":
            raise ValueError("fixed weights belong to --weighting fixed; leave one of the two out")
        return value


class TransferGroup(Options):
    """Where the backbone's weights come from, and whether they may change."""

    init: str = "shipped"
    """shipped, imagenet (timm's weights, downloaded), none (random), or a path: a run, a checkpoint, weights."""
    freeze: bool = False
    """Leave the backbone exactly as it is and train the heads alone."""
    freeze_stages: int | None = Field(None, ge=1)
    """Leave the stem and this many stages (blocks of a plain vision transformer) exactly as they are."""
    unfreeze_at: int | None = Field(None, ge=1)
    """Train the frozen way for this many epochs, then everything: linear probing, then fine-tuning."""
    backbone_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the backbone (none: --lr)."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the one before it, such as 0.75."""
    lora: int | None = Field(None, ge=1)
    """Rank of low-rank adapters that learn in place of a transformer backbone's own weights."""

    @model_validator(mode="after")
    def _transfer_fits(self) -> Self:
        if self.freeze and self.freeze_stages is not None:
            raise ValueError("--freeze leaves the whole backbone as it is, --freeze-stages a part; choose one")
        if self.unfreeze_at is not None and not self.freeze and self.freeze_stages is None:
            raise ValueError("--unfreeze-at ends a freeze; add --freeze or --freeze-stages")
        for flag, given in (("--backbone-lr", self.backbone_lr), ("--layer-decay", self.layer_decay)):
            if given is not None and self.freeze and self.unfreeze_at is None:
                raise ValueError(f"{flag} is for a backbone that learns, which --freeze forbids; leave one of them out")
        others = {
            "--freeze": self.freeze,
            "--freeze-stages": self.freeze_stages is not None,
            "--layer-decay": self.layer_decay is not None,
        }
        if self.lora is not None and any(others.values()):
            clash = next(flag for flag, given in others.items() if given)
            raise ValueError(f"--lora decides by itself what learns in the backbone; leave {clash} out")
        return self


class ModelGroup(Options):
    """The network."""

    backbone: str = SHIPPED_BACKBONE
    """Any timm model that has feature maps; for signals mnist1d_linear, _mlp, _mlp_2x200, _cnn or _gru."""
    decoder: str = "auto"
    """Each head's decoder: auto (unet, or dpt for plain vision transformers), or one by name."""
    decoder_channels: int = Field(128, ge=16, multiple_of=16)
    """Width of the decoders; segmentation-models-pytorch's own, for large backbones, is 256."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout in the heads, the decoders' hidden ones included (none: the decoders' own); for signals in the backbone's
    hidden layers (none: 0)."""
    grad_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, about a third more time."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Share of the samples for which the last residual block of the backbone is skipped in training, earlier ones for
    fewer (none: timm's own)."""
    channels_last: bool = True
    """Memory layout in which convolutions are fastest."""

    @field_validator("decoder")
    @classmethod
    def _known_decoder(cls, value: str) -> str:
        return _known(value, "decoder", ("auto", *DECODERS))


class TrainingGroup(Options):
    """How it learns."""

    augment: str = "none"
    """Random changes of training samples: none, light, heavy, lecture, or a YAML file of --augmentation.* fields; light
    and heavy are for pictures."""

    epochs: int = Field(6, ge=1)
    """Passes over the training samples."""
    epoch_samples: int | None = Field(None, ge=1)
    """Samples in an epoch (none: as many as there are)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, however many epochs that takes (none: --epochs decides)."""
    batch_size: int = Field(16, ge=1)
    """Samples in a batch, on each device."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one optimizer step."""
    optimizer: Literal["adamw", "adam", "nadam", "radam", "sgd", "rmsprop"] = "adamw"
    """torch's optimizer of that name."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Momentum of sgd (0.9 where not given) and rmsprop (0)."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay, which adamw applies beside its step; norms and biases have none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: int | None = Field(None, ge=0)
    """Steps of linear warm-up (none: a twentieth of all)."""
    clip: float | None = Field(None, gt=0)
    """Clip the norm of the whole gradient to this."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Evaluate and keep an exponential moving average of the weights with this decay, such as 0.999."""
    swa: float | None = Field(None, gt=0, lt=1)
    """Evaluate and keep the plain average of the weights from this share of the training on (SWA), such as 0.75."""
    snapshots: int | None = Field(None, ge=2)
    """Let the rate fall this often, each time from its peak, and keep the weights at each end: a snapshot ensemble."""
    bootstrap: bool = False
    """Train on as many samples drawn with replacement, by --seed; the others measure the out-of-bag error (bagging)."""
    monitor: str = "gain"
    """Metric that chooses the best checkpoint; 'gain' is the mean share of a constant prediction's error removed."""
    patience: int | None = Field(None, ge=1)
    """Stop once --monitor has not improved for this many validations."""
    validate_every: int | None = Field(None, ge=1)
    """Optimizer steps between validations (none: after each epoch)."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    """Lightning's precision."""
    compile: bool = False
    """Compile the model with torch.compile."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    devices: int = Field(1, ge=1)
    """How many of them (several: distributed data parallel)."""
    seed: int = Field(0, ge=0)
    """Decides initial weights, the order of samples, the draws of augmentation, and which labels are used."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.momentum is not None and self.optimizer not in ("sgd", "rmsprop"):
            raise ValueError(f"--momentum belongs to --optimizer sgd or rmsprop, not {self.optimizer}")
        if self.swa is not None and self.ema is not None:
            raise ValueError("--swa and --ema are two averages of the same weights; choose one")
        if self.snapshots is not None and self.schedule != "cosine":
            raise ValueError(f"--snapshots restarts --schedule cosine, not {self.schedule}; leave one of the two out")
        if self.precision == "16-mixed" and self.device == "cpu":
            raise ValueError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
        return self


class RunGroup(Options):
    """Where the results go."""

    name: str | None = None
    """Name of the run and of its folder (none: made from the task, and numbered)."""
    output_dir: Path = Path("runs")
    """Folder that holds the runs' folders."""
    logger: Literal["wandb", "csv"] = "wandb"
    """wandb (online with a key, offline without) and CSV, or CSV alone."""
    project: str = "mtl"
    """Project on W&B."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints to resume from (none: after each epoch)."""

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in (".", "..") or "/" in value or "\\" in value):
            raise ValueError(f"{value!r} must be the name of a folder, without slashes")
        return value


class Experiment(TaskGroup, TransferGroup, ModelGroup, TrainingGroup, RunGroup):
    """Everything that one run depends on."""

    data: DataOptions = DataOptions()
    augmentation: AugmentationOptions = AugmentationOptions()
    more_data: list[SourceOptions] = []
    """Data sets to learn from beside `data`, fitted to the same size; in YAML alone."""
    segmentation: SegmentationOptions = SegmentationOptions()
    depth: DepthOptions = DepthOptions()
    classification: ClassificationOptions = ClassificationOptions()
    mask: MaskOptions = MaskOptions()
    regularize: RegularizeOptions = RegularizeOptions()

    @model_validator(mode="after")
    def _read_policy(self) -> Self:
        if self.augment in POLICIES:
            return self
        path = Path(self.augment)
        if path.suffix.lower() not in (".yaml", ".yml"):
            _known(self.augment, "policy of --augment", (*POLICIES, "FILE.yaml"))
        try:
            values = read_yaml(path)
            base = values.pop("augment", "none")
            if base not in POLICIES:
                raise UserError(f"{path}: augment is {base!r}, and must be one of {', '.join(POLICIES)}")
            policy = AugmentationOptions.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"--augment {path}: {describe(error, AugmentationOptions)}") from None
        except UserError as error:
            raise ValueError(f"--augment {error}") from None
        # The file's content becomes part of the experiment, which can then be repeated without the file.
        given = {name: value for name, value in self.augmentation if value is not None}
        self.augment, self.augmentation = base, policy.model_copy(update=given)
        return self

    @model_validator(mode="after")
    def _pictures_or_signals(self) -> Self:
        if not self.signals:
            if self.backbone in SIGNAL_BACKBONES:
                raise ValueError(
                    f"--backbone {self.backbone} is for signals; add --data.name mnist1d, or choose one of timm's"
                )
            if self.augmentation.shift:
                raise ValueError("--augmentation.shift is for signals; pictures have --augmentation.translate")
            return self
        name = self.data.name
        if self.backbone not in SIGNAL_BACKBONES:
            raise ValueError(
                f"--backbone {self.backbone} is for pictures, and the data set {name!r} has signals"
                f"{nearest(self.backbone, SIGNAL_BACKBONES)}; choose one of {', '.join(SIGNAL_BACKBONES)}"
            )
        if self.init in ("shipped", "imagenet"):
            raise ValueError(
                f"--init {self.init} has weights for pictures, and the data set {name!r} has signals; use --init none "
                "to start at random, or --init RUN"
            )
        if self.augment not in SIGNAL_POLICIES:
            raise ValueError(
                f"--augment {self.augment} is for pictures, and the data set {name!r} has signals; use one of "
                f"{', '.join(SIGNAL_POLICIES)}, or --augmentation.shift, .scale and .noise"
            )
        if flag := next(_given_for_pictures(self), None):
            raise ValueError(f"{flag} is for pictures, and the data set {name!r} has signals; leave it out")
        if self.dropout and self.backbone_stays:
            raise ValueError(
                f"--dropout {self.dropout:g} is in the layers of {self.backbone}, which --freeze leaves as they are; "
                "leave one of the two out"
            )
        return self

    @property
    def signals(self) -> bool:
        """Whether samples are signals, and not pictures."""
        return self.data.name == "mnist1d"

    @model_validator(mode="after")
    def _all_or_no_ratios(self) -> Self:
        ratios = [source.ratio for source in self.sources]
        if len(ratios) == 1 and ratios[0] is not None:
            raise ValueError("--data.ratio is for several data sets, and more_data names no other; leave it out")
        if None in ratios and any(ratios):
            raise ValueError("--data.ratio is relative to those of the other data sets; give it to all of them or none")
        return self

    @model_validator(mode="after")
    def _thaws_in_time(self) -> Self:
        if self.unfreeze_at is not None and self.max_steps is None and self.unfreeze_at >= self.epochs:
            raise ValueError(f"--unfreeze-at {self.unfreeze_at} is not before the end, --epochs {self.epochs}")
        return self

    @model_validator(mode="after")
    def _regularizes(self) -> Self:
        options = self.regularize
        if options.batch_variance and self.accumulate < 2:
            raise ValueError(
                "--regularize.batch-variance compares the batches of a step, of which there is one; "
                "add --accumulate 2 or more"
            )
        if options.l2_sp and (self.init == "none" or self.backbone_stays or self.lora is not None):
            clash = "--init none" if self.init == "none" else "--freeze" if self.backbone_stays else "--lora"
            raise ValueError(
                "--regularize.l2-sp draws pretrained weights that learn to where they started, and "
                f"{clash} leaves none; leave one of the two out"
            )
        for name in ("gradient_norm", "batch_variance", "sam"):
            if getattr(options, name) and self.precision == "bf16-true":
                raise ValueError(
                    f"--regularize.{name.replace('_', '-')} moves weights by less than --precision bf16-true can tell; "
                    "use bf16-mixed"
                )
        if self.drop_path is not None and self.backbone_stays:
            raise ValueError(
                f"--drop-path {self.drop_path:g} is for a backbone that learns, which --freeze forbids; leave one of "
                "them out"
            )
        return self

    @property
    def backbone_stays(self) -> bool:
        """Whether the backbone is the same after training as before."""
        return self.freeze and self.unfreeze_at is None

    @property
    def sources(self) -> list[SourceOptions]:
        """The data sets, the main one first."""
        return [self.data, *self.more_data]

    @model_validator(mode="after")
    def _masked_teaches_backbone(self) -> Self:
        supervised = [task for task in self.task if task != "masked"]
        if "masked" in self.task and self.freeze:
            raise ValueError("--task masked teaches the backbone, which --freeze forbids; leave one of the two out")
        if self.dropout and not supervised:
            raise ValueError(
                f"--dropout {self.dropout:g} is in the heads of tasks with labels, which --task masked alone has not; "
                "leave it out, or use --drop-path"
            )
        if self.data.labelled_share is not None and (not supervised or "masked" not in self.task):
            raise ValueError(
                "--data.labelled-share is for --task masked beside tasks with labels, which mixes samples with and "
                "without; leave it out"
            )
        if self.data.labelled_share is not None and self.more_data:
            raise ValueError(
                "--data.labelled-share is for a single data set; use the ratios of more_data, or leave it out"
            )
        if "masked" in self.data.labels:
            raise ValueError("--data.labels: the task 'masked' learns from pictures alone; leave it out")
        return self

    @model_validator(mode="after")
    def _labels_of_tasks(self) -> Self:
        for task in self.data.labels:
            if task not in self.task:
                raise ValueError(
                    f"--data.labels: {task!r} is not one of this run's tasks ({', '.join(self.task)})"
                    f"{nearest(task, self.task)}"
                )
        return self


def _given_for_pictures(experiment: Experiment) -> Iterator[str]:
    """Yield, as they are written, the options that an experiment gives another value and that signals do not have."""
    if "masked" in experiment.task:
        yield "--task masked"
    if experiment.more_data:
        yield "more_data"
    for place, options, names in (
        ("", experiment, ("freeze_stages", "layer_decay", "lora", "decoder", "decoder_channels")),
        ("", experiment, ("grad_checkpointing", "drop_path", "channels_last")),
        ("data.", experiment.data, ("size", "targets")),
        ("augmentation.", experiment.augmentation, (*STRENGTHS, "fill", "depth_convention", "interpolation", "loader")),
    ):
        for name in names:
            value = getattr(options, name)
            if value != type(options).model_fields[name].default and name not in SIGNAL_STRENGTHS:
                yield f"{place}{name}" if name in YAML_ONLY else f"--{place}{name}".replace("_", "-")


def resolve_augmentation(experiment: Experiment) -> AugmentationOptions:
    """Return the options with the strengths of --augment where none is given."""
    policy = (SIGNAL_POLICIES if experiment.signals else POLICIES)[experiment.augment]
    given = {name: value for name, value in experiment.augmentation if value is not None}
    return AugmentationOptions(**{**policy, **given})


GROUPS: tuple[type[Options], ...] = (TaskGroup, TransferGroup, ModelGroup, TrainingGroup, RunGroup)
"""The groups of top-level fields, in the order in which a person reads them."""


def validate(values: dict[str, Any], where: str = "") -> Experiment:
    """Make an `Experiment` of plain values.

    Args:
        values: Nested dictionaries, as YAML or the command line gives them.
        where: What to put before an error, such as the file's name and a colon.

    Raises:
        UserError: A field is unknown, or a value is not allowed.
    """
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise UserError(where + describe(error, Experiment)) from None


def load(path: Path) -> Experiment:
    """Read an experiment from a YAML file.

    Raises:
        UserError: The file is missing, is not YAML, or does not describe an experiment.
    """
    return validate(read_yaml(path), f"{path}: ")


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """Return the experiment with some fields changed, those of `data` one by one.

    Raises:
        UserError: A change is not allowed.
    """
    values = experiment.model_dump(mode="json") | dict(changes)
    values["data"] = experiment.data.model_dump(mode="json") | dict(changes.get("data", {}))
    return validate(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: The file is missing or is not such a file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a text file"
        raise UserError(f"{path} is not YAML: {problem}{line}") from None
    if values is None:  # an empty file: nothing but defaults
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'field: value' lines, not {type(values).__name__}")
    return values


def dump(experiment: Experiment) -> str:
    """Return the experiment as YAML, every field included, that `load` reads back to an equal one."""
    values = experiment.model_dump(mode="json")
    grouped = [field for group in GROUPS for field in group.model_fields]
    ordered = {field: values.pop(field) for field in grouped} | values
    return yaml.safe_dump(ordered, sort_keys=False, default_flow_style=None)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one sentence what pydantic found, naming field, value, what is allowed and the nearest match."""
    items = error.errors(include_url=False)
    # Without its code, everything a plugin defines is unknown as well; what to do about it is said once.
    items = [item for item in items if item["loc"][:1] == ("needs_plugins",)] or items
    return "; ".join(_sentence(item, model) for item in items)


def _sentence(item: ErrorDetails, model: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"] if part != "[key]"]
    field = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"unknown field {field!r}{nearest(path[-1], _owner(model, path).model_fields)}"
    if item["type"] == "missing":
        return f"field {field!r} is required"
    flag = field if path[:1] and path[0] in YAML_ONLY else "--" + field.replace("_", "-")
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
        # A validator of a whole group names the flags itself, and so has no field to put before them.
        return f"{flag}: {message}" if path and (flag == field or "--" not in message) else message
    if item["type"] == "literal_error":
        allowed = _choices(model, path)
        return f"{flag} is {item['input']!r}{nearest(str(item['input']), allowed)}; it is one of {', '.join(allowed)}"
    message = item["msg"].removeprefix("Input should be ")
    return f"{flag} is {item['input']!r} and should be {message}"


def _choices(model: Any, path: list[str]) -> list[str]:
    return [str(choice) for choice in get_args(_owner(model, path).model_fields[path[-1]].annotation)]


def _owner(model: Any, path: list[str]) -> Any:
    """Return the model that has the last field of a path."""
    for part in path[:-1]:
        # A number stands for an item of a list of models.
        model = get_args(model)[0] if part.isdigit() else model.model_fields[part].annotation
    return model
