"""Batch norms that normalise as ever and remember nothing, and twins that stay as they were made."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from mtl.models.statistics import kept_statistics
from mtl.pretraining.twins import twin


def net() -> nn.Sequential:
    """Return torch's own norms, one that takes a mean of all, timm's, a frozen one, and one without memory."""
    frozen = nn.BatchNorm2d(4).eval()
    frozen.running_mean.uniform_()
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), BatchNormAct2d(4), frozen]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.BatchNorm2d(4, track_running_stats=False))


def remembered(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_outputs_are_those_of_training_and_nothing_is_remembered() -> None:
    inside = net()
    outside = copy.deepcopy(inside)
    before, image = remembered(inside), torch.randn(2, 3, 8, 8)
    with kept_statistics(inside):
        output = inside(image)
    assert torch.equal(output, outside(image))
    assert same(remembered(inside), before) and not same(remembered(outside), before)
    assert torch.equal(inside(image), outside(image))
    assert not same(remembered(inside), before), "afterwards it goes on"


def test_a_diverged_batch_leaves_them_finite() -> None:
    norms = net()
    before = remembered(norms)
    with kept_statistics(norms):
        norms(torch.full((2, 3, 8, 8), torch.inf))
    assert same(remembered(norms), before)


def test_evaluation_reads_them_as_ever() -> None:
    norms = net()
    norms(torch.randn(2, 3, 8, 8))
    norms.eval()
    image = torch.randn(2, 3, 8, 8)
    expected = norms(image)
    with kept_statistics(norms):
        assert torch.equal(norms(image), expected)


def test_it_ends_with_an_error_and_only_where_it_began() -> None:
    norms = net()
    expected = [getattr(each, "track_running_stats", None) for each in norms]
    with pytest.raises(RuntimeError, match="in the midst"), kept_statistics(norms), kept_statistics(norms):
        raise RuntimeError("in the midst")
    assert [getattr(each, "track_running_stats", None) for each in norms] == expected
    with kept_statistics(norms):
        with kept_statistics(norms):
            pass
        before = remembered(norms)
        norms(torch.randn(2, 3, 8, 8))
        assert same(remembered(norms), before), "the outer one is not over with the inner one"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_program_remembers_outside_only(in_place: bool) -> None:
    norms = net()
    reference = copy.deepcopy(norms)
    program = norms
    if in_place:
        norms.compile(backend="eager")
    else:
        program = torch.compile(norms, backend="eager")
    image, other = torch.randn(2, 2, 3, 8, 8).unbind()
    program(image)
    with kept_statistics(program):
        kept = program(other)
    after = program(image)
    reference(image)
    torch.testing.assert_close(kept, copy.deepcopy(reference)(other))
    torch.testing.assert_close(after, reference(image))
    for one, two in zip(norms.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, two)


# Twins


def test_a_twin_shares_tensors_and_neither_hooks_nor_switches() -> None:
    inner = nn.BatchNorm2d(4)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), inner, inner)
    double = twin(module)
    assert isinstance(double, nn.Sequential) and double is not module
    assert double[1] is double[2] and double[1] is not inner
    assert all(one is two for one, two in zip(double.parameters(), module.parameters(), strict=True))
    double[0].register_forward_hook(lambda module, args, output: output * 0)
    double[1].train(False)
    image = torch.randn(2, 3, 8, 8)
    assert inner.training and module[0](image).any() and not double[0](image).any()
    module(image)
    assert torch.equal(double[1].running_mean, inner.running_mean), "buffers are one"


def test_a_twin_made_inside_computes_anew_as_it_did() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    image = torch.randn(2, 3, 8, 8)

    def recomputed(part: nn.Module) -> Tensor:
        return torch.utils.checkpoint.checkpoint(part, image, use_reentrant=False)

    before = remembered(module)
    with kept_statistics(module):
        loss = recomputed(twin(module)).square().sum()
    loss.backward()
    assert module[0].weight.grad is not None and same(remembered(module), before)
    with kept_statistics(module):
        loss = recomputed(module).square().sum()
    loss.backward()
    assert not same(remembered(module), before), "without a twin the backward pass remembers"
