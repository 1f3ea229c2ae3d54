"""Which files of a folder were predicted, so that these alone are replaced."""

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path


class Record:
    """The files that predictions have written into a folder, as ``.predicted.jsonl`` in it tells.

    A line holds an image's name, and the SHA-256 of each of its files by its path in the folder. It is added before
    the files are written: wherever a prediction stops, there is no file of its own that it would not know again.

    Args:
        folder: The folder; nothing is written before `add`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".predicted.jsonl"
        self._digests: dict[Path, set[str]] = {}
        self._files: dict[str, set[Path]] = {}
        for name, digests in _read(self._path):
            self._take(name, digests)

    def __contains__(self, path: Path) -> bool:
        """Return whether a prediction has written a file of this name."""
        return path in self._digests

    def wrote(self, path: Path) -> bool:
        """Return whether a file, which exists, is just as a prediction has written it."""
        return path in self and _digest(path.read_bytes()) in self._digests[path]

    def files(self, name: str, folders: Container[Path]) -> set[Path]:
        """Return the files that were written for an image into some folders and still exist."""
        return {path for path in self._files.get(name, ()) if path.parent in folders and path.is_file()}

    def add(self, name: str, files: Mapping[Path, bytes]) -> None:
        """Note what is about to be written.

        Args:
            name: The image's name, or an empty string for what belongs to none.
            files: Their contents.
        """
        digests = {path.relative_to(self._folder).as_posix(): _digest(content) for path, content in files.items()}
        if not self._take(name, digests):
            return
        with self._path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            after_a_torn_line = file.read() not in (b"", b"\n")
            line = json.dumps({"name": name, "files": digests}) + "\n"
            file.write(b"\n" * after_a_torn_line + line.encode())

    def _take(self, name: str, digests: Mapping[str, str]) -> bool:
        """Take up files, and return whether any of them is new."""
        new = False
        for relative, digest in digests.items():
            path = self._folder / relative
            known = self._digests.setdefault(path, set())
            new |= digest not in known
            known.add(digest)
            self._files.setdefault(name, set()).add(path)
        return new


def _read(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the names and digests of a record, without lines that are cut off, as a full disk leaves them."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            yield str(entry["name"]), {str(path): str(digest) for path, digest in entry["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
