"""Which values of a traced model are complex, as far as its graph tells: what plans go by.

torch.export knows every dtype. torch.fx knows none: there a value is complex where an operation makes complex values
of real ones (its rule returns ComplexMoments), where a dtype or a number in the call is complex, where a parameter or
buffer is, and behind all of these. What is missed so is refused when the network is called, see Note [Complex values].
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Set

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from adfify.registry import Rule
from adfify.tracing import Traced


def is_complex(node: fx.Node, rule: Rule | None, traced: Traced, complex_nodes: Set[fx.Node]) -> bool:
    """Whether the result of a node is complex.

    Args:
        node: of a traced graph.
        rule: of its operation, whether followed or not.
        traced: the model.
        complex_nodes: those of the earlier nodes whose results are.
    """
    known = node.meta.get("val")
    if isinstance(known, Tensor):
        return known.is_complex()
    if node.op == "get_attr":
        name = str(node.target)
        value = traced.constants[name] if name in traced.constants else operator.attrgetter(name)(traced.root)
        return isinstance(value, Tensor) and value.is_complex()
    if node.op in ("placeholder", "output"):
        return False
    if any(isinstance(leaf, torch.dtype) and leaf.is_complex for leaf in pytree.tree_leaves((node.args, node.kwargs))):
        return True
    from_complex = takes_complex(node, complex_nodes)
    if rule is None:
        return from_complex
    call = rule.apply.forward if isinstance(rule.apply, type) else rule.apply  # type: ignore[attr-defined]
    signature = inspect.signature(call)
    returned = str(signature.return_annotation)
    if "ComplexMoments" in returned:
        return from_complex or "ComplexMoments | Moments" not in returned
    if rule.certain:
        return from_complex and "Tensor" in returned
    knows = any("ComplexMoments" in str(p.annotation) for p in signature.parameters.values())
    return from_complex and not (knows and rule.complex and returned == "Moments")


def takes_complex(node: fx.Node, complex_nodes: Set[fx.Node]) -> bool:
    """Whether an argument of a node is complex."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return any(isinstance(leaf, complex) or (isinstance(leaf, fx.Node) and leaf in complex_nodes) for leaf in leaves)


def misfit(node: fx.Node, rule: Rule, complex_nodes: Set[fx.Node]) -> str:
    """Why a rule can't take the complex arguments of a node, or ``""``."""
    if rule.complex or not takes_complex(node, complex_nodes):
        return ""
    any_node = next((value for value in node.all_input_nodes if value in complex_nodes), "a constant")
    return (
        f"'{any_node}' is complex here, and the rule {rule.name} is one of real values; compute with real and "
        "imaginary parts: torch.view_as_real(z), z.real, z.imag, z.abs()"
    )
