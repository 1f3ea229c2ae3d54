"""``python -m mtl preview``: what the network will see, before any training."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.surroundings import surroundings
from mtl.cli.words import base_of, check_output, take_plugins, with_yaml_only
from mtl.config import validate
from mtl.errors import UserError
from mtl.flags import Configured, parse, train_flags, values_of, with_values


@dataclasses.dataclass
class _Files(Configured):
    output: Annotated[Path, tyro.conf.arg(metavar="FILE.png", help="The picture to write.")] = Path("preview.png")
    count: Annotated[int, tyro.conf.arg(help="How many samples to draw.")] = 6


def run(words: list[str], program: str, description: str) -> None:
    """Draw samples of the configured training data."""
    take_plugins(words)
    flags = train_flags(_Files)
    base = base_of(words)
    given = values_of(parse(flags, with_values(flags, base.model_dump()), words, program, description))
    output, count = given.pop("output"), given.pop("count")
    for name in ("plugin", "config"):
        given.pop(name)
    experiment = validate(with_yaml_only(given, base))
    if count < 1:
        raise UserError(f"--count {count} must be at least 1")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output} must end in .png")
    check_output("--output", output)
    here = surroundings()
    from mtl.experiment import preview

    files = preview(experiment, here, output, count)
    for written in files:
        print(f"written to {written}")
