"""Random changes of signals on the batch's device: circular shift, scaling and noise.

The first two are the augmentation of MNIST-1D in "Understanding Deep Learning" (Prince 2023, section 9.3.8 and
notebook 9.5); noise on the input is its section 9.3.4.
"""

import math

import torch
from torch import Tensor, nn

from mtl.augmentation.draws import Draws
from mtl.data.sample import Batch
from mtl.errors import UserError


class SignalAugmentation(nn.Module):
    """Random changes of whole batches of signals, a pure function of the batch and its `draw`.

    A sample's changes depend on (seed, epoch, position in the epoch) and on nothing else (`mtl.augmentation.draws`).

    Args:
        seed: Seed of the draws.
        shift: Share of the samples to shift by a number of places drawn from all of them; what leaves at one end comes
            back at the other.
        scale: Largest change s of a factor that is uniform in [1 - s, 1 + s].
        noise: Standard deviation of independent Gaussian noise, added last, in the signal's unit.

    Raises:
        UserError: A number is out of its range.
    """

    def __init__(self, seed: int, *, shift: float = 1.0, scale: float = 0.2, noise: float = 0.0) -> None:
        super().__init__()
        if not 0 <= shift <= 1:
            raise UserError(f"{shift:g} of the signals are to be shifted, but a share is at least 0 and at most 1")
        if not 0 <= scale < 1:
            raise UserError(f"signals are scaled by up to 1 ± {scale:g}, but the change must be at least 0 and below 1")
        if not 0 <= noise < math.inf:
            raise UserError(f"the noise on signals has the deviation {noise:g}, but it must be at least 0 and finite")
        self.seed, self.shift, self.scale, self.noise = seed, shift, scale, noise

    def forward(self, batch: Batch) -> Batch:
        """Return a changed batch.

        Args:
            batch: With `signal` (B, C, T) floats and `draw` (B, 2) int64: each sample's epoch, the same for all, and
                its position in the epoch.
        """
        signal = batch["signal"]
        draws = Draws(self.seed, batch["draw"][0, 0], batch["draw"][:, 1])
        if self.shift:
            places = draws.integers("signal shift", signal.shape[-1])
            signal = circular_shift(signal, places * draws.bernoulli("whether a signal shifts", self.shift))
        if self.scale:
            factor = 1 + self.scale * (2 * draws.uniform("signal scale") - 1)
            signal = signal * factor.to(signal.dtype)[:, None, None]
        if self.noise:
            # As images of one row.
            normal = draws.normal_like("signal noise", signal.unsqueeze(2)).squeeze(2)
            signal = signal + self.noise * normal.to(signal.dtype)
        return {**batch, "signal": signal}


def circular_shift(signal: Tensor, places: Tensor) -> Tensor:
    """Return signals (B, C, T), each moved to later places as `torch.roll` does it, by its own number (B,) int64."""
    length = signal.shape[-1]
    come_from = (torch.arange(length, device=signal.device) - places[:, None]) % length
    return signal.gather(-1, come_from[:, None].expand(signal.shape))
