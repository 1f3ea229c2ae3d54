"""What regularizes, as a training step delivers it: against closed forms, and each beside each other."""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.training.module import MultiTaskModule

INFO = DataInfo("test", ("segmentation", "depth"), ("wall", "floor", "chair"))
FLAGS = {
    "l2": {"regularize": {"l2": 1e-3}},
    "l1": {"regularize": {"l1": 1e-4}},
    "l2_sp": {"regularize": {"l2_sp": 1e-2}, "init": "shipped"},
    "gradient_norm": {"regularize": {"gradient_norm": 1e-2}},
    "batch_variance": {"regularize": {"batch_variance": 1e-2}, "accumulate": 2},
    "sam": {"regularize": {"sam": 0.05}},
    "weight_noise": {"regularize": {"weight_noise": 1e-3}},
    "depth_jitter": {"regularize": {"depth_jitter": 0.1}},
    "measure": {"regularize": {"measure": 2}},
    "drop_path": {"drop_path": 0.2},
    "dropout": {"dropout": 0.2},
    "swa": {"swa": 0.5},
    "snapshots": {"snapshots": 2},
}


def merged(*parts: dict) -> dict:
    """Return fields put together, those of `regularize` one by one."""
    fields: dict = {}
    for part in parts:
        options = fields.get("regularize", {}) | part.get("regularize", {})
        fields |= part | ({"regularize": options} if options else {})
    return fields


@functools.cache
def built(init: str, drop_path: float | None, dropout: float | None) -> MultiTaskModule:
    """Return a module to be copied, as building takes longer than a few steps."""
    torch.manual_seed(0)
    fields = {"init": init, "drop_path": drop_path, "dropout": dropout, "task": ["depth"], "data": {"size": (32, 32)}}
    return build_module(validate(fields | {"decoder_channels": 16}), INFO, total_steps=10)


def module(*parts: dict, **fields) -> MultiTaskModule:
    defaults = {"init": "none", "decoder_channels": 16, "data": {"size": (32, 32)}, "task": ["depth"], "warmup": 0}
    options = validate(merged(defaults, *parts, fields))
    if options.task == ["depth"]:
        base = copy.deepcopy(built(options.init, options.drop_path, options.dropout))
        made = MultiTaskModule(base.model, base.each_task(), base.balancer, options, 10, INFO)
    else:
        torch.manual_seed(0)
        made = build_module(options, INFO, total_steps=10)
    made.on_fit_start()
    return made


def batch(number: int = 0, size: int = 2, side: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3 + number)
    return {
        "image": torch.rand(size, 3, side, side, generator=generator),
        "segmentation": torch.randint(0, 3, (size, side, side), dtype=torch.uint8, generator=generator),
        "depth": torch.rand(size, 1, side, side, generator=generator) + 1,
        "draw": torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1),
    }


def accumulated(of: MultiTaskModule, batches: int | None = None) -> dict[str, Tensor]:
    """Return the gradient of a step, as Lightning accumulates it."""
    of.zero_grad()
    count = of.options.accumulate
    for number in range(count if batches is None else batches):
        data = of.on_after_batch_transfer(batch(number), 0)
        (of.training_step(data, number) / count).backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm(), (found - expected).norm() / expected.norm()


@pytest.mark.parametrize(("first", "second"), itertools.combinations(FLAGS, 2))
def test_any_two_go_together(first: str, second: str) -> None:
    """A few steps, and everything is finite; nothing of what stands elsewhere for a while is left there."""
    fields = merged(FLAGS[first], FLAGS[second], {"optimizer": "sgd", "lr": 0.01})
    trained = module(fields).train()
    optimizer = trained.configure_optimizers()["optimizer"]
    for step in range(2):
        before = {name: p.detach().clone() for name, p in trained.named_parameters()}
        gradients = accumulated(trained)
        assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert all(math.isfinite(value) for value in (trained.terms | trained.regularizer.measured).values())
        optimizer.step()
        assert any(not torch.equal(p, before[name]) for name, p in trained.named_parameters()), step


ADDED = ("l2", "l1", "l2_sp", "gradient_norm", "batch_variance")


@pytest.mark.parametrize(("first", "second"), itertools.combinations(ADDED, 2))
@pytest.mark.parametrize("beside", [{}, {"sam": 0.05}, {"weight_noise": 1e-3}])
def test_what_is_added_adds_up(first: str, second: str, beside: dict) -> None:
    """The gradient of both is that of one plus that of the other, whatever else the step does.

    L2-SP is left out with l2 and l1, which then act on other weights.
    """
    if "l2_sp" in (first, second) and {first, second} & {"l2", "l1"}:
        pytest.skip("l2 and l1 count for other weights beside l2-sp")
    strong = {"l2": 0.1, "l1": 0.1, "l2_sp": 0.1, "gradient_norm": 1.0, "batch_variance": 1.0}
    common = {"init": "shipped", "accumulate": 2}

    def gradient(*names: str) -> Tensor:
        made = module(common, {"regularize": beside | {name: strong[name] for name in names}}).eval()
        with torch.no_grad():
            for parameter in made.model.parameters():  # away from the start
                parameter.mul_(1.1)
        return flat(accumulated(made))

    without, one, other, both = gradient(), gradient(first), gradient(second), gradient(first, second)
    assert min((one - without).norm(), (other - without).norm()) > 1e-4 * without.norm()
    close(both - without, (one - without) + (other - without), 2e-3)
