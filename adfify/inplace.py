"""Which operations of a traced graph write into their input, and what shares memory with it.

Note [In-place operations]
A rule never writes into its input. Where the original does, every later reader of that input must see the
result, so those readers are pointed at it (by adfify.graph). What can't be expressed so, a write through a view
of a tensor that is read afterwards, or into a buffer of the model, is reported as missing rather than computed wrongly.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from adfify.registry import Rules, Target


def target_of(node: fx.Node, root: nn.Module) -> Target:
    """What the registry knows a node by."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target)))
    if node.target is getattr:
        return f".{node.args[1]}"
    return node.target


def written_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The node into whose tensor this one writes, if it does."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return None
    if node.op == "call_module":
        writes = getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    elif node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        writes = _function_writes(node)
    else:
        return None
    return node.args[0] if writes else None


def aliases(written: fx.Node, root: nn.Module, rules: Rules) -> set[fx.Node]:
    """Nodes that may share the memory of ``written``, itself left out."""

    def shares(node: fx.Node) -> fx.Node | None:
        """The node of whose memory ``node`` may be a view."""
        if node.op not in ("call_function", "call_method", "call_module") or not node.args:
            return None
        if written_by(node, root) is not None:
            return None
        rule = rules.find(target_of(node, root))
        source = next((value for value in node.args if isinstance(value, fx.Node)), None)
        # What has no rule stays as it is, and may be a view for all that is known (as_strided, .data).
        return source if rule is None or rule.alias else None

    base = written
    while (source := shares(base)) is not None:
        base = source
    group, queue = {base}, [base]
    while queue:
        current = queue.pop()
        new = [user for user in current.users if user not in group and shares(user) is current]
        group.update(new)
        queue += new
    return group - {written}


def iadd(a: Any, b: Any) -> Any:
    """`a += b`, for what stays as it is."""
    a += b
    return a


def isub(a: Any, b: Any) -> Any:
    """`a -= b`, likewise."""
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:
    """`a *= b`, likewise."""
    a *= b
    return a


def itruediv(a: Any, b: Any) -> Any:
    """`a /= b`, likewise."""
    a /= b
    return a


# torch.fx writes operator.iadd as `a += b` into its code, which changes a number under all its names; these do not.
KEPT: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: iadd,
    operator.isub: isub,
    operator.imul: imul,
    operator.itruediv: itruediv,
}

_INPLACE_OPERATORS: frozenset[Callable[..., object]] = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
)


def _function_writes(node: fx.Node) -> bool:
    function = node.target
    assert callable(function)
    if isinstance(function, torch._ops.OpOverload):
        written = function._schema.arguments[0].alias_info
        return written is not None and written.is_write
    name = getattr(function, "__name__", "")
    if function in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.kwargs.get("inplace") is True:
        return True
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature has no `inplace` argument either
        return False
    if "inplace" not in parameters:
        return False
    position = parameters.index("inplace")
    return len(node.args) > position and node.args[position] is True
