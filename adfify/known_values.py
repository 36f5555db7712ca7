"""Values that a forward asks of its own buffers, and of the kind of its inputs, while it is traced.

Note [A value that is traced in]
`if self.steps > 3` follows one side for good. What is computed from buffers alone is known when the model is traced, so
the trace goes on with it; and the graph looks, at every call, whether it is still so: other weights may be loaded.
The dtype and the device of an input, and its number of axes, are those of the example; without one, an input that is
uncertain is floating-point, and taken to be of the dtype and on the device of the weights. What a rule or a module of
weights computes of it is taken to be like that too. It may not be so; then the graph says so at the call, and computes
nothing.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from adfify import inplace
from adfify.errors import InputError, ModelError
from adfify.registry import Rules

_OF_KIND = frozenset(
    {"dtype", "device", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "layout"}
)
_OF_AXES = frozenset({"ndim", "dim", "ndimension"})
_ASKED_BY_CALL = frozenset({"is_floating_point", "is_complex", "element_size", "get_device", "dim", "ndimension"})
QUESTIONS = _OF_KIND | {"ndim"}
"""Attributes of a tensor that say of what kind it is."""

_CASTS = frozenset(
    {"to", "type", "type_as", "double", "float", "half", "bfloat16", "cpu", "cuda", "view_as_real", "view_as_complex"}
)


class Known:
    """What is known of the values of a graph while it is traced.

    Args:
        root: the model.
        rules: the table: of what has a rule, an uncertain result is floating-point.
        uncertain: names of the inputs that are.
        example: inputs by name, those there are.
    """

    def __init__(self, root: nn.Module, rules: Rules, uncertain: frozenset[str], example: Mapping[str, Tensor]) -> None:
        self._root, self._rules, self._uncertain, self._example = root, rules, uncertain, example
        self._of_inputs = False

    def of(self, node: fx.Node) -> tuple[Any, bool]:
        """Return the value of a node, and whether the inputs have a part in it.

        Raises:
            LookupError: it depends on the content of an input, on a module, or on what the forward has written.
        """
        self._of_inputs = False
        return self._value(node), self._of_inputs

    def _value(self, node: fx.Node) -> Any:
        asked = _question(node)
        if asked:
            return self._kind(node, asked)
        if node.op == "get_attr":
            path = str(node.target)
            if any(inplace.written_by(other, self._root) is node for other in node.users):
                raise LookupError(path)
            if _is_written(path, node, self._root):
                raise LookupError(path)
            return _stored(self._root, path)
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            raise LookupError(node.name)
        if inplace.written_by(node, self._root) is not None:
            raise LookupError(node.name)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _kind(self, node: fx.Node, asked: str) -> Any:
        of = node.args[0]
        assert isinstance(of, fx.Node)
        self._of_inputs = True
        like, has_axes = self._like(of)
        if asked in _OF_AXES and not has_axes:
            raise LookupError(node.name)
        return getattr(like, asked) if node.target is getattr else getattr(like, asked)()

    def _like(self, node: fx.Node) -> tuple[Tensor, bool]:
        """A tensor of the kind of a node's, and whether it has as many axes."""
        if node.op == "placeholder":
            name = str(node.target)
            if name in self._example:
                return self._example[name], True
            if name not in self._uncertain:
                raise LookupError(name)
            return _empty_like(self._root), False
        if node.op == "get_attr":
            return _stored(self._root, str(node.target)), True
        target = inplace.target_of(node, self._root)
        rule = self._rules.find(target)
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        if rule is None or rule.certain or not node.all_input_nodes or name in _CASTS:
            raise LookupError(node.name)
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            if any(x.is_floating_point() for x in module.parameters()):
                return _empty_like(module), False
        kinds = [self._like(value)[0] for value in node.all_input_nodes if not _is_number(value)]
        dtype = functools.reduce(torch.promote_types, [kind.dtype for kind in kinds])
        return kinds[0].new_empty(0, dtype=dtype), False


def _question(node: fx.Node) -> str:
    """What a node asks of the kind of a tensor, ``""`` if nothing."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return ""
    if node.target is getattr:
        name = str(node.args[1])
        return name if name in QUESTIONS else ""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    is_torchs = node.op == "call_method" or getattr(torch, name, None) is node.target
    return name if is_torchs and name in _ASKED_BY_CALL and len(node.args) == 1 else ""


def _is_number(node: fx.Node) -> bool:
    """Whether it stands for a size."""
    return (
        node.target is getattr
        or (node.op == "call_method" and node.target == "size")
        or (node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_number(node.args[0]))
    )


def _empty_like(module: nn.Module) -> Tensor:
    """Nothing, of the dtype and on the device of a module's weights."""
    weights = itertools.chain(module.parameters(), module.buffers())
    like = next((x for x in weights if x.is_floating_point()), None)
    return torch.empty(0) if like is None else torch.empty(0, dtype=like.dtype, device=like.device)


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


def assert_inputs_as_traced(value: Any, traced: Any, where: str) -> None:
    """Raise InputError where the inputs are of another kind than those that the model was traced for."""
    if not torch.compiler.is_compiling() and value != traced:
        raise InputError(
            f"forward asks at {where or 'some line'} of what kind its inputs are (dtype, device, number of axes), and "
            f"was traced for those of which the answer is {traced!r}; for these it is {value!r}. Convert the model "
            "once more with example_inputs of this kind."
        )
