"""How much of the training loop's speed is left once it has to load and augment: against one fixed batch.

Training on real pictures with heavy augmentation, and the same module fed one batch that is on the device already, in
turn in one process:

    MTL_NYUV2=.../nyuv2/train python tests/benchmarks/loop.py [--backbone resnet18] [--size 240 320] [--steps 8]

With --profile FILE.png it also draws where the time goes, from torch's profiler.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile, record_function

from mtl.build import Surroundings, build_module, keep_samples, load_samples
from mtl.config import validate
from mtl.data.loading import Batches, Loader
from mtl.data.sample import Batch

DESCRIPTION = Path(__file__).parents[2] / "data" / "nyuv2-folder.yaml"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root = os.environ["MTL_NYUV2"]
    data = {"name": "folder", "root": root, "description": str(DESCRIPTION), "size": options.size}
    values = {"backbone": options.backbone, "init": "none", "augment": "heavy", "data": data, "decoder": "unet"}
    experiment = validate({**values, "batch_size": options.batch_size})
    samples = load_samples(experiment, "train", Surroundings(say=lambda line: None))
    keep_samples(experiment, [samples], Surroundings())
    module = build_module(experiment, samples.source.info, 1000).to(device).train()
    if options.compile:
        module.augmentation.compile_photometry()
    optimizer = module.configure_optimizers()["optimizer"]
    loader = Loader(samples, Batches(len(samples), options.batch_size, shuffle=True), 0, device.type == "cuda")

    def forever() -> Iterator[Batch]:
        for epoch in itertools.count():
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    batches = forever()
    still = {k: v.to(device) for k, v in next(batches).items()}
    augmentation, module.augmentation = module.augmentation, None
    still = module.on_after_batch_transfer(still, 0)

    def train_on(batch: Batch) -> None:
        with record_function("model"):
            module.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fixed() -> None:
        train_on(still)

    def whole() -> None:
        with record_function("load"):
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
        with record_function("augment"):
            module.augmentation = augmentation
            batch = module.on_after_batch_transfer(batch, 0)
        train_on(batch)

    def seconds_of(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / options.steps

    for step in (fixed, whole):
        step()
    times = [(seconds_of(fixed), seconds_of(whole)) for _ in range(options.rounds)]
    alone, loop = (statistics.median(values) for values in zip(*times, strict=True))
    print(f"{options.backbone} + unet, {options.batch_size}x3x{options.size[0]}x{options.size[1]}, {device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"one fixed batch: {1e3 * alone:.0f} ms a step; loaded and augmented: {1e3 * loop:.0f} ms; "
          f"{alone / loop:.1%} of the throughput")  # fmt: skip
    if options.profile:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as profiler:
            for _ in range(3):
                whole()
        total = {
            e.key: e.cpu_time_total / 3e3 for e in profiler.key_averages() if e.key in ("load", "augment", "model")
        }
        figure = Figure(figsize=(6, 1.8), layout="constrained")
        axes = figure.subplots()
        left = 0.0
        for name in ("load", "augment", "model"):
            axes.barh(0, total[name], left=left, label=f"{name} {total[name]:.0f} ms")
            left += total[name]
        axes.set(yticks=[], xlabel="milliseconds of a step")
        axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.35))
        figure.savefig(options.profile, dpi=120)


if __name__ == "__main__":
    main()
