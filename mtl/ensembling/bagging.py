"""Bagging: models of resampled training sets, and what each can say of the samples that it has not seen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mtl.data.sample import Batch
from mtl.ensembling.combine import Combination, Kind
from mtl.ensembling.ensemble import Ensemble
from mtl.errors import UserError
from mtl.training.module import MultiTaskModule


def bootstrap(count: int, seed: int) -> np.ndarray:
    """Draw as many samples as there are, with replacement (Breiman 1996, "Bagging Predictors").

    A function of both arguments alone, whatever the machine and the release of NumPy, whose raw Philox4x64-10 output
    never changes.

    Args:
        count: Number of samples N.
        seed: Of this member, from 0 to 2^64 - 1.

    Returns:
        Rows (N,) int64, each from 0 to N - 1, in the order of the draws.

    Raises:
        UserError: There is no sample, or the seed is not allowed.
    """
    if count < 1:
        raise UserError(f"a bootstrap of {count} samples draws nothing: give at least one training sample")
    if not 0 <= seed < 2**64:
        raise UserError(f"a seed of {seed} for the bootstrap is not a whole number from 0 to 2^64 - 1")
    raw = np.random.Philox(key=np.array([seed, _STREAM], np.uint64)).random_raw(count)
    # 53 random bits, of which a share for each row differs from another's by 2^-53 at most.
    rows: np.ndarray = np.floor((np.asarray(raw) >> np.uint64(11)) * 2.0**-53 * count).astype(np.int64)
    return rows


_STREAM = 0x426F6F7473747261
"""What tells these draws from others of the same seed."""


def out_of_bag(rows: np.ndarray, count: int) -> np.ndarray:
    """Return which of `count` samples (count,), boolean, a bootstrap has left out; a share of 1/e of many."""
    outside = np.ones(count, dtype=bool)
    outside[rows] = False
    return outside


class OutOfBag(NamedTuple):
    """How an ensemble does on its own training samples, each judged by members that have not seen it.

    Attributes:
        results: Metrics by full name, such as ``depth/abs_rel``.
        samples: Of how many samples, as one that every member has seen has no judge.
    """

    results: dict[str, float]
    samples: int


@torch.no_grad()
def out_of_bag_score(
    members: Sequence[MultiTaskModule],
    outside: np.ndarray,
    batches: Iterable[Batch],
    kind: Kind | Mapping[str, Kind] = "mean",
) -> OutOfBag:
    """Measure an ensemble on its training samples without a held-out set (Breiman 1996, "Out-of-bag estimation").

    Args:
        members: The models; they are moved to the batches' device.
        outside: Which samples each has not seen, (M, N) boolean, see `out_of_bag`.
        batches: The N samples in the order of `outside`, without augmentation, as `mtl.data.sample.as_floats` returns
            them.
        kind: How to combine, see `mtl.ensembling.ensemble.Together`.

    Raises:
        UserError: No sample was left out by any member, there are more or fewer samples than `outside` says, or the
            members do not go together.
    """
    ensemble = Ensemble(members, kind)
    metrics = {task.name: task.metrics() for task in ensemble.tasks}
    if not outside.any():
        raise UserError("every member has seen every training sample: train more members, or measure on held-out ones")
    row = 0
    for batch in batches:
        image = batch[members[0].info.input]
        judged = outside[:, row : row + len(image)]
        row += len(image)
        if row > outside.shape[1]:
            break
        answers = [{task.name: Combination(task, ensemble.kinds[task.name]) for task in ensemble.tasks} for _ in image]
        for member, unseen in zip(members, judged, strict=True):
            chosen = np.flatnonzero(unseen).tolist()
            if not chosen:
                continue
            outputs = member.to(image).model(image[chosen])
            for task in member.each_task():
                for place, answer in zip(chosen, outputs[task.name].split(1), strict=True):
                    answers[place][task.name].add(answer, task)
        known = np.flatnonzero(judged.any(axis=0)).tolist()
        for task in ensemble.tasks:
            if known and task.target in batch:
                together = [answers[place][task.name].result() for place in known]
                said = [one.soft if task.metrics_from == "soft" else one.prediction for one in together]
                metrics[task.name].to(image.device).update(torch.cat(said), batch[task.target][known])
    if row != outside.shape[1]:
        raise UserError(
            f"the bootstraps are of {outside.shape[1]} training samples, and the data set has {row}"
            f"{' or more' if row > outside.shape[1] else ''}: give the data that the members were trained on"
        )
    results = {
        f"{name}/{key}": float(value) for name, metric in metrics.items() for key, value in metric.compute().items()
    }
    return OutOfBag(results, int(outside.any(axis=0).sum()))
