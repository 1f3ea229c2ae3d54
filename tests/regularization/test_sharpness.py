"""Measures of smoothness and width against closed forms on quadratics."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl.regularization.implicit import gradients_of_loss
from mtl.regularization.sharpness import (
    ascent_sharpness,
    difference_product,
    exact_product,
    input_gradient_norms,
    mean_sharpness,
    top_eigenvalue,
)


class Quadratic:
    """L = φᵀAφ / 2 + bᵀφ of six weights in two tensors, A with given eigenvalues."""

    def __init__(self, eigenvalues: list[float]) -> None:
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        self.matrix = basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T
        self.slope = torch.randn(6, dtype=torch.float64)
        self.parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((2, 2), (2,))]

    def point(self) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in self.parameters])

    def loss(self) -> Tensor:
        return self.point() @ self.matrix @ self.point() / 2 + self.slope @ self.point()


def test_the_gradient_by_each_sample_is_its_own() -> None:
    matrix = torch.randn(4, 4, dtype=torch.float64)
    matrix = matrix + matrix.T
    inputs = torch.randn(7, 2, 2, dtype=torch.float64)

    def losses(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat @ matrix * flat).sum(dim=1) / 2

    expected = (inputs.flatten(1) @ matrix).norm(dim=1)
    with torch.no_grad():
        torch.testing.assert_close(input_gradient_norms(losses, inputs), expected)
        torch.testing.assert_close(input_gradient_norms(lambda x: losses(x).sum(), inputs), expected)
    assert not inputs.requires_grad


def test_the_increase_where_sam_goes_is_that_of_a_quadratic() -> None:
    problem = Quadratic([3.0, 2.0, 1.0, 0.5, 0.1, 0.0])
    before = problem.point().detach().clone()
    gradient = problem.matrix @ before + problem.slope
    unit = gradient / gradient.norm()
    found = ascent_sharpness(problem.loss, problem.parameters, 0.4)
    expected = 0.4 * gradient.norm() + 0.4**2 / 2 * unit @ problem.matrix @ unit
    torch.testing.assert_close(found, expected)
    assert torch.equal(problem.point(), before)


def test_the_mean_increase_is_half_the_squared_distance_times_the_mean_eigenvalue() -> None:
    """It holds on average; the standard deviation of uᵀAu over directions is known, and the slope must not matter."""
    eigenvalues = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0])
    problem = Quadratic(eigenvalues.tolist())
    problem.slope *= 1000
    before = problem.point().detach().clone()
    found = mean_sharpness(problem.loss, problem.parameters, 0.4, pairs=500, seed=1).item()
    # Of uᵀAu on the sphere in n dimensions: 2 (tr A² - (tr A)² / n) / (n (n + 2)).
    variance = 2 * (eigenvalues.square().sum() - eigenvalues.sum() ** 2 / 6) / (6 * 8)
    error = 0.08 * (variance / 500).sqrt().item()
    assert found == pytest.approx(0.08 * eigenvalues.mean().item(), abs=4 * error)
    assert torch.equal(problem.point(), before)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "eigenvalues",
    [[3.0, 2.0, 1.0, 0.5, 0.1, 0.0], [2.0, 0.5, 0.1, 0.0, -1.0, -4.0], [-1.0, -2.0, -3, -4, -5, -6], [0] * 6],
)
def test_the_top_eigenvalue_is_the_largest_whatever_its_sign(eigenvalues: list[float], exact: bool) -> None:
    problem = Quadratic(eigenvalues)
    product: Callable[..., object] = (
        exact_product(problem.loss, problem.parameters)
        if exact
        else difference_product(lambda: gradients_of_loss(problem.loss(), problem.parameters), problem.parameters, 1e-2)
    )
    found = top_eigenvalue(product, problem.parameters, seed=0, iterations=300, tolerance=1e-7)
    assert found.item() == pytest.approx(max(eigenvalues), abs=1e-3)


def test_what_the_loss_does_not_curve_has_no_eigenvalue() -> None:
    """Weights that it does not reach, and some that it follows in proportion, beside one with a curvature of 8."""
    curved, straight, absent = (nn.Parameter(torch.full((1,), 3.0)) for _ in range(3))
    weights = [absent, straight, curved]
    product = exact_product(lambda: 4 * curved.square().sum() + straight.sum(), weights)
    assert [tensor.item() for tensor in product([torch.ones(1)] * 3)] == [0, 0, 8]
    assert top_eigenvalue(product, weights, seed=0).item() == pytest.approx(8)
    assert top_eigenvalue(exact_product(lambda: straight.sum(), weights), weights, seed=0).item() == 0
