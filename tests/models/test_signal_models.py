"""Models of signals: the published networks, written out by hand and trained as their authors did."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.augmentation.signals import SignalAugmentation
from mtl.data.mnist1d import load_mnist1d
from mtl.errors import UserError
from mtl.models.signals import SIGNAL_MODELS, SignalModel, make_signal_model


def linear(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(x[:, 0], *w)


def mlp(x: Tensor, w: list[Tensor]) -> Tensor:
    hidden = F.linear(x[:, 0], *w[:2]).relu()
    return F.linear(hidden + F.linear(hidden, *w[2:4]).relu(), *w[4:])


def mlp_2x200(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(F.linear(F.linear(x[:, 0], *w[:2]).relu(), *w[2:4]).relu(), *w[4:])


def cnn(x: Tensor, w: list[Tensor]) -> Tensor:
    for layer in range(3):
        x = F.conv1d(x, *w[2 * layer : 2 * layer + 2], stride=2, padding=1).relu()
    return F.linear(x.flatten(1), *w[6:])


def gru(x: Tensor, w: list[Tensor]) -> Tensor:
    """Cho et al. 2014, in torch's order of gates: reset, update, new."""
    directions = []
    for (w_i, w_h, b_i, b_h), reverse in ((w[:4], False), (w[4:8], True)):
        h, states = torch.zeros(len(x), 6), {}
        for step in reversed(range(40)) if reverse else range(40):
            r_i, z_i, n_i = F.linear(x[:, :, step], w_i, b_i).chunk(3, dim=1)
            r_h, z_h, n_h = F.linear(h, w_h, b_h).chunk(3, dim=1)
            r, z = (r_i + r_h).sigmoid(), (z_i + z_h).sigmoid()
            h = states[step] = (1 - z) * (n_i + r * n_h).tanh() + z * h
        directions.append(torch.stack([states[step] for step in range(40)], dim=1))
    return F.linear(torch.cat(directions, dim=2).flatten(1), *w[8:])


BY_HAND: dict[str, tuple[int, Callable[[Tensor, list[Tensor]], Tensor]]] = {
    "mnist1d_linear": (410, linear),
    "mnist1d_mlp": (15_210, mlp),
    "mnist1d_mlp_2x200": (40 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10, mlp_2x200),
    "mnist1d_cnn": (5_210, cnn),
    "mnist1d_gru": (5_134, gru),
}
"""Published numbers of parameters, and the networks in elementary operations."""

each_model = pytest.mark.parametrize("name", BY_HAND)


class TestStructure:
    def test_names(self) -> None:
        assert list(SIGNAL_MODELS) == list(BY_HAND)

    @each_model
    def test_is_the_published_network(self, name: str) -> None:
        parameters, by_hand = BY_HAND[name]
        model = make_signal_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        signal = torch.randn(3, 1, 40)
        torch.testing.assert_close(model(signal), by_hand(signal, list(model.parameters())), atol=1e-5, rtol=1e-4)

    @each_model
    def test_head_is_linear_on_the_features(self, name: str) -> None:
        model = make_signal_model(name, classes=4)
        features = model.backbone(torch.randn(3, 1, 40))
        assert features.shape == (3, model.backbone.channels)
        model.head.set_bias(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        expected = features @ model.head.weight.T + torch.tensor([0.0, 1.0, -1.0, 2.0])
        torch.testing.assert_close(model.head(features), expected)
        assert expected.shape == (3, 4)

    def test_initial_weights_of_the_lecture_s_network(self) -> None:
        """Kaiming's uniform weights have the variance 2 / inputs."""
        model = make_signal_model("mnist1d_mlp_2x200")
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        assert len(layers) == 3 and not any(layer.bias.any() for layer in layers)
        for layer in layers:
            bound = (6 / layer.in_features) ** 0.5
            assert layer.weight.var().item() * layer.in_features == pytest.approx(2, rel=0.15)
            assert 0.97 * bound < layer.weight.abs().max() <= bound

    def test_unknown_name(self) -> None:
        with pytest.raises(UserError, match=r"no model of signals 'mnist1d_cn' \(did you mean 'mnist1d_cnn'\?\)"):
            make_signal_model("mnist1d_cn")


class TestDropout:
    @each_model
    def test_scales_what_is_left_and_is_off_in_evaluation(self, name: str) -> None:
        torch.manual_seed(0)
        model = make_signal_model(name, dropout=0.25)
        plain = make_signal_model(name)
        plain.load_state_dict(model.state_dict())
        signal = torch.randn(64, 1, 40)
        assert torch.equal(model.eval()(signal), plain(signal))
        model.train()
        assert not torch.equal(model(signal), model(signal))
        # The last dropout is the last thing that the features have been through.
        [*_, last] = [m for m in model.backbone.modules() if isinstance(m, nn.Dropout)]
        for other in model.backbone.modules():
            if isinstance(other, nn.Dropout) and other is not last:
                other.p = 0.0
        features, whole = model.backbone(signal), plain.backbone(signal)
        if name == "mnist1d_mlp":  # of a residual layer, the new part is dropped
            start = model.backbone.layers[1:3](model.backbone.layers[0](signal))
            features, whole = features - start, whole - start
        kept = features.abs() > 1e-6
        torch.testing.assert_close(features[kept], whole[kept] / 0.75, atol=1e-5, rtol=1e-4)
        assert kept.sum() / (whole.abs() > 1e-6).sum() == pytest.approx(0.75, abs=0.05)

    @each_model
    def test_is_behind_each_hidden_layer(self, name: str) -> None:
        model = make_signal_model(name, dropout=0.5)
        hidden = sum(isinstance(m, nn.Linear | nn.Conv1d | nn.GRU) for m in model.backbone.modules())
        dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        assert dropouts == [0.5] * max(1, hidden)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
    def test_no_probability(self, dropout: float) -> None:
        with pytest.raises(UserError, match=r"--dropout .*at least 0 and less than 1"):
            make_signal_model("mnist1d_mlp", dropout)


class TestFreezing:
    @each_model
    def test_a_frozen_backbone_is_inert(self, name: str) -> None:
        model = make_signal_model(name, dropout=0.5)
        model.backbone.freeze()
        model.train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        signal = torch.randn(4, 1, 40, requires_grad=True)
        features = model.backbone(signal)
        assert not features.requires_grad and torch.equal(features, model.backbone(signal))
        F.cross_entropy(model(signal), torch.arange(4)).backward()
        optimizer.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {"head.weight", "head.bias"}

    def test_thawed_it_learns(self) -> None:
        model = make_signal_model("mnist1d_cnn", dropout=0.5)
        model.backbone.freeze()
        model.backbone.thaw()
        model.train()
        F.cross_entropy(model(torch.randn(4, 1, 40)), torch.arange(4)).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert all(m.training for m in model.modules())


def error(model: SignalModel, split: str) -> float:
    """Return the share of a split that a model gets wrong, in percent."""
    signals, labels = load_mnist1d(None, split)  # type: ignore[arg-type]
    with torch.no_grad():
        return 100 * (model(signals).argmax(dim=1) != labels).float().mean().item()


def benchmark(name: str, seed: int, steps: int = 6000) -> SignalModel:
    """Train as greydanus/mnist1d does: Adam, batches of 100 in turn, without shuffling."""
    torch.manual_seed(seed)
    model = make_signal_model(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = list(zip(*(values.split(100) for values in load_mnist1d(None, "all")), strict=True))
    for step in range(steps):
        signal, label = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(signal), label).backward()
        optimizer.step()
    return model


def lecture(seed: int, augmented: bool) -> SignalModel:
    """Train as notebook 9.5 of "Understanding Deep Learning" does: copies are changed once, and added to the data."""
    torch.manual_seed(seed)
    model = make_signal_model("mnist1d_mlp_2x200")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    signals, labels = load_mnist1d(None, "all")
    if augmented:
        draw = torch.stack([torch.zeros(len(signals), dtype=torch.int64), torch.arange(len(signals))], dim=1)
        copies = SignalAugmentation(seed)({"signal": signals, "draw": draw})["signal"]
        signals, labels = torch.cat([signals, copies]), labels.repeat(2)
    for _ in range(50):
        for rows in torch.randperm(len(signals)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(signals[rows]), labels[rows]).backward()
            optimizer.step()
    return model


class TestPublishedFigures:
    def test_linear_in_a_sixth_of_the_steps(self) -> None:
        """The problem is convex: published are 31.4 to 31.7% on the test signals, 37.2% on the others."""
        model = benchmark("mnist1d_linear", 0, steps=1000)
        assert 100 - error(model, "test") == pytest.approx(31.5, abs=1)
        assert 100 - error(model, "all") == pytest.approx(37.2, abs=1)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "accuracy", "tolerance"),
        [
            # Authors' code, run again; the tolerance is their range and two points more.
            ("mnist1d_linear", 31.5, 1),
            ("mnist1d_mlp", 64, 3),
            ("mnist1d_cnn", 93.5, 2.5),
            ("mnist1d_gru", 91, 3),
        ],
    )
    def test_benchmark(self, name: str, accuracy: float, tolerance: float) -> None:
        assert 100 - error(benchmark(name, 0), "test") == pytest.approx(accuracy, abs=tolerance)

    @pytest.mark.slow
    def test_lecture(self) -> None:
        """Published are, over ten seeds, 35.5 ± 1.2% test error without augmentation and 32.1 ± 1.1% with it."""
        for augmented, published, deviation in ((False, 35.52, 1.21), (True, 32.13, 1.11)):
            errors = torch.tensor([error(lecture(seed, augmented), "test") for seed in range(5)])
            # Three standard errors of the difference of the two means.
            assert errors.mean().item() == pytest.approx(published, abs=3 * deviation * (1 / 5 + 1 / 10) ** 0.5)
