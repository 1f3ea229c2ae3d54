"""Ensembles of the real modules, and of formulas."""

from typing import Any

import pytest
import torch

import mtl.ensembling.ensemble as ensembling
from mtl.build import build_module
from mtl.config import validate
from mtl.data.sample import DataInfo
from mtl.ensembling.combine import KINDS, combine
from mtl.ensembling.ensemble import Ensemble
from mtl.errors import UserError
from mtl.prediction.tta import AveragedViews
from mtl.training.module import MultiTaskModule

TASKS = ("segmentation", "depth", "normals")
SIZE = (32, 32)


def module(
    seed: int = 0, classes: tuple[str, ...] = ("a", "b", "c"), inverse: bool = False, **fields: Any
) -> MultiTaskModule:
    torch.manual_seed(seed)
    fields = {"init": "none", "decoder_channels": 16, "task": TASKS, "data": {"size": SIZE}} | fields
    return build_module(validate(fields), DataInfo("test", TASKS, classes, inverse), total_steps=0)


MEMBERS = [module(seed) for seed in range(3)]
IMAGE = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_combination_of_its_members(kind: Any) -> None:
    kinds = {"segmentation": kind} if kind == "vote" else kind
    ensemble = Ensemble(MEMBERS, kinds)
    combined = ensemble.combine(IMAGE)
    with torch.no_grad():
        outputs = [member.model(IMAGE) for member in MEMBERS]
    for task in MEMBERS[0].each_task():
        by = kind if task.name == "segmentation" or kind != "vote" else "mean"
        expected = combine(by, [output[task.name] for output in outputs], task)
        torch.testing.assert_close(combined[task.name], expected)
        assert torch.equal(ensemble(IMAGE)[task.name], combined[task.name].prediction)
        assert torch.equal(ensemble.soft(IMAGE)[task.name], combined[task.name].soft)
    assert not any(part.training for member in MEMBERS for part in member.model.modules())


def test_one_member_is_the_module_itself() -> None:
    alone = MEMBERS[0].eval()
    with torch.no_grad():
        expected = alone(IMAGE)
    for name, prediction in Ensemble([alone])(IMAGE).items():
        torch.testing.assert_close(prediction, expected[name])


def test_a_median_keeps_few_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ensemble(MEMBERS, "median").combine(IMAGE)
    shown: list[int] = []
    hook = MEMBERS[0].model.register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
    monkeypatch.setattr(ensembling, "_KEPT", 2 * 3 * 7 * 32 * 32)
    few = Ensemble(MEMBERS, "median").combine(IMAGE)
    Ensemble(MEMBERS, "mean").combine(IMAGE)
    hook.remove()
    assert shown == [2, 1, 3]
    for name, combined in whole.items():
        torch.testing.assert_close(few[name], combined, atol=1e-5, rtol=1e-4)


def test_members_may_look_at_views() -> None:
    views = [AveragedViews(member.eval(), ()) for member in MEMBERS]
    soft = Ensemble(views).soft(IMAGE)
    for name, mean in soft.items():
        torch.testing.assert_close(mean, sum(view.soft(IMAGE)[name] for view in views) / 3)


def test_members_follow_the_images_type() -> None:
    members = [module(seed, task=("depth",)) for seed in range(2)]
    members[0].double()
    assert Ensemble(members)(IMAGE.double())["depth"].dtype == torch.float64


def test_sentences() -> None:
    with pytest.raises(UserError, match="ensemble of no models"):
        Ensemble([])
    with pytest.raises(UserError, match="runs/b does depth, and runs/a segmentation, depth, normals"):
        Ensemble([MEMBERS[0], module(task=("depth",))], names=["runs/a", "runs/b"])
    with pytest.raises(UserError, match="member 2 tells the classes a, c, b, and member 1 a, b, c"):
        Ensemble([MEMBERS[0], module(classes=("a", "c", "b"))])
    with pytest.raises(UserError, match="member 2 predicts inverse depth, and member 1 metres"):
        Ensemble([MEMBERS[0], module(inverse=True)])
    with pytest.raises(UserError, match="vote is for tasks that predict classes"):
        Ensemble(MEMBERS, "vote")
    with pytest.raises(UserError, match="no task 'segmentaton'"):
        Ensemble(MEMBERS, {"segmentaton": "vote"})
