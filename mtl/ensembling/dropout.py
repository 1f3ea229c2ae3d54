"""Monte Carlo dropout: a model's random passes as members of an ensemble (Gal and Ghahramani 2016)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mtl.ensembling.combine import Combination, Kind
from mtl.ensembling.ensemble import Together
from mtl.errors import UserError
from mtl.training.module import MultiTaskModule


@contextmanager
def sampling(model: nn.Module, *, drop_path: bool = False) -> Iterator[list[nn.Module]]:
    """Let dropout drop, as in training, while everything else is in evaluation mode; afterwards all is as before.

    What training itself would leave in evaluation mode, such as a frozen backbone's dropout, stays there. A recurrent
    network's own dropout between its layers counts as dropout.

    Args:
        model: The model.
        drop_path: Whether drop-path (stochastic depth) drops too.

    Yields:
        The modules that drop.

    Raises:
        UserError: There is none.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        in_training = [module for module in modes if module.training]
        rates = [(module, _dropout(module), _drop_path(module)) for module in in_training]
        active = [module for module, dropped, skipped in rates if dropped or (drop_path and skipped)]
        if not active:
            if any(skipped for _, _, skipped in rates):
                raise UserError(
                    "of this model only drop-path is random, and no dropout: let drop-path drop as well, or train with "
                    "--dropout, such as --dropout 0.1"
                )
            raise UserError(
                "this model has neither dropout nor drop-path that is on in training, so that all of its passes would "
                "be the same: train with --dropout 0.1, or with --drop-path 0.1 and the backbone not frozen"
            )
        for module in modes:
            module.training = False
        for module in active:
            module.training = True
        yield active
    finally:
        for module, mode in modes.items():
            module.training = mode


def _dropout(module: nn.Module) -> bool:
    """Return whether a module by itself drops activations in training."""
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, _DropoutNd) and module.p > 0


def _drop_path(module: nn.Module) -> bool:
    """Return whether a module by itself skips branches in training."""
    return isinstance(module, DropPath) and bool(module.drop_prob)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from generators with this seed, the host's and the device's; afterwards they go on as if nothing was."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class MonteCarlo(Together):
    """A trained model whose passes with dropout on answer as one.

    What is dropped is a function of the seed, the number of the pass, and of the images' shapes: the answer to the same
    batch is the same whatever was asked before, and torch's generators are left as they are.

    Args:
        module: A model trained with dropout.
        passes: How many passes, at least 2.
        kind: How to combine them, see `Together`.
        seed: Not negative.
        drop_path: Whether drop-path drops too.

    Raises:
        UserError: An argument is not allowed, the model has no dropout, or a task's answers cannot be combined so.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        passes: int = 20,
        kind: Kind | Mapping[str, Kind] = "mean",
        seed: int = 0,
        *,
        drop_path: bool = False,
    ) -> None:
        if passes < 2:
            raise UserError(f"--mc-dropout {passes}: passes are compared with one another, so take at least 2")
        if seed < 0:
            raise UserError(f"a seed of {seed} is negative: take 0 or more")
        super().__init__(list(module.each_task()), kind, passes)
        with sampling(module.model, drop_path=drop_path):
            pass  # refuses a model without dropout before anything is predicted
        self.module = module
        self.drop_path = drop_path
        self._seeds = [int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) for number in range(passes)]

    def _ask(self, image: Tensor, answers: Mapping[str, Combination]) -> None:
        with sampling(self.module.model, drop_path=self.drop_path):
            for seed in self._seeds:
                with seeded(seed, image.device):
                    outputs = self.module.model(image)
                for task in self.tasks:
                    answers[task.name].add(outputs[task.name])
