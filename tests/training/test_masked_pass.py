"""A task whose view of the image is masked, beside others: a pass of its own, and one backward pass for all."""

import pytest
import torch
from torch import Tensor

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.training.balancing import LossBalancer
from mtl.training.module import LOG_EVERY, MultiTaskModule
from mtl.weighting.base import Step, Weighting

INFO = DataInfo("test", ("segmentation", "depth"), ("wall", "floor", "chair"))
TASKS = ["depth", "masked"]
WEIGHTS = {"depth": 0.3, "masked": 2.0}
BACKBONES = {
    "tokens": {"backbone": "vit_tiny_patch16_224", "mask": {"decoder_width": 32, "decoder_depth": 1}},
    "convolution": {"backbone": "resnet18", "mask": {"decoder_width": 32}},
    "input": {"backbone": "mobilevitv2_050", "mask": {"decoder_width": 32}},
}


class Constant(Weighting):
    """Constant weights that want to know how gradients meet."""

    needs_gram = True

    def forward(self, step: Step) -> Tensor:
        self.gram = step.gram
        return torch.tensor([WEIGHTS[self.tasks[place]] for place in step.present], dtype=torch.float64)


def module(*, tasks=TASKS, on="features", rule=Constant, **fields) -> MultiTaskModule:
    defaults = {"task": tasks, "init": "none", "decoder_channels": 16, "data": {"size": (64, 64)}}
    made = build_module(validate(defaults | fields), INFO, total_steps=100)
    if rule is not None:
        made.balancer = LossBalancer(rule(dict.fromkeys(tasks, "gaussian")), 1, on)
    return made.eval()


def batch(size: int = 4, side: int = 64, epoch: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.rand(size, 3, side, side, generator=generator),
        "depth": torch.rand(size, 1, side, side, generator=generator) + 1,
        "draw": torch.stack([torch.full((size,), epoch), torch.arange(size)], dim=1),
    }


def gradients(of: MultiTaskModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in of.model.named_parameters() if p.grad is not None}


def each_alone(of: MultiTaskModule, data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for task in TASKS:
        of.zero_grad()
        of._losses(data, None)[task].backward()
        found[task] = gradients(of)
    of.zero_grad()
    return found


@pytest.mark.parametrize("on", ["features", "parameters"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_parameter_gets_the_gradient_of_the_weighted_sum(kind: str, on: str) -> None:
    trained, data = module(on=on, **BACKBONES[kind]), batch()
    alone = each_alone(trained, data)
    shared = alone["depth"].keys() & alone["masked"].keys()
    assert {n for n, _ in trained.model.named_parameters() if n.startswith("backbone.")} == shared
    expected: dict[str, Tensor] = {}
    for task, of_task in alone.items():
        for name, gradient in of_task.items():
            expected[name] = expected.get(name, 0) + WEIGHTS[task] * gradient
    trained.training_step(data, 0).backward()
    found = gradients(trained)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=2e-6 * scale), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_gradients_meet_at_the_parameters_alone(kind: str) -> None:
    on_features, on_parameters = (module(on=on, **BACKBONES[kind]) for on in ("features", "parameters"))
    on_parameters.load_state_dict(on_features.state_dict())
    for trained in (on_features, on_parameters):
        trained.training_step(batch(), 0)
    gram = on_features.balancer.rule.gram
    assert gram[0, 1] == 0 and (gram.diagonal() > 0).all()
    assert on_features.terms["train/cosine/depth-masked"] == 0
    alone = each_alone(on_parameters, batch())
    shared = [name for name in alone["depth"] if name in alone["masked"]]
    rows = torch.stack([torch.cat([alone[task][name].double().flatten() for name in shared]) for task in TASKS])
    cosine = float(torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0))
    assert cosine != 0 and on_parameters.terms["train/cosine/depth-masked"] == pytest.approx(cosine, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("kind", ["convolution", "input"])
def test_running_statistics_stay_those_of_whole_images(kind: str) -> None:
    """What the other heads are measured with is then what they are trained with."""
    alone, together = (module(tasks=tasks, **BACKBONES[kind]).train() for tasks in (["depth"], TASKS))
    together.model.load_state_dict(alone.model.state_dict(), strict=False)
    for trained in (alone, together):
        torch.manual_seed(0)
        trained.training_step(batch(), 0).backward()
    buffers = dict(together.model.backbone.named_buffers())
    for name, value in alone.model.backbone.named_buffers():
        assert torch.equal(value, buffers[name]), name
    by_itself = module(tasks=["masked"], **BACKBONES[kind]).train()
    before = {name: value.clone() for name, value in by_itself.model.backbone.named_buffers()}
    by_itself.training_step(batch(), 0).backward()
    moved = [name for name, value in by_itself.model.backbone.named_buffers() if not torch.equal(value, before[name])]
    assert any(name.endswith("running_var") for name in moved)


def test_masks_are_drawn_anew_each_epoch_and_held_while_measuring() -> None:
    trained = module(tasks=["masked"], **BACKBONES["tokens"])
    hidden = {}
    for training in (False, True):
        trained.train(training)
        for epoch in (0, 1):
            with torch.no_grad():
                hidden[training, epoch] = trained._reconstruct(batch(epoch=epoch), None)[:, 3]
    assert torch.equal(hidden[False, 0], hidden[False, 1]) and torch.equal(hidden[False, 0], hidden[True, 0])
    assert not torch.equal(hidden[True, 0], hidden[True, 1])
    assert torch.allclose(hidden[True, 1].mean(dim=(1, 2)), torch.tensor(0.75))
    assert len({tuple(image.flatten().tolist()) for image in hidden[True, 1]}) > 1


@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "famo", "pcgrad", "gradnorm"])
def test_weighting_rules_take_it(weighting: str) -> None:
    trained = module(rule=None, weighting=weighting, **BACKBONES["tokens"]).train()
    trained.training_step(batch(), 0).backward()
    assert set(trained.terms) >= {"train/loss/depth", "train/loss/masked", "train/weight/masked"}
    assert all(p.grad is not None for p in trained.model.parameters())


def test_shares_of_the_gradient_are_recorded_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = module(rule=None, **BACKBONES["tokens"]).train()
    monkeypatch.setattr(type(trained), "global_step", LOG_EVERY - 1)
    trained.training_step(batch(), 0).backward()
    shares = [trained.terms[f"train/gradient_share/{task}"] for task in TASKS]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
