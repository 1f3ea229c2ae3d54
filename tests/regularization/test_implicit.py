"""Implicit terms against second derivatives, the theory's orders of convergence, and the lecture's figures."""

import itertools
from collections.abc import Callable

import gabor
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.regularization.displacement import ascend, displace
from mtl.regularization.implicit import (
    GradientOf,
    Gradients,
    batch_variance,
    gradient_moments,
    gradient_norm,
    gradients_of_loss,
    hessian_product,
    sharpness_aware,
)

START = torch.tensor([2.6, 8.5], dtype=torch.float64)
LossOfWeights = Callable[[Tensor], Tensor]


class Problem:
    """A small smooth network and three batches."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.parameters = list(self.net.parameters())
        self.batches = [(torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)) for _ in range(3)]

    def loss(self, *numbers: int) -> Tensor:
        """Return the mean loss of some batches."""
        losses = [(self.net(x) - y).square().mean() for x, y in (self.batches[n] for n in numbers)]
        return torch.stack(losses).mean()

    def gradient_of(self, *numbers: int) -> GradientOf:
        return lambda: gradients_of_loss(self.loss(*numbers), self.parameters)

    def exact(self, *numbers: int) -> tuple[Tensor, ...]:
        """Return the gradient of some batches' loss, with a graph."""
        return torch.autograd.grad(self.loss(*numbers), self.parameters, create_graph=True)


def squared(gradients: Gradients) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in gradients]).sum()


def relative(found: Gradients, expected: Gradients) -> float:
    difference = [a - b for a, b in zip(found, expected, strict=True)]
    return (squared(difference) / squared(expected)).sqrt().item()


def test_the_gradient_norm_is_that_of_double_backward_to_first_order_in_the_distance() -> None:
    problem = Problem()
    term = 0.3 / 4 * squared(problem.exact(0, 1, 2))
    expected = torch.autograd.grad(term, problem.parameters, materialize_grads=True)
    gradient_of = problem.gradient_of(0, 1, 2)
    errors = []
    for distance in (1e-2, 1e-3, 1e-4):
        found = gradient_norm(gradient_of, problem.parameters, gradient_of(), 0.3, distance)
        assert found.value.item() == pytest.approx(term.item(), rel=1e-12)
        errors.append(relative(found.gradients, expected))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_the_batch_variance_is_that_of_double_backward() -> None:
    problem = Problem()
    mean, own = problem.exact(0, 1, 2), [problem.exact(n) for n in range(3)]
    term = 0.3 / (4 * 3) * sum(squared([a - b for a, b in zip(g, mean, strict=True)]) for g in own)
    expected = torch.autograd.grad(term, problem.parameters, materialize_grads=True)
    gradients_of = [problem.gradient_of(n) for n in range(3)]
    gradients = [gradient_of() for gradient_of in gradients_of]
    found = batch_variance(gradients_of, problem.parameters, gradients, 0.3, 1e-5)
    assert found.value.item() == pytest.approx(term.item(), rel=1e-12)
    assert relative(found.gradients, expected) < 1e-4


def test_both_terms_are_the_mean_of_the_batches_own_gradient_norms() -> None:
    """So accumulation over small batches, each with its own gradient norm, is both terms of the large batch."""
    problem = Problem()
    gradients_of = [problem.gradient_of(n) for n in range(3)]
    gradients = [gradient_of() for gradient_of in gradients_of]
    whole = problem.gradient_of(0, 1, 2)
    norm = gradient_norm(whole, problem.parameters, whole(), 0.3, 1e-5)
    variance = batch_variance(gradients_of, problem.parameters, gradients, 0.3, 1e-5)
    each = [
        gradient_norm(gradient_of, problem.parameters, own, 0.3, 1e-5)
        for gradient_of, own in zip(gradients_of, gradients, strict=True)
    ]
    assert (norm.value + variance.value).item() == pytest.approx(sum(term.value.item() for term in each) / 3)
    both = [a + b for a, b in zip(norm.gradients, variance.gradients, strict=True)]
    assert relative([sum(parts) / 3 for parts in zip(*(term.gradients for term in each), strict=True)], both) < 1e-4


def test_moments_are_those_of_numpy_and_are_the_values_of_the_terms() -> None:
    problem = Problem()
    gradients_of = [problem.gradient_of(n) for n in range(3)]
    gradients = [gradient_of() for gradient_of in gradients_of]
    flat = np.stack([torch.cat([tensor.flatten() for tensor in own]).numpy() for own in gradients])
    found = gradient_moments(iter(gradients))
    assert found.squared_norm.item() == pytest.approx(float((flat.mean(0) ** 2).sum()), rel=1e-12)
    assert found.variance.item() == pytest.approx(float(flat.var(0).sum()), rel=1e-12)
    term = batch_variance(gradients_of, problem.parameters, gradients, 0.3)
    assert (0.3 / 4 * found.variance).item() == pytest.approx(term.value.item(), rel=1e-12)
    assert gradient_moments(gradients[:1]).variance.item() == 0


def test_single_and_mixed_precision_are_precise_enough_at_the_default_distance() -> None:
    problem = Problem(torch.float32)
    exact = torch.autograd.grad(squared(problem.exact(0, 1, 2)) / 2, problem.parameters, materialize_grads=True)

    def error(autocast: bool) -> float:
        def gradient_of() -> Gradients:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = problem.loss(0, 1, 2)
            return gradients_of_loss(loss, problem.parameters)

        gradients = gradient_of()
        return relative(hessian_product(gradient_of, problem.parameters, gradients, gradients), exact)

    assert error(autocast=False) < 0.05
    assert error(autocast=True) < 0.15


def test_a_step_along_the_term_makes_the_gradient_of_a_network_with_kinks_smaller_as_the_second_derivative_does() -> (
    None
):
    net = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
    parameters, inputs, labels = list(net.parameters()), torch.randn(100, 20), torch.randint(5, (100,))

    def gradient_of() -> list[Tensor]:
        return gradients_of_loss(nn.functional.cross_entropy(net(inputs), labels), parameters)

    def remaining(direction: Gradients) -> float:
        """Return the share of the squared norm that is left after a step of a tenth against a direction."""
        before = squared(gradient_of()).item()
        undo = ascend(parameters, direction, -0.1)
        after = squared(gradient_of()).item()
        undo()
        return after / before

    first = torch.autograd.grad(nn.functional.cross_entropy(net(inputs), labels), parameters, create_graph=True)
    exact = torch.autograd.grad(squared(first), parameters)
    term = gradient_norm(gradient_of, parameters, gradient_of(), 0.1)
    assert remaining(exact) < 0.95
    assert remaining(term.gradients) == pytest.approx(remaining(exact), abs=0.12)


def test_compiled_models_have_no_second_derivative_and_need_none() -> None:
    problem = Problem()
    eager = gradient_norm(problem.gradient_of(0), problem.parameters, problem.gradient_of(0)(), 0.3)
    problem.net.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        torch.autograd.grad(squared(problem.exact(0)), problem.parameters)
    compiled = gradient_norm(problem.gradient_of(0), problem.parameters, problem.gradient_of(0)(), 0.3)
    assert relative(compiled.gradients, eager.gradients) < 1e-9


def descended(loss: LossOfWeights, start: Tensor, alpha: float, steps: int) -> Tensor:
    phi = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = gradients_of_loss(loss(phi), [phi])
        with torch.no_grad():
            phi -= alpha * gradient
    return phi.detach()


def flowed(gradient: Callable[[Tensor], Tensor], start: Tensor, time: float) -> Tensor:
    """Return where the continuous path against a gradient is after a time, by an adaptive Runge-Kutta method."""

    def velocity(_: float, phi: np.ndarray) -> np.ndarray:
        return -gradient(torch.tensor(phi, requires_grad=True)).numpy()

    return torch.tensor(solve_ivp(velocity, (0, time), start.numpy(), method="DOP853", rtol=1e-8, atol=1e-10).y[:, -1])


def plus_norm(loss: LossOfWeights, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return the gradient of L + α/4 ‖∂L/∂φ‖²."""

    def gradient(phi: Tensor) -> Tensor:
        plain = gradients_of_loss(loss(phi), [phi])
        term = gradient_norm(lambda: gradients_of_loss(loss(phi), [phi]), [phi], plain, alpha, 1e-6)
        return plain[0] + term.gradients[0]

    return gradient


def test_descent_follows_flow_to_first_order_and_flow_with_the_term_to_second() -> None:
    """On the Gabor model: halving the step halves the distance without the term, and quarters it with it."""
    assert gabor.loss(torch.tensor([-5.0, 25.0])).item() == pytest.approx(6.297676, abs=1e-6)
    without, with_term = [], []
    for alpha in (0.025, 0.0125, 0.00625):
        end = descended(gabor.loss, START, alpha, round(0.4 / alpha))
        without.append((end - flowed(plus_norm(gabor.loss, 0.0), START, 0.4)).norm().item())
        with_term.append((end - flowed(plus_norm(gabor.loss, alpha), START, 0.4)).norm().item())
    for distances, order in ((without, 1), (with_term, 2)):
        orders = np.log2(np.divide(distances[:-1], distances[1:]))
        np.testing.assert_allclose(orders, order, atol=0.1)


def test_an_epoch_of_sgd_over_all_orders_follows_flow_with_both_terms() -> None:
    """Smith et al. 2021: the mean over all orders of the batches is off by α³ with the variance term, else by α²."""
    batches: list[LossOfWeights] = [lambda phi, b=b: gabor.loss(phi, slice(b, None, 3)) for b in range(3)]
    without, with_term = [], []
    for alpha in (0.01, 0.005):
        ends = []
        for order in itertools.permutations(batches):
            phi = START
            for loss in order:
                phi = descended(loss, phi, alpha, 1)
            ends.append(phi)
        norm = plus_norm(lambda phi: gabor.loss(phi) / 3, alpha)

        def both(phi: Tensor, alpha: float = alpha, norm: Callable[[Tensor], Tensor] = norm) -> Tensor:
            gradients_of = [lambda loss=loss: gradients_of_loss(loss(phi), [phi]) for loss in batches]
            term = batch_variance(gradients_of, [phi], [gradient() for gradient in gradients_of], alpha, 1e-6)
            return norm(phi) + term.gradients[0]

        end = torch.stack(ends).mean(dim=0)
        without.append((end - flowed(norm, START, 3 * alpha)).norm().item())
        with_term.append((end - flowed(both, START, 3 * alpha)).norm().item())
    assert np.log2(without[0] / without[1]) == pytest.approx(2, abs=0.15)
    assert np.log2(with_term[0] / with_term[1]) == pytest.approx(3, abs=0.2)


def test_the_lectures_paths_end_where_they_do() -> None:
    """Prince 2023, 9.2: its "continuous" path has steps of 0.001, which add a term of their own to either path."""

    def loss(phi: Tensor) -> Tensor:
        return 1 - (-phi[1].square() / (2 * (-4 * phi[0].square()).exp())).exp()

    start = torch.tensor([-0.7, -0.75], dtype=torch.float64)
    discrete = descended(loss, start, 0.05, 100)
    np.testing.assert_allclose(discrete, [-0.207806, -0.001487], atol=1e-6)
    continuous = flowed(plus_norm(loss, 0.001), start, 10)
    with_term = flowed(plus_norm(loss, 0.05 + 0.001), start, 10)
    np.testing.assert_allclose(continuous, [-0.226872, -0.000003], atol=1e-4)
    np.testing.assert_allclose(with_term, [-0.208891, -0.000003], atol=1e-4)
    assert (continuous - discrete).norm().item() == pytest.approx(0.01912, abs=1e-4)
    assert (with_term - discrete).norm().item() == pytest.approx(0.00184, abs=1e-4)


def test_sam_is_the_gradient_where_the_ascent_ends() -> None:
    """On L = φᵀAφ / 2, over two tensors, the formula is A (φ + ρ Aφ / ‖Aφ‖)."""
    root = torch.randn(5, 5, dtype=torch.float64)
    matrix = root @ root.T
    phi = [torch.randn(2, dtype=torch.float64).requires_grad_(), torch.randn(3, dtype=torch.float64).requires_grad_()]
    before = torch.cat(phi).detach().clone()

    def gradient_of() -> list[Tensor]:
        point = torch.cat(phi)
        return gradients_of_loss(point @ matrix @ point / 2, phi)

    found = torch.cat(list(sharpness_aware(gradient_of, phi, gradient_of(), 0.7)))
    slope = matrix @ before
    torch.testing.assert_close(found, matrix @ (before + 0.7 * slope / slope.norm()))
    assert torch.equal(torch.cat(phi), before)


def test_weights_come_back_bit_by_bit_even_after_a_failure() -> None:
    awkward = torch.tensor([0.1, -0.0, 1e-45, 1e30, float("nan")])
    weight = nn.Parameter(awkward.clone())

    def fail() -> Gradients:
        assert weight[0].item() != awkward[0].item()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpness_aware(fail, [weight], [torch.ones(5)], 0.3)
    assert torch.equal(weight.view(torch.int32), awkward.view(torch.int32))
    with pytest.raises(RuntimeError):
        displace([weight, weight], [torch.ones(5), torch.ones(4)])
    assert torch.equal(weight.view(torch.int32), awkward.view(torch.int32))


def test_weights_stay_where_there_is_no_direction() -> None:
    weight = nn.Parameter(torch.ones(3))
    for direction in (torch.zeros(3), torch.tensor([1.0, torch.inf, 0.0]), torch.tensor([1.0, torch.nan, 0.0])):
        undo = ascend([weight], [direction], 0.05)
        assert torch.equal(weight, torch.ones(3))
        undo()
    term = gradient_norm(lambda: [torch.zeros(3)], [weight], [torch.zeros(3)], 0.1)
    assert term.value.item() == 0
    assert torch.equal(term.gradients[0], torch.zeros(3))


def test_what_half_precision_scales_comes_back_unscaled() -> None:
    problem = Problem()
    scaled = gradients_of_loss(problem.loss(0), problem.parameters, torch.tensor(1024.0))
    assert relative(scaled, problem.exact(0)) < 1e-12
    extra = nn.Parameter(torch.ones(2))
    assert torch.equal(gradients_of_loss(problem.loss(0), [*problem.parameters, extra])[-1], torch.zeros(2))
    assert all(parameter.grad is None for parameter in problem.parameters)


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"bfloat16 cannot be moved .* --precision 32-true"):
        ascend([torch.ones(2, dtype=torch.bfloat16)], [torch.ones(2)], 0.05)
