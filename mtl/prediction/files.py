"""Prediction of files: which images, and where what is predicted goes.

.. code-block:: text

    DIR/NAME.png             a page for a person: the image, each task's picture, legend and scale
    DIR/TASK/NAME.SUFFIX     each task's prediction as data, as `Task.encode` writes it
    DIR/TASK-uncertainty/    where several answers were combined, how uncertain each is: NAME.npy, (H, W) float32 in
                             the unit of `mtl.ensembling.combine.Combined`
    DIR/dataset.yaml         names of the classes: with the images as DIR/images/, DIR is a `folder` data set
    DIR/.predicted.jsonl     which files these are: a later prediction replaces them, and no others
"""

import glob
import io
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from mtl.data.folder import IMAGE_SUFFIXES
from mtl.errors import UserError
from mtl.files import write_whole
from mtl.prediction.images import pixels
from mtl.prediction.predictor import Predictor
from mtl.prediction.record import Record
from mtl.tasks.base import Panel
from mtl.training.pictures import Panels, draw_predictions
from mtl.uncertainty.pictures import draw_uncertainty

_LONGEST = 1024
"""The most pixels of a side of what is drawn on a page."""


@dataclass
class Result:
    """What came of predicting files.

    Attributes:
        pages: The pages that were written, by image.
        failures: Why images could not be predicted, by image.
    """

    pages: dict[Path, Path] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)

    @property
    def complaint(self) -> str:
        """One sentence that names the images, and leaves the reasons to what was said of each."""
        failed = len(self.failures)
        images = ", ".join(str(image) for image in [*self.failures][:3]) + (", ..." if failed > 3 else "")
        return f"{failed} of {failed + len(self.pages)} images could not be predicted: {images}"


def find_images(words: Sequence[str]) -> list[Path]:
    """Return the images that words stand for, each once: in the order of the words, within one as a person counts.

    Args:
        words: Each a file, a folder (the images in it, not those in its folders) or a pattern such as ``*.jpg`` or
            ``**/*.png``.

    Raises:
        UserError: A word stands for no image.
    """
    found: dict[Path, Path] = {}
    for word in words:
        for path in _matches(word):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _matches(word: str) -> list[Path]:
    """Return the images of one word."""
    path = Path(word)
    if path.is_file():
        return [path]
    if not word.strip():
        raise UserError(f"{word!r} names no image: name one, a folder of images or a pattern such as 'photos/*.jpg'")
    known = ", ".join(IMAGE_SUFFIXES)
    if path.is_dir():
        if images := _images(path.iterdir()):
            return images
        raise UserError(f"the folder {word} holds no image ({known})")
    if not glob.has_magic(word):
        raise UserError(f"{word} does not exist: name an image, a folder of images or a pattern such as 'photos/*.jpg'")
    if images := _images(map(Path, glob.glob(word, recursive=True))):  # noqa: PTH207  # a pattern may be absolute
        return images
    raise UserError(f"no image matches {word!r} ({known})")


def _images(paths: Iterable[Path]) -> list[Path]:
    """Return the images among paths in natural order: 2 before 10."""
    chosen = (p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file())
    return sorted(chosen, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key in which runs of digits count as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]


def predict_files(
    predictor: Predictor, images: Sequence[Path], output_dir: Path, say: Callable[[str], None] = print
) -> Result:
    """Predict images and write pages and data; see `mtl.prediction.files` for where.

    An image that cannot be read is named, and the others are done. Files of an earlier prediction are replaced, and
    no others: a folder with any in their place is refused before anything is predicted.

    Args:
        predictor: What predicts.
        images: The images.
        output_dir: The folder to write into; it is made if it is not there.
        say: Called with each line for a person.

    Raises:
        UserError: The folder cannot be written, or holds what must not be overwritten.
    """
    folders = {task.name: output_dir / task.name for task in predictor.tasks}
    uncertain = {task.name: output_dir / f"{task.name}-uncertainty" for task in predictor.tasks}
    everywhere = [*folders.values(), *uncertain.values()]
    _check_folder(output_dir, everywhere, images)
    result = Result()
    names = _names(images, say)
    description: dict[Path, bytes] = {}
    if classes := next((task.class_names for task in predictor.tasks if task.class_names), ()):
        content = yaml.safe_dump({"classes": list(classes)}, allow_unicode=True, default_flow_style=None)
        description[output_dir / "dataset.yaml"] = content.encode()
    try:
        record = Record(output_dir)
        _check_files(output_dir, everywhere, names.values(), description, record)
        for folder in (output_dir, *folders.values()):
            folder.mkdir(parents=True, exist_ok=True)
        _write("", description, record)
        for image, name in names.items():
            try:
                array = pixels(image)
                predictions, uncertainty = predictor.predict_with_uncertainty(array)
            except UserError as error:
                reason = str(error) if str(image) in str(error) else f"{image}: {error}"
                say(reason)
                result.failures[image] = reason
                continue
            page = output_dir / f"{name}.png"
            files = {page: _draw_page(output_dir, predictor, array, predictions, uncertainty)}
            for task in predictor.tasks:
                for suffix, encoded in task.encode(predictions[task.name]).items():
                    files[folders[task.name] / f"{name}{suffix}"] = encoded
            for task_name, values in uncertainty.items():
                uncertain[task_name].mkdir(exist_ok=True)
                files[uncertain[task_name] / f"{name}.npy"] = _encoded(values)
            _write(name, files, record)
            for path in record.files(name, everywhere) - files.keys():
                path.unlink()  # such as a scale that no longer holds
            result.pages[image] = page
    except OSError as error:
        raise UserError(
            f"{error.filename or output_dir} cannot be written ({error.strerror}); choose another --output-dir"
        ) from None
    data = ", ".join(str(folder) for folder in folders.values())
    say(f"{len(result.pages)} of {len(images)} images predicted: pages in {output_dir}, data in {data}")
    return result


def _check_folder(output_dir: Path, folders: Iterable[Path], images: Iterable[Path]) -> None:
    """Refuse to write where something else is."""
    parent = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {output_dir}: {parent} is a file; choose another folder")
    written = {folder.resolve() for folder in (output_dir, *folders)}
    if among := next((image for image in images if image.resolve().parent in written), None):
        raise UserError(f"--output-dir {output_dir} holds {among}, which is to be predicted; choose another folder")
    if (output_dir / "images").is_dir():
        raise UserError(
            f"--output-dir {output_dir} holds a data set, whose labels would be overwritten; choose another folder"
        )


def _check_files(
    output_dir: Path,
    folders: Collection[Path],
    names: Iterable[str],
    description: Mapping[Path, bytes],
    record: Record,
) -> None:
    """Refuse to replace a file that no prediction has written, or that somebody has changed since."""
    # What a task's files are called beyond the image's name, only its `encode` knows: so its folder is for them alone.
    inside = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    others = [path for path in inside if path not in record and path.is_file() and not path.name.startswith(".")]
    replaced = {path for name in names for path in (output_dir / f"{name}.png", *record.files(name, folders))}
    replaced |= {path for path, content in description.items() if path.is_file() and path.read_bytes() != content}
    others += [path for path in sorted(replaced) if path.is_file() and not record.wrote(path)]
    if others:
        raise UserError(
            f"--output-dir {output_dir} holds {others[0]}, which is not, or no longer, what an earlier prediction "
            "wrote; choose another folder, or move the file away"
        )


def _write(name: str, files: Mapping[Path, bytes], record: Record) -> None:
    """Write files of an image, once the record has them."""
    record.add(name, files)
    for path, content in files.items():
        write_whole(path, content)


def _names(images: Sequence[Path], say: Callable[[str], None]) -> dict[Path, str]:
    """Return a name for each image: its stem, with a number where that is taken."""
    taken: dict[str, Path] = {}
    names: dict[Path, str] = {}
    stems = {image.stem.casefold() for image in images}
    for image in images:
        name, number = image.stem, 1
        # Some file systems do not tell A from a. A numbered name is none that another image has from the start.
        while name.casefold() in taken or (number > 1 and name.casefold() in stems):
            number += 1
            name = f"{image.stem}-{number}"
        if number > 1:
            say(f"{image} is written as {name}, because {taken[image.stem.casefold()]} has the same name")
        taken[name.casefold()] = image
        names[image] = name
    return names


def _encoded(values: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, values.numpy())
    return content.getvalue()


def _draw_page(
    output_dir: Path,
    predictor: Predictor,
    array: np.ndarray,
    predictions: Mapping[str, Tensor],
    uncertainty: Mapping[str, Tensor],
) -> bytes:
    """Draw the image, each task's prediction and how uncertain it is, no larger than a page needs, as a PNG."""
    shrink = max(1.0, max(array.shape[:2]) / _LONGEST)
    height, width = (max(1, round(length / shrink)) for length in array.shape[:2])
    small = np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BOX))
    rows, columns = (
        ((torch.arange(few) + 0.5) * (many / few)).long()
        for few, many in zip((height, width), array.shape[:2], strict=True)
    )
    panels: Panels = {"input": Panel(small[None])}
    classes: tuple[str, ...] = ()
    present: list[int] = []
    for task in predictor.tasks:
        # Every so-many-th pixel: an average of what any task predicts need not be a prediction.
        prediction = predictions[task.name][..., rows[:, None], columns]
        panels |= task.pictures(prediction[None], None)
        if task.name in uncertainty:
            panels |= draw_uncertainty(task, uncertainty[task.name][rows[:, None], columns][None])
        if task.class_names and not classes:
            classes, present = task.class_names, np.unique(prediction.numpy()).tolist()
    with tempfile.TemporaryDirectory(prefix=".page-", dir=output_dir) as folder:
        draw_predictions(path := Path(folder) / "page.png", panels, classes, present)
        return path.read_bytes()
