"""Networks trained many at a time are those that torch trains one at a time, whatever the technique."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.augmentation.signals import circular_shift
from mtl.regularization.implicit import sharpness_aware
from mtl.studies.lecture.augmentation import WIDTHS
from mtl.studies.lecture.perceptron import Perceptrons
from mtl.studies.regularization.readings import Reading, members_of
from mtl.studies.regularization.recipe import Data, Published, Recipe, changed_by_epoch, data_of, seeds_of, shapes
from mtl.studies.regularization.techniques import techniques
from mtl.studies.regularization.training import Parameters, Trainer, classifier, dropout_factors, logits

SHORT = Recipe(epochs=2, batch=20)


def some(count: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(torch.randn(count, 40, generator=generator), torch.randint(10, (count,), generator=generator))


ALL = some(60, 0)
PUBLISHED = Published(ALL, Data(ALL.signals[:40], ALL.labels[:40]), some(30, 1), some(30, 2))


def train(*recipes: Recipe, seeds: Sequence[int] = (3, 4)) -> Parameters:
    return Trainer(recipes, seeds, PUBLISHED).run()


def network(parameters: Parameters, number: int) -> list[Tensor]:
    return [tensor[number] for tensor in parameters]


def test_the_baseline_is_that_of_the_lectures_figure():
    reference = Perceptrons(WIDTHS, [3, 4])
    reference.train(*ALL, rate=0.05, momentum=0.9, batch=20, epochs=2)
    found = train(SHORT)
    torch.testing.assert_close(found[::2], [weight.detach() for weight in reference.weights])
    torch.testing.assert_close(found[1::2], [bias.detach() for bias in reference.biases])


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(signals), labels)


def smoothed(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(signals), labels, label_smoothing=0.2)


def sparse(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    l1 = sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
    return cross_entropy(model, signals, labels) + 1e-3 * l1


def flat(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    """L + α/4 ‖∂L/∂φ‖²."""
    loss = cross_entropy(model, signals, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 / 4 * sum(g.square().sum() for g in gradients)


def even(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    """L + α/4B Σ ‖∂L_b/∂φ - ∂L/∂φ‖², of four parts of a batch, as a mean of squares less the square of the mean."""
    losses = [cross_entropy(model, x, y) for x, y in zip(signals.chunk(4), labels.chunk(4), strict=True)]
    rows = [torch.autograd.grad(loss, list(model.parameters()), create_graph=True) for loss in losses]
    each = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    variance = each.square().sum(1).mean() - each.mean(0).square().sum()
    return torch.stack(losses).mean() + 0.1 / 4 * variance


def ascended(model: nn.Module, signals: Tensor, labels: Tensor) -> Tensor:
    """A loss whose gradient is SAM's, by the project's own function."""
    parameters = list(model.parameters())

    def gradient() -> Sequence[Tensor]:
        return torch.autograd.grad(cross_entropy(model, signals, labels), parameters)

    there = sharpness_aware(gradient, parameters, gradient(), 0.1)
    return sum((g * p).sum() for g, p in zip(there, parameters, strict=True))


def reference(loss: Loss, decay: float = 0.0, shrink: float = 0.0) -> list[Tensor]:
    """Return what torch's SGD makes of the network of seed 4."""
    generator = torch.Generator().manual_seed(4)
    start = Perceptrons(WIDTHS, [4])
    model = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer, weight in zip(layers, start.weights, strict=True):
        layer.weight.data, layer.bias.data = weight[0].detach().T.clone(), torch.zeros_like(layer.bias)
        torch.rand(weight.shape[1:], generator=generator, dtype=torch.float64)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for _ in range(2):
        for chosen in torch.randperm(60, generator=generator).split(20):
            optimizer.zero_grad()
            loss(model, ALL.signals[chosen], ALL.labels[chosen]).backward()
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - 0.05 * shrink)
            optimizer.step()
    return [tensor.detach() for layer in layers for tensor in (layer.weight.T, layer.bias[None])]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # λ‖φ‖² is a weight decay of 2 λ.
        ({"l2": 0.01}, lambda: reference(cross_entropy, decay=0.02)),
        ({"l1": 1e-3}, lambda: reference(sparse)),
        ({"l1": 1e-3, "l2": 0.01}, lambda: reference(sparse, decay=0.02)),
        ({"decay": 0.5}, lambda: reference(cross_entropy, shrink=0.5)),
        ({"smoothing": 0.2}, lambda: reference(smoothed)),
        ({"gradient_norm": 0.1}, lambda: reference(flat)),
        ({"batch_variance": 0.1}, lambda: reference(even)),
        ({"sam": 0.1}, lambda: reference(ascended)),
    ],
)
def test_a_technique_is_torchs(changes: dict[str, float], expected: Callable[[], list[Tensor]]):
    # Beside another strength, of which nothing must get here.
    stronger = {name: 2 * value for name, value in changes.items()}
    found = train(replace(SHORT, **stronger), replace(SHORT, **changes))
    own, plain = network(found, 3), network(train(SHORT), 1)
    torch.testing.assert_close(own, expected(), atol=2e-5, rtol=1e-4)
    assert (own[0] - plain[0]).abs().max() > 1e-4  # and it does something


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.3}, {"weight_noise": 0.05}, {"input_noise": 0.2}, {"redrawn": 0.5}, {"shift": True}, {"rate": 0.1},
     {"bootstrap": True}, {"joint": 0.5, "hidden": 0.3}, {"signals": "copies"}],
)  # fmt: skip
def test_a_network_is_the_same_whatever_is_trained_beside_it(changes: dict[str, object]):
    recipe = replace(SHORT, **changes)
    other = replace(recipe, **{name: value / 2 for name, value in changes.items() if name in ("dropout", "rate")})
    together, alone = train(other, recipe), train(recipe, seeds=[4])
    torch.testing.assert_close(network(together, 3), network(alone, 0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone[0][0], train(SHORT)[0][1], atol=1e-4)


def test_dropout_keeps_the_expectation():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    p = torch.tensor([0.1, 0.1, 0.6, 0.6])[:, None, None]
    for factors in dropout_factors(generators, 500, p):
        assert factors.shape == (4, 500, 200)
        torch.testing.assert_close(factors.mean((1, 2)), torch.ones(4), atol=0.02, rtol=0)
        torch.testing.assert_close((factors == 0).float().mean((1, 2)), p.flatten(), atol=0.01, rtol=0)
        assert factors.unique().tolist() == pytest.approx([0, 1 / 0.9, 1 / 0.4])


def test_dropout_acts_on_hidden_layers():
    parameters = train(SHORT)
    x = ALL.signals.expand(2, -1, -1)
    nothing = [torch.zeros(2, 60, 200)] * 2
    torch.testing.assert_close(logits(parameters, x, nothing), parameters[-1].expand(2, 60, 10))


def test_noise_on_weights_is_gone_after_the_step():
    # Without a learning rate nothing is left of it.
    torch.testing.assert_close(
        train(replace(SHORT, rate=0.0, weight_noise=1.0)), train(replace(SHORT, rate=0.0)), atol=0, rtol=0
    )


def test_members_of_a_soup_have_their_beginning_in_common():
    recipe = replace(SHORT, epochs=3, branch=2, members=3)
    found = train(recipe)
    first, second, third = members_of([found], 0, 1, 3, 2)
    plain = train(replace(SHORT, epochs=3))
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
    before = train(SHORT)
    for one, other in ((first, second), (first, third), (second, third)):
        apart = (one[2] - other[2]).norm()
        assert 0 < apart < (one[2] - before[2]).norm() * 2
    independent = members_of([train(replace(recipe, branch=0))], 0, 1, 3, 2)
    assert (independent[0][2] - independent[1][2]).norm() > 10 * (first[2] - second[2]).norm()
    torch.testing.assert_close(independent[0], plain, atol=1e-5, rtol=1e-4)


def test_seeds_of_members():
    assert seeds_of(7, 1) == [7] and seeds_of(7, 5)[:3] == seeds_of(7, 3) and seeds_of(7, 5)[0] == 7
    assert len({seed for start in range(50) for seed in seeds_of(start, 5)}) == 250


def test_a_start_gives_the_hidden_layers_and_l2_sp_holds_them():
    start = replace(SHORT, goal="hidden", hidden=0.5)
    before = train(start)
    assert before[-2].shape == (2, 200, 40)
    still = train(replace(SHORT, start=start, rate=0.0))
    torch.testing.assert_close(still[:4], before[:4], atol=0, rtol=0)
    assert still[-2].shape == (2, 200, 10)
    free, held = replace(SHORT, start=start), replace(SHORT, start=start, l2_sp=1.0)
    found = train(free, held)
    moved = (found[2].unflatten(0, (2, 2)) - before[2]).flatten(2).norm(dim=2)
    assert (moved[1] < 0.7 * moved[0]).all()
    torch.testing.assert_close([t[:2] for t in found], train(free), atol=1e-5, rtol=1e-4)


def test_what_is_hidden_is_learned_from_the_rest():
    # A signal that is one number everywhere can be told from any of its values.
    level = torch.linspace(-1, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    data = Data(level[:, None].expand(200, 40).contiguous(), torch.zeros(200, dtype=torch.int64))
    published = Published(data, data, data, data)
    found = Trainer([Recipe(goal="hidden", hidden=0.5, epochs=20, batch=20)], [0], published).run()
    hidden = data.signals.clone()
    hidden[:, 20:] = 0
    errors = logits(found, hidden[None])[0][:, 20:] - data.signals[:, 20:]
    assert errors.square().mean() < 0.1 * data.signals.square().mean()


def test_a_joint_goal_of_no_weight_changes_nothing():
    found = train(replace(SHORT, joint=1e-12, hidden=0.3))
    torch.testing.assert_close(found, train(SHORT), atol=1e-5, rtol=1e-4)


def test_what_an_epoch_changes():
    data = data_of(SHORT, PUBLISHED, [3, 4])
    shifted = [changed_by_epoch(replace(SHORT, shift=True), data, epoch, [3, 4], 10).signals for epoch in (0, 1)]
    for signals in shifted:
        every = torch.stack([circular_shift(ALL.signals[:, None], torch.full((60,), k))[:, 0] for k in range(40)])
        assert (signals[1] == every).all(2).any(0).all()
    assert not torch.equal(*shifted) and not torch.equal(shifted[0][0], shifted[0][1])
    redrawn = changed_by_epoch(replace(SHORT, redrawn=0.5), data, 0, [3, 4], 10)
    assert torch.equal(redrawn.signals, data.signals)
    assert 0.3 < (redrawn.labels != data.labels).float().mean() < 0.6  # half, of which a tenth comes out the same
    noisy = changed_by_epoch(replace(SHORT, input_noise=0.3), data, 0, [3, 4], 10)
    assert (noisy.signals - data.signals).std().item() == pytest.approx(0.3, rel=0.05)


def test_other_shapes_are_not_the_digits():
    data = shapes()
    assert data.signals.shape == (8000, 40) and torch.bincount(data.labels).tolist() == [400] * 20
    assert data.signals.std().item() == pytest.approx(1, abs=1e-4)


def test_techniques_of_one_kind_differ_in_nothing_but_numbers_that_may():
    rows = techniques(Recipe())
    assert len({(row.label, row.strength) for row in rows}) == len(rows)
    assert rows[0].mechanism is None and all(row.mechanism for row in rows[1:])
    strengths = [row.recipe for row in rows if row.name in ("dropout", "label-noise", "learning-rate", "sam")]
    assert len({recipe.kind for recipe in strengths}) == 3  # the labels' noise is done to the data
    assert Recipe().kind != Recipe(momentum=0.5).kind != Recipe(batch=5).kind


# Readings


def seen(reading: Reading, values: Sequence[float], recipe: Recipe) -> list[list[float]]:
    """Return what is kept of a network whose only weight has had these values."""
    watcher = reading.watch(recipe, PUBLISHED)
    weight = torch.zeros(2, 1, 1)
    for step, value in enumerate(values, 1):
        weight.copy_(torch.tensor([value, -value])[:, None, None])
        watcher(step, [weight])
    return [kept[0].flatten().tolist() for kept in watcher.kept]


def test_moments_and_averages():
    recipe = Recipe(epochs=4, batch=30)  # of two steps each
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    assert seen(Reading(), values, recipe) == [[128.0, -128.0]]
    assert seen(Reading("snapshots", 2), values, recipe) == [[8.0, -8.0], [128.0, -128.0]]
    assert seen(Reading("swa", 0.5), values, recipe)[0][0] == pytest.approx((8 + 32 + 128) / 3)
    average = 1.0
    for value in values:
        average = 0.9 * average + 0.1 * value
    assert seen(Reading("ema", 0.9), values, recipe)[0][0] == pytest.approx(average)
    assert seen(Reading(), values[:6], replace(recipe, epochs=2, signals="copies")) == []  # eight steps
    assert seen(Reading(), values[:4], replace(recipe, epochs=2, signals="train")) == [[8.0, -8.0]]


@pytest.mark.parametrize(("patience", "best"), [(1, 2), (3, 2), (4, 6)])
@pytest.mark.parametrize("by", ["least-error", "least-loss"])
def test_early_stopping_goes_back_to_the_best(by: str, patience: int, best: int, monkeypatch: pytest.MonkeyPatch):
    errors = [5.0, 3.0, 4.0, 3.5, 3.0, 2.0]
    watcher = Reading(by, patience).watch(Recipe(epochs=6, batch=60), PUBLISHED)
    # The second network gets better all the time.
    monkeypatch.setattr(watcher, "judge", lambda found: torch.tensor([errors[step - 1], -float(step)]))
    for step in range(1, 7):
        values = [torch.zeros(2, *shape) for shape in ((40, 10), (1, 10))]
        watcher(step, [value + step for value in values])
    assert watcher.kept[0][0][:, 0, 0].tolist() == [best, 6]


def test_early_stopping_judges_by_validation_signals():
    parameters = train(SHORT)
    signals, labels = PUBLISHED.validation
    outputs = logits(parameters, signals.expand(2, -1, -1))
    by_error, by_loss = (Reading(name, 1).watch(SHORT, PUBLISHED) for name in ("least-error", "least-loss"))
    for number in range(2):
        wrong = (outputs[number].argmax(1) != labels).double().mean()
        assert by_error.judge(outputs)[number] == wrong
        assert by_loss.judge(outputs)[number].item() == pytest.approx(
            functional.cross_entropy(outputs[number], labels).item(), rel=1e-5
        )


def test_outputs_that_are_no_classes_are_left_out():
    parameters = [torch.zeros(2, 40, 50), torch.arange(50.0).expand(2, 1, 50)]
    assert classifier(parameters, 10)[1].tolist() == [[list(range(10))]] * 2
    assert classifier(parameters, 0)[0].shape == (2, 40, 50)
    assert math.prod(classifier(parameters, 10)[0].shape) == 800
