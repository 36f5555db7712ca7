"""Systems of equations with a certain matrix, and products of matrices: linear in what is uncertain, so exact.

x = A^-1 b with a certain A: the variance passes through the squared elements of the inverse. An uncertain matrix has no
rule: its inverse is heavy-tailed, and has no variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify import gaussian
from adfify.errors import InputError
from adfify.moments import ComplexMoments, Moments
from adfify.nn.arithmetic import add, mul
from adfify.nn.complex_parts import with_mean
from adfify.nn.products import bmm, fused, matmul, outer, parts, product
from adfify.nn.structural import both
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten

SOLVED = "linear map: the variance by the squared elements of the inverse"

solved = partial(register, family="affine", exact=True, source=SOLVED, complex=True)
products = partial(register, family="pooling", exact=True, source="sums of products, Goodman 1960, equation 2")

Random = Moments | ComplexMoments


def _by_inverse(mean: Tensor, inverse: Tensor, x: Any, left: bool, vector: bool) -> Any:
    columns = both(torch.unsqueeze, x, -1) if vector else x
    y: Any = matmul(inverse, columns) if left else matmul(columns, inverse)
    if isinstance(y, ComplexMoments):
        real, imag = y.real.variance, y.imag.variance
        return with_mean(mean, real.squeeze(-1), imag.squeeze(-1)) if vector else with_mean(mean, real, imag)
    return Moments(mean, y.variance.squeeze(-1) if vector else y.variance)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


_SYSTEMS = [
    case(Certain((3, 3)), Uncertain((3, 2))),
    case(Certain((2, 3, 3)), Uncertain((2, 3))),
    case(Certain((3, 3)), Uncertain((2, 3)), left=False),
    case(Certain((3, 3), complex=True), Uncertain((3, 2), complex=True)),
    case(Certain((2, 3, 3), complex=True), Uncertain((2, 3), complex=True)),
]


@solved(torch.linalg.solve, aten.linalg_solve, cases=_SYSTEMS)
def solve(A: Tensor, B: Random, *, left: bool = True) -> Any:
    mean = torch.linalg.solve(A, B.mean, left=left)
    vector = B.mean.dim() == 1 or (A.dim() - 1 == B.mean.dim() and B.mean.shape == A.shape[:-1])
    return _by_inverse(mean, torch.linalg.inv(A), B, left, vector)


@solved(
    torch.linalg.solve_triangular, aten.linalg_solve_triangular,
    cases=[
        case(Certain((3, 3), positive=True), Uncertain((3, 2)), upper=True),
        case(Certain((3, 3), positive=True), Uncertain((2, 3)), upper=False, left=False, unitriangular=True),
    ],
)  # fmt: skip
def solve_triangular(A: Tensor, B: Random, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    solve: Callable[..., Tensor] = partial(torch.linalg.solve_triangular, upper=upper, unitriangular=unitriangular)
    return _by_inverse(solve(A, B.mean, left=left), solve(A, _identity(A)), B, left, False)


@solved(
    torch.cholesky_solve, "cholesky_solve",
    cases=[case(Uncertain((3, 2)), Certain((3, 3), positive=True)),
           case(Uncertain((3, 2)), Certain((3, 3), positive=True), upper=True)],
)  # fmt: skip
def cholesky_solve(input: Random, L: Tensor, upper: bool = False) -> Any:
    mean = torch.cholesky_solve(input.mean, L, upper)
    return _by_inverse(mean, torch.cholesky_solve(_identity(L), L, upper), input, True, False)


_PIVOTS = torch.tensor([2, 3, 3], dtype=torch.int32)


@solved(
    torch.linalg.lu_solve, aten.linalg_lu_solve,
    cases=[
        case(Certain((3, 3), positive=True), _PIVOTS, Uncertain((3, 2))),
        case(Certain((3, 3), positive=True), _PIVOTS, Uncertain((2, 3)), left=False, adjoint=True),
        case(Certain((3, 3), complex=True), _PIVOTS, Uncertain((3, 2), complex=True), adjoint=True),
    ],
)  # fmt: skip
def linalg_lu_solve(LU: Tensor, pivots: Tensor, B: Random, *, left: bool = True, adjoint: bool = False) -> Any:
    solve: Callable[..., Tensor] = partial(torch.linalg.lu_solve, LU, pivots, left=left, adjoint=adjoint)
    return _by_inverse(solve(B.mean), solve(_identity(LU)), B, left, False)


@solved(
    torch.lu_solve, "lu_solve", aten.lu_solve,
    cases=[case(Uncertain((3, 2)), Certain((3, 3), positive=True), _PIVOTS)],
)  # fmt: skip
def lu_solve(b: Random, LU_data: Tensor, LU_pivots: Tensor) -> Any:
    return linalg_lu_solve(LU_data, LU_pivots, b)


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


# Several factors


def _chain(op: Callable[..., Tensor], factors: Sequence[Moments | Tensor]) -> Moments:
    """A product of matrices; the first and the last may be vectors. Its elements are sums over paths: an einsum."""
    for place, factor in enumerate(factors):
        for other in factors[:place]:
            if isinstance(factor, Moments):
                _refuse_itself(factor, other, "a chain of products")
    means, variances = zip(*map(parts, factors), strict=True)
    names = [chr(ord("a") + place) + chr(ord("b") + place) for place in range(len(factors))]
    out = names[0][0] + names[-1][1]
    if means[0].dim() == 1:
        names[0], out = names[0][1], out[1]
    if means[-1].dim() == 1:
        names[-1], out = names[-1][0], out[:-1]
    _, variance = gaussian.einsum(f"{','.join(names)}->{out}", means, variances)
    return Moments(op(means), variance)


_CHAIN = [
    case([Uncertain((2, 3)), Certain((3, 4)), Uncertain((4, 2))]),
    case([Certain((2, 3)), Uncertain((3, 4)), Certain((4, 2)), Certain((2, 3))]),
]


@products(
    torch.linalg.multi_dot, aten.linalg_multi_dot,
    cases=[*_CHAIN, case([Uncertain((3,)), Certain((3, 4)), Uncertain((4,))])],
)  # fmt: skip
def multi_dot(tensors: Sequence[Moments | Tensor]) -> Moments:
    return _chain(torch.linalg.multi_dot, tensors)


@products(torch.chain_matmul, torch.functional.chain_matmul, cases=[case(*_CHAIN[0].args[0])])
def chain_matmul(*matrices: Moments | Tensor) -> Moments:
    factors = matrices[0] if len(matrices) == 1 and isinstance(matrices[0], (list, tuple)) else matrices
    return _chain(torch.linalg.multi_dot, factors)


@products(aten.chain_matmul, cases=_CHAIN)
def aten_chain_matmul(matrices: Sequence[Moments | Tensor]) -> Moments:
    return _chain(torch.linalg.multi_dot, matrices)


@products(
    torch.linalg.vecdot, aten.linalg_vecdot,
    cases=[case(Uncertain((2, 3)), Uncertain((2, 3))), case(Uncertain((3, 2)), Certain((3, 2)), dim=0)],
)  # fmt: skip
def vecdot(x: Moments | Tensor, y: Moments | Tensor, *, dim: int = -1) -> Moments:
    _refuse_itself(x, y, "vecdot")
    return product(partial(torch.linalg.vecdot, dim=dim), x, y)


_SCALES: dict[str, Any] = {"beta": 0.5, "alpha": -2.0}


@products(
    torch.addbmm, "addbmm", "addbmm_",
    cases=[
        case(Uncertain((3, 5)), Uncertain((2, 3, 4)), Uncertain((2, 4, 5)), **_SCALES),
        case(Uncertain((3, 5)), Certain((2, 3, 4)), Certain((2, 4, 5))),
    ],
)  # fmt: skip
def addbmm(
    input: Moments | Tensor, batch1: Moments | Tensor, batch2: Moments | Tensor, *, beta: float = 1, alpha: float = 1
) -> Moments:
    def summed(a: Moments | Tensor, b: Moments | Tensor) -> Moments:
        return Moments(*[part.sum(0) for part in bmm(a, b)])

    return fused(partial(torch.addbmm, beta=beta, alpha=alpha), input, summed, batch1, batch2, beta, alpha)


@products(
    torch.addr, "addr", "addr_",
    cases=[
        case(Uncertain((3, 4)), Uncertain((3,)), Uncertain((4,)), **_SCALES),
        case(Uncertain((3, 4)), Certain((3,)), Certain((4,))),
    ],
)  # fmt: skip
def addr(
    input: Moments | Tensor, vec1: Moments | Tensor, vec2: Moments | Tensor, *, beta: float = 1, alpha: float = 1
) -> Moments:
    return fused(partial(torch.addr, beta=beta, alpha=alpha), input, outer, vec1, vec2, beta, alpha)
