"""Systems of equations with a certain matrix, and products of matrices: linear in what is uncertain, so exact.

x = A^-1 b with a certain A: the variance passes through the squared elements of the inverse. An uncertain matrix has no
rule: its inverse is heavy-tailed, and has no variance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.moments import Moments
from adfify.nn.arithmetic import add, mul
from adfify.nn.products import product
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten

SOLVED = "linear map: the variance by the squared elements of the inverse"

solved = partial(register, family="affine", exact=True, source=SOLVED)
products = partial(register, family="pooling", exact=True, source="sums of products, Goodman 1960, equation 2")


def _by_inverse(mean: Tensor, inverse: Tensor, x: Moments, left: bool, vector: bool) -> Moments:
    squares = inverse.square()
    if vector:
        return Moments(mean, torch.matmul(squares, x.variance.unsqueeze(-1)).squeeze(-1))
    return Moments(mean, torch.matmul(squares, x.variance) if left else torch.matmul(x.variance, squares))


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


_SYSTEMS = [
    case(Certain((3, 3)), Uncertain((3, 2))),
    case(Certain((2, 3, 3)), Uncertain((2, 3))),
    case(Certain((3, 3)), Uncertain((2, 3)), left=False),
]


@solved(torch.linalg.solve, aten.linalg_solve, cases=_SYSTEMS)
def solve(A: Tensor, B: Moments, *, left: bool = True) -> Moments:
    mean = torch.linalg.solve(A, B.mean, left=left)
    vector = B.mean.dim() == 1 or (A.dim() - 1 == B.mean.dim() and B.shape == A.shape[:-1])
    return _by_inverse(mean, torch.linalg.inv(A), B, left, vector)


@solved(
    torch.linalg.solve_triangular, aten.linalg_solve_triangular,
    cases=[
        case(Certain((3, 3), positive=True), Uncertain((3, 2)), upper=True),
        case(Certain((3, 3), positive=True), Uncertain((2, 3)), upper=False, left=False, unitriangular=True),
    ],
)  # fmt: skip
def solve_triangular(A: Tensor, B: Moments, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Moments:
    solve: Callable[..., Tensor] = partial(torch.linalg.solve_triangular, upper=upper, unitriangular=unitriangular)
    return _by_inverse(solve(A, B.mean, left=left), solve(A, _identity(A)), B, left, False)


@solved(
    torch.cholesky_solve, "cholesky_solve",
    cases=[case(Uncertain((3, 2)), Certain((3, 3), positive=True)),
           case(Uncertain((3, 2)), Certain((3, 3), positive=True), upper=True)],
)  # fmt: skip
def cholesky_solve(input: Moments, L: Tensor, upper: bool = False) -> Moments:
    mean = torch.cholesky_solve(input.mean, L, upper)
    return _by_inverse(mean, torch.cholesky_solve(_identity(L), L, upper), input, True, False)


# Products


def _refuse_itself(a: Any, b: Any, name: str) -> None:
    if a is b:
        raise InputError(
            f"{name}(x, x) of an uncertain value with itself has no rule: its factors are not independent."
        )


@products(
    torch.tensordot, torch.functional.tensordot,
    cases=[
        case(Uncertain((2, 3, 4)), Uncertain((3, 4, 2)), dims=2),
        case(Uncertain((2, 3, 4)), Certain((4, 5)), 1),
        case(Certain((3, 4)), Uncertain((2, 4, 3)), ([0, 1], [2, 1])),
    ],
)  # fmt: skip
def tensordot(a: Moments | Tensor, b: Moments | Tensor, dims: Any = 2, out: None = None) -> Moments:
    _refuse_itself(a, b, "tensordot")
    return product(partial(torch.tensordot, dims=dims), a, b)


@products(aten.tensordot, cases=[case(Uncertain((2, 3, 4)), Certain((4, 5)), [2], [0])])
def aten_tensordot(input: Moments | Tensor, other: Moments | Tensor, dims_self: Any, dims_other: Any) -> Moments:
    return tensordot(input, other, (dims_self, dims_other))


@products(
    torch.kron, "kron",
    cases=[case(Uncertain((2, 3)), Uncertain((3, 2))), case(Uncertain((2, 3)), Certain((2,))),
           case(Certain((2, 2)), Uncertain((3,)))],
)  # fmt: skip
def kron(input: Moments | Tensor, other: Moments | Tensor) -> Moments:
    _refuse_itself(input, other, "kron")
    return product(torch.kron, input, other)


def _cross(mean: Tensor, a: Moments | Tensor, b: Moments | Tensor, dim: int) -> Moments:
    _refuse_itself(a, b, "cross")

    def rolled(x: Moments | Tensor, by: int) -> Moments | Tensor:
        if isinstance(x, Tensor):
            return torch.roll(x, by, dim)
        return Moments(torch.roll(x.mean, by, dim), torch.roll(x.variance, by, dim))

    both = add(mul(rolled(a, -1), rolled(b, -2)), mul(rolled(a, -2), rolled(b, -1)))
    return Moments(mean, both.variance)


_VECTORS = [case(Uncertain((2, 3)), Uncertain((2, 3))), case(Uncertain((3, 2)), Certain((3, 2)), dim=0)]


@products(torch.linalg.cross, aten.linalg_cross, cases=_VECTORS)
def cross(input: Moments | Tensor, other: Moments | Tensor, *, dim: int = -1) -> Moments:
    means = [x.mean if isinstance(x, Moments) else x for x in (input, other)]
    return _cross(torch.linalg.cross(*means, dim=dim), input, other, dim)


@products(torch.cross, "cross", cases=[case(Uncertain((2, 3)), Uncertain((2, 3)), 1), *_VECTORS[1:]])
def cross_along(input: Moments | Tensor, other: Moments | Tensor, dim: int | None = None) -> Moments:
    if dim is None:  # torch takes the first dimension of size 3
        dim = tuple(input.shape).index(3)
    return cross(input, other, dim=dim)
