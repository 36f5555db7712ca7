"""What torch.export takes for granted of the sizes of inputs: kept with the graph, and checked on every call.

Note [Sizes that a graph was traced for]
torch.export follows one side of every branch on a size, and fixes a size that it can't keep free. On inputs of other
sizes the graph would compute something, and something else than the model, without a word. So the conditions under
which it is the model go into the graph as its first operation.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from adfify.errors import InputError
from adfify.moments import Moments

Conditions = tuple[str, ...]


def conditions(
    program: torch.export.ExportedProgram, placeholders: list[fx.Node], names: list[str], guards: list[str]
) -> Conditions:
    """Python expressions of the inputs ``i0``, ``i1``: fixed sizes, ranges, sizes that are the same, and guards."""
    found: list[str] = []
    first: dict[Any, str] = {}
    for position, node in enumerate(placeholders):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            here = f"i{position}.size()[{axis}]"
            if isinstance(size, int):
                found.append(f"{here} == {size}")
                continue
            symbol = size.node.expr
            if symbol in first:
                found.append(f"{here} == {first[symbol]}")
            first.setdefault(symbol, here)
            bounds = program.range_constraints.get(symbol)
            if bounds is not None:
                # Every free size is at least 2 for torch.export, which is a convention: see adfify.verification.
                low, high = (int(edge) if edge.is_Integer else None for edge in (bounds.lower, bounds.upper))
                found += [f"{here} >= {low}"] if low is not None and low > 2 else []
                found += [f"{here} <= {high}"] if high is not None else []
    positions = {name: position for position, name in enumerate(names)}
    for guard in guards:
        mine = re.sub(r"L\['(\w+)'\](?!\[)", lambda match: f"i{positions.get(match[1], match[1])}", guard)
        if "L[" not in mine:  # else of a part of a structured input, which has no name here
            found.append(mine)
    return tuple(dict.fromkeys(found))


def check(expected: Conditions, *inputs: Any) -> None:
    """Raise InputError for inputs of which one of the conditions is not true.

    Under torch.compile and torch.export nothing is checked: they guard sizes themselves.
    """
    if torch.compiler.is_compiling():
        return
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    tensors = {f"i{k}": x.mean if isinstance(x, Moments) else x for k, x in enumerate(inputs)}
    known = {**SYMPY_INTERP, **tensors}
    for condition in expected:
        if not eval(condition, known):
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors.values() if isinstance(x, Tensor))
            said = re.sub(r"i(\d+)\.size\(\)\[(\d+)\]", r"size \2 of input \1", condition)
            raise InputError(
                f"the model was traced by torch.export for inputs of which {said}; these have shape {shapes}. "
                "Convert it once more with example_inputs of this size."
            )


def demand(graph: fx.Graph, condition: str) -> None:
    """Let a graph that torch.export made be called only where one more condition is true."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    checks = [node for node in graph.nodes if node.target is check]
    if not checks:
        with graph.inserting_after(placeholders[-1]):
            checks = [graph.call_function(check, ((), *placeholders))]
    checks[0].args = ((*checks[0].args[0], condition), *checks[0].args[1:])


def at_least_two(position: int, axis: int | None) -> str:
    """The condition that an axis of an input is no single one."""
    return f"i{position}.size()[{axis}] >= 2"


def refuses_one(graph: fx.Graph, position: int, axis: int | None) -> bool:
    """Whether a graph is demanded to."""
    wanted = at_least_two(position, axis)
    return any(node.target is check and wanted in node.args[0] for node in graph.nodes)
