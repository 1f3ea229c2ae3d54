"""Small models of one-dimensional signals: a backbone that turns a signal into features, and last linear layers.

Four are those of the MNIST-1D benchmark (Greydanus & Kobak 2024; `notebooks/models.py` of greydanus/mnist1d), layer by
layer; ``mnist1d_mlp_2x200`` is the network of "Understanding Deep Learning" (Prince 2023), notebook 9.5.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mtl.config import SIGNAL_BACKBONES
from mtl.errors import UserError, nearest

LENGTH, CLASSES = 40, 10
"""Values in a signal of MNIST-1D, and its classes."""


class SignalBackbone(nn.Module):
    """Features of signals.

    Args:
        layers: From signals (B, 1, 40) to features (B, `channels`).
        channels: Number of features.

    Attributes:
        name: The model's name, once `make_signal_parts` has given it.
        stride: Multiple that the length of a signal must be of: any will do that the layers take.
        size_arguments: What timm was told of the input's size: nothing.
        frozen: Whether the backbone is inert.
    """

    name = ""
    stride = 1
    size_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, layers: nn.Module, channels: int) -> None:
        super().__init__()
        self.layers = layers
        self.channels = channels
        self.frozen = False

    def forward(self, signal: Tensor) -> Tensor:
        """Return the features (B, `channels`) of signals (B, 1, 40). What is frozen builds no graph."""
        features: Tensor = self.layers(signal.detach() if self.frozen else signal)
        return features

    def freeze(self) -> None:
        """Make the backbone inert: no gradient, no graph, and evaluation mode whatever `train` is told."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def thaw(self) -> None:
        """Undo `freeze`: everything learns, in training mode from the next call of `train` on."""
        self.frozen = False
        self.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except where frozen."""
        return super().train(mode and not self.frozen)


class LinearHead(nn.Linear):
    """The last layer of a task on signals, from features (B, F) to outputs (B, C)."""

    def set_bias(self, bias: Tensor) -> None:
        """Set the bias (C,), where training is to start."""
        with torch.no_grad():
            self.bias.copy_(bias)

    def forward(self, features: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Return outputs (B, C). Unlike those of `mtl.models.heads.Head`, they have no `size`: they have no places."""
        return super().forward(features)


class SignalModel(nn.Module):
    """A backbone and a linear classifier on its features.

    Args:
        backbone: The features.
        head: The classifier.
    """

    def __init__(self, backbone: SignalBackbone, head: LinearHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, signal: Tensor) -> Tensor:
        """Return logits (B, C) for signals (B, 1, 40)."""
        logits: Tensor = self.head(self.backbone(signal))
        return logits


class _Residual(nn.Module):
    """``x + layers(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


class _BidirectionalGRU(nn.Module):
    """From signals (B, 1, T) to the states of both directions at every step, (B, T, 2 * width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True, bidirectional=True)

    def forward(self, signal: Tensor) -> Tensor:
        states: Tensor = self.gru(signal.transpose(1, 2))[0]
        return states


def _linear(dropout: float) -> SignalBackbone:
    return SignalBackbone(nn.Sequential(nn.Flatten(), nn.Dropout(dropout)), LENGTH)


def _mlp(dropout: float) -> SignalBackbone:
    width = 100
    layers = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(LENGTH, width), nn.ReLU(), nn.Dropout(dropout)),
        _Residual(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
    )
    return SignalBackbone(layers, width)


def _mlp_2x200(dropout: float) -> SignalBackbone:
    width = 200
    layers = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(LENGTH, width), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
    )
    return SignalBackbone(layers, width)


def _cnn(dropout: float) -> SignalBackbone:
    width = 25
    # Lengths 40, 19, 10, 5.
    layers = nn.Sequential(
        *(nn.Conv1d(1, width, 5, stride=2, padding=1), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(dropout)),
        nn.Flatten(),
    )
    return SignalBackbone(layers, 5 * width)


def _gru(dropout: float) -> SignalBackbone:
    width = 6
    return SignalBackbone(
        nn.Sequential(_BidirectionalGRU(width), nn.Flatten(), nn.Dropout(dropout)), LENGTH * 2 * width
    )


SIGNAL_MODELS: dict[str, Callable[[float], SignalBackbone]] = {
    "mnist1d_linear": _linear,
    "mnist1d_mlp": _mlp,
    "mnist1d_mlp_2x200": _mlp_2x200,
    "mnist1d_cnn": _cnn,
    "mnist1d_gru": _gru,
}
"""The backbones, by the model's name: from the probability of dropout."""
assert tuple(SIGNAL_MODELS) == SIGNAL_BACKBONES


def make_signal_parts(
    name: str, outputs: Mapping[str, int], dropout: float = 0.0
) -> tuple[SignalBackbone, dict[str, LinearHead]]:
    """Return a backbone, and for each task a head, as `make_signal_model` does for one.

    Args:
        name: One of `SIGNAL_MODELS`.
        outputs: Number of outputs by task.
        dropout: As for `make_signal_model`.

    Raises:
        UserError: There is no such model, or the probability is not in [0, 1).
    """
    if name not in SIGNAL_MODELS:
        raise UserError(
            f"--backbone: there is no model of signals {name!r}{nearest(name, SIGNAL_MODELS)}; choose one of "
            f"{', '.join(SIGNAL_MODELS)}"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout {dropout:g}: it is the probability of a zero, at least 0 and less than 1")
    backbone = SIGNAL_MODELS[name](dropout)
    backbone.name = name
    heads = {task: LinearHead(backbone.channels, channels) for task, channels in outputs.items()}
    if name == "mnist1d_mlp_2x200":
        for layer in nn.ModuleList([backbone, *heads.values()]).modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return backbone, heads


def make_signal_model(name: str, dropout: float = 0.0, *, classes: int = CLASSES) -> SignalModel:
    """Return a model with fresh weights, initialised as its authors do: by torch's default, or after He et al. (2015).

    ======================= ========== ==========================================================================
    name                    parameters backbone
    ======================= ========== ==========================================================================
    ``mnist1d_linear``             410 the signal itself
    ``mnist1d_mlp``             15,210 two layers of 100, ReLU, the second one residual
    ``mnist1d_mlp_2x200``       50,410 two layers of 200, ReLU; He's uniform weights, and zero biases
    ``mnist1d_cnn``              5,210 three convolutions of 25 channels and stride 2, ReLU, flattened
    ``mnist1d_gru``              5,134 a GRU in both directions, 6 wide, all steps flattened
    ======================= ========== ==========================================================================

    Args:
        name: One of `SIGNAL_MODELS`.
        dropout: Probability with which, in training, each output of a hidden layer is zero: of a linear or
            convolutional one behind its ReLU, and of the GRU. What the linear model drops is its input.
        classes: Number of classes.

    Raises:
        UserError: There is no such model, or the probability is not in [0, 1).
    """
    backbone, heads = make_signal_parts(name, {"classes": classes}, dropout)
    return SignalModel(backbone, heads["classes"])
