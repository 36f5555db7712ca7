"""Nodes that compute what an earlier one did: the same layer called twice on one value is one random variable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from adfify import inplace, random_draws
from adfify.registry import Rules


def first_of(graph: fx.Graph, root: nn.Module, rules: Rules) -> Mapping[fx.Node, fx.Node]:
    """Of each node the first that computes the same; itself, if there is none or where it draws random numbers.

    Args:
        graph: one in which nothing writes, see adfify.functionalisation.
        root: the model.
        rules: the table, which knows dropouts.
    """
    known: dict[Any, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        key = (node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), first.__getitem__)))
        first[node] = node if _is_drawn(node, root, rules) else known.setdefault(key, node)
    return first


def _is_drawn(node: fx.Node, root: nn.Module, rules: Rules) -> bool:
    if not node.op.startswith("call_"):
        return False
    rule = rules.find(inplace.target_of(node, root))
    return random_draws.draws(node, root) or (rule is not None and rule.family == "dropout")
