"""What an optimizer holds, in groups with a learning rate and a weight decay each."""

from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from mtl.models.backbone import Backbone
from mtl.models.signals import SignalBackbone
from mtl.transfer.layers import find_layers, full_model, timm_name


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr: float = 1.0,
    backbone_lr: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer of all that learns, each with its own ``lr`` (no scale beside it).

    Without decay of weights are norms and biases, which have at most one axis, and what the backbone's
    ``no_weight_decay()`` names, such as position embeddings and class tokens.

    With `layer_decay` d, layer i of the backbone's L + 1 (0 is the stem) learns at ``backbone_lr * d ** (L + 1 - i)``:
    the last block at d, the stem at d^(L + 1), the heads without a factor. That is the rule of BEiT (Bao et al., 2022)
    and MAE (He et al., 2022, `lr_decay.py`), and of timm's ``param_groups_layer_decay`` for a whole model, whose
    classifier is its last layer. The layers are timm's own.

    Args:
        module: What learns, with a `Backbone` or a `SignalBackbone` somewhere in it.
        weight_decay: Decay of weights.
        lr: Learning rate of all that is not the backbone.
        backbone_lr: Learning rate of the backbone; None is `lr`.
        layer_decay: Factor from each layer of the backbone to the one before it; None or 1 treats all alike.

    Returns:
        Groups in an order that only these arguments and the module's structure decide: heads first, then the backbone
        from its stem on, weights with decay before those without, empty ones left out. Where the backbone learns as
        the heads do they share groups. ``name`` says what a group is, such as ``backbone/layer 3``.

    Raises:
        UserError: `layer_decay` is given, and timm does not say which layers the backbone has.
    """
    backbone = next((m for m in module.modules() if isinstance(m, Backbone | SignalBackbone)), None)
    if backbone is None or (backbone_lr is None and layer_decay is None):
        places = {"all": (lr, list(module.parameters()))}
    else:
        inside = {id(p) for p in backbone.parameters()}
        places = {"heads": (lr, [p for p in module.parameters() if id(p) not in inside])}
        places |= _backbone_places(backbone, lr if backbone_lr is None else backbone_lr, layer_decay)
    undecayed = _undecayed(backbone) if isinstance(backbone, Backbone) else set()
    groups = []
    for name, (rate, parameters) in places.items():
        learning = [p for p in parameters if p.requires_grad]
        weights = [p for p in learning if p.dim() > 1 and id(p) not in undecayed]
        others = [p for p in learning if p.dim() <= 1 or id(p) in undecayed]
        groups.append({"name": name, "params": weights, "lr": rate, "weight_decay": weight_decay})
        groups.append({"name": f"{name}/no decay", "params": others, "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _backbone_places(
    backbone: Backbone | SignalBackbone, lr: float, layer_decay: float | None
) -> dict[str, tuple[float, list[nn.Parameter]]]:
    """Return the learning rate and the parameters of the backbone's parts, from the stem on."""
    if layer_decay is None or isinstance(backbone, SignalBackbone):
        return {"backbone": (lr, list(backbone.parameters()))}
    layers = find_layers(backbone.name, backbone.encoder)
    count = 1 + max(layers.values())
    places: dict[str, tuple[float, list[nn.Parameter]]] = {
        f"backbone/layer {i}": (lr * layer_decay ** (count - i), []) for i in range(count)
    }
    for name, parameter in backbone.encoder.named_parameters():
        places[f"backbone/layer {layers[name]}"][1].append(parameter)
    return places


def _undecayed(backbone: Backbone) -> set[int]:
    """Return the identities of what the backbone's own timm model names as without weight decay."""
    full = full_model(backbone.name)
    patterns = full.no_weight_decay() if hasattr(full, "no_weight_decay") else ()
    known = {name for name, _ in full.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)}
    encoder: dict[str, Tensor] = dict(backbone.encoder.named_parameters())
    return {id(parameter) for name, parameter in encoder.items() if timm_name(name, known) is not None}
