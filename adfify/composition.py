"""Elementwise operations whose operands are functions of one random tensor, taken as one function of it.

Note [One random variable]
`x * sigmoid(x)` is a product of two factors that are far from independent: by the rule of the product, which takes
them so, the mean of a Swish written out like that is off by 0.37 of its std at N(0, 1). Where the graph shows that all
uncertain operands of a sum, difference, product or quotient are elementwise functions of the same node, the moments are
those of the one function that they make together, by quadrature over the one variable. So relu(x) - relu(x) is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from adfify import gaussian, original
from adfify.moments import Moments
from adfify.nn import arithmetic, elementary
from adfify.original import Operation
from adfify.precision import wide
from adfify.registry import RULES, Rule, Rules

KINKS = (-3.0, 0.0, 3.0)
"""Where the quadrature is split: what is composed is not asked where it bends, and these are where activations do."""

SOURCE = "the one function of the one variable, by quadrature (A&S 25.4.29)"

TOLERANCE = 0.05
"""Measured, in units of the true std: 3e-4 for smooth functions and kinks at those places, up to 0.023 for others
(relu(1 - x) * x, |x - 1| - |x + 1|)."""

# Functions of these are defined everywhere, grow no faster than a power, and turn on a scale of 1. A logarithm or a
# root ends at 0, an exponential overflows, a sine turns many times: they keep the rule of the sum or the product.
_FOLLOWED = ("adfify.nn.activation", "adfify.nn.timm_activations")

_COMBINING = frozenset(
    {
        arithmetic.add,
        arithmetic.sub,
        arithmetic.rsub,
        arithmetic.mul,
        arithmetic.div,
        arithmetic.neg,
        arithmetic.operator_add,
        arithmetic.operator_sub,
        arithmetic.operator_truediv,
    }
)


@dataclass(frozen=True)
class _Result:
    """In a step's arguments: the result of an earlier step; number 0 is the variable."""

    number: int


@dataclass(frozen=True, eq=False)
class Composition:
    """A function of one tensor: the original operations, one after the other.

    Attributes:
        steps: operation, positional and keyword arguments.
    """

    steps: tuple[tuple[Operation, tuple[Any, ...], dict[str, Any]], ...]

    __name__ = "composition"

    def __call__(self, x: Tensor) -> Tensor:
        results = [x]

        def result(leaf: Any) -> Any:
            return results[leaf.number] if isinstance(leaf, _Result) else leaf

        for operation, args, kwargs in self.steps:
            results.append(operation(*fx.node.map_aggregate(args, result), **fx.node.map_aggregate(kwargs, result)))
        return results[-1]


@dataclass(frozen=True, eq=False)
class Composed:
    """The rule of a :class:`Composition`."""

    function: Composition

    __name__ = "composed"

    def __call__(self, x: Moments) -> Moments:
        return _moments_of(self.function, x)


def _of_mean(function: Composition, x: Tensor) -> Tensor:
    return function(x)


@wide(_of_mean)
def _moments_of(function: Composition, x: Moments) -> Moments:
    return Moments(*gaussian.expect(function, x.mean, x.variance, kinks=KINKS))


@dataclass(frozen=True)
class OfOneVariable:
    """What a node computes, seen from one earlier node.

    Attributes:
        base: the variable.
        function: the composition.
        rule: of it.
        through: the nodes in between.
    """

    base: fx.Node
    function: Composition
    rule: Rule
    through: tuple[fx.Node, ...]


def of_one_variable(
    node: fx.Node, root: nn.Module, rules: Rules, uncertain: set[fx.Node], planned: Mapping[fx.Node, Rule]
) -> OfOneVariable | None:
    """How ``node`` combines several functions of one variable, if that is what it does."""
    chains = _Chains(root, rules, uncertain, planned)
    base = chains.base(node)
    if base is node or len(node.all_input_nodes) < 2:
        return None
    composition = chains.composition(node, base)
    rule = Rule((), Composed(composition), "elementwise", False, SOURCE, TOLERANCE, False, {}, ())
    return OfOneVariable(base, composition, rule, tuple(chains.through))


def _is_default(rule: Rule, rules: Rules) -> bool:
    """Not one of an overlay, whose numerics are wanted as they are."""
    return rule.family in rules.keeping and all(RULES.find(target) is rule for target in rule.targets[:1])


def _is_whole(exponent: tuple[Any, ...]) -> bool:
    return len(exponent) == 1 and isinstance(exponent[0], (int, float)) and exponent[0] in range(1, 9)


class _Chains:
    """Follows operands back to the variable that they are functions of."""

    def __init__(self, root: nn.Module, rules: Rules, uncertain: set[fx.Node], planned: Mapping[fx.Node, Rule]) -> None:
        self._root, self._rules, self._uncertain, self._planned = root, rules, uncertain, planned
        self._bases: dict[fx.Node, fx.Node] = {}
        self.through: list[fx.Node] = []

    def base(self, node: fx.Node) -> fx.Node:
        """The node that this one is an elementwise function of: the earliest there is, itself if there is none."""
        if node not in self._bases:
            inputs = node.all_input_nodes
            found = {self.base(value) for value in inputs} if self._is_elementwise(node) else set()
            self._bases[node] = found.pop() if len(found) == 1 else node
        return self._bases[node]

    def _is_elementwise(self, node: fx.Node) -> bool:
        rule = self._planned.get(node)
        if rule is None or not all(value in self._uncertain for value in node.all_input_nodes):
            return False
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                return False
        followed = rule.apply.__module__ in _FOLLOWED or (rule.apply is elementary.power and _is_whole(node.args[1:]))
        elementwise = rule.family == "elementwise" and len(node.all_input_nodes) == 1 and followed
        return (elementwise or rule.apply in _COMBINING) and _is_default(rule, self._rules)

    def composition(self, node: fx.Node, base: fx.Node) -> Composition:
        """Everything from ``base`` to ``node``."""
        numbers = {base: _Result(0)}
        steps: list[Any] = []

        def visit(current: fx.Node) -> None:
            if current in numbers:
                return
            for value in current.all_input_nodes:
                visit(value)
            numbered: Callable[[fx.Node], Any] = numbers.__getitem__
            args, kwargs = fx.map_arg((current.args, current.kwargs), numbered)
            steps.append((self._operation(current), tuple(args), dict(kwargs)))
            numbers[current] = _Result(len(steps))
            if current is not node:
                self.through.append(current)

        visit(node)
        return Composition(tuple(steps))

    def _operation(self, node: fx.Node) -> Operation:
        if node.op == "call_module":
            return original.of_module(copy.deepcopy(self._root.get_submodule(str(node.target))))
        return original.of_node(node, self._root)
