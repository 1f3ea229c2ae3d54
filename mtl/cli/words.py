"""What must be known of a command line before it can be parsed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl.cli.surroundings import before_imports
from mtl.config import Experiment, load
from mtl.errors import UserError


def values_of_flag(words: Sequence[str], flag: str, count: int | None = None) -> list[str]:
    """Return the words that follow a flag, up to the next flag; those of a flag given several times add up.

    Args:
        words: The command line.
        flag: The flag, such as ``--config``.
        count: How many words it takes at most each time; None for any number.
    """
    values: list[str] = []
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            following = [value] if equals else list(words[position + 1 :])
            end = next((i for i, w in enumerate(following) if w.startswith("-")), len(following))
            values += following[: end if count is None else min(count, end)]
    return values


OPTIONS_OF = {"segmentation": "segmentation", "depth": "depth", "classification": "classification", "mask": "masked"}
"""The task that each nested group of options is for."""


def check_used(words: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse options, given as flags, of a task that is not learned; in YAML they may wait for it.

    Raises:
        UserError: There is one.
    """
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        group, dot, _ = flag.removeprefix("--").partition(".")
        task = OPTIONS_OF.get(group)
        if flag.startswith("--") and dot and task and task not in tasks:
            raise UserError(
                f"{flag} is for --task {task}, and this training learns {' and '.join(tasks)}; leave it out, or add "
                "the task"
            )


def take_plugins(words: Sequence[str]) -> None:
    """Read the files of users' code that the command line names, which define names that its other flags may use.

    Raises:
        UserError: One of them cannot be used.
    """
    if files := values_of_flag(words, "--plugin"):
        before_imports()
        from mtl.plugins import load_plugins

        load_plugins([Path(file) for file in files])


def base_of(words: Sequence[str]) -> Experiment:
    """Return the experiment of the file that `--config` names, whose values are the flags' defaults.

    Raises:
        UserError: There are several such files, or this one cannot be used.
    """
    files = values_of_flag(words, "--config", 1)
    if len(files) > 1:
        raise UserError(
            f"--config names {len(files)} files ({', '.join(files)}), and takes one; give the rest as flags"
        )
    return load(Path(files[0])) if files else Experiment()


def with_yaml_only(given: dict[str, Any], base: Experiment) -> dict[str, Any]:
    """Return the values of flags, and with them those of the file that `--config` names which no flag can give."""
    # Where --augment names another policy, the loader's pipeline is that of the policy.
    loader = base.augmentation.loader if given["augment"] == base.augment else None
    return given | {"more_data": base.more_data, "augmentation": given["augmentation"] | {"loader": loader}}


def check_output(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        UserError: Its folder is missing or not writable, or it is itself a folder.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist; make it first, or give another")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {path}: its folder cannot be written to; give another")


def run_of(words: Sequence[str]) -> Path | None:
    """Return the first word that is a run's folder."""
    return next((Path(word) for word in words if (Path(word) / "config.yaml").is_file()), None)
