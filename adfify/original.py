"""The original operations of a network, kept beside the rules that stand for them.

Note [The original beside the rule]
Joint moments run the *original* network at noisy inputs, on the weights of the converted one: those may have been
loaded, moved or shared since. So every node of the ADF graph keeps the operation that it was made from, as something
that can be pickled, and every ADF module the class that it is the counterpart of. What writes in place writes into a
copy: a value may have been read before, by autograd too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adfify import inplace

Operation = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Method:
    """A method as a function."""

    name: str

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, self.name)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute as a function: ``x.T``."""

    name: str

    def __call__(self, x: Tensor) -> Any:
        return getattr(x, self.name)


@dataclass(frozen=True, eq=False)
class Overload:
    """An aten overload by its name, which can be pickled."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return operator.attrgetter(self.name)(torch.ops)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class OnCopy:
    """An operation that writes into its first argument, given a copy of it; the copy is the result."""

    operation: Operation

    __name__ = "on_copy"

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        copy = x.clone() if isinstance(x, Tensor) else x
        result = self.operation(copy, *args, **kwargs)
        return copy if result is None else result


@dataclass(frozen=True)
class Origin:
    """What a node of the ADF graph stands for.

    Attributes:
        operation: the original operation, with the arguments of the node; None for a module, which knows it itself.
        family: of the rule, or None where there is none.
        exact: whether the rule is.
        mask: of a dropout whose masks are random, the function or ADF module class that draws them.
        continuous: whether the operation is.
    """

    operation: Operation | None
    family: str | None = None
    exact: bool = False
    mask: Operation | None = None
    continuous: bool = True


def identity(x: Any, *args: Any) -> Any:
    """What the original does where only Moments are made or their variance is bounded: nothing."""
    return x


def of_node(node: fx.Node, root: nn.Module) -> Operation:
    """The operation of a function's or method's node of a traced graph; it takes the arguments of that node's rule."""
    operation = named(node)
    if node.kwargs.get("dropout_p"):
        return With(operation, "dropout_p", 0.0)
    if inplace.written_by(node, root) is None:
        return operation
    return _without_inplace(node, operation) or OnCopy(operation)


def copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten.copy``, which has no derivative in torch."""
    return source.to(x).expand_as(x)


def slice_scattered(
    x: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``aten.slice_scatter``, which has no derivative in torch for complex values."""
    written = x.clone()
    torch.ops.aten.slice.Tensor(written, dim, start, end, step).copy_(src)
    return written


def select_scattered(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """``aten.select_scatter``, likewise."""
    written = x.clone()
    written.select(dim, index).copy_(src)
    return written


# The gradient is wanted through the network as it computes, not as it was trained.
_DIFFERENTIABLE: dict[Any, Operation] = {
    "detach": identity,
    torch.detach: identity,
    torch.ops.aten.detach.default: identity,
    torch.ops.aten.copy.default: copied,
    torch.ops.aten.slice_scatter.default: slice_scattered,
    torch.ops.aten.select_scatter.default: select_scattered,
}


def named(node: fx.Node) -> Operation:
    """The operation as a function that can be pickled."""
    if node.target in _DIFFERENTIABLE:
        return _DIFFERENTIABLE[node.target]
    if node.op == "call_method":
        return Method(str(node.target))
    if node.target is getattr and node.args[1] == "data":
        return identity  # as detach
    if node.target is getattr:
        return Attribute(str(node.args[1]))
    if isinstance(node.target, torch._ops.OpOverload):
        return Overload(str(node.target))
    assert callable(node.target)
    return node.target


@dataclass(frozen=True, eq=False)
class With:
    """An operation with one keyword changed: ``inplace=True`` to False, ``dropout_p`` to 0."""

    operation: Operation
    name: str
    value: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.operation(*args, **{**kwargs, self.name: self.value})


def _without_inplace(node: fx.Node, operation: Operation) -> Operation | None:
    """The operation out of place, where an ``inplace=True`` among the keywords is all that makes it write."""
    return With(operation, "inplace", False) if node.kwargs.get("inplace") is True else None


def of_module(module: nn.Module) -> nn.Module:
    """The original module on the tensors of an ADF one, children included; any other module is itself, out of place."""
    return _plain(module, {})


def _plain(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    kind: type[nn.Module] = module.__dict__.get("replaces") or type(module)
    plain = made[id(module)] = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    plain.__dict__.pop("replaces", None)
    plain.__dict__["training"] = False  # the policy decides on dropout, not the flag
    if plain.__dict__.get("inplace") is True:
        plain.__dict__["inplace"] = False
    plain.__dict__["_modules"] = {
        name: None if child is None else _plain(child, made) for name, child in module._modules.items()
    }
    return plain
