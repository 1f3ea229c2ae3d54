"""What a folder's `dataset.yaml` says: classes, units, camera and split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from mtl.config import read_yaml
from mtl.data.sample import IGNORE_INDEX
from mtl.errors import UserError, nearest


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Intrinsics(_Strict):
    """A pinhole camera, in pixels of the stored image; the centre of the top left pixel is (0, 0)."""

    fx: PositiveFloat
    fy: PositiveFloat
    cx: float
    cy: float


class Split(_Strict):
    """Which samples are for validation: those in a file, or every so-many-th run of numbers.

    Attributes:
        validation: A text file of stems, one a line. Relative to the description, ROOT, or the folder above.
        train: The same for training; all others if absent.
        every: Where all stems are numbers, runs of consecutive ones (frames of one scene, usually) stay
            together: of each `every` runs, the first is for validation. Otherwise each file is its own run.
    """

    validation: Path | None = None
    train: Path | None = None
    every: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.validation is None) == (self.every is None):
            raise ValueError("it takes either 'validation: FILE' or 'every: NUMBER'")
        if self.train is not None and self.validation is None:
            raise ValueError("'train: FILE' needs 'validation: FILE'")
        return self


class Description(_Strict):
    """What `dataset.yaml` may say.

    Attributes:
        name: What to call the data set; ROOT's name if absent.
        classes: Names of the classes in the order of their indices; required where there is segmentation.
        ignore_index: The value in segmentation that means "no label".
        depth_scale: Metres per stored unit of depth.
        intrinsics: The camera of all images.
        border: Pixels to cut off on each side before anything else.
        split: By default, the last tenth of the samples in the order of their names is for validation.
    """

    name: str | None = None
    classes: tuple[str, ...] = Field(default=(), max_length=IGNORE_INDEX)
    ignore_index: int = Field(default=IGNORE_INDEX, ge=0, le=2**16 - 1)
    depth_scale: PositiveFloat | None = None
    intrinsics: Intrinsics | None = None
    border: int = Field(default=0, ge=0)
    split: Split | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            UserError: The file is missing, is not YAML, or says something that is not understood.
        """
        content = read_yaml(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {'; '.join(_complaints(error))}") from error


def _complaints(error: ValidationError) -> Iterator[str]:
    """Yield one clause for each thing that pydantic found wrong with a description."""
    models: dict[str, type[BaseModel]] = {"split": Split, "intrinsics": Intrinsics}
    for problem in error.errors(include_url=False):
        *parents, name = (str(part) for part in problem["loc"] or ("",))
        field = ".".join([*parents, name])
        if problem["type"] == "extra_forbidden":
            allowed = (models[parents[-1]] if parents else Description).model_fields
            yield f"unknown field '{field}'{nearest(name, allowed)}, the fields are {', '.join(allowed)}"
        elif problem["type"] == "missing":
            yield f"'{field}' is required"
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            quotes = " (put it in quotes)" if problem["type"] == "string_type" else ""
            yield f"'{field}' is {problem['input']!r}, but {message}{quotes}"
