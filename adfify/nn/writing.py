"""Choosing by a certain mask, and writing into a tensor: a written element takes the moments of what is written.

torch.export makes writes through views functional: `aten.slice_scatter`, `aten.copy`, `aten.fill` are theirs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from adfify.errors import InputError
from adfify.moments import Moments, lift, variance_dtype
from adfify.nn.complex_parts import each_part, is_complex
from adfify.nn.resampling import laid_out_like
from adfify.registry import Certain, Rule, Uncertain, case, register

aten = torch.ops.aten

WRITTEN = "a written element takes the moments of what is written"
ADDED = "linearity; variances of independent terms add"

written = partial(register, family="structural", exact=True, source=WRITTEN, alias=False, complex=True)
added = partial(register, family="pooling", exact=True, source=ADDED, complex=True)

_MASK = torch.tensor([[True, False, True], [False, True, False]])
_PLACES = torch.tensor([[1, 0, 0], [0, 1, 1]])


# Choices by a certain condition


@written(
    torch.where,
    cases=[
        case(_MASK, Uncertain((2, 3)), Uncertain((3,))),
        case(_MASK, Uncertain((2, 3)), Certain((2, 1))),
        case(_MASK, 2.5, Uncertain((2, 3))),
        case(_MASK[0], Uncertain((3,)), Certain((2, 3))),
    ],
)
@each_part("input", "other")
def where(condition: Tensor, input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    mean = torch.where(condition, _mean(input), _mean(other))
    variance = torch.where(condition, _variance(input, mean), _variance(other, mean))
    return Moments(mean, variance.expand(mean.shape))


@written("where", cases=[case(Uncertain((2, 3)), _MASK, 2.5), case(Uncertain((2, 3)), _MASK, Uncertain((2, 3)))])
def where_method(input: Moments | Tensor, condition: Tensor, /, other: Moments | Tensor | float) -> Moments:
    return where(condition, input, other)


def _mean(x: Moments | Tensor | float) -> Any:
    return x.mean if isinstance(x, Moments) else x


def _variance(x: Moments | Tensor | float, like: Tensor) -> Tensor:
    dtype = variance_dtype(like.dtype)
    return x.variance.to(dtype) if isinstance(x, Moments) else like.new_zeros((), dtype=dtype)


@written(
    torch.masked_fill,
    "masked_fill",
    "masked_fill_",
    cases=[case(Uncertain((2, 3)), _MASK, -1e4), case(Uncertain((2, 3)), _MASK, 0)],
)
@each_part("value")
def masked_fill(input: Moments, mask: Tensor, value: Tensor | float) -> Moments:
    return Moments(torch.masked_fill(input.mean, mask, value), torch.masked_fill(input.variance, mask, 0.0))


# Writes, in place or made functional by torch.export


@written(
    torch.slice_scatter,
    "slice_scatter",
    cases=[
        case(Uncertain((2, 5)), Uncertain((2, 2)), 1, 1, 3),
        case(Certain((2, 5)), Uncertain((2, 2)), 1, None, 4, 2),
        case(Uncertain((2, 5)), Certain((1, 5)), 0, 1),
    ],
)
def slice_scatter(
    input: Moments | Tensor, src: Moments | Tensor, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Moments:  # fmt: skip
    return _both_of_two(torch.slice_scatter, input, src, dim, start, end, step)


@written(
    torch.select_scatter,
    "select_scatter",
    cases=[case(Certain((2, 3)), Uncertain((2,)), 1, 0), case(Uncertain((2, 3)), Certain((3,)), 0, 1)],
)
def select_scatter(input: Moments | Tensor, src: Moments | Tensor, dim: int, index: int) -> Moments:
    return _both_of_two(torch.select_scatter, input, src, dim, index)


@written("copy_", cases=[case(Uncertain((2, 3)), Uncertain((3,)))])
@written(aten.copy, cases=[case(Certain((2, 3)), Uncertain((2, 1)))])
def copied(input: Moments | Tensor, src: Moments | Tensor, non_blocking: bool = False) -> Moments:
    _refuse_lost_part(input, src)
    return _copied(input, src)


@each_part()
def _copied(input: Moments | Tensor, src: Moments | Tensor) -> Moments:
    new, like = lift(src), input.mean if isinstance(input, Moments) else input
    parts = new.mean.to(like), new.variance.to(like.device, variance_dtype(like.dtype))
    return Moments(*[laid_out_like(part.expand_as(like), like) for part in parts])


@written(torch.fill, "fill_", cases=[case(Uncertain((2, 3)), 2.5)])
@each_part("value")
def fill(input: Moments, value: Tensor | float) -> Moments:
    return Moments(torch.fill(input.mean, value), torch.fill(input.variance, 0.0))


@written(aten.zero, "zero_", cases=[case(Uncertain((2, 3)))])
def zero(input: Moments) -> Moments:
    return fill(input, 0.0)


def _refuse_lost_part(into: Any, written: Any) -> None:
    if is_complex(written) and not is_complex(into):
        raise InputError(
            "a complex uncertain value is written into a real tensor here, without its imaginary part: take .real."
        )


def _both_of_two(op: Callable[..., Tensor], x: Moments | Tensor, y: Moments | Tensor, *args: Any) -> Moments:
    _refuse_lost_part(x, y)
    return _of_two(op, x, y, *args)


@each_part()
def _of_two(op: Callable[..., Tensor], x: Moments | Tensor, y: Moments | Tensor, *args: Any) -> Moments:
    a, b = lift(x), lift(y)
    return Moments(op(a.mean, b.mean, *args), op(a.variance, b.variance, *args))


_FUNCTIONAL = [case(Certain((2, 3)), 0, _PLACES, Uncertain((2, 3)))]
_WRITING = [case(Uncertain((2, 3)), 0, _PLACES, Uncertain((2, 3)))]
_ROWS = torch.tensor([0, 0, 1])


@written(
    aten.index_put, only={"accumulate": False}, cases=[case(Certain((2, 3)), [None, _ROWS[:1]], Uncertain((2, 1)))]
)
@written(
    "index_put",
    "index_put_",
    only={"accumulate": False},
    cases=[
        case(Uncertain((3, 2)), [torch.tensor([2, 0])], Uncertain((2, 2))),
        case(Uncertain((2, 3)), [_MASK], Certain(())),
    ],
)
def index_put(
    input: Moments | Tensor, indices: Sequence[Tensor | None], values: Moments | Tensor, accumulate: bool = False
) -> Moments:
    def put(x: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.index_put.default(x, list(indices), y)  # type: ignore[no-any-return]

    return _both_of_two(put, input, values)


@written(torch.index_copy, "index_copy", cases=[case(Certain((4, 2)), 0, torch.tensor([2, 0]), Uncertain((2, 2)))])
@written("index_copy_", cases=[case(Uncertain((2, 3)), 1, torch.tensor([2, 0]), Certain((2, 2)))])
def index_copy(input: Moments | Tensor, dim: int, index: Tensor, source: Moments | Tensor) -> Moments:
    return _both_of_two(lambda x, y: torch.index_copy(x, dim, index, y), input, source)


@written(torch.index_fill, "index_fill", cases=[case(Uncertain((2, 3)), 1, torch.tensor([2, 0]), 2.5)])
@written("index_fill_", cases=[case(Uncertain((2, 3)), 0, torch.tensor([1]), 2.5)])
@each_part("value")
def index_fill(input: Moments, dim: int, index: Tensor, value: Tensor | float) -> Moments:
    mean = torch.index_fill(input.mean, dim, index, value)
    return Moments(mean, torch.index_fill(input.variance, dim, index, 0.0))


@written(torch.scatter, "scatter", cases=[*_FUNCTIONAL, case(Uncertain((2, 3)), 1, _PLACES, 2.5)])
@written("scatter_", cases=_WRITING)
def scatter(input: Moments | Tensor, dim: int, index: Tensor, src: Moments | Tensor | float) -> Moments:
    if isinstance(src, (int, float, complex)):
        like = input if isinstance(input, Tensor) else input.mean
        src = like.new_full((), src).expand(index.shape)
    return _both_of_two(lambda x, y: torch.scatter(x, dim, index, y), input, src)


@added(torch.scatter_add, "scatter_add", cases=_FUNCTIONAL)
@added("scatter_add_", cases=_WRITING)
def scatter_add(input: Moments | Tensor, dim: int, index: Tensor, src: Moments | Tensor) -> Moments:
    return _both_of_two(lambda x, y: torch.scatter_add(x, dim, index, y), input, src)


@added(torch.index_add, "index_add", cases=[case(Certain((2, 3)), 0, _ROWS, Uncertain((3, 3)))])
@added("index_add_", cases=[case(Uncertain((2, 3)), 0, _ROWS, Uncertain((3, 3)), alpha=2)])
@each_part()
def index_add(
    input: Moments | Tensor, dim: int, index: Tensor, source: Moments | Tensor, *, alpha: float = 1
) -> Moments:
    a, b = lift(input), lift(source)
    mean = torch.index_add(a.mean, dim, index, b.mean, alpha=alpha)
    return Moments(mean, torch.index_add(a.variance, dim, index, b.variance, alpha=alpha**2))


@written(
    operator.setitem,
    cases=[
        case(Uncertain((2, 3)), (slice(None), slice(0, 2)), Uncertain((2, 2))),
        case(Uncertain((2, 3)), 0, Uncertain((3,))),
        case(Uncertain((2, 3)), _MASK, 2.5),
    ],
)
def setitem(input: Moments | Tensor, index: Any, value: Moments | Tensor | float) -> Moments:
    """``input[index] = value``; the result is what ``input`` is then."""
    _refuse_lost_part(input, value)
    return _with_item(input, index, value)


@each_part("value")
def _with_item(input: Moments | Tensor, index: Any, value: Moments | Tensor | float) -> Moments:
    a, b = lift(input), lift(value) if isinstance(value, Moments | Tensor) else Moments(value, 0.0)  # type: ignore[arg-type]
    mean, variance = a.mean.clone(), laid_out_like(a.variance, a.mean).clone()
    mean[index] = b.mean
    variance[index] = b.variance
    return Moments(mean, variance)


# Writes through views


@dataclass(frozen=True)
class Given:
    """In a view's arguments: a value that the network computes, by its number."""

    number: int


@dataclass(frozen=True, eq=False)
class Written:
    """A copy of a tensor, in which the elements that a view shows are others: what a write through a view leaves.

    Attributes:
        views: operation, further positional and keyword arguments, one view of the other.
    """

    views: tuple[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], ...]

    __name__ = "written"

    def __call__(self, input: Moments | Tensor, value: Moments | Tensor, *given: Any) -> Any:
        if isinstance(input, Tensor) and isinstance(value, Tensor):
            return self._written(input.clone(), value, given)
        a, b = lift(input), lift(value)
        mean = self._written(a.mean.clone(), b.mean, given)
        return Moments(mean, self._written(torch.empty_like(mean).copy_(a.variance), b.variance, given))

    def _written(self, copy: Tensor, value: Tensor, given: Sequence[Any]) -> Tensor:
        view, is_part = self._view(copy, given)
        if not is_part:
            view.copy_(value)
            return copy
        # Autograd lets nothing be written into one of the parts that `chunk` or `unbind` returns.
        places, _ = self._view(torch.arange(copy.numel(), device=copy.device).view(copy.shape), given)
        parts = value.to(copy.dtype).expand(places.shape).reshape(-1)
        return laid_out_like(copy.reshape(-1).index_put((places.reshape(-1),), parts).view(copy.shape), copy)

    def _view(self, x: Tensor, given: Sequence[Any]) -> tuple[Any, bool]:
        """The view of a tensor, and whether it is one of several that one operation returned."""
        view: Any = x
        is_part = False
        for operation, args, kwargs in self.views:
            args, kwargs = map_aggregate(
                (args, kwargs), lambda leaf: given[leaf.number] if isinstance(leaf, Given) else leaf
            )
            view = operation(view, *args, **kwargs)
            is_part = is_part or not isinstance(view, Tensor)
        return view, is_part

    @property
    def rule(self) -> Rule:
        """Of this write."""
        return Rule((self,), self, "structural", True, WRITTEN, 0.0, False, {}, ())
