import math

import pytest
import torch
from torch import nn

from mtl.build import build_model, build_module, build_tasks, check_monitor
from mtl.config import Experiment, changed, validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.training.module import MultiTaskModule, gain, parameter_groups, schedule

INFO = DataInfo("test", ("segmentation", "depth"), ("wall", "floor", "chair"))


def module(**fields) -> MultiTaskModule:
    fields = {"init": "none", "decoder_channels": 16, "data": {"size": (32, 32)}} | fields
    return build_module(validate(fields), INFO, total_steps=100)


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    return {
        "image": torch.rand(size, 3, 32, 32),
        "segmentation": torch.randint(0, 3, (size, 32, 32), dtype=torch.uint8),
        "depth": torch.rand(size, 1, 32, 32) + 1,
    }


def gradients(of: MultiTaskModule) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


class TestLoss:
    def test_is_the_weighted_sum_of_the_tasks_losses(self) -> None:
        """L = alpha L_seg + beta L_depth, in value and in the gradient of every parameter."""
        trained = module(loss_weights={"segmentation": 0.3, "depth": 2.0})
        trained.eval()
        data = batch()
        trained.training_step(data, 0).backward()
        combined = gradients(trained)
        total, expected = 0.0, {}
        for name, weight in (("segmentation", 0.3), ("depth", 2.0)):
            trained.zero_grad()
            loss = trained.tasks[name].loss(trained.model(data["image"])[name], data)
            loss.backward()
            total += weight * float(loss)
            for key, value in gradients(trained).items():
                expected[key] = expected.get(key, 0) + weight * value
        assert float(trained.terms["train/loss"]) == pytest.approx(total, rel=1e-6)
        assert combined.keys() == expected.keys()
        for key, value in combined.items():
            assert torch.allclose(value, expected[key], rtol=1e-4, atol=1e-6), key

    def test_a_task_without_labels_changes_nothing_for_the_other(self) -> None:
        trained = module().eval()
        data = batch()
        alone = trained.tasks["depth"].loss(trained.model(data["image"])["depth"], data)
        alone.backward()
        expected = gradients(trained)
        trained.zero_grad()
        data["segmentation"].fill_(255)
        trained.training_step(data, 0).backward()
        found = gradients(trained)
        assert "train/loss/segmentation" not in trained.terms and "train/loss/depth" in trained.terms
        for name, value in found.items():
            if "heads.segmentation" in name:
                assert (value == 0).all()
            else:
                assert torch.equal(value, expected[name]), name

    def test_half_labelled_batches_average_over_what_is_labelled(self) -> None:
        trained = module(task="depth").eval()
        data = batch()
        half = {name: values[:2] for name, values in data.items()}
        data["depth"][2:] = 0
        outputs = trained.model(data["image"])["depth"]
        assert torch.allclose(
            trained.tasks["depth"].loss(outputs, data), trained.tasks["depth"].loss(outputs[:2], half)
        )


class TestOptimizer:
    def test_holds_each_learning_parameter_once_and_norms_and_biases_without_decay(self) -> None:
        trained = module(weight_decay=0.1)
        groups = parameter_groups(trained, 0.1)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in trained.parameters())
        undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        for owner in trained.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                is_norm = isinstance(owner, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)
                assert (id(parameter) in undecayed) == (is_norm or name == "bias")

    def test_does_not_hold_a_frozen_backbone(self) -> None:
        trained = module(freeze=True)
        held = {id(p) for group in trained.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
        assert held == {id(p) for p in trained.model.heads.parameters()}

    @pytest.mark.parametrize(
        ("name", "momentum", "expected"),
        [("sgd", None, 0.9), ("sgd", 0.0, 0.0), ("rmsprop", None, 0.0), ("rmsprop", 0.5, 0.5)],
    )
    def test_momentum(self, name: str, momentum: float | None, expected: float) -> None:
        optimizer = module(optimizer=name, momentum=momentum).configure_optimizers()["optimizer"]
        assert all(group["momentum"] == expected for group in optimizer.param_groups)
        assert type(optimizer).__name__.lower() == name

    def test_schedules(self) -> None:
        cosine, linear, constant = (schedule(kind, 110, 10) for kind in ("cosine", "linear", "constant"))
        assert [round(cosine(step), 6) for step in (0, 9, 10, 60, 110, 500)] == [
            round(1 / 11, 6), round(10 / 11, 6), 1, 0.5, 0, 0,
        ]  # fmt: skip
        assert cosine(35) == pytest.approx(0.5 + math.sqrt(2) / 4)
        assert [linear(step) for step in (10, 60, 110)] == [1, 0.5, 0]
        assert [constant(step) for step in (10, 60, 110)] == [1, 1, 1]
        assert schedule("constant", 200, None)(9) < 1 == schedule("constant", 200, None)(10), "a twentieth is 10"
        assert schedule("cosine", 100, 0)(0) == 1


class TestGain:
    def test_is_the_mean_share_of_the_error_removed(self) -> None:
        tasks = build_tasks(Experiment(), INFO)
        results = {"segmentation/miou": 0.6, "depth/abs_rel": 0.1}
        constant = {"segmentation/miou": 0.2, "depth/abs_rel": 0.4}
        assert gain(tasks, results, constant) == pytest.approx((0.5 + 0.75) / 2)
        assert gain(tasks, constant, constant) == 0
        assert gain(tasks, {"segmentation/miou": 1.0, "depth/abs_rel": 0.0}, constant) == 1

    def test_leaves_out_a_task_without_labels(self) -> None:
        tasks = build_tasks(Experiment(), INFO)
        results = {"segmentation/miou": math.nan, "depth/abs_rel": 0.1}
        constant = {"segmentation/miou": math.nan, "depth/abs_rel": 0.4}
        assert gain(tasks, results, constant) == pytest.approx(0.75)

    def test_monitor_knows_every_metric_and_its_direction(self) -> None:
        trained = module()
        for monitor, higher in [
            ("gain", True),
            ("depth/rmse", False),
            ("depth/delta1", True),
            ("segmentation/miou", True),
            ("segmentation/iou/chair", True),
        ]:
            assert check_monitor(validate({"monitor": monitor}), trained) is higher
        with pytest.raises(UserError, match="did you mean 'depth/rmse'"):
            check_monitor(validate({"monitor": "depth/rms"}), trained)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_validation_names_every_metric_and_measures_constants_once(precision: torch.dtype) -> None:
    trained = module().eval()
    trained.log_dict = lambda *args, **kwargs: None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        trained.validation_step(batch(), 0)
    trained.on_validation_epoch_end()
    assert trained.results.keys() == trained.constant.keys() | {"gain"}
    before = dict(trained.constant)
    trained.validation_step(batch(), 0)
    trained.on_validation_epoch_end()
    assert trained.constant == before


def test_a_size_the_backbone_cannot_take_is_a_sentence() -> None:
    experiment = validate({"backbone": "inception_v4", "init": "none", "data": {"size": (16, 16)}})
    with pytest.raises(UserError, match="16x16"):
        build_model(experiment, build_tasks(experiment, INFO))


def test_a_batch_that_normalisation_cannot_take_is_a_sentence() -> None:
    experiment = validate({"decoder": "deeplabv3plus", "batch_size": 1, "data": {"size": (64, 64)}})
    with pytest.raises(UserError, match=r"one at a time.*--batch-size"):
        build_model(experiment, build_tasks(experiment, INFO))
    build_model(experiment, build_tasks(experiment, INFO), training=False)
    build_model(changed(experiment, {"batch_size": 2}), build_tasks(experiment, INFO))


def test_images_become_floats_on_the_device_in_the_model_s_layout() -> None:
    trained = module()
    raw = {"image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "depth": torch.ones(2, 1, 32, 32).half()}
    prepared = trained.on_after_batch_transfer(raw, 0)
    assert torch.equal(prepared["image"], raw["image"].float() / 255)
    assert prepared["image"].is_contiguous(memory_format=torch.channels_last)
    assert prepared["depth"].dtype == torch.float32 and raw["image"].dtype == torch.uint8
