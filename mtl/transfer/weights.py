"""Where weights come from, and files that cannot run code."""

import errno
import importlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mtl.config import SHIPPED_BACKBONE
from mtl.errors import UserError, nearest
from mtl.files import write_whole
from mtl.models.backbone import Backbone
from mtl.models.multitask import MultiTaskModel
from mtl.models.signals import SignalBackbone
from mtl.transfer.layers import full_model, timm_name
from mtl.transfer.lora import merge, merged_state

SHIPPED_WEIGHTS = Path(__file__).parent.parent / "weights" / f"{SHIPPED_BACKBONE}.safetensors"
"""The weights that come with the package."""


@dataclass
class Report:
    """What an initialisation did.

    Attributes:
        source: Where the weights came from, for a person.
        loaded: Number of backbone tensors taken over.
        reshaped: Names of those that were fitted to another shape, such as position embeddings.
        left_out: Names of tensors of the source that this model has no place for.
        heads: Tasks whose heads were taken over.
        new_heads: Tasks whose heads start anew.
    """

    source: str
    loaded: int = 0
    reshaped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    new_heads: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.loaded:
            return f"backbone: {self.source}; heads: new for {', '.join(self.new_heads)}"
        parts = [f"backbone: {self.loaded} tensors from {self.source}"]
        if self.reshaped:
            parts.append(f"{len(self.reshaped)} fitted to another shape ({_some(self.reshaped)})")
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out ({_some(self.left_out)})")
        heads = [f"kept for {', '.join(self.heads)}"] if self.heads else []
        heads += [f"new for {', '.join(self.new_heads)}"] if self.new_heads else []
        return "; ".join([*parts, "heads: " + ", ".join(heads)])


def initialise(model: MultiTaskModel, init: str) -> Report:
    """Give a model its initial weights.

    Args:
        model: The model, randomly initialised.
        init: 'shipped', 'imagenet', 'none', or the path of a run's folder, a checkpoint of this package, or a
            timm state dict as safetensors or a torch file.

    Raises:
        UserError: The weights do not exist, cannot be fetched or read, or do not fit.
    """
    backbone = model.backbone
    if init == "none":
        return Report("random", new_heads=list(model.parts))
    if init == "imagenet" and isinstance(backbone, Backbone):
        report = Report(f"timm's pretrained {backbone.name}", new_heads=list(model.parts))
        return _load_timm(backbone, _download(backbone), report)
    if init == "shipped":
        if backbone.name != SHIPPED_BACKBONE:
            raise UserError(
                f"--init shipped holds weights of {SHIPPED_BACKBONE}, not of {backbone.name}; add --init imagenet "
                "to fetch timm's, --init none to start at random, or --init PATH"
            )
        path = SHIPPED_WEIGHTS
    else:
        path = find_checkpoint(Path(init)) if Path(init).is_dir() else Path(init)
    if not path.is_file():
        raise UserError(
            f"--init {init}: there is no such file or run{nearest(init, ('shipped', 'imagenet', 'none'))}; "
            "give shipped, imagenet, none, a run's folder, a checkpoint or a file of weights"
        )
    report = Report("the package" if init == "shipped" else str(path), new_heads=list(model.parts))
    state, metadata = read_weights(path)
    if metadata.get("backbone", backbone.name) != backbone.name:
        raise UserError(
            f"--init {init} holds weights of {metadata['backbone']}, and the backbone is {backbone.name}; "
            f"use --backbone {metadata['backbone']} or other weights"
        )
    if "experiment" in metadata:
        return _load_own(model, state, report, metadata["experiment"])
    if isinstance(backbone, SignalBackbone):
        raise UserError(
            f"--init {init} is neither a run nor a checkpoint of one, which {backbone.name} can start from; give one, "
            "or none"
        )
    for name in ("mean", "std"):
        if name in metadata:
            getattr(backbone, name).copy_(torch.tensor(metadata[name]).view(1, 3, 1, 1))
    return _load_timm(backbone, state, report)


def find_checkpoint(run: Path) -> Path:
    """Return the checkpoint that stands for a run: its best, else its last.

    Raises:
        UserError: The folder is not a run's or holds no checkpoint.
    """
    for name in ("best.ckpt", "last.ckpt"):
        if (run / name).is_file():
            return run / name
    raise UserError(f"{run} holds neither best.ckpt nor last.ckpt; give the folder of a run, such as runs/depth")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and what is known about them from a file, without ever running code from it.

    Returns:
        The tensors by name, and metadata: 'experiment' (a checkpoint of this package), 'backbone', 'mean', 'std'
        where the file says.

    Raises:
        UserError: The file is damaged, holds pickled code, or holds no tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
                return state, json.loads((file.metadata() or {}).get("mtl", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file ({error}); give another") from None
    checkpoint = load_checkpoint(path)
    experiment = checkpoint.get("experiment")
    metadata = {}
    if isinstance(experiment, Mapping) and "backbone" in experiment:
        metadata = {"experiment": experiment, "backbone": experiment["backbone"]}
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    state = {n: v for n, v in checkpoint.items() if isinstance(n, str) and isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors by name; give a checkpoint or a state dict")
    return state, metadata


def save_backbone(
    backbone: Backbone, path: Path, provenance: Mapping[str, Any], others: Mapping[str, Tensor] | None = None
) -> None:
    """Write a whole timm model in 16 bits under timm's own names, with its normalisation and where it came from.

    ``timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})`` takes nothing less; a model
    built for one size is to be told that of the backbone, as the file's metadata say ("arguments"), where timm cannot
    resample its positions. What the encoder lacks, such as a classifier, is as timm initialises it, the same in every
    file. Adapters are merged into the weights that they are beside.

    Args:
        backbone: The backbone.
        path: A file ending in .safetensors.
        provenance: What made it, as JSON can hold it.
        others: Tensors that the encoder lacks and that were trained all the same, such as the final norm of a plain
            vision transformer, by timm's names.

    Raises:
        UserError: timm's own model has no place for a tensor.
    """
    merged = merged_state(backbone)
    names = timm_names(backbone, merged)
    trained = {**{names[own]: tensor for own, tensor in merged.items()}, **(others or {})}
    whole = _initial_state(backbone)
    if misfits := [n for n, tensor in trained.items() if n not in whole or tensor.shape != whole[n].shape]:
        raise UserError(
            f"{path} cannot be written: timm's own {backbone.name} has no tensors {_some(misfits)} of these shapes; "
            "save another backbone"
        )
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in {**whole, **trained}.items()
    }
    about = {
        "backbone": backbone.name,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "arguments": backbone.size_arguments,
        "provenance": dict(provenance),
    }
    write_whole(path, save(state, metadata={"mtl": json.dumps(about)}))


def _initial_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the state of timm's whole model for this backbone's size, initialised the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = timm.create_model(backbone.name, pretrained=False, **backbone.size_arguments)
    return dict(model.state_dict())


_DAMAGED = "{} is truncated, damaged or not a checkpoint; give another, or train again"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a torch file of plain values and tensors onto the CPU.

    Raises:
        UserError: The file is missing, damaged, no checkpoint, or holds pickled code, which is never run.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about a pickle's protocol, right before refusing it
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # A file that is cut off at some lengths makes torch's reader seek to before its beginning.
        if error.errno != errno.EINVAL:
            reason = f"cannot be read ({error.strerror or error})"
            raise UserError(f"{path} {reason}; give another, or train again") from None
        raise UserError(_DAMAGED.format(path)) from None
    except Exception as error:  # noqa: BLE001  # on damaged bytes torch's reader raises almost anything
        if isinstance(error, pickle.UnpicklingError) and _holds_code(path, str(error)):
            raise UserError(
                f"{path} holds pickled code, which is never run; save its tensors alone, best as safetensors"
            ) from None
        raise UserError(_DAMAGED.format(path)) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; give another")
    return checkpoint


def _holds_code(path: Path, complaint: str) -> bool:
    """Return whether the unpickler refused a file for what it holds, rather than because it is damaged."""
    # A truncated archive is none: its directory is at the end. And torch writes no bare pickle of protocol 4 or 5.
    with path.open("rb") as file:
        bare = file.read(2) in (b"\x80\x04", b"\x80\x05")
    return bare or zipfile.is_zipfile(path) or bool(re.search("unsupported (global|class)", complaint, re.IGNORECASE))


def require(checkpoint: Mapping[str, Any], path: Path, *names: str) -> None:
    """Check that a checkpoint has what is about to be taken from it.

    Args:
        checkpoint: What `load_checkpoint` returned.
        path: Its file, for the message.
        names: Entries that must be there, such as 'state_dict'.

    Raises:
        UserError: An entry is missing.
    """
    if missing := [repr(name) for name in names if name not in checkpoint]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, which a run's checkpoint has: it was changed, or another program "
            "wrote it; give another, or train again"
        )


def load_weights(module: nn.Module, state_dict: Any, path: Path) -> None:
    """Load a checkpoint's weights into the module that it was made of, all or none.

    Args:
        module: The module, built with the experiment that the checkpoint holds.
        state_dict: What the checkpoint holds as such.
        path: The checkpoint's file, for the message.

    Raises:
        UserError: Tensors are missing, have another shape, or have no place in the module.
    """
    if not isinstance(state_dict, Mapping):
        raise UserError(f"{path} holds no tensors by name, but a {type(state_dict).__name__}; give another")
    wanted = module.state_dict()
    misfits = {
        "missing": [n for n in wanted if n not in state_dict],
        "of another shape": [n for n, v in wanted.items() if n in state_dict and _shape(state_dict[n]) != _shape(v)],
        "unknown": [str(n) for n in state_dict if n not in wanted],
    }
    if complaints := [f"{len(names)} {what} ({_some(names)})" for what, names in misfits.items() if names]:
        raise UserError(
            f"{path} does not fit the model of its own experiment, which has {len(wanted)} tensors: "
            f"{', '.join(complaints)}; it was changed, or another version wrote it, so give another or train again"
        )
    module.load_state_dict(state_dict)


def _shape(value: Any) -> Any:
    """Return a tensor's shape; a module may keep other values beside its tensors, which have none."""
    return getattr(value, "shape", None)


def timm_names(backbone: Backbone, own: Iterable[str]) -> dict[str, str]:
    """Return timm's own name for each of a backbone's tensors, given their names in the encoder.

    Raises:
        UserError: timm's own model has no such tensor.
    """
    known = full_model(backbone.name).state_dict().keys()
    names = {}
    for tensor in own:
        match = timm_name(tensor, known)
        if match is None:
            raise UserError(f"{backbone.name}: timm's own model has no tensor for {tensor!r}; use --init none")
        names[tensor] = match
    return names


def _load_timm(backbone: Backbone, state: dict[str, Tensor], report: Report) -> Report:
    """Load a state dict that carries timm's own names."""
    wanted = backbone.encoder.state_dict()
    names = timm_names(backbone, wanted)
    if any(n in state and state[n].shape != wanted[own].shape for own, n in names.items()):
        state = _fit_shapes(backbone, state, report)
    missing = [n for n in names.values() if n not in state]
    wrong = [n for own, n in names.items() if n in state and state[n].shape != wanted[own].shape]
    if missing or wrong:
        what = (
            f"{len(missing)} of {len(names)} tensors are missing ({_some(missing)})"
            if missing
            else (f"{len(wrong)} of {len(names)} tensors have another shape ({_some(wrong)})")
        )
        raise UserError(f"{report.source} does not fit backbone {backbone.name}: {what}; give weights of that model")
    backbone.encoder.load_state_dict({own: state[n].float() for own, n in names.items()})
    report.loaded = len(names)
    report.left_out = sorted(set(state) - set(names.values()))
    return report


def _fit_shapes(backbone: Backbone, state: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Let timm's own filter for the architecture resample position embeddings and the like."""
    full = timm.create_model(backbone.name, pretrained=False, **backbone.size_arguments)
    filter_function = getattr(importlib.import_module(type(full).__module__), "checkpoint_filter_fn", None)
    if filter_function is None:
        return state
    try:
        fitted: dict[str, Tensor] = filter_function(dict(state), full)
    except Exception:  # noqa: BLE001  # a filter may assume that the file is of this very architecture
        return state
    report.reshaped = [n for n, v in fitted.items() if n in state and v.shape != state[n].shape]
    return fitted


def _load_own(model: MultiTaskModel, state: dict[str, Tensor], report: Report, experiment: Mapping[str, Any]) -> Report:
    """Load a checkpoint of this package: the backbone, its adapters merged, and the heads of tasks that both have."""
    prefix = "model.backbone."
    backbone = merge({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    wanted = model.backbone.state_dict()
    misfits = [n for n in wanted if n not in backbone or backbone[n].shape != wanted[n].shape]
    if misfits:
        raise UserError(
            f"{report.source} does not fit backbone {model.backbone.name}: {len(misfits)} of {len(wanted)} tensors are "
            f"missing or have another shape ({_some(misfits)}); use the --backbone and --data.size it was trained with"
        )
    model.backbone.load_state_dict({n: backbone[n] for n in wanted})
    report.loaded = len(wanted)
    for task, (inside, head) in model.parts.items():
        prefix = f"model.{inside}."
        kept = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        own = head.state_dict()
        if task == "masked" and experiment.get("mask", {}).get("target") != head.target:
            continue  # of the same shape, and it predicts something else
        if kept.keys() == own.keys() and all(kept[n].shape == own[n].shape for n in own):
            head.load_state_dict(kept)
            report.heads.append(task)
            report.new_heads.remove(task)
    used = ("model.backbone.", *(f"model.{model.parts[task][0]}." for task in report.heads))
    report.left_out = sorted(n for n in state if n.startswith("model.") and not n.startswith(used))
    return report


def _download(backbone: Backbone) -> dict[str, Tensor]:
    config = timm.get_pretrained_cfg(backbone.name)
    if not config.has_weights:
        raise UserError(
            f"--init imagenet: timm has no weights of {backbone.name}; give a file with --init PATH, or use --init none"
        )
    try:
        if config.hf_hub_id:
            # Where there is no network this fails at once, while the call that timm makes retries for a minute.
            snapshot_download(config.hf_hub_id, allow_patterns="model.safetensors")
        return dict(timm.create_model(backbone.name, pretrained=True).state_dict())
    except Exception as error:  # noqa: BLE001  # hub clients raise whatever their transport raises
        raise UserError(
            f"--init imagenet: weights of {backbone.name} cannot be fetched ({type(error).__name__}); "
            "connect to the hub, give a file with --init PATH, or use --init shipped or none"
        ) from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
