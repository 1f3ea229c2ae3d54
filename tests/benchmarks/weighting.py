"""What a weighting rule costs: step time and peak memory relative to the plain sum, and relative to other libraries.

    python tests/benchmarks/weighting.py [--backbone resnet18] [--size 96 128] [--batch-size 4] [--rounds 7]
        [--peer-rounds 4] [--tasks 2 3 6] [--decoder-channels 64] [--threads 2]

A step is what a run does with a batch that is on the device: forward, losses, balancer, backward, AdamW. All variants
of a table train one model in one process, each with the optimizer that a run with this rule has. In each round every
variant makes one step, forwards in one round and backwards in the next; a ratio is the median of its rounds' ratios.
Peak memory is that of model, optimizer and one step: what torch's allocator gave out at most during the step, from
`torch.cuda.max_memory_allocated` or, on the CPU, the profiler's record of every allocation.

The claims held here: rules from losses cost at most 1.03 times the plain sum, and `famo`, with its second forward, at
most 1.4; rules from gradients at most 1.10 at feature level, and at least 1.5 times less than what others do at
parameter level.

The others are given the same model, losses and optimizer, and do the same work: their gradients of the backbone are
ours on parameters up to rounding and their solvers' tolerances (LibMTL's CAGrad stops early where gradients are short).
LibMTL's classes want contiguous gradients, so that in this table no model is in channels-last layout. torchjd's
``mtl_backward`` counts gradients twice where shared features are computed from one another, as a pyramid's are: it gets
a view of each map, of which none is computed from another.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mtl.build import build_model
from mtl.config import Experiment, SegmentationOptions, validate
from mtl.data.sample import Batch, DataInfo
from mtl.models.backbone import Pyramid
from mtl.tasks.base import Task
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation
from mtl.training.balancing import LossBalancer
from mtl.training.module import LOG_EVERY, MultiTaskModule
from mtl.weighting.rules import make_rule

INFO = DataInfo("benchmark", ("segmentation", "depth", "normals"), tuple(f"class {i}" for i in range(13)))
FROM_LOSSES = ("uncertainty", "dwa", "famo")
FROM_GRADIENTS = ("mgda", "pcgrad", "cagrad", "nash-mtl", "aligned-mtl", "upgrad", "gradnorm", "db-mtl")
RECORDED = "equal, gradients recorded"
PEERS = {
    "mgda": {"LibMTL": "MGDA", "torchjd": "MGDA"},
    "pcgrad": {"LibMTL": "PCGrad", "torchjd": "PCGrad"},
    "gradvac": {"LibMTL": "GradVac", "torchjd": "GradVac"},
    "cagrad": {"LibMTL": "CAGrad"},  # torchjd's needs a convex-programming package
    "upgrad": {"torchjd": "UPGrad"},
}
"""The classes of others by our name of the rule."""

LIBMTL_OPTIONS = {"mgda_gn": "none", "calpha": 0.4, "rescale": 0, "beta": 0.5}
"""Our defaults."""

Step = Callable[[], None]


class SecondSegmentation(Segmentation):
    """A fourth task."""

    name = "second segmentation"


class SecondDepth(Depth):
    """A fifth task."""

    name = "second depth"


class SecondNormals(Normals):
    """A sixth task."""

    name = "second normals"


def tasks_of(count: int) -> list[Task]:
    """Return the first of six tasks."""
    options = validate({"task": "depth"})
    segmentation: SegmentationOptions = options.segmentation
    return [
        Segmentation(segmentation, INFO),
        Depth(options.depth, INFO),
        Normals(INFO),
        SecondSegmentation(segmentation, INFO),
        SecondDepth(options.depth, INFO),
        SecondNormals(INFO),
    ][:count]


class Counted(MultiTaskModule):
    """A module without a trainer, which is told how many steps were done."""

    steps_done = 0

    @property
    def global_step(self) -> int:
        """Number of optimizer steps done."""
        return self.steps_done


def build(experiment: Experiment, tasks: Sequence[Task], device: torch.device) -> Counted:
    """Return a module whose balancer is the plain sum."""
    model = build_model(experiment, tasks)
    module = Counted(model, tasks, balancer_of("equal", tasks), experiment, 1000, INFO)
    return module.to(device).train()


def balancer_of(rule: str, tasks: Sequence[Task], on: str = "features") -> LossBalancer:
    """Return what a run with this rule has."""
    return LossBalancer(make_rule(rule, {task.name: str(task.likelihood) for task in tasks}, {}), on=cast(Any, on))


class Variant:
    """One way to train a module, with an optimizer of its own.

    Args:
        module: The model and its tasks.
        batch: What to train on.
        balancer: From losses to one backward pass.
        backward: What takes the place of the balancer, from the losses' module and batch to gradients in place.
        recorded: Whether each step is one of those of which a run records how gradients meet.
    """

    def __init__(
        self,
        module: Counted,
        batch: Batch,
        balancer: LossBalancer,
        backward: Callable[[Counted, Batch], None] | None = None,
        *,
        recorded: bool = False,
    ) -> None:
        self.module, self.batch, self.balancer, self.backward = module, batch, balancer, backward
        self.number = LOG_EVERY - 1 if recorded else 0
        module.balancer = balancer
        self.optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]

    def __call__(self) -> None:
        """Make one step."""
        if self.backward is not None:
            self.backward(self.module, self.batch)
            self.optimizer.step()
        else:
            self.module.balancer = self.balancer
            self.number += LOG_EVERY
            self.module.steps_done = self.number
            self.module.training_step(self.batch, 0).backward()
            self.optimizer.step()
            self.module.look_again(nullcontext())
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Return the bytes of model, batch and optimizer state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        kept = [*self.module.parameters(), *self.module.buffers(), *self.batch.values(), *state]
        return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))


def losses_of(module: Counted, batch: Batch, pyramid: Pyramid) -> list[Tensor]:
    """Return the tasks' losses for shared features."""
    outputs = module.model.decode(pyramid, (batch["image"].shape[-2], batch["image"].shape[-1]))
    return [task.loss(outputs[task.name], batch) for task in module.each_task()]


def with_torchjd(aggregator: nn.Module, chunk: int | None) -> Callable[[Counted, Batch], None]:
    """Return torchjd's way from a batch to gradients."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    def backward(module: Counted, batch: Batch) -> None:
        pyramid = module.model.encode(batch["image"])
        maps = [m.view_as(m) if m.requires_grad else m for m in pyramid.maps]
        losses = losses_of(module, batch, Pyramid(maps, pyramid.tokens))
        shared = list(module.model.backbone.parameters())
        heads = [list(module.model.head(task.name).parameters()) for task in module.each_task()]
        features = [m for m in maps if m.requires_grad]
        mtl_backward(losses, features, tasks_params=heads, shared_params=shared, parallel_chunk_size=chunk)
        jac_to_grad(shared, cast(Any, aggregator))

    return backward


def with_libmtl(kind: type[nn.Module], module: Counted) -> Callable[[Counted, Batch], None]:
    """Return LibMTL's way from a batch to gradients, whose weighting classes are mixed into a model class."""
    backbone = module.model.backbone

    class Architecture(kind):  # type: ignore[misc, valid-type]
        task_num, rep_grad, device = len(module.tasks), False, module.device

        def get_share_params(self) -> Iterator[nn.Parameter]:
            return backbone.parameters()

        def zero_grad_share_params(self) -> None:
            backbone.zero_grad(set_to_none=False)  # torch's default when it was written

    rule = Architecture()
    rule.init_param()

    def backward(module: Counted, batch: Batch) -> None:
        rule.backward(losses_of(module, batch, module.model.encode(batch["image"])), **LIBMTL_OPTIONS)

    return backward


def peers(module: Counted) -> Iterator[tuple[str, str, Callable[[Counted, Batch], None]]]:
    """Yield the other libraries' ways that are installed: our name of the rule, a label, the way."""
    stub = ModuleType("torchvision.models.utils")
    stub.load_state_dict_from_url = None  # type: ignore[attr-defined]  # LibMTL imports it; torchvision has it no more
    sys.modules.setdefault(stub.__name__, stub)
    libmtl = import_module("LibMTL.weighting") if find_spec("LibMTL") else None
    torchjd = import_module("torchjd.aggregation") if find_spec("torchjd") else None
    for rule, classes in PEERS.items():
        if libmtl is not None and "LibMTL" in classes:
            yield rule, f"LibMTL {classes['LibMTL']}", with_libmtl(getattr(libmtl, classes["LibMTL"]), module)
        if torchjd is not None and "torchjd" in classes:
            try:
                aggregators = [getattr(torchjd, classes["torchjd"])() for _ in range(2)]
            except ImportError as error:
                print(f"torchjd {classes['torchjd']} is left out: {error}\n")
                continue
            for aggregator, chunk in zip(aggregators, (None, 1), strict=True):
                label = f"torchjd {classes['torchjd']}" + (", one at a time" if chunk else "")
                yield rule, label, with_torchjd(aggregator, chunk)


def timed(step: Step, device: torch.device) -> float:
    """Return the seconds that a step takes."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(variants: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-2, rounds):
        for name in names:
            took = timed(variants[name], device)
            if number >= 0:
                seconds[name].append(took)
        names.reverse()
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """Return the median over rounds of one variant's seconds relative to another's."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def peak(variant: Variant, device: torch.device) -> int:
    """Return the most bytes that a variant needs at once, other variants' optimizers not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        torch.cuda.synchronize()
        return variant.held() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        variant()
    assert record.profiler is not None
    allocations = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for allocation in sorted(allocations, key=lambda event: event.start_ns()):
        now += allocation.nbytes()
        most = max(most, now)
    return variant.held() + most


def batch_of(count: int, size: tuple[int, int], module: Counted) -> Batch:
    """Return random images with labels of all tasks, as `MultiTaskModule.training_step` takes them."""
    batch = {
        "image": torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8),
        "segmentation": torch.randint(0, len(INFO.classes), (count, *size), dtype=torch.uint8),
        "depth": torch.rand(count, 1, *size) * 4 + 1,
        "normals": nn.functional.normalize(torch.randn(count, 3, *size), dim=1),
    }
    return module.on_after_batch_transfer({name: value.to(module.device) for name, value in batch.items()}, 0)


def relative_to_equal(
    counts: Sequence[int], fields: Mapping[str, Any], batch_size: int, rounds: int, device: torch.device
) -> None:
    """Print what our rules cost, with so many tasks."""
    cells: dict[str, list[str]] = {}
    for count in counts:
        tasks = tasks_of(count)
        experiment = validate({**fields, "task": [task.name for task in tasks[:3]]})
        module = build(experiment, tasks, device)
        batch = batch_of(batch_size, experiment.data.size, module)
        make = partial(Variant, module, batch)
        variants = {rule: make(balancer_of(rule, tasks)) for rule in ("equal", *FROM_LOSSES, *FROM_GRADIENTS)}
        variants["equal, once more"] = make(balancer_of("equal", tasks))
        variants[RECORDED] = make(balancer_of("equal", tasks), recorded=True)
        variants["pcgrad on parameters"] = make(balancer_of("pcgrad", tasks, "parameters"))
        seconds = in_turn(variants, rounds, device)
        peaks = {name: peak(variant, device) for name, variant in variants.items()}
        for name in variants:
            times = ratio(seconds, name, "equal")
            row = [f"{times:.2f}", f"{peaks[name] / peaks['equal']:.2f}"]
            if name == "equal":
                row = [f"{1e3 * statistics.median(seconds[name]):.0f} ms", f"{peaks[name] / 2**20:.0f} MiB"]
            cells.setdefault(name, []).extend(row)
            if name == RECORDED:
                mean = f"{1 + (times - 1) / LOG_EVERY:.2f}"
                cells.setdefault(f"{name} every {LOG_EVERY} steps, mean", []).extend([mean, row[1]])
    print("| rule | " + " | ".join(f"time, T = {count} | memory" for count in counts) + " |")
    print("|---|" + "---:|---:|" * len(counts))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def relative_to_peers(fields: Mapping[str, Any], batch_size: int, rounds: int, device: torch.device) -> None:
    """Print what others need for the same rules with three tasks."""
    tasks = tasks_of(3)
    experiment = validate({**fields, "task": [task.name for task in tasks], "channels_last": False})
    module = build(experiment, tasks, device)
    make = partial(Variant, module, batch_of(batch_size, experiment.data.size, module))
    theirs = list(peers(module))
    variants = {"equal": make(balancer_of("equal", tasks))}
    for rule in dict.fromkeys(rule for rule, _, _ in theirs):
        variants |= {f"{rule} on {on}": make(balancer_of(rule, tasks, on)) for on in ("features", "parameters")}
    variants |= {label: make(balancer_of("equal", tasks), backward) for _, label, backward in theirs}
    seconds = in_turn(variants, rounds, device)
    peaks = {name: peak(variant, device) for name, variant in variants.items()}
    print("\n| T = 3 | time / ours on features | time / ours on parameters | time / equal | memory / equal |"
          "\n|---|---:|---:|---:|---:|")  # fmt: skip
    for name in variants:
        same = next((rule for rule, label, _ in theirs if label == name), None)
        ours = [f"{ratio(seconds, name, f'{same} on {on}'):.2f}" if same else "" for on in ("features", "parameters")]
        relative = [f"{ratio(seconds, name, 'equal'):.2f}", f"{peaks[name] / peaks['equal']:.2f}"]
        print("| " + " | ".join([name, *ours, *relative]) + " |")


def main() -> None:
    """Measure and print."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50" if on_gpu else "resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(288, 384) if on_gpu else (96, 128))
    parser.add_argument("--batch-size", type=int, default=8 if on_gpu else 4)
    parser.add_argument("--rounds", type=int, default=30 if on_gpu else 7)
    parser.add_argument("--peer-rounds", type=int, default=15 if on_gpu else 4)
    parser.add_argument("--tasks", type=int, nargs="+", choices=range(2, 7), default=(2, 3, 6))
    parser.add_argument("--decoder-channels", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)  # LibMTL's order of tasks
    device = torch.device("cuda" if on_gpu else "cpu")
    size = tuple(options.size)
    fields = {
        "backbone": options.backbone,
        "init": "none",
        "decoder": "unet",
        "decoder_channels": options.decoder_channels,
        "data": {"size": size},
    }
    packages = [f"{name} {version(name)}" for name in ("torch", "timm", "torchjd", "LibMTL") if find_spec(name)]
    device_name = torch.cuda.get_device_name() if on_gpu else platform.machine()
    print(
        f"{options.backbone}, {options.batch_size}x3x{size[0]}x{size[1]}, unet of {options.decoder_channels} channels; "
        f"{device_name}, {torch.get_num_threads()} threads; {', '.join(packages)}\n\n    python {' '.join(sys.argv)}\n"
    )
    start = time.perf_counter()
    relative_to_equal(options.tasks, fields, options.batch_size, options.rounds, device)
    relative_to_peers(fields, options.batch_size, options.peer_rounds, device)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
