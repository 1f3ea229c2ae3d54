"""Copies of module trees for a single pass, with switches and hooks of their own."""

from types import MethodType
from typing import TypeVar, cast

from torch import nn

Tree = TypeVar("Tree", bound=nn.Module)


def twin(module: Tree, twins: dict[nn.Module, nn.Module] | None = None) -> Tree:
    """Return a copy of a module tree with hooks of its own, whose parameters, buffers and all else are the module's.

    It lives as long as the graph of a pass through it, so that gradient checkpointing computes its parts anew as they
    were in that pass, whatever has become of the module. It is not compiled.

    Args:
        module: Root of the tree.
        twins: Those of the modules met so far, which are added to, a parent before its children: a module may be in
            several places.
    """
    twins = {} if twins is None else twins
    if module not in twins:
        copy = twins[module] = module.__new__(type(module))
        for name, value in module.__dict__.items():
            # Some choose among their methods once, and keep the one chosen.
            own = isinstance(value, MethodType) and value.__self__ is module
            copy.__dict__[name] = MethodType(value.__func__, copy) if own else value
        copy.__dict__.update(
            _forward_pre_hooks=module._forward_pre_hooks.copy(),
            _forward_hooks=module._forward_hooks.copy(),
            # A program compiled without these hooks would go on without them.
            _compiled_call_impl=None,
            _modules={name: child and twin(child, twins) for name, child in module._modules.items()},
        )
    return cast(Tree, twins[module])
