"""Running statistics of batch normalisation, where a pass is not to count."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of a module's batch norms, and their numbers of batches, as they are.

    In training mode they normalise by the batch as ever. What is computed anew in the backward pass, by gradient
    checkpointing, is computed as it was at first only in a compiled program or in a twin (`mtl.pretraining.twins`)
    made here; else the backward pass belongs inside as well.

    Args:
        module: What is computed inside; some of it may be compiled.
    """
    # In evaluation mode the statistics are read and never written, whatever this attribute says. A momentum of zero
    # would leave them too, but not the number of batches, and would make a NaN of them if the batch has one.
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
