"""Which operations of a traced graph draw random numbers.

Note [Random numbers drawn in forward]
What draws random numbers is never certain, although no uncertain value comes in: kept as it is, `torch.randn` gave a
network whose mean differed from call to call and whose variance lacked the noise's. torch marks such operations by a
tag of their schema. What is written in Python (F.gumbel_softmax) is known by the names of torch's that its code calls.
Draws without a rule are reported as missing. Noise that is given as an input, `Moments(zeros, ones)`, is propagated.
"""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from adfify import inplace

REASON = (
    "it draws random numbers, anew in every call; make the noise an input of forward, forward(self, x, noise), and "
    "give it as Moments(mean, variance), or register a rule for it"
)


def tagged(name: str) -> bool:
    """Whether torch's operation of this name draws random numbers."""
    packet: Any = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()  # type: ignore[no-untyped-call]
    )


def overwrites(name: str) -> bool:
    """Whether a method fills its tensor with random numbers, whatever was in it."""
    return name.endswith("_") and tagged(name) and "drop" not in name and "rrelu" not in name


def draws(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node of a traced graph draws random numbers, with the arguments that it has."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        rates = [getattr(module, name) for name in ("p", "dropout", "drop_prob") if hasattr(module, name)]
        return module.training and rates != [0] * (len(rates) or 1) and _code_draws(type(module).forward, 3)
    if node.op not in ("call_function", "call_method") or _is_off(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    name = inplace.aten_name(node)
    return tagged(name) or (isinstance(node.target, FunctionType) and _code_draws(node.target, 2))


_SWITCHES = ("training", "train")
_RATES = ("p", "dropout", "dropout_p")


def _is_off(node: fx.Node) -> bool:
    """Whether its arguments say that nothing is drawn: training=False, a rate of 0."""
    given = _given(node)
    if any(given.get(name) is False for name in _SWITCHES):
        return True
    rates = [given[name] for name in _RATES if name in given]
    return bool(rates) and all(isinstance(rate, int | float) and rate == 0 for rate in rates)


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, defaults included, as far as that is known."""
    known: dict[str, Any] = {}
    if isinstance(node.target, FunctionType):
        parameters = list(inspect.signature(node.target).parameters.values())
        known = {p.name: p.default for p in parameters if p.default is not p.empty}
        known.update(zip([p.name for p in parameters], node.args, strict=False))
    elif found := inplace.schemas(node):
        fitting = [schema for schema in found if len(schema.arguments) >= len(node.args)] or list(found)
        known = {a.name: a.default_value for a in fitting[0].arguments if a.has_default_value()}
        known.update(zip([a.name for a in fitting[0].arguments], node.args, strict=False))
    return {**known, **node.kwargs}


def _code_draws(function: Any, depth: int) -> bool:
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    if any(tagged(name) for name in code.co_names):
        return True
    called = [getattr(functional, name, None) for name in code.co_names]
    return depth > 0 and any(isinstance(one, FunctionType) and _code_draws(one, depth - 1) for one in called)
