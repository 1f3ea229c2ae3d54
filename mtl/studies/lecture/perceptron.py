"""Multilayer perceptrons on MNIST-1D, many seeds trained at once as one batched model."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


class Perceptrons:
    """Networks of linear layers and ReLUs, one a seed, that never see one another.

    He's uniform weights (2015) and zero biases. Whatever a network draws, its weights and the order of its samples,
    comes from a generator of its own, so that it is the same whichever others are trained beside it, to rounding.

    Args:
        widths: Features of the input, the hidden layers and the output.
        seeds: A seed for each of the S networks.
        dtype: In which to train. MNIST-1D's signals are float32.

    Attributes:
        weights: Of each layer, (S, inputs, outputs).
        biases: Of each layer, (S, 1, outputs).
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [he_weights(inputs, outputs, self._generators) for inputs, outputs in pairwise(widths)]
        self.weights = [weight.to(dtype).requires_grad_() for weight in drawn]
        self.biases = [torch.zeros_like(weight[:, :1], requires_grad=True) for weight in self.weights]

    def __call__(self, signals: Tensor) -> Tensor:
        """Return logits (S, N, classes) of signals (S, N, features)."""
        hidden = signals
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, functional.relu(hidden) if number else hidden, weight)
        return hidden

    def train(
        self, signals: Tensor, labels: Tensor, *, rate: float, batch: int, epochs: int, momentum: float = 0.0
    ) -> None:
        """Train each network by SGD on the mean cross-entropy of shuffled batches.

        Args:
            signals: Training signals (N, features), or (S, N, features) where each network has its own.
            labels: Their classes (N,), the same for all networks.
            rate: The learning rate.
            batch: Samples a step; the last of an epoch has the rest.
            epochs: Passes over the data.
            momentum: Of SGD.
        """
        signals = signals.expand(len(self._generators), *signals.shape[-2:])
        networks = torch.arange(len(signals))[:, None]
        optimizer = torch.optim.SGD([*self.weights, *self.biases], lr=rate, momentum=momentum)
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(len(labels), generator=one) for one in self._generators])
            for chosen in torch.split(orders, batch, 1):
                logits = self(signals[networks, chosen])
                # Summed over the networks, so that each has the gradient of its own mean.
                total = functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum")
                optimizer.zero_grad()
                (total / chosen.shape[1]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def errors(self, signals: Tensor, labels: Tensor) -> Tensor:
        """Return in percent (S,) float64 how many of the signals (N, features) each network classifies wrongly."""
        with torch.no_grad():
            found = self(signals.expand(len(self._generators), *signals.shape[-2:])).argmax(-1)
        return 100 * (found != labels).double().mean(-1)


def he_weights(inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return He's uniform weights (S, inputs, outputs) float64 of a layer, each network's from its own generator."""
    each = [torch.rand(inputs, outputs, generator=generator, dtype=torch.float64) for generator in generators]
    return (2 * torch.stack(each) - 1) * math.sqrt(6 / inputs)
