"""Positions of random elements in a plan: torch.sort and its like return them beside the values, and what uses them is
refused when a model is converted.

Note [Where a random element lies]
The values of a sort are uncertain like any other; where they lay before is a random whole number, which has no moments
that mean anything downstream: indexing with it jumps. What does not read it (``x.sort().values``, ``values, _ =
x.topk(3)``) is as good as without it.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from adfify import inplace, locations
from adfify.arguments import Call
from adfify.registry import Rule

_NO_MOMENTS = "where a random element lies is random as well, and has no mean and variance"
_INDEXING = f"{_NO_MOMENTS}; use the values alone (amax, sort().values), or take positions of a certain tensor"
_MODE = "which value is the most frequent of continuous random ones means nothing; use the median or the mean"
_COUNTED = "it counts random values, and counts jump; use means, or a smooth kernel of your own with a rule"
_SKIPPED = "which elements it skips is not known of uncertain ones; use median, amax or kthvalue of what has no NaN"

REASONS: dict[Any, str] = {
    ".indices": _INDEXING,
    **dict.fromkeys((torch.mode, "mode"), _MODE),
    **dict.fromkeys((torch.histc, torch.bincount, torch.histogram), _COUNTED),
    **dict.fromkeys(("histc", "bincount", "histogram"), _COUNTED),
    **dict.fromkeys((torch._unique2, torch.unique_consecutive, "unique_consecutive"), _COUNTED),
    **dict.fromkeys((torch.nanmedian, torch.nanquantile, "nanmedian", "nanquantile"), _SKIPPED),
}
"""Why an operation on the order of elements has no rule, where that can be said."""


def misuse(node: fx.Node, rule: Rule, call: Call, live: Set[fx.Node]) -> str:
    """Why what a node returns, values and positions, can't be used as it is used, or ``""``.

    Args:
        node: of the traced graph.
        rule: that it follows.
        call: of the rule.
        live: the nodes that an output depends on.
    """
    if not _returns_positions(node, rule, call):
        return ""
    for user in node.users:
        part = _part(user, node)
        if user not in live or part == "values":
            continue
        if part == "positions":
            readers = [reader for reader in user.users if reader in live]
            return f"the positions that it returns are used, {_by(readers)}, and {_NO_MOMENTS}; use its values only"
        return (
            f"what it returns is used whole, {_by([user])}, with positions in it, and {_NO_MOMENTS}; "
            "use its values only: .values, or [0]"
        )
    return ""


def _returns_positions(node: fx.Node, rule: Rule, call: Call) -> bool:
    """Whether it returns positions beside values: torch.max does so along a dimension alone."""
    returned = str(rule.signature.return_annotation)
    if "Moments | Chosen" not in returned:
        return "Chosen" in returned or "Positions" in returned
    known = node.meta.get("val")
    if known is not None:
        return isinstance(known, (tuple, list))
    given = rule.signature.bind(*call.args, **call.kwargs).arguments
    dim = given.get("dim")
    return isinstance(dim, int) or (isinstance(dim, fx.Node) and inplace.is_number(dim))


def _part(user: fx.Node, node: fx.Node) -> str:
    """What a user takes of values and positions: one of the two, or both."""
    if user.target is getattr:
        return {"values": "values", "indices": "positions"}.get(str(user.args[1]), "both")
    if user.target is operator.getitem and user.args[0] is node:
        index = user.args[1]
        return "values" if index in (0, -2) else "positions" if index in (1, -1) else "both"
    return "both"


def _by(readers: list[fx.Node]) -> str:
    """Where they are used: ``by gather (model.py:12)``, or ``as an output``."""
    reader = readers[0] if readers else None
    if reader is None or reader.op == "output":
        return "as an output"
    name = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", str(reader.target))
    line = locations.source_line(reader)
    return f"by {name}" + (f" ({line})" if line else "")
