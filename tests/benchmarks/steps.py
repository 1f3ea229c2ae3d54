"""What a training step costs, piece by piece, and what freezing saves.

Each pair is measured in turn in one process on the same work, and quoted as the ratio of medians:

    python tests/benchmarks/steps.py [--backbone resnet18] [--size 128 128] [--batch-size 16] [--repeats 15]

The claim held here: a frozen step costs no more than a forward pass of the backbone in evaluation mode plus the
head's own training. The reference is written out with plain torch: ``torch.no_grad`` around timm's own
``features_only`` model, and the head trained on its detached maps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from mtl.build import Surroundings, build_module, load_samples
from mtl.config import validate
from mtl.data.loading import Batches, Loader
from mtl.data.sample import DataInfo
from mtl.data.scenes import render
from mtl.models.backbone import Pyramid


def interleaved(repeats: int, **pieces: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each piece, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for repeat in range(repeats + 1):
        for name, piece in pieces.items():
            start = time.perf_counter()
            piece()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv4_conv_small")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, count = tuple(options.size), options.batch_size
    print(f"{options.backbone}, {count}x3x{size[0]}x{size[1]}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip

    fields = {"task": "depth", "backbone": options.backbone, "init": "none", "data": {"size": size}}
    info = DataInfo("benchmark", ("depth",))
    batch = {"image": torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, device=device)}
    batch["depth"] = torch.rand(count, 1, *size, device=device) + 1

    def step_of(freeze: bool) -> Callable[[], None]:
        module = build_module(validate({**fields, "freeze": freeze}), info, 100).to(device).train()
        optimizer = module.configure_optimizers()["optimizer"]

        def step() -> None:
            module.training_step(module.on_after_batch_transfer(batch, 0), 0).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    module = build_module(validate({**fields, "freeze": True}), info, 100).to(device).train()
    plain = timm.create_model(options.backbone, features_only=True, pretrained=False)
    plain = plain.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    head: nn.Module = module.model.heads["depth"]
    optimizer = torch.optim.AdamW(head.parameters())

    def reference() -> None:
        image = (batch["image"].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            image = (image - module.model.backbone.mean) / module.model.backbone.std
            maps = plain(image)
            if len(maps) == len(module.model.backbone.channels) - 2:
                maps = [image.new_empty(count, 0, size[0] // 2, size[1] // 2), *maps]
        module.tasks["depth"].loss(head(Pyramid([image, *maps], []), size), batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved(options.repeats, frozen=step_of(True), reference=reference, full=step_of(False))
    print("| step | milliseconds | images a second | ratio |\n|---|---:|---:|---:|")
    for name, label in [
        ("reference", "plain torch: evaluation forward + head's training"),
        ("frozen", "--freeze"),
        ("full", "everything trained"),
    ]:
        ratio = seconds[name] / seconds["reference"]
        print(f"| {label} | {1e3 * seconds[name]:.0f} | {count / seconds[name]:.0f} | {ratio:.2f} |")

    start = time.perf_counter()
    render(range(64), domain="loft", seed=1, size=size)
    print(f"\nrendering: {64 / (time.perf_counter() - start):.0f} images a second")
    with tempfile.TemporaryDirectory() as folder:
        experiment = validate({**fields, "data": {"size": size, "train_samples": 256}})
        samples = load_samples(experiment, "train", Surroundings(cache_dir=Path(folder)))
        for cache in ("memory", "disk"):
            samples.keep(cache, folder=Path(folder))
            loader = Loader(samples, Batches(len(samples), count, shuffle=True), 0)
            list(loader)
            start = time.perf_counter()
            list(loader)
            rate = 256 // count * count / (time.perf_counter() - start)
            print(f"loading from {cache}: {rate:.0f} images a second")


if __name__ == "__main__":
    main()
