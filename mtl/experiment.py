"""Runs an experiment: trains it from its first line to its last, or measures what came of it."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mtl.build import (
    Surroundings,
    build_module,
    check_machine,
    check_monitor,
    check_schedule,
    load_samples,
    make_loader,
    make_trainer,
    steps_in_all,
    steps_in_epoch,
)
from mtl.config import Experiment, changed, dump, validate
from mtl.data.loading import Key, Samples
from mtl.errors import UserError
from mtl.files import write_whole
from mtl.tasks.base import Panel
from mtl.training.callbacks import ExponentialAverage, ProgressBar, Recorder, ResumePoint, StopAfter
from mtl.training.history import History
from mtl.training.module import MultiTaskModule
from mtl.training.pictures import Panels, draw_curves, draw_predictions
from mtl.training.tracking import log_predictions, start_wandb
from mtl.transfer.weights import find_checkpoint, initialise, load_checkpoint, save_backbone

PICTURES = 4
"""How many validation samples are drawn, always the same ones."""


@dataclass
class Outcome:
    """What came of a training or an evaluation.

    Attributes:
        folder: The run's folder.
        results: Metrics of the best checkpoint on held-out samples, by full name.
        constant: The same metrics of each task's constant prediction.
        steps: Optimizer steps that the weights have seen.
        seconds: How long this took.
    """

    folder: Path
    results: dict[str, float]
    constant: dict[str, float]
    steps: int
    seconds: float = field(compare=False)


def train(experiment: Experiment, surroundings: Surroundings, resume: Path | None = None) -> Outcome:
    """Train, keep the best weights, and measure them.

    Args:
        experiment: What to do.
        surroundings: Where.
        resume: Folder of the run to go on with, or None to start a new one.

    Raises:
        UserError: Something that was given cannot be used; then nothing has been written.
    """
    start = time.monotonic()
    check_machine(experiment)
    folder = resume or surroundings.folder or new_folder(experiment)
    first = surroundings.rank == 0
    if resume:
        load_checkpoint(resume / "last.ckpt")  # a damaged one is refused before the data is read
    lightning.seed_everything(experiment.seed, verbose=False)
    training = load_samples(experiment, "train", surroundings)
    validation = load_samples(experiment, "validation", surroundings)
    total_steps = steps_in_all(experiment, len(training))
    check_schedule(experiment, total_steps)
    module = build_module(experiment, training.source.info, total_steps)
    higher_is_better = check_monitor(experiment, module)
    if not resume:
        _prepare(module, experiment, training, surroundings)

    if first:
        try:
            folder.mkdir(parents=True, exist_ok=resume is not None)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be made ({error.strerror}); choose another --name or --output-dir"
            ) from None
        write_whole(folder / "config.yaml", dump(experiment).encode())
    history = History(folder / "metrics.csv")
    best = ModelCheckpoint(
        folder,
        "best",
        monitor=experiment.monitor,
        mode="max" if higher_is_better else "min",
        enable_version_counter=False,
    )
    wandb_logger = None
    if first and experiment.logger == "wandb" and surroundings.wandb_mode != "disabled":
        wandb_logger = start_wandb(experiment, folder, surroundings.wandb_mode)
    every = experiment.validate_every
    trainer = make_trainer(
        experiment,
        callbacks=_callbacks(experiment, history, best, folder),
        logger=[history, *([wandb_logger] if wandb_logger else [])],
        default_root_dir=folder,
        max_epochs=-(-total_steps // steps_in_epoch(experiment, len(training))),
        accumulate_grad_batches=experiment.accumulate,
        gradient_clip_val=experiment.clip,
        val_check_interval=every * experiment.accumulate if every else 1.0,
        check_val_every_n_epoch=None if every else 1,
    )
    trainer.fit(
        module,
        make_loader(training, experiment, trainer, training=True),
        make_loader(validation, experiment, trainer, training=False),
        ckpt_path=folder / "last.ckpt" if resume else None,
        weights_only=True,
    )
    module.load_state_dict(load_checkpoint(find_checkpoint(folder))["state_dict"])
    outcome = Outcome(folder, _measure(module, validation, experiment), dict(module.constant), trainer.global_step, 0.0)
    if trainer.is_global_zero:
        _draw(module, validation, history, outcome, wandb_logger)
        if not experiment.freeze:
            measured = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
            about = {"experiment": experiment.model_dump(mode="json"), "steps": outcome.steps, "results": measured}
            save_backbone(module.model.backbone, folder / "backbone.safetensors", about)
    if wandb_logger:
        wandb_logger.experiment.summary.update({f"best/{k}": v for k, v in outcome.results.items()})
        wandb_logger.experiment.finish()
    outcome.seconds = time.monotonic() - start
    return outcome


def evaluate(run: Path, changes: Mapping[str, Any], surroundings: Surroundings) -> Outcome:
    """Measure a run's best checkpoint on held-out samples.

    Args:
        run: The run's folder.
        changes: Fields of the run's experiment to change, nested as in YAML, such as ``{"data": {"root": ...}}``.
        surroundings: Where.

    Raises:
        UserError: The run or the data cannot be used.
    """
    start = time.monotonic()
    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path)
    experiment = changed(stored_experiment(checkpoint, path), changes)
    check_machine(experiment)
    samples = load_samples(experiment, "validation", surroundings)
    info = samples.source.info
    if "segmentation" in experiment.task and list(info.classes) != checkpoint["classes"]:
        raise UserError(
            f"{run} predicts the classes {', '.join(checkpoint['classes'])}, but {info.name} has "
            f"{', '.join(info.classes)}; evaluate on data with the classes it was trained on"
        )
    module = build_module(experiment, info, total_steps=0)
    module.load_state_dict(checkpoint["state_dict"])
    results = _measure(module, samples, experiment)
    return Outcome(run, results, dict(module.constant), checkpoint["global_step"], time.monotonic() - start)


def stored_experiment(checkpoint: Mapping[str, Any], path: Path) -> Experiment:
    """Return the experiment that made a checkpoint.

    Raises:
        UserError: The checkpoint is not one of this package.
    """
    if "experiment" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of this package; give the folder of a run")
    return validate(checkpoint["experiment"], f"{path}: ")


def _callbacks(experiment: Experiment, history: History, best: ModelCheckpoint, folder: Path) -> list[Callback]:
    """Return the callbacks in the order in which they act; Lightning puts the two that save last."""
    callbacks: list[Callback] = [ProgressBar()]
    if experiment.ema is not None:
        callbacks.append(ExponentialAverage(experiment.ema))
    if experiment.max_steps is not None:
        callbacks.append(StopAfter(experiment.max_steps))
    callbacks.append(Recorder(history))
    if experiment.patience is not None:
        callbacks.append(EarlyStopping(experiment.monitor, patience=experiment.patience, mode=best.mode))
    return [*callbacks, best, ResumePoint(str(folder / "last.ckpt"), experiment.checkpoint_every, history)]


def _prepare(module: MultiTaskModule, experiment: Experiment, training: Samples, surroundings: Surroundings) -> None:
    """Give a new module its weights and the tasks their priors, and say what was done."""
    for task in module.each_task():
        task.observe(training.labels(task.target))
        module.model.head(task.name).set_bias(task.initial_bias())
    surroundings.say(str(initialise(module.model, experiment.init)))


def new_folder(experiment: Experiment) -> Path:
    """Return the folder of a new run.

    Raises:
        UserError: A run of the name given exists, or its folder cannot be made.
    """
    if experiment.name is not None:
        folder = experiment.output_dir / experiment.name
        if folder.exists():
            raise UserError(f"{folder} exists; choose another --name, or go on with that run by --resume {folder}")
    else:
        base = "-".join([*experiment.task, *(["frozen"] if experiment.freeze else [])])
        taken = [p.name for p in experiment.output_dir.glob(f"{base}*")]
        numbers = [int(m[1]) for name in taken if (m := re.fullmatch(rf"{base}-(\d+)", name))]
        folder = experiment.output_dir / f"{base}-{max(numbers, default=0) + 1}"
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {experiment.output_dir}: {parent} is a file; choose another folder")
    return folder


def _measure(module: MultiTaskModule, samples: Samples, experiment: Experiment) -> dict[str, float]:
    """Return the metrics of the module's present weights."""
    trainer = make_trainer(experiment, logger=False, enable_checkpointing=False, callbacks=[ProgressBar()])
    trainer.validate(module, make_loader(samples, experiment, trainer, training=False), verbose=False)
    return dict(module.results)


def _draw(
    module: MultiTaskModule,
    samples: Samples,
    history: History,
    outcome: Outcome,
    wandb_logger: WandbLogger | None,
) -> None:
    """Write the run's pictures, of the same few samples every time."""
    tasks = list(module.each_task())
    draw_curves(outcome.folder / "curves.png", history, tasks, outcome.constant)
    panels, predictions, targets = predict_panels(module, samples)
    classes = next((task.class_names for task in tasks if task.class_names), ())
    draw_predictions(outcome.folder / "predictions.png", panels, classes)
    if wandb_logger:
        log_predictions(wandb_logger, tasks, panels, predictions, targets, outcome.steps)


def predict_panels(module: MultiTaskModule, samples: Samples) -> tuple[Panels, dict[str, Tensor], dict[str, Tensor]]:
    """Predict a few samples, evenly spread over the set.

    Returns:
        Pictures by title, predictions and targets by task.
    """
    rows = torch.linspace(0, len(samples) - 1, min(PICTURES, len(samples))).round().int().tolist()
    stored = samples.__getitems__([Key(row, 0, row) for row in rows])
    module.eval()
    batch = module.on_after_batch_transfer({name: v.to(module.device) for name, v in stored.items()}, 0)
    with torch.no_grad():
        predictions = module(batch["image"])
    panels: Panels = {"input": Panel(stored["image"].permute(0, 2, 3, 1).contiguous().numpy())}
    targets = {task.name: batch[task.target] for task in module.each_task()}
    for task in module.each_task():
        panels |= task.pictures(predictions[task.name], targets[task.name])
    return panels, predictions, targets
