"""The study on MNIST-1D: trains all techniques, many networks at once, and measures them."""

import dataclasses
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.data.mnist1d import MNIST1D, load_mnist1d
from mtl.ensembling.combine import combine
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.regularization.sharpness import ascent_sharpness, input_gradient_norms
from mtl.studies.regularization.readings import Watcher, members_of
from mtl.studies.regularization.recipe import Data, Published, Recipe, shapes
from mtl.studies.regularization.report import Measured, Section, write
from mtl.studies.regularization.techniques import LEFT_OUT, MECHANISMS, MEMBERS, Technique, techniques
from mtl.studies.regularization.training import PARTS, Parameters, Trainer, classifier, dropout_factors, logits
from mtl.tasks.classification import Classification

RHO, RATED = 0.05, 1000
"""How far weights move for the sharpness, and on how many of the training signals it is measured."""

_HELD_OUT = (
    "Rows on fewer signals and those of early stopping train on 3500 signals, as 500 are for validation; their "
    "training error is on these 3500."
)

RESULTS = "results"
"""Folder of what has been measured."""


def names() -> list[str]:
    """Return the techniques' names."""
    return list(dict.fromkeys(one.name for one in techniques(Recipe()) if one.mechanism))


def check_names(wanted: Sequence[str]) -> None:
    """Refuse techniques that do not exist.

    Raises:
        UserError: One does not.
    """
    known = names()
    for name in wanted:
        if name not in known:
            raise UserError(f"--techniques {name!r} is none{nearest(name, known)}; there are {', '.join(known)}")


def read(root: Path | None) -> Published:
    """Return the data.

    Raises:
        UserError: The file is missing or not MNIST-1D's.
    """
    parts = [load_mnist1d(root, split) for split in ("all", "train", "validation", "test")]
    return Published(*(Data(signals[:, 0], labels) for signals, labels in parts))


def run(
    folder: Path,
    wanted: Sequence[str],
    seeds: Sequence[int],
    root: Path | None,
    jobs: int,
    say: Callable[[str], None] = print,
    base: Recipe = Recipe(),  # noqa: B008  # frozen
) -> str:
    """Measure techniques, write their table, picture and page, and return the table.

    What was measured before is read again.

    Args:
        folder: Where to; it exists.
        wanted: Names of techniques; none stands for all.
        seeds: The seeds.
        root: MNIST-1D's file; None generates it.
        jobs: How many trainings at a time, each on one core.
        say: Is told of every training.
        base: The baseline's training.

    Raises:
        UserError: The data cannot be used.
    """
    published = read(root)
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    rows = [one for one in techniques(base) if one.mechanism is None or not wanted or one.name in wanted]
    files = {row: folder / RESULTS / f"{row.name}-{_digest(row, seeds, root)}.json" for row in rows}
    missing = [row for row in rows if not files[row].is_file()]
    if len(missing) < len(rows):
        say(f"{len(rows) - len(missing)} of {len(rows)} rows are measured already, and reused")
    kinds: dict[Recipe, list[Technique]] = {}
    for row in missing:
        kinds.setdefault(row.recipe.kind, []).append(row)
    if any(row.recipe.start for row in missing):
        shapes()  # once, before several trainings ask for them
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            # The longest first, so that none is left at the end that the others wait for.
            ordered = sorted(kinds.values(), key=lambda group: -_work(group))
            stop = threading.Event()
            futures = [pool.submit(_measure_group, group, seeds, published, files, stop) for group in ordered]
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    future.result()
                    say(f"[{number}/{len(futures)}, {time.perf_counter() - start:.0f} s] {future.result()}")
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
    return _report(folder, rows, [json.loads(files[row].read_text()) for row in rows], seeds, base)


def _digest(row: Technique, seeds: Sequence[int], root: Path | None) -> str:
    """Return what a row's result depends on, in short."""
    spoken = {"label", "strength", "mechanism"}
    values = {name: value for name, value in dataclasses.asdict(row).items() if name not in spoken}
    data = [MNIST1D(root, split=split).fingerprint() for split in ("all", "test")]
    text = json.dumps([values, list(seeds), data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _work(group: Sequence[Technique]) -> float:
    """Return about how long a group's training takes, in passes over the data."""
    recipes = {row.recipe for row in group}

    def passes(recipe: Recipe) -> float:
        slow = 3 if recipe.gradient_norm or recipe.batch_variance else 2 if recipe.sam or recipe.joint else 1
        before = passes(recipe.start) if recipe.start else 0
        return recipe.epochs * recipe.members * slow * (1 + 20 / recipe.batch) + before

    return sum(map(passes, recipes))


def _measure_group(
    group: Sequence[Technique],
    seeds: Sequence[int],
    published: Published,
    files: dict[Technique, Path],
    stop: threading.Event,
) -> str:
    """Train what rows of one kind of recipe need, write what is measured, and return a line about it.

    Once `stop` is set, an exception ends it at the next step.
    """
    recipes = list(dict.fromkeys(row.recipe for row in group))
    watchers = {row.reading: row.reading.watch(row.recipe, published) for row in group}
    begin = time.thread_time()
    trainer = Trainer(recipes, seeds, published)
    before = time.thread_time() - begin
    trainer.run(lambda step, parameters: _tell(watchers.values(), stop, step, parameters))
    seconds = time.thread_time() - begin
    # What one seed of one recipe takes; a start is trained once for all recipes.
    each = before / len(seeds) + (seconds - before) / (len(recipes) * recipes[0].members * len(seeds))
    for row in group:
        kept = [classifier(one, len(MNIST1D.info.classes)) for one in watchers[row.reading].kept]
        members = members_of(kept, recipes.index(row.recipe), len(recipes), row.members, len(seeds))
        measured = measure(row, members, seeds, published) | {"seconds": each * row.members}
        write_whole(files[row], (json.dumps(measured, indent=1, allow_nan=False) + "\n").encode())
    labels = " and ".join(dict.fromkeys(row.label for row in group))
    return f"{labels}: {len(group)} rows in {seconds:.0f} s"


def _tell(watchers: Iterable[Watcher], stop: threading.Event, step: int, parameters: Parameters) -> None:
    if stop.is_set():
        raise KeyboardInterrupt
    for watcher in watchers:
        watcher(step, parameters)


def measure(
    row: Technique, members: Sequence[Parameters], seeds: Sequence[int], published: Published
) -> dict[str, Any]:
    """Return what a row's networks do, numbers for each seed.

    Args:
        row: The technique.
        members: Each member's parameters, of one network a seed.
        seeds: The seeds.
        published: MNIST-1D.

    Returns:
        `training` and `test` errors in percent, the `members`' test errors, the `parameters` to be kept,
        `input_gradient`: the mean norm of the gradient of a test signal's loss by the signal; and `sharpness`, see
        `mtl.regularization.sharpness.ascent_sharpness`, of the training loss. None is what has no such number.
    """
    if row.soup:
        members = [[torch.stack(tensors).mean(0) for tensors in zip(*members, strict=True)]]
    training = published.train if row.recipe.signals == "train" else published.all
    test = published.test
    alone = len(members) == 1 and not row.passes
    losses = None if row.kind in ("median", "vote") and not alone else _input_gradients(row, members, seeds, test)
    return {
        "training": _numbers(_errors(row, _outputs(row, members, seeds, training.signals), training.labels)),
        "test": _numbers(_errors(row, _outputs(row, members, seeds, test.signals), test.labels)),
        "members": [_numbers(_errors(row, [logits(one, _for_each(seeds, test))], test.labels)) for one in members],
        "parameters": len(members) * sum(tensor[0].numel() for tensor in members[0]),
        "input_gradient": losses,
        "sharpness": _sharpness(members[0], training) if alone else None,
    }


def _for_each(seeds: Sequence[int], data: Data) -> Tensor:
    return data.signals.expand(len(seeds), -1, -1)


def _numbers(values: Tensor) -> list[float | None]:
    """Return numbers as JSON has them, without what is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _outputs(row: Technique, members: Sequence[Parameters], seeds: Sequence[int], signals: Tensor) -> list[Tensor]:
    """Return the logits (S, N, 10) of each member, or of each pass."""
    signals = signals if signals.dim() == 3 else signals.expand(len(seeds), -1, -1)
    if not row.passes:
        return [logits(one, signals) for one in members]
    generators = [torch.Generator().manual_seed(seed + 2**33) for seed in seeds]
    p = torch.full((len(seeds), 1, 1), row.recipe.dropout)
    count = signals.shape[1]
    return [logits(members[0], signals, dropout_factors(generators, count, p)) for _ in range(row.passes)]


def _errors(row: Technique, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return each seed's share of wrong classes in percent, (S,)."""
    task = Classification(MNIST1D.info)
    found = combine(row.kind, (one.flatten(0, 1) for one in outputs), task).prediction
    return 100 * (found.view(len(outputs[0]), -1) != labels).double().mean(1)


def _input_gradients(
    row: Technique, members: Sequence[Parameters], seeds: Sequence[int], data: Data
) -> list[float | None]:
    def losses_of(signals: Tensor) -> Tensor:
        outputs = torch.stack(_outputs(row, members, seeds, signals.view(len(seeds), -1, signals.shape[1])))
        # Of what the members answer together.
        mean = outputs.mean(0).log_softmax(-1) if row.kind == "logits" else outputs.log_softmax(-1).logsumexp(0)
        return -mean.gather(-1, data.labels.expand(len(seeds), -1)[..., None]).flatten()

    signals = _for_each(seeds, data).flatten(0, 1)
    return _numbers(input_gradient_norms(losses_of, signals).view(len(seeds), -1).mean(1))


def _sharpness(networks: Parameters, data: Data) -> list[float | None]:
    found = []
    for seed in range(len(networks[0])):
        parameters = [tensor[seed : seed + 1].clone().requires_grad_() for tensor in networks]

        def loss_of(parameters: Parameters = parameters) -> Tensor:
            outputs = logits(parameters, data.signals[None, :RATED])[0]
            return torch.nn.functional.cross_entropy(outputs, data.labels[:RATED])

        found.append(ascent_sharpness(loss_of, parameters, RHO))
    return _numbers(torch.stack(found))


def _report(
    folder: Path, rows: Sequence[Technique], results: Sequence[dict[str, Any]], seeds: Sequence[int], base: Recipe
) -> str:
    measured = []
    for row, result in zip(rows, results, strict=True):
        more = {
            "input gradient": result["input_gradient"],
            "sharpness": result["sharpness"],
            "seconds": [result["seconds"]],
            "parameters": [result["parameters"]],
        }
        mechanism = MECHANISMS[row.mechanism] if row.mechanism else None
        measured.append(Measured(row.label, row.strength, mechanism, result["training"], result["test"], more))
    shown = {row.name for row in rows}
    notes = [
        f"MNIST-1D as published: 4000 training and 1000 test signals, {len(seeds)} seeds. A perceptron with two "
        f"hidden layers of 200, He's initialisation, SGD with a learning rate of {base.rate:g} and momentum of "
        f"{base.momentum:g}, batches of {base.batch}, {base.epochs} epochs (Prince 2023, notebook 9.5). A row changes "
        "what it says and nothing else. A seed has the same first weights and, where there are as many signals, the "
        "same order of them in every row.",
        "Nothing was chosen by the test signals: every strength that was tried is shown. To take the best of several "
        "rows by their test errors would be such a choice.",
        *([_HELD_OUT] if any(row.recipe.signals == "train" for row in rows) else []),
        *_luck(rows, results),
        "Input gradient: mean norm of the gradient of a test signal's cross-entropy by the signal; small is smooth. "
        f"Sharpness: by how much the cross-entropy of {RATED} training signals rises at most, to first order, "
        f"within {RHO:g} of the weights; it depends on the weights' size, and what keeps the training loss from "
        "falling raises it, so that it compares like with like only. Several networks have no common minimum, and "
        "medians and votes no gradient (-).",
        "Seconds: processor time of a training for one seed, of all members of an ensemble and of what comes before; "
        "networks are trained many at a time, which is less for each than one by itself; averages of weights are kept "
        "beside one another in one training. Parameters: of what must be kept to predict.",
        *([f"Batch variance is over {PARTS} parts of each batch."] if "batch-variance" in shown else []),
        *([LEFT_OUT] if len(rows) == len(techniques(base)) else []),
    ]
    return write(folder, "Regularization on MNIST-1D", [Section("error in percent", measured)], notes)


def _luck(rows: Sequence[Technique], results: Sequence[dict[str, Any]]) -> list[str]:
    """Return how often an ensemble beats the best of its members, which is a matter of luck."""
    lines = []
    for row, result in zip(rows, results, strict=True):
        if row.members == MEMBERS and row.kind == "mean" and not row.soup:
            best = [min(each) for each in zip(*result["members"], strict=True)]
            count = sum(test < least for test, least in zip(result["test"], best, strict=True))
            mean = sum(map(sum, result["members"])) / (MEMBERS * len(best))
            lines.append(
                f"{row.label} ({row.strength}): better than the best of its members, which one does not know, with "
                f"{count} of {len(best)} seeds; the members' mean test error is {mean:.1f} %."
            )
    return lines
