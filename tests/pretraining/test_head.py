"""The masked head with one member of each family: what it sees, what it predicts, and that everything learns."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtl.augmentation.draws import Draws
from mtl.config import MaskOptions
from mtl.errors import UserError
from mtl.models.backbone import Backbone
from mtl.models.statistics import kept_statistics
from mtl.pretraining.head import MaskedHead
from mtl.pretraining.masks import draw_masks
from mtl.pretraining.targets import hidden_loss, patch_target, patchify
from mtl.transfer.lora import add_lora

SIZE = (64, 64)
VIT = "vit_tiny_patch16_224"
CASES = {
    VIT: "tokens",
    "vit_tiny_patch16_dinov3_qkvb": "tokens",
    "resnet18": "convolution",
    "convnextv2_atto": "convolution",
    "efficientnet_b0": "convolution",
    "mobilenetv4_conv_small": "convolution",
    "swin_tiny_patch4_window7_224": "input",
    "hiera_tiny_224": "input",
    "maxvit_pico_rw_256": "input",
    f"{VIT}:input": "input",
}
"""What `auto` chooses for a backbone; after a colon, a method chosen by hand."""

Pair = tuple[Backbone, MaskedHead]


def build(case: str, **options: Any) -> Pair:
    """Return a backbone and its head, none of whose layers is switched off by a weight that begins at zero."""
    torch.manual_seed(0)
    name, _, method = case.partition(":")
    backbone = Backbone(name, SIZE)
    head = MaskedHead(backbone, MaskOptions(decoder_width=32, method=method or "auto", **options), 32)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *head.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone, head


@cache
def kept(case: str) -> Pair:
    """Return a pair that nobody is to change."""
    return build(case)


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Return a pair to be changed."""
    return copy.deepcopy(kept(request.param))


def picture(count: int = 2) -> Tensor:
    return functional.interpolate(torch.rand(count, 3, 8, 8), SIZE, mode="bilinear")


def draw(head: MaskedHead, image: Tensor) -> Tensor:
    return head.draw(Draws(0, 0, torch.arange(len(image))), (image.shape[-2], image.shape[-1]))


def outputs(pair: Pair, image: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the head's outputs, with the same paths dropped each time."""
    backbone, head = pair
    mask = draw(head, image) if mask is None else mask
    torch.manual_seed(1)
    result: Tensor = head(head.encode(backbone, image, mask), mask)
    return result


def loss(pair: Pair, image: Tensor) -> Tensor:
    head = pair[1]
    mask = draw(head, image)
    return hidden_loss(patchify(outputs(pair, image)[:, :3], head.patch), patch_target(image, head.patch), mask)


def gradients(pair: Pair, image: Tensor) -> dict[str, Tensor]:
    """Return gradients by name, of the backbone's parameters and of the head's, where there are any."""
    for module in pair:
        module.zero_grad()
    loss(pair, image).backward()
    modules = zip(("backbone", "head"), pair, strict=True)
    named = ((f"{kind}.{name}", p) for kind, module in modules for name, p in module.named_parameters())
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def change(image: Tensor, mask: Tensor, *, hidden: bool) -> Tensor:
    """Return images with other pixels where a mask hides, or where it does not."""
    at = functional.interpolate(mask[:, None].float(), image.shape[-2:]) > 0
    return torch.where(at == hidden, torch.rand_like(image), image)


def memory(backbone: Backbone) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in backbone.named_buffers()}


# Every family


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_colours_and_what_is_hidden(case: str) -> None:
    backbone, head = kept(case)
    assert head.method == CASES[case] and head.ratio == (0.75 if head.method == "tokens" else 0.6)
    assert (head.cover is not None) == (head.method == "input")
    assert bool(head.timm_tensors()) == (head.method == "tokens")
    image = picture()
    with torch.no_grad():
        result, mask = outputs((backbone, head), image), draw(head, image)
    assert result.shape == (2, 4, *SIZE) and result.dtype == torch.float32 and result.isfinite().all()
    assert torch.equal(result[:, 3], mask.float().repeat_interleave(32, 1).repeat_interleave(32, 2))
    assert mask.flatten(1).sum(1).tolist() == [round(head.ratio * 4)] * 2


@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_reach_nothing_and_visible_ones_do(pair: Pair, training: bool) -> None:
    image = picture()
    mask = draw(pair[1], image)
    with torch.no_grad():
        for module in pair:
            module.train(training)
        before = outputs(pair, image)
        other, third = (outputs(pair, change(image, mask, hidden=hidden)) for hidden in (True, False))
    if pair[1].method == "convolution":
        torch.testing.assert_close(other, before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(other, before)
    assert (third - before).abs().max() > 1e-2


def test_every_parameter_learns(pair: Pair) -> None:
    for module in pair:
        module.train()
    found = gradients(pair, picture())
    names = {f"backbone.{name}" for name, _ in pair[0].named_parameters()}
    names |= {f"head.{name}" for name, _ in pair[1].named_parameters()}
    assert found.keys() == names
    assert not [name for name, gradient in found.items() if not gradient.abs().sum() > 0]


def test_recomputed_activations_give_the_same_gradients_and_statistics_stay(pair: Pair) -> None:
    backbone, head = pair
    for module in pair:
        module.train()
    image, before = picture(), memory(backbone)
    # The pass is inside alone, and the backward pass is not, as in training.
    mask = draw(head, image)
    results = []
    for recomputed in (False, True):
        if recomputed:
            backbone.checkpoint_gradients()
            head.checkpoint_gradients()
        torch.manual_seed(1)
        with kept_statistics(backbone):
            features = head.encode(backbone, image, mask)
        parameters = [*backbone.parameters(), *head.parameters()]
        results.append(torch.autograd.grad(head(features, mask)[:, :3].square().mean(), parameters))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    after = memory(backbone)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if moving := [name for name in before if "running" in name]:
        outputs(pair, image)
        after = memory(backbone)
        assert not any(torch.equal(after[name], before[name]) for name in moving)


def test_half_precision_is_close_to_full(pair: Pair) -> None:
    image = picture()
    for module in pair:
        module.eval()
    with torch.no_grad():
        full = outputs(pair, image)
        with torch.autocast("cpu", torch.bfloat16):
            half = outputs(pair, image)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("case", [VIT, "mobilenetv4_conv_small", f"{VIT}:input"])
def test_one_batch_is_learned_by_heart(case: str) -> None:
    torch.manual_seed(0)
    name, _, method = case.partition(":")
    backbone = Backbone(name, SIZE)
    pair = backbone, MaskedHead(backbone, MaskOptions(decoder_width=128, method=method or "auto"), 32)
    image = functional.interpolate(torch.rand(2, 3, 2, 2), SIZE, mode="bilinear")
    optimizer = torch.optim.AdamW([p for module in pair for p in module.parameters()], 1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(loss(pair, image))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0], torch.stack(losses)


# What else a training does to a backbone


@pytest.mark.parametrize("case", [VIT, "resnet18", "resnet18:input"])
def test_what_is_frozen_stays_inert(case: str) -> None:
    backbone, head = pair = build(case)
    backbone.freeze(1)
    backbone.train()
    learning = {f"backbone.{name}" for name, p in backbone.named_parameters() if p.requires_grad}
    before = backbone.fingerprint(1)
    found = gradients(pair, picture())
    assert 0 < len(learning) < len(list(backbone.parameters()))
    assert {name for name in found if name.startswith("backbone.")} == learning
    # What stands in hidden pixels could learn only through the frozen stem, which builds no graph.
    unreached = {"cover.token"} if head.cover else set()
    assert {f"head.{n}" for n, _ in head.named_parameters() if n not in unreached} == found.keys() - learning
    assert backbone.fingerprint(1) == before


def test_adapters_learn_and_the_weights_beside_them_do_not() -> None:
    backbone, head = pair = build(VIT)
    image = picture()
    expected = outputs(pair, image)
    adapters = add_lora(backbone, 4)
    torch.testing.assert_close(outputs(pair, image), expected, rtol=1e-4, atol=1e-4)
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    found = gradients(pair, image)
    inside = {name for name in found if name.startswith("backbone.")}
    assert len(inside) == 2 * len(adapters.layers) and all(".lora_" in name for name in inside)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    assert len(found) == len(inside) + len(list(head.parameters()))


@pytest.mark.parametrize("case", [VIT, "efficientnet_b0", "maxvit_pico_rw_256"])
def test_a_copy_and_a_restored_head_are_the_same(case: str) -> None:
    backbone, head = (module.eval() for module in copy.deepcopy(kept(case)))
    image = picture()
    fresh = MaskedHead(backbone, MaskOptions(decoder_width=32, method=head.method), 32).eval()
    assert not any(name.startswith("encoder") for name in head.state_dict())
    fresh.load_state_dict(head.state_dict())
    with torch.no_grad():
        expected = outputs((backbone, head), image)
        assert torch.equal(outputs((backbone, fresh), image), expected)
        assert torch.equal(outputs((copy.deepcopy(backbone), copy.deepcopy(head)), image), expected)


@pytest.mark.parametrize("case", [VIT, "mobilenetv4_conv_small"])
def test_images_are_extended_to_whole_patches(case: str) -> None:
    pair = tuple(module.eval() for module in copy.deepcopy(kept(case)))
    image = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        result = outputs(pair, image)
        whole = outputs(pair, functional.pad(image, (0, 26, 0, 14), mode="replicate"), draw(pair[1], image))
    assert result.shape == (2, 4, 64, 96) and torch.equal(result, whole)


@pytest.mark.parametrize("case", [VIT, "resnet18", "resnet18:input"])
def test_only_what_the_compiler_takes_is_compiled(case: str) -> None:
    pair = build(case)
    alone = copy.deepcopy(pair)
    for module in (*pair, *alone):
        module.eval()
    image, programs = picture(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        programs.append(graph)
        return graph

    expected = outputs(pair, image)
    pair[1].compile(backend=backend)
    torch.testing.assert_close(outputs(pair, image), expected, rtol=1e-4, atol=1e-5)
    assert len(programs) == (2 if case == VIT else 1), "tokens and decoder, or the decoder"
    assert torch.equal(outputs(alone, image), expected) and len(programs) < 3, "another head is as it was"
    assert torch.equal(outputs((pair[0], copy.deepcopy(pair[1])), image), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "recomputed", "backend"),
    [
        (VIT, False, "inductor"),
        (VIT, True, "aot_eager"),
        ("vit_tiny_patch16_dinov3_qkvb", True, "aot_eager"),
        ("resnet18:input", True, "aot_eager"),
    ],
)
def test_compiled_gradients_are_the_same_and_statistics_stay(case: str, recomputed: bool, backend: str) -> None:
    backbone, head = pair = build(case)
    image = picture()
    expected, before = gradients(pair, image), memory(backbone)
    if recomputed:
        backbone.checkpoint_gradients()
        head.checkpoint_gradients()
    backbone.compile(backend=backend)
    head.compile(backend=backend)
    mask = draw(head, image)
    with kept_statistics(backbone):
        features = head.encode(backbone, image, mask)
    head(features, mask).square().mean().backward()
    after = memory(backbone)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name, gradient in gradients(pair, image).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-4)


# Options


@pytest.mark.parametrize("case", [VIT, "resnet18", "resnet18:input"])
@pytest.mark.parametrize("patch", [32, 64])
def test_training_starts_at_a_colour(case: str, patch: int) -> None:
    backbone, _ = kept(case)
    head = MaskedHead(backbone, MaskOptions(decoder_width=32, method=CASES.get(case, "input")), patch)
    torch.nn.init.zeros_(head.decoder.predict.weight)
    head.set_bias(torch.tensor([0.2, 0.5, 0.7]))
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        colours = outputs((backbone, head), image)[0, :3]
    assert torch.equal(colours, torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1).expand(3, 128, 128))


@pytest.mark.parametrize("blocks", [False, True])
def test_masks_are_those_of_the_options(blocks: bool) -> None:
    backbone, _ = kept("resnet18")
    head = MaskedHead(backbone, MaskOptions(method="input", ratio=0.3, blocks=blocks), 64)
    draws = Draws(5, 2, torch.tensor([3, 8]))
    assert head.ratio == 0.3
    assert torch.equal(head.draw(draws, (500, 640)), draw_masks(draws, (8, 10), 0.3, blocks=blocks))


@pytest.mark.parametrize(
    ("case", "options", "patch", "message"),
    [
        (VIT, {}, 24, "--mask.patch 24: .*16 or a multiple"),
        (VIT, {"method": "convolution"}, 16, "--mask.method convolution: "),
        ("swin_tiny_patch4_window7_224", {"method": "tokens"}, 32, "--mask.method tokens: "),
        ("resnet18", {"decoder_depth": 2}, 32, "--mask.decoder-depth 2: 'resnet18' .*leave the option out"),
        (VIT, {"decoder_depth": 4, "method": "input"}, 16, f"--mask.decoder-depth 4: '{VIT}' is masked by .*'input'"),
    ],
)
def test_what_does_not_suit_a_backbone_is_a_sentence(case: str, options: Any, patch: int, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        MaskedHead(kept(case)[0], MaskOptions(**options), patch)


def test_the_decoder_is_as_large_as_the_options_say() -> None:
    backbone, _ = kept(VIT)
    head = MaskedHead(backbone, MaskOptions(decoder_width=64, decoder_depth=2), 16)
    assert len(head.decoder.blocks) == 2 and head.decoder.mask_token.shape[-1] == 64
    assert len(MaskedHead(backbone, MaskOptions(), 16).decoder.blocks) == 4
