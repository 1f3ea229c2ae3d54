"""Masked convolution against the plain backbone on the visible part alone, and against sums over positions."""

import copy
import itertools

import pytest
import torch
from timm.layers import (
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    EvoNorm2dS0,
    FilterResponseNormTlu2d,
    GlobalContext,
    SEModule,
)
from timm.layers.cbam import ChannelAttn
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.models.backbone import Backbone, Pyramid
from mtl.pretraining.masked_convolution import masked_features, separates
from mtl.pretraining.methods import check_method, method_of

FAMILIES = [
    "resnet10t",
    "convnext_atto",
    "convnextv2_atto",
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "regnetx_002",
    "regnety_002",
    "repvit_m0_9",
    "ghostnet_050",
    "lcnet_050",
    "tinynet_e",
    "hgnetv2_b0",
    "fastvit_t8",
    "fasternet_t0",
]
"""Small members of the families."""

MORE = [
    "starnet_s1",
    "cs3darknet_s",
    "ese_vovnet19b_dw",
    "inception_next_atto",
    "repghostnet_050",
    "rexnet_100",
    "resnet26d",
    "resnetblur50",
    "ecaresnet26t",
    "gcresnet33ts",
    "legacy_seresnet18",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "mixnet_s",
    "mobileone_s0",
    "repvgg_a0",
    "dla34",
    "res2net50_14w_8s",
    "densenet121",
    "vgg11_bn",
    "nf_regnet_b0",
    "resnetv2_50",
    "mambaout_femto",
    "tresnet_m",
    "hardcorenas_a",
]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return awake(request.param)


def awake(name: str) -> Backbone:
    """Return a backbone in double precision, none of whose layers is switched off by a weight that begins at zero."""
    torch.manual_seed(0)
    backbone = Backbone(name, (64, 64)).double()
    for parameter in backbone.parameters():
        if parameter.detach().abs().amax() < 1e-2:
            nn.init.uniform_(parameter)
    return backbone


def pixels(mask: Tensor) -> Tensor:
    return mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)


def scaled(difference: Tensor, reference: Tensor) -> float:
    return float(difference.abs().max() / reference.abs().max()) if reference.numel() else 0.0


# The families


def compare_with_the_isolated_part(backbone: Backbone, training: bool) -> None:
    """The visible columns of a picture, the others hidden, give what those columns alone give the plain backbone."""
    image = torch.rand(2, 3, 64, 96, dtype=torch.float64, generator=seeded())
    mask = torch.tensor([False, False, True]).expand(2, 2, 3)
    plain, masked = (copy.deepcopy(backbone).train(training) for _ in range(2))
    expected = plain(image[..., :64]).maps
    actual = masked_features(masked, image, mask).maps
    for one, whole in zip(expected, actual, strict=True):
        width = one.shape[-1]
        assert scaled(whole[..., :width] - one, one) < 1e-9
        assert not whole[..., width:].any()
    for statistic, reference in zip(masked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(statistic, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_a_family_sees_the_visible_part_as_if_it_were_alone(backbone: Backbone, training: bool) -> None:
    compare_with_the_isolated_part(backbone, training)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MORE)
def test_more_families_see_the_visible_part_as_if_it_were_alone(name: str, training: bool) -> None:
    compare_with_the_isolated_part(awake(name), training)


@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_reach_nothing_visible(backbone: Backbone, training: bool) -> None:
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=seeded())
    mask = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    backbone.train(training)
    with torch.no_grad():
        maps = [
            masked_features(backbone, picture, mask).maps
            for picture in (image, torch.where(pixels(mask), 100 * (1 - image), image))
        ]
    for first, second in zip(*maps, strict=True):
        assert scaled(second - first, first) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_with_nothing_hidden_it_is_the_plain_backbone(backbone: Backbone, training: bool) -> None:
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=seeded())
    backbone.train(training)
    with torch.no_grad():
        expected = backbone(image).maps
        actual = masked_features(backbone, image, torch.zeros(2, 2, 2, dtype=torch.bool)).maps
    for one, other in zip(expected, actual, strict=True):
        assert scaled(other - one, one) < 1e-9


# Position by position


class Small(nn.Module):
    """Something with the attributes of a backbone that matter here."""

    def __init__(self, *layers: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.strides = [stride]

    def forward(self, image: Tensor) -> Pyramid:
        return Pyramid([self.layers(image)], [])


Positions = dict[tuple[int, int, int], Tensor]


def convolve(positions: Positions, conv: nn.Conv2d, size: int) -> Positions:
    """Sparse convolution from its definition: a sum over those neighbours that exist.

    An output of stride s exists where any of its s x s inputs does.
    """
    stride, reach = conv.stride[0], conv.padding[0]
    outputs = {(b, y // stride, x // stride) for b, y, x in positions}
    result = {}
    for b, y, x in outputs:
        assert 0 <= y < size // stride
        total = conv.bias.clone()
        for i, j in itertools.product(range(conv.kernel_size[0]), repeat=2):
            neighbour = (b, y * stride + i - reach, x * stride + j - reach)
            if neighbour in positions:
                total = total + conv.weight[:, :, i, j] @ positions[neighbour]
        result[b, y, x] = total
    return result


def test_it_is_sparse_convolution_with_statistics_by_hand() -> None:
    torch.manual_seed(0)
    first, norm, second = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, stride=2, padding=1)
    small = Small(first, norm, nn.ReLU(), second, stride=2).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    mask = torch.rand(3, 4, 4, generator=seeded()).flatten(1).argsort(1).view(3, 4, 4) < 9
    image = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=seeded())
    fine = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)

    positions = {(b, y, x): image[b, :, y, x] for b, y, x in (~fine).nonzero().tolist()}
    positions = convolve(positions, first, 8)
    stacked = torch.stack(list(positions.values()))
    mean, variance = stacked.mean(0), stacked.var(0, correction=0)
    positions = {
        at: ((value - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).relu()
        for at, value in positions.items()
    }
    positions = convolve(positions, second, 8)
    expected = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    for (b, y, x), value in positions.items():
        expected[b, :, y, x] = value

    parameters = list(small.parameters())
    for layout in (torch.contiguous_format, torch.channels_last):
        norm.reset_running_stats()
        actual = masked_features(small, image.contiguous(memory_format=layout), mask).maps[0]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for one, other in zip(
            torch.autograd.grad(actual.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * stacked.var(0))


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pool(x)


STATISTICS = {
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "batch norm": nn.BatchNorm2d(8),
    "batch norm without running statistics": nn.BatchNorm2d(8, track_running_stats=False).eval(),
    "evonorm": EvoNorm2dS0(8, groups=2, group_size=None),
    "filter response norm": FilterResponseNormTlu2d(8),
    "squeeze-excite": SEModule(8, rd_channels=4),
    "effective squeeze-excite": EffectiveSEModule(8),
    "squeeze-excite with its own batch norm": SEModule(8, rd_channels=4, norm_layer=nn.BatchNorm2d),
    "eca": EcaModule(8),
    "ceca": CecaModule(8),
    "global context": GlobalContext(8, fuse_add=True),
    "channel attention": ChannelAttn(8, rd_channels=4),
    "global response norm": GlobalResponseNorm(8, channels_last=False),
    "global response norm, channels last": ChannelsLast(GlobalResponseNorm(8)),
    "pooling": Pooled(),
    "maximum": nn.MaxPool2d(3, 1, 1),
    "average": nn.AvgPool2d(3, 1, 1),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", STATISTICS)
def test_a_layer_sees_the_visible_part_as_if_it_were_alone(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    small = Small(copy.deepcopy(STATISTICS[name])).double()
    for parameter in small.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    # Negative, so that a zero in place of what is hidden would be the largest.
    image = -1 - torch.rand(3, 8, 4, 6, dtype=torch.float64, generator=seeded()).contiguous(memory_format=layout)
    mask = (torch.arange(6) > 2).expand(3, 4, 6)
    expected = copy.deepcopy(small)(image[..., :3]).maps[0]
    actual = masked_features(small, image, mask).maps[0]
    torch.testing.assert_close(actual[..., :3], expected, rtol=1e-10, atol=1e-10)
    assert not actual[..., 3:].any()


# What it leaves alone


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


@pytest.mark.parametrize("name", ["resnet10t", "convnextv2_atto"])
def test_the_backbone_is_as_before(name: str) -> None:
    backbone = Backbone(name, (64, 64)).eval()
    image, mask = torch.rand(2, 3, 64, 64), torch.eye(2).bool().expand(2, 2, 2)
    before, fingerprint, count = backbone(image).maps, backbone.fingerprint(), hooks(backbone)
    masked = masked_features(backbone, image, mask).maps
    with pytest.raises(ValueError, match="does not fit"):
        masked_features(backbone, image, torch.eye(3).bool().expand(2, 3, 3))
    with pytest.raises(ValueError, match="equally many"):
        masked_features(backbone, image, torch.tensor([[[True, False]] * 2, [[False, False]] * 2]))
    assert hooks(backbone) == count and backbone.fingerprint() == fingerprint
    assert all(torch.equal(one, other) for one, other in zip(before, backbone(image).maps, strict=True))
    assert all(p.grad is None for p in backbone.parameters())
    masked[-1].sum().backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if "encoder" in n)


def gradients(backbone: Backbone, image: Tensor, mask: Tensor) -> list[Tensor]:
    """Return those of a plain pass between two masked ones, with another mask each, in one backward pass."""
    passes = [masked_features(backbone, image, mask), backbone(image), masked_features(backbone, image, ~mask)]
    loss = sum(factor * each.maps[-1].square().sum() for factor, each in zip((1, 2, 3), passes, strict=True))
    return list(torch.autograd.grad(loss, [p for p in backbone.parameters() if p.requires_grad]))


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_and_several_passes_change_no_gradient(training: bool) -> None:
    backbone = awake("resnet10t").train(training)
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=seeded())
    mask = torch.eye(2).bool().expand(2, 2, 2)
    expected = gradients(backbone, image, mask)
    backbone.encoder.model.set_grad_checkpointing(True)
    for one, other in zip(gradients(backbone, image, mask), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_frozen_parts_stay_inert() -> None:
    backbone = Backbone("resnet10t", (64, 64))
    backbone.freeze()
    before = backbone.fingerprint()
    maps = masked_features(backbone.train(), torch.rand(2, 3, 64, 64), torch.eye(2).bool().expand(2, 2, 2)).maps
    assert not any(each.requires_grad for each in maps) and backbone.fingerprint() == before


def test_in_half_precision_nothing_leaks_either() -> None:
    backbone = Backbone("resnet10t", (64, 64)).train()
    image, mask = torch.rand(2, 3, 64, 64, generator=seeded()), torch.eye(2).bool().expand(2, 2, 2)
    reference = masked_features(backbone, image, mask).maps
    with torch.autocast("cpu", torch.bfloat16):
        maps, other = (
            masked_features(backbone, torch.where(pixels(mask), fill, image), mask).maps for fill in (0.0, 1.0)
        )
    assert maps[-1].dtype == torch.bfloat16
    assert all(torch.equal(one, two) for one, two in zip(maps, other, strict=True))
    assert scaled(maps[2].float() - reference[2], reference[2]) < 0.05


def test_a_compiled_backbone_is_masked_all_the_same() -> None:
    backbone = Backbone("resnet10t", (64, 64)).eval()
    image, mask = torch.rand(2, 3, 64, 64, generator=seeded()), torch.eye(2).bool().expand(2, 2, 2)
    expected = masked_features(backbone, image, mask).maps[-1]
    backbone.compile(backend="eager")
    plain = backbone(image).maps[-1]
    assert torch.equal(masked_features(backbone, image, mask).maps[-1], expected)
    assert torch.equal(backbone(image).maps[-1], plain)

    def joint(image: Tensor) -> Tensor:
        return masked_features(backbone, 1 * image, mask).maps[-1] + 1

    assert torch.equal(torch.compile(joint, backend="eager")(image), expected + 1)


# Which backbones


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("convnextv2_atto", "convolution"),
        ("mobilenetv3_small_050", "convolution"),
        ("edgenext_xx_small", "input"),  # its attention sums over positions
        ("resnest14d", "input"),  # its means over positions are in the midst of a layer
        ("swin_tiny_patch4_window7_224", "input"),
        ("vit_tiny_patch16_224", "tokens"),
    ],
)
def test_the_method_of_a_backbone_is_found_by_trying(name: str, method: str) -> None:
    backbone = Backbone(name, (64, 64))
    assert method_of(backbone) == method
    check_method(backbone, "input")


def test_the_trial_leaves_the_backbone_and_the_generator_alone() -> None:
    backbone = Backbone("resnet10t", (64, 64)).train()
    backbone.freeze(1)
    before, state = backbone.fingerprint(), torch.get_rng_state()
    assert separates(backbone)
    assert backbone.fingerprint() == before and backbone.frozen_stages == 1 and backbone.training
    assert torch.equal(torch.get_rng_state(), state)


def test_methods_that_do_not_fit_are_refused() -> None:
    resnet, edgenext = Backbone("resnet10t", (64, 64)), Backbone("edgenext_xx_small", (64, 64))
    check_method(resnet, "convolution")
    check_method(resnet, "input")
    with pytest.raises(UserError, match=r"--mask\.method tokens: 'resnet10t' .* use --mask\.method input"):
        check_method(resnet, "tokens")
    with pytest.raises(UserError, match=r"--mask\.method convolution: 'edgenext_xx_small' .* such as attention"):
        check_method(edgenext, "convolution")
    with pytest.raises(UserError, match="did you mean 'convolution'"):
        check_method(resnet, "convolutions")


def test_maps_that_no_patches_fit_are_refused() -> None:
    small = Small(nn.ZeroPad2d((0, 1, 0, 1)), nn.GroupNorm(1, 3))
    with pytest.raises(UserError, match=r"--mask\.method convolution: a map of 5x5 .* 4x4 patches"):
        masked_features(small, torch.rand(1, 3, 4, 4), torch.eye(4).bool().unsqueeze(0))
