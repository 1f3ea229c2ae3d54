"""Measures what came of trainings, one or several together, on held-out samples."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback

from mtl.build import Split, Surroundings, keep_samples, load_samples, make_loader, make_trainer, target_of
from mtl.config import Experiment, SourceOptions
from mtl.data.loading import Samples
from mtl.data.sample import DataInfo
from mtl.ensembling.bagging import bootstrap, out_of_bag, out_of_bag_score
from mtl.ensembling.ensemble import Together
from mtl.ensembling.runs import ALONE, Combining, checkpoints, kinds, together
from mtl.errors import UserError
from mtl.runs import SOUP_FILE, device_of, load_predicting, read_run, restored, stored_experiment
from mtl.training.callbacks import ProgressBar
from mtl.training.module import MultiTaskModule
from mtl.transfer.weights import load_checkpoint
from mtl.uncertainty.judging import Judge


@dataclass
class Outcome:
    """What came of a training or an evaluation.

    Attributes:
        folder: The run's folder.
        results: Metrics of the best checkpoint on held-out samples, by full name.
        constant: The same metrics of each task's constant prediction.
        steps: Optimizer steps that the weights have seen.
        seconds: How long this took.
        labels: Which labels the training's data have.
    """

    folder: Path
    results: dict[str, float]
    constant: dict[str, float]
    steps: int
    seconds: float = field(compare=False)
    labels: tuple[str, ...] = ()


def evaluate(
    run: Path,
    changes: Mapping[str, Any],
    surroundings: Surroundings,
    split: Split = "validation",
    combining: Combining = ALONE,
    pictures: Path | None = None,
) -> Outcome:
    """Measure a run's best checkpoint on held-out samples, or several as one.

    Args:
        run: The run's folder.
        changes: Fields of the run's experiment to change, nested as in YAML, such as ``{"data": {"root": ...}}``.
        surroundings: Where.
        split: Which samples: those held out from training, the data set's official test split, or the training samples
            with the labels that were learned from, as they are without augmentation.
        combining: What else answers, and how the answers become one.
        pictures: Where to draw whether the uncertainty is to be believed, which is measured too; None leaves it out.

    Raises:
        UserError: The runs or the data cannot be used, or not together.
    """
    start = time.monotonic()
    paths = checkpoints(run, combining)
    experiment, checkpoint = read_run(paths[0], changes)
    if pictures is not None and experiment.devices > 1:
        raise UserError(f"--uncertainty is measured by one process; leave --devices {experiment.devices} out")
    samples = load_samples(experiment, split, surroundings, all_tasks=False)
    samples.augment = None
    info, trained_on = samples.source.info, DataInfo(**checkpoint["data"])
    classes = {"segmentation", "label"} & set(info.targets) & {target_of(task) for task in experiment.task}
    if classes and tuple(info.classes) != tuple(trained_on.classes):
        raise UserError(
            f"{run} predicts the classes {', '.join(trained_on.classes)}, but {info.name} has "
            f"{', '.join(info.classes)}; evaluate on data with the classes it was trained on"
        )
    if "depth" in experiment.task and "depth" in info.targets and info.inverse_depth != trained_on.inverse_depth:
        raise UserError(
            f"{run} predicts {'inverse depth' if trained_on.inverse_depth else 'metres'}, but {info.name} has "
            f"{'inverse depth' if info.inverse_depth else 'metres'}; evaluate on data of the same kind"
        )
    # The model is that of the training's data, of whose targets these may have but some.
    module = restored(paths[0], experiment, checkpoint, trained_on)
    judge = None
    module.views = answers = together(module, paths, combining, judged=pictures is not None)
    if pictures is not None:
        assert isinstance(answers, Together)
        module.views = judge = Judge(answers)
    keep_samples(experiment, [samples], surroundings)
    results = measure(module, samples, experiment, *([judge] if judge else []))
    if judge is not None and pictures is not None:
        results |= judge.measure()
        for line in (*judge.notes, *(f"drawn in {path}" for path in judge.draw(pictures))):
            surroundings.say(line)
    return Outcome(run, results, dict(module.constant), checkpoint["global_step"], time.monotonic() - start)


def evaluate_unseen(
    run: Path, changes: Mapping[str, Any], surroundings: Surroundings, combining: Combining = ALONE
) -> Outcome:
    """Measure runs on their training samples, each judged by those of the runs that have not drawn it (out-of-bag).

    Args:
        run: The folder of a run with --bootstrap.
        changes: Fields of the run's experiment to change, such as ``{"device": "cpu"}``.
        surroundings: Where.
        combining: Further such runs, and how their answers become one.

    Raises:
        UserError: A run has seen all of its training samples, or they are not the same samples, or the runs do not
            go together.
    """
    start = time.monotonic()
    if combining.snapshots or combining.mc_dropout is not None or combining.views is not False:
        raise UserError(
            "--split out-of-bag is for the runs' best weights and images as they are; leave --snapshots, --mc-dropout "
            "and --tta out"
        )
    if changes.get("devices", 1) > 1:
        raise UserError(f"--split out-of-bag is measured by one process; leave --devices {changes['devices']} out")
    paths = checkpoints(run, combining)
    experiment, checkpoint = read_run(paths[0], {**changes, "compile": False, "devices": 1})
    seeds = []
    for path in paths:
        trained = stored_experiment(load_checkpoint(path), path)
        if (path.parent / SOUP_FILE).exists():
            raise UserError(
                f"--split out-of-bag: {path.parent} is a soup of runs, each of which has drawn samples of its own; "
                "name the runs themselves, or measure the soup on held-out samples"
            )
        if not trained.bootstrap:
            raise UserError(
                f"--split out-of-bag: {path.parent} was trained on all of its training samples, without --bootstrap; "
                "leave it out, or measure on held-out samples"
            )
        if _training_samples(trained) != _training_samples(experiment):
            raise UserError(
                f"--split out-of-bag: {path.parent} has learned from other training samples than those that would be "
                "measured; combine runs of the same --data and the same labels, and leave --data.* as it was"
            )
        seeds.append(trained.seed)
    members = [
        load_predicting(path, {"device": experiment.device, "precision": experiment.precision}) for path in paths
    ]
    samples = load_samples(experiment, "train", surroundings)
    samples.augment = None
    keep_samples(experiment, [samples], surroundings)
    outside = np.stack([out_of_bag(bootstrap(len(samples), seed), len(samples)) for seed in seeds])
    trainer = make_trainer(experiment, logger=False, enable_checkpointing=False)
    device, first = device_of(experiment), members[0]
    batches = (
        first.on_after_batch_transfer({name: values.to(device) for name, values in batch.items()}, 0)
        for batch in make_loader(samples, experiment, trainer, training=False)
    )
    with trainer.precision_plugin.val_step_context():
        score = out_of_bag_score(members, outside, batches, kinds(list(first.each_task()), combining.kind))
    surroundings.say(
        f"{score.samples} of {len(samples)} training samples are left out by one run or more, and judged by those"
    )
    return Outcome(run, score.results, {}, checkpoint["global_step"], time.monotonic() - start)


def _training_samples(experiment: Experiment) -> tuple[Any, ...]:
    """Return what decides which samples an experiment learns from, and their order."""
    sources = [source.model_dump(include=set(SourceOptions.model_fields) - {"ratio"}) for source in experiment.sources]
    labels = experiment.data.labels
    return sources, sorted(experiment.task), labels, experiment.seed if labels else None


def measure(
    module: MultiTaskModule, samples: Samples, experiment: Experiment, *callbacks: Callback
) -> dict[str, float]:
    """Return the metrics of a module's present weights.

    Args:
        module: The module.
        samples: Of which data.
        experiment: Device, precision, and size of batches.
        callbacks: What else listens.
    """
    trainer = make_trainer(experiment, logger=False, enable_checkpointing=False, callbacks=[ProgressBar(), *callbacks])
    trainer.validate(module, make_loader(samples, experiment, trainer, training=False), verbose=False)
    return dict(module.results)
