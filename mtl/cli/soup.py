"""``python -m mtl soup``: several runs' weights, averaged into one run."""

import dataclasses
from pathlib import Path
from typing import Annotated, cast

import tyro

from mtl.cli.evaluate import check_run
from mtl.cli.surroundings import surroundings
from mtl.cli.words import take_plugins
from mtl.config import changed, load
from mtl.errors import UserError
from mtl.flags import Code, parse


@dataclasses.dataclass(kw_only=True)
class _Soup(Code):
    runs: Annotated[
        list[Path],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN ...", help="Runs of one model, best all from the same pretrained weights."),
    ] = dataclasses.field(default_factory=list)
    kind: Annotated[
        str,
        tyro.conf.arg(
            metavar="{uniform,greedy}",
            help="uniform: all of them; greedy: from the best on, those that do not make it worse on the held-out "
            "validation samples.",
        ),
    ] = "uniform"
    name: Annotated[str | None, tyro.conf.arg(help="Name of the new run and of its folder.")] = None
    output_dir: Annotated[Path | None, tyro.conf.arg(help="Where its folder is made (none: beside the first run).")] = (
        None
    )
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or mps.")] = "auto"


def run(words: list[str], program: str, description: str) -> None:
    """Average weights, and say what to do with them."""
    take_plugins(words)
    flags = parse(_Soup, None, words, program, description)
    if len(flags.runs) < 2:
        raise UserError("a soup is the mean of two runs' weights or more; name their folders")
    for folder in flags.runs:
        check_run(folder)
    if flags.name is None:
        raise UserError("name the new run by --name")
    changed(load(flags.runs[0] / "config.yaml"), {"device": flags.device, "name": flags.name})  # refuses wrong values
    here = surroundings()
    from mtl.souping import SoupKind, make_soup

    output_dir = flags.output_dir or flags.runs[0].absolute().parent
    folder = make_soup(flags.runs, cast(SoupKind, flags.kind), flags.name, output_dir, here, flags.device)
    print(f"{folder} is a run like any other:\n  python -m mtl evaluate {folder}")
