"""Random numbers that belong to a sample of an epoch, drawn on its device.

Every number is a pure function of (seed, epoch, position in the epoch, name of the draw, index): there is no state
to save, and neither the batch nor the workers nor the ranks that share an epoch make a difference.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_SUMMANDS = 12


class Draws:
    """The numbers of B samples.

    Whole and uniform numbers are the same bits on every device, compiled or not. Those of `normal` are, too; those
    of `normal_like` agree to the rounding of a logarithm and a cosine. A name is for one draw: two draws of one name
    are made of the same bits. On an accelerator each method is a queue of small kernels, which `uniforms` shares
    among many draws; nothing waits for the device.

    Args:
        seed: Seed of the run, its lower 64 bits.
        epoch: Number of the epoch, or a scalar tensor of it (on the device of the positions), which spares a
            compiled program the recompilation at every epoch.
        positions: Each sample's position in the epoch, (B,) int64, less than 2^32.
    """

    def __init__(self, seed: int, epoch: int | Tensor, positions: Tensor) -> None:
        self.key = (seed & _WORD, (seed >> 32) & _WORD)
        self.epoch = epoch & _WORD
        self.positions = (positions & _WORD)[:, None]

    def words(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return whole numbers (B, *shape) from 0 to 2^32 - 1, int64."""
        return self._words({name: shape})[name]

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return numbers (B, *shape) in [0, 1), float32, multiples of 2^-24."""
        return _to_unit(self.words(name, shape))

    def uniforms(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return `uniform` of each name and shape, for the price of one."""
        return {name: _to_unit(words) for name, words in self._words(shapes).items()}

    def bernoulli(self, name: str, p: float | Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Return booleans (B, *shape), true with probability p (which broadcasts)."""
        return self.uniform(name, shape) < p

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Return whole numbers (B, *shape) from 0 to high - 1, int64, for high up to 2^31.

        Their probabilities differ by at most 2^-32.
        """
        return (self.words(name, shape) * high) >> 32

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return numbers (B, *shape) with mean 0 and variance 1, float32.

        Twelve uniform numbers less their mean, added as whole numbers and therefore exactly: bell-shaped, from -6
        to 6, with an excess kurtosis of -0.1.
        """
        total = (self.words(name, (*shape, _SUMMANDS)) >> 8).sum(dim=-1)
        # Each summand is uniform on 0 .. 2^24 - 1, whose mean is a half; doubling keeps the difference whole.
        return (2 * total - _SUMMANDS * (2**24 - 1)).to(torch.float32) * 2.0**-25

    def normal_like(self, name: str, image: Tensor) -> Tensor:
        """Return independent standard normal numbers in the shape of an image (B, C, H, W), float32, within 4.9.

        Philox makes two keys for each sample; the pixels' words are a hash of their index under these keys, a few
        operations in 32 bits: the finaliser "lowbias32" (Wellons 2018, "Prospecting for hash functions"), with a key
        before each of its multiplications, so that no two samples' numbers are one sequence. The halves of a word
        give two normal numbers (Box & Muller 1958), one for the upper half of the image and one for the lower.
        """
        channels, height, width = image.shape[1:]
        half = (height + 1) // 2
        keys = self.words(name, (2, 1, 1, 1))
        # From 0 .. 2^32 - 1 to the same bits in 32.
        first, second = torch.where(keys > _WORD // 2, keys - (_WORD + 1), keys).to(torch.int32).unbind(dim=1)
        x = torch.arange(channels * half * width, dtype=torch.int32, device=image.device).view(channels, half, width)
        # A product of 32 bits wraps around, and a shift to the right copies the sign, which the masks take away.
        x = x ^ first
        x ^= (x >> 16) & 0xFFFF
        x *= 0x7FEB352D
        x ^= second
        x ^= (x >> 15) & 0x1FFFF
        x *= 0x846CA68B - 2**32
        x ^= (x >> 16) & 0xFFFF
        radius = ((x & 0xFFFF) + 0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
        angle = (x >> 16) * (math.pi * 2.0**-15)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=2)[:, :, :height]

    def _words(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the words of several draws, from one run of the generator.

        The counter is (position, epoch, name, index of the block of four words), the key the seed.
        """
        counts = [math.prod(shape) for shape in shapes.values()]
        blocks = [-(-count // 4) for count in counts]
        names = [_number(name) for name, number in zip(shapes, blocks, strict=True) for _ in range(number)]
        places = [block for number in blocks for block in range(number)]
        # Without blocking: so few bytes are on their way before the call returns.
        table = torch.tensor([names, places]).to(self.positions.device, non_blocking=True)
        words = philox((self.positions, self.epoch, table[0], table[1]), self.key)
        rows = torch.split(torch.stack(words, dim=-1), blocks, dim=1)
        return {
            name: row.flatten(1)[:, :count].reshape(-1, *shape)
            for (name, shape), row, count in zip(shapes.items(), rows, counts, strict=True)
        }


def philox(
    counter: tuple[Tensor, int | Tensor, Tensor, int | Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: Four words from 0 to 2^32 - 1, as int64 tensors (or numbers) that broadcast.
        key: Two words.

    Returns:
        Four words as int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high2, low2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, low2, c2, low0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number(name: str) -> int:
    """Return the word that stands for a name. The compiler takes it as given, as it does not know zlib."""
    return zlib.crc32(name.encode())


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of the product of two words.

    Nothing here leaves the range of int64, where a C++ compiler may do as it likes.
    """
    upper = (word * (factor >> 16) + ((word * (factor & 0xFFFF)) >> 16)) >> 16
    # factor - 2^32 is the same modulo 2^32, and less than half as large.
    return upper, (word * (factor - 2**32)) & _WORD


def _to_unit(words: Tensor) -> Tensor:
    """Return words as numbers in [0, 1)."""
    return (words >> 8).to(torch.float32) * 2.0**-24
