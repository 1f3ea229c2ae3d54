"""What regularizes, as a training step delivers it: against closed forms, and each beside each other."""

import copy
import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl.build import build_balancer, build_module, check_schedule
from mtl.config import validate
from mtl.data.mnist1d import MNIST1D
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.regularization.implicit import gradients_of_loss
from mtl.regularization.noise import noisy_weights
from mtl.regularization.penalties import counted_weights
from mtl.training.module import MultiTaskModule, schedule, schedule_with_restarts

INFO = DataInfo("test", ("segmentation", "depth"), ("wall", "floor", "chair"))
SIGNALS = {"data": {"name": "mnist1d"}, "backbone": "mnist1d_mlp", "task": ["classification"]}
LINEAR = SIGNALS | {"backbone": "mnist1d_linear"}
PICTURES = {"task": ["depth"], "decoder_channels": 16, "data": {"size": (32, 32)}}
FLAGS = {
    "l2": {"regularize": {"l2": 1e-3}},
    "l1": {"regularize": {"l1": 1e-4}},
    "l2_sp": {"regularize": {"l2_sp": 1e-2}, "init": "a/run"},
    "gradient_norm": {"regularize": {"gradient_norm": 1e-2}},
    "batch_variance": {"regularize": {"batch_variance": 1e-2}, "accumulate": 2},
    "sam": {"regularize": {"sam": 0.05}},
    "weight_noise": {"regularize": {"weight_noise": 1e-3}},
    "measure": {"regularize": {"measure": 2}},
    "dropout": {"dropout": 0.2},
    "swa": {"swa": 0.5},
    "snapshots": {"snapshots": 2},
    "depth_jitter": {"regularize": {"depth_jitter": 0.1}},
    "drop_path": {"drop_path": 0.2},
}
OF_PICTURES = ("depth_jitter", "drop_path")


def merged(*parts: dict) -> dict:
    """Return fields put together, those of `regularize` one by one."""
    fields: dict = {}
    for part in parts:
        options = fields.get("regularize", {}) | part.get("regularize", {})
        fields |= part | ({"regularize": options} if options else {})
    return fields


@functools.cache
def built(drop_path: float | None, dropout: float | None) -> MultiTaskModule:
    """Return a module for pictures, to be copied: building takes longer than a few steps."""
    torch.manual_seed(0)
    fields = PICTURES | {"init": "none", "drop_path": drop_path, "dropout": dropout}
    return build_module(validate(fields), INFO, total_steps=10)


def module(*parts: dict) -> MultiTaskModule:
    """Return a module in a fit that has begun."""
    options = validate(merged({"init": "none", "warmup": 0}, *parts))
    torch.manual_seed(0)
    if options.signals:
        made = build_module(options, MNIST1D.info, total_steps=10)
    else:
        base = copy.deepcopy(built(options.drop_path, options.dropout))
        made = MultiTaskModule(base.model, base.each_task(), base.balancer, options, 10, INFO)
    made.on_fit_start()
    return made


def batch(number: int = 0, size: int = 2, side: int = 32) -> dict[str, Tensor]:
    """Return pictures and signals at once, of which a module takes what it knows."""
    generator = torch.Generator().manual_seed(3 + number)
    return {
        "image": torch.rand(size, 3, side, side, generator=generator),
        "segmentation": torch.randint(0, 3, (size, side, side), dtype=torch.uint8, generator=generator),
        "depth": torch.rand(size, 1, side, side, generator=generator) + 1,
        "signal": torch.randn(size, 1, 40, generator=generator),
        "label": torch.randint(0, 10, (size,), generator=generator),
        "draw": torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1),
    }


def step_of(of: MultiTaskModule) -> list[Tensor]:
    """Return the gradient of a step, as Lightning accumulates it."""
    of.zero_grad()
    count = of.options.accumulate
    for number in range(count):
        data = of.on_after_batch_transfer(batch(number), 0)
        (of.training_step(data, number) / count).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in of.regularizer.learns]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    one, other = (torch.cat([tensor.double().flatten() for tensor in of]) for of in (found, expected))
    assert other.norm() > 0
    assert (one - other).norm() <= tolerance * other.norm(), (one - other).norm() / other.norm()


def less(of: list[Tensor], by: list[Tensor]) -> list[Tensor]:
    return [one - other for one, other in zip(of, by, strict=True)]


@pytest.mark.parametrize(("first", "second"), itertools.combinations(FLAGS, 2))
def test_any_two_go_together(first: str, second: str) -> None:
    """Two steps of which everything is finite; what stands elsewhere for a while is back when a step is due."""
    kind = PICTURES if {first, second} & set(OF_PICTURES) else SIGNALS
    trained = module(kind, FLAGS[first], FLAGS[second], {"optimizer": "sgd", "lr": 0.01}).train()
    optimizer = trained.configure_optimizers()["optimizer"]
    for _ in range(2):
        before = [p.detach().clone() for p in trained.parameters()]
        gradients = step_of(trained)
        assert all(map(torch.equal, trained.parameters(), before))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(math.isfinite(value) for value in (trained.terms | trained.regularizer.measured).values())
        optimizer.step()
        assert not all(map(torch.equal, trained.parameters(), before))


ADDED = {"l2": 0.1, "l1": 0.1, "l2_sp": 0.1, "gradient_norm": 1.0, "batch_variance": 1.0}
ADDITIVE = [pair for pair in itertools.combinations(ADDED, 2) if "l2_sp" not in pair or not {"l2", "l1"} & set(pair)]


@pytest.mark.parametrize(("first", "second"), ADDITIVE)
@pytest.mark.parametrize("beside", [{}, {"sam": 0.05}, {"weight_noise": 1e-3}])
def test_what_is_added_adds_up(first: str, second: str, beside: dict) -> None:
    """The gradient of both is that of one plus that of the other, whatever else the step does.

    Beside l2_sp the other penalties count for other weights than without it.
    """

    def gradient(*names: str) -> list[Tensor]:
        options = beside | {name: ADDED[name] for name in names}
        made = module(SIGNALS, {"init": "a/run", "accumulate": 2, "regularize": options}).double()
        with torch.no_grad():
            for parameter in made.model.parameters():  # away from the start
                parameter.mul_(1.1)
        return step_of(made)

    without, one, other, both = gradient(), gradient(first), gradient(second), gradient(first, second)
    sums = [a + b for a, b in zip(less(one, without), less(other, without), strict=True)]
    assert all(sum(float(t.abs().sum()) for t in less(of, without)) > 1e-3 for of in (one, other))
    close(less(both, without), sums, 1e-9)


@pytest.mark.parametrize("kind", [SIGNALS, PICTURES], ids=["signals", "pictures"])
def test_sgd_with_l2_is_sgd_with_twice_the_weight_decay(kind: dict) -> None:
    common = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
    decayed = module(kind, common, {"weight_decay": 0.06}).double()
    penalized = module(kind, common, {"weight_decay": 0.0, "regularize": {"l2": 0.03}}).double()
    start = [p.detach().clone() for p in decayed.model.parameters()]
    for trained in (decayed, penalized):
        optimizer = trained.configure_optimizers()["optimizer"]
        for _ in range(2):
            step_of(trained)
            optimizer.step()
    for one, other, before in zip(decayed.model.parameters(), penalized.model.parameters(), start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        if one.dim() > 1:  # a bias behind units that are all off has no gradient
            assert not torch.equal(one, before)
    weights = counted_weights(penalized.regularizer._of[0]).values()
    last = penalized.terms["train/penalty/l2"]
    assert 0.03 * sum(float(w.square().sum()) for w in weights) == pytest.approx(last, rel=0.1)
    assert penalized.terms["train/loss"] - last == pytest.approx(
        sum(value for name, value in penalized.terms.items() if name.startswith("train/loss/"))
    )


def plain_loss(of: MultiTaskModule, number: int = 0) -> Tensor:
    """Return a batch's loss by the task's own function."""
    (task,), data = of.each_task(), of.on_after_batch_transfer(batch(number), 0)
    return task.loss(of.model(data[of.info.input])[task.name], data)


def double_backward(of: MultiTaskModule, value: Callable[[list[list[Tensor]]], Tensor]) -> list[Tensor]:
    """Return the gradient of a function of both batches' gradients, by differentiating twice."""
    learns = of.regularizer.learns
    found = [list(torch.autograd.grad(plain_loss(of, number), learns, create_graph=True)) for number in range(2)]
    return list(torch.autograd.grad(value(found), learns))


def squared(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


def test_implicit_terms_are_those_of_two_derivatives() -> None:
    """On a smooth model; the values are exact, and of the batches' gradient norms both terms of the whole batch.

    Gradients are those of a difference over a finite distance, whose error is of the first order in it.
    """
    alpha = 2.0
    plain = module(LINEAR, {"accumulate": 2}).double()
    without = step_of(plain)

    def mean(found: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(tensors).mean(dim=0) for tensors in zip(*found, strict=True)]

    def variance(found: list[list[Tensor]]) -> Tensor:
        return torch.stack([squared(less(own, mean(found))) for own in found]).mean()

    variant = module(LINEAR, {"accumulate": 2, "regularize": {"batch_variance": alpha, "measure": 1}}).double()
    of_variance = less(step_of(variant), without)
    close(of_variance, double_backward(plain, lambda found: alpha / 4 * variance(found)), 0.12)
    gradients = [list(torch.autograd.grad(plain_loss(plain, number), plain.regularizer.learns)) for number in range(2)]
    whole, spread = float(squared(mean(gradients))), float(variance(gradients))
    assert variant.terms["train/penalty/batch_variance"] == pytest.approx(alpha / 4 * spread, rel=1e-6)
    assert variant.regularizer.measured["train/gradient_norm_squared"] == pytest.approx(whole, rel=1e-9)
    assert variant.regularizer.measured["train/batch_variance"] == pytest.approx(spread, rel=1e-9)

    normed = module(LINEAR, {"accumulate": 2, "regularize": {"gradient_norm": alpha}}).double()
    of_norm = less(step_of(normed), without)
    close(of_norm, double_backward(plain, lambda found: alpha / 4 * sum(map(squared, found)) / 2), 0.12)
    close(of_norm, double_backward(plain, lambda found: alpha / 4 * (squared(mean(found)) + variance(found))), 0.12)


def test_sam_follows_the_gradient_at_the_worst_point() -> None:
    trained = module(SIGNALS, {"regularize": {"sam": 0.1}}).double()
    found = step_of(trained)
    learns = trained.regularizer.learns
    gradient = torch.autograd.grad(plain_loss(trained), learns)
    length = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    with torch.no_grad():
        for parameter, own in zip(learns, gradient, strict=True):
            parameter += 0.1 * own / length
    close(found, list(torch.autograd.grad(plain_loss(trained), learns)), 1e-12)
    assert float((found[0] - gradient[0]).norm()) > 1e-6


def test_noise_is_that_of_the_step_for_all_its_batches() -> None:
    trained = module(SIGNALS, {"accumulate": 2, "regularize": {"weight_noise": 0.05}, "seed": 4}).double()
    found = step_of(trained)
    learns = trained.regularizer.learns
    weights = list(counted_weights(trained.model).values())
    expected = []
    for step in (0, 1):
        with noisy_weights(weights, 0.05, 4, step):
            both = [torch.autograd.grad(plain_loss(trained, number), learns) for number in range(2)]
        expected.append([(one + other) / 2 for one, other in zip(*both, strict=True)])
    close(found, expected[0], 1e-12)
    assert not torch.allclose(found[0], expected[1][0])


def test_measuring_changes_nothing() -> None:
    fields = SIGNALS | {"accumulate": 2, "dropout": 0.2}
    plain, measured = (module(fields, more).train() for more in ({}, {"regularize": {"measure": 1}}))
    torch.manual_seed(1)
    expected = step_of(plain)
    torch.manual_seed(1)
    assert all(map(torch.equal, step_of(measured), expected))
    assert measured.regularizer.measured.keys() == {"train/gradient_norm_squared", "train/batch_variance"}
    assert plain.regularizer.measured == {}


@functools.cache
def of_two_tasks() -> MultiTaskModule:
    torch.manual_seed(0)
    fields = {"init": "none", "dropout": 0.3, "drop_path": 0.3, "task": ["depth", "masked"], "decoder_channels": 16}
    return build_module(validate(fields | {"data": {"size": (64, 64)}, "mask": {"decoder_width": 32}}), INFO, 10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weighting": "uncertainty"},
        {"weighting": "random", "head_weighting": "own"},
        {"weighting": "pcgrad"},
        {"weighting": "gradnorm", "weighting_on": "parameters"},
    ],
    ids=lambda fields: fields.get("weighting", "fixed"),
)
def test_a_batch_asked_again_gives_the_same_gradient_and_leaves_no_trace(fields: dict) -> None:
    """With dropout, skipped blocks, running statistics, a masked pass and whatever the rule makes of the losses."""
    base = copy.deepcopy(of_two_tasks())
    options = base.options.model_copy(update=fields)
    balancer = build_balancer(options, list(base.each_task()))
    trained = MultiTaskModule(base.model, base.each_task(), balancer, options, 10, INFO).train()
    trained.on_fit_start()
    seen: list[float] = []

    def compare(loss: Tensor, again: Callable[[], list[Tensor]], *args, **kwargs) -> tuple[Tensor, dict]:
        first = gradients_of_loss(loss, trained.regularizer.learns)
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        drawn = torch.get_rng_state()
        close(again(), first, 1e-5)
        assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
        assert torch.equal(torch.get_rng_state(), drawn)
        seen.append(float(loss.detach()))
        return original(loss.detach() + 0 * sum(p.sum() for p in trained.regularizer.learns), again, *args, **kwargs)

    original = trained.regularizer.forward
    trained.regularizer.forward = compare
    data = batch(side=64)
    trained.training_step(data, 0).backward()
    own = [p.grad.clone() for p in trained.balancer.parameters()]
    assert seen and (fields.get("weighting") != "uncertainty" or any(float(g.abs().sum()) > 0 for g in own))


def test_the_rules_own_objective_counts_once() -> None:
    found = []
    for more in ({}, {"sam": 0.05, "gradient_norm": 0.1}):
        base = copy.deepcopy(built(None, None))
        fields = PICTURES | {"init": "none", "weighting": "uncertainty", "regularize": more}
        options = validate(fields)
        balancer = build_balancer(options, list(base.each_task()))
        trained = MultiTaskModule(base.model, base.each_task(), balancer, options, 10, INFO).eval()
        trained.on_fit_start()
        step_of(trained)
        found.append([p.grad.clone() for p in trained.balancer.parameters()])
    assert any(float(gradient.abs().sum()) > 0 for gradient in found[0])
    assert all(map(torch.equal, *found))


def test_depth_is_jittered_in_training_alone_and_anew_each_epoch() -> None:
    trained = module(PICTURES, {"regularize": {"depth_jitter": 0.1}})
    stored = batch(size=8)
    stored["depth"][:, :, :4] = 0
    first, same = (trained.train().on_after_batch_transfer(dict(stored), 0)["depth"] for _ in range(2))
    assert torch.equal(first, same) and bool((first[:, :, :4] == 0).all())
    log = (first[:, :, 4:] / stored["depth"][:, :, 4:]).log()
    assert float(log.std()) == pytest.approx(0.1, rel=0.05) and float(log.mean()) == pytest.approx(0, abs=5e-3)
    later = dict(stored) | {"draw": stored["draw"] + torch.tensor([1, 0])}
    assert not torch.equal(trained.on_after_batch_transfer(later, 0)["depth"], first)
    assert torch.equal(trained.eval().on_after_batch_transfer(dict(stored), 0)["depth"], stored["depth"])


def test_drop_path_is_timms_and_off_in_evaluation() -> None:
    plain, dropped = (Backbone("vit_tiny_patch16_224", (32, 32), drop_path=share) for share in (None, 0.2))
    dropped.load_state_dict(plain.state_dict())
    rates = [module.drop_prob for module in dropped.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.2) and len(rates) == 2 * 11, "all of twelve blocks but the first, at 0"
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(plain.eval()(image).maps[-1], dropped.eval()(image).maps[-1])
    with torch.no_grad():
        outputs = [dropped.train()(image.repeat(8, 1, 1, 1)).maps[-1] for _ in range(2)]
    assert not torch.equal(*outputs)
    with pytest.raises(UserError, match="'vgg11' has no residual blocks"):
        Backbone("vgg11", (32, 32), drop_path=0.1)


def test_snapshots_follow_the_published_schedule() -> None:
    """Equation 2 of Huang et al. 2017, after the warm-up; one fall is the usual schedule."""
    restarts = schedule_with_restarts(100, 10, 3)
    assert restarts.ends == (40, 70, 100)
    for step in range(10, 100):
        expected = 0.5 * (math.cos(math.pi * ((step - 10) % 30) / 30) + 1)
        assert restarts.factor(step) == pytest.approx(expected)
    usual = schedule("cosine", 100, 10)
    assert [schedule_with_restarts(100, 10, 1).factor(s) for s in range(100)] == pytest.approx(
        [usual(s) for s in range(100)]
    )
    with pytest.raises(UserError, match="3 cycles"):
        check_schedule(validate({"snapshots": 3}), 2)


def test_weights_thaw_to_be_drawn_to_where_they_started() -> None:
    fields = PICTURES | {"init": "a/run", "freeze": True, "unfreeze_at": 1, "regularize": {"l2": 0.1, "l2_sp": 0.2}}
    trained = module(fields)
    trained.model.backbone.freeze()
    trained.on_fit_start()
    step_of(trained)
    assert "train/penalty/l2" in trained.terms and "train/penalty/l2_sp" not in trained.terms
    heads = sum(float(w.detach().square().sum()) for w in counted_weights(trained.model.heads).values())
    trained.thaw(10, 1, 1)
    trained.on_fit_start()
    with torch.no_grad():
        trained.model.backbone.encoder.model.conv_stem.weight += 1
    step_of(trained)
    count = trained.model.backbone.encoder.model.conv_stem.weight.numel()
    assert trained.terms["train/penalty/l2_sp"] == pytest.approx(0.2 * count, rel=1e-4)
    assert trained.terms["train/penalty/l2"] == pytest.approx(0.1 * heads, rel=1e-4), "the heads alone, as before"
    checkpoint: dict = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("regularizer")]
    resumed = module(fields | {"freeze": False, "unfreeze_at": None})
    resumed.load_state_dict(checkpoint["state_dict"])
    resumed.on_load_checkpoint(checkpoint)
    resumed.on_fit_start()
    step_of(resumed)
    assert resumed.terms["train/penalty/l2_sp"] == trained.terms["train/penalty/l2_sp"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regularize": {"l2": -1}}, "--regularize.l2 is -1"),
        ({"regularize": {"sam": "much"}}, "--regularize.sam"),
        ({"regularize": {"measure": 0}}, "--regularize.measure"),
        ({"regularize": {"batch_variance": 1}}, "--accumulate 2"),
        ({"regularize": {"l2_sp": 1}, "init": "none"}, "--init none"),
        ({"regularize": {"l2_sp": 1}, "freeze": True}, "--freeze leaves none"),
        ({"regularize": {"l2_sp": 1}, "lora": 4}, "--lora leaves none"),
        ({"regularize": {"sam": 0.05}, "precision": "bf16-true"}, "bf16-mixed"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"drop_path": 0.1, "freeze": True}, "--freeze"),
        ({"swa": 0.5, "ema": 0.9}, "choose one"),
        ({"swa": 1.0}, "--swa"),
        ({"snapshots": 1}, "--snapshots"),
        ({"snapshots": 2, "schedule": "linear"}, "--schedule cosine"),
    ],
)
def test_what_cannot_be_is_a_sentence(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate(fields)


def test_jitter_without_depth_is_a_sentence() -> None:
    with pytest.raises(UserError, match="add --task depth"):
        build_module(validate(SIGNALS | {"init": "none", "regularize": {"depth_jitter": 0.1}}), MNIST1D.info, 10)


def test_penalties_need_no_norms_nor_biases() -> None:
    trained = module(SIGNALS, {"regularize": {"l2": 1.0}})
    with torch.no_grad():
        for layer in trained.model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
    trained.training_step(batch(), 0)
    assert trained.terms["train/penalty/l2"] == 0
