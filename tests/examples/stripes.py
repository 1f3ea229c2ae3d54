"""A data set of one's own, and a weighting rule.

python train.py --plugin tests/examples/stripes.py --data.name stripes --weighting inverse --init none
"""

import numpy as np

import mtl


@mtl.register_data_set("stripes")
class Stripes:
    """Pictures of two halves, bright and near, dark and far."""

    def __init__(self, root, *, split, size):
        self.info = mtl.DataInfo("stripes", targets=("segmentation", "depth"), classes=("near", "far"))
        self.first, self.size = {"train": 0, "validation": 1000}[split], size

    def __len__(self):
        return 16

    def name(self, index):
        return f"{self.first + index}"

    def labelled(self, target):
        return np.full(len(self), target in self.info.targets)

    def read(self, indices, targets):
        return [self._one(self.first + index, set(targets)) for index in indices]

    def _one(self, number, targets):
        generator = np.random.default_rng(number)
        far = np.broadcast_to(np.arange(self.size[1]) > generator.integers(4, self.size[1] - 4), self.size)
        noise = generator.integers(0, 60, (*self.size, 3))
        sample = {"image": (np.where(far, 40, 180)[..., None] + noise).astype(np.uint8)}
        labels = {"segmentation": far.astype(np.uint8), "depth": np.where(far, 4, 2).astype(np.float32)}
        return sample | {target: labels[target] for target in targets & labels.keys()}


@mtl.register_weighting("inverse")
class Inverse(mtl.Weighting):
    """Each loss divided by its own value: the sum of log losses, as far as the gradient is concerned."""

    def forward(self, step):
        return 1 / step.losses.clamp(min=1e-8)
