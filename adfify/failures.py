"""Whose fault it is that a network fails: its input's, or a rule's.

Note [Whose fault it is]
An operation of torch fails alike on an input of the wrong shape and inside a rule that is wrong. The original tells
them apart: what it takes, the rules have to take. Which rule it is, is found by a second pass, node by node, beside
what the original gives there: a rule that returns something else, a tensor or Moments of another shape, fails no
sooner than in the rule after it, which is innocent.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from adfify import locations
from adfify.errors import AdfifyError, InputError, InternalError, RuleError
from adfify.layout import Inputs
from adfify.moments import ComplexMoments, Moments, concrete, is_moments

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
    return finder.error(said)


# Note [The result of a rule of the user's]
# A rule may return another shape than the original, a tensor, a negative variance or NaN. In the last operation
# nothing comes after it that would fail. So a network with rules that are not adfify's own is run beside its original,
# node by node, the first time that it gets inputs of some shapes; the variances that it returns are looked at always.


def check_users_rules(network: ADFNetwork, leaves: Sequence[Any], outputs: Any) -> None:
    """Raise RuleError where a rule of the user's returns what it must not; see the note above."""
    if torch.compiler.is_compiling() or all(_is_ours(record) for record in network.plan):
        return
    seen: set[Any] = network.__dict__.setdefault("_checked_on", set())
    key = tuple((type(x), x.shape, x.dtype) if isinstance(x, (Tensor, Moments)) else type(x) for x in leaves)
    if key in seen and not _faulty(outputs):
        return
    expected, taken = _of_original(network, leaves)
    finder = _Finder(network, expected)
    try:
        with torch.no_grad():
            finder.run(*leaves)
    except _OtherResult as other:
        if taken:
            raise finder.error(str(other)) from None
    seen.add(key)


def _is_ours(record: dict[str, Any]) -> bool:
    rule = record.get("rule")
    return rule is None or rule.startswith("adfify.")


def _faulty(outputs: Any) -> str:
    """What is wrong with the numbers of Moments, ``""`` for nothing."""
    for x in pytree.tree_leaves(outputs, is_leaf=is_moments):
        if isinstance(x, Moments) and concrete(x.variance):
            if bool((x.variance < 0).any()):
                return f"a variance of {float(x.variance.min()):.3g}"
            if bool(x.variance.isnan().any()) or bool(x.mean.isnan().any()):
                return "NaN"
    return ""


def _written_at(node: fx.Node, network: ADFNetwork) -> str:
    """``file:line`` of the function, or of the module class's forward, that a node calls."""
    called = type(network.get_submodule(str(node.target))).forward if node.op == "call_module" else node.target
    code = getattr(inspect.unwrap(called), "__code__", None) if callable(called) else None
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def of_joint(network: ADFNetwork, leaves: Sequence[Any], error: Exception) -> AdfifyError:
    """Return what a failure of :meth:`ADFNetwork.joint` is for the user.

    Args:
        network: which failed.
        leaves: its graph's inputs.
        error: that it failed with, raised by no check of ours.

    Returns:
        InputError if the original fails on these inputs as well, else InternalError.
    """
    if not _of_original(network, leaves)[1]:
        return refused(network, leaves, error, " joint() takes a batch, [N, ...].")
    frames = traceback.extract_tb(error.__traceback__)
    where = next((frame for frame in reversed(frames) if locations.is_own(frame.filename)), frames[-1])
    return InternalError(
        f"joint() of {network._name} failed with {type(error).__name__}: {locations.shortened(error)}\n"
        f"in {where.name}, {Path(where.filename).name}:{where.lineno}. The original {network._name} takes these "
        "inputs, so the fault is adfify's: please report it. joint(method='sketch'), which asks for no gradients, or "
        "monte_carlo(model, x) may do until then."
    )


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
        self._expected, self._network = expected, network
        self._records = {record["node"]: record for record in network.plan}

    @property
    def record(self) -> dict[str, Any]:
        """What the plan says of the node."""
        return self._records.get(self.node.name, {})

    @property
    def is_at_users_rule(self) -> bool:
        """Whether the node is computed by a rule that is not adfify's own."""
        return not _is_ours(self.record)

    def error(self, said: str) -> RuleError:
        """The error for the node."""
        node, record = self.node, self.record
        op, rule = record.get("op") or str(node.target), record.get("rule") or ""
        written_at = _written_at(node, self._network) if self.is_at_users_rule else ""
        return RuleError(node.name, op, rule, locations.source_line(node), said, written_at)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        if self.is_at_users_rule:
            _check(result, self._expected.get(n.name), n.meta["origin"])
            given = [self.env[value] for value in n.all_input_nodes]
            if _faulty(result) and not _faulty(given):
                raise _OtherResult(f"a result that holds {_faulty(result)}, of what holds none")
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
