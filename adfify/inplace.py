"""What an operation of a traced graph does to memory: which argument it writes into, and of what its result is a view.

Known from the operation's own schema where it has one, from its name where torch's convention says it (``add_``),
and from its rule's ``alias`` for functions and modules written in Python. What is not known may be a view.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional

from adfify.registry import Rules, Target

Kinship = Literal["fresh", "view", "perhaps a view"]

INPLACE_OPERATORS: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""What writes into a tensor, and makes a new number of a number: with the operator that makes a new one of both."""

# Views whatever the layout in memory, in terms of elements and not of addresses: as_strided is none of them.
VIEWS = frozenset(
    {
        "adjoint",
        "alias",
        "chunk",
        "detach",
        "diagonal",
        "dsplit",
        "expand",
        "expand_as",
        "hsplit",
        "mH",
        "mT",
        "moveaxis",
        "movedim",
        "narrow",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "T",
        "H",
        "tensor_split",
        "transpose",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "view_as_complex",
        "view_as_real",
        "vsplit",
        "data",
        "real",
        "imag",
        "requires_grad_",
        "detach_",
    }
)

# These may return what they are given, and their schemas do not say so.
_PERHAPS = frozenset(
    {"broadcast_tensors", "meshgrid", "einsum", "sum_to_size", "atleast_1d", "atleast_2d", "atleast_3d"}
)

_TENSOR_ATTRIBUTES = frozenset({"T", "H", "mT", "mH", "data", "real", "imag"})


def target_of(node: fx.Node, root: nn.Module) -> Target:
    """What the registry knows a node by."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target)))
    if node.target is getattr:
        return f".{node.args[1]}"
    return node.target


def aten_name(node: fx.Node) -> str:
    """The name of torch's own operation that a node calls, ``""`` if it is none of torch's."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::") if target.namespace == "aten" else ""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target.__name__ if str(target).startswith("aten.") else ""
    name = getattr(target, "__name__", "")
    homes = (torch, torch._C._nn, functional, torch.Tensor)
    return name if node.op == "call_function" and any(getattr(home, name, None) is target for home in homes) else ""


def schemas(node: fx.Node) -> Sequence[torch.FunctionSchema]:
    """The schemas of which a node's operation has one; none for what is written in Python."""
    if isinstance(node.target, torch._ops.OpOverload):
        return [node.target._schema]
    packet: Any = node.target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        packet = getattr(torch.ops.aten, aten_name(node) or "-", None)
    known = isinstance(packet, torch._ops.OpOverloadPacket)
    return [] if not known else [getattr(packet, name)._schema for name in packet.overloads()]


def argument(node: fx.Node, position: int, *names: str) -> Any:
    """An argument of a node, given by position or by one of the names; None if it is not given."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def written_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The node into whose tensor this one writes, if it does: its first argument, for all that adfify follows."""
    first = argument(node, 0, "input", "self")
    return first if isinstance(first, fx.Node) and _writes_first(node, root) else None


def writes_otherwise(node: fx.Node, root: nn.Module) -> bool:
    """Whether it writes into anything but its first argument: ``out=`` apart, adfify can't follow that."""
    first = argument(node, 0, "input", "self")
    if isinstance(first, (list, tuple)):
        return node.op != "call_module" and _writes_first(node, root)
    found = [s for s in schemas(node) if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)]
    for schema in found:
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write and not a.is_out]
        others = written if not schema.arguments or written != [schema.arguments[0]] else []
        # A result that is not what was written would be lost.
        if others or (written and schema.returns and not _is_alias(schema.returns[0], write=True)):
            return True
    return False


def without_out(target: Any) -> Any:
    """The operation that returns what one with ``out=`` writes."""
    if not isinstance(target, torch._ops.OpOverload):
        return target
    asked = _arguments(target)
    overloads = (getattr(target.overloadpacket, name) for name in target.overloadpacket.overloads())
    return next((one for one in overloads if one is not target and _arguments(one) == asked), target)


def _arguments(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments if not argument.is_out]


def _writes_first(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    if node.op == "call_method":
        return _named_in_place(str(node.target))
    return node.op == "call_function" and _function_writes(node)


# These change a tensor, but none of its elements.
_FLAGGING = frozenset({"requires_grad_", "share_memory_", "detach_", "rename_"})


def _named_in_place(name: str) -> bool:
    return name not in _FLAGGING and name.endswith("_") and not name.endswith("__")


def _is_torch_s(function: Any) -> bool:
    """Whether torch's convention holds for its name: a user's own function `relu_` may do anything."""
    return (getattr(function, "__module__", None) or "torch").split(".")[0] in ("torch", "_operator")


def perhaps_writes(node: fx.Node, root: nn.Module, rules: Rules) -> bool:
    """Whether a user's own function is named as if it wrote, and what it would have written may be read elsewhere."""
    first = argument(node, 0, "input", "self")
    if node.op != "call_function" or not isinstance(first, fx.Node) or _function_writes(node):
        return False
    if not _named_in_place(getattr(node.target, "__name__", "")) or schemas(node):
        return False
    own = first.op == "placeholder" or (first.op.startswith("call_") and kinship(first, root, rules) == "fresh")
    return len(first.users) > 1 or not own


def _function_writes(node: fx.Node) -> bool:
    function = node.target
    assert callable(function)
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        firsts = [schema.arguments[0] for schema in schemas(node) if schema.arguments]
        return bool(firsts) and all(_is_alias(first, write=True) for first in firsts)
    if function in INPLACE_OPERATORS or function is operator.setitem:
        return True
    if _named_in_place(getattr(function, "__name__", "")) and _is_torch_s(function):
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


def _is_alias(value: Any, write: bool) -> bool:
    return value.alias_info is not None and value.alias_info.is_write is write


def kinship(node: fx.Node, root: nn.Module, rules: Rules) -> Kinship:
    """Whether the result of an operation, which writes nothing, shares the memory of its arguments."""
    if node.op in ("placeholder", "get_attr") or is_number(node):
        return "fresh"
    if node.target is getattr:
        return "view" if node.args[1] in _TENSOR_ATTRIBUTES else "fresh"
    if node.target is operator.getitem:
        return _of_index(node.args[1])
    rule, name = rules.find(target_of(node, root)), aten_name(node)
    if name in VIEWS:
        return "view"
    known = schemas(node)
    if any(_is_alias(result, write=False) for schema in known for result in schema.returns) or name in _PERHAPS:
        return "perhaps a view"
    if rule is not None:
        return "perhaps a view" if rule.alias else "fresh"
    computed = known or getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    return "fresh" if computed else "perhaps a view"


def _of_index(index: Any) -> Kinship:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, (list, torch.Tensor)) for part in parts):
        return "fresh"
    unknown = [part for part in parts if isinstance(part, fx.Node) and not is_number(part)]
    return "perhaps a view" if unknown else "view"


_NUMBERS = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "item",
        "tolist",
        "len",
        "sym_size",
        "sym_numel",
        "sym_stride",
    }
)
_NUMBER_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "itemsize", "nbytes", "layout"})


def is_number(node: fx.Node) -> bool:
    """Whether it is a size, a shape or a number computed from such: nothing that can be written into."""
    if node.target is getattr:
        return node.args[1] in _NUMBER_ATTRIBUTES
    if aten_name(node).split(".")[0] in _NUMBERS or node.target in (len, int, float, bool):
        return True
    computes = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    inputs = node.all_input_nodes
    return computes and node.op == "call_function" and bool(inputs) and all(is_number(value) for value in inputs)


def on_number(node: fx.Node) -> bool:
    """Whether an in-place operator of Python stands on a number, of which it makes a new one."""
    return node.target in INPLACE_OPERATORS and (not isinstance(node.args[0], fx.Node) or is_number(node.args[0]))
