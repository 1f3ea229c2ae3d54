"""Builds the parts of an experiment from its configuration, and refuses what does not fit together."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from mtl.augmentation.loader import LoaderAugmentation
from mtl.config import Experiment
from mtl.data.folder import Folder
from mtl.data.loading import Batches, Loader, Samples, bytes_in_memory, choose_labels, default_workers
from mtl.data.sample import DataInfo, Source
from mtl.data.scenes import Scenes
from mtl.errors import UserError, nearest
from mtl.models.backbone import Backbone
from mtl.models.heads import Head, encoder_stride, resolve_decoder
from mtl.models.multitask import MultiTaskModel
from mtl.tasks.base import Task
from mtl.tasks.depth import Depth
from mtl.tasks.segmentation import Segmentation
from mtl.training.module import MultiTaskModule
from mtl.training.tracking import Mode
from mtl.weighting.fixed import FixedWeights

HELD_OUT_SCENES = 1_000_000
"""Number of the first rendered room that is held out; those for training are numbered from 0."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Surroundings:
    """What a run needs to know of the machine and the person, gathered by the command line.

    Attributes:
        cache_dir: Where rendered data is kept between runs; None keeps none.
        wandb_mode: How to use Weights & Biases.
        rank: This process among those of a distributed run.
        folder: The run's folder, where another process of the run has chosen it.
        progress: Called with (what, done, total) while data is read.
        say: Called with each line for a person.
    """

    cache_dir: Path | None = None
    wandb_mode: Mode = "offline"
    rank: int = 0
    folder: Path | None = None
    progress: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = print


def open_source(experiment: Experiment, split: Split, surroundings: Surroundings) -> Source:
    """Open the configured data set.

    Raises:
        UserError: It is not there or cannot be used.
    """
    data = experiment.data
    if data.name == "folder":
        assert data.root is not None, "the configuration has checked this"
        return Folder(data.root, split=split, size=data.size, description=data.description)
    report = surroundings.progress
    training = split == "train"
    return Scenes(
        data.train_samples if training else data.val_samples,
        domain=data.domain,
        seed=data.scene_seed,
        size=data.size,
        start=0 if training else HELD_OUT_SCENES,
        cache_dir=data.cache_dir or surroundings.cache_dir,
        progress=None if report is None else lambda done, total: report(f"rendering {split} rooms", done, total),
    )


def load_samples(experiment: Experiment, split: Split, surroundings: Surroundings) -> Samples:
    """Open the configured data set and read it into memory where it fits.

    For training, only samples with a label of one of the tasks are used, after `--data.labels` has chosen them.

    Raises:
        UserError: The data cannot be used, or has no label of a task.
    """
    source = open_source(experiment, split, surroundings)
    data = experiment.data
    targets = {task: target for task, target in TARGET_OF.items() if task in experiment.task}
    hidden: dict[str, frozenset[int]] = {}
    for task, target in targets.items():
        available = int(source.labelled(target).sum())
        if not available:
            raise UserError(
                f"no {split} sample of {source.info.name} has a label for the task {task!r}; "
                f"add labels or leave the task out of --task"
            )
        wanted = data.labels.get(task) if split == "train" else None
        if wanted is not None and wanted > available:
            raise UserError(
                f"--data.labels {task}={wanted}: {source.info.name} has only {available} such training samples"
            )
        hidden[target] = choose_labels(source, target, wanted, experiment.seed)
    usable = sorted(
        {int(i) for target in targets.values() for i in source.labelled(target).nonzero()[0] if i not in hidden[target]}
    )
    in_memory = bytes_in_memory(data.size, targets.values(), len(usable)) <= data.cache_gb * 1e9
    report = surroundings.progress
    return Samples(
        source,
        usable,
        tuple(targets.values()),
        hidden=hidden,
        augment=LoaderAugmentation(data.augment) if split == "train" and data.augment != "none" else None,
        seed=experiment.seed,
        in_memory=in_memory,
        progress=None if report is None else lambda done, total: report(f"reading {split} samples", done, total),
    )


def build_tasks(experiment: Experiment, info: DataInfo) -> list[Task]:
    """Return the experiment's tasks for a data set."""
    makers: dict[str, Callable[[], Task]] = {
        "segmentation": lambda: Segmentation(experiment.segmentation, info),
        "depth": lambda: Depth(experiment.depth, info),
    }
    return [makers[task]() for task in experiment.task]


TARGET_OF = {task.name: task.target for task in (Segmentation, Depth)}
"""The target of each task."""


def build_model(experiment: Experiment, tasks: Sequence[Task], *, training: bool = True) -> MultiTaskModel:
    """Return the model, randomly initialised.

    Args:
        experiment: What to build.
        tasks: The tasks, each of which gets a head.
        training: Whether it is to be trained, which some models refuse to be on single images.

    Raises:
        UserError: Backbone, decoder and size do not go together.
    """
    backbone = Backbone(experiment.backbone, experiment.data.size, encoder_stride(experiment.decoder))
    decoder = resolve_decoder(experiment.decoder, backbone)
    width, dropout = experiment.decoder_channels, experiment.dropout
    heads = {task.name: Head(backbone, decoder, task.channels, width, dropout) for task in tasks}
    model = MultiTaskModel(backbone, heads)
    _check_runs(model, experiment, training)
    if experiment.freeze:
        backbone.freeze()
    if experiment.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return model


def build_module(experiment: Experiment, info: DataInfo, total_steps: int) -> MultiTaskModule:
    """Return what Lightning trains, randomly initialised; with no steps to make it is for evaluation alone."""
    tasks = build_tasks(experiment, info)
    model = build_model(experiment, tasks, training=total_steps > 0)
    if experiment.compile:
        model.compile()
    weights = FixedWeights({task: experiment.loss_weights.get(task, 1.0) for task in experiment.task})
    return MultiTaskModule(model, tasks, weights, experiment, total_steps, classes=info.classes)


def steps_in_epoch(experiment: Experiment, samples: int) -> int:
    """Return the number of optimizer steps of an epoch."""
    batches = len(Batches(samples, experiment.batch_size, shuffle=True, ranks=experiment.devices))
    return -(-batches // experiment.accumulate)


def steps_in_all(experiment: Experiment, samples: int) -> int:
    """Return the number of optimizer steps of the whole training."""
    return experiment.max_steps or experiment.epochs * steps_in_epoch(experiment, samples)


def make_trainer(experiment: Experiment, **arguments: Any) -> lightning.Trainer:
    """Return a Lightning trainer on the experiment's device and in its precision."""
    return lightning.Trainer(
        accelerator="gpu" if experiment.device == "cuda" else experiment.device,
        devices=experiment.devices,
        strategy="ddp" if experiment.devices > 1 else "auto",
        precision=experiment.precision,
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )


def make_loader(samples: Samples, experiment: Experiment, trainer: lightning.Trainer, *, training: bool) -> Loader:
    """Return the loader of one split."""
    batches = Batches(
        len(samples),
        experiment.batch_size,
        shuffle=training,
        seed=experiment.seed,
        rank=trainer.global_rank,
        ranks=trainer.world_size,
    )
    workers = experiment.data.workers
    if workers is None:
        workers = default_workers(samples.stored is not None, samples.augment is not None)
    return Loader(samples, batches, workers, pin_memory=trainer.strategy.root_device.type == "cuda")


def check_machine(experiment: Experiment) -> None:
    """Refuse what this machine cannot do.

    Raises:
        UserError: The device is missing, or cannot compute in this precision.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if experiment.device != "auto" and not present[experiment.device]:
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise UserError(f"--device {experiment.device}: there is no such device here; there is {there}, or use auto")
    if experiment.device in ("auto", "cuda") and experiment.devices > torch.cuda.device_count() > 0:
        raise UserError(f"--devices {experiment.devices}: only {torch.cuda.device_count()} GPUs are here")
    on_gpu = experiment.device != "cpu" and (present["cuda"] or present["mps"])
    if experiment.precision == "16-mixed" and not on_gpu:
        raise UserError("--precision 16-mixed needs a GPU, and there is none; use bf16-mixed or 32-true")


def check_schedule(experiment: Experiment, total_steps: int) -> None:
    """Refuse a warm-up that never ends.

    Raises:
        UserError: It is as long as the training.
    """
    if experiment.warmup is not None and experiment.warmup >= total_steps:
        raise UserError(
            f"--warmup {experiment.warmup} is not shorter than the training of {total_steps} steps; make it shorter, "
            "or train longer with --epochs or --max-steps"
        )


def check_monitor(experiment: Experiment, module: MultiTaskModule) -> bool:
    """Return whether a higher value of the monitored metric is better.

    Raises:
        UserError: No task has this metric.
    """
    directions = {"gain": True}
    for task in module.each_task():
        for name, higher in task.higher_is_better.items():
            if name.endswith("/*"):
                directions |= {f"{task.name}/{name[:-1]}{c}": higher for c in task.class_names}
            else:
                directions[f"{task.name}/{name}"] = higher
    if experiment.monitor not in directions:
        raise UserError(
            f"--monitor {experiment.monitor!r} is not measured{nearest(experiment.monitor, directions)}; "
            f"there are {', '.join(directions)}"
        )
    return directions[experiment.monitor]


def _check_runs(model: MultiTaskModel, experiment: Experiment, training: bool) -> None:
    """Refuse a model that cannot take such batches, before any data is trained on."""
    height, width = experiment.data.size
    # A single image in training mode can leave a normalisation with one value a channel, which it refuses. A copy
    # takes that test, as it moves the running statistics.
    alone = training and experiment.batch_size == 1
    probe = copy.deepcopy(model).train() if alone else model.eval()
    try:
        with torch.no_grad():
            probe(torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"backbone {experiment.backbone} with decoder {experiment.decoder} cannot take images of {height}x{width}"
            f"{' one at a time' if alone else ''} ({reason}); choose another --data.size, --backbone, --decoder"
            f"{' or --batch-size' if alone else ''}"
        ) from None
    model.train()
