"""Values that a forward asks of its own buffers while it is traced: a flag, a number of steps.

Note [A value that is traced in]
`if self.steps > 3` follows one side for good. What is computed from buffers alone is known when the model is traced, so
the trace goes on with it; and the graph looks, at every call, whether it is still so: other weights may be loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from adfify import inplace
from adfify.errors import ModelError


def of_buffers(node: fx.Node, root: nn.Module) -> Any:
    """The value of a node that is computed from parameters and buffers alone.

    Raises:
        LookupError: it depends on an input, on a module, or on what the forward has written.
    """
    if node.op == "get_attr":
        path = str(node.target)
        if any(inplace.written_by(other, root) is node for other in node.users) or _is_written(path, node, root):
            raise LookupError(path)
        return _stored(root, path)
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        raise LookupError(node.name)
    if inplace.written_by(node, root) is not None:
        raise LookupError(node.name)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: of_buffers(value, root))
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _stored(root: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its path; looked up in the tables, for torch.fx makes proxies of attributes."""
    *parents, name = path.split(".")
    module: nn.Module | None = root
    for parent in parents:
        module = None if module is None else module._modules.get(parent)
    tables = () if module is None else (module._parameters, module._buffers)
    found = next((table[name] for table in tables if table.get(name) is not None), None)
    if found is None:
        raise LookupError(path)
    return found


def _is_written(path: str, node: fx.Node, root: nn.Module) -> bool:
    written = (inplace.written_by(other, root) for other in node.graph.nodes)
    return any(one is not None and one.op == "get_attr" and one.target == path for one in written)


def assert_as_traced(value: Any, traced: Any, where: str) -> None:
    """Raise ModelError where a value is no longer what the model was traced with."""
    if torch.compiler.is_compiling():
        return
    now = value.item() if isinstance(value, Tensor) else value
    if now != traced:
        raise ModelError(
            f"forward went by a buffer's value when the model was converted, {traced!r} at {where or 'some line'}, and "
            f"it is {now!r} now. Convert the model with these weights."
        )
