"""What every task says of itself: its likelihood, and whether a batch has labels."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import vonmises_fisher
from torch import Tensor

from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.sample import TARGETS, DataInfo
from mtl.errors import UserError
from mtl.plugin_checks import check_task
from mtl.tasks.base import Task
from mtl.tasks.depth import LOSSES, Depth, gradient_loss
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation

INFO = DataInfo("rooms", ("segmentation", "depth", "normals"), ("wall", "floor", "chair"))
TASKS: list[Task] = [Segmentation(SegmentationOptions(), INFO), Depth(DepthOptions(), INFO), Normals(INFO)]
LABELS = {"segmentation": [0.0], "depth": [2.5], "normals": [0.6, 0.0, -0.8]}
seeds = st.integers(0, 2**32 - 1)


def labels(task: Task, known: Tensor) -> Tensor:
    """Return a batch's target with the same label wherever `known`, (B, H, W)."""
    kind = TARGETS[task.target]
    label = torch.tensor(LABELS[task.target]).reshape(1, -1, 1, 1)
    target = torch.where(known[:, None], label, kind.invalid).to(kind.dtype)
    return target[:, 0] if kind.channels is None else target


class TestLabelled:
    @pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
    @pytest.mark.parametrize("stored", [False, True])
    def test_one_pixel_is_enough(self, task: Task, stored: bool) -> None:
        known = torch.zeros(2, 5, 7, dtype=torch.bool)
        for one in (False, True):
            known[1, 3, 4] = one
            target = labels(task, known)
            answer = task.labelled({task.target: target.to(TARGETS[task.target].storage) if stored else target})
            assert answer.shape == () and answer.dtype == torch.bool and answer.item() is one

    def test_normals_whose_components_cancel_are_labels(self) -> None:
        target = torch.tensor([0.8, -0.6, -0.2]).reshape(1, 3, 1, 1)
        assert TASKS[2].labelled({"normals": target})

    @pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
    def test_without_the_key_there_are_none_on_the_batch_s_device(self, task: Task) -> None:
        assert not task.labelled({"image": torch.ones(2, 3, 5, 7)}) and not task.labelled({})
        elsewhere = task.labelled({"image": torch.ones(2, 3, 5, 7, device="meta")})
        assert elsewhere.device.type == "meta" and elsewhere.dtype == torch.bool and elsewhere.shape == ()

    @given(seeds, st.sampled_from(TASKS))
    @settings(max_examples=40, deadline=None)
    def test_true_where_there_is_something_to_learn(self, seed: int, task: Task) -> None:
        generator = torch.Generator().manual_seed(seed)
        target = labels(task, torch.rand(2, 5, 7, generator=generator) < 0.01)
        outputs = torch.randn(2, task.channels, 5, 7, generator=generator).requires_grad_()
        (gradient,) = torch.autograd.grad(task.loss(outputs, {task.target: target}), outputs)
        assert bool(task.labelled({task.target: target})) == bool(gradient.any())


class TestLikelihood:
    def test_of_each_task(self) -> None:
        assert [task.likelihood for task in TASKS] == ["categorical", "laplace", "laplace"]
        assert Task.likelihood == "gaussian"

    @given(st.floats(5, 1e3), st.lists(st.floats(-1, 1), min_size=6, max_size=6))
    @settings(max_examples=25, deadline=None)
    def test_normals_are_von_mises_fisher(self, concentration: float, numbers: list[float]) -> None:
        vectors = np.array(numbers).reshape(2, 3) - np.array([0, 0, 1.5])
        mean, label = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        outputs, target = (torch.from_numpy(v).reshape(1, 3, 1, 1) for v in (mean, label))
        loss = TASKS[2].loss(outputs, {"normals": target}).item()
        s = -np.log(concentration)
        expected = -vonmises_fisher(mean, concentration).logpdf(label)
        # But for ln 2 pi and ln(1 - e^-2k), which is less than 5e-5.
        assert np.exp(-s) * loss + s + np.log(2 * np.pi) == pytest.approx(expected, abs=1e-4)

    @given(seeds, st.floats(0.1, 10))
    @settings(max_examples=20, deadline=None)
    def test_losses_of_depth_are_proportional_to_the_errors(self, seed: int, factor: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        target = 1 + torch.rand(2, 1, 5, 7, generator=generator, dtype=torch.float64)
        error = 0.09 * torch.randn(target.shape, generator=generator, dtype=torch.float64).clamp(-1, 1)
        valid = torch.ones_like(target, dtype=torch.bool)
        for name, loss in {**LOSSES, "gradient": gradient_loss}.items():
            logarithmic = name in ("silog", "gradient")
            small, large = (
                loss(target * (k * error).exp() if logarithmic else target + k * error, target, valid)
                for k in (1, factor)
            )
            torch.testing.assert_close(large, factor * small)


class TestCheck:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"likelihood": "poisson"}, r"likelihood of .*'poisson', .*'gaussian' or 'laplace' or 'categorical'"),
            ({"likelihood": ["gaussian"]}, r"likelihood of .*\['gaussian'\]"),
            ({"likelihood": property(lambda self: self.nothing)}, "likelihood of .*AttributeError"),
            ({"labelled": lambda self, batch: True}, "labelled of .* boolean scalar tensor"),
            ({"labelled": lambda self, batch: torch.ones(2, dtype=torch.bool)}, "labelled of .* boolean scalar tensor"),
            ({"labelled": lambda self, batch: torch.tensor(True)}, "labelled of .* nothing is labelled"),
            ({"labelled": lambda self, batch: batch["nothing"]}, "labelled of .*KeyError"),
        ],
    )
    def test_what_breaks_the_contract_is_named(self, changes: dict[str, Any], said: str) -> None:
        wrong = type("Wrong", (Normals,), {"name": "wrong", **changes})
        with pytest.raises(UserError, match=said):
            check_task(wrong(INFO))

    def test_what_keeps_it_passes(self) -> None:
        kept = {"likelihood": property(lambda self: "gaussian"), "labelled": lambda self, batch: torch.tensor(False)}
        check_task(type("Kept", (Normals,), {"name": "kept", **kept})(INFO))
