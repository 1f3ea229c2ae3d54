"""``python -m mtl predict``: pictures of any size and number."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.evaluate import Run, Views, check_run, views_of
from mtl.cli.surroundings import surroundings
from mtl.cli.words import take_plugins
from mtl.config import changed, load
from mtl.errors import UserError, nearest
from mtl.flags import parse

SCALES = ("fit", "native")


@dataclasses.dataclass(kw_only=True)
class _Predict(Run):
    images: Annotated[
        list[str], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER|GLOB ...", help="What to predict.")
    ] = dataclasses.field(default_factory=list)
    output_dir: Annotated[Path | None, tyro.conf.arg(help="Where to write (none: RUN/predict).")] = None
    scale: Annotated[
        str,
        tyro.conf.arg(help="fit: bring pictures to the scale of training first, as depth needs; native: leave them."),
    ] = "fit"
    overlap: Annotated[float, tyro.conf.arg(help="Share by which windows over large pictures overlap.")] = 0.25
    batch_size: Annotated[int, tyro.conf.arg(help="Windows at once.")] = 8
    tta: Views = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or mps.")] = "auto"


def run(words: list[str], program: str, description: str) -> None:
    """Predict images with a run's best checkpoint."""
    take_plugins(words)
    flags = parse(_Predict, None, words, program, description)
    check_run(flags.run)
    if not flags.images:
        raise UserError(f"name pictures, a folder of them or a glob after {flags.run}")
    if flags.scale not in SCALES:
        raise UserError(f"--scale {flags.scale!r}{nearest(flags.scale, SCALES)} is one of {', '.join(SCALES)}")
    if not 0 <= flags.overlap < 1:
        raise UserError(f"--overlap {flags.overlap} is the share of a window, from 0 to less than 1")
    if flags.batch_size < 1:
        raise UserError(f"--batch-size {flags.batch_size} must be at least 1")
    changed(load(flags.run / "config.yaml"), {"device": flags.device})  # refuses a wrong value at once
    views = views_of(flags.tta)
    surroundings()
    from mtl.prediction.files import find_images, predict_files
    from mtl.prediction.predictor import Predictor
    from mtl.runs import load_run

    images = find_images(flags.images)
    module = load_run(flags.run, {"device": flags.device})
    predictor = Predictor(module, scale=flags.scale, overlap=flags.overlap, batch_size=flags.batch_size, tta=views)
    result = predict_files(predictor, images, flags.output_dir or flags.run / "predict", print)
    if result.failures:
        raise UserError(result.complaint)
