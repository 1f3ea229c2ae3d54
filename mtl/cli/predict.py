"""``python -m mtl predict``: pictures of any size and number."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.evaluate import Run, Together, check_run, combining_of
from mtl.cli.surroundings import surroundings
from mtl.cli.words import take_plugins
from mtl.config import changed, load
from mtl.errors import UserError, nearest
from mtl.flags import parse

SCALES = ("fit", "native")


@dataclasses.dataclass(kw_only=True)
class _Predict(Run, Together):
    images: Annotated[
        list[str], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER|GLOB ...", help="What to predict.")
    ] = dataclasses.field(default_factory=list)
    with_: Annotated[
        list[Path],
        tyro.conf.arg(name="with", metavar="RUN ...", help="Further runs, whose answers are combined with this one's."),
    ] = dataclasses.field(default_factory=list)
    output_dir: Annotated[Path | None, tyro.conf.arg(help="Where to write (none: RUN/predict).")] = None
    scale: Annotated[
        str,
        tyro.conf.arg(help="fit: bring pictures to the scale of training first, as depth needs; native: leave them."),
    ] = "fit"
    overlap: Annotated[float, tyro.conf.arg(help="Share by which windows over large pictures overlap.")] = 0.25
    batch_size: Annotated[int, tyro.conf.arg(help="Windows at once.")] = 8
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or mps.")] = "auto"


def run(words: list[str], program: str, description: str) -> None:
    """Predict images with a run's best checkpoint."""
    take_plugins(words)
    flags = parse(_Predict, None, words, program, description)
    for run in (flags.run, *flags.with_):
        check_run(run)
    if not flags.images:
        raise UserError(f"name pictures, a folder of them or a glob after {flags.run}")
    if flags.scale not in SCALES:
        raise UserError(f"--scale {flags.scale!r}{nearest(flags.scale, SCALES)} is one of {', '.join(SCALES)}")
    if not 0 <= flags.overlap < 1:
        raise UserError(f"--overlap {flags.overlap} is the share of a window, from 0 to less than 1")
    if flags.batch_size < 1:
        raise UserError(f"--batch-size {flags.batch_size} must be at least 1")
    changed(load(flags.run / "config.yaml"), {"device": flags.device})  # refuses a wrong value at once
    surroundings()
    from mtl.ensembling.runs import checkpoints, together
    from mtl.prediction.files import find_images, predict_files
    from mtl.prediction.predictor import Predictor
    from mtl.runs import check_pictures, load_predicting

    combining = combining_of(flags, flags.with_)
    paths = checkpoints(flags.run, combining)
    images = find_images(flags.images)
    module = load_predicting(paths[0], {"device": flags.device})
    check_pictures(module, flags.run)
    answers = together(module, paths, combining)
    predictor = Predictor(
        module, scale=flags.scale, overlap=flags.overlap, batch_size=flags.batch_size, answers=answers
    )
    result = predict_files(predictor, images, flags.output_dir or flags.run / "predict", print)
    if result.failures:
        raise UserError(result.complaint)
