"""Measures, along a validation, whether what members say of their uncertainty is to be believed."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mtl.data.sample import Batch
from mtl.ensembling.combine import Combined
from mtl.ensembling.ensemble import Together
from mtl.errors import UserError
from mtl.tasks.depth import Depth
from mtl.uncertainty.calibration import CalibrationError, PixelSample, Reliability, fit_temperature
from mtl.uncertainty.coverage import Coverage, IntervalCoverage
from mtl.uncertainty.pictures import draw_coverage, draw_reliability, draw_sparsification
from mtl.uncertainty.sparsification import Sparsification, SparsificationError

_JUDGED = 2**19
"""The most pixels by which calibration is judged: of 40 classes they take 80 MB."""


class Judge(Callback):
    """Answers in a module's place (`MultiTaskModule.views`), and holds each answer against the labels.

    Classes are judged by their calibration, before and after temperature scaling: the temperature is fitted to every
    other sample, the first among them, and both are measured on the samples between. Depth is judged by sparsification
    and by the coverage of intervals, where there are several members to differ.

    Args:
        together: What answers.

    Raises:
        UserError: There is nothing to judge.
    """

    def __init__(self, together: Together) -> None:
        self.together = together
        self._answers: dict[str, Combined] = {}
        self._classes = {
            task.name: (PixelSample(), PixelSample(_JUDGED)) for task in together.tasks if task.class_names
        }
        self._depths = {
            task.name: (SparsificationError(task.options), IntervalCoverage(task.options))
            for task in together.tasks
            if isinstance(task, Depth) and together.count > 1
        }
        self._reliability: dict[str, Reliability] = {}
        self._sparsification: dict[str, Sparsification] = {}
        self._coverage: dict[str, Coverage] = {}
        if not self._classes and not self._depths:
            names = ", ".join(task.name for task in together.tasks)
            raise UserError(
                f"--uncertainty: one answer to {names} says nothing of how sure it is; name more runs, or add "
                "--mc-dropout or --tta"
                if together.count == 1 and any(isinstance(task, Depth) for task in together.tasks)
                else f"--uncertainty is judged for depth and for tasks that predict classes, not for {names}"
            )

    def soft(self, image: Tensor) -> dict[str, Tensor]:
        """Return what each task's prediction is made of, and remember how sure it is."""
        self._answers = self.together.combine(image)
        return {name: answer.soft for name, answer in self._answers.items()}

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hold the last answer against its labels."""
        for task in self.together.tasks:
            answer, target = self._answers[task.name], batch[task.target]
            if task.name in self._classes:
                logits = answer.soft.clamp(min=torch.finfo(answer.soft.dtype).tiny).log()
                between = batch["draw"][:, 1] % 2 == 1
                for sample, chosen in zip(self._classes[task.name], (~between, between), strict=True):
                    sample.add(logits[chosen], target[chosen])
            elif task.name in self._depths:
                for metric in self._depths[task.name]:
                    metric.to(target.device).update(answer.prediction, answer.uncertainty, target)

    def measure(self) -> dict[str, float]:
        """Return what came of the validation, once it is over, by full name.

        Raises:
            UserError: There are labels of classes, but none among the samples to which the temperature is fitted.
        """
        results: dict[str, float] = {}
        for name, (fitted, judged) in self._classes.items():
            if len(fitted.labels) or len(judged.labels):
                results |= self._calibrate(name, fitted, judged)
        for name, (sparsification, coverage) in self._depths.items():
            values = sparsification.compute() | coverage.compute()
            results |= {f"{name}/{key}": float(value) for key, value in values.items()}
            self._sparsification[name] = sparsification.curves()["abs_rel"]
            self._coverage[name] = coverage.curve()
        return results

    def _calibrate(self, name: str, fitted: PixelSample, judged: PixelSample) -> dict[str, float]:
        temperature = fit_temperature(fitted.logits, fitted.labels)
        results = {f"{name}/temperature": temperature}
        for suffix, label, at in (("", name, 1.0), ("_scaled", f"{name} at T = {temperature:.3g}", temperature)):
            error = CalibrationError()
            error.update((judged.logits / at).softmax(dim=1), judged.labels)
            results |= {f"{name}/{key}{suffix}": float(value) for key, value in error.compute().items()}
            self._reliability[label] = error.reliability()
        return results

    @property
    def notes(self) -> list[str]:
        """What must be known to read the results, for a person."""
        said = []
        if self._reliability:
            said.append(
                "calibration: the temperature is fitted to every other held-out sample, the first among them; ece, mce "
                "and nll, with it (_scaled) and without, are of the samples between"
            )
        if self._classes and not self._depths and any(isinstance(task, Depth) for task in self.together.tasks):
            said.append("depth: a single answer says nothing of how sure it is, so only classes are judged")
        return said

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures and return where they are.

        Raises:
            UserError: The folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --output-dir") from None
        drawn = []
        if self._reliability:
            draw_reliability(path := folder / "reliability.png", self._reliability)
            drawn.append(path)
        if self._sparsification:
            draw_sparsification(path := folder / "sparsification.png", self._sparsification, "absolute relative error")
            drawn.append(path)
            draw_coverage(path := folder / "coverage.png", self._coverage)
            drawn.append(path)
        return drawn
