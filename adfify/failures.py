"""Whose fault it is that a network fails: its input's, or a rule's.

Note [Whose fault it is]
An operation of torch fails alike on an input of the wrong shape and inside a rule that is wrong. The original tells
them apart: what it takes, the rule has to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from adfify import locations
from adfify.errors import AdfifyError, InputError, RuleError
from adfify.layout import Inputs
from adfify.moments import Moments

if TYPE_CHECKING:
    from adfify.network import ADFNetwork


def blame(network: ADFNetwork, leaves: Sequence[Any], error: Exception) -> AdfifyError:
    """Return the error of a failed pass: InputError if the original fails on these inputs as well, else RuleError."""
    from adfify.noisy import Original  # it runs networks, and this is one's

    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    try:
        Original(network).without_noise(Inputs.of(leaves, names))
    except AdfifyError as other:
        return other
    except Exception:
        return refused(network, leaves, error)
    finder = _Finder(network)
    try:
        with torch.no_grad():
            finder.run(*leaves)
    except Exception:
        node = finder.node
    else:
        return refused(network, leaves, error)
    record = next((record for record in network.plan if record["node"] == node.name), {})
    return RuleError(
        node.name,
        record.get("op") or str(node.target),
        record.get("rule") or "",
        locations.source_line(node),
        f"{type(error).__name__}: {locations.shortened(error)}",
    )


class _Finder(fx.Interpreter):
    """Runs an ADF network node by node; :attr:`node` is the last one."""

    node: fx.Node

    def __init__(self, network: ADFNetwork) -> None:
        super().__init__(network)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def refused(network: ADFNetwork, leaves: Sequence[Any], error: Exception, hint: str = "") -> InputError:
    """Return the error that says what inputs the original does not take."""
    name, said = network._name, ", ".join(map(_described, leaves))
    return InputError(
        f"{name} can't be evaluated on {said}: {locations.shortened(error)}\n"
        f"Give inputs of the shape, dtype and device that the original {name} takes.{hint}"
    )


def _described(value: Any) -> str:
    if isinstance(value, (Tensor, Moments)):
        kind = "Moments" if isinstance(value, Moments) else "a Tensor"
        return f"{kind} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    return f"{value!r:.60}"
