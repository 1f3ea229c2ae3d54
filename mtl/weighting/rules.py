"""The rules by the names of ``--weighting``, and how one is made of its options."""

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mtl import registry
from mtl.errors import UserError, nearest
from mtl.weighting.aligned_mtl import AlignedMTL
from mtl.weighting.base import Weighting
from mtl.weighting.cagrad import CAGrad
from mtl.weighting.conflict_free import ConFIG
from mtl.weighting.db_mtl import DBMTL
from mtl.weighting.dualproj import DualProj
from mtl.weighting.dwa import DWA
from mtl.weighting.equal import Equal
from mtl.weighting.fairgrad import FairGrad
from mtl.weighting.famo import FAMO
from mtl.weighting.fixed import Fixed
from mtl.weighting.geometric import Geometric
from mtl.weighting.gradnorm import GradNorm
from mtl.weighting.gradvac import GradVac
from mtl.weighting.imtl_g import IMTLG
from mtl.weighting.imtl_l import IMTLL
from mtl.weighting.log import LogSum
from mtl.weighting.mgda import MGDA
from mtl.weighting.nash_mtl import NashMTL
from mtl.weighting.pcgrad import PCGrad
from mtl.weighting.random import RandomWeights
from mtl.weighting.stch import STCH
from mtl.weighting.uncertainty import Uncertainty
from mtl.weighting.upgrad import UPGrad

RULES: dict[str, type[Weighting]] = {
    "fixed": Fixed,
    "equal": Equal,
    "uncertainty": Uncertainty,
    "log": LogSum,
    "dwa": DWA,
    "random": RandomWeights,
    "geometric": Geometric,
    "imtl-l": IMTLL,
    "famo": FAMO,
    "stch": STCH,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "imtl-g": IMTLG,
    "nash-mtl": NashMTL,
    "aligned-mtl": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "fairgrad": FairGrad,
    "config": ConFIG,
    "gradnorm": GradNorm,
    "db-mtl": DBMTL,
}
assert tuple(RULES) == registry.WEIGHTINGS


def make_rule(name: str, tasks: Mapping[str, str], options: Mapping[str, Any], seed: int = 0) -> Weighting:
    """Return a rule.

    Args:
        name: The rule's name.
        tasks: Each task's likelihood by its name.
        options: The rule's own options by name.
        seed: Decides a randomised rule's draws.

    Raises:
        UserError: The rule has no such option, or does not allow its value.
    """
    kind = RULES.get(name) or registry.weightings[name]
    rule = kind(tasks, **{option: _value(name, kind, option, value) for option, value in options.items()})
    rule.seed = seed
    return rule


def options_of(kind: type[Weighting]) -> dict[str, inspect.Parameter]:
    """Return a rule's own options: what its constructor takes beside the tasks."""
    return dict(list(inspect.signature(kind).parameters.items())[1:])


def _value(name: str, kind: type[Weighting], option: str, value: Any) -> Any:
    """Return an option's value in the type that the rule wants."""
    options = options_of(kind)
    if option not in options:
        there = f"it has {', '.join(options)}" if options else "it has none"
        raise UserError(f"--weighting-options: the rule {name!r} has no {option!r}{nearest(option, options)}; {there}")
    wanted = get_type_hints(kind.__init__).get(option, Any)
    try:
        # What looks like a number was read as one, and is a word to a rule that wants words.
        return TypeAdapter(wanted, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except ValidationError as error:
        should = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        raise UserError(f"--weighting-options {option}={value} of the rule {name!r} should be {should}") from None
