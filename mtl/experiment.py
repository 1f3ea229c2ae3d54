"""Runs an experiment: trains it from its first line to its last, or measures what came of it."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mtl.augmentation.policy import Augmentation
from mtl.build import (
    Fit,
    Surroundings,
    adapt,
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
    target_of,
    unbalanced,
)
from mtl.config import (
    PROBABILITIES,
    STRENGTHS,
    AugmentationOptions,
    Experiment,
    changed,
    dump,
    resolve_augmentation,
)
from mtl.data.loading import Key, Samples
from mtl.data.sample import Batch, DataInfo, as_floats
from mtl.errors import UserError
from mtl.files import write_whole
from mtl.plugins import in_plugin_of
from mtl.prediction.tta import SCALES, AveragedViews
from mtl.runs import read_run, restored, stored_experiment
from mtl.tasks.base import Panel, Task
from mtl.training.callbacks import ExponentialAverage, ProgressBar, Recorder, ResumePoint, StopAfter, count_from
from mtl.training.cost import COST_FILE, Cost
from mtl.training.history import History
from mtl.training.module import MultiTaskModule
from mtl.training.panels import Reconstructions, predict_panels, spread
from mtl.training.pictures import (
    Panels,
    channels_last,
    draw_curves,
    draw_predictions,
    draw_rows,
    draw_weighting,
    overlay,
)
from mtl.training.probe import LinearProbe, OnlineProbe
from mtl.training.tracking import log_predictions, start_wandb
from mtl.transfer.weights import find_checkpoint, initialise, load_checkpoint, load_weights, require, save_backbone


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
        trainer = make_trainer(
            experiment,
            callbacks=[*seen, *_callbacks(experiment, history, best, folder, step, last_step), cost],
            logger=[history, *([wandb_logger] if wandb_logger else [])],
            default_root_dir=folder,
            max_epochs=epoch + fit.epochs,
            accumulate_grad_batches=experiment.accumulate,
            gradient_clip_val=experiment.clip,
            val_check_interval=every * experiment.accumulate if every else 1.0,
            check_val_every_n_epoch=None if every else 1,
        )
        count_from(trainer, epoch, step)
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
    outcome = Outcome(folder, _measure(module, validation, experiment), dict(module.constant), done[1], 0.0)
    if first:
        _draw(module, validation, history, outcome, wandb_logger)
        if not experiment.backbone_stays:
            measured = {name: value for name, value in outcome.results.items() if math.isfinite(value)}
            about = {"experiment": experiment.model_dump(mode="json"), "steps": outcome.steps, "results": measured}
            others = {} if module.model.masked is None else module.model.masked.timm_tensors()
            save_backbone(module.model.backbone, folder / "backbone.safetensors", about, others)
    if wandb_logger:
        wandb_logger.experiment.summary.update({f"best/{k}": v for k, v in outcome.results.items()})
        wandb_logger.experiment.finish()
    outcome.seconds = time.monotonic() - start
    return outcome


def evaluate(
    run: Path,
    changes: Mapping[str, Any],
    surroundings: Surroundings,
    split: Literal["validation", "test"] = "validation",
    views: Sequence[float] | bool = False,
) -> Outcome:
    """Measure a run's best checkpoint on held-out samples.

    Args:
        run: The run's folder.
        changes: Fields of the run's experiment to change, nested as in YAML, such as ``{"data": {"root": ...}}``.
        surroundings: Where.
        split: Which samples: those held out from training, or the data set's official test split.
        views: Whether to average over views of each image, or which scales of it beside its mirror image.

    Raises:
        UserError: The run or the data cannot be used.
    """
    start = time.monotonic()
    path = find_checkpoint(run)
    experiment, checkpoint = read_run(path, changes)
    samples = load_samples(experiment, split, surroundings, all_tasks=False)
    keep_samples(experiment, [samples], surroundings)
    info, trained_on = samples.source.info, DataInfo(**checkpoint["data"])
    segments = any(target_of(task) == "segmentation" for task in experiment.task)
    if segments and "segmentation" in info.targets and tuple(info.classes) != tuple(trained_on.classes):
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
    module = restored(path, experiment, checkpoint, trained_on)
    if views is not False:
        if module.model.masked is not None:
            raise UserError(
                f"--tta: {run} has learned the task 'masked', and a reconstruction has no other views; leave --tta out"
            )
        module.views = AveragedViews(module, SCALES if views is True else views)
    results = _measure(module, samples, experiment)
    return Outcome(run, results, dict(module.constant), checkpoint["global_step"], time.monotonic() - start)


def _check_resumable(experiment: Experiment, path: Path) -> dict[str, Any]:
    """Return a run's last checkpoint, if it has all that going on needs and belongs to the configuration beside it."""
    checkpoint = load_checkpoint(path)
    stored = stored_experiment(checkpoint, path)
    require(checkpoint, path, "state_dict", "data", "constant", "thawed_at", "generators", "loops", "lr_schedulers")
    require(checkpoint, path, "optimizer_states", *(["ema"] if experiment.ema is not None else []))
    if not checkpoint["optimizer_states"]:
        raise UserError(f"{path} holds no state of the optimizer, and cannot be gone on from; start anew with --init")
    for name in ("task", "weighting", "backbone", "decoder", "decoder_channels", "lora", "ema"):
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
    augmentation = Augmentation(resolve_augmentation(experiment), experiment.seed, inverse_depth=info.inverse_depth)
    stored, seen = as_floats(stored), augmentation(as_floats(seen))
    labelled = [task for task in experiment.task if task != "masked"]
    tasks = build_tasks(experiment.model_copy(update={"task": labelled}), info)
    for task in tasks:
        task.observe([stored[task.target]])
    panels: Panels = {"as it is stored": Panel(_picture(stored["image"]))}
    panels["what the network sees"] = Panel(_picture(seen["image"]))
    for task in tasks:
        title, drawn = next(iter(task.pictures(task.constant(seen[task.target]), seen[task.target]).items()))
        panels[title] = Panel(overlay(_picture(seen["image"]), drawn.images), drawn.scale)
    if "masked" in experiment.task:
        panels |= _masked_panels(experiment, info, seen)
    draw_predictions(path, panels, next((task.class_names for task in tasks if task.class_names), ()))
    if not augmentation.strengths:
        return [path]
    changes = path.with_stem(path.stem + "_transforms")
    _preview_transforms(samples, tasks[0] if tasks else None, experiment, changes)
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


def _preview_transforms(samples: Samples, task: Task | None, experiment: Experiment, path: Path) -> None:
    """Draw each change that the augmentation makes by itself, a row each: at a third, two thirds and all of it."""
    options = resolve_augmentation(experiment)
    keys = [Key(row, 0, position) for position, row in enumerate(spread(len(samples), TRIED))]
    stored = as_floats(samples.__getitems__(keys))
    rows: dict[str, list[np.ndarray]] = {}
    for name in (name for name in STRENGTHS if getattr(options, name)):
        strength = 1.0 if name in PROBABILITIES else getattr(options, name)
        shares = (1.0,) if name in PROBABILITIES else (1.0, 2 / 3, 1 / 3)
        shown: list[np.ndarray] = []
        most = 0
        for share in shares:
            seen = Augmentation(AugmentationOptions(**{name: strength * share}), experiment.seed)(stored)
            if share == 1:
                most = int((seen["image"] - stored["image"]).abs().flatten(1).mean(1).argmax())
            image = _picture(seen["image"][most : most + 1])
            shown.insert(0, image[0])
            if task is not None:
                target = seen[task.target][most : most + 1]
                drawn = next(iter(task.pictures(task.constant(target), target).values()))
                shown.insert(1, overlay(image, drawn.images)[0])
        shown.insert(0, _picture(stored["image"][most : most + 1])[0])
        label = name if name in PROBABILITIES else f"{name} {strength:g}"
        rows[label] = shown
    draw_rows(path, rows)


def _picture(image: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) of floats in [0, 1] as pictures."""
    return channels_last((image * 255).round().to(torch.uint8))


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
    if experiment.ema is not None:
        callbacks.append(ExponentialAverage(experiment.ema, step))
    if last_step is not None:
        callbacks.append(StopAfter(last_step))
    callbacks.append(Recorder(history))
    if experiment.patience is not None:
        callbacks.append(EarlyStopping(experiment.monitor, patience=experiment.patience, mode=best.mode))
    return [*callbacks, best, ResumePoint(str(folder / "last.ckpt"), experiment.checkpoint_every, history)]


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
    probed = _probed(module) if module.model.masked is not None else []
    draw_curves(outcome.folder / "curves.png", history, tasks, outcome.constant, probed)
    if len(tasks) > 1:
        draw_weighting(outcome.folder / "weighting.png", history, [task.name for task in tasks])
    panels, predictions, targets = predict_panels(module, samples)
    classes = next((task.class_names for task in tasks if task.class_names), ())
    draw_predictions(outcome.folder / "predictions.png", panels, classes)
    if wandb_logger:
        log_predictions(wandb_logger, tasks, panels, predictions, targets, outcome.steps)
