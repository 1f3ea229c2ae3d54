"""Low-rank adapters: a transformer's own weights stay, and small matrices beside them learn (Hu et al., 2022)."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.models.backbone import Backbone

_ATTENTION = ("qkv", "qk", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "proj")


class Adapters(NamedTuple):
    """Where a backbone's adapters are.

    Attributes:
        layers: Names in the encoder of the linear layers that have one.
        left_out: Names of those in attention and MLPs that have none, as the maps come about without calling them.
    """

    layers: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        said = f"adapters beside {len(self.layers)} linear layers of the backbone"
        if not self.left_out:
            return said
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in self.left_out}))
        return f"{said}; none beside {len(self.left_out)} ({kinds}) that are not called for its maps"


def add_lora(backbone: Backbone, rank: int) -> Adapters:
    """Let low-rank adapters learn in a transformer backbone, and nothing else in it.

    Each linear layer of the blocks' attention and MLPs, W x + b, becomes (W + B A) x + b with A (rank, in) drawn at
    random and B (out, rank) zero, so that nothing changes before the first step. peft's ``lora_alpha`` is the rank,
    which makes its scale 1. Some of timm's attention modules read a layer's weight and never call the layer (BEiT,
    EVA and Swin V2 at queries, keys and values), where an adapter would change nothing in silence: one image of
    zeros shows which layers are called, and only those have an adapter.

    Dropout and drop-path go on in training. Normalisation with running statistics, which hybrids have, stays in
    evaluation mode, as the statistics belong to the weights that stay.

    Args:
        backbone: A backbone with its initial weights, not frozen.
        rank: Rank of the adapters.

    Raises:
        UserError: The package peft is missing, the backbone has no attention that adapters can learn in, or the
            rank is above that of every weight.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--lora needs the package peft, which is not installed: pip install peft") from None
    candidates = _linear_layers(backbone.encoder)
    called = _called(backbone, candidates)
    adapters = Adapters([n for n in candidates if n in called], [n for n in candidates if n not in called])
    if not adapters.layers:
        raise UserError(
            f"--lora {rank}: {backbone.name} has no transformer blocks with linear layers that adapters can learn in; "
            "choose a transformer such as vit_small_patch16_224, or leave --lora out"
        )
    # B A of this rank can be any matrix of the weight's shape: beyond it there is nothing more to learn.
    full = max(min(backbone.encoder.get_submodule(name).weight.shape) for name in adapters.layers)
    if rank > full:
        raise UserError(
            f"--lora {rank}: the largest rank that a weight in {backbone.name} can have is {full}; 4 to 32 is usual, "
            "or leave --lora out to train the weights themselves"
        )
    backbone.requires_grad_(False)
    pattern = "|".join(re.escape(name) for name in adapters.layers)  # peft matches a string as a whole
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), backbone.encoder)
    backbone.keep_in_evaluation(m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return adapters


def merged_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the state of a backbone's encoder as it is without adapters, W + B A in the place of W."""
    return merge(backbone.encoder.state_dict())


def merge(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without adapters, W + B A in the place of each weight W that has one.

    The sum is computed in single precision. A weight of which half the adapter is missing, in a file that somebody
    has changed, is left out.

    Args:
        state: Tensors by name, as `add_lora` names them; without any adapter it is returned as it is.
    """
    merged = {}
    for name, tensor in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, base, parameter = name.rpartition(".base_layer.")
        if base and parameter == "weight":
            down, up = (state.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
            if down is None or up is None:
                continue
            tensor = (tensor.float() + up.float() @ down.float()).to(tensor.dtype)
        merged[f"{layer}.{parameter}" if base else name] = tensor
    return merged


def _linear_layers(encoder: nn.Module) -> list[str]:
    """Return the names of the linear layers of each attention, and of the MLP beside it in the same block."""
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    owned: dict[str, set[str]] = {}
    for name in linear:
        owner, _, own = name.rpartition(".")
        owned.setdefault(owner, set()).add(own)
    attention = {owner for owner, own in owned.items() if "proj" in own and own & {"qkv", "qk", "q", "q_proj"}}
    blocks = {owner.rpartition(".")[0] for owner in attention}
    chosen = []
    for name in linear:
        owner, _, own = name.rpartition(".")
        block, _, part = owner.rpartition(".")
        if (owner in attention and own in _ATTENTION) or (block in blocks and part.startswith("mlp")):
            chosen.append(name)
    return chosen


def _called(backbone: Backbone, names: list[str]) -> set[str]:
    """Return which of an encoder's modules are called for an image."""
    called: set[str] = set()
    hooks = [
        backbone.encoder.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in names
    ]
    training = backbone.training
    with torch.no_grad():
        backbone.eval()(backbone.mean.new_zeros(1, 3, *backbone.size))
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    return called
