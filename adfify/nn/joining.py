"""Joining tensors, and laying their elements out anew: what moves, repeats, sums or subtracts elements; all exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.moments import Moments, lift
from adfify.nn.complex_parts import each_part
from adfify.nn.structural import SOURCE, both, cat
from adfify.registry import Certain, OneOf, Uncertain, case, register

aten = torch.ops.aten

ADDED = "linearity; variances of independent terms add"

view = partial(register, family="structural", exact=True, source=SOURCE, complex=True)
copy = partial(view, alias=False)
added = partial(register, family="pooling", exact=True, source=ADDED)


@each_part()
def of_several(op: Callable[[list[Tensor]], Tensor], tensors: Sequence[Moments | Tensor]) -> Moments:
    """An operation that joins tensors, on all means and on all variances."""
    lifted = [lift(x) for x in tensors]
    return Moments(op([x.mean for x in lifted]), op([x.variance for x in lifted]))


_ROWS = [case([Uncertain((2, 3)), Uncertain((2, 3))]), case((Uncertain((3,)), Certain((3,))))]


@copy(torch.hstack, aten.hstack, cases=_ROWS)
def hstack(tensors: Sequence[Moments | Tensor]) -> Moments:
    return of_several(torch.hstack, tensors)


@copy(torch.vstack, torch.row_stack, aten.vstack, cases=_ROWS)
def vstack(tensors: Sequence[Moments | Tensor]) -> Moments:
    return of_several(torch.vstack, tensors)


@copy(torch.dstack, aten.dstack, cases=_ROWS)
def dstack(tensors: Sequence[Moments | Tensor]) -> Moments:
    return of_several(torch.dstack, tensors)


@copy(torch.column_stack, aten.column_stack, cases=_ROWS)
def column_stack(tensors: Sequence[Moments | Tensor]) -> Moments:
    return of_several(torch.column_stack, tensors)


@copy(torch.block_diag, torch.functional.block_diag, cases=[case(Uncertain((2, 3)), Certain((2, 2)), Uncertain((3,)))])
def block_diag(*tensors: Moments | Tensor) -> Moments:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    return of_several(lambda parts: torch.block_diag(*parts), given)  # type: ignore[no-untyped-call]


@view(torch.broadcast_tensors, torch.functional.broadcast_tensors, cases=[case(Uncertain((2, 1)), Uncertain((3,)))])
def broadcast_tensors(*tensors: Moments | Tensor) -> tuple[Moments | Tensor, ...]:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    shape = torch.broadcast_shapes(*[x.shape for x in given])  # type: ignore[no-untyped-call]
    return tuple(x.expand(shape) if isinstance(x, Tensor) else both(Tensor.expand, x, shape) for x in given)


@view(
    torch.meshgrid, torch.functional.meshgrid, complex=False,
    cases=[case(Uncertain((2,)), Uncertain((3,)), indexing="ij"),
           case([Uncertain((2,)), Uncertain((3,))], indexing="xy")],
)  # fmt: skip
def meshgrid(*tensors: Moments | Tensor, indexing: str = "ij") -> tuple[Moments, ...]:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    lifted = [lift(x) for x in given]
    means = torch.meshgrid(*[x.mean for x in lifted], indexing=indexing)
    variances = torch.meshgrid(*[x.variance for x in lifted], indexing=indexing)
    return tuple(map(Moments, means, variances))


@copy(
    torch.diag_embed, "diag_embed",
    cases=[case(Uncertain((2, 3))), case(Uncertain((2, 3)), 1, 0, 1), case(Uncertain((2, 3)), offset=-1)],
)  # fmt: skip
def diag_embed(input: Moments, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Moments:
    return both(torch.diag_embed, input, offset, dim1, dim2)


@view(torch.diag, "diag", cases=[case(Uncertain((3,)), 1), case(Uncertain((3, 4)), diagonal=-1), case(Uncertain((3,)))])
def diag(input: Moments, diagonal: int = 0) -> Moments:
    return both(torch.diag, input, diagonal)


@copy(torch.fliplr, "fliplr", cases=[case(Uncertain((3, 4)))])
def fliplr(input: Moments) -> Moments:
    return both(torch.fliplr, input)


@copy(torch.flipud, "flipud", cases=[case(Uncertain((3, 4)))])
def flipud(input: Moments) -> Moments:
    return both(torch.flipud, input)


@view(operator.pos, torch.positive, "positive", "__pos__", cases=[case(Uncertain((2, 3)))])
def positive(input: Moments) -> Moments:
    return input


@view(".data", cases=[case(Uncertain((2, 3)))])
def data(x: Moments) -> Moments:
    return x.detach()


@view("cpu", cases=[case(Uncertain((2, 3)))])
def cpu(input: Moments, memory_format: torch.memory_format = torch.preserve_format) -> Moments:
    return both(Tensor.cpu, input, memory_format=memory_format)


@added(torch.trace, "trace", complex=True, cases=[case(Uncertain((3, 4)))])
def trace(input: Moments) -> Moments:
    return both(torch.trace, input)


@added(
    torch.diff, "diff",
    cases=[
        case(Uncertain((2, 5))),
        case(Uncertain((5, 2)), 2, 0),
        case(Uncertain((2, 4)), prepend=Uncertain((2, 1)), append=Certain((2, 2))),
    ],
)  # fmt: skip
def diff(
    input: Moments | Tensor, n: int = 1, dim: int = -1, prepend: Moments | Tensor | None = None,
    append: Moments | Tensor | None = None,
) -> Moments:  # fmt: skip
    """Repeated differences weigh the elements with binomial coefficients: applied twice, the rule of one would not."""
    mean, variance = lift(cat([x for x in (prepend, input, append) if x is not None], dim))
    count = max(variance.shape[dim] - n, 0)
    terms = [math.comb(n, k) ** 2 * variance.narrow(dim, k, count) for k in range(n + 1)] if count else []
    spread = sum(terms[1:], terms[0]) if terms else variance.narrow(dim, 0, 0)
    return Moments(torch.diff(mean, n, dim), spread.clone() if n == 0 else spread)


# Sums and averages at certain places

_PLACES = torch.tensor([[1, 0, 0], [0, 0, 1]])
_ONES = torch.tensor([1, 0, 1])


@added(
    torch.scatter_reduce, "scatter_reduce", only={"reduce": OneOf("sum", "mean")},
    cases=[
        case(Uncertain((2, 3)), 0, _PLACES, Uncertain((2, 3)), "sum"),
        case(Certain((2, 3)), 0, _PLACES, Uncertain((2, 3)), reduce="mean"),
        case(Uncertain((3, 3)), 0, _PLACES, Uncertain((2, 3)), "mean", include_self=False),
    ],
)  # fmt: skip
@added("scatter_reduce_", only={"reduce": OneOf("sum", "mean")},
       cases=[case(Uncertain((2, 3)), 0, _PLACES, Uncertain((2, 3)), "mean")])  # fmt: skip
def scatter_reduce(
    input: Moments | Tensor, dim: int, index: Tensor, src: Moments | Tensor, reduce: str, *, include_self: bool = True
) -> Moments:
    a, b = lift(input), lift(src)
    mean = torch.scatter_reduce(a.mean, dim, index, b.mean, reduce, include_self=include_self)
    ones = [torch.ones_like(x.variance) for x in (a, b)]
    total, count = (
        torch.scatter_reduce(x, dim, index, y, "sum", include_self=include_self)
        for x, y in ((a.variance, b.variance), ones)
    )
    return Moments(mean, total / count.square() if reduce == "mean" else total)


@added(
    torch.index_reduce, "index_reduce", only={"reduce": "mean"},
    cases=[
        case(Uncertain((2, 3)), 0, _ONES, Uncertain((3, 3)), "mean"),
        case(Certain((3, 3)), 0, _ONES, Uncertain((3, 3)), "mean", include_self=False),
    ],
)  # fmt: skip
@added("index_reduce_", only={"reduce": "mean"}, cases=[case(Uncertain((2, 3)), 0, _ONES, Uncertain((3, 3)), "mean")])
def index_reduce(
    input: Moments | Tensor, dim: int, index: Tensor, source: Moments | Tensor, reduce: str, *,
    include_self: bool = True,
) -> Moments:  # fmt: skip
    if reduce != "mean":
        raise InputError(f"index_reduce(reduce={reduce!r}) of uncertain values has no rule; 'mean' has one.")
    b = lift(source)
    shape = [1] * b.mean.dim()
    shape[dim] = -1
    return scatter_reduce(input, dim, index.reshape(shape).expand(b.shape), b, "mean", include_self=include_self)
