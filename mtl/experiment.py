"""Runs an experiment: trains it from its first line to its last."""

import copy
import math
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from timm.utils import ModelEmaV3
from torch import Tensor

from mtl.build import (
    Fit,
    Surroundings,
    adapt,
    build_augmentation,
    build_module,
    build_tasks,
    check_machine,
    check_monitor,
    check_schedule,
    keep_samples,
    load_samples,
    make_loader,
    make_trainer,
    plan_fits,
    probe_every,
    rows_to_learn,
    target_of,
    unbalanced,
)
from mtl.config import (
    PROBABILITIES,
    SIGNAL_STRENGTHS,
    STRENGTHS,
    AugmentationOptions,
    Experiment,
    changed,
    dump,
    resolve_augmentation,
)
from mtl.data.loading import Key, Samples
from mtl.data.sample import Batch, DataInfo, as_floats
from mtl.ensembling.soups import StochasticAverage
from mtl.errors import UserError
from mtl.evaluation import Outcome, measure
from mtl.files import write_whole
from mtl.models.backbone import Backbone
from mtl.plugins import in_plugin_of
from mtl.runs import stored_experiment
from mtl.tasks.base import Panel, Task
from mtl.training.callbacks import (
    AveragedWeights,
    ProgressBar,
    Recorder,
    ResumePoint,
    Snapshots,
    StopAfter,
    count_from,
)
from mtl.training.cost import COST_FILE, Cost
from mtl.training.history import History
from mtl.training.module import MultiTaskModule
from mtl.training.panels import Reconstructions, predict_panels, spread
from mtl.training.pictures import (
    Panels,
    draw_curves,
    draw_predictions,
    draw_rows,
    draw_weighting,
    input_pictures,
    overlay,
)
from mtl.training.probe import LinearProbe, OnlineProbe
from mtl.training.tracking import log_predictions, start_wandb
from mtl.transfer.weights import find_checkpoint, initialise, load_checkpoint, load_weights, require, save_backbone


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
    # A damaged checkpoint is refused before the data is read.
    stored = _check_resumable(experiment, resume / "last.ckpt") if resume else None
    thawed_at = stored["thawed_at"] if stored else None
    lightning.seed_everything(experiment.seed, verbose=False)
    training = load_samples(experiment, "train", surroundings)
    validation = load_samples(experiment, "validation", surroundings)
    keep_samples(experiment, [training, validation], surroundings)
    fits = plan_fits(experiment, len(training))
    check_schedule(experiment, min(fit.steps for fit in fits))
    module = build_module(experiment, training.source.info, fits[0].steps)
    higher_is_better = check_monitor(experiment, module)
    if not resume:
        _prepare(module, experiment, training, surroundings)
    if adapters := adapt(module):
        surroundings.say(str(adapters))
    if resume and stored:
        # Lightning restores it all; what does not fit is to be said before anything is written.
        load_weights(module, stored["state_dict"], resume / "last.ckpt")
    if note := unbalanced(experiment, module.balancer.rule.needs_gram):
        surroundings.say(note)
    sizes = [(p.numel(), p.requires_grad) for p in module.model.parameters()]
    learning, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    surroundings.say(f"learning: {learning / 1e6:.2f} of {total / 1e6:.2f} million parameters")

    if first:
        if not resume and experiment.name is None and experiment.devices == 1:
            folder = new_folder(experiment)  # another run may have taken the number meanwhile
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
    cost = Cost(folder / COST_FILE, sum(fit.steps for fit in fits))
    wandb_logger = None
    if first and experiment.logger == "wandb" and surroundings.wandb_mode != "disabled":
        wandb_logger = start_wandb(experiment, folder, surroundings.wandb_mode)
    # Before the callback that puts averaged weights in the model's place, and takes them away again.
    seen = _of_masked(module, training, validation, folder, fits) if "masked" in experiment.task else []
    every = experiment.validate_every
    done = (0, 0)
    for fit in fits:
        if thawed_at and not fit.thawed:
            continue  # what is resumed has this fit behind it
        epoch, step = thawed_at or done
        if fit.thawed:
            module.thaw(fit.steps, epoch, step)
        last_step = None if experiment.max_steps is None else step + fit.steps
        kept = _of_weights(module, training, folder, step, sum(fit.steps for fit in fits))
        trainer = make_trainer(
            experiment,
            callbacks=[*seen, *kept, *_callbacks(experiment, history, best, folder, step, last_step), cost],
            logger=[history, *([wandb_logger] if wandb_logger else [])],
            default_root_dir=folder,
            max_epochs=epoch + fit.epochs,
            accumulate_grad_batches=experiment.accumulate,
            gradient_clip_val=experiment.clip,
            val_check_interval=every * experiment.accumulate if every else 1.0,
            check_val_every_n_epoch=None if every else 1,
        )
        count_from(trainer, epoch, step)
        with _told_to_stop(trainer):
            trainer.fit(
                module,
                make_loader(training, experiment, trainer, training=True),
                make_loader(validation, experiment, trainer, training=False),
                ckpt_path=folder / "last.ckpt" if resume else None,
                weights_only=True,
            )
        done = (trainer.current_epoch, trainer.global_step)
        resume = None
    path = find_checkpoint(folder)
    load_weights(module, load_checkpoint(path)["state_dict"], path)
    results = measure(module, validation, experiment)
    outcome = Outcome(folder, results, dict(module.constant), done[1], 0.0, module.info.targets)
    if first:
        backbone = module.model.backbone
        if isinstance(backbone, Backbone) and not experiment.backbone_stays:
            measured = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
            about = {"experiment": experiment.model_dump(mode="json"), "steps": outcome.steps, "results": measured}
            others = {} if module.model.masked is None else module.model.masked.timm_tensors()
            save_backbone(backbone, folder / "backbone.safetensors", about, others)
        _draw(module, validation, history, outcome, wandb_logger)  # the last of all that a run leaves
    if wandb_logger:
        wandb_logger.experiment.summary.update({f"best/{k}": v for k, v in outcome.results.items()})
        wandb_logger.experiment.finish()
    outcome.seconds = time.monotonic() - start
    return outcome


def _check_resumable(experiment: Experiment, path: Path) -> dict[str, Any]:
    """Return a run's last checkpoint, if it has all that going on needs and belongs to the configuration beside it."""
    checkpoint = load_checkpoint(path)
    stored = stored_experiment(checkpoint, path)
    require(checkpoint, path, "state_dict", "data", "constant", "thawed_at", "generators", "loops", "lr_schedulers")
    averaged = experiment.ema is not None or experiment.swa is not None
    learns = not experiment.freeze or checkpoint["thawed_at"] is not None
    more = {"average": averaged, "starts": experiment.regularize.l2_sp > 0 and learns}
    require(checkpoint, path, "optimizer_states", *(name for name, needed in more.items() if needed))
    if not checkpoint["optimizer_states"]:
        raise UserError(f"{path} holds no state of the optimizer, and cannot be gone on from; start anew with --init")
    for name in ("task", "weighting", "backbone", "decoder", "decoder_channels", "lora", "ema", "swa", "drop_path"):
        if getattr(stored, name) != getattr(experiment, name):
            raise UserError(
                f"{path} was made with {name} {getattr(stored, name)}, and config.yaml beside it says "
                f"{getattr(experiment, name)}; put that back, or start a new run with --init"
            )
    return checkpoint


def preview(experiment: Experiment, surroundings: Surroundings, path: Path, count: int) -> list[Path]:
    """Draw training samples as the network will see them, with their targets laid over them.

    Args:
        experiment: Whose data and augmentation.
        surroundings: Where.
        path: The picture to write.
        count: How many samples, evenly spread over the set.

    Returns:
        The pictures: samples, and where anything is augmented each change by itself.

    Raises:
        UserError: The data cannot be used.
    """
    samples = load_samples(experiment, "train", surroundings)
    info = samples.source.info
    rows = spread(len(samples), count)
    seen = samples.__getitems__([Key(row, 0, position) for position, row in enumerate(rows)])
    samples.augment = None
    stored = samples.__getitems__([Key(row, 0, position) for position, row in enumerate(rows)])
    stored, seen = as_floats(stored), build_augmentation(experiment, info)(as_floats(seen))
    labelled = [task for task in experiment.task if task != "masked"]
    tasks = build_tasks(experiment.model_copy(update={"task": labelled}), info)
    for task in tasks:
        task.observe([stored[task.target]])
    panels: Panels = {"as it is stored": Panel(input_pictures(stored))}
    panels["what the network sees"] = Panel(input_pictures(seen))
    for task in tasks:
        title, drawn = next(iter(task.pictures(task.constant(seen[task.target]), seen[task.target]).items()))
        panels[title] = drawn if experiment.signals else Panel(overlay(input_pictures(seen), drawn.images), drawn.scale)
    if "masked" in experiment.task:
        panels |= _masked_panels(experiment, info, seen)
    draw_predictions(path, panels, next((task.class_names for task in tasks if task.class_names), ()))
    alone = _each_change(experiment)
    if not alone:
        return [path]
    changes = path.with_stem(path.stem + "_transforms")
    # Over a signal there is nothing to lay.
    _preview_transforms(samples, None if experiment.signals or not tasks else tasks[0], alone, changes)
    return [path, changes]


TRIED = 16
"""Samples of which the preview of a change shows the one that changes most."""


def _masked_panels(experiment: Experiment, info: DataInfo, seen: Batch) -> Panels:
    """Return pictures of what is visible of samples to masked pretraining."""
    module = build_module(changed(experiment, {"task": ["masked"], "data": {"labels": {}}}), info, 1).eval()
    with torch.no_grad():
        (task,) = module.each_task()
        panels = task.pictures(module.predictions(seen)["masked"], seen["image"])
    return dict([next(iter(panels.items()))])


def _each_change(experiment: Experiment) -> dict[str, list[Experiment]]:
    """Return, for each change that the augmentation makes, experiments that make it alone: all of it, and less."""
    options = resolve_augmentation(experiment)
    alone: dict[str, list[Experiment]] = {}
    for name in SIGNAL_STRENGTHS if experiment.signals else STRENGTHS:
        if strength := getattr(options, name):
            strengths = [1.0] if name in PROBABILITIES else [strength, strength * 2 / 3, strength / 3]
            label = name if name in PROBABILITIES else f"{name} {strength:g}"
            alone[label] = [
                experiment.model_copy(update={"augment": "none", "augmentation": AugmentationOptions(**{name: s})})
                for s in strengths
            ]
    return alone


def _preview_transforms(samples: Samples, task: Task | None, alone: dict[str, list[Experiment]], path: Path) -> None:
    """Draw each change that the augmentation makes by itself, a row each: at a third, two thirds and all of it."""
    info = samples.source.info
    keys = [Key(row, 0, position) for position, row in enumerate(spread(len(samples), TRIED))]
    stored = as_floats(samples.__getitems__(keys))
    rows: dict[str, list[np.ndarray]] = {}
    for label, experiments in alone.items():
        shown: list[np.ndarray] = []
        most = slice(0, 1)
        for number, experiment in enumerate(experiments):
            seen = build_augmentation(experiment, info)(stored)
            if number == 0:
                row = int((seen[info.input] - stored[info.input]).abs().flatten(1).mean(1).argmax())
                most = slice(row, row + 1)
            image = input_pictures({info.input: seen[info.input][most]})
            shown.insert(0, image[0])
            if task is not None:
                target = seen[task.target][most]
                drawn = next(iter(task.pictures(task.constant(target), target).values()))
                shown.insert(1, overlay(image, drawn.images)[0])
        shown.insert(0, input_pictures({info.input: stored[info.input][most]})[0])
        rows[label] = shown
    draw_rows(path, rows)


def _callbacks(
    experiment: Experiment, history: History, best: ModelCheckpoint, folder: Path, step: int, last_step: int | None
) -> list[Callback]:
    """Return the callbacks of a fit in the order in which they act; Lightning puts the two that save last.

    Args:
        experiment: What to do.
        history: The run's table.
        best: What keeps the best checkpoint, over all fits of the training.
        folder: The run's folder.
        step: Optimizer steps done before the fit.
        last_step: Number of the step to stop after, if that is not simply the last epoch's last.
    """
    callbacks: list[Callback] = [ProgressBar()]
    if last_step is not None:
        callbacks.append(StopAfter(last_step))
    callbacks.append(Recorder(history))
    if experiment.patience is not None:
        callbacks.append(EarlyStopping(experiment.monitor, patience=experiment.patience, mode=best.mode))
    return [*callbacks, best, ResumePoint(str(folder / "last.ckpt"), experiment.checkpoint_every, history)]


def _of_weights(module: MultiTaskModule, training: Samples, folder: Path, step: int, total: int) -> list[Callback]:
    """Return the callbacks that keep other weights than those of the last step.

    Args:
        module: What is trained.
        training: The samples that it is trained on.
        folder: The run's folder.
        step: Optimizer steps done before the fit.
        total: Those of the whole training.
    """
    options = module.options
    callbacks: list[Callback] = []
    if (decay := options.ema) is not None:
        callbacks.append(AveragedWeights(partial(ModelEmaV3, decay=decay, use_warmup=True), step))
    if options.swa is not None:
        begin = max(0, math.floor(options.swa * total) - step)
        inputs = partial(plain_inputs, module, training) if len(module.model.heads) else None
        callbacks.append(AveragedWeights(partial(StochasticAverage, start=begin), step, inputs))
    if (restarts := module.restarts()) is not None:
        callbacks.append(Snapshots(folder, [step + end for end in restarts.ends]))
    return callbacks


STATISTICS = 32
"""Batches over which batch norms measure their statistics with averaged weights, at most."""


def plain_inputs(module: MultiTaskModule, samples: Samples) -> Iterator[Tensor]:
    """Yield batches of one size of what models are given, evenly spread over the samples, without augmentation."""
    samples = copy.copy(samples)
    samples.augment = None
    size = min(module.options.batch_size, len(samples))
    rows = spread(len(samples), min(STATISTICS, len(samples) // size) * size)
    for first in range(0, len(rows), size):
        stored = samples.__getitems__([Key(row, 0, first + place) for place, row in enumerate(rows[first:][:size])])
        batch = {name: values.to(module.device) for name, values in stored.items()}
        yield module.on_after_batch_transfer(batch, 0)[module.info.input]


@contextmanager
def _told_to_stop(trainer: lightning.Trainer) -> Iterator[None]:
    """Let who started the program see that a person, or the machine, has ended it; Lightning hides either."""
    try:
        yield
    except SystemExit:
        if trainer.received_sigterm:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise KeyboardInterrupt from None


def _of_masked(
    module: MultiTaskModule, training: Samples, validation: Samples, folder: Path, fits: Sequence[Fit]
) -> list[Callback]:
    """Return the callbacks that show what masked pretraining does."""
    callbacks: list[Callback] = [Reconstructions(folder / "reconstructions", validation)]
    every = probe_every(module.options, sum(fit.epochs for fit in fits))
    if every and (tasks := _probed(module)):
        callbacks.append(OnlineProbe(LinearProbe(tasks, training, validation, seed=module.options.seed), every))
    return callbacks


def _probed(module: MultiTaskModule) -> list[Task]:
    """Return the tasks for which masked features are tried: the package's own that the data have labels of."""
    names = [name for name in ("segmentation", "depth", "normals") if target_of(name) in module.info.targets]
    return build_tasks(module.options.model_copy(update={"task": names}), module.info)


def _prepare(module: MultiTaskModule, experiment: Experiment, training: Samples, surroundings: Surroundings) -> None:
    """Give a new module its weights and the tasks their priors, and say what was done."""
    for task in module.each_task():
        with in_plugin_of(task, "observe"):
            task.observe(training.labels(task.target, rows=rows_to_learn(training, experiment)))
        module.model.head(task.name).set_bias(task.initial_bias())
    if module.model.masked is not None:
        surroundings.say(module.model.masked.summary(experiment.data.size))
    surroundings.say(str(initialise(module.model, experiment.init)))


def new_folder(experiment: Experiment) -> Path:
    """Return the folder of a new run.

    Raises:
        UserError: A run of the name given exists, or its folder cannot be made.
    """
    if experiment.name is not None:
        folder = experiment.output_dir / experiment.name
        if folder.exists():
            goes_on = (folder / "last.ckpt").is_file()
            more = f", or go on with that run by --resume {folder}" if goes_on else ", or remove it"
            raise UserError(f"{folder} exists; choose another --name{more}")
    else:
        base = "-".join([*experiment.task, *(["frozen"] if experiment.backbone_stays else [])])
        folder = numbered(experiment.output_dir / base)
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {experiment.output_dir}: {parent} is a file; choose another folder")
    return folder


def numbered(path: Path) -> Path:
    """Return a path with the number after the greatest that is taken."""
    taken = [p.name for p in path.parent.glob(f"{path.name}*")]
    numbers = [int(m[1]) for name in taken if (m := re.fullmatch(rf"{re.escape(path.name)}-(\d+)", name))]
    return path.with_name(f"{path.name}-{max(numbers, default=0) + 1}")


def _draw(
    module: MultiTaskModule,
    samples: Samples,
    history: History,
    outcome: Outcome,
    wandb_logger: WandbLogger | None,
) -> None:
    """Write the run's pictures, of the same few samples every time."""
    tasks = list(module.each_task())
    probed = _probed(module) if module.model.masked is not None else []
    draw_curves(outcome.folder / "curves.png", history, tasks, outcome.constant, probed)
    if len(tasks) > 1:
        draw_weighting(outcome.folder / "weighting.png", history, [task.name for task in tasks])
    panels, predictions, targets = predict_panels(module, samples)
    classes = next((task.class_names for task in tasks if task.class_names), ())
    draw_predictions(outcome.folder / "predictions.png", panels, classes)
    if wandb_logger:
        log_predictions(wandb_logger, tasks, panels, predictions, targets, outcome.steps)
