"""Masked pretraining by token drop against transformers' ViTMAE, and against an encoder that sees all tokens.

    python tests/benchmarks/pretraining.py [--batch 8] [--rounds 5] [--compile]

A ViT-B/16 in bfloat16 on a GPU where there is one, else a ViT-S/16 on the CPU; 224 pixels, ratio 0.75, and MAE's
decoder, 512 wide and 8 deep. A step is the mask, forward, loss, backward and AdamW. The two take turns in one process;
quoted are medians, and the median of the turns' ratios. A single CPU thread (OMP_NUM_THREADS=1) is timed by the
processor's own clock, which other programs disturb less. Memory is the most that a step has allocated on a GPU, and on
the CPU what the forward pass keeps for the backward pass. Needs transformers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mtl.models.backbone import Backbone
from mtl.pretraining.decoders import TokenDecoder
from mtl.pretraining.masks import hidden_count, hide
from mtl.pretraining.targets import hidden_loss, patch_target
from mtl.pretraining.token_drop import encode_visible, visible_indices

SIDE, PATCH, RATIO = 224, 16, 0.75
GRID = (SIDE // PATCH, SIDE // PATCH)
HIDDEN = hidden_count(GRID, RATIO)
PATCHES = GRID[0] * GRID[1]


class Ours(nn.Module):
    """Encoder, decoder and loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = Backbone(name, (SIDE, SIDE))
        self.decoder = TokenDecoder(self.backbone, PATCH, width=512, depth=8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mask = hide(torch.rand(len(image), *GRID, device=image.device), HIDDEN)
        visible = encode_visible(self.backbone, image, visible_indices(mask, PATCHES - HIDDEN))
        return hidden_loss(self.decoder(visible), patch_target(image, PATCH), mask)


class Theirs(nn.Module):
    """The peer, with pictures normalised as ours are."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.channels[-1]
        config = ViTMAEConfig(hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width)
        config.norm_pix_loss, config.layer_norm_eps = True, 1e-6
        self.model = ViTMAEForPreTraining(config)
        self.register_buffer("mean", backbone.mean.clone())
        self.register_buffer("std", backbone.std.clone())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model((image - self.mean) / self.std).loss


def measure(pair: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> tuple[list[float], float]:
    """Return the two runs' median seconds, after two turns that do not count, and the second's share of the first."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    turns = []
    for _ in range(rounds + 2):
        seconds = []
        for run in pair.values():
            wait(device)
            start = clock()
            run()
            wait(device)
            seconds.append(clock() - start)
        turns.append(seconds)
    medians = [statistics.median(each) for each in zip(*turns[2:], strict=True)]
    return medians, statistics.median(second / first for first, second in turns[2:])


def memory(run: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    """Return GiB: the peak on a GPU, with all that is there; on the CPU, activations kept for the backward pass."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values()) / 2**30


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    name, batch = ("vit_base_patch16_224", 256) if on_gpu else ("vit_small_patch16_224", 8)
    batch = options.batch or batch
    image = torch.rand(batch, 3, SIDE, SIDE, device=device)

    def step(model: nn.Module) -> Callable[[], None]:
        forward = torch.compile(model) if options.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), fused=True)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = forward(image)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    ours = Ours(name).to(device).train()
    theirs = Theirs(ours.backbone).to(device).train()
    how = "compiled" if options.compile else "eager"
    print(
        f"{name}, batch {batch}, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {how}\n"
    )
    print("| | milliseconds | images a second | GiB |\n|---|---:|---:|---:|")
    pair = {"ours": step(ours), "transformers": step(theirs)}
    medians, ratio = measure(pair, options.rounds, device)
    for (who, run), model, seconds in zip(pair.items(), (ours, theirs), medians, strict=True):
        kept = memory(run, model, device)
        print(f"| step, {who} | {1e3 * seconds:.0f} | {batch / seconds:.1f} | {kept:.2f} |")

    encode = torch.compile(encode_visible) if options.compile else encode_visible

    def encoder(count: int) -> Callable[[], None]:
        def run() -> None:
            indices = visible_indices(hide(torch.rand(batch, *GRID, device=device), PATCHES - count), count)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = encode(ours.backbone, image, indices).tokens.float().square().mean()
            loss.backward()

        return run

    shares = {"a quarter of the tokens": encoder(PATCHES - HIDDEN), "all tokens": encoder(PATCHES)}
    medians, speedup = measure(shares, options.rounds, device)
    for what, seconds in zip(shares, medians, strict=True):
        print(f"| encoder, {what} | {1e3 * seconds:.0f} | {batch / seconds:.1f} | |")
    print(f"\nimages a second, ours / transformers: {ratio:.2f}; encoder, a quarter / all: {speedup:.2f}")


if __name__ == "__main__":
    main()
