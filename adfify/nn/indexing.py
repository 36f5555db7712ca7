"""Picking elements, by slices and by certain indices: what is picked keeps its moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.moments import Moments
from adfify.nn.structural import SOURCE, both, parts
from adfify.registry import Uncertain, case, register

aten = torch.ops.aten

view = partial(register, family="structural", exact=True, source=SOURCE, complex=True)
copy = partial(register, family="structural", exact=True, source=SOURCE, alias=False, complex=True)

_ROWS = torch.tensor([2, 0, 1, 2])
_PLACES = torch.tensor([[1, 0, 0], [0, 1, 1]])


# Views


@view(torch.select, "select", cases=[case(Uncertain((2, 3)), 1, -1)])
def select(input: Moments, dim: int, index: int) -> Moments:
    return both(torch.select, input, dim, index)


@view(
    aten.slice.Tensor,
    cases=[case(Uncertain((2, 5)), 1, 1, 9223372036854775807, 2), case(Uncertain((2, 5)), 1, None, -1)],
)
def slice_(
    input: Moments, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Moments:  # fmt: skip
    return both(aten.slice.Tensor, input, dim, start, end, step)


@view(torch.narrow, "narrow", cases=[case(Uncertain((2, 5)), 1, 1, 3)])
def narrow(input: Moments, dim: int, start: int, length: int) -> Moments:
    return both(torch.narrow, input, dim, start, length)


@view(torch.diagonal, "diagonal", cases=[case(Uncertain((3, 4)), 1), case(Uncertain((2, 3, 4)), 0, 1, 2)])
def diagonal(input: Moments, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Moments:
    return both(torch.diagonal, input, offset, dim1, dim2)


@view(
    torch.linalg.diagonal, aten.linalg_diagonal, cases=[case(Uncertain((2, 3, 4)), offset=1), case(Uncertain((3, 3)))]
)
def linalg_diagonal(A: Moments, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Moments:
    return both(torch.diagonal, A, offset, dim1, dim2)


@view(
    torch.movedim,
    "movedim",
    cases=[case(Uncertain((2, 3, 4)), 0, 2), case(Uncertain((2, 3, 4)), (0, 1), (2, 0))],
)
def movedim(input: Moments, source: Any, destination: Any) -> Moments:
    return both(torch.movedim, input, source, destination)


# torch.func.vmap, of which the tests are made, knows moveaxis only with tuples.
view(torch.moveaxis, "moveaxis", cases=[case(Uncertain((2, 3, 4)), (0, 1), (2, 0))])(movedim)


@view(torch.broadcast_to, "broadcast_to", cases=[case(Uncertain((2, 1)), (2, 3))])
def broadcast_to(input: Moments, size: Any) -> Moments:
    return both(torch.broadcast_to, input, size)


@view(aten.alias, cases=[case(Uncertain((2, 3)))])
def alias(input: Moments) -> Moments:
    return input


@view(torch.atleast_1d, cases=[case(Uncertain(()))])
def atleast_1d(input: Moments) -> Moments:
    return both(torch.atleast_1d, input)


@view(torch.atleast_2d, cases=[case(Uncertain((3,)))])
def atleast_2d(input: Moments) -> Moments:
    return both(torch.atleast_2d, input)


@view(torch.atleast_3d, cases=[case(Uncertain((3, 2)))])
def atleast_3d(input: Moments) -> Moments:
    return both(torch.atleast_3d, input)


# Views, several at once


@view(torch.split_with_sizes, "split_with_sizes", cases=[case(Uncertain((2, 5)), [2, 3], 1)])
def split_with_sizes(input: Moments, split_sizes: Any, dim: int = 0) -> tuple[Moments, ...]:
    return parts(torch.split_with_sizes, input, split_sizes, dim)


@view(torch.tensor_split, "tensor_split", cases=[case(Uncertain((2, 5)), 2, 1), case(Uncertain((2, 5)), (1, 3), dim=1)])
def tensor_split(input: Moments, indices_or_sections: Any, dim: int = 0) -> tuple[Moments, ...]:
    return parts(torch.tensor_split, input, indices_or_sections, dim)


@view(torch.hsplit, "hsplit", cases=[case(Uncertain((2, 4)), 2)])
def hsplit(input: Moments, indices_or_sections: Any) -> tuple[Moments, ...]:
    return parts(torch.hsplit, input, indices_or_sections)


@view(torch.vsplit, "vsplit", cases=[case(Uncertain((4, 2)), [1, 3])])
def vsplit(input: Moments, indices_or_sections: Any) -> tuple[Moments, ...]:
    return parts(torch.vsplit, input, indices_or_sections)


# Copies


@copy(torch.index_select, "index_select", cases=[case(Uncertain((3, 2)), 0, _ROWS)])
def index_select(input: Moments, dim: int, index: Tensor) -> Moments:
    return both(torch.index_select, input, dim, index)


@copy(torch.gather, "gather", cases=[case(Uncertain((2, 3)), 0, _PLACES)])
def gather(input: Moments, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Moments:
    return both(torch.gather, input, dim, index, sparse_grad=sparse_grad)


@copy(torch.take_along_dim, "take_along_dim", cases=[case(Uncertain((2, 3)), _PLACES, 0)])
def take_along_dim(input: Moments, indices: Tensor, dim: int | None = None) -> Moments:
    return both(torch.take_along_dim, input, indices, dim)


@copy(
    aten.index.Tensor,
    cases=[case(Uncertain((2, 3)), [None, _ROWS]), case(Uncertain((2, 3)), [_PLACES, _PLACES])],
)
def index(input: Moments, indices: Sequence[Tensor | None]) -> Moments:
    return both(aten.index.Tensor, input, list(indices))


@copy(torch.tile, "tile", cases=[case(Uncertain((2, 3)), (2, 1))])
def tile(input: Moments, *dims: Any) -> Moments:
    return both(Tensor.tile, input, *dims)


@copy(
    torch.repeat_interleave,
    "repeat_interleave",
    cases=[case(Uncertain((2, 3)), 2, dim=1), case(Uncertain((2, 3)), 2)],
)
def repeat_interleave(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    return both(torch.repeat_interleave, input, *args, **kwargs)


@copy(torch.rot90, "rot90", cases=[case(Uncertain((2, 3)), 1, [0, 1])])
def rot90(input: Moments, k: int = 1, dims: Any = (0, 1)) -> Moments:
    return both(torch.rot90, input, k, dims)


@copy(torch.tril, "tril", cases=[case(Uncertain((3, 3))), case(Uncertain((3, 3)), -1)])
def tril(input: Moments, diagonal: int = 0) -> Moments:
    return both(torch.tril, input, diagonal)


@copy(torch.triu, "triu", cases=[case(Uncertain((3, 3))), case(Uncertain((3, 3)), 1)])
def triu(input: Moments, diagonal: int = 0) -> Moments:
    return both(torch.triu, input, diagonal)


@register(
    torch.cumsum, "cumsum", family="pooling", exact=True, source="variances of independent terms add", complex=True,
    cases=[case(Uncertain((2, 4)), 1), case(Uncertain((2, 4)), dim=0)],
)  # fmt: skip
def cumsum(input: Moments, dim: int, *, dtype: torch.dtype | None = None) -> Moments:
    return both(torch.cumsum, input, dim, dtype=dtype)
