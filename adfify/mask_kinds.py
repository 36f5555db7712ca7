"""Which values of a traced model are masks: what plans go by. See Note [Masks], adfify.nn.comparisons.

torch.export knows every dtype. torch.fx knows none: there a mask is what a comparison, or the logic of masks, returns,
and what is behind them without being turned into numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from adfify import call_forms, inplace
from adfify.nn import arithmetic, casting, choosing, comparisons, indexing, steps, structural
from adfify.registry import Rule
from adfify.tracing import Traced

COMPARED = frozenset({comparisons.gt, comparisons.ge, comparisons.lt, comparisons.le})
CERTAIN = frozenset({comparisons.eq, comparisons.ne, comparisons.isnan, comparisons.isinf, comparisons.isfinite})
"""Masks that have a variance of 0 always: see Note [Equal to what varies]."""
LOGICAL = frozenset({comparisons.logical_and, comparisons.logical_or, comparisons.logical_xor, comparisons.logical_not})
_OF_MASKS = LOGICAL | {comparisons.any_, comparisons.all_, comparisons.counted}
CASTS = frozenset(
    {
        structural.to, structural.float_, structural.type_as, casting.double, casting.half, casting.bfloat16,
        casting.type_, casting.to_copy,
    }
)  # fmt: skip
_SUMS = frozenset({arithmetic.add, arithmetic.operator_add})
_CHOICES = frozenset({choosing.where, choosing.where_method})

SHAPE = (
    "it takes the elements where an uncertain mask holds, so that the shape of its result is uncertain; keep all "
    "elements and multiply by the mask, or choose by torch.where(mask, x, 0)"
)
_MIXED = "what it chooses by is more than one mask, or none: give one mask of the shape of what is chosen"
_WHOLE = (
    "an uncertain value is cast to {} here; whole numbers have no variance. Use torch.floor, torch.round or a "
    "comparison (x != 0), and stay in floating point"
)


@dataclass(frozen=True)
class Masks:
    """Of a traced model.

    Attributes:
        traced: the model.
        uncertain: nodes that are random.
        found: nodes among them, so far, that are masks.
    """

    traced: Traced
    uncertain: Set[fx.Node]
    found: set[fx.Node]

    def add(self, node: fx.Node, rule: Rule) -> None:
        """Note whether the result of a node that is converted by a rule is a mask."""
        if self._is_mask(node, rule):
            self.found.add(node)

    def _is_mask(self, node: fx.Node, rule: Rule) -> bool:
        if rule.apply in COMPARED | CERTAIN | LOGICAL | {comparisons.any_, comparisons.all_}:
            return True
        if rule.apply is comparisons.counted:
            return bool(node.target == "bool")
        values = self._random(node)
        if rule.apply in CASTS:
            return _dtype(node) is torch.bool and values <= self.found
        if rule.apply in _CHOICES:
            return len(values) > 1 and values <= self.found and not _numbers(node)
        kept = rule.family == "structural" or rule.apply is arithmetic.mul
        return kept and bool(values) and values <= self.found and len(values) == len(node.all_input_nodes)

    def _random(self, node: fx.Node) -> set[fx.Node]:
        return {value for value in node.all_input_nodes if value in self.uncertain}

    # What a rule is for the masks among its arguments

    def rule(self, node: fx.Node, rule: Rule) -> Rule:
        """The rule that a node has where what it is given is a mask; of a quotient, that is rounded."""
        place = choosing.BY_MASK.get(rule.apply)
        if place is not None and self.chooses(node, rule):
            return place[1]
        if rule.apply in CASTS and not _is_floating(_dtype(node)) and self._random(node) <= self.found:
            return _COUNTED
        if rule.apply is arithmetic.div and node.kwargs.get("rounding_mode") is not None:
            return steps.BY_ROUNDING.get(str(node.kwargs["rounding_mode"]), rule)
        return rule

    def chooses(self, node: fx.Node, rule: Rule) -> bool:
        """Whether the mask by which a node chooses is uncertain."""
        condition = condition_of(node, rule)
        nodes = condition if isinstance(condition, (list, tuple)) else (condition,)
        return any(value in self.uncertain for value in nodes if isinstance(value, fx.Node))

    def misfit(self, node: fx.Node, rule: Rule) -> str:
        """Why a rule can't be followed by a node for the masks, or the lack of them, among its arguments, or ``""``."""
        random = self._random(node)
        masks = random & self.found
        if rule.apply in _OF_MASKS and masks != random:
            if rule.apply is comparisons.counted:
                return _WHOLE.format(node.target)
            return f"its argument '{next(iter(random - masks))}' is no mask here; compare it first: x != 0"
        if rule.apply in CASTS and not _is_floating(_dtype(node)) and masks != random:
            return _WHOLE.format(_dtype(node))
        if rule.apply in (structural.getitem, *_INDEXING) and self._is_indexed(node):
            return SHAPE
        if rule.apply in _SUMS and masks and self._are_bools(node):
            return "it adds masks, of which torch makes 'or'; write a | b, or count by a.float() + b.float()"
        if rule.apply in _BY_MASK:
            return _infinite(node) or self._not_alone(node, rule)
        return ""

    def _not_alone(self, node: fx.Node, rule: Rule) -> str:
        """Why what it chooses by is more than one mask."""
        before = next(apply for apply, (_, other) in choosing.BY_MASK.items() if other.apply is rule.apply)
        condition = condition_of(node, replace(rule, apply=before))
        if isinstance(condition, (list, tuple)) and len(condition) == 1:
            condition = condition[0]
        return "" if isinstance(condition, fx.Node) and condition in self.found else _MIXED

    def _is_indexed(self, node: fx.Node) -> bool:
        nodes = [leaf for leaf in pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(leaf, fx.Node)]
        return any(leaf in self.uncertain for leaf in nodes)

    def _are_bools(self, node: fx.Node) -> bool:
        """Whether both terms of a sum are bools, as far as is known."""
        if isinstance(node.meta.get("val"), Tensor):
            return node.meta["val"].dtype is torch.bool
        return not _numbers(node) and all(value in self.found or self._is_bool(value) for value in node.all_input_nodes)

    def _is_bool(self, node: fx.Node) -> bool:
        """Whether a certain tensor is of bools."""
        if node.op == "get_attr":
            name = str(node.target)
            constants = self.traced.constants
            value = constants[name] if name in constants else operator.attrgetter(name)(self.traced.root)
            return isinstance(value, Tensor) and value.dtype is torch.bool
        return inplace.aten_name(node).split(".")[0] in _BOOLS or node.target in _OPERATORS


# Of rules that choose by a mask, what is chosen.
_BY_MASK = {rule.apply: name for name, rule in choosing.BY_MASK.values()}
_COUNTED = Rule((), comparisons.counted, "structural", True, structural.SOURCE, 0.0, True, {}, ())
_INDEXING = (indexing.index, indexing.index_select, indexing.gather, indexing.take_along_dim)
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
_BOOLS = frozenset({*_COMPARISONS, "logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isfinite"})
_OPERATORS = frozenset(getattr(operator, name) for name in _COMPARISONS)


def condition_of(node: fx.Node, rule: Rule) -> Any:
    """By what a node chooses, whose rule is one of :data:`adfify.nn.choosing.BY_MASK`."""
    name = choosing.BY_MASK[rule.apply][0]
    args, kwargs = call_forms.adapted(node.args, dict(node.kwargs), node.target, rule.signature)
    try:
        return rule.signature.bind(*args, **kwargs).arguments.get(name)
    except TypeError:
        return None


def _dtype(node: fx.Node) -> torch.dtype | None:
    """To which dtype a cast is, as far as its call says."""
    known = node.meta.get("val")
    if isinstance(known, Tensor):
        return known.dtype
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)


def _is_floating(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype.is_floating_point or dtype.is_complex


def _numbers(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]


def _infinite(node: fx.Node) -> str:
    if all(math.isfinite(number) for number in _numbers(node)):
        return ""
    return (
        "it puts an infinite value, or NaN, where an uncertain mask holds, and that has no mean and variance; write a "
        "large number, -1e4, or choose behind the softmax"
    )
