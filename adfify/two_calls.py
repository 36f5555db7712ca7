"""Whether a second call of a model computes what the first one did: see Note [State], adfify.state.

The graphs of two traces, the second of a model as the first left it, are one program: two calls, one after the other.
Without writes, and numbered by value, the second call's outputs are those of the first if they are computed by the same
operations from the second call's own inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from adfify import functionalisation, inplace, reading
from adfify.registry import Rules


def in_sequence(first: fx.Graph, second: fx.Graph) -> fx.Graph:
    """One graph of two: inputs of the first are called ``before.NAME``; what it returns is left out.

    Raises:
        KeyError: the second one refers to what is in neither.
    """
    both = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for graph in (first, second):
        for node in graph.nodes:
            if node.op == "output" and graph is first:
                continue
            env[node] = both.node_copy(node, env.__getitem__)
            if node.op == "placeholder" and graph is first:
                env[node].target = f"before.{node.target}"
    return both


def are_one(a: fx.Graph, of_a: Mapping[str, Tensor], b: fx.Graph, of_b: Mapping[str, Tensor]) -> bool:
    """Whether two graphs, with their constants, are the same node by node: most are, and then nothing is numbered."""
    if len(a.nodes) != len(b.nodes):
        return False
    same: dict[fx.Node, fx.Node] = {}
    for x, y in zip(a.nodes, b.nodes, strict=True):
        of_x, of_y = of_a.get(str(x.target)), of_b.get(str(y.target))
        if x.op == y.op == "get_attr" and of_x is not None and of_y is not None:
            if _digest(of_x) != _digest(of_y):
                return False
        elif (x.op, x.target) != (y.op, y.target) or not all(value in same for value in x.all_input_nodes):
            return False
        elif any(value.graph is not b for value in y.all_input_nodes):
            return False  # what the first call left is read
        elif repr(fx.map_arg((x.args, x.kwargs), lambda value: same[value])) != repr((y.args, y.kwargs)):
            return False
        same[x] = y
    return True


class Numbering:
    """Numbers values of functional graphs: equal ones that are computed alike.

    Args:
        root: the model.
        rules: the table.
        constants: tensors made while tracing, of which the content counts.
    """

    def __init__(self, root: nn.Module, rules: Rules, constants: Mapping[str, Tensor]) -> None:
        self._root, self._rules, self._constants = root, rules, constants
        self._numbers: dict[Any, int] = {}

    def output(self, graph: fx.Graph) -> Any:
        """The number of what a graph returns."""
        done = functionalisation.functional(graph, self._root, self._rules, self._constants)
        values: dict[fx.Node, int] = {}
        for node in done.graph.nodes:
            key = self._key(node, values)
            values[node] = self._numbers.setdefault(key, len(self._numbers))
        return next(values[node] for node in done.graph.nodes if node.op == "output")

    def _key(self, node: fx.Node, values: Mapping[fx.Node, int]) -> Any:
        if node.op == "placeholder":
            return node.op, node.target
        if node.op == "get_attr":
            constant = self._constants.get(str(node.target))
            return (node.op, node.target) if constant is None else (node.op, _digest(constant))
        overwritten = reading.overwritten(node) if inplace.written_by(node, self._root) is not None else None
        known = {value: f"%{values[value]}" for value in node.all_input_nodes}
        if overwritten is not None and node.all_input_nodes.count(overwritten) == 1:
            known[overwritten] = "%overwritten"
        said = fx.map_arg((node.args, node.kwargs), lambda value: _Number(known[value]))
        return node.op, _Target(node.target), repr(said)


class _Number(str):
    """In the text of a node's arguments: the number of another one."""

    def __repr__(self) -> str:
        return str(self)


class _Target:
    """What a node calls, compared by identity, or by its views where it is a write through them."""

    def __init__(self, target: Any) -> None:
        self._what = repr(target.views) if hasattr(target, "views") else target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Target) and self._what == other._what

    def __hash__(self) -> int:
        return hash(self._what)


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    return f"{content.dtype} {tuple(content.shape)} {hashlib.blake2b(repr(content.tolist()).encode()).hexdigest()}"
