"""The Gabor model's figures against the book's numbers, automatic differentiation and the theory's orders."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl.studies.lecture import batch_variance, flow, gabor, prior

POINTS = np.random.default_rng(0).uniform(gabor.LOW, gabor.HIGH, (20, 2))


def test_the_loss_and_its_gradient_are_the_books():
    assert gabor.loss(np.array([0.6, -0.2])) == pytest.approx(16.419, abs=5e-4)
    assert gabor.loss(np.array([-5.0, 25.0])) == pytest.approx(6.297676, abs=1e-6)
    assert gabor.gradient(np.array([-5.0, 25.0])) == pytest.approx([3.343805, 0.519156], abs=1e-6)


def test_the_gradient_is_autograds():
    phi = torch.tensor(POINTS, requires_grad=True)
    u = phi[:, :1] + 0.06 * phi[:, 1:] * torch.tensor(gabor.X)
    outputs = torch.sin(u) * torch.exp(-u * u / 32)
    (outputs - torch.tensor(gabor.Y)).square().sum().backward()
    np.testing.assert_allclose(gabor.gradient(POINTS), phi.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "count", "optimum", "least"),
    [
        (0.0, 10, (0.003795, 16.026343), 0.645696),
        (0.01, 10, (0.00891, 15.72841), 0.759501),
        (0.2, 5, (0.085763, 13.799294), 1.540178),
        (1.0, 1, (0.109315, 12.917534), 1.973245),
    ],
)
def test_minima_vanish_and_the_optimum_moves(strength: float, count: int, optimum: tuple[float, float], least: float):
    minima = gabor.find_minima(strength)
    assert len(minima.on_grid) == count
    assert minima.optimum == pytest.approx(optimum, abs=1e-5)
    value = gabor.loss(minima.optimum) + strength * ((minima.optimum - [0, 12.5]) ** 2).sum()
    assert value == pytest.approx(least, abs=1e-6)
    # Each is one: the gradient is zero, and whatever direction leads up.
    around = minima.true[:, None] + 1e-3 * np.stack(
        [np.cos(np.arange(12) / 6 * np.pi), np.sin(np.arange(12) / 6 * np.pi)], -1
    )
    height = gabor.loss(minima.true) + strength * gabor.penalty(minima.true)
    assert (gabor.loss(around) + strength * gabor.penalty(around) > height[:, None]).all()


def test_descent_with_and_without_the_prior_is_the_books():
    plain = gabor.descend(prior.START, 0.0, prior.RATE, prior.STEPS)
    steps = [0, 1, 9, 17, 25, 33, 41]
    known = [18.503199, 18.282831, 12.456811, 8.339976, 6.458681, 5.849695, 5.643186]
    assert gabor.loss(plain[steps]) == pytest.approx(known, abs=1e-6)
    assert plain[-1] == pytest.approx([6.054994, 12.837099], abs=1e-6)
    regularized = gabor.descend(prior.START, 0.2, prior.RATE, prior.STEPS)
    known = [23.055199, 23.007160, 8.326939, 3.275183, 1.965121, 1.658874, 1.575801]
    total = gabor.loss(regularized) + 0.2 * gabor.penalty(regularized)
    assert total[steps] == pytest.approx(known, abs=1e-6)
    assert regularized[-1] == pytest.approx([0.102658, 13.480035], abs=1e-6)
    assert gabor.loss(regularized[-1]) == pytest.approx(1.381600, abs=1e-6)


def test_the_prior_figures_numbers_are_what_it_shows(tmp_path: Path):
    caption = prior.draw(tmp_path, quick=True)
    rows = list(csv.DictReader((tmp_path / "prior.csv").read_text().splitlines()))
    counts = {row["x"]: row["y"] for row in rows if row["series"].startswith("lower than 8")}
    assert counts == {"0": "10", "0.2": "5", "1": "1"}
    assert "10 at λ = 0, 5 at λ = 0.2, 1 at λ = 1" in caption
    surface = [row for row in rows if row["panel"].startswith("loss (λ = 0)") and row["series"] == "surface"]
    assert len(surface) == 100 * 100
    some = surface[4321]
    assert float(some["value"]) == pytest.approx(float(gabor.loss(np.array([float(some["x"]), float(some["y"])]))))


def test_descent_follows_flow_with_the_extra_term():
    paths = flow.compare(flow.RATE, flow.STEPS, flow.FINE, flow.FINE_STEPS)
    assert flow.valley(flow.START) == pytest.approx(0.864215, abs=1e-6)
    assert paths.finite[-1] == pytest.approx([-0.207806, -0.001487], abs=1e-6)
    assert paths.flow[-1] == pytest.approx([-0.226872, -0.000003], abs=1e-6)
    assert paths.modified[-1] == pytest.approx([-0.208891, -0.000003], abs=1e-6)
    assert paths.gaps == pytest.approx((0.01912, 0.00184), abs=5e-6)


def test_the_extra_term_is_right_to_second_order_in_the_step():
    coarse, fine = (np.array(flow.gaps(rate, 1.0)) for rate in (0.02, 0.01))
    orders = np.log2(coarse / fine)
    assert orders == pytest.approx([1, 2], abs=0.15)


def test_the_batches_gradients_are_autograds():
    phi = torch.tensor(POINTS[0], requires_grad=True)
    u = phi[0] + 0.06 * phi[1] * torch.tensor(gabor.X)
    losses = (torch.sin(u) * torch.exp(-u * u / 32) - torch.tensor(gabor.Y)).square().reshape(6, 5).mean(1)
    jacobian = torch.stack([torch.autograd.grad(loss, phi, retain_graph=True)[0] for loss in losses])
    np.testing.assert_allclose(batch_variance.batch_gradients(POINTS[0]), jacobian, rtol=1e-10)
    of_descent, of_batches = batch_variance.terms(POINTS[0])
    # B times the mean of squares is the square of the mean and the population variance.
    assert of_descent + of_batches == pytest.approx(float(jacobian.square().sum()) / 6 / 4)


def test_sgd_follows_flow_with_both_terms():
    """Smith et al. 2021: the mean over the batches' orders differs in the third order of the step, without the terms
    in the second."""
    plain, both = (
        [batch_variance.gap(rate, gradient_term=terms, variance_term=terms) for rate in (0.05, 0.025)]
        for terms in (False, True)
    )
    assert np.log2(plain[0] / plain[1]) == pytest.approx(2, abs=0.1)
    assert np.log2(both[0] / both[1]) == pytest.approx(3, abs=0.2)
    without_variance = batch_variance.gap(0.05, gradient_term=True, variance_term=False)
    assert both[0] < 0.05 * without_variance < 0.05 * plain[0]
