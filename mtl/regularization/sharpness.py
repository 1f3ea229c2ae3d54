"""Measures of how smooth a function and how wide a minimum is, to compare what regularization works through."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtl.regularization.displacement import Gradients, ascend, normal_like, total_norm
from mtl.regularization.implicit import GradientOf, gradients_of_loss, hessian_product

LossOf = Callable[[], Tensor]
"""Returns the loss, a scalar, at the weights that the model has now; the same when asked again."""

HessianProduct = Callable[[Gradients], Gradients]
"""Returns the product of the loss's Hessian with a vector."""


def input_gradient_norms(losses_of: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return the norm of the gradient of each sample's loss by its input, (B,): zero where nothing depends on it.

    The smoother a function, the smaller (Drucker & Le Cun 1992; Novak et al. 2018, "Sensitivity and generalization in
    neural networks"). Samples must not see each other, as they do in batch normalisation while it trains.

    Args:
        losses_of: From inputs (B, ...) to their losses (B,), or to the sum of these.
        inputs: Floats.
    """
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(losses_of(inputs).sum(), inputs)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return norms


def ascent_sharpness(loss_of: LossOf, parameters: Sequence[Tensor], rho: float) -> Tensor:
    """Return L(φ + ρ g / ‖g‖) - L(φ): the largest increase within a distance of ρ, where SAM expects it.

    Foret et al. 2021, equation 2, with the maximum where its first-order estimate has it.

    Args:
        loss_of: Is asked twice.
        parameters: The weights φ.
        rho: ρ.
    """
    with torch.enable_grad():
        loss = loss_of()
    undo = ascend(parameters, gradients_of_loss(loss, parameters), rho)
    try:
        with torch.no_grad():
            return loss_of() - loss.detach()
    finally:
        undo()


@torch.no_grad()
def mean_sharpness(loss_of: LossOf, parameters: Sequence[Tensor], rho: float, pairs: int, seed: int) -> Tensor:
    """Return the mean of L(φ + ρ u) - L(φ) over random directions u: near a minimum, ρ²/2 times H's mean eigenvalue.

    Directions are taken with their opposites, so that the slope, which is not sharpness, cancels.

    Args:
        loss_of: Is asked once, and twice for each pair.
        parameters: The weights φ.
        rho: ρ, at which all of the directions end.
        pairs: Number of pairs of directions.
        seed: Decides the directions.
    """
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    loss = loss_of()
    increases = []
    for _ in range(pairs):
        direction = [normal_like(parameter, generator) for parameter in parameters]
        for distance in (rho, -rho):
            undo = ascend(parameters, direction, distance)
            try:
                increases.append(loss_of() - loss)
            finally:
                undo()
    return torch.stack(increases).mean()


def exact_product(loss_of: LossOf, parameters: Sequence[Tensor]) -> HessianProduct:
    """Return the product with the Hessian by a second derivative, which compiled models and fused attention lack.

    Args:
        loss_of: Is asked once, now: the graph is kept as long as the product is.
        parameters: The weights.
    """
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(), parameters, create_graph=True, materialize_grads=True)
    # Weights that the loss does not reach, or only in proportion, have a gradient without a graph.
    curved = [place for place, gradient in enumerate(gradients) if gradient.requires_grad]

    def product(vector: Gradients) -> Gradients:
        return torch.autograd.grad(
            [gradients[place] for place in curved],
            parameters,
            [vector[place] for place in curved],
            retain_graph=True,
            materialize_grads=True,
        )

    return product


def difference_product(gradient_of: GradientOf, parameters: Sequence[Tensor], distance: float) -> HessianProduct:
    """Return the product with the Hessian by a difference of gradients, see `hessian_product`.

    Args:
        gradient_of: Is asked once now, and once for each product.
        parameters: The weights.
        distance: How far they move.
    """
    gradients = [tensor.clone() for tensor in gradient_of()]
    return lambda vector: hessian_product(gradient_of, parameters, gradients, vector, distance)


def top_eigenvalue(
    product: HessianProduct,
    parameters: Sequence[Tensor],
    seed: int,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Tensor:
    """Return the largest eigenvalue of the loss's Hessian, by power iteration (Yao et al. 2020, "PyHessian").

    The iteration finds the eigenvalue of largest size. Where that is negative, a second one, on the Hessian less it,
    finds the largest.

    Args:
        product: `exact_product` or `difference_product`.
        parameters: The weights.
        seed: Decides where the iteration starts.
        iterations: At most so many products for each of the two iterations.
        tolerance: Relative change of the eigenvalue at which the iteration ends.
    """
    extreme = _power_iteration(product, parameters, seed, iterations, tolerance)
    if extreme >= 0:
        return extreme

    def shifted(vector: Gradients) -> Gradients:
        return [image - extreme * tensor for image, tensor in zip(product(vector), vector, strict=True)]

    return extreme + _power_iteration(shifted, parameters, seed, iterations, tolerance)


def _power_iteration(
    product: HessianProduct, parameters: Sequence[Tensor], seed: int, iterations: int, tolerance: float
) -> Tensor:
    """Return the eigenvalue of largest size of a symmetric matrix."""
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    vector: Gradients = [normal_like(parameter, generator) for parameter in parameters]
    value = torch.zeros_like(total_norm(vector))
    for _ in range(iterations):
        norm = total_norm(vector)
        if norm == 0:
            return norm
        vector = [tensor / norm for tensor in vector]
        image = product(vector)
        before = value
        value = torch.stack([(a * b).sum() for a, b in zip(image, vector, strict=True)]).sum()
        if (value - before).abs() <= tolerance * value.abs():
            break
        vector = image
    return value
