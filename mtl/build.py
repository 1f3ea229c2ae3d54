"""Builds the parts of an experiment from its configuration, and refuses what does not fit together."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import numpy as np
import torch

from mtl import registry
from mtl.augmentation.draws import Draws
from mtl.augmentation.pipeline import Pipeline
from mtl.augmentation.policy import Augmentation
from mtl.augmentation.signals import SignalAugmentation
from mtl.config import CLASS_COUNTS, SIGNAL_STRENGTHS, DataOptions, Experiment, SourceOptions, resolve_augmentation
from mtl.data.caching import choose
from mtl.data.cityscapes import Cityscapes
from mtl.data.combined import Combined
from mtl.data.folder import Folder
from mtl.data.loading import Batches, Loader, Samples, bytes_in_memory, choose_labels, default_workers
from mtl.data.mnist1d import MNIST1D
from mtl.data.nyuv2 import NYUv2
from mtl.data.sample import DataInfo, Source
from mtl.data.scenes import Scenes
from mtl.ensembling.bagging import bootstrap
from mtl.errors import UserError, nearest
from mtl.models.backbone import Backbone, coarsest_stride
from mtl.models.heads import Head, encoder_stride, resolve_decoder
from mtl.models.multitask import MultiTaskModel
from mtl.models.signals import make_signal_parts
from mtl.plugin_checks import check_task, check_weighting, open_data_set
from mtl.plugins import file_of, in_plugin
from mtl.pretraining.head import MaskedHead
from mtl.tasks.base import Task
from mtl.tasks.classification import Classification
from mtl.tasks.depth import Depth
from mtl.tasks.masked import Masked
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation
from mtl.training.balancing import LossBalancer
from mtl.training.module import MultiTaskModule, schedule_with_restarts
from mtl.training.tracking import Mode
from mtl.transfer.lora import Adapters, add_lora
from mtl.weighting.rules import make_rule

HELD_OUT_SCENES = 1_000_000
"""Number of the first rendered room that is held out; those for training are numbered from 0."""

Split = Literal["train", "validation", "test"]


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
    """Open the configured data set, or several as one.

    Raises:
        UserError: One is not there or cannot be used, or they do not go together.
    """
    opened = [(_open(options, split, experiment.data, surroundings), options.targets) for options in experiment.sources]
    if len(opened) == 1 and opened[0][1] is None:
        return opened[0][0]
    return Combined([(source, None if targets is None else tuple(targets)) for source, targets in opened])


def _open(options: SourceOptions, split: Split, data: DataOptions, surroundings: Surroundings) -> Source:
    if options.name in registry.data_sets:
        return open_data_set(options.name, options.root, split, data.size)
    if options.name == "nyuv2":
        assert options.root is not None, "the configuration has checked this"
        classes = options.classes or CLASS_COUNTS["nyuv2"][0]
        return NYUv2(options.root, split=split, size=data.size, classes=classes, raw_depth=options.raw_depth)
    if options.name == "cityscapes":
        assert options.root is not None, "the configuration has checked this"
        classes = options.classes or CLASS_COUNTS["cityscapes"][0]
        return Cityscapes(options.root, split=split, size=data.size, classes=classes)
    if options.name == "mnist1d":
        return MNIST1D(options.root, split=split)
    if split == "test":
        raise UserError(f"--split test: data set {options.name!r} has no test split of its own; leave it out")
    if options.name == "folder":
        assert options.root is not None, "the configuration has checked this"
        return Folder(options.root, split=split, size=data.size, description=options.description)
    report = surroundings.progress
    training = split == "train"
    return Scenes(
        options.train_samples if training else options.val_samples,
        domain=options.domain,
        seed=options.scene_seed,
        size=data.size,
        start=0 if training else HELD_OUT_SCENES,
        # Kept on disk as samples, they need not be kept a second time.
        cache_dir=None if data.cache == "disk" else data.cache_dir or surroundings.cache_dir,
        progress=None if report is None else lambda done, total: report(f"rendering {split} rooms", done, total),
    )


def load_samples(
    experiment: Experiment, split: Split, surroundings: Surroundings, *, all_tasks: bool = True
) -> Samples:
    """Open the configured data set; `keep_samples` then decodes it.

    For training, only samples with a label of one of the tasks are used, after `--data.labels` has chosen them; all
    of them, where one of the tasks is masked.

    Args:
        experiment: Which data, and the tasks whose labels are loaded.
        split: Which samples.
        surroundings: Where.
        all_tasks: Whether each task must have labels; otherwise one of them will do.

    Raises:
        UserError: The data cannot be used, or has no label of a task.
    """
    source = open_source(experiment, split, surroundings)
    data = experiment.data
    targets = {task: target_of(task) for task in experiment.task if task != "masked"}
    hidden: dict[str, frozenset[int]] = {}
    for task, target in targets.items():
        available = int(source.labelled(target).sum())
        if not available and (all_tasks or not any(source.labelled(other).any() for other in targets.values())):
            raise UserError(
                f"no {split} sample of {source.info.name} has a label for the task {task!r}; "
                f"add labels or leave the task out of --task"
            )
        wanted = data.labels.get(task) if split == "train" else None
        if wanted is not None and wanted > available:
            raise UserError(
                f"--data.labels {task}={wanted}: {source.info.name} has only {available} such training samples"
            )
        chosen = choose_labels(source, target, wanted, experiment.seed)
        if hidden.setdefault(target, chosen) != chosen:
            raise UserError(
                f"--data.labels: {task!r} learns from {target} labels as another task does; give both as many"
            )
    usable = sorted(
        {int(i) for target in targets.values() for i in source.labelled(target).nonzero()[0] if i not in hidden[target]}
        if "masked" not in experiment.task
        else range(len(source))
    )
    if split == "train" and isinstance(source, Combined):
        for options, part in zip(experiment.sources, source.parts, strict=True):
            if not any(index in part for index in usable):
                raise UserError(
                    f"no training sample of the data set {options.name!r} has labels for {', '.join(experiment.task)}; "
                    "leave it out of more_data, or change --task"
                )
    pipeline = None
    if split == "train" and experiment.augmentation.loader:
        loader = experiment.augmentation.loader
        pipeline = Pipeline(loader, "augmentation.loader", data.size, source.info.inverse_depth)
    unique = tuple(dict.fromkeys(targets.values()))
    samples = Samples(source, usable, unique, hidden=hidden, augment=pipeline, seed=experiment.seed)
    if split == "train" and data.labelled_share is not None and not all(_with_and_without(samples)):
        known = next((task for task, target in targets.items() if samples.has(target).all()), next(iter(targets)))
        raise UserError(
            f"--data.labelled-share {data.labelled_share:g}: each of the {len(samples)} training samples has a label, "
            f"as for {known!r}; use fewer of them, as by --data.labels {known}=50, or leave the share out"
        )
    return samples


def _with_and_without(samples: Samples) -> tuple[list[int], list[int]]:
    """Return the rows of the samples with a label of any target, and the others."""
    labelled = np.any([samples.has(target) for target in samples.targets], axis=0)
    return np.flatnonzero(labelled).tolist(), np.flatnonzero(~labelled).tolist()


def keep_samples(experiment: Experiment, splits: Sequence[Samples], surroundings: Surroundings) -> None:
    """Decode samples once, where there is room to keep them, and say where.

    Raises:
        UserError: They cannot be kept where --data.cache says, or cannot be read.
    """
    data, report = experiment.data, surroundings.progress
    device = torch.device("cpu")
    # With several devices each process would have to know its own; their samples stay in the host's memory.
    if experiment.devices == 1 and experiment.device in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    needed = bytes_in_memory(data.size, splits[0].targets, sum(map(len, splits)), splits[0].source.info)
    augmented = any(samples.augment is not None for samples in splits)
    choice = choose(data.cache, needed, device, data.cache_gb, loader_augments=augmented)
    surroundings.say(choice.reason)
    for samples in splits:
        samples.keep(
            choice.cache,
            device=device,
            folder=data.cache_dir or surroundings.cache_dir,
            progress=None if report is None else lambda done, total: report("reading samples", done, total),
        )


def build_tasks(experiment: Experiment, info: DataInfo) -> list[Task]:
    """Return the experiment's tasks for a data set.

    Raises:
        UserError: The data do not suit a task, or a plugin's task does not do what a task must.
    """
    makers: dict[str, Callable[[], Task]] = {
        "segmentation": lambda: Segmentation(experiment.segmentation, info),
        "depth": lambda: Depth(experiment.depth, info),
        "normals": lambda: Normals(info),
        "classification": lambda: Classification(info, experiment.classification.label_smoothing),
        "masked": lambda: Masked(experiment.mask, patch_of(experiment)),
    }
    return [makers[name]() if name in makers else _plugin_task(name, info) for name in experiment.task]


def _plugin_task(name: str, info: DataInfo) -> Task:
    make = registry.tasks[name]
    with in_plugin(file_of(make) or name, f"making the task {name!r}"):
        task, tried = make(info), make(info)
    check_task(tried)
    return task


def patch_of(experiment: Experiment) -> int:
    """Return the side in pixels of the patches that are hidden.

    Raises:
        UserError: There is no such backbone.
    """
    return experiment.mask.patch or coarsest_stride(experiment.backbone, encoder_stride(experiment.decoder))


_BUILT_IN: tuple[type[Task], ...] = (Segmentation, Depth, Normals, Masked, Classification)


def target_of(task: str) -> str:
    """Return the batch key of a task's labels."""
    built_in: dict[str, str] = {kind.name: kind.target for kind in _BUILT_IN}
    return built_in[task] if task in built_in else registry.tasks[task].target


def build_balancer(experiment: Experiment, tasks: Sequence[Task]) -> LossBalancer:
    """Return what combines the losses.

    Raises:
        UserError: The rule has no such options, or a plugin's rule does not do what a rule must.
    """
    name = experiment.weighting
    options: dict[str, Any] = dict(experiment.weighting_options)
    if name == "fixed":
        if options:
            raise UserError("--weighting-options: the rule 'fixed' has none; its weights are given by --loss-weights")
        options = {"weights": experiment.loss_weights}
    likelihoods = {task.name: str(task.likelihood) for task in tasks}
    plugin = registry.weightings.get(name)
    if plugin is None:
        rule = make_rule(name, likelihoods, options, experiment.seed)
    else:
        with in_plugin(file_of(plugin) or name, f"making the weighting rule {name!r}"):
            rule = make_rule(name, likelihoods, options, experiment.seed)
        check_weighting(rule, list(likelihoods))
    if not rule.needs_gram:
        for flag, given in (
            (f"--weighting-every {experiment.weighting_every}", experiment.weighting_every > 1),
            ("--weighting-on parameters", experiment.weighting_on == "parameters"),
        ):
            if given:
                raise UserError(f"{flag} is for rules that compare gradients, which {name!r} does not; leave it out")
    return LossBalancer(rule, experiment.weighting_every, experiment.weighting_on, experiment.head_weighting)


def unbalanced(experiment: Experiment, compares_gradients: bool) -> str | None:
    """Return why a rule that compares gradients has nothing to compare, in a sentence, or None."""
    if not compares_gradients:
        return None
    if len(experiment.task) == 1:
        return f"--weighting {experiment.weighting}: one task has no other to be weighed against; its weight is 1"
    if experiment.freeze:
        until = "" if experiment.backbone_stays else ", until the backbone thaws"
        return (
            f"--weighting {experiment.weighting}: no gradients meet in a frozen backbone; "
            f"the losses are summed as they are{until}"
        )
    return None


def build_model(experiment: Experiment, tasks: Sequence[Task], *, training: bool = True) -> MultiTaskModel:
    """Return the model, randomly initialised.

    Args:
        experiment: What to build.
        tasks: The tasks, each of which gets a head.
        training: Whether it is to be trained, which some models refuse to be on single images.

    Raises:
        UserError: Backbone, decoder and size do not go together.
    """
    if experiment.signals:
        return _build_signal_model(experiment, tasks)
    stride = encoder_stride(experiment.decoder)
    backbone = Backbone(experiment.backbone, experiment.data.size, stride, experiment.drop_path)
    decoder = resolve_decoder(experiment.decoder, backbone)
    width, dropout = experiment.decoder_channels, experiment.dropout
    heads = {
        task.name: Head(backbone, decoder, task.channels, width, dropout) for task in tasks if task.name != "masked"
    }
    masked = None
    if "masked" in experiment.task:
        masked = MaskedHead(backbone, experiment.mask, patch_of(experiment))
    model = MultiTaskModel(backbone, heads, masked)
    _check_runs(model, experiment, training)
    if experiment.freeze or experiment.freeze_stages:
        backbone.freeze(experiment.freeze_stages)
        if masked is not None and masked.cover is not None:
            masked.cover.requires_grad_(False)  # a frozen stem has no gradient to give to pixels
    if experiment.grad_checkpointing:
        backbone.checkpoint_gradients()
        if masked is not None:
            masked.checkpoint_gradients()
    if experiment.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return model


def _build_signal_model(experiment: Experiment, tasks: Sequence[Task]) -> MultiTaskModel:
    outputs = {task.name: task.channels for task in tasks}
    backbone, heads = make_signal_parts(experiment.backbone, outputs, experiment.dropout or 0.0)
    if experiment.freeze:
        backbone.freeze()
    return MultiTaskModel(backbone, heads)


def build_augmentation(experiment: Experiment, info: DataInfo) -> Augmentation | SignalAugmentation:
    """Return the random changes of training batches.

    Raises:
        UserError: A strength is out of its range.
    """
    options = resolve_augmentation(experiment)
    if not experiment.signals:
        return Augmentation(options, experiment.seed, inverse_depth=info.inverse_depth)
    magnitude = 1.0 if options.magnitude is None else options.magnitude
    shift, scale, noise = (magnitude * (getattr(options, name) or 0.0) for name in SIGNAL_STRENGTHS)
    return SignalAugmentation(experiment.seed, shift=min(1.0, shift), scale=scale, noise=noise)


def build_module(experiment: Experiment, info: DataInfo, total_steps: int) -> MultiTaskModule:
    """Return what Lightning trains, randomly initialised and without adapters.

    Args:
        experiment: What to build.
        info: What is known of the data.
        total_steps: Optimizer steps of the first fit; 0 for evaluation alone.

    Raises:
        UserError: The parts do not go together.
    """
    tasks = build_tasks(experiment, info)
    if experiment.regularize.depth_jitter and not any(task.target == "depth" for task in tasks):
        raise UserError(
            f"--regularize.depth-jitter is for labels of depth, from which {', '.join(experiment.task)} "
            "does not learn; add --task depth, or leave it out"
        )
    balancer = build_balancer(experiment, tasks)
    model = build_model(experiment, tasks, training=total_steps > 0)
    if experiment.compile:
        if balancer.on == "parameters":
            # Its graph is passed once for each task, and so may not give its memory away in the first pass.
            torch._functorch.config.donated_buffer = False
        model.compile()
    augmentation = None
    if total_steps > 0:
        augmentation = build_augmentation(experiment, info)
        if experiment.compile and isinstance(augmentation, Augmentation):
            augmentation.compile_photometry()
    return MultiTaskModule(model, tasks, balancer, experiment, total_steps, info, augmentation)


def adapt(module: MultiTaskModule) -> Adapters | None:
    """Add low-rank adapters where the experiment asks for them, after the initial weights, and return where they are.

    Raises:
        UserError: The backbone cannot have them, or the package for them is missing.
    """
    rank, backbone = module.options.lora, module.model.backbone
    if rank is None:
        return None
    assert isinstance(backbone, Backbone), "the configuration has checked this"
    return add_lora(backbone, rank)


def probe_every(experiment: Experiment, epochs: int) -> int:
    """Return the epochs from one trial of masked features to the next; 0 is never."""
    every = experiment.mask.probe_every
    return max(1, epochs // 10) if every is None else every


def steps_in_epoch(experiment: Experiment, samples: int) -> int:
    """Return the number of optimizer steps of an epoch."""
    samples = experiment.epoch_samples or samples
    batches = len(Batches(samples, experiment.batch_size, shuffle=True, ranks=experiment.devices))
    return -(-batches // experiment.accumulate)


def steps_in_all(experiment: Experiment, samples: int) -> int:
    """Return the number of optimizer steps of the whole training."""
    return experiment.max_steps or experiment.epochs * steps_in_epoch(experiment, samples)


class Fit(NamedTuple):
    """One of the fits that a training is made of, each with an optimizer, a schedule and a wrapper of its own.

    Attributes:
        thawed: Whether this is what follows a thaw of the backbone.
        epochs: Number of its epochs.
        steps: Number of its optimizer steps.
    """

    thawed: bool
    epochs: int
    steps: int


def plan_fits(experiment: Experiment, samples: int) -> list[Fit]:
    """Return a training's fits: one, or two where the backbone thaws.

    Raises:
        UserError: The training ends before the thaw.
    """
    each, steps = steps_in_epoch(experiment, samples), steps_in_all(experiment, samples)
    epochs = -(-steps // each)
    if experiment.unfreeze_at is None:
        return [Fit(False, epochs, steps)]
    probe = experiment.unfreeze_at
    if probe * each >= steps:
        raise UserError(
            f"--unfreeze-at {probe} comes after {probe * each} steps, and the training has {steps}; "
            "thaw earlier, or train longer with --epochs or --max-steps"
        )
    return [Fit(False, probe, probe * each), Fit(True, epochs - probe, steps - probe * each)]


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
        **(_mixture(samples, experiment) if training else {}),
    )
    workers = experiment.data.workers
    if workers is None:
        workers = default_workers(samples.stored is not None, samples.augment is not None)
    return Loader(samples, batches, workers, pin_memory=trainer.strategy.root_device.type == "cuda")


def rows_to_learn(samples: Samples, experiment: Experiment) -> Sequence[int]:
    """Return the training samples that are learned from: all, or with --bootstrap those drawn, some of them often."""
    return bootstrap(len(samples), experiment.seed).tolist() if experiment.bootstrap else range(len(samples))


def _mixture(samples: Samples, experiment: Experiment) -> dict[str, Any]:
    """Return how training draws its samples, where that is not simply each once an epoch."""
    rows = rows_to_learn(samples, experiment)
    if (share := experiment.data.labelled_share) is not None:
        return {
            "parts": [[row for row in rows if row in part] for part in map(set, _with_and_without(samples))],
            "ratios": [share, 1 - share],
            "epoch_length": experiment.epoch_samples,
        }
    ratios = [source.ratio for source in experiment.sources]
    if experiment.epoch_samples is None and None in ratios and not experiment.bootstrap:
        return {}
    ranges = samples.source.parts if isinstance(samples.source, Combined) else [range(len(samples.source))]
    parts = [[row for row in rows if samples.indices[row] in part] for part in ranges]
    return {
        "parts": parts,
        "ratios": None if None in ratios else ratios,
        "epoch_length": experiment.epoch_samples,
    }


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
    """Refuse a warm-up that never ends, and more falls of the learning rate than there are steps for.

    Raises:
        UserError: It is as long as the training, or these do not fit.
    """
    if experiment.warmup is not None and experiment.warmup >= total_steps:
        raise UserError(
            f"--warmup {experiment.warmup} is not shorter than the training of {total_steps} steps; make it shorter, "
            "or train longer with --epochs or --max-steps"
        )
    if experiment.snapshots is not None:
        schedule_with_restarts(total_steps, experiment.warmup, experiment.snapshots)


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
    alone = training and 1 in (experiment.batch_size, experiment.epoch_samples)
    probe = copy.deepcopy(model).train() if alone else model.eval()
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, height, width)
            probe(image)
            if probe.masked is not None:
                mask = probe.masked.draw(Draws(0, 0, torch.zeros(1, dtype=torch.int64)), (height, width))
                probe.masked(probe.encode_masked(image, mask), mask)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"backbone {experiment.backbone} with decoder {experiment.decoder} cannot take images of {height}x{width}"
            f"{' one at a time' if alone else ''} ({reason}); choose another --data.size, --backbone, --decoder"
            f"{', or more than one of --batch-size and --epoch-samples' if alone else ''}"
        ) from None
    model.train()
