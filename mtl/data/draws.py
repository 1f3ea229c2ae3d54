"""Random numbers that belong to a scene."""

from collections.abc import Sequence

import numpy as np


class Draws:
    """Uniform numbers of B scenes, dealt out in order.

    Each scene owns one stream of the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011), whose raw output numpy promises never to change. A scene's numbers
    therefore depend on neither the others in the batch nor on the machine.
    """

    SIZE = 768

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        """Draw every scene's block.

        Args:
            keys: Two 64-bit numbers for each scene.
        """
        raw: np.ndarray = np.stack(
            [np.random.Philox(key=np.array(key, np.uint64)).random_raw(self.SIZE) for key in keys]
        )
        self._block = (raw >> np.uint64(11)) * 2.0**-53
        self._next = 0

    def __call__(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return (B, *shape) numbers in [low, high)."""
        count = int(np.prod(shape))
        block = self._block[:, self._next : self._next + count]
        self._next += count
        numbers: np.ndarray = low + (high - low) * block.reshape(len(block), *shape)
        return numbers

    def choice(self, count: int) -> np.ndarray:
        """Return (B,) whole numbers in [0, count)."""
        whole: np.ndarray = np.floor(self(0.0, count)).astype(np.int64)
        return whole
