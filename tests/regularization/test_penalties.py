"""Penalties against closed forms, torch's own weight decay, and what they are to count."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.regularization.penalties import Penalties, counted_weights
from mtl.transfer.groups import parameter_groups


def regression(samples: int = 30, features: int = 6) -> tuple[Tensor, Tensor, nn.Linear]:
    inputs = torch.randn(samples, features, dtype=torch.float64)
    targets = inputs @ torch.randn(features, 1, dtype=torch.float64) + 0.5 * torch.randn(samples, 1).double()
    return inputs, targets, nn.Linear(features, 1, bias=False, dtype=torch.float64)


def minimise(model: nn.Module, inputs: Tensor, targets: Tensor, likelihood: float, penalties: Penalties) -> None:
    """Minimise likelihood * squared error + penalties, of which neither has a kink."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = likelihood * (model(inputs) - targets).square().sum() + penalties()
        loss.backward()
        return loss.item()

    optimizer.step(closure)


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
def test_l2_is_the_map_of_a_gaussian_prior(l2: float) -> None:
    """The posterior mean comes from conditioning the joint Gaussian of weights and targets, not from a minimum."""
    inputs, targets, model = regression()
    noise, prior = 0.25, 1 / (2 * l2)
    minimise(model, inputs, targets, 1 / (2 * noise), Penalties(model, l2=l2))
    covariance = prior * inputs @ inputs.T + noise * torch.eye(len(inputs), dtype=torch.float64)
    posterior = prior * inputs.T @ torch.linalg.solve(covariance, targets)
    torch.testing.assert_close(model.weight.detach().T, posterior, rtol=1e-6, atol=1e-7)


def test_l2_sp_is_the_map_of_a_gaussian_prior_about_the_start_and_l2_of_one_about_zero() -> None:
    inputs, targets, _ = regression()
    body, head = nn.Linear(4, 1, bias=False, dtype=torch.float64), nn.Linear(2, 1, bias=False, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x[:, :4]) + self.head(x[:, 4:])

    model = Model()
    mean = torch.cat([body.weight.detach().T, torch.zeros(2, 1)]).clone()
    variances = torch.tensor([1 / (2 * 3.0)] * 4 + [1 / (2 * 0.2)] * 2, dtype=torch.float64)
    minimise(model, inputs, targets, 1 / (2 * 0.25), Penalties(model, l2=0.2, l2_sp=3.0, pretrained=body))
    covariance = inputs @ (variances[:, None] * inputs.T) + 0.25 * torch.eye(len(inputs), dtype=torch.float64)
    posterior = mean + variances[:, None] * inputs.T @ torch.linalg.solve(covariance, targets - inputs @ mean)
    found = torch.cat([body.weight.detach().T, head.weight.detach().T])
    torch.testing.assert_close(found, posterior, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_l1_thresholds_softly_on_an_orthogonal_design_and_l2_shrinks_beside_it(l2: float) -> None:
    """Tibshirani 1996 (equation 3), Zou & Hastie 2005 (equation 6), for half of the squared error."""
    inputs = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q
    truth = torch.tensor([3.0, -2.0, 1.0, -0.6, 0.3, 0.0, 0.1, -0.05], dtype=torch.float64)
    targets = (inputs @ truth)[:, None] + 0.05 * torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(8, 1, bias=False, dtype=torch.float64)
    penalties = Penalties(model, l1=0.4, l2=l2)
    for step in range(1000):
        loss = (model(inputs) - targets).square().sum() / 2 + penalties()
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        with torch.no_grad():
            model.weight -= 0.3 * 0.993**step * gradient
    least_squares = (inputs.T @ targets)[:, 0]
    expected = F.softshrink(least_squares, 0.4) / (1 + 2 * l2)
    assert (expected == 0).sum() >= 3
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=0, atol=1e-3)


def test_l2_is_half_of_sgds_weight_decay_and_spares_what_it_spares() -> None:
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
    nn.init.normal_(first[1].weight)
    second, images = copy.deepcopy(first), torch.randn(8, 3, 6, 6, dtype=torch.float64)
    penalties = Penalties(first, l2=0.03)
    ours = torch.optim.SGD(parameter_groups(first, 0.0), lr=0.1, momentum=0.9, nesterov=True)
    theirs = torch.optim.SGD(parameter_groups(second, 0.06), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(10):
        for model, optimizer, penalty in ((first, ours, penalties), (second, theirs, lambda: 0.0)):
            optimizer.zero_grad()
            (model(images).square().mean() + penalty()).backward()
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_transformers_norms_biases_and_positions_do_not_count() -> None:
    model = nn.ModuleDict({"backbone": Backbone("vit_tiny_patch16_224", (64, 64)), "head": nn.Conv2d(4, 2, 1)})
    names = counted_weights(model)
    assert {"head.weight", "backbone.encoder.model.blocks.0.attn.qkv.weight"} <= set(names)
    assert not [name for name in names if any(part in name for part in ("norm", "bias", "pos_embed", "cls_token"))]
    # Of a vision transformer: the patches' projection, and four matrices in each of twelve blocks.
    assert len(names) == 1 + 4 * 12 + 1


def test_the_start_survives_a_checkpoint_and_the_module_stays_outside() -> None:
    def build() -> tuple[nn.Sequential, Penalties]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        return model, Penalties(model, l2=0.5, l2_sp=2.0, pretrained=model[0])

    model, penalties = build()
    start, head = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    assert penalties().item() == pytest.approx(0.5 * head.square().sum().item())
    assert not list(penalties.parameters())
    assert sum(tensor.numel() for tensor in penalties.starts().values()) == start.numel()
    assert not penalties.state_dict()
    nn.init.normal_(model[0].weight)
    resumed_model, resumed = build()
    resumed_model.load_state_dict(model.state_dict())
    resumed.start_at(penalties.starts())
    distance = (model[0].weight.detach() - start).square().sum().item()
    assert distance > 1
    assert resumed().item() == penalties().item()
    assert resumed().item() == pytest.approx(2 * distance + 0.5 * head.square().sum().item())
    # A copy of all goes with its own copy of the module.
    copied_model, copied = copy.deepcopy((model, penalties))
    nn.init.zeros_(copied_model[1].weight)
    assert copied().item() == pytest.approx(2 * distance)


def test_what_thaws_counts_from_then_on_and_keeps_its_start() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    penalties = Penalties(model, l2=1.0, l2_sp=1.0, pretrained=model[:2])
    keys = penalties.starts().keys()
    assert penalties.names == ("1.weight", "2.weight")
    model[0].requires_grad_(True)
    penalties.choose()
    assert penalties.names == ("0.weight", "1.weight", "2.weight")
    assert penalties.starts().keys() == keys
    before = penalties().item()
    with torch.no_grad():
        model[0].weight += 1
    assert penalties().item() == pytest.approx(before + 16, rel=1e-5)


def test_half_precision_weights_are_summed_in_single_precision() -> None:
    model = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 0.1)
    value = model.weight[0, 0].item()
    penalty = Penalties(model, l2=1.0)()
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(2**16 * value**2, rel=1e-6)
    penalty.backward()
    torch.testing.assert_close(model.weight.grad, torch.full_like(model.weight, 2 * value), rtol=0, atol=0)


def test_a_penalty_on_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match="no pretrained weight learns"):
        Penalties(model, l2_sp=1.0)
    model[0].requires_grad_(False)
    with pytest.raises(UserError, match="no pretrained weight learns"):
        Penalties(model, l2_sp=1.0, pretrained=model[0])
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no weight learns"):
        Penalties(model, l2=1.0)
