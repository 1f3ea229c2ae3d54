"""Which way of masking fits a backbone."""

from typing import Literal, get_args

from mtl.errors import UserError, nearest
from mtl.models.backbone import Backbone
from mtl.pretraining.masked_convolution import separates
from mtl.pretraining.token_drop import can_drop_tokens

Method = Literal["tokens", "convolution", "input"]


def method_of(backbone: Backbone) -> Method:
    """Return how a backbone is best masked.

    "tokens", where hidden patches can be left out (plain vision transformers); else "convolution", where hooks on
    known layers keep what is hidden from what is visible (convolutional networks); else "input", which fits all.
    """
    if can_drop_tokens(backbone):
        return "tokens"
    return "convolution" if separates(backbone) else "input"


def check_method(backbone: Backbone, method: str) -> None:
    """Raise a UserError if a method is none, or does not fit a backbone."""
    known = get_args(Method)
    if method not in known:
        raise UserError(f"--mask.method {method!r}{nearest(method, known)}: choose one of {', '.join(known)}")
    if method == "tokens" and not can_drop_tokens(backbone):
        raise UserError(
            f"--mask.method tokens: {backbone.name!r} cannot be computed on some of its patches, as plain vision "
            "transformers can; leave the option out, or use --mask.method input"
        )
    if method == "convolution" and not separates(backbone):
        raise UserError(
            f"--mask.method convolution: {backbone.name!r} has layers other than convolutions, such as attention, "
            "through which it would see what is hidden; leave the option out, or use --mask.method input"
        )
