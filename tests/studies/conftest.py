"""A study's trainings without the start of a process for each."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.studies.jobs import Failure, Runner, Slot


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run commands of the program in this process, and return where they are noted."""
    calls: list[list[str]] = []

    def call(self: Runner, words: Sequence[str], slot: Slot, log: Path, lock: int) -> Failure | None:
        calls.append(list(words))
        return None if main([*words]) == 0 else Failure("it failed")

    monkeypatch.setattr(Runner, "_call", call)
    return calls
