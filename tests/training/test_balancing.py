"""One backward pass, whatever the rule: against plain autograd, one task at a time."""

from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from mtl.build import adapt, build_module, unbalanced
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.training.balancing import LossBalancer, gram_matrix
from mtl.training.module import MultiTaskModule
from mtl.weighting.base import Step, Weighting

INFO = DataInfo("test", ("segmentation", "depth", "normals"), ("wall", "floor", "chair"))
TASKS = ["segmentation", "depth", "normals"]
WEIGHTS = [0.3, 2.0, 0.7]


class Recording(Weighting):
    """Constant weights, and a memory of what it was shown."""

    needs_gram = True

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__(tasks)
        self.seen: list[Step] = []

    def forward(self, step: Step) -> Tensor:
        self.seen.append(step)
        return torch.tensor(WEIGHTS, dtype=torch.float64)[step.present]


def module(rule: type[Weighting] = Recording, *, tasks=TASKS, every=1, on="features", heads="scaled", **fields):
    defaults = {"task": tasks, "init": "none", "decoder_channels": 16, "data": {"size": (32, 32)}}
    made = build_module(validate(defaults | fields), INFO, total_steps=100)
    made.balancer = LossBalancer(rule(dict.fromkeys(tasks, "gaussian")), every, on, heads)
    return made.eval()


def batch(size: int = 4, side: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    normals = torch.randn(size, 3, side, side, generator=generator)
    return {
        "image": torch.rand(size, 3, side, side, generator=generator),
        "segmentation": torch.randint(0, 3, (size, side, side), dtype=torch.uint8, generator=generator),
        "depth": torch.rand(size, 1, side, side, generator=generator) + 1,
        "normals": torch.nn.functional.normalize(normals, dim=1),
    }


def gradients(of: MultiTaskModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in of.model.named_parameters() if p.grad is not None}


def each_alone(of: MultiTaskModule, data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return each task's gradient of every parameter, by a plain backward pass of its loss."""
    found = {}
    for task in of.each_task():
        of.zero_grad()
        task.loss(of.model(data["image"])[task.name], data).backward()
        found[task.name] = gradients(of)
    of.zero_grad()
    return found


def weighted(alone: dict[str, dict[str, Tensor]], weights: Mapping[str, float], *, own: bool = False):
    total: dict[str, Tensor] = {}
    for task, of_task in alone.items():
        for name, gradient in of_task.items():
            factor = 1.0 if own and name.startswith("heads.") else weights[task]
            total[name] = total.get(name, 0) + factor * gradient
    return total


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=tolerance * scale), name


BACKBONES = {
    "nested pyramid": {"backbone": "resnet18"},
    "channels last memory": {"backbone": "convnext_atto", "channels_last": True},
    "tokens beside maps": {"backbone": "vit_tiny_patch16_224"},
    "channels at the end": {"backbone": "swin_tiny_patch4_window7_224", "data": {"size": (64, 64)}},
    "a part frozen": {"backbone": "resnet18", "freeze_stages": 2},
    "adapters": {"backbone": "vit_tiny_patch16_224", "lora": 2},
}


class TestDelivery:
    @pytest.mark.parametrize("on", ["features", "parameters"])
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_constant_weights_give_the_gradient_of_the_weighted_sum(self, kind: str, on: str) -> None:
        if on == "parameters" and kind in ("channels last memory", "channels at the end"):
            pytest.skip("differs from the others only at the features")
        trained = module(on=on, **BACKBONES[kind])
        adapt(trained)
        data = batch(side=trained.options.data.size[0])
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        trained.training_step(data, 0).backward()
        assert len(trained.balancer.rule.seen) == 1
        assert_close(gradients(trained), expected)

    def test_heads_of_their_own_are_not_scaled(self) -> None:
        trained = module(heads="own")
        data = batch()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)), own=True)
        trained.training_step(data, 0).backward()
        assert_close(gradients(trained), expected)

    def test_a_scaled_loss_is_scaled_before_and_not_twice(self) -> None:
        """As a gradient scaler and accumulation do it: the total is multiplied before its backward pass."""
        trained = module()
        data = batch()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        trained._loss_scale = lambda: torch.tensor(1024.0)
        (trained.training_step(data, 0) * 1024 / 4).backward()
        assert_close({k: g * 4 / 1024 for k, g in gradients(trained).items()}, expected)
        unscaled = module()
        unscaled.load_state_dict(trained.state_dict())
        unscaled.training_step(data, 0)
        assert torch.allclose(trained.balancer.rule.seen[0].gram, unscaled.balancer.rule.seen[0].gram, rtol=1e-5)

    def test_two_backward_passes_accumulate(self) -> None:
        trained = module()
        data = batch()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        for _ in range(2):
            trained.training_step(data, 0).backward()
        assert_close(gradients(trained), {name: 2 * gradient for name, gradient in expected.items()})

    @pytest.mark.parametrize("on", ["features", "parameters"])
    def test_gradient_checkpointing(self, on: str) -> None:
        trained = module(backbone="vit_tiny_patch16_224", on=on)
        data = batch()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        trained.model.backbone.encoder.model.set_grad_checkpointing(True)
        trained.training_step(data, 0).backward()
        assert_close(gradients(trained), expected)

    @pytest.mark.parametrize("on", ["features", "parameters"])
    @pytest.mark.slow  # compiles for a minute
    def test_compiled(self, on: str) -> None:
        trained = module(on=on, compile=True, weighting="equal")
        data = batch()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        trained.training_step(data, 0).backward()
        assert_close(gradients(trained), expected, 1e-5)


class TestMeeting:
    def test_of_features_is_summed_over_every_element(self) -> None:
        trained = module(backbone="resnet18")
        data = batch()
        pyramid = trained.model.encode(data["image"])
        maps = [m.detach().requires_grad_(m.requires_grad) for m in pyramid.maps]
        outputs = trained.model.decode(pyramid._replace(maps=maps), (32, 32))
        leaves = [m for m in maps if m.requires_grad]
        rows = []
        for task in trained.each_task():
            loss = task.loss(outputs[task.name], data)
            found = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.double().flatten() for g in found]))
        expected = torch.stack(rows) @ torch.stack(rows).T
        trained.training_step(data, 0)
        assert torch.allclose(trained.balancer.rule.seen[0].gram, expected, rtol=1e-4, atol=1e-7 * expected.max())

    def test_of_parameters_is_that_of_the_backbone_s_own_gradients(self) -> None:
        trained = module(on="parameters")
        data = batch()
        alone = each_alone(trained, data)
        rows = torch.stack(
            [
                torch.cat([g.double().flatten() for name, g in alone[task].items() if name.startswith("backbone.")])
                for task in TASKS
            ]
        )
        trained.training_step(data, 0)
        gram = trained.balancer.rule.seen[0].gram
        assert torch.allclose(gram, rows @ rows.T, rtol=1e-4, atol=1e-7 * gram.max())
        norms = rows.norm(dim=1)
        terms = trained.terms
        cosine = float(rows[0] @ rows[2] / (norms[0] * norms[2]))
        assert terms["train/cosine/segmentation-normals"] == pytest.approx(cosine, rel=1e-3, abs=1e-6)
        shares = norms * torch.tensor(WEIGHTS).double()
        assert terms["train/gradient_share/depth"] == pytest.approx(float(shares[1] / shares.sum()), rel=1e-4)

    def test_does_not_depend_on_how_a_gradient_lies_in_memory(self) -> None:
        maps = torch.randn(2, 5, 3, 4)
        first, second = torch.randn(2, 2, 5, 3, 4)
        expected = gram_matrix([[first], [second]], [maps])
        for layout in (torch.contiguous_format, torch.channels_last):
            for of_second in (torch.contiguous_format, torch.channels_last):
                gradients = [[first.to(memory_format=layout)], [second.to(memory_format=of_second)]]
                for like in (maps, maps.to(memory_format=torch.channels_last)):
                    assert torch.allclose(gram_matrix(gradients, [like]), expected, rtol=1e-5, atol=1e-5)


class TestMissing:
    @pytest.mark.parametrize("on", ["features", "parameters"])
    def test_a_task_without_labels_is_not_shown(self, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
        trained = module(on=on)
        trained.training_step(batch(), 0)
        monkeypatch.setattr(MultiTaskModule, "global_step", 1)
        data = batch()
        data["depth"].zero_()
        expected = weighted(each_alone(trained, data), dict(zip(TASKS, WEIGHTS, strict=True)))
        trained.training_step(data, 0).backward()
        step = trained.balancer.rule.seen[1]
        assert step.present.tolist() == [0, 2] and step.gram.shape == (2, 2) and step.losses.shape == (2,)
        assert trained.balancer.held.tolist() == WEIGHTS, "its weight stays as it was"
        found = gradients(trained)
        assert_close(found, expected)
        assert not any(g.any() for name, g in found.items() if name.startswith("heads.depth"))
        assert "train/loss/depth" not in trained.terms

    def test_a_task_without_any_label_so_far_has_the_mean_weight_or_the_given_one(self) -> None:
        trained, data = module(), batch()
        data["depth"].zero_()
        trained.training_step(data, 0)
        assert trained.balancer.held.tolist() == pytest.approx([0.3, 0.5, 0.7])
        fixed = build_module(validate({"task": TASKS, "init": "none", "loss_weights": {"depth": 0.01}}), INFO, 10)
        losses = {task: torch.ones(()) for task in TASKS}
        labelled = {task: torch.tensor(task != "depth") for task in TASKS}
        fixed.balancer(losses, labelled, {}, None, 0)
        assert fixed.balancer.held.tolist() == [1.0, 0.01, 1.0]
        later = fixed.balancer(losses, dict.fromkeys(TASKS, torch.tensor(True)), {}, None, 0)
        assert later.terms["train/weight/depth"] == 0.01, "within the same optimizer step"

    def test_nothing_labelled_is_no_question(self) -> None:
        trained = module()
        data = batch()
        for name, invalid in (("segmentation", 255), ("depth", 0), ("normals", 0)):
            data[name].fill_(invalid)
        trained.training_step(data, 0).backward()
        assert not trained.balancer.rule.seen and trained.terms["train/loss"] == 0
        assert not any(g.any() for g in gradients(trained).values())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("rule", ["equal", "mgda", "uncertainty"])
    def test_a_loss_that_is_no_number_is_named_and_goes_no_further(self, value: float, rule: str) -> None:
        trained = build_module(
            validate({"task": TASKS, "init": "none", "data": {"size": (32, 32)}, "weighting": rule}), INFO, 10
        )
        trained.model.head("depth").output.bias.data.fill_(min(value, 3e38))
        data = batch()
        before = {name: value.clone() for name, value in trained.state_dict().items() if "balancer" in name}
        with pytest.raises(UserError, match=f"the loss of the task 'depth' became {value} at step 0.*--lr"):
            trained.training_step(data, 0)
        assert not gradients(trained)
        for name, kept in before.items():
            assert torch.equal(trained.state_dict()[name], kept)


class TestQuestions:
    def test_one_for_each_optimizer_step_and_every_so_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With two batches to a step and a question every third step."""
        trained = module(every=3)
        at = iter([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
        data = batch(2)
        asked = []
        for number in at:
            monkeypatch.setattr(MultiTaskModule, "global_step", property(lambda self, number=number: number))
            trained.training_step(data, 0)
            asked.append(len(trained.balancer.rule.seen))
        assert asked == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]

    def test_a_frozen_backbone_leaves_nothing_to_weigh(self) -> None:
        trained = module(freeze=True)
        data = batch()
        expected = weighted(each_alone(trained, data), dict.fromkeys(TASKS, 1.0))
        trained.training_step(data, 0).backward()
        assert not trained.balancer.rule.seen
        assert_close(gradients(trained), expected)
        experiment = validate({"task": TASKS, "freeze": True, "weighting": "mgda"})
        assert "frozen" in str(unbalanced(experiment, True))

    def test_rules_from_losses_refuse_what_only_gradients_have(self) -> None:
        for flag, fields in {
            "--weighting-every 2": {"weighting_every": 2},
            "--weighting-on parameters": {"weighting_on": "parameters"},
        }.items():
            with pytest.raises(UserError, match=flag + ".*'equal'"):
                build_module(validate({"task": TASKS, "init": "none", "weighting": "equal"} | fields), INFO, 1)

    @pytest.mark.parametrize("cut", [True, False])
    def test_a_negative_weight_never_makes_a_head_unlearn(self, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor in the batches in which the rule is not asked, where the backbone still turns away."""
        trained = module()
        trained.balancer.rule.forward = lambda step: torch.tensor([-0.5, 1.0, 1.0], dtype=torch.float64)
        data = batch()
        alone = each_alone(trained, data)
        expected = weighted(alone, {"segmentation": -0.5, "depth": 1.0, "normals": 1.0})
        for name, gradient in alone["segmentation"].items():
            if name.startswith("heads.segmentation"):
                expected[name] = 0.5 * gradient
        if not cut:
            trained.training_step(data, 0)  # asks; the next batch is of the same step
        trained.training_step(data, 0).backward()
        assert_close(gradients(trained), expected)

    @pytest.mark.parametrize("fields", [{"freeze": True}, {"tasks": ["depth"]}])
    def test_heads_of_their_own_where_nothing_meets(self, fields: dict) -> None:
        trained = module(Constant, heads="own", **fields)
        data = batch()
        alone = each_alone(trained, data)
        weights = dict.fromkeys(alone, 0.01)
        trained.training_step(data, 0).backward()
        assert_close(gradients(trained), weighted(alone, weights, own=True))

    def test_the_matrix_is_precise_whatever_the_default_type(self) -> None:
        vectors = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
        vectors[1] = vectors[0] + 1e-3 * vectors[1]
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = gram_matrix([[vectors[0]], [vectors[1]]], [vectors[0]])
        finally:
            torch.set_default_dtype(torch.float32)
        exact = vectors.double() @ vectors.double().T
        assert torch.allclose(found.double(), exact, rtol=1e-6)

    def test_a_second_look_is_at_the_batch_of_the_question(self) -> None:
        trained = module(Looking)
        data = batch()
        trained.training_step(data, 0).backward()
        with torch.no_grad():
            for parameter in trained.model.heads.parameters():
                parameter -= 0.01 * parameter.grad
        trained.look_again(nullcontext())
        ((before, after),) = trained.balancer.rule.looks
        outputs = trained.model(data["image"])
        expected = [float(task.loss(outputs[task.name], data).detach()) for task in trained.each_task()]
        assert after == pytest.approx(expected, rel=1e-5) and before != pytest.approx(expected, rel=1e-5)
        for name in ("depth", "normals"):
            data[name].zero_()
        data["segmentation"].fill_(255)
        trained.balancer.asked_at = -1
        trained.training_step(data, 0)
        trained.look_again(nullcontext())
        assert len(trained.balancer.rule.looks) == 1, "without a question there is nothing to look at"


class Constant(Weighting):
    """A hundredth for all."""

    def forward(self, step: Step) -> Tensor:
        return torch.full_like(step.losses, 0.01)


class Looking(Constant):
    """A memory of losses before and after a step."""

    needs_second_forward = True

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__(tasks)
        self.looks: list[tuple[list[float], list[float]]] = []

    def look_again(self, before: Step, losses: Tensor) -> None:
        self.looks.append((before.losses.tolist(), losses.tolist()))
