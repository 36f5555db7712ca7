"""Which operands in a traced graph are functions of one variable: Note [One random variable], adfify.composition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from adfify import mask_kinds, original
from adfify.composition import SOURCE, TOLERANCE, Composed, Composition, Jump, Result, Step
from adfify.nn import arithmetic, choosing, comparisons, elementary, shrinkage, steps, structural
from adfify.original import Operation
from adfify.registry import RULES, Rule, Rules

# Functions of these are defined everywhere, grow no faster than a power, and turn on a scale of 1. A logarithm or a
# root ends at 0, an exponential overflows, a sine turns many times: they keep the rule of the sum or the product.
_FOLLOWED = ("adfify.nn.activation", "adfify.nn.timm_activations")

COMBINING = frozenset(
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

_QUOTIENTS = frozenset({arithmetic.div, arithmetic.operator_truediv})
_AFFINE = (COMBINING - _QUOTIENTS - {arithmetic.mul}) | {structural.detach, structural.clone, structural.contiguous}

_CHOICES = frozenset(rule.apply for _, rule in choosing.BY_MASK.values())


FOLLOWED_WITH_JUMPS = (
    mask_kinds.COMPARED
    | mask_kinds.CERTAIN
    | mask_kinds.LOGICAL
    | mask_kinds.CASTS
    | _CHOICES
    | steps.EVERY
    | {
        comparisons.counted,
        shrinkage.threshold,
        shrinkage.hardshrink,
        structural.detach,
        structural.clone,
        structural.contiguous,
    }
)
"""What is followed beside a jump, for it is a function of its operands, element by element."""


def _difference(input: Any, other: Any) -> Any:
    return 1.0 * input - 1.0 * other


def _itself(input: Any, *args: Any, **kwargs: Any) -> Any:
    return input


def _half_further(input: Any, *, decimals: int = 0) -> Any:
    return input * 10.0**decimals + 0.5


def _quotient(input: Any, other: Any, **kwargs: Any) -> Any:
    return input / other


def _beyond(input: Any, threshold: Any, *args: Any, **kwargs: Any) -> Any:
    return input - threshold


def _beyond_on_both_sides(input: Any, lambd: float = 0.5) -> Any:
    return input.abs() - lambd


JUMPS: dict[Any, Jump] = {
    **dict.fromkeys(mask_kinds.COMPARED, Jump(_difference)),
    **dict.fromkeys((steps.sign, steps.heaviside), Jump(_itself)),
    **dict.fromkeys((steps.floor, steps.ceil, steps.trunc, steps.frac), Jump(_itself, periodic=True)),
    **dict.fromkeys((steps.remainder, steps.fmod, steps.floor_divide), Jump(_quotient, periodic=True)),
    **dict.fromkeys((steps.divided_by_floor, steps.divided_by_trunc), Jump(_quotient, periodic=True)),
    steps.round: Jump(_half_further, periodic=True),
    shrinkage.threshold: Jump(_beyond),
    shrinkage.hardshrink: Jump(_beyond_on_both_sides, bent=True),
}
"""Of what jumps, where."""

_SPLITTING = frozenset(JUMPS) | mask_kinds.CERTAIN | _CHOICES


@dataclass(frozen=True)
class OfOneVariable:
    """What a node computes, seen from one earlier node.

    Attributes:
        base: the variable.
        certain: the certain operands in between.
        function: the composition.
        rule: of it.
        through: the nodes in between.
    """

    base: fx.Node
    certain: tuple[fx.Node, ...]
    function: Composition
    rule: Rule
    through: tuple[fx.Node, ...]


def of_one_variable(
    node: fx.Node,
    root: nn.Module,
    rules: Rules,
    uncertain: Set[fx.Node],
    planned: Mapping[fx.Node, Rule],
    first: Mapping[fx.Node, fx.Node],
) -> OfOneVariable | None:
    """How ``node`` combines several functions of one variable, if that is what it does.

    Args:
        node: of a traced graph.
        root: the model.
        rules: the table.
        uncertain: the nodes that are random.
        planned: the rules of those that are converted, this one among them.
        first: of each node the first that computes the same, see adfify.repeated.
    """
    if len([value for value in node.all_input_nodes if value in uncertain]) < 2:
        return None
    if any(planned[value].apply in mask_kinds.CERTAIN for value in node.all_input_nodes if value in planned):
        return None  # what it is chosen by does not vary: the chosen value keeps its rule (a / d, safe from d == 0)
    for kind in (_Jumping, _Chains):
        chains = kind(root, rules, uncertain, planned, first)
        base = chains.base(node)
        composition = chains.composition(node, base)
        # What jumps at the whole numbers of relu(x) is taken as a function of relu(x), whose moments are known.
        while bends := composition.bends():
            stops = chains.stops | {first[chains.nodes[number - 1]] for number in bends}
            chains = kind(root, rules, uncertain, planned, first)
            chains.stops = stops
            base = chains.base(node)
            composition = chains.composition(node, base)
        if base is first[node]:
            continue
        if kind is _Jumping and not any(planned[one].apply in _SPLITTING for one in (node, *chains.through)):
            continue
        rule = Rule(
            (), Composed(composition), "elementwise", False, SOURCE, TOLERANCE, False, {}, (), not composition.jumps
        )
        return OfOneVariable(base, tuple(chains.certain), composition, rule, tuple(chains.through))
    return None


def _is_default(rule: Rule, rules: Rules) -> bool:
    """Not one of an overlay, whose numerics are wanted as they are."""
    return rule.family in rules.keeping and all(RULES.find(target) is rule for target in rule.targets[:1])


def _is_whole(exponent: tuple[Any, ...]) -> bool:
    return len(exponent) == 1 and isinstance(exponent[0], (int, float)) and exponent[0] in range(1, 9)


class _Chains:
    """Follows operands back to the variable that they are functions of: through continuous functions of it alone."""

    splits = False

    def __init__(
        self,
        root: nn.Module,
        rules: Rules,
        uncertain: Set[fx.Node],
        planned: Mapping[fx.Node, Rule],
        first: Mapping[fx.Node, fx.Node],
    ) -> None:
        self._root, self._rules, self._uncertain, self._planned = root, rules, uncertain, planned
        self._first = first
        self._bases: dict[fx.Node, fx.Node] = {}
        self.through: list[fx.Node] = []
        self.certain: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        self.stops: set[fx.Node] = set()

    def base(self, node: fx.Node) -> fx.Node:
        """The node that this one is an elementwise function of: the earliest there is, itself if there is none."""
        node = self._first[node]
        if node not in self._bases:
            inputs = self._operands(node)
            follows = node not in self.stops and self._is_elementwise(node)
            found = {self.base(value) for value in inputs} if follows else set()
            self._bases[node] = found.pop() if len(found) == 1 else node
        return self._bases[node]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    def _is_elementwise(self, node: fx.Node) -> bool:
        rule = self._planned.get(node)
        if rule is None or not all(value in self._uncertain for value in self._operands(node)):
            return False
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                return False
        return self._is_followed(node, rule)

    def _is_followed(self, node: fx.Node, rule: Rule) -> bool:
        followed = rule.apply.__module__ in _FOLLOWED or (rule.apply is elementary.power and _is_whole(node.args[1:]))
        elementwise = rule.family == "elementwise" and len(self._operands(node)) == 1 and followed
        return (elementwise or rule.apply in COMBINING) and _is_default(rule, self._rules)

    def composition(self, node: fx.Node, base: fx.Node) -> Composition:
        """Everything from ``base`` to ``node``."""
        # The same value twice is one result, whichever node it is read from.
        numbers = {base: Result(0)}
        steps: list[Step] = []

        def visit(current: fx.Node) -> None:
            if current in numbers:
                return
            if self._first[current] in numbers:
                numbers[current] = numbers[self._first[current]]
                return
            if current not in self._uncertain and current is not node:
                self.certain.append(current)
                numbers[current] = Result(-len(self.certain))
                return
            for value in current.all_input_nodes:
                visit(value)
            numbered: Callable[[fx.Node], Any] = numbers.__getitem__
            args, kwargs = fx.map_arg((current.args, current.kwargs), numbered)
            steps.append(self._step(current, tuple(args), dict(kwargs)))
            self.nodes.append(current)
            numbers[current] = Result(len(steps))
            if current is not node:
                self.through.append(current)

        visit(node)
        return Composition(tuple(steps), self.splits)

    def _step(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        rule = self._planned[node]
        product = "quotient" if rule.apply in _QUOTIENTS else "product" if rule.apply is arithmetic.mul else ""
        affine, cast = rule.apply in _AFFINE, rule.apply in mask_kinds.CASTS | {comparisons.counted}
        return Step(self._operation(node), args, kwargs, affine, product, cast, JUMPS.get(rule.apply))

    def _operation(self, node: fx.Node) -> Operation:
        if node.op == "call_module":
            return original.of_module(copy.deepcopy(self._root.get_submodule(str(node.target))))
        return original.of_node(node, self._root)


class _Jumping(_Chains):
    """Also through what jumps, chooses and casts, and through certain operands."""

    splits = True

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [value for value in node.all_input_nodes if value in self._uncertain]

    def _is_followed(self, node: fx.Node, rule: Rule) -> bool:
        if rule.apply in FOLLOWED_WITH_JUMPS:
            return rule.targets == () or RULES.find(rule.targets[0]) is rule
        return (rule.continuous or rule.apply in JUMPS) and super()._is_followed(node, rule)
