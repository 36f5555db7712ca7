"""What a forward does with real tensors while it is traced with symbols.

Note [Real tensors in a symbolic trace]
`z = torch.zeros(2, 3)` in a forward is a real tensor, made once: torch.fx makes it a constant of the graph, by
reference. Where the model goes on to write into it, really or by an operation of the graph, the constant would hold
what was written at the end, and a real operation would not see what the graph has written. Such a model is traced once
more with the functions that make tensors as operations of the graph; likewise one that draws random numbers on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Constants:
    """The real tensors that a trace has put into its graph."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[Tensor, int]] = {}
        self._written: set[int] = set()
        self.are_written = False

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of it as it is now."""
        self.tensors[name] = tensor.detach().clone()
        self._sources[name] = tensor, tensor._version

    def write(self, name: str, tensor: Tensor) -> None:
        """Note that an operation of the graph writes into it."""
        self._written.add(_memory(tensor))
        self.are_written |= name in self.tensors

    def is_written(self, tensor: Tensor) -> bool:
        """Whether an operation of the graph has written into its memory."""
        return _memory(tensor) in self._written

    @property
    def are_stale(self) -> bool:
        """Whether one of them is written into, by the graph or really."""
        return self.are_written or any(tensor._version != version for tensor, version in self._sources.values())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


class Watch(TorchFunctionMode):
    """Sees every call of torch within.

    Args:
        constants: of the trace.
        make: makes a call an operation of the graph, or None where tensors are to be made really.
    """

    def __init__(self, constants: Constants, make: Callable[[Any, Any, Any], Any] | None) -> None:
        super().__init__()
        self._constants, self._make = constants, make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if type(leaf) is Tensor]
        if any(self._constants.is_written(tensor) for tensor in tensors) and not _is_symbolic(leaves):
            raise fx.proxy.TraceError("a tensor into which the graph has written is read outside of it")
        if self._make is not None and not tensors and not _is_symbolic(leaves) and is_factory(func):
            return self._make(func, args, kwargs)
        return func(*args, **kwargs)


def _is_symbolic(leaves: list[Any]) -> bool:
    return any(issubclass(type(leaf), fx.Proxy) for leaf in leaves)


def is_factory(func: Any) -> bool:
    """Whether a function of torch makes tensors of anything but tensors."""
    if func in (torch.tensor, torch.as_tensor):
        return True
    name = getattr(func, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if getattr(torch, name, None) is func else None
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        [str(result.type) for result in schema.returns] == ["Tensor"]
        and not any("Tensor" in str(argument.type) for argument in schema.arguments)
        for schema in (getattr(packet, overload)._schema for overload in packet.overloads())  # type: ignore[no-untyped-call]
    )
