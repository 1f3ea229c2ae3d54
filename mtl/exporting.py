"""A trained model as a program that needs nothing of this package: ONNX, or torch.export's own format.

A program takes ``image``, (B, 3, H, W) float32 in [0, 1] for any B and the one H and W it was made for, and returns
each task's prediction by the task's name, as `MultiTaskModule` does: float32 arithmetic, evaluation mode, the
backbone's normalisation included. It says of itself what a reader must know, as JSON: the tasks, the classes and
the unit of each, the size, the backbone and the decoder. In ONNX these are the model's metadata::

    session = onnxruntime.InferenceSession("model.onnx")
    json.loads(session.get_modelmeta().custom_metadata_map["classes"])["segmentation"]

and in torch's program an extra file::

    about = {"about.json": ""}
    program = torch.export.load("model.pt2", extra_files=about).module()
"""

import copy
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mtl.errors import UserError
from mtl.files import write_whole
from mtl.models.backbone import Backbone
from mtl.models.heads import resolve_decoder
from mtl.models.multitask import MultiTaskModel
from mtl.tasks.base import Task
from mtl.training.module import MultiTaskModule

Format = Literal["onnx", "torch"]
Predictor = Callable[[Tensor], Mapping[str, Tensor]]

FILES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
"""The file of each format."""

TOLERANCE = 1e-3
"""How far an answer may be from the model's, as a share of the largest absolute value of the model's answer."""

_UNDECIDED = 1e-3
"""Share of pixels that may differ where a prediction is neither a number nor a class, such as a thresholded map."""

_LARGEST_ONNX = 2_000_000_000
"""Bytes of weights that fit into one ONNX file: protobuf ends at 2 GiB."""

_CLASSES = "class index"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_DYNAMIC = {"image": {0: Dim("batch")}}
_EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)


@dataclass(frozen=True)
class Exported:
    """A program that was written, and how well it answers.

    Attributes:
        path: The file.
        format: Its format.
        size: Height and width of the images that it takes.
        difference: By task, the largest absolute difference from the model's answer, in the answer's own unit;
            where the answer is a map of classes, the share of pixels that differ, each of them a tie.
        units: The unit of each task's answer, as the program states it.
    """

    path: Path
    format: Format
    size: tuple[int, int]
    difference: dict[str, float]
    units: dict[str, str]

    def __str__(self) -> str:
        """Say in a line what was written, and how far its answers are from the model's."""
        height, width = self.size
        parts = [
            f"{task} {worst:.1%} of pixels" if unit == _CLASSES else f"{task} {worst:.1e} {unit}".rstrip()
            for (task, worst), unit in zip(self.difference.items(), self.units.values(), strict=True)
        ]
        return f"{self.path} for images of {height}x{width}; largest difference from the model: {', '.join(parts)}"


def export(
    module: MultiTaskModule,
    folder: Path,
    formats: Sequence[Format],
    *,
    size: tuple[int, int] | None = None,
    raw: bool = False,
) -> list[Exported]:
    """Write a model as programs, each of which has been loaded again and answers as the model does.

    Numbers must agree to `TOLERANCE`. Where classes differ, the model's own output for the class that the program
    chose must be as close as that to its best. This is measured on batches of one and of three random images.

    Args:
        module: The model and its tasks; it is left as it is, whatever its device, precision and mode.
        folder: Where the files go; it is made if need be.
        formats: Which programs to write.
        size: Height and width of the images to take; None is the size of training.
        raw: Return the heads' outputs, (B, C, H, W) each, in place of predictions.

    Raises:
        UserError: A package is missing, the model cannot take this size, cannot be exported, or is not answered for
            by what came of it; then nothing has been written.
    """
    formats = list(dict.fromkeys(formats))
    missing = [package for package in _NEEDED if "onnx" in formats and find_spec(package) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "run pip install onnx onnxscript onnxruntime, or use --format torch"
        )
    height, width = size or module.options.data.size
    with torch.no_grad(), _quiet():
        program = _Program(module, raw)
        examples = [_example(program, count, height, width) for count in (1, 3)]
        traced = _trace(program, height, width)
        about = _about(program, examples[0])
        contents, exported = {}, []
        for name in formats:
            contents[name], predictor = _MAKERS[name](program, traced, about)
            differences = _check(name, program, predictor, examples)
            exported.append(Exported(folder / FILES[name], name, (height, width), differences, about["units"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for written in exported:
            write_whole(written.path, contents[written.format])
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); choose another --output-dir") from None
    return exported


class _Program(nn.Module):
    """What is exported: a copy of the model and its tasks, in float32 on the CPU, for evaluation."""

    def __init__(self, module: MultiTaskModule, raw: bool) -> None:
        super().__init__()
        self.model: MultiTaskModel = copy.deepcopy(module.model)
        self.tasks = copy.deepcopy(module.tasks)
        self.raw = raw
        assert isinstance(self.model.backbone, Backbone), "reading the run has checked this"
        decoder = resolve_decoder(module.options.decoder, self.model.backbone)
        self.parts = {"backbone": module.options.backbone, "decoder": decoder}
        self.title = f"backbone {self.parts['backbone']} with decoder {decoder}"
        self.requires_grad_(False).eval().to("cpu", torch.float32)
        self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's stubs

    def each_task(self) -> list[Task]:
        return [cast(Task, task) for task in self.tasks.values()]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        outputs = self.model(image)
        return {
            task.name: outputs[task.name] if self.raw else task.predict(outputs[task.name]) for task in self.each_task()
        }


@dataclass(frozen=True)
class _Example:
    """A batch of images, the heads' outputs for it, and what the program is to answer."""

    image: Tensor
    outputs: dict[str, Tensor]
    answers: dict[str, Tensor]


def _example(program: _Program, count: int, height: int, width: int) -> _Example:
    """Return the model's own answers to random images.

    Raises:
        UserError: The model cannot take images of this size, or its answers are not numbers.
    """
    try:
        image = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))
        outputs, answers = program.model(image), program(image)
    except _EXPORT_ERRORS as error:
        raise UserError(
            f"--size {height} {width}: {program.title} cannot take images of that size ({_reason(error)}); "
            "leave --size out to use the size of training"
        ) from None
    for task, output in outputs.items():
        if not output.isfinite().all():
            raise UserError(f"the model's outputs for {task} are not finite, so its training failed; export another")
    return _Example(image, outputs, answers)


def _trace(program: _Program, height: int, width: int) -> ExportedProgram:
    """Return the model's operators, for batches of any number of images.

    Raises:
        UserError: The model does something that only Python can.
    """
    try:
        # Two images: a batch of one would be taken for a constant.
        traced = torch.export.export(program, (torch.zeros(2, 3, height, width),), dynamic_shapes=_DYNAMIC)
    except _EXPORT_ERRORS as error:
        raise UserError(
            f"{program.title} cannot be exported in any format ({_reason(error)}); train with another --backbone or "
            "--decoder"
        ) from None
    for part in traced.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names the folders of this machine
    return traced


def _about(program: _Program, example: _Example) -> dict[str, Any]:
    """Return what a program says of itself."""
    height, width = example.image.shape[-2:]
    tasks = program.each_task()
    return {
        "image": f"(batch, 3, {height}, {width}) float32, red, green and blue of sRGB in [0, 1]",
        "size": [height, width],
        "tasks": [task.name for task in tasks],
        "classes": {task.name: list(task.class_names) for task in tasks if task.class_names},
        "units": {task.name: "" if program.raw else _unit(task, example.answers[task.name]) for task in tasks},
        "raw": program.raw,
        **program.parts,
    }


def _unit(task: Task, prediction: Tensor) -> str:
    """Return the unit that a task's own picture of a prediction states, or an empty string."""
    if task.class_names:
        return _CLASSES
    scales = [panel.scale for panel in task.pictures(prediction, None).values()]
    return next((scale.unit for scale in scales if scale is not None), "")


def _make_torch(program: _Program, traced: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Predictor]:
    """Return the file of torch's own format, and what it does once loaded."""
    content = io.BytesIO()
    torch.export.save(traced, content, extra_files={"about.json": json.dumps(about, indent=2)})
    content.seek(0)
    return content.getvalue(), torch.export.load(content).module()


def _make_onnx(program: _Program, traced: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Predictor]:
    """Return the ONNX file, and what it does in onnxruntime.

    Raises:
        UserError: ONNX has no such operator, or cannot hold so large a model in a file.
    """
    instead = "use --format torch, or train with another --backbone or --decoder"
    weight = sum(tensor.nbytes for tensor in traced.state_dict.values())
    if weight > _LARGEST_ONNX:
        raise UserError(f"{program.title} has {weight / 1e9:.1f} GB of weights, and an ONNX file holds 2; {instead}")
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # fatal errors alone: others are raised as well
    try:
        converted: Any = torch.onnx.export(
            traced,
            input_names=["image"],
            output_names=about["tasks"],
            dynamic_shapes=_DYNAMIC,
            dynamo=True,
            verbose=False,
        )
        converted.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        content: bytes = converted.model_proto.SerializeToString()
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except _EXPORT_ERRORS as error:
        raise UserError(f"{program.title} cannot be exported to ONNX ({_reason(error)}); {instead}") from None

    def predict(image: Tensor) -> dict[str, Tensor]:
        answers = session.run(about["tasks"], {"image": image.numpy()})
        return {task: torch.from_numpy(answer) for task, answer in zip(about["tasks"], answers, strict=True)}

    return content, predict


_MAKERS: dict[Format, Callable[[_Program, ExportedProgram, dict[str, Any]], tuple[bytes, Predictor]]] = {
    "onnx": _make_onnx,
    "torch": _make_torch,
}


def _check(name: Format, program: _Program, predictor: Predictor, examples: Sequence[_Example]) -> dict[str, float]:
    """Return by task how far a program's answers are from the model's.

    Raises:
        UserError: They are farther than rounding explains, or the program gives none.
    """
    differences = dict.fromkeys(program.tasks, 0.0)
    for example in examples:
        try:
            answers = predictor(example.image)
        except Exception as error:  # noqa: BLE001  onnxruntime's errors have no base of their own
            raise UserError(
                f"the {name} program of {program.title} does not run on {len(example.image)} images "
                f"({_reason(error)}); use another --format, or train with another --backbone or --decoder"
            ) from None
        for task in program.each_task():
            difference, same = _compare(task, answers[task.name], example)
            if not same:
                raise UserError(
                    f"the {name} program of {program.title} does not answer {task.name} as the model does (they differ "
                    f"by {difference:.2g}); use another --format, or train with another --backbone or --decoder"
                )
            differences[task.name] = max(differences[task.name], difference)
    return differences


def _compare(task: Task, answer: Tensor, example: _Example) -> tuple[float, bool]:
    """Return how far a program's answer is from the model's, as in `Exported`, and whether that is rounding."""
    expected, outputs = example.answers[task.name], example.outputs[task.name]
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return math.inf, False
    if expected.is_floating_point():
        worst = (answer - expected).abs().max()
        return worst.item(), bool(worst <= TOLERANCE * expected.abs().max())
    share = (answer != expected).float().mean().item()
    if not task.class_names:
        return share, share <= _UNDECIDED
    chosen = outputs.gather(1, answer[:, None].long())
    behind = (outputs.amax(dim=1, keepdim=True) - chosen).max()
    return share, bool(behind <= TOLERANCE * outputs.abs().max())


def _reason(error: BaseException) -> str:
    """Return the first line of the error at the bottom of it all, with the operator that it is about if known."""
    operator = None
    while error.__cause__ is not None:
        error = error.__cause__
        operator = operator or re.search(r"translating node .*target=torch\.ops\.([\w.]+)", str(error))
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"operator {operator[1]}: {line.partition(' for <')[0]}" if operator else line


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress, warnings and logs from the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
