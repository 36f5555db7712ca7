"""Whose fault it is that a network fails: its input's, or a rule's.

Note [Whose fault it is]
An operation of torch fails alike on an input of the wrong shape and inside a rule that is wrong. The original tells
them apart: what it takes, the rules have to take. Which rule it is, is found by a second pass, node by node, beside
what the original gives there: a rule that returns something else, a tensor or Moments of another shape, fails no
sooner than in the rule after it, which is innocent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from adfify import locations
from adfify.errors import InputError, RuleError
from adfify.layout import Inputs
from adfify.moments import ComplexMoments, Moments

if TYPE_CHECKING:
    from adfify.network import ADFNetwork
    from adfify.original import Origin


def blame(network: ADFNetwork, leaves: Sequence[Any], error: Exception) -> Exception:
    """Return what a failed pass is for the user: see Note [Whose fault it is].

    Args:
        network: which failed.
        leaves: its graph's inputs.
        error: that it failed with.

    Returns:
        InputError if the original fails on these inputs as well, else RuleError; the error itself where it says what
        it is already.
    """
    expected, taken = _of_original(network, leaves)
    if not taken:
        return error if isinstance(error, InputError) else refused(network, leaves, error)
    finder = _Finder(network, expected)
    said = f"{type(error).__name__}: {locations.shortened(error)}"
    try:
        finder.run(*leaves)
    except _OtherResult as other:
        said = str(other)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        if isinstance(error, InputError) and not finder.is_at_users_rule:
            return error  # said on purpose: by a check of the input, or by a rule of ours that knows what it can't take
    else:
        return RuleError("", network._name, "", "", f"{said}; not so when it was run once more, node by node")
    node, record = finder.node, finder.record
    op, rule = record.get("op") or str(node.target), record.get("rule") or ""
    return RuleError(node.name, op, rule, locations.source_line(node), said)


def _of_original(network: ADFNetwork, leaves: Sequence[Any]) -> tuple[dict[str, Any], bool]:
    """The shapes of what the original gives at every node, by its name, and whether it gets through."""
    from adfify.noisy import Original  # it runs networks, and this is one's

    class Watched(Original):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            found[node.name] = _shapes(result)
            return result

    found: dict[str, Any] = {}
    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    try:
        Watched(network).without_noise(Inputs.of(leaves, names))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return found, False
    return found, True


class _OtherResult(Exception):
    """A rule returned what can't stand for the original's result."""


class _Finder(fx.Interpreter):
    """Runs an ADF network node by node; :attr:`node` is the last one, where it went wrong.

    Args:
        network: whose rules are tried.
        expected: shapes of the original's results, by node.
    """

    node: fx.Node

    def __init__(self, network: ADFNetwork, expected: dict[str, Any]) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self._expected = expected
        self._records = {record["node"]: record for record in network.plan}

    @property
    def record(self) -> dict[str, Any]:
        """What the plan says of the node."""
        return self._records.get(self.node.name, {})

    @property
    def is_at_users_rule(self) -> bool:
        """Whether the node is computed by a rule that is not adfify's own."""
        rule = self.record.get("rule")
        return rule is not None and not rule.startswith("adfify.")

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        if self.is_at_users_rule:
            _check(result, self._expected.get(n.name), n.meta["origin"])
        return result


def _check(result: Any, expected: Any, origin: Origin) -> None:
    """Raise _OtherResult where a rule's result is not what the original's result calls for."""
    is_tensor = isinstance(expected, torch.Size)
    is_moments = isinstance(result, (Moments, ComplexMoments)) or origin.family == "metadata"
    if _shapes(result) != expected or (is_tensor and not is_moments):
        want = f"Moments of shape {tuple(expected)}" if is_tensor else "what the original returns"
        raise _OtherResult(f"a result that is {_described(result)}, and not {want}")


def _shapes(value: Any) -> Any:
    """The shapes of tensors and Moments, in the structure of lists and tuples; None for anything else."""
    if isinstance(value, (Tensor, Moments, ComplexMoments)):
        return torch.Size(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return None


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
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_described, value))}"[:200]
    return f"{value!r:.60}"
