"""``python -m mtl export``: programs that run without this package."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.evaluate import Run, check_run
from mtl.cli.surroundings import surroundings
from mtl.cli.words import take_plugins
from mtl.errors import UserError, nearest
from mtl.flags import parse

FORMATS = ("onnx", "torch")


@dataclasses.dataclass(kw_only=True)
class _Export(Run):
    format: Annotated[list[str], tyro.conf.arg(help="onnx (model.onnx), torch (model.pt2), or both.")] = (
        dataclasses.field(default_factory=lambda: ["onnx"])
    )
    output_dir: Annotated[Path | None, tyro.conf.arg(help="Where to write (none: RUN/export).")] = None
    size: Annotated[
        tuple[int, int] | None, tyro.conf.arg(help="Height and width of the program's input (none: those of training).")
    ] = None
    raw: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Return the heads' outputs, not predictions.")
    ] = False


def run(words: list[str], program: str, description: str) -> None:
    """Export a run's best checkpoint, and say how far its answers are from the model's."""
    take_plugins(words)
    flags = parse(_Export, None, words, program, description)
    check_run(flags.run)
    for name in flags.format:
        if name not in FORMATS:
            raise UserError(f"--format {name!r}{nearest(name, FORMATS)} is one of {', '.join(FORMATS)}")
    if not flags.format:
        raise UserError(f"--format takes one or both of {', '.join(FORMATS)}")
    if flags.size is not None and min(flags.size) < 16:
        raise UserError(f"--size {flags.size[0]} {flags.size[1]}: height and width must be at least 16 pixels")
    surroundings()
    from mtl.exporting import export
    from mtl.runs import load_run

    module = load_run(flags.run, {"device": "cpu"})
    output = flags.output_dir or flags.run / "export"
    for exported in export(module, output, list(dict.fromkeys(flags.format)), size=flags.size, raw=flags.raw):
        print(exported)
