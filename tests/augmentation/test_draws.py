"""Random numbers that belong to a sample of an epoch."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mtl.augmentation.draws import Draws, philox

WORD = 0xFFFFFFFF
words = st.integers(0, WORD)

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def draws(seed: int = 7, epoch: int | Tensor = 3, positions: object = range(8)) -> Draws:
    return Draws(seed, epoch, torch.tensor(list(positions)))


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's whole numbers, which have no largest."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second & WORD, first >> 32 ^ c[3] ^ k[1], first & WORD]
        k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
    return c


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    counter, key, result = ([int(word, 16) for word in text.split()] for text in (counter, key, result))
    assert reference(counter, key) == result
    assert [c.item() for c in philox(tuple(torch.tensor(c) for c in counter), tuple(key))] == result


@given(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2))
def test_philox_agrees_with_exact_arithmetic(counter, key):
    assert [c.item() for c in philox(tuple(torch.tensor(c) for c in counter), tuple(key))] == reference(counter, key)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    name=st.text(max_size=8),
    count=st.integers(1, 9),
)
def test_each_number_is_the_stated_function(seed, epoch, position, name, count):
    drawn = Draws(seed, epoch, torch.tensor([position])).words(name, (count,))[0]
    expected = [
        word
        for block in range(-(-count // 4))
        for word in reference([position, epoch, zlib.crc32(name.encode()), block], [seed & WORD, seed >> 32])
    ]
    assert drawn.tolist() == expected[:count]


@pytest.mark.parametrize("method", ["uniform", "normal", "words"])
def test_the_rest_of_the_batch_makes_no_difference(method):
    whole = getattr(draws(positions=range(100)), method)("crop", (3, 2))
    part = getattr(draws(positions=[70, 3, 3]), method)("crop", (3, 2))
    assert torch.equal(part, whole[[70, 3, 3]])


def test_draws_together_are_draws_alone():
    shapes = {"a": (), "b": (5,), "c": (2, 3), "d": (4,)}
    together = draws().uniforms(shapes)
    for name, shape in shapes.items():
        assert together[name].shape == (8, *shape)
        assert torch.equal(together[name], draws().uniform(name, shape))


def test_seed_epoch_position_and_name_all_matter():
    base = draws().uniform("a", (50,))
    assert torch.equal(base, draws(epoch=torch.tensor(3)).uniform("a", (50,)))
    others = [
        draws(seed=8).uniform("a", (50,)),
        draws(seed=7 + 2**32).uniform("a", (50,)),
        draws(epoch=4).uniform("a", (50,)),
        draws(positions=range(1, 9)).uniform("a", (50,)),
        draws().uniform("b", (50,)),
    ]
    assert all((base == other).float().mean() < 0.01 for other in others)
    # Fewer numbers of a name are the first of more.
    assert torch.equal(base[:, :3], draws().uniform("a", (3,)))


def test_distributions():
    some = draws(positions=range(2000))
    uniform = some.uniform("u", (10,))
    assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount(some.integers("i", 7, (10,)).flatten().numpy(), minlength=7)).pvalue > 1e-3
    assert abs(some.bernoulli("p", 0.3, (10,)).float().mean() - 0.3) < 4 * (0.3 * 0.7 / 20000) ** 0.5
    each = some.bernoulli("q", torch.linspace(0, 1, 2000)[:, None], (10,))
    assert not each[0].any() and each[-1].all()
    normal = some.normal("n", (10,)).double().flatten().numpy()
    assert abs(normal.mean()) < 4 / 20000**0.5
    assert abs(normal.var() - 1) < 4 * (2 / 20000) ** 0.5
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    # Neighbouring positions are as independent as any two numbers.
    assert abs(np.corrcoef(uniform[:-1].flatten(), uniform[1:].flatten())[0, 1]) < 4 / 20000**0.5


def test_the_largest_word_stays_below_one(monkeypatch):
    some = draws(positions=[0])
    for word, uniform in ((WORD, 1 - 2**-24), (0, 0.0)):
        monkeypatch.setattr(
            Draws, "_words", lambda _, shapes, word=word: {n: torch.full((1, *s), word) for n, s in shapes.items()}
        )
        assert some.uniform("u").item() == uniform
        assert some.integers("i", 2**31).item() == (2**31 - 1 if word else 0)
        assert some.normal("n").item() == pytest.approx(6 if word else -6, abs=1e-6)


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(np.corrcoef(a.flatten().double(), b.flatten().double())[0, 1])


def test_noise_is_normal_white_and_independent():
    image = torch.empty(6, 3, 120, 160)
    noise = draws(positions=[0, 1, 2, 3, 1000, 2**20]).normal_like("noise", image)
    assert noise.shape == image.shape and noise.dtype == torch.float32 and noise.isfinite().all()
    n = image[0].numel()
    for sample in noise.double():
        assert abs(sample.mean()) < 4 / n**0.5
        assert abs(sample.var() - 1) < 4 * (2 / n) ** 0.5
        assert abs((sample**3).mean()) < 4 * (15 / n) ** 0.5
        assert abs((sample**4).mean() - 3) < 4 * (96 / n) ** 0.5
        # The numbers are 2^16 radii times 2^16 angles, and these are many enough.
        assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-4
        # White: the periodogram of white noise is exponentially distributed about its mean.
        power = np.abs(np.fft.rfft(sample.flatten().numpy()))[1:-1] ** 2 / n
        assert stats.kstest(power, "expon").pvalue > 1e-4
    # The bound is for the largest of all the correlations below, about 50 of them.
    bound = 4.5 / n**0.5
    for f in (lambda x: x, torch.square, torch.abs):
        values = f(noise)
        assert all(correlation(values[i], values[j]) < bound for i in range(6) for j in range(i))
        flat = values.flatten(1)
        assert correlation(flat[0, : n // 2], flat[0, n // 2 :]) < bound * 2**0.5
        assert all(correlation(values[0][..., lag:], values[0][..., :-lag]) < 1.1 * bound for lag in (1, 2, 8))
        assert correlation(values[0][:, 1:], values[0][:, :-1]) < 1.1 * bound
        assert correlation(values[:, 0], values[:, 1]) < bound
    others = [
        draws(positions=[0]).normal_like("other", image[:1]),
        draws(positions=[0], epoch=4).normal_like("noise", image[:1]),
    ]
    assert all(correlation(noise[0], other) < bound for other in others)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_noise_of_any_shape_belongs_to_its_sample(batch, height, width):
    image = torch.empty(batch, 3, height, width)
    noise = draws(positions=range(batch)).normal_like("n", image)
    assert noise.shape == image.shape and noise.isfinite().all() and noise.abs().max() < 4.9
    assert torch.equal(noise[-1:], draws(positions=[batch - 1]).normal_like("n", image[-1:]))


def several(positions: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
    some = Draws(2**63 + 1, epoch, positions)
    return some.uniforms({"a": (), "b": (5,)})["b"], some.normal_like("c", torch.empty(3, 3, 5, 7, device=epoch.device))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break_and_with_the_same_bits(backend):
    positions, epoch = torch.tensor([0, 5, WORD]), torch.tensor(2)
    # The C++ or Triton that inductor writes may not rely on what happens when a whole number overflows.
    uniform, noise = torch.compile(several, fullgraph=True, backend=backend)(positions, epoch)
    assert torch.equal(uniform, several(positions, epoch)[0])
    torch.testing.assert_close(noise, several(positions, epoch)[1], rtol=0, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_on_a_gpu_without_waiting_for_it():
    positions, epoch = torch.tensor([0, 5, WORD]), torch.tensor(2)
    there = positions.cuda(), epoch.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        uniform, noise = several(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(uniform.cpu(), several(positions, epoch)[0])
    torch.testing.assert_close(noise.cpu(), several(positions, epoch)[1], rtol=0, atol=1e-5)
