"""The values that a model's forward is called with while torch.fx traces it symbolically.

Note [What a symbolic value can't answer]
A torch.fx proxy is no tensor, and Python asks it no leave before it says so: `isinstance(x, torch.Tensor)` is False,
and the model's other branch is traced without a word. `isinstance` reads the attribute `__class__`, so that is where
such a question can be seen. It is let pass where False is true (a tensor is no tuple), and else stops the trace:
torch.export runs the model on real tensors and knows the answer. torch's own code asks all the time and is let be.
"""

from __future__ import annotations

import ast
import linecache
import operator
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from adfify.known_values import QUESTIONS

_ASKING = ("isinstance", "is_tensor")


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """The method of a proxy that is an in-place operator of Python."""

    def written(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return written


class Proxy(fx.Proxy):
    """Keeps `y += x` in place: torch.fx makes it `y = y + x`, which the other names of y would miss."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asked = _question(sys._getframe(1))
        if asked and not (_is_about_containers(asked) and _is_surely_tensor(self.node, self.tracer.root)):  # type: ignore[attr-defined]
            self.tracer.stop(f"`{asked}` asks for the type of a value, which symbolic tracing does not know")  # type: ignore[attr-defined]
        return Proxy

    def __getattr__(self, name: str) -> Any:
        # `hasattr(x, name)` and `getattr(x, name, default)` are answered as a tensor would.
        known = name not in ("node", "tracer") and hasattr(torch.Tensor, name)
        if not known and (name in ("node", "tracer") or _is_surely_tensor(self.node, self.tracer.root)):  # type: ignore[attr-defined]
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name not in QUESTIONS:
            return _Attribute(self, name)
        kind = Kind(self, name)
        return kind.value() if _is_identity(sys._getframe(1), name) else kind

    def __len__(self) -> int:
        return self.tracer.stop("len() asks for a size that symbolic tracing does not know")  # type: ignore[attr-defined,no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", "clone", (self,), {})

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return operator.index(self.tracer.value_of(self, self._no_index))  # type: ignore[attr-defined]

    def _no_index(self) -> Any:
        # torch asks so whether an argument is one size or several, and takes this for an answer.
        raise TypeError("a Python index is made of a value that only the inputs say")

    def __float__(self) -> float:
        return float(self._number())

    def _number(self) -> Any:
        return self.tracer.value_of(self, self._unknown)  # type: ignore[attr-defined]

    def _unknown(self) -> Any:
        raise fx.proxy.TraceError("a Python number is made of a value that only the inputs say")

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def _not_kept(self, other: Any) -> Any:
        self.tracer.stop("`@=` can't be followed symbolically")  # type: ignore[attr-defined]

    __imatmul__ = _not_kept


class _Attribute(fx.proxy.Attribute, Proxy):
    """An attribute, `x.shape`, which is asked as any other value is."""


class Kind(fx.proxy.Attribute):
    """The dtype, the device or the number of axes of a proxy: looked up in tables, too, by what it is."""

    def __hash__(self) -> int:
        return hash(self.value())

    def __index__(self) -> int:
        return operator.index(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def value(self) -> Any:
        """What it is, as far as that is known while tracing."""
        return self.tracer.value_of(self, self._unknown)  # type: ignore[attr-defined]

    def _unknown(self) -> Any:
        raise fx.proxy.TraceError(f"forward asks for the {self.attr} of a value, which symbolic tracing does not know")


def _is_identity(frame: FrameType, name: str) -> bool:
    """Whether a line of the model's own compares an attribute by `is`, which a symbol is not."""
    if _is_tracing(frame.f_globals.get("__name__", "")):
        return False
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return bool(re.search(rf"\.{name}\s+is\b|\bis\s+(not\s+)?[\w.]+\.{name}\b", line))


def _question(frame: FrameType | None) -> str:
    """The text of the question for the type of a value that the model's own code asks in this frame, or ``""``."""
    if frame is not None and frame.f_code.co_name == "is_tensor" and frame.f_globals.get("__name__") == "torch":
        return "torch.is_tensor(...)"
    while frame is not None and frame.f_globals.get("__name__") in ("abc", "_py_abc", "typing"):
        frame = frame.f_back  # an abstract class such as Sequence asks on behalf of its caller
    if frame is None or _is_tracing(frame.f_globals.get("__name__", "")):
        return ""
    if not set(_ASKING) & set(frame.f_code.co_names):
        return ""  # C++ asks, what it was given by torch.arange(n)
    return _question_in(linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip())


def _is_tracing(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "adfify")


def _question_in(line: str) -> str:
    """What asks in a line of code; the line itself where it is no whole statement, or where there is no source."""
    if line and not any(name in line for name in _ASKING):
        return ""
    calls = [node for node in ast.walk(_parsed(line)) if isinstance(node, ast.Call)]
    asking = [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id in _ASKING]
    return " and ".join(asking) or line or "isinstance(...)"


def _parsed(line: str) -> ast.Module:
    try:
        return ast.parse(f"{line.removeprefix('el')}\n pass" if line.endswith(":") else line)
    except SyntaxError:
        return ast.Module([], [])


def _is_about_containers(question: str) -> bool:
    """Whether it asks, for all that it says, for lists and the like, which a tensor is not."""
    return question.startswith("isinstance(") and "..." not in question and "Tensor" not in question


_SEVERAL = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)


def _is_surely_tensor(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node's value is one tensor, whatever the model is given."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_method":
        return _returns_one_tensor(str(node.target))
    if node.op == "call_function":
        made_of_tensors = any(_is_surely_tensor(value, root) for value in node.all_input_nodes)
        return made_of_tensors and _returns_one_tensor(getattr(node.target, "__name__", ""))
    called = root.get_submodule(str(node.target))
    return type(called).__module__.startswith("torch.nn.") and not isinstance(called, _SEVERAL)


def _returns_one_tensor(name: str) -> bool:
    """Whether every form of an aten operation on a tensor does."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    on_tensors = [one for one in schemas if one.arguments and str(one.arguments[0].type) == "Tensor"]
    return bool(on_tensors) and all([str(result.type) for result in one.returns] == ["Tensor"] for one in on_tensors)
