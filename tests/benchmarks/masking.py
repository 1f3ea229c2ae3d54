"""What masked convolution adds to a backbone's forward and backward pass, both in turn in one process.

    python tests/benchmarks/masking.py [--backbones convnext_tiny resnet50] [--size 224 224] [--batch-size 2]
        [--ratio 0.6] [--repeats 9] [--threads 1] [--channels-last] [--bf16]

The claim held here: at most 15 % more than the plain pass of a ConvNeXt.
"""

import argparse
from collections.abc import Callable

import torch
from steps import interleaved

from mtl.augmentation.draws import Draws
from mtl.models.backbone import Backbone, Pyramid
from mtl.pretraining.masked_convolution import masked_features
from mtl.pretraining.masks import draw_masks, grid_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbones", nargs="+", default=["convnext_tiny", "convnextv2_tiny", "resnet50", "regnety_032"]
    )
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, count = (options.size[0], options.size[1]), options.batch_size
    print(f"{count}x3x{size[0]}x{size[1]}, ratio {options.ratio}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    image = torch.rand(count, 3, *size, device=device).contiguous(memory_format=layout)
    draws = Draws(0, 0, torch.arange(count, device=device))
    for name in options.backbones:
        backbone = Backbone(name, size).to(device, memory_format=layout).train()
        mask = draw_masks(draws, grid_of(size, backbone.stride), options.ratio)

        def step(features: Callable[[], Pyramid], backbone: Backbone = backbone) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                maps = features().maps
            torch.stack([each.float().square().sum() for each in maps[1:]]).sum().backward()
            backbone.zero_grad()

        times = interleaved(
            options.repeats,
            plain=lambda backbone=backbone, step=step: step(lambda: backbone(image)),
            masked=lambda backbone=backbone, step=step, mask=mask: step(lambda: masked_features(backbone, image, mask)),
        )
        print(f"{name:20} plain {1e3 * times['plain']:7.1f} ms, masked {1e3 * times['masked']:7.1f} ms, "
              f"{times['masked'] / times['plain']:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
