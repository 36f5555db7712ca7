"""Functions that close over tensors, made anew with others: what torch.export's loops have to be handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor


def tensors_of(f: Any) -> list[Tensor]:
    """The tensors that a function sees by closure, in order; those of functions and tuples that it sees as well."""
    if isinstance(f, Tensor):
        return [f]
    if type(f) in (tuple, list):
        return [tensor for part in f for tensor in tensors_of(part)]
    if not isinstance(f, FunctionType):
        return []
    return [tensor for cell in f.__closure__ or () for tensor in tensors_of(cell.cell_contents)]


def with_tensors(f: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """The function with these in the place of :func:`tensors_of` it."""
    rebound: Callable[..., Any] = _rebound(f, iter(tensors))
    return rebound


def _rebound(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) in (tuple, list):
        return type(value)([_rebound(part, tensors) for part in value])
    if not isinstance(value, FunctionType) or not tensors_of(value):
        return value
    cells = tuple(CellType(_rebound(cell.cell_contents, tensors)) for cell in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__ = value.__kwdefaults__
    return made
