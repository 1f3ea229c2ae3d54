"""``python -m mtl study``: measurements over many models or trainings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.surroundings import surroundings
from mtl.cli.words import check_output
from mtl.config import DECODERS
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.flags import parse


@dataclasses.dataclass
class _Backbones:
    names: Annotated[list[str], tyro.conf.arg(help="timm's models (none given: one of each family).")] = (
        dataclasses.field(default_factory=list)
    )
    decoders: Annotated[list[str], tyro.conf.arg(help="Which decoders to try them with.")] = dataclasses.field(
        default_factory=lambda: list(DECODERS)
    )
    size: Annotated[tuple[int, int], tyro.conf.arg(help="Height and width in pixels.")] = (128, 128)
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE.md", help="Also write the table to this file.")] = None


def _backbones(words: list[str], program: str) -> None:
    """Try which backbones train with which decoders."""
    flags = parse(_Backbones, None, words, program, STUDIES["backbones"][1])
    for decoder in flags.decoders:
        if decoder not in DECODERS:
            raise UserError(f"--decoders {decoder!r}{nearest(decoder, DECODERS)}; there are {', '.join(DECODERS)}")
    if min(flags.size) < 16:
        raise UserError(f"--size {flags.size[0]} {flags.size[1]}: height and width must be at least 16 pixels")
    if not flags.decoders:
        raise UserError(f"--decoders names none; there are {', '.join(DECODERS)}")
    if flags.output is not None:
        check_output("--output", flags.output)
    surroundings()
    from mtl.studies.backbones import FAMILIES, markdown, study

    table = markdown(study(flags.names or list(FAMILIES), flags.decoders, flags.size, print))
    if flags.output is None:
        print(table)
    else:
        write_whole(flags.output, table.encode())
        print(f"written to {flags.output}")


STUDIES: dict[str, tuple[Callable[[list[str], str], None], str]] = {
    "backbones": (_backbones, "Try which timm backbones train with which decoders, and why the others do not."),
}
"""Each study's function and what it does."""


def run(words: list[str], program: str, description: str) -> None:
    """Run a study."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(STUDIES)}}} [-h] [OPTIONS]\n\n{description}\n")
        print("\n".join(f"  {name:10} {what}" for name, (_, what) in STUDIES.items()))
    elif name not in STUDIES:
        raise UserError(f"{name!r} is no study{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    else:
        STUDIES[name][0](rest, f"{program} {name}")
