"""Explicit regularization: what a loss adds for its weights alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.transfer.groups import parameter_groups


def counted_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name the learning weights that regularization counts: those with a decay in `parameter_groups`.

    So norms, biases and what timm names as without decay are left out.

    Args:
        module: What learns.
    """
    groups = parameter_groups(module, weight_decay=1.0)
    counted = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in counted}


class Penalties(nn.Module):
    """λ₂ ‖φ‖² + λ₁ ‖φ‖₁ over the weights φ of a module, or the distance from where some of them started.

    Each is the negative logarithm of a prior, so that the least sum of loss and penalty is the maximum a posteriori
    where the loss is the negative log-likelihood of all samples. Where it is the mean over N samples, as in training,
    N λ takes the place of λ in what follows:

    ============ ==================== ==========================================================================
    `l2`         λ ‖φ‖²               Gaussian prior of variance σ² = 1 / (2 λ) about 0 (ridge; Hoerl & Kennard 1970)
    `l1`         λ ‖φ‖₁               Laplace prior of scale 1 / λ about 0 (lasso; Tibshirani 1996)
    both         the sum              elastic net (Zou & Hastie 2005)
    `l2_sp`      λ ‖φ - φ⁰‖²          Gaussian prior of variance 1 / (2 λ) about the start φ⁰
    ============ ==================== ==========================================================================

    λ ‖φ‖² has the gradient 2 λ φ: it is what SGD calls a ``weight_decay`` of 2 λ. It is not AdamW's, which shrinks
    weights beside the adaptive step (Loshchilov & Hutter 2019), while this gradient is rescaled with the loss's own.
    The gradient of λ ‖φ‖₁ is λ sign(φ): weights come within a step of 0 and stay there, but are seldom exactly 0.

    L2-SP is for transfer (Li et al. 2018, "Explicit inductive bias for transfer learning with convolutional
    networks", equation 3): pretrained weights are drawn to their start in place of zero, so the other two count
    only what is new, such as heads. The paper's α/2 and β/2 are `l2_sp` and `l2`.

    The start is as many buffers as there are pretrained weights, whether or not they learn yet: memory grows by these
    weights once. They are no part of the state dict, which is that of a model without penalties: a checkpoint from
    which training is to go on holds `starts` beside it.

    Args:
        module: What learns; it does not become a part of this one. Its pretrained weights have been loaded.
        l2: λ of ‖φ‖², not negative.
        l1: λ of ‖φ‖₁, not negative.
        l2_sp: λ of ‖φ - φ⁰‖², not negative.
        pretrained: The part of `module` that does not start at random, needed for `l2_sp`.

    Attributes:
        names: The weights that count, by their names in `module`.

    Raises:
        UserError: There is nothing that the penalty could act on.
    """

    def __init__(
        self,
        module: nn.Module,
        l2: float = 0.0,
        l1: float = 0.0,
        l2_sp: float = 0.0,
        pretrained: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.l2, self.l1, self.l2_sp = l2, l1, l2_sp
        self._of = (module,)  # in a tuple, which hides it from state dicts
        self._starts: dict[str, str] = {}
        if l2_sp > 0:
            inside = set() if pretrained is None else {id(p) for p in pretrained.parameters() if p.dim() > 1}
            for name, parameter in module.named_parameters():
                if id(parameter) in inside:
                    self._starts[name] = f"start/{name}".replace(".", "/")
                    self.register_buffer(self._starts[name], parameter.detach().clone(), persistent=False)
        self.choose()

    def starts(self) -> dict[str, Tensor]:
        """Return by name where the pretrained weights started."""
        return {name: self.get_buffer(buffer) for name, buffer in self._starts.items()}

    def start_at(self, starts: Mapping[str, Tensor]) -> None:
        """Draw weights to where they started in another process, see `starts`."""
        for name, start in self.starts().items():
            start.copy_(starts[name])

    def choose(self) -> None:
        """Take up which weights learn now; to be called again after a thaw.

        Raises:
            UserError: There is nothing that the penalty could act on.
        """
        self.names = tuple(counted_weights(self._of[0]))
        if not self.names:
            raise UserError(
                "a penalty on weights has nothing to act on, as no weight learns: set it to 0, or freeze less"
            )
        if self.l2_sp > 0 and not self._starts.keys() & set(self.names):
            raise UserError(
                "the penalty l2-sp has nothing to act on, as no pretrained weight learns: "
                "set it to 0, or let a pretrained backbone learn"
            )

    def forward(self) -> Tensor:
        """Return the penalty, a scalar in single precision at least, with its gradient."""
        return torch.stack(list(self.each().values())).sum()

    def each(self) -> dict[str, Tensor]:
        """Return what the penalty is the sum of, by the names of those that are not 0."""
        parameters = dict(self._of[0].named_parameters())
        terms: dict[str, list[Tensor]] = {name: [] for name in ("l2", "l1", "l2_sp") if getattr(self, name) > 0}
        for name in self.names:
            parameter = parameters[name]
            weight = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            if name in self._starts:
                terms["l2_sp"].append(self.l2_sp * (weight - self.get_buffer(self._starts[name])).square().sum())
                continue
            if self.l2 > 0:
                terms["l2"].append(self.l2 * weight.square().sum())
            if self.l1 > 0:
                terms["l1"].append(self.l1 * weight.abs().sum())
        # Where all that learns is drawn to its start, nothing is left to the other two.
        return {name: torch.stack(of_weights).sum() for name, of_weights in terms.items() if of_weights}
