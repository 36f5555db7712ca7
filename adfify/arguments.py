"""Whether a rule can take the arguments of a call, and as what: found when a model is converted, not when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from adfify import call_forms
from adfify.call_forms import nodes_in
from adfify.registry import Rule, Target
from adfify.signatures import Place, Takes, admits, parameter_at, takes


@dataclass(frozen=True)
class Call:
    """The call of a rule.

    Attributes:
        args: positional arguments, nodes of the traced graph among them.
        kwargs: keyword arguments, likewise.
        lifts: the certain nodes, with the place where each stands, that are given as Moments of variance 0.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lifts: frozenset[tuple[Place, fx.Node]] = frozenset()

    def places(self) -> Iterator[tuple[Place, Any]]:
        """Every argument with where it stands."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def all_lifted(self) -> Call:
        """The same call, where every node is certain."""
        return Call(
            self.args,
            self.kwargs,
            frozenset((place, node) for place, value in self.places() for node in nodes_in(value)),
        )


def call_of(node: fx.Node) -> Call:
    """The call that a node makes; of ``getattr(x, "shape")``, what the attribute is of."""
    return Call(node.args[:1] if node.target is getattr else node.args, dict(node.kwargs))


def fit(node: fx.Node, target: Target, rule: Rule, module: nn.Module | None, uncertain: set[fx.Node]) -> Call | str:
    """How a rule is called for a node, or why it can't be.

    Args:
        node: of the traced graph, in the form of :func:`adfify.call_forms.normalise`.
        target: what it calls.
        rule: the rule for that.
        module: the original module, where it calls one.
        uncertain: the nodes that are random.
    """
    given = call_of(node)
    call = Call(*call_forms.adapted(given.args, given.kwargs, target, rule.signature))
    try:
        bound = rule.signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        return f"the rule {rule.name}{rule.signature} does not take these arguments: {error}"
    for name, allowed in rule.only.items():
        value = bound.arguments.get(name, getattr(module, name, allowed))
        if value != allowed:
            return f"there is a rule only for {name}={allowed!r}, and it is {value!r} here"
    for uncertain_one, needed in rule.only_where.items():
        if not set(nodes_in(bound.arguments.get(uncertain_one))) & uncertain:
            continue
        for name, allowed in needed.items():
            value = bound.arguments.get(name, _default_of(rule, name, allowed))
            if value != allowed:
                return (
                    f"with '{uncertain_one}' uncertain there is a rule only for {name}={allowed!r}, and it is {value!r}"
                )
    random = [name for name in rule.one_uncertain_of if set(nodes_in(bound.arguments.get(name))) & uncertain]
    if len(random) > 1:
        return (
            f"{' and '.join(map(repr, random))} are both uncertain here, and the rule {rule.name} takes one of them so"
        )
    lifts: set[tuple[Place, fx.Node]] = set()
    for place, value in call.places():
        parameter = parameter_at(rule.signature, place)
        assert parameter is not None, "what binds has a parameter"
        kind, nodes = takes(parameter), set(nodes_in(value))
        if kind is Takes.CERTAIN and nodes & uncertain:
            return (
                f"its argument '{parameter.name}' is uncertain here, and the rule {rule.name} takes it only as certain"
            )
        if kind is Takes.EITHER and parameter.kind is not parameter.VAR_POSITIONAL:
            for known in (value, *_constants(value)):
                if not admits(parameter.annotation, known):
                    return (
                        f"its argument '{parameter.name}' is {known!r:.60} here, and the rule {rule.name} takes it as "
                        f"{inspect.formatannotation(parameter.annotation)}; give a tensor"
                    )
        if kind is Takes.MOMENTS:
            for known in _constants(value):
                return (
                    f"its argument '{parameter.name}' is {known!r:.60} here, and the rule {rule.name} takes it only as "
                    "Moments; give a tensor, or annotate it with what else the rule takes"
                )
            if rule.complex and nodes - uncertain:
                return (
                    f"its argument '{parameter.name}' is certain here; the rule {rule.name} takes it only as uncertain"
                )
            lifts.update((place, known) for known in nodes - uncertain)
    return Call(call.args, call.kwargs, frozenset(lifts))


def _default_of(rule: Rule, name: str, otherwise: Any) -> Any:
    """What an argument is that is not given."""
    default = rule.signature.parameters[name].default
    return otherwise if default is inspect.Parameter.empty else default


def _constants(value: Any) -> list[Any]:
    """What is neither a node nor None in an argument, however nested."""
    found: list[Any] = []
    fx.node.map_aggregate(value, lambda leaf: found.append(leaf))
    return [leaf for leaf in found if leaf is not None and not isinstance(leaf, fx.Node)]
