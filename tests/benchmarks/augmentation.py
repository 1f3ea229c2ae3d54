"""What heavy augmentation of images, classes and depth costs, beside the peers and beside a training step.

All in turn in one process, on the same batch, with as nearly the same operations as each peer has:

    python tests/benchmarks/augmentation.py [--size 256 256] [--batch-size 16] [--repeats 9] [--compile]

Ours does more than the peers do: vignette, lens distortion, vertical stretch, invalid depth kept apart, intrinsics.
Peers need `pip install kornia torchvision`; albumentations comes with the package.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import kornia.augmentation as K
import numpy as np
import timm
import torch
from steps import interleaved
from torchvision import tv_tensors
from torchvision.transforms import v2

from mtl.augmentation.policy import Augmentation
from mtl.config import resolve_augmentation, validate


def kornia_heavy(size: tuple[int, int]) -> K.AugmentationSequential:
    """Return kornia's pipeline for an image and two masks."""
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.05),
        K.RandomPerspective(0.15, p=0.5),
        K.RandomAffine(degrees=10, shear=5, p=1.0),
        K.RandomResizedCrop(size, scale=(0.45, 1.0), ratio=(0.8, 1.25), p=1.0),
        K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=1.0),
        K.RandomGrayscale(p=0.1),
        K.RandomGamma((0.7, 1.3), p=1.0),
        K.RandomGaussianBlur((9, 9), (0.1, 1.5), p=0.3),
        K.RandomGaussianNoise(std=0.03, p=0.5),
        K.RandomErasing(scale=(0.01, 0.06), p=0.2),
        data_keys=["input", "mask", "mask"],
    )


def torchvision_heavy(size: tuple[int, int]) -> v2.Transform:
    """Return torchvision's pipeline for one sample."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.05),
            v2.RandomPerspective(0.15, p=0.5),
            v2.RandomAffine(degrees=10, shear=(-5, 5, -5, 5)),
            v2.RandomResizedCrop(size, scale=(0.45, 1.0), ratio=(0.8, 1.25)),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.RandomGrayscale(0.1),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 1.5))], p=0.3),
            v2.RandomApply([v2.GaussianNoise(sigma=0.03)], p=0.5),
            v2.RandomErasing(0.2, scale=(0.01, 0.06)),
        ]
    )


def albumentations_heavy(size: tuple[int, int]) -> A.Compose:
    """Return albumentations' pipeline for one sample of bytes."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.05),
            A.Perspective(scale=(0, 0.15), p=0.5),
            A.Affine(rotate=(-10, 10), shear=(-5, 5), p=1),
            A.RandomResizedCrop(size, scale=(0.45, 1.0), ratio=(0.8, 1.25), p=1),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1),
            A.ToGray(p=0.1),
            A.RandomGamma((70, 130), p=1),
            A.GaussianBlur((3, 9), p=0.3),
            A.GaussNoise((0.01, 0.05), p=0.5),
            A.CoarseDropout(num_holes_range=(3, 3), p=0.2),
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, count = tuple(options.size), options.batch_size
    print(f"{count}x3x{size[0]}x{size[1]}, image + segmentation + depth, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, 3, *size, generator=generator)
    batch = {
        "image": image.to(device),
        "segmentation": torch.randint(0, 13, (count, *size), generator=generator).to(device, torch.uint8),
        "depth": (torch.rand(count, 1, *size, generator=generator) + 1).to(device),
        "draw": torch.stack([torch.zeros(count), torch.arange(count)], 1).long().to(device),
    }
    ours = Augmentation(resolve_augmentation(validate({"augment": "heavy"})), 0)
    if options.compile:
        ours.compile_photometry()
    kornia = kornia_heavy(size)
    masks = [batch["segmentation"][:, None].float(), batch["depth"]]
    torchvision = torchvision_heavy(size)
    samples = [
        (
            tv_tensors.Image(batch["image"][row]),
            tv_tensors.Mask(batch["segmentation"][row]),
            tv_tensors.Mask(batch["depth"][row]),
        )
        for row in range(count)
    ]
    albumentations = albumentations_heavy(size)
    bytes_of = [
        {
            "image": (image[row] * 255).byte().permute(1, 2, 0).contiguous().numpy(),
            "masks": [batch["segmentation"][row].cpu().numpy(), np.asarray(batch["depth"][row, 0].cpu())],
        }
        for row in range(count)
    ]
    pool = ThreadPoolExecutor(os.cpu_count())
    network = timm.create_model(options.backbone, num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    still = batch["image"].contiguous(memory_format=torch.channels_last)

    def step() -> None:
        network(still).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved(
        options.repeats,
        ours=lambda: ours(batch),
        kornia=lambda: kornia(batch["image"], *masks),
        torchvision=lambda: [torchvision(*sample) for sample in samples],
        albumentations=lambda: list(pool.map(lambda sample: albumentations(**sample), bytes_of)),
        step=step,
    )
    labels = {
        "ours": "ours, photometry compiled" if options.compile else "ours",
        "kornia": "kornia, AugmentationSequential",
        "torchvision": "torchvision v2, sample by sample",
        "albumentations": f"albumentations, bytes, {os.cpu_count()} threads",
        "step": f"a training step of {options.backbone}",
    }
    print("| | ms | relative to ours |\n|---|---:|---:|")
    for name, label in labels.items():
        print(f"| {label} | {1e3 * seconds[name]:.0f} | {seconds[name] / seconds['ours']:.2f} |")


if __name__ == "__main__":
    main()
