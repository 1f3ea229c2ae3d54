"""What members say together, against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.sample import DataInfo
from mtl.ensembling.combine import KINDS, Combination, Kind, combine
from mtl.errors import UserError
from mtl.tasks.depth import NEAREST, Depth
from mtl.tasks.normals import Normals, angles
from mtl.tasks.segmentation import Segmentation

INFO = DataInfo("test", ("segmentation", "depth", "normals"), ("red", "green", "blue"))
CLASSES = Segmentation(SegmentationOptions(), INFO)
DEPTH = Depth(DepthOptions(), INFO)
NORMALS = Normals(INFO)
SMOOTH: tuple[Kind, ...] = ("mean", "median", "logits")


def probabilities(*members: tuple[float, float, float]) -> list[Tensor]:
    """Return outputs of one pixel whose softmax is as given."""
    return [torch.tensor(p, dtype=torch.float64).log().reshape(1, 3, 1, 1) for p in members]


def depths(*members: float) -> list[Tensor]:
    """Return outputs of one pixel that stand for depths in metres."""
    above = torch.tensor(members, dtype=torch.float64) - NEAREST
    return [value.reshape(1, 1, 1, 1) for value in above.expm1().log()]


def test_classes_in_closed_form() -> None:
    members = probabilities((0.6, 0.3, 0.1), (0.2, 0.7, 0.1), (0.4, 0.1, 0.5))
    shares = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.4, 0.1, 0.5]])

    mean = combine("mean", members, CLASSES)
    np.testing.assert_allclose(mean.soft.flatten(), shares.mean(0))
    assert mean.prediction.item() == 0

    median = combine("median", members, CLASSES)
    np.testing.assert_allclose(median.soft.flatten(), np.array([0.4, 0.3, 0.1]) / 0.8)

    geometric = shares.prod(0) ** (1 / 3)
    logits = combine("logits", members, CLASSES)
    np.testing.assert_allclose(logits.soft.flatten(), geometric / geometric.sum())

    def entropy(p: np.ndarray) -> float:
        return float(-(p * np.log(p)).sum())

    within = np.mean([entropy(p) for p in shares])
    for combined in (mean, median, logits, combine("vote", members, CLASSES)):
        assert combined.uncertainty.item() == pytest.approx(entropy(shares.mean(0)))
        assert combined.disagreement.item() == pytest.approx(entropy(shares.mean(0)) - within)


def test_a_vote_counts_heads_and_ties_go_to_the_higher_mean() -> None:
    # Two hesitant members for the second class outvote a sure one, which has the mean.
    outvoted = combine("vote", probabilities((0.98, 0.01, 0.01), (0.4, 0.5, 0.1), (0.4, 0.5, 0.1)), CLASSES)
    assert outvoted.prediction.item() == 1
    assert outvoted.soft.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(outvoted.soft.flatten(), np.array([1 + 1.78 / 3, 2 + 1.01 / 3, 0.21 / 3]) / 4)
    tie = combine("vote", probabilities((0.5, 0.4, 0.1), (0.05, 0.05, 0.9)), CLASSES)
    assert tie.prediction.item() == 2
    equal = combine("vote", probabilities((0.2, 0.6, 0.2), (0.2, 0.2, 0.6)), CLASSES)
    assert equal.prediction.item() == 1


@settings(deadline=None, max_examples=30)
@given(members=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_a_vote_is_numpys_count(members: int, seed: int) -> None:
    outputs = torch.randn(members, 2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prediction = combine("vote", outputs, CLASSES).prediction.numpy()
    votes = outputs.argmax(2).numpy()
    mean = outputs.softmax(2).mean(0).numpy()
    for place in np.ndindex(prediction.shape):
        count = np.bincount(votes[:, *place], minlength=3)
        among = [c for c in range(3) if count[c] == count.max()]
        assert prediction[place] == max(among, key=lambda c: mean[place[0], c, place[1], place[2]])


def test_a_median_of_nothing_in_common_is_the_mean() -> None:
    outputs = [torch.full((1, 3, 1, 1), -1e4).index_fill(1, torch.tensor(c), 1e4) for c in (0, 1, 2)]
    np.testing.assert_allclose(combine("median", outputs, CLASSES).soft.flatten(), 1 / 3, rtol=1e-6)


def test_depth_in_closed_form() -> None:
    members = depths(1.0, 2.0, 6.0, 4.0)
    assert combine("mean", members, DEPTH).prediction.item() == pytest.approx(3.25)
    assert combine("median", members, DEPTH).prediction.item() == pytest.approx(3.0)
    before = np.log(np.expm1(np.array([1.0, 2.0, 6.0, 4.0]) - NEAREST)).mean()
    assert combine("logits", members, DEPTH).prediction.item() == pytest.approx(math.log1p(math.exp(before)) + NEAREST)
    for kind in SMOOTH:
        combined = combine(kind, members, DEPTH)
        assert combined.uncertainty.shape == (1, 1, 1)
        assert combined.uncertainty.item() == pytest.approx(np.std([1, 2, 6, 4]))
        assert combined.disagreement is combined.uncertainty


def test_normals_in_closed_form() -> None:
    """Vectors on a cone of 20 degrees around an axis are 20 degrees from it, and so is their spread."""
    around = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
    tilt = math.radians(20)
    cone = torch.stack(
        [around.cos() * math.sin(tilt), around.sin() * math.sin(tilt), -torch.full((5,), math.cos(tilt))]
    )
    # Of whatever length: only logits see it.
    members = [3 * vector.reshape(1, 3, 1, 1) for vector in cone.T]
    combined = combine("mean", members, NORMALS)
    np.testing.assert_allclose(combined.prediction.flatten(), [0, 0, -1], atol=1e-12)
    assert combined.uncertainty.item() == pytest.approx(20)
    long = combine("logits", [members[0], 1e6 * members[1]], NORMALS)
    assert angles(long.prediction, members[1]).item() < 1e-3


def test_a_small_spread_is_not_lost_in_rounding() -> None:
    tilt = math.radians(0.01)
    members = [torch.tensor([sign * math.sin(tilt), 0, -math.cos(tilt)]).reshape(1, 3, 1, 1) for sign in (1, -1)]
    assert combine("mean", members, NORMALS).uncertainty.item() == pytest.approx(0.01, rel=1e-3)
    # Around 80 m, where the squares of float32 have no place for a millimetre.
    depth = combine("mean", [torch.full((1, 1, 1, 1), 80 + sign * 1e-3) for sign in (1, -1)], DEPTH)
    assert depth.uncertainty.item() == pytest.approx(1e-3, rel=1e-2)


@settings(deadline=None, max_examples=30)
@given(members=st.integers(1, 6), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_what_holds_for_any_answers(members: int, seed: int, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(seed)
    for task in (CLASSES, DEPTH, NORMALS):
        if kind == "vote" and task is not CLASSES:
            continue
        outputs = 3 * torch.randn(members, 2, task.channels, 3, 4, generator=generator)
        combined = combine(kind, outputs, task)
        assert torch.equal(combined.prediction, task.harden(combined.soft))
        assert combined.uncertainty.shape == combined.disagreement.shape == (2, 3, 4)
        assert (combined.disagreement >= 0).all()
        assert (combined.disagreement <= combined.uncertainty + 1e-6).all()
        # The order of the members is of no consequence.
        other = combine(kind, outputs.flip(0), task)
        torch.testing.assert_close(other.soft, combined.soft)
        torch.testing.assert_close(other.uncertainty, combined.uncertainty, atol=1e-4, rtol=1e-4)
        # Nor is a vote of one, or of equals.
        same = combine(kind, [outputs[0]] * 3, task)
        torch.testing.assert_close(same.prediction, task.predict(outputs[0]))
        torch.testing.assert_close(same.disagreement, torch.zeros(2, 3, 4), atol=1e-4, rtol=0)


def test_views_and_models_have_the_same_mean() -> None:
    outputs = torch.randn(4, 2, 3, 5, 6)
    combination = Combination(CLASSES, "median")
    for member in outputs:
        combination.add_soft(CLASSES.soft(member))
    torch.testing.assert_close(combination.result(), combine("median", outputs, CLASSES))
    with pytest.raises(UserError, match="leave the views out"):
        Combination(CLASSES, "logits").add_soft(outputs[0])


def test_half_precision_is_summed_in_single() -> None:
    outputs = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float16)
    combined = combine("logits", [outputs] * 4099, DEPTH)  # more than float16 counts
    assert combined.soft.item() == pytest.approx(DEPTH.predict(outputs.float()).item())


def test_sentences() -> None:
    with pytest.raises(UserError, match=r"'vot' .*did you mean 'vote'.*mean, median, logits, vote"):
        Combination(CLASSES, "vot")  # type: ignore[arg-type]
    for task in (DEPTH, NORMALS):
        with pytest.raises(UserError, match=f"vote is for tasks that predict classes, which '{task.name}' does not"):
            combine("vote", [], task)
    with pytest.raises(UserError, match="no answer of the task 'depth'"):
        combine("mean", [], DEPTH)
    with pytest.raises(UserError, match="each of its 3 classes"):
        Combination(CLASSES).add_soft(torch.zeros(1, 4, 5))
