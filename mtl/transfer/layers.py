"""Which tensors and modules of an encoder belong to which stage or layer, after timm's own grouping."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import timm
import torch
from timm.models import group_parameters
from torch import nn

from mtl.errors import UserError


class Stages(NamedTuple):
    """The stages of an encoder; 0 is the stem.

    Attributes:
        total: Number of stages without the stem.
        tensors: Stage of each tensor of the encoder's state dict.
        modules: Stage of each module that does not span several, by its name in the encoder.
    """

    total: int
    tensors: dict[str, int]
    modules: dict[str, int]


def find_stages(name: str, encoder: nn.Module) -> Stages:
    """Return an encoder's stages: timm's coarse groups, which in a plain vision transformer are its blocks.

    timm groups parameters (``group_matcher(coarse=True)``). A module without any, such as drop-path, belongs to the
    stage that it lies in, and to the stem where it lies in none, as the dropout behind a position embedding does:
    so nothing random is left between stages that are to stay as they are.

    Args:
        name: timm's name of the model.
        encoder: Its encoder, features-only or whole.

    Raises:
        UserError: timm does not say which groups this model has, or has other names for its parameters.
    """
    groups = _groups(name, encoder, coarse=True)
    by_identity = {id(parameter): groups[n] for n, parameter in encoder.named_parameters()}
    modules: dict[str, int] = {}
    for module_name, module in encoder.named_modules():
        own = {by_identity[id(parameter)] for parameter in module.parameters()}
        if len(own) <= 1:
            modules[module_name] = own.pop() if own else modules.get(module_name.rpartition(".")[0], 0)
    # A buffer belongs to its module; one of the whole encoder is a constant, such as a table of positions.
    tensors = {
        n: by_identity.get(id(tensor), modules.get(n.rpartition(".")[0], 0))
        for n, tensor in encoder.state_dict(keep_vars=True).items()
    }
    return Stages(max(groups.values()), tensors, modules)


def find_layers(name: str, encoder: nn.Module) -> dict[str, int]:
    """Return the layer of each of an encoder's parameters, from 0, the stem: timm's ``group_matcher(coarse=False)``.

    Args:
        name: timm's name of the model.
        encoder: Its encoder, features-only or whole.

    Raises:
        UserError: timm does not say which layers this model has, or has other names for its parameters.
    """
    return _groups(name, encoder, coarse=False)


def full_model(name: str) -> Any:
    """Return timm's whole model, to be asked for names: without memory for its weights, where timm can build it so."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name, pretrained=False)


def timm_name(own: str, known: Collection[str]) -> str | None:
    """Return timm's own name of an encoder's tensor, or None where timm's whole model has no such tensor.

    A features-only encoder wraps the model (``model.``, ``body.``) and takes modules out of the sequence that they
    were in (``stages_0.`` for ``stages.0.``).

    Args:
        own: Name in the encoder.
        known: Names in timm's whole model.
    """
    return next((candidate for candidate in _candidates(own) if candidate in known), None)


def _candidates(own: str) -> Iterator[str]:
    for wrapper in ("model.", "model.model.", "model.body."):
        inner = own.removeprefix(wrapper)
        yield inner
        first, dot, rest = inner.partition(".")
        words = first.split("_")
        for i in range(len(words) - 1, 0, -1):
            yield "_".join(words[:i]) + "." + "_".join(words[i:]) + dot + rest


def _groups(name: str, encoder: nn.Module, *, coarse: bool) -> dict[str, int]:
    """Return the number of each parameter's group; groups of which the encoder has nothing are not counted."""
    full = full_model(name)
    try:
        theirs = group_parameters(full, full.group_matcher(coarse=coarse), reverse=True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"--backbone {name}: timm does not say which {'stages' if coarse else 'layers'} it has; leave out "
            f"{'--freeze-stages' if coarse else '--layer-decay'} or choose another backbone"
        ) from None
    groups: dict[str, int] = {}
    for own, _ in encoder.named_parameters():
        match = timm_name(own, theirs)
        if match is None:
            raise UserError(
                f"--backbone {name}: timm's own model does not say where {own.removeprefix('model.')} belongs; leave "
                f"out {'--freeze-stages' if coarse else '--layer-decay'} or choose another backbone"
            )
        groups[own] = theirs[match]
    numbers = {group: number for number, group in enumerate(sorted(set(groups.values())))}
    return {own: numbers[group] for own, group in groups.items()}
