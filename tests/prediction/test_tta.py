"""Averages over views, with models whose answers are known in closed form."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.errors import UserError
from mtl.prediction.predictor import Predictor
from mtl.prediction.tta import SCALES, AveragedViews
from mtl.tasks.depth import NEAREST
from mtl.tasks.normals import directions
from mtl.training.module import MultiTaskModule

TASKS = ("segmentation", "depth", "normals")
CLASSES = ("red", "green", "blue")
SIZE = (24, 32)


def module(inverse: bool = False, **fields: Any) -> MultiTaskModule:
    fields = {"init": "none", "decoder_channels": 16, "task": TASKS, "data": {"size": SIZE}} | fields
    return build_module(validate(fields), DataInfo("test", TASKS, CLASSES, inverse), total_steps=0).eval()


REAL = module()
CANONICAL = module(augmentation={"depth_convention": "canonical"})
CANONICAL_INVERSE = module(inverse=True, augmentation={"depth_convention": "canonical"})

Answers = dict[str, Tensor]


class StandIn(nn.Module):
    """A model that answers by a formula; what it was shown is kept."""

    class AnyBackbone(nn.Module):
        """What is asked of a backbone."""

        size_arguments: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, formula: Callable[[Tensor], Answers]) -> None:
        super().__init__()
        self.backbone = self.AnyBackbone()
        self.unused = nn.Parameter(torch.zeros(()))
        self.formula = formula
        self.shown: list[Tensor] = []

    def forward(self, image: Tensor) -> Answers:
        self.shown.append(image)
        # What a formula does not speak of.
        others = {"segmentation": image, "depth": image[:, :1], "normals": image}
        return others | self.formula(image)


def around(
    formula: Callable[[Tensor], Answers], scales: Sequence[float] = (), like: MultiTaskModule = REAL
) -> tuple[AveragedViews, StandIn]:
    """Return the averaged views of a stand-in for the model of a module."""
    other = MultiTaskModule(StandIn(formula), like.each_task(), like.balancer, like.options, 0, like.info)
    return AveragedViews(other, scales), other.model


def output_of(depth: Tensor) -> Tensor:
    """Return the head's output that stands for a depth: the inverse of softplus."""
    return (depth - NEAREST).double().expm1().log()


def centred(image: Tensor) -> Tensor:
    """Return columns (W,) from -1 to 1 in the picture's own width."""
    width = image.shape[-1]
    return (2 * torch.arange(width, dtype=torch.float64) + 1 - width) / width


images = st.builds(
    lambda b, h, w, seed: torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)),
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**31),
)


class TestFlip:
    @given(images)
    @settings(max_examples=25, deadline=None)
    def test_a_model_that_does_not_mind_keeps_its_answer(self, image: Tensor) -> None:
        def formula(image: Tensor) -> Answers:
            padded = nn.functional.pad(image, (1, 1, 0, 0), mode="replicate")
            slope = padded[..., 2:] - padded[..., :-2]  # changes its sign in the mirror, as n_x does
            return {"normals": torch.stack([slope[:, 0], image[:, 0] - 0.5, -image[:, 1] - 0.1], 1)}

        views, model = around(formula)
        found, expected = views(image), views.module(image)
        assert found.keys() == expected.keys()
        # torch's softplus differs in the last bit between pixels at the end of memory and others.
        assert torch.allclose(found["depth"], expected["depth"], rtol=2e-7, atol=0)
        assert torch.equal(found["segmentation"], expected["segmentation"])
        assert torch.allclose(found["normals"], expected["normals"], atol=1e-6)
        assert len(model.shown) == 3 and torch.equal(model.shown[1], image.flip(-1))

    def test_errors_of_opposite_sign_cancel(self) -> None:
        """The model sees the left too near, too red and turned to the right, whatever the picture."""

        def formula(image: Tensor) -> Answers:
            x = centred(image).expand(len(image), 1, *image.shape[-2:])
            wrong = 0.5 * x
            red = 0.6 + wrong.clamp(-0.39, 0.39)
            share = torch.cat([red, 1 - red - 0.001, torch.full_like(red, 0.001)], 1)
            turned = torch.cat([torch.full_like(x, math.sin(0.3)), 0 * x, torch.full_like(x, -math.cos(0.3))], 1)
            return {"depth": output_of(3 + wrong), "segmentation": share.log(), "normals": turned}

        views, _ = around(formula)
        image = torch.rand(2, 3, 5, 9)
        alone, found = views.module(image), views(image)
        assert (alone["depth"] - 3).abs().max() > 0.4 and (alone["segmentation"] == 1).any()
        assert torch.allclose(found["depth"], torch.tensor(3.0, dtype=torch.float64))
        assert (found["segmentation"] == 0).all()
        facing = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).view(3, 1, 1)
        assert torch.allclose(found["normals"], facing.expand(2, 3, 5, 9))

    def test_the_real_model_by_hand(self) -> None:
        """Average softmax, metres and directions of an image and of its mirror image, in NumPy."""
        image = torch.rand(1, 3, 32, 64)
        with torch.no_grad():
            straight, flipped = (
                {name: value.double().numpy() for name, value in REAL.model(shown).items()}
                for shown in (image, torch.from_numpy(image.numpy()[..., ::-1].copy()))
            )
        found = AveragedViews(REAL, ())(image)

        def mean(name: str, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            return (form(straight[name]) + form(flipped[name])[..., ::-1]) / 2

        odds = mean("segmentation", lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True))
        assert (found["segmentation"].numpy() == odds.argmax(axis=1)).all()
        assert np.allclose(found["depth"], mean("depth", lambda z: np.log1p(np.exp(z)) + 1e-3), rtol=1e-5)
        flipped["normals"][:, 0] *= -1
        normals = mean("normals", lambda z: z / np.linalg.norm(z, axis=1, keepdims=True))
        assert np.allclose(found["normals"], normals / np.linalg.norm(normals, axis=1, keepdims=True), atol=1e-5)


class TestScales:
    @pytest.mark.parametrize("size", [(24, 32), (37, 51)])
    @pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
    def test_what_the_model_is_shown_is_pillow_s_picture(self, scale: float, size: tuple[int, int]) -> None:
        image = torch.rand(1, 3, *size)
        views, model = around(lambda image: {}, (scale,))
        views(image)
        height, width = (round(scale * side) for side in size)
        assert len(model.shown) == 4 and all(torch.equal(model.shown[k], model.shown[k - 1].flip(-1)) for k in (1, 3))
        for channel, found in zip(image[0].numpy(), model.shown[2][0].numpy(), strict=True):
            expected = Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR)
            assert np.allclose(found, np.array(expected), atol=1e-5)

    @given(st.tuples(st.integers(16, 70), st.integers(16, 70)), st.sampled_from([(0.8, 1.25), (0.6,), (1.7,)]))
    @example((31, 45), SCALES)
    @settings(max_examples=25, deadline=None)
    def test_a_ramp_stays_in_its_place(self, size: tuple[int, int], scales: tuple[float, ...]) -> None:
        """A model of the scaled coordinates' own kind: no view shifts the answer by 0.02 px in the mean."""

        def formula(image: Tensor) -> Answers:
            # Coordinates of the view by itself, so that a shift on the way back is not undone by one on the way there.
            x = centred(image) if flips[len(model.shown) - 1] == 1 else -centred(image)
            return {"depth": output_of(5 + x.expand(1, 1, *image.shape[-2:]))}

        views, model = around(formula, scales)
        flips = [1, -1] * (len(scales) + 1)
        image = torch.rand(1, 3, *size)
        found = views(image)["depth"][0, 0]
        offset = (found - 5 - centred(image)) / 2 * size[1]
        inside = offset[:, 4:-4]
        assert inside.mean().abs() < 0.02 and inside.abs().max() < 0.2
        # No stretching about the middle either, in which the mean would not tell.
        assert (inside * centred(image)[4:-4].sign()).mean().abs() < 0.02

    @pytest.mark.parametrize("size", [(64, 64), (51, 75)])
    @pytest.mark.parametrize("like", [REAL, CANONICAL, CANONICAL_INVERSE], ids=["metric", "canonical", "inverse"])
    def test_depth_and_slant_from_apparent_size(self, size: tuple[int, int], like: MultiTaskModule) -> None:
        """A model that infers distance from the size at which a thing appears is right under its own convention.

        depth = f / size, and a surface's normal goes with it; under the metric convention such a model is wrong by
        a known factor in each view.
        """
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5 for n in size)
        blob = torch.exp(-(y[:, None].square() + x.square()) / 0.02).expand(1, 3, *size)
        reference = blob[0, 0].sum().sqrt()
        normal = directions(torch.tensor([0.3, -0.5, -0.7], dtype=torch.float64).view(1, 3, 1, 1))

        def formula(image: Tensor) -> Answers:
            zoom = image[:, :1].sum((2, 3), keepdim=True).sqrt() / reference
            depth = 2 * zoom if like is CANONICAL_INVERSE else 2 / zoom
            mirrored = len(model.shown) % 2 == 0
            slanted = normal * torch.stack([torch.tensor(-1.0 if mirrored else 1.0), *torch.ones(2)]).view(3, 1, 1)
            nearer = torch.cat([slanted[:, :2], slanted[:, 2:] * zoom], 1)
            shape = image.shape[-2:]
            return {"depth": output_of(depth).expand(1, 1, *shape), "normals": nearer.expand(1, 3, *shape)}

        views, model = around(formula, SCALES, like)
        found = views(blob)
        if like is not REAL:
            assert torch.allclose(found["depth"], torch.tensor(2.0, dtype=torch.float64), rtol=1e-4)
            assert torch.allclose(found["normals"], normal.expand_as(found["normals"]), atol=1e-4)
            return
        zooms = [math.prod(round(scale * side) / side for side in size) ** 0.5 for scale in (1, *SCALES)]
        expected = np.mean([2 / zoom for zoom in zooms])
        assert abs(expected - 2) > 0.02
        assert torch.allclose(found["depth"], torch.tensor(expected), rtol=1e-4)

    @given(images, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    @settings(max_examples=25, deadline=None)
    def test_any_shape_and_type(self, image: Tensor, dtype: torch.dtype) -> None:
        """A constant picture's constant answer comes back at the picture's size, in single precision at least."""
        views, model = around(lambda image: {"depth": image[:, :1]}, SCALES)
        image = image.mean((2, 3), keepdim=True).expand_as(image).to(dtype)
        found = views(image)
        exact = torch.promote_types(dtype, torch.float32)
        assert all(shown.dtype == dtype for shown in model.shown)
        assert found["depth"].dtype == found["normals"].dtype == exact
        assert found["segmentation"].shape == (len(image), *image.shape[-2:])
        expected = views.module(image)["depth"]
        assert torch.allclose(found["depth"], expected, rtol=1e-5 if dtype != torch.bfloat16 else 1e-2)

    def test_the_layout_stays(self) -> None:
        views, model = around(lambda image: {}, SCALES)
        views(torch.rand(2, 3, 20, 30).contiguous(memory_format=torch.channels_last))
        assert all(shown.is_contiguous(memory_format=torch.channels_last) for shown in model.shown)

    @pytest.mark.parametrize("scale", [0.0, -1.0, 125.0, math.nan, math.inf])
    def test_impossible_scales(self, scale: float) -> None:
        with pytest.raises(UserError, match=f"scale of {scale:g} for test-time augmentation is not from 0.25 to 4"):
            AveragedViews(REAL, (scale,))

    def test_a_backbone_of_one_size_is_flipped_only(self) -> None:
        fixed = module(backbone="swin_tiny_patch4_window7_224", data={"size": (32, 64)}, task="depth")
        with pytest.raises(UserError, match=r"'swin_tiny_patch4_window7_224' takes .* one size .* 0.8, 1.25: .* flip"):
            Predictor(fixed, tta=True)
        image = torch.rand(1, 3, 32, 64)
        for scales in ((), (1.0,)):
            assert AveragedViews(fixed, scales)(image)["depth"].shape == (1, 1, 32, 64)
        assert Predictor(fixed, tta=()).predict(image[0])["depth"].shape == (1, 32, 64)


class TestOtherTasks:
    def test_a_task_without_channels(self) -> None:
        """A plugin's prediction without an axis of channels is averaged by default."""
        other = module(task="depth")
        task = next(iter(other.each_task()))
        object.__setattr__(task, "predict", lambda outputs: outputs[:, 0].sigmoid())
        image = torch.rand(3, 20, 28)
        with torch.no_grad():
            expected = (other(image[None])["depth"] + other(image[None].flip(-1))["depth"].flip(-1)) / 2
        assert expected.shape == (1, 20, 28)
        assert torch.allclose(AveragedViews(other, ())(image[None])["depth"], expected)
        assert torch.allclose(Predictor(other, tta=(), scale="native").predict(image)["depth"], expected[0])
        assert AveragedViews(other)(image[None])["depth"].shape == (1, 20, 28)

    def test_what_has_no_mean_is_a_sentence(self) -> None:
        other = module(task="depth")
        task = next(iter(other.each_task()))
        object.__setattr__(task, "predict", lambda outputs: outputs[:, 0] > 0)
        with pytest.raises(UserError, match=r"'depth' are of the type torch.bool and have no mean: .* soft and harden"):
            AveragedViews(other)(torch.rand(1, 3, 20, 28))
