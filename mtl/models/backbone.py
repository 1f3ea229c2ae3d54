"""A timm encoder turned into a pyramid of feature maps, with its own input normalisation."""

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from timm.layers import DropPath
from torch import Tensor, nn

from mtl.errors import UserError, nearest
from mtl.transfer.layers import find_stages


class Pyramid(NamedTuple):
    """What a backbone says about a batch of images, in segmentation-models-pytorch's order.

    Attributes:
        maps: Feature maps. For a hierarchical encoder the normalised image itself (B, 3, H, W) comes first,
            then one map for each halving of the resolution; a stage that the encoder does not have is a map
            with 0 channels. For a plain vision transformer four maps of the patch grid's size.
        tokens: For a plain vision transformer, each map's prefix tokens (B, P, C), or None; else empty.
    """

    maps: list[Tensor]
    tokens: list[Tensor | None]


class Backbone(nn.Module):
    """Any timm encoder as a pyramid of feature maps.

    The mean and standard deviation of the input are buffers, applied in `forward`, so that a checkpoint and
    an exported model carry them.

    Args:
        name: timm's name of the model.
        size: Height and width in pixels, for encoders that are built for one size. One image of this size shows
            that the maps are what timm says they are.
        output_stride: Stride of the coarsest map; 8 and 16 replace strides by dilation where timm can.
        drop_path: Stochastic depth in training (Huang et al. 2016): the share of samples for which the last residual
            block is skipped, in proportion fewer for earlier ones; None is what timm's model has of itself.

    Attributes:
        channels: Channels of each map of the pyramid.
        strides: Stride of each map.
        plain: Whether this is a plain vision transformer (all maps of one size).
        stride: Multiple that height and width of an input must be of.
        size_arguments: What timm was told of the input's size.
        size: Height and width of the input that the encoder was built with.
        frozen: Whether the whole backbone is inert.
        frozen_stages: Number of stages that are inert, with the stem, where not the whole backbone is.

    Raises:
        UserError: There is no such model, it cannot take this size or this stride, it has no residual blocks to skip
            or no feature maps a decoder can use.
    """

    mean: Tensor
    std: Tensor
    encoder: Any

    def __init__(
        self,
        name: str,
        size: tuple[int, int] = (224, 224),
        output_stride: int = 32,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.frozen = False
        self.frozen_stages = 0
        self._inert: list[nn.Module] = []
        reductions = _reductions(name)
        self.plain = len(set(reductions)) == 1
        if not self.plain and reductions not in [[2**level for level in range(first, 6)] for first in range(3)]:
            raise UserError(
                f"--backbone: the feature maps of {name!r} have strides {', '.join(map(str, reductions))}, and "
                "decoders need 4, 8, 16 and 32, with or without 1 and 2; choose another backbone"
            )
        if not self.plain and not _dilates(name, output_stride):
            raise UserError(
                f"--backbone: timm cannot give {name!r} an output stride of {output_stride}, with dilation in place of "
                "strides, which --decoder deeplabv3plus needs; choose another backbone or decoder"
            )
        # Of a plain transformer's one grid, the dpt decoder makes maps down to one of twice its stride, at least.
        patch = reductions[0]
        self.stride = max(32, patch) * patch // dpt_stride(patch) if self.plain else min(max(reductions), output_stride)
        height, width = (-(-side // self.stride) * self.stride for side in size)
        self.size = (height, width)
        self.size_arguments = _size_arguments(name, (height, width), self.plain)
        if drop_path is not None and not _skips(name, drop_path):
            raise UserError(
                f"--drop-path {drop_path:g}: timm's {name!r} has no residual blocks that can be skipped; leave it out, "
                "or choose another backbone"
            )
        self._dropping: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
        config = timm.get_pretrained_cfg(name)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))
        try:
            self.encoder = self._plain() if self.plain else self._hierarchical(output_stride)
            self.channels: list[int] = list(self.encoder.out_channels)
            if self.plain:
                self.strides: list[int] = list(self.encoder.output_strides)
            else:
                self.strides = [min(2**level, output_stride) for level in range(len(self.channels))]
            self._check_maps(height, width)
        except _FAILURES as error:
            own = config.input_size[1:]
            way = "" if own == (height, width) else f"--data.size {own[0]} {own[1]}, which it was made for, or "
            extended = "" if (height, width) == tuple(size) else f" (as {height}x{width})"
            raise UserError(
                f"--backbone: {name!r} cannot take images of {size[0]}x{size[1]}{extended}; "
                f"choose {way}another backbone"
            ) from error

    def forward(self, image: Tensor) -> Pyramid:
        """Compute the pyramid of images (B, 3, H, W) in [0, 1], H and W multiples of `stride`.

        What is frozen builds no graph.
        """
        if self.frozen_stages:
            image = image.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder((image - self.mean) / self.std)
        return Pyramid(*features) if self.plain else Pyramid(features, [])

    def _plain(self) -> Any:
        encoder = TimmViTEncoder(self.name, pretrained=False, **self.size_arguments, **self._dropping)
        # Its classifier and last norm take no part in the maps: as in timm's own features_only, they go.
        encoder.model.prune_intermediate_layers(prune_norm=True)
        # Some have a class token that they do not give beside their maps.
        if "return_prefix_tokens" not in inspect.signature(encoder.model.forward_intermediates).parameters:
            encoder.has_prefix_tokens = False
        return encoder

    def _hierarchical(self, output_stride: int) -> Any:
        options = self.size_arguments | self._dropping
        return TimmUniversalEncoder(self.name, pretrained=False, output_stride=output_stride, **options)

    def _check_maps(self, height: int, width: int) -> None:
        """Refuse maps that are not what `channels` and `strides` say, as decoders would go wrong in silence."""
        with torch.no_grad():
            maps = self.eval()(torch.zeros(1, 3, height, width)).maps
        self.train()
        for features, channels, stride in zip(maps, self.channels, self.strides, strict=True):
            shape, expected = features.shape[1:], (channels, height // stride, width // stride)
            if shape != expected:
                raise UserError(
                    f"--backbone: {self.name!r} turns images of {height}x{width} into a map of "
                    f"{'x'.join(map(str, shape))} (channels, height, width) where decoders need "
                    f"{'x'.join(map(str, expected))}; choose another backbone"
                )

    def freeze(self, stages: int | None = None) -> None:
        """Make the backbone inert: no gradient, no graph, and evaluation mode whatever `train` is told.

        Evaluation mode is what keeps the statistics of normalisation layers fixed and dropout and drop-path off.

        Args:
            stages: Freeze the stem and this many of timm's stages, in plain vision transformers blocks; None freezes
                everything.

        Raises:
            UserError: There are no such stages, or timm does not say which there are.
        """
        if stages is None:
            self.frozen = True
            self.requires_grad_(False)
            self.eval()
            return
        total, tensors, modules = find_stages(self.name, self.encoder)
        if not 1 <= stages < total:
            raise UserError(
                f"--freeze-stages {stages}: {self.name} has {total} {'blocks' if self.plain else 'stages'}; "
                f"give 1 to {total - 1}, or --freeze for the whole backbone"
            )
        self.frozen_stages = stages
        for name, parameter in self.encoder.named_parameters():
            if tensors[name] <= stages:
                parameter.requires_grad_(False)
        self.keep_in_evaluation(self.encoder.get_submodule(n) for n, stage in modules.items() if stage <= stages)

    def thaw(self) -> None:
        """Undo `freeze`: everything learns, from the next call of `train` on."""
        self.frozen, self.frozen_stages, self._inert = False, 0, []
        self.requires_grad_(True)

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass in place of storing them, stage by stage or block by block.

        Raises:
            UserError: timm's model cannot.
        """
        model = self.encoder.model
        # Some of timm's wrappers leave it to the model that they hold.
        model = model if hasattr(model, "set_grad_checkpointing") else getattr(model, "model", model)
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            raise UserError(
                f"--grad-checkpointing: timm's {self.name!r} cannot recompute its activations; leave it out, or choose "
                "another backbone"
            ) from None

    def keep_in_evaluation(self, modules: Iterable[nn.Module]) -> None:
        """Hold some of the backbone's modules in evaluation mode, whatever `train` is told."""
        self._inert = list(modules)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for what is frozen."""
        super().train(mode and not self.frozen)
        for module in self._inert:
            module.eval()
        return self

    def fingerprint(self, stages: int | None = None) -> str:
        """Return a hash of every parameter and buffer, to show that none has changed.

        Args:
            stages: Only of the normalisation, the stem and this many stages; None is everything.
        """
        state = self.state_dict()
        if stages is not None:
            inside = find_stages(self.name, self.encoder).tensors
            state = {n: v for n, v in state.items() if inside.get(n.removeprefix("encoder."), 0) <= stages}
        digest = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def dpt_stride(patch: int) -> int:
    """Return the stride that the dpt decoder is to take a plain transformer's patch for.

    It makes maps of strides 4 to 32 by powers of two, which patches of 14 pixels are not; taken for 16, theirs have
    strides of 3.5 to 28, and the head's last upsampling brings what comes of them to the image's size all the same.
    """
    return patch if patch & (patch - 1) == 0 else 16


def coarsest_stride(name: str, output_stride: int = 32) -> int:
    """Return the stride of the coarsest map that a `Backbone` gives, without building it.

    Raises:
        UserError: There is no such model, or it has no feature maps.
    """
    reductions = _reductions(name)
    return max(reductions) if len(set(reductions)) == 1 else min(max(reductions), output_stride)


_FAILURES = (RuntimeError, NotImplementedError, AttributeError, TypeError, AssertionError, ValueError, IndexError)
"""What timm's models raise where they cannot do what they are asked for."""


def check_name(name: str) -> None:
    """Raise a UserError if timm has no such model, or no weights so tagged."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(
            f"--backbone: timm has no model {name!r}{nearest(architecture, timm.list_models())}; "
            "timm.list_models() lists those it has"
        )
    if name != architecture and name not in timm.list_pretrained(architecture + ".*"):
        known = timm.list_pretrained(architecture + ".*")
        raise UserError(
            f"--backbone: timm has {architecture!r} but no weights tagged {name!r}{nearest(name, known)}; "
            f"there are {', '.join(known) or 'none'}"
        )


def _reductions(name: str) -> list[int]:
    """Return the strides of the model's own feature maps, without allocating its weights."""
    check_name(name)
    try:
        return _feature_strides(name)
    except _FAILURES as error:
        raise UserError(
            f"--backbone: timm's {name!r} gives no feature maps ({_first_line(error)}); choose another backbone"
        ) from None


def _feature_strides(name: str, **options: Any) -> list[int]:
    with torch.device("meta"):
        return list(timm.create_model(name, pretrained=False, features_only=True, **options).feature_info.reduction())


def _dilates(name: str, output_stride: int) -> bool:
    """Return whether timm can build the model with this output stride."""
    try:
        return output_stride >= 32 or max(_feature_strides(name, output_stride=output_stride)) == output_stride
    except _FAILURES:
        return False


def _skips(name: str, share: float) -> bool:
    """Return whether timm can build the model with residual blocks that are skipped in training."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, drop_path_rate=share)
    except TypeError:
        return False
    except _FAILURES:
        return True  # the meta device cannot build it; the argument itself was accepted
    return share == 0 or any(isinstance(m, DropPath) and m.drop_prob for m in model.modules())


def _size_arguments(name: str, size: tuple[int, int], plain: bool) -> dict[str, Any]:
    """Return what timm wants to be told of the input's size."""
    config = timm.get_pretrained_cfg(name)
    if not config.fixed_input_size:
        return {}
    # A plain transformer resamples its position embedding to each input; the others are built for one size.
    choices: list[dict[str, Any]] = [{"dynamic_img_size": True}] if plain else []
    for arguments in [*choices, {"img_size": size}]:
        try:
            with torch.device("meta"):
                timm.create_model(name, pretrained=False, **arguments)
        except TypeError:
            continue
        except (RuntimeError, NotImplementedError, AssertionError):
            pass  # the meta device cannot build it; the arguments themselves were accepted
        return arguments
    return {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
