"""What a person can choose about the tasks segmentation and depth: their loss, and how depth is evaluated."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SegmentationOptions(BaseModel):
    """Which class each pixel is."""

    model_config = ConfigDict(extra="forbid")

    loss: Literal["cross_entropy", "dice", "both"] = Field(
        default="cross_entropy",
        description="Cross-entropy per pixel, soft Dice per class, or the sum of both.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each label that is spread evenly over all classes."
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="Weights of the classes: all equal, or by median frequency, so that rare ones count.",
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.loss == "dice" and (self.label_smoothing > 0 or self.class_weights != "none"):
            raise ValueError(
                "label_smoothing and class_weights act on the cross-entropy, which the loss 'dice' does not"
                " have: choose the loss 'cross_entropy' or 'both', or leave them out"
            )
        return self


class DepthOptions(BaseModel):
    """How far away each pixel is, in metres along the optical axis."""

    model_config = ConfigDict(extra="forbid")

    loss: Literal["l1", "silog", "berhu"] = Field(
        default="l1",
        description="Mean absolute error, scale-invariant error of the logarithm, or reverse Huber.",
    )
    gradient_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of a term that compares edges, at four scales (0: none).",
    )
    min_depth: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="Evaluate only labels farther than this, in metres.",
    )
    max_depth: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Evaluate only labels nearer than this, in metres.",
    )
    crop: Literal["none", "eigen"] = Field(
        default="none",
        description="Evaluate the whole picture, or the crop of Eigen et al. that NYUv2 papers use.",
    )

    @model_validator(mode="after")
    def _caps_in_order(self) -> Self:
        if self.max_depth is not None and self.max_depth <= self.min_depth:
            raise ValueError(f"max_depth ({self.max_depth:g} m) must exceed min_depth ({self.min_depth:g} m)")
        return self
