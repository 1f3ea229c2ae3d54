"""Noise on weights, labels and inputs: a pure function of the seed and of where in training it is added.

Images have their noise from `mtl.augmentation.photometry`; classes are smoothed in the segmentation loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mtl.augmentation.draws import Draws
from mtl.data.sample import IGNORE_INDEX
from mtl.regularization.displacement import displace, normal_like


@contextmanager
def noisy_weights(weights: Sequence[Tensor], sigma: float, seed: int, step: int, batch: int = 0) -> Iterator[None]:
    """Add Gaussian noise to weights, and put the old bits back at the end.

    The forward pass and its backward pass both belong inside: the gradient is that at the noisy weights, and the
    optimizer moves the clean ones. To second order this adds σ²/2 tr(H) to the loss on average, with its Hessian H:
    wide minima are preferred (Hinton & van Camp 1993; An 1996, "The effects of adding noise during backpropagation
    training").

    Args:
        weights: In an order that stays, such as the values of `mtl.regularization.penalties.counted_weights`.
        sigma: Standard deviation, in the weights' own unit.
        seed: Seed of the run.
        step: Optimizer steps done: each has other noise; all ranks have the same, on devices of one kind.
        batch: Number of the batch in the step, where gradients are accumulated.
    """
    state = np.random.SeedSequence([seed, step, batch]).generate_state(1, np.uint64)
    generator = torch.Generator(weights[0].device).manual_seed(int(state[0]))
    undo = displace(weights, (sigma * normal_like(weight, generator) for weight in weights))
    try:
        yield
    finally:
        undo()


def noisy_inputs(values: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Return inputs with Gaussian noise.

    On a linear model under the squared error this is, on average, L2 regularization with λ = σ² exactly:
    E (y - (x + ε) w)² = (y - x w)² + σ² ‖w‖² (Bishop 1995, "Training with noise is equivalent to Tikhonov
    regularization"; on others, to second order, a penalty on the gradient by the input).

    Args:
        values: (B, ...), floats.
        sigma: Standard deviation, in the values' unit.
        draws: Of the B samples.
    """
    return values + sigma * _normal("input noise", values, draws).to(values)


def jittered_depth(depth: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Return depth labels, each pixel times e^{σ n} with n standard normal: medians and logarithms are kept on average.

    What has no label, 0, still has none.

    Args:
        depth: (B, 1, H, W), metres or inverse depth.
        sigma: Standard deviation of the logarithm: 0.1 is about 10 %.
        draws: Of the B samples.
    """
    return depth * (sigma * _normal("depth jitter", depth, draws)).exp().to(depth)


def redrawn_labels(labels: Tensor, share: float, classes: int, draws: Draws) -> Tensor:
    """Return class indices of which a share is drawn anew, uniformly from all classes, the true one included.

    Pixels to be ignored stay as they are.

    Args:
        labels: (B,) or (B, H, W), whole numbers.
        share: Probability of each label to be drawn anew.
        classes: Number of classes.
        draws: Of the B samples.
    """
    shape = labels.shape[1:]
    chosen = draws.bernoulli("label is redrawn", share, shape) & (labels != IGNORE_INDEX)
    return torch.where(chosen, draws.integers("redrawn label", classes, shape).to(labels.dtype), labels)


def _normal(name: str, like: Tensor, draws: Draws) -> Tensor:
    """Return standard normal numbers (B, ...), float32."""
    flat = like.detach().reshape(len(like), 1, -1, 1)
    return draws.normal_like(name, flat).view(like.shape)
