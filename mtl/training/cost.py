"""What a training costs: time, memory and parameters, in a file that is also how far it has come."""

import json
import statistics
import sys
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from mtl.files import write_whole
from mtl.training.module import MultiTaskModule

COST_FILE = "cost.json"
"""The file's name in a run's folder."""

_KEPT = 1000
"""Of so many steps, the last ones, the median is taken."""

_SECONDS = 2.0
"""Between two writings of the file during training."""


class Cost(Callback):
    """Keep `cost.json` up to date.

    ====================== ==================================================================================
    `step`, `steps`        optimizer steps done, and those of the whole training
    `seconds_per_step`     median time from the end of an optimizer step to that of the next, loading included
    `peak_memory_bytes`    the most that tensors took of the GPU, or where there is none, the whole process of
                           the main memory
    `memory_of`            'GPU' or 'process', accordingly
    `device`               the device's name
    `parameters`           of backbone and heads
    `learning`             those of them that were trained
    ====================== ==================================================================================

    On a GPU the times are the GPU's own, which steps do not wait for.

    Args:
        path: The file.
        steps: Optimizer steps of the whole training.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self._ends: deque[Any] = deque(maxlen=_KEPT + 1)
        self._step = 0
        self._written = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to count where the fit does."""
        self._ends.clear()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Note the time after each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._ends.append(_now(pl_module.device))
        if time.monotonic() - self._written > _SECONDS:
            self._write(pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the file a last time."""
        self._write(pl_module)

    @rank_zero_only
    def _write(self, module: lightning.LightningModule) -> None:
        assert isinstance(module, MultiTaskModule)
        device = module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times = [_seconds(first, second) for first, second in pairwise(self._ends)]
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.model.parameters()]
        on_gpu = device.type == "cuda"
        content = {
            "step": self._step,
            "steps": self.steps,
            "seconds_per_step": statistics.median(times) if times else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else _peak_of_process(),
            "memory_of": "GPU" if on_gpu else "process",
            "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
            "parameters": sum(size for size, _ in sizes),
            "learning": sum(size for size, learns in sizes if learns),
        }
        write_whole(self.path, (json.dumps(content, indent=2) + "\n").encode())
        self._written = time.monotonic()


def _now(device: torch.device) -> Any:
    """Return a mark of the present time: of the GPU's queue, where there is one, else of the clock in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(first: Any, second: Any) -> float:
    """Return the time between two marks, which the device has passed."""
    seconds: float = second - first if isinstance(first, float) else first.elapsed_time(second) / 1000
    return seconds


def _peak_of_process() -> int | None:
    """Return the most main memory that this process has taken so far in bytes, where the system says it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
