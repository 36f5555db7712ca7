"""A traced graph in which nothing writes: what a write leaves behind is a value of its own.

Note [In-place operations]
A rule never writes into its input. Where the original does, everything that shares the written memory must show the
result from then on. So the graph is rewritten before it is planned: the result of a write is a new value of the whole
tensor; later readers of that tensor, under any of its names, read that value; and later readers of a view of it read
the view made anew. A write through a view writes the viewed elements into a copy of the whole (:class:`Written`).
What may or may not be a view (`reshape`, `contiguous`, `.to`) is followed as a tensor of its own, and where that could
matter, because one of the two is written and the other is read later, the write is reported as missing.

The nodes of operations that write keep their names and targets. They have the meaning of functions: what is planned
follows a rule, and what stays as it is works on a copy (see Note [Kept writes], adfify.graph).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from adfify import call_forms, inplace, original
from adfify.nn.writing import Given, Written
from adfify.registry import Rules

Base = fx.Node | str
"""A tensor with memory of its own: the node that makes it, or the path of a parameter, buffer or constant."""


@dataclass(frozen=True)
class Place:
    """Where in memory a value is.

    Attributes:
        base: the tensor whose memory it is.
        views: the nodes that make the view of it, one of the other.
    """

    base: Base
    views: tuple[fx.Node, ...] = ()


@dataclass
class Functional:
    """A graph without writes.

    Attributes:
        graph: the graph.
        gaps: nodes whose write can't be followed, and why.
        concerned: of those, the nodes that may read what was written; of others, all later ones may.
        written: parameters, buffers and constants into which the original writes, by path.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    gaps: dict[fx.Node, str] = field(default_factory=dict)
    concerned: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)


def functional(graph: fx.Graph, root: nn.Module, rules: Rules, constants: Mapping[str, Tensor]) -> Functional:
    """See Note [In-place operations].

    Args:
        graph: as it was traced.
        root: the model.
        rules: which say of what is written in Python whether it may return a view.
        constants: tensors that the model made while being traced.
    """
    for node in graph.nodes:
        call_forms.normalise(node, inplace.target_of(node, root))
    return _Functionalisation(root, rules, constants).of(graph)


@dataclass(frozen=True)
class _Write:
    """A write: when, into the memory of what, and by which node of the new graph."""

    time: int
    base: Base
    node: fx.Node


class _Functionalisation:
    def __init__(self, root: nn.Module, rules: Rules, constants: Mapping[str, Tensor]) -> None:
        self._root, self._rules, self._constants = root, rules, constants
        self._tensors: dict[str, Tensor] = {}
        self._done = Functional()
        self._places: dict[fx.Node, Place] = {}
        self._values: dict[Place, tuple[fx.Node, int]] = {}  # and the version of the base that it shows
        self._versions: dict[Base, int] = {}
        self._born: dict[Base, int] = {}
        self._kin: dict[Base, frozenset[Base]] = {}
        self._writes: list[_Write] = []
        self._unseen: list[fx.Node] = []  # writes of which the node in hand may miss something
        self._time = 0

    def of(self, graph: fx.Graph) -> Functional:
        for self._time, node in enumerate(graph.nodes):
            if node.target in ("__setitem__", Tensor.__setitem__):
                node.op, node.target = "call_function", operator.setitem
            written = inplace.written_by(node, self._root)
            if node.op == "output":
                copy = self._copy(node)
            elif inplace.on_number(node):
                copy = self._copy(node)
                copy.target = inplace.INPLACE_OPERATORS[node.target]
                self._own(node, copy, Place(node))
            elif isinstance(node.kwargs.get("out"), (fx.Node, tuple, list)):
                self._write_out(node)
            elif written is not None:
                self._write(node, written)
            else:
                self._compute(node)
        self._done.graph.lint()
        return self._done

    def _compute(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._refer(node)
            return
        copy = self._copy(node)
        if inplace.writes_otherwise(node, self._root):
            self._done.gaps[copy] = (
                "it writes into an argument other than its first, or returns something else than that"
            )
        if inplace.perhaps_writes(node, self._root, self._rules):
            self._done.gaps[copy] = (
                "its name says that it writes in place, what it is given is read elsewhere, and only of torch's own "
                "functions the name is known to hold; name it without the underscore, or read only its result"
            )
        related = inplace.kinship(node, self._root, self._rules)
        sources = [self._places[value] for value in node.all_input_nodes] if related != "fresh" else []
        if related == "view" and sources:
            self._own(node, copy, Place(sources[0].base, (*sources[0].views, node)))
            return
        self._own(node, copy, Place(node))
        if sources:
            self._relate({node, *[source.base for source in sources]})

    def _refer(self, node: fx.Node) -> None:
        place = self._places[node] = Place(self._path(str(node.target)))
        if place.base not in self._versions:
            self._versions[place.base], self._born[place.base] = 0, -1
        if self._versions[place.base] == 0:
            self._values[place] = self._copy(node), 0

    def _path(self, path: str) -> str:
        """The path under which a tensor was referred to first; a view of another one is related to it."""
        if path in self._tensors:
            return path
        tensor = self._constants[path] if path in self._constants else attrgetter(path)(self._root)
        for other, known in self._tensors.items():
            if known is tensor:
                return other
            if isinstance(tensor, Tensor) and isinstance(known, Tensor) and _address(tensor) == _address(known):
                self._relate({path, other})
        self._tensors[path] = tensor
        return path

    def _relate(self, bases: set[Base]) -> None:
        family = frozenset(bases).union(*[self._kin.get(base, frozenset()) for base in bases])
        self._kin.update(dict.fromkeys(family, family))

    def _own(self, node: fx.Node, value: fx.Node, place: Place) -> None:
        self._places[node] = place
        if place.base is node:
            self._versions[node], self._born[node] = 0, self._time
        self._values[place] = value, self._versions[place.base]

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self._done.graph.node_copy(node, self._read)
        copy.meta = dict(node.meta)
        for write in self._unseen:
            self._done.concerned.setdefault(write, []).append(copy)
        self._unseen.clear()
        return copy

    # Reading

    def _read(self, node: fx.Node) -> fx.Node:
        """What a node of the old graph shows now."""
        place = self._places[node]
        for write in self._writes:
            kin = self._kin.get(place.base, frozenset())
            if write.base != place.base and write.base in kin and self._born[place.base] < write.time:
                self._unseen.append(write.node)
                self._done.gaps.setdefault(
                    write.node,
                    f"it writes in place into a tensor that '{node.name}' may share, which is read afterwards; "
                    "with example_inputs, torch.export may follow that",
                )
        return self._shown(place)

    def _shown(self, place: Place) -> fx.Node:
        value, version = self._values[place]
        if version == self._versions[place.base]:
            return value
        view, whole = place.views[-1], Place(place.base, place.views[:-1])
        value = self._done.graph.node_copy(
            view, lambda x: self._shown(whole) if self._places[x] == whole else self._read(x)
        )
        value.meta = dict(view.meta)
        self._values[place] = value, self._versions[place.base]
        return value

    # Writing

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        place = self._places[written]
        if node.target is operator.setitem and self._stands_there(node, place):
            return
        copy = self._copy(node)
        if len(copy.args) == 0:  # given by keyword: the rule, and what makes a copy of it, take it as the first
            name = next(name for name in ("input", "self") if name in copy.kwargs)
            first = copy.kwargs[name]
            copy.kwargs = {key: value for key, value in copy.kwargs.items() if key != name}
            copy.args = (first,)
        self._places[node] = place
        self._written(place, copy)

    def _written(self, place: Place, value: fx.Node) -> None:
        """Let the memory at ``place`` show ``value`` from now on."""
        whole = Place(place.base)
        result = value if place == whole else self._through(place, value)
        self._versions[place.base] += 1
        self._values[place] = value, self._versions[place.base]
        self._values[whole] = result, self._versions[place.base]
        self._writes.append(_Write(self._time, place.base, value))
        if isinstance(place.base, str):
            self._done.written.add(place.base)

    def _through(self, place: Place, value: fx.Node) -> fx.Node:
        given: list[fx.Node] = []
        views = []

        def number(node: fx.Node) -> Any:
            given.append(self._read(node))
            return Given(len(given) - 1)

        for view in place.views:
            args, kwargs = fx.map_arg((view.args[1:], view.kwargs), number)
            views.append((original.named(view), args if view.target is not getattr else (), kwargs))
        new = self._done.graph.call_function(
            Written(tuple(views)),
            (self._shown(Place(place.base)), value, *given),
        )
        new.meta = dict(value.meta)
        return new

    def _stands_there(self, node: fx.Node, place: Place) -> bool:
        """Whether ``x[i] = y`` puts back what is there: Python's last step of ``x[i] += z``."""
        value = node.args[2]
        if not isinstance(value, fx.Node):
            return False
        of_value = self._places[value]
        if of_value.base != place.base or of_value.views[:-1] != place.views or not of_value.views:
            return False
        last = of_value.views[-1]
        return last.target is operator.getitem and bool(last.args[1] == node.args[1])

    def _write_out(self, node: fx.Node) -> None:
        """``f(x, out=y)``: the result of ``f(x)``, in the dtype of ``y``."""
        out = node.kwargs["out"]
        copy = self._copy(node)
        copy.kwargs = {name: value for name, value in copy.kwargs.items() if name != "out"}
        copy.target = inplace.without_out(copy.target)
        if not isinstance(out, fx.Node):
            self._done.gaps[copy] = "it writes several results into out=, which can't be followed; use what it returns"
            self._own(node, copy, Place(node))
            return
        dtype = self._done.graph.call_function(getattr, (self._read(out), "dtype"))
        cast = self._done.graph.call_method("to", (copy, dtype))
        dtype.meta = cast.meta = dict(node.meta)
        self._places[node] = self._places[out]
        self._written(self._places[out], cast)


def _address(tensor: Tensor) -> int:
    """Of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr() or id(tensor)
