"""Random changes of single samples in the loader, with albumentations."""

from typing import Literal

import albumentations as A
import numpy as np

from mtl.data.sample import Sample


class LoaderAugmentation:
    """Jitter colours, and for 'light' flip left and right as well.

    Every draw comes from the generator passed in, so that a sample's changes do not depend on the worker that
    makes them.

    Args:
        policy: 'colour' leaves geometry alone; 'light' adds the flip.
    """

    def __init__(self, policy: Literal["colour", "light"]) -> None:
        self.flip = policy == "light"
        self.colour = A.Compose(
            [
                A.ColorJitter(
                    brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.4, 1.6), hue=(-0.5, 0.5), p=0.9
                ),
                A.ToGray(p=0.1),
                A.RandomGamma(gamma_limit=(70, 140), p=0.3),
                A.GaussianBlur(blur_limit=(3, 5), p=0.15),
                A.GaussNoise(std_range=(0.01, 0.05), p=0.3),
            ]
        )

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Return a changed copy of a sample."""
        self.colour.set_random_seed(int(generator.integers(2**31)))
        sample = {**sample, "image": self.colour(image=sample["image"])["image"]}
        if self.flip and generator.random() < 0.5:
            sample = mirror(sample)
        return sample


def mirror(sample: Sample) -> Sample:
    """Flip a sample left and right.

    Depth stays as it is, normals change the sign of x, and a principal point at cx moves to W - 1 - cx.
    """
    flipped = {name: values[:, ::-1] for name, values in sample.items() if name != "intrinsics"}
    if "normals" in sample:
        flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
    flipped = {name: np.ascontiguousarray(values) for name, values in flipped.items()}
    if "intrinsics" in sample:
        intrinsics = sample["intrinsics"].copy()
        # All zero stands for an unknown camera, which stays unknown.
        if intrinsics[2, 2] != 0:
            intrinsics[0, 2] = sample["image"].shape[1] - 1 - intrinsics[0, 2]
        flipped["intrinsics"] = intrinsics
    return flipped
