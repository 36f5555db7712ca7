"""What shares a variable with a mask that it meets: refused where no rule would be right.

Note [A mask and a value of the same elements]
One pass takes operands as independent, which is its approximation for layers that mix many elements, and good for sums
and products of those. A mask and a value that are functions of the *same elements* are another matter:
`torch.where(x > y, x, y)` is no mixture of x and y. Functions of one variable are composed (adfify.chains). Of several
variables the operation is refused, where a variable is reached on both sides through elementwise operations alone;
behind a layer that mixes elements, values are taken as independent, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import fx

from adfify import chains, mask_kinds
from adfify.nn import extrema
from adfify.registry import Rule

_ELEMENTWISE = chains.COMBINING | chains.FOLLOWED_WITH_JUMPS | {extrema.maximum, extrema.minimum}


def reason(
    node: fx.Node, uncertain: Set[fx.Node], planned: Mapping[fx.Node, Rule], first: Mapping[fx.Node, fx.Node]
) -> str:
    """Why a node can't be converted: a mask, or another jump, shares a variable with another operand; else ``""``.

    Args:
        node: what combines them.
        uncertain: the nodes that are random.
        planned: the rules of those that are converted.
        first: of each node the first that computes the same.
    """
    operands = [value for value in node.all_input_nodes if value in uncertain]
    if len(operands) < 2 or not _is_elementwise(node, planned):
        return ""
    found = [(value, *_roots(first[value], uncertain, planned, first)) for value in operands]
    for jumping, roots, jumps in found:
        for other, others, _ in found:
            shared = roots & others
            if jumps and other is not jumping and shared:
                names = ", ".join(f"'{root.name}'" for root in sorted(shared, key=lambda root: root.name))
                return (
                    f"its operands '{jumping.name}', which jumps, and '{other.name}' are functions of the same elements"
                    f" of {names}, and not of one variable alone, so that no rule here is right; write what is chosen"
                    " as one function (torch.maximum, torch.minimum, torch.relu, torch.clamp), or register a rule for"
                    " a function of your own that does it"
                )
    return ""


def _is_elementwise(node: fx.Node, planned: Mapping[fx.Node, Rule]) -> bool:
    rule = planned.get(node)
    return rule is not None and (rule.family == "elementwise" or rule.apply in _ELEMENTWISE)


def _roots(
    node: fx.Node, uncertain: Set[fx.Node], planned: Mapping[fx.Node, Rule], first: Mapping[fx.Node, fx.Node]
) -> tuple[Set[fx.Node], bool]:
    """The variables that a node is an elementwise function of, and whether it jumps in them."""
    roots: set[fx.Node] = set()
    jumps = False
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        rule = planned.get(current)
        if rule is not None and rule.apply in mask_kinds.CERTAIN:
            continue  # it does not vary: see Note [Equal to what varies]
        if not _is_elementwise(current, planned):
            roots.add(current)
            continue
        assert rule is not None
        jumps = jumps or not rule.continuous
        new = [first[one] for one in current.all_input_nodes if one in uncertain and first[one] not in seen]
        seen.update(new)
        queue += new
    return roots, jumps
