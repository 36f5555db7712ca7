"""What of a traced graph is read: the operations that its outputs depend on, and arguments of which only dtype, shape
or device matters.

Note [Metadata of an argument]
`torch.arange(4).type_as(x)` reads the dtype of x and nothing else: it is as certain as `torch.arange(4)`, however
uncertain x may be. A rule says so at its registration (``reads_metadata_of``); torch's own operations that make a
tensor like another one, or overwrite all of it, are known by their names.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Set
from typing import Any

from torch import fx, nn

from adfify import inplace, random_draws, sizes
from adfify.registry import Rule, Rules

# Of these, no argument's elements are read.
_DESCRIBING = frozenset(
    {
        "result_type",
        "can_cast",
        "promote_types",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_contiguous",
        "is_same_size",
        "is_tensor",
        "element_size",
        "get_device",
        "stride",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "storage_offset",
        "sym_size",
        "sym_numel",
        "sym_stride",
    }
)
_ATTRIBUTES = frozenset(
    {
        "shape",
        "ndim",
        "dtype",
        "device",
        "layout",
        "itemsize",
        "nbytes",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_sparse",
        "is_meta",
        "is_quantized",
        "names",
    }
)
_OVERWRITING = frozenset({"fill_", "zero_", "copy_", "fill", "zero", "copy"})


def described(node: fx.Node, root: nn.Module, rules: Rules) -> Set[fx.Node]:
    """The arguments of which a node reads nothing but metadata: see Note [Metadata of an argument]."""
    if node.target is getattr:
        return set(node.all_input_nodes) if node.args[1] in _ATTRIBUTES else set()
    name = inplace.aten_name(node).split(".")[0]
    if name in _DESCRIBING:
        return set(node.all_input_nodes)
    rule = rules.find(inplace.target_of(node, root))
    described = _by_position(node, name)
    if rule is not None and rule.reads_metadata_of:
        described += _declared(node, rule)
    elif rule is not None and rule.certain:
        described += node.all_input_nodes[:1]
    others = [value for value in _values(node) if isinstance(value, fx.Node)]
    return {value for value in described if others.count(value) == described.count(value)}


def _by_position(node: fx.Node, name: str) -> list[fx.Node]:
    first = inplace.argument(node, 0, "input", "self")
    if not isinstance(first, fx.Node):
        return []
    makes_like = name.endswith("_like") or name.startswith("new_")
    return [first] if makes_like or overwritten(node) is first else []


def overwritten(node: fx.Node) -> fx.Node | None:
    """The argument that a node writes into from end to end, whatever was in it; None if there is none."""
    first, name = inplace.argument(node, 0, "input", "self"), inplace.aten_name(node).split(".")[0]
    if node.target is operator.setitem and node.args[1] in (Ellipsis, slice(None)):
        return first  # type: ignore[no-any-return]
    fills = name in _OVERWRITING or random_draws.overwrites(name)
    return first if isinstance(first, fx.Node) and fills else None


def _declared(node: fx.Node, rule: Rule) -> list[fx.Node]:
    """The arguments that a rule reads the metadata of, as the node gives them."""
    try:
        bound = inspect.signature(rule.apply).bind(*node.args, **node.kwargs)
    except TypeError:
        return []
    found: list[fx.Node] = []
    for name in rule.reads_metadata_of:
        value = bound.arguments.get(name)
        several = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        found += [one for one in several if isinstance(one, fx.Node)]
    return found


def _values(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def live(graph: fx.Graph) -> Set[fx.Node]:
    """The nodes that an output depends on; inputs, and what may stop the network (assertions), with what it reads."""
    return ancestors([node for node in graph.nodes if node.op in ("placeholder", "output") or is_assertion(node)])


def is_assertion(node: fx.Node) -> bool:
    """Whether it is there to raise and not to compute."""
    raises = node.target is sizes.check or "assert" in getattr(node.target, "__name__", "")
    return node.op == "call_function" and raises


def ancestors(nodes: list[fx.Node]) -> Set[fx.Node]:
    """These nodes and everything that they are computed from."""
    found, queue = set(nodes), list(nodes)
    while queue:
        new = [value for value in queue.pop().all_input_nodes if value not in found]
        found.update(new)
        queue += new
    return found
