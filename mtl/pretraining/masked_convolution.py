"""Masked convolution: a convolutional encoder in which what is hidden cannot reach what is visible.

Dense convolutions whose inputs are zero where hidden are, at the visible positions, the sparse convolutions of SparK
(Tian et al. 2023, https://arxiv.org/abs/2301.03580) and FCMAE (Woo et al. 2023, https://arxiv.org/abs/2301.00808). It
takes three kinds of hooks:

- a convolution or average over several positions reads zero where its input is hidden;
- a maximum over several positions leaves out the hidden ones;
- what depends on statistics over positions (batch normalisation in training, group normalisation, squeeze-excite,
  global response normalisation, pooling to a single position) is given the visible positions alone.

Everything else computes each position by itself, and what it makes of a hidden one is never read.

The hooks are put on a twin (`mtl.pretraining.twins`), which lives as long as the graph of one pass. So the backbone is
never changed, passes with other masks or none do not disturb each other, and gradient checkpointing, which computes
parts of the encoder anew during the backward pass, finds the hooks in place.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import (
    BlurPool2d,
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    EvoNorm2dB0,
    EvoNorm2dS0,
    FilterResponseNormTlu2d,
    GlobalContext,
    SEModule,
)
from timm.layers.cbam import ChannelAttn
from timm.layers.grn import GlobalResponseNorm
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.hgnet import EseModule
from timm.models.senet import SEModule as LegacySEModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.pretraining.targets import resize_mask
from mtl.pretraining.twins import twin
from mtl.pretraining.visibility import Visibility

_SUMS = (nn.Conv2d, nn.AvgPool2d, BlurPool2d)
"""Weighted sums over several positions."""

_STATISTICS = (
    nn.GroupNorm,
    _InstanceNorm,
    EvoNorm2dB0,
    EvoNorm2dS0,
    FilterResponseNormTlu2d,
    GlobalResponseNorm,
    SEModule,
    EffectiveSEModule,
    SqueezeExcite,
    SqueezeExciteCl,
    LegacySEModule,
    EseModule,
    EcaModule,
    CecaModule,
    GlobalContext,
    ChannelAttn,
)
"""What depends on all positions of an image in the same way, whatever their order."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def masked_features(backbone: Backbone, image: Tensor, mask: Tensor) -> Pyramid:
    """Compute a convolutional backbone's pyramid of what is visible: exactly zero where hidden.

    In training mode, running statistics move by those of the visible positions. A compiled program is interrupted:
    the masked pass itself runs eagerly.

    Args:
        backbone: One that `separates`; frozen parts are inert as ever.
        image: (B, 3, H, W) in [0, 1], H and W multiples of the mask's patches.
        mask: (B, h, w) bool, True where hidden, with equally many hidden in each image; its patches are multiples of
            the backbone's coarsest stride.

    Raises:
        ValueError: Images have different numbers of visible patches, or the mask's grid does not fit the image.
        UserError: Maps inside the backbone have sizes that no patches fit.
    """
    stride, (height, width) = max(backbone.strides), image.shape[-2:]
    resize_mask(mask, (height // stride, width // stride))  # refused before anything is computed
    return _pyramid(backbone, image, Visibility(mask))


@torch.no_grad()
def separates(backbone: Backbone) -> bool:
    """Return whether `masked_features` keeps what is hidden from what is visible, in this backbone.

    That is tried rather than looked up, so that it is right about any network that timm has or will have: a copy in
    double precision must make the same of a picture whatever stands at the hidden positions, not only of the picture
    itself but of what every convolution makes of it, in evaluation as in training mode. What is built for one size of
    input is no purely convolutional network, and not tried.
    """
    if backbone.plain or "img_size" in backbone.size_arguments:
        return False
    probe = copy.deepcopy(backbone).cpu().double()
    probe.thaw()
    generator = torch.Generator().manual_seed(0)
    # What is nearly zero at first hides what its layer does.
    for parameter in probe.parameters():
        if parameter.abs().amax() < 1e-2:
            parameter.copy_(torch.rand(parameter.shape, dtype=parameter.dtype, generator=generator))
    side = 2 * max(probe.strides)
    image = torch.rand(2, 3, side, side, dtype=torch.float64, generator=generator)
    visibility = Visibility(torch.tensor([[[True, False], [False, True]], [[True, True], [False, False]]]))
    try:
        for training in (False, True):
            probe.train(training)
            maps = []
            for disturbance in (None, generator):
                # Dropout is to be the same.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    maps.append(_pyramid(probe, image, visibility, disturbance).maps)
            if not all(_same(first, second) for first, second in zip(*maps, strict=True)):
                return False
    except (UserError, RuntimeError, ValueError, AssertionError):  # it does not take this size, or masks do not fit
        return False
    return True


def _same(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max()) if first.numel() else 0.0
    return torch.allclose(first, second, rtol=0, atol=1e-9 * scale)


def _pyramid(
    backbone: Backbone, image: Tensor, visibility: Visibility, disturbance: torch.Generator | None = None
) -> Pyramid:
    """Return the visible pyramid.

    Args:
        backbone: The backbone.
        image: (B, 3, H, W).
        visibility: Of the images.
        disturbance: Where given, noise from here is added to what is hidden behind every convolution.
    """
    twins: dict[nn.Module, nn.Module] = {}
    hooked = twin(backbone, twins)
    inner: set[nn.Module] = set()
    for module in twins.values():  # a parent before its children
        if module in inner or _hook(module, visibility):
            inner.update(module.children())
        elif disturbance is not None and isinstance(module, nn.Conv2d):
            module.register_forward_hook(_disturb_hidden(visibility, disturbance))
    maps = hooked(image).maps
    return Pyramid([features.masked_fill(visibility.share(features) == 0, 0) for features in maps], [])


def _hook(module: nn.Module, visibility: Visibility) -> bool:
    """Give a module its hooks, and return whether these speak for all that is inside."""
    if isinstance(module, _SUMS) and _mixes(module):
        module.register_forward_pre_hook(_zero_hidden(visibility))
    elif isinstance(module, nn.MaxPool2d) and _mixes(module):
        module.register_forward_pre_hook(_exclude_hidden(visibility))
        module.register_forward_hook(_zero_output(visibility), prepend=True)
    elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and module.output_size in (1, (1, 1)):
        module.register_forward_pre_hook(_OnVisible(visibility).before)
    elif isinstance(module, _STATISTICS) or (isinstance(module, _BatchNorm) and _of_batch(module)):
        last = isinstance(module, SqueezeExciteCl) or (
            isinstance(module, GlobalResponseNorm) and module.channel_dim == -1
        )
        hooks = _OnVisible(visibility, channels_last=last)
        module.register_forward_pre_hook(hooks.before)
        # Before the hooks with which timm may take its features.
        module.register_forward_hook(hooks.after, prepend=True)
        return True
    return False


def _mixes(module: Any) -> bool:
    """Return whether a layer's windows can reach across patches: not if they tile a map as patches do."""
    kernel, stride = _pair(getattr(module, "kernel_size", None)), _pair(getattr(module, "stride", None))
    return kernel != (1, 1) and not (kernel == stride and _pair(getattr(module, "padding", None)) == (0, 0))


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _of_batch(norm: _BatchNorm) -> bool:
    """Return whether a batch normalisation takes its statistics from the batch."""
    return norm.training or norm.running_mean is None


_PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]
_Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


def _zero_hidden(visibility: Visibility) -> _PreHook:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return (x * visibility.share(x), *rest) if visibility.covers(*x.shape[-2:]) else args

    return hook


def _exclude_hidden(visibility: Visibility) -> _PreHook:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if not visibility.covers(*x.shape[-2:]):
            return args
        return (x.masked_fill(visibility.share(x) == 0, torch.finfo(x.dtype).min), *rest)

    return hook


def _zero_output(visibility: Visibility) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * visibility.share(output) if visibility.covers(*output.shape[-2:]) else output

    return hook


def _disturb_hidden(visibility: Visibility, generator: torch.Generator) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not visibility.covers(*output.shape[-2:]):
            return output
        noise = torch.randn(output.shape, dtype=output.dtype, generator=generator)
        return output + noise * (1 - visibility.share(output))

    return hook


class _OnVisible:
    """Hooks that give a module the visible positions (B, C, n, 1) in place of a map, and make a map of its output.

    Args:
        visibility: Where they are.
        channels_last: Whether the module's maps are (B, H, W, C).
    """

    def __init__(self, visibility: Visibility, *, channels_last: bool = False) -> None:
        self.visibility = visibility
        self.channels_last = channels_last
        self.size: tuple[int, int] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gather, unless what comes is one vector for each image."""
        x, *rest = args
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        self.size = None
        if x.ndim != 4 or not self.visibility.covers(*x.shape[-2:]):
            return args
        self.size = (x.shape[-2], x.shape[-1])
        x = self.visibility.gather(x)
        return (x.permute(0, 2, 3, 1) if self.channels_last else x, *rest)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Scatter what was gathered."""
        if self.size is None:
            return output
        x = output.permute(0, 3, 1, 2) if self.channels_last else output
        x = self.visibility.scatter(x, *self.size)
        return x.permute(0, 2, 3, 1) if self.channels_last else x
