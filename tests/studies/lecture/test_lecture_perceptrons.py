"""Many networks trained at once are each the one that torch trains; the figures on MNIST-1D show what they say."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mtl.studies.lecture import augmentation, performance
from mtl.studies.lecture.perceptron import Perceptrons


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(50, 8, generator=generator, dtype=torch.float64), torch.randint(3, (50,), generator=generator)


def test_each_network_is_torchs():
    signals, labels = data()
    networks = Perceptrons((8, 6, 5, 3), [3, 4], torch.float64)
    alone = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    layers = [layer for layer in alone if isinstance(layer, nn.Linear)]
    for layer, weight, bias in zip(layers, networks.weights, networks.biases, strict=True):
        layer.weight.data, layer.bias.data = weight[1].detach().T.clone(), bias[1, 0].detach().clone()
    generator = torch.Generator().manual_seed(4)
    for inputs, outputs in ((8, 6), (6, 5), (5, 3)):
        torch.rand(inputs, outputs, generator=generator, dtype=torch.float64)
    networks.train(signals, labels, rate=0.1, batch=20, epochs=4, momentum=0.9)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for chosen in torch.randperm(50, generator=generator).split(20):
            optimizer.zero_grad()
            functional.cross_entropy(alone(signals[chosen]), labels[chosen]).backward()
            optimizer.step()
    torch.testing.assert_close(networks(signals.expand(2, -1, -1))[1], alone(signals))
    wrong = (alone(signals).argmax(-1) != labels).double().mean() * 100
    assert networks.errors(signals, labels)[1] == wrong


def test_a_network_is_the_same_whichever_are_beside_it():
    signals, labels = data()
    outputs = []
    for seeds in ((7,), (1, 7)):
        networks = Perceptrons((8, 6, 3), seeds, torch.float64)
        networks.train(signals, labels, rate=0.1, batch=10, epochs=3)
        outputs.append(networks(signals.expand(len(seeds), -1, -1))[-1])
    torch.testing.assert_close(*outputs)


def test_weights_are_hes():
    networks = Perceptrons((40, 200, 10), [0], torch.float64)
    reference = nn.Linear(40, 200, dtype=torch.float64)
    nn.init.kaiming_uniform_(reference.weight, generator=torch.Generator().manual_seed(1))
    assert networks.weights[0].std().item() == pytest.approx(reference.weight.std().item(), rel=0.03)
    assert networks.weights[0].abs().max().item() == pytest.approx(reference.weight.abs().max().item(), rel=0.01)
    assert not networks.biases[0].any()


def test_copies_are_shifted_and_scaled():
    signals = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    both = augmentation.augmented(signals, 3)
    assert torch.equal(both[:20], signals)
    factors = []
    for signal, copy in zip(signals, both[20:], strict=True):
        # At the true shift the ratio is one number.
        ratios = torch.stack([copy / signal.roll(places) for places in range(40)])
        spread, place = (ratios.amax(1) - ratios.amin(1)).min(0)
        assert spread < 1e-4
        factors.append(ratios[place].mean().item())
    assert min(factors) >= 0.8 - 1e-5
    assert max(factors) <= 1.2 + 1e-5
    assert max(factors) - min(factors) > 0.2


def test_larger_steps_and_smaller_batches_generalize_better():
    """The lecture's figure at its ends, where the difference is several standard errors."""
    batch = performance.BATCH
    epochs = [round(performance.REACH / rate * batch / performance.TRAINING) for rate in (0.2, 0.8)]
    _, small_steps = performance.measure(range(6), 0.2, batch, epochs[0])
    training, large_steps = performance.measure(range(6), 0.8, batch, epochs[1])
    assert training.max() < 1  # memorized all the same
    assert large_steps.mean() < small_steps.mean() - 0.5


@pytest.mark.slow
def test_augmentation_is_worth_the_books_three_points():
    """Reference, ten seeds: 35.5 ± 1.2 % without, 32.1 ± 1.1 % with."""
    errors = augmentation.compare(range(4), augmentation.EPOCHS)
    assert errors[[0, 2]].max() < 0.5
    assert errors[1].mean() == pytest.approx(35.5, abs=1.8)
    assert errors[3].mean() == pytest.approx(32.1, abs=1.7)
    assert 1.5 < (errors[1] - errors[3]).mean() < 5.5


def test_the_augmentation_figure_writes_its_errors(tmp_path: Path):
    caption = augmentation.draw(tmp_path, quick=True)
    rows = csv.DictReader((tmp_path / "augmentation.csv").read_text().splitlines())
    errors = [float(row["y"]) for row in rows if row["series"].startswith("mean of 2 seeds")]
    assert len(errors) == 4
    assert all(30 < error < 90 for error in errors)
    assert f"{sum(errors[:2]) / 2:.1f} ±" in caption
    assert (tmp_path / "augmentation.png").read_bytes().startswith(b"\x89PNG")
