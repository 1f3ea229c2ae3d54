"""Noise: what it costs on average, in closed form, and that it goes as it came."""

import math

import pytest
import torch
from torch import Tensor, nn

from mtl.augmentation.draws import Draws
from mtl.regularization.noise import jittered_depth, noisy_inputs, noisy_weights, redrawn_labels
from mtl.regularization.penalties import Penalties, counted_weights


def draws(samples: int, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, torch.arange(samples))


def noise_on(weight: Tensor, seed: int, step: int, batch: int = 0) -> Tensor:
    before = weight.detach().clone()
    with noisy_weights([weight], 1.0, seed, step, batch):
        return weight.detach() - before


def test_noise_on_weights_is_fresh_at_each_step_and_the_same_when_repeated() -> None:
    weight = torch.zeros(40, 50)
    first = noise_on(weight, 3, 7)
    assert torch.equal(noise_on(weight, 3, 7), first)
    others = [noise_on(weight, 3, 8), noise_on(weight, 4, 7), noise_on(weight, 3, 7, 1)]
    with noisy_weights([torch.zeros_like(weight), weight], 1.0, 3, 7):
        others.append(weight.clone())
    for other in others:
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(2000)
    assert first.mean().item() == pytest.approx(0, abs=4 / math.sqrt(2000))
    assert first.std().item() == pytest.approx(1, abs=4 / math.sqrt(4000))


def test_weights_come_back_bit_by_bit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), noisy_weights(list(counted_weights(model).values()), 1e3, 0, 0):
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert torch.equal(model[0].bias, before["0.bias"])
        assert torch.equal(model[1].weight, before["1.weight"])
        _ = 1 / 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_gradient_is_that_at_the_noisy_weights_and_none_is_computed_too_late() -> None:
    weight, inputs = nn.Parameter(torch.randn(3, 2)), torch.randn(5, 3)
    with noisy_weights([weight], 0.5, 0, 0):
        (inputs @ weight).square().sum().backward()
        expected = 2 * inputs.T @ inputs @ weight.detach()
    torch.testing.assert_close(weight.grad, expected)
    with noisy_weights([weight], 0.5, 0, 1):
        loss = (inputs @ weight).square().sum() * weight.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_noise_on_weights_adds_the_trace_of_the_hessian() -> None:
    """E of (φ + σn)ᵀA(φ + σn)/2 is φᵀAφ/2 + σ²/2 tr(A); the mean's standard error is known too."""
    root, weight = torch.randn(6, 6), torch.randn(1, 6)
    matrix = root @ root.T

    def loss() -> float:
        return (weight @ matrix @ weight.T / 2).item()

    clean, noisy = loss(), []
    for step in range(1000):
        with noisy_weights([weight], 0.3, 0, step):
            noisy.append(loss())
    variance = 0.3**2 * (matrix @ weight[0]).square().sum() + 0.3**4 / 2 * matrix.square().sum()
    expected = clean + 0.3**2 / 2 * matrix.trace().item()
    assert sum(noisy) / 1000 == pytest.approx(expected, abs=3.5 * math.sqrt(variance.item() / 1000))


def test_noise_on_a_linear_models_inputs_is_l2_with_its_variance() -> None:
    """Least squares over many noisy copies ends where the mean squared error + σ² ‖w‖² is least."""
    inputs, copies, sigma = torch.randn(40, 5, dtype=torch.float64), 4000, 0.6
    targets = inputs @ torch.randn(5, 1, dtype=torch.float64) + 0.3 * torch.randn(40, 1, dtype=torch.float64)
    noisy = noisy_inputs(inputs.repeat(copies, 1), sigma, draws(40 * copies))
    found = torch.linalg.lstsq(noisy, targets.repeat(copies, 1)).solution
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(found.T)
    residual = (targets.repeat(copies, 1) - noisy @ found).square().mean()
    clean = (targets - model(inputs)).square().mean() + Penalties(model, l2=sigma**2)()
    assert clean.item() == pytest.approx(residual.item(), rel=0.01)
    clean.backward()
    assert model.weight.grad is not None
    without_penalty = 2 * sigma**2 * found.norm().item()
    assert model.weight.grad.norm().item() < 0.02 * without_penalty


def test_depth_is_jittered_in_proportion_with_the_same_median_where_it_is_known() -> None:
    depth = torch.full((4, 1, 64, 64), 3.0)
    depth[:, :, :8] = 0
    jittered = jittered_depth(depth, 0.2, draws(4))
    assert jittered.dtype == torch.float32
    assert torch.equal(jittered == 0, depth == 0)
    logarithms = (jittered[:, :, 8:] / 3).log()
    count = logarithms.numel()
    assert logarithms.mean().item() == pytest.approx(0, abs=4 * 0.2 / math.sqrt(count))
    assert logarithms.std().item() == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(2 * count))
    assert torch.equal(jittered_depth(depth[2:], 0.2, Draws(0, 0, torch.tensor([2, 3]))), jittered[2:])
    assert torch.equal(jittered_depth(depth, 0.0, draws(4)), depth)


@pytest.mark.parametrize(("shape", "dtype"), [((40_000,), torch.int64), ((10, 64, 64), torch.uint8)])
def test_labels_are_redrawn_from_all_classes_in_the_share_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = torch.full(shape, 2, dtype=dtype)
    labels[:1] = 255
    redrawn = redrawn_labels(labels, 0.3, 5, draws(shape[0]))
    assert redrawn.dtype == dtype
    assert (redrawn[:1] == 255).all()
    shares = torch.bincount(redrawn[1:].flatten().long(), minlength=5) / redrawn[1:].numel()
    # One in five of those redrawn is the true one again.
    expected = torch.tensor([0.06, 0.06, 0.76, 0.06, 0.06])
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * math.sqrt(0.76 * 0.24 / redrawn[1:].numel()))
    assert torch.equal(redrawn_labels(labels, 0.0, 5, draws(shape[0])), labels)
