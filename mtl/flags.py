"""Shows the configuration's pydantic models on the command line, through tyro."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from mtl.config import GROUPS, YAML_ONLY, Experiment, number_or_word
from mtl.errors import UserError, nearest


def flags_of(model: type[BaseModel], *, prefix: bool) -> type:
    """Return a dataclass with a model's fields, for tyro.

    Values are checked by the model afterwards, so that flags and YAML are refused in the same words.

    Args:
        model: The model.
        prefix: Whether flags carry the name of the group (``--data.root``) or stand alone (``--lr``).
    """
    fields = []
    for name, info in model.model_fields.items():
        if name in YAML_ONLY:
            continue
        default = partial(info.get_default, call_default_factory=True)
        fields.append((name, _annotation(info, prefix), dataclasses.field(default_factory=default)))
    flags = dataclasses.make_dataclass(model.__name__, fields)
    flags.__doc__ = model.__doc__
    return flags


def train_flags(files: type) -> type:
    """Return the dataclass of all flags of a training: groups without a prefix, then the nested options.

    Args:
        files: A dataclass with the flags to come before them.
    """
    groups = [(group.__name__.removesuffix("Group").lower(), flags_of(group, prefix=False)) for group in GROUPS]
    nested = [
        (name, flags_of(info.annotation, prefix=True))
        for name, info in Experiment.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    ]
    fields = [(name, flags, dataclasses.field(default_factory=flags)) for name, flags in groups + nested]
    return dataclasses.make_dataclass("Flags", fields, bases=(files,))


@dataclasses.dataclass
class Code:
    """The flag of every command that may need a user's own code."""

    plugin: Annotated[
        list[list[Path]],  # of each time that the flag is given
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="FILE.py ...", help="Your own tasks, data sets and rules: Python files that are run."),
    ] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Configured(Code):
    """The flags that say where an experiment's other flags have their defaults from."""

    config: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help="YAML file of the same fields; flags override it.")
    ] = None


def with_values(flags: type, values: dict[str, Any]) -> Any:
    """Return an instance of a flags dataclass with the given field values, where it has such fields."""
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(flags):
        if dataclasses.is_dataclass(item.type):
            # Nested options have a mapping of their own; a group's fields are in the mapping itself.
            nested = values[item.name] if isinstance(values.get(item.name), dict) else values
            arguments[item.name] = with_values(item.type, nested)  # type: ignore[arg-type]  # a class, by construction
        elif item.name in values:
            arguments[item.name] = values[item.name]
    return flags(**arguments)


def values_of(flags: Any) -> dict[str, Any]:
    """Return a flags instance as the nested dictionary that the configuration's models validate."""
    values: dict[str, Any] = {}
    groups = {group.__name__.removesuffix("Group").lower() for group in GROUPS}
    for item in dataclasses.fields(flags):
        value = getattr(flags, item.name)
        if not dataclasses.is_dataclass(value):
            values[item.name] = value
        elif item.name in groups:
            values |= values_of(value)
        else:
            values[item.name] = values_of(value)
    return values


def parse(flags: type, default: Any, words: Sequence[str], program: str, description: str) -> Any:
    """Parse the command line.

    Args:
        flags: A dataclass, as of `flags_of`.
        default: The values where no flag is given, or None for the dataclass's own.
        words: The command line, without the program's name.
        program: The program's name, for the help.
        description: What the command does, for the help.

    Raises:
        UserError: A word is not a flag of this command, or not a value of its flag.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                flags,
                prog=program,
                description=description,
                args=list(words),
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(f"{_sentence(complaint.getvalue())}; {program} --help lists the flags") from None
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise UserError(f"{word!r} follows no flag that takes it; {program} --help lists the flags")
        raise UserError(f"{word} is no flag{nearest(word, _names(flags))}; {program} --help lists the flags")
    return parsed


def _sentence(box: str) -> str:
    """Return what tyro says in the first part of a box drawn for a terminal, as one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    said = itertools.takewhile(lambda line: not line.startswith("──"), lines)
    sentence = " ".join(line for line in said if line).rstrip(".")
    # Of a value that may be left out, tyro tells what each of its types has to say.
    found = re.search(r"no type matching \{None\}\|(\w+) could be instantiated from \[(.*?)\]", sentence)
    if found and found[1] in _KINDS:
        sentence = f"{sentence[: found.start()]}{found[2]} is not {_KINDS[found[1]]}"
    return sentence


_KINDS = {"INT": "a whole number", "FLOAT": "a number"}
"""What tyro calls the types of numbers, in words."""


def _names(flags: type, prefix: str = "") -> list[str]:
    names = []
    groups = {group.__name__ for group in GROUPS}
    for item in dataclasses.fields(flags):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            nested = "" if item.type.__name__ in groups else f"{item.name}."
            names += _names(item.type, prefix + nested)
        else:
            # Python keeps some words, such as with, for itself.
            names.append("--" + (prefix + item.name).rstrip("_").replace("_", "-"))
    return names


def _annotation(info: FieldInfo, prefix: bool) -> Any:
    kind: Any = info.annotation
    arguments: dict[str, Any] = {"help": info.description, "prefix_name": prefix}
    if get_origin(kind) is Literal:
        # The model checks the choice, and suggests the nearest one.
        arguments["metavar"] = "{" + ",".join(map(str, get_args(kind))) + "}"
        kind = str
    elif get_origin(kind) is dict:
        return Annotated[kind, _mapping(get_args(kind)[1]), tyro.conf.arg(**arguments)]
    return Annotated[kind, tyro.conf.arg(**arguments)]


def word_or(default: str, metavar: str) -> PrimitiveConstructorSpec[str | None]:
    """Let a flag stand alone, which means its default word, or before a word."""
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=metavar,
        instance_from_str=lambda words: words[0] if words else default,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if value is None else [value],
    )


def _mapping(kind: Any) -> PrimitiveConstructorSpec[dict[str, Any]]:
    """Let a mapping be written as ``segmentation=1 depth=0.5``."""
    number: Callable[[str], Any] = kind if isinstance(kind, type) else number_or_word
    what = "NUMBER" if isinstance(kind, type) else "VALUE"

    def read(words: list[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"{word!r} should have the form NAME={what}")
            if name in values:
                raise ValueError(f"{name!r} is given twice; give it once")
            values[name] = number(value)
        return values

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"NAME={what} ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={number}" for name, number in value.items()],
    )
