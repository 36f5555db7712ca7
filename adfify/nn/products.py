"""Matrix products and other sums of products of two tensors, at least one of them random; exact for independent ones.

Note [The same operand twice] of arithmetic.py holds here too: where both factors are one object, its own moments are
used. Two *views* of one tensor, such as x and x.mT, are two objects, and are taken as independent.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.errors import InputError
from adfify.gaussian.bilinear import Product
from adfify.moments import Moments
from adfify.nn import activation, arithmetic, complex_parts
from adfify.nn.complex_parts import is_complex
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "sums of products of independent factors, Goodman 1960, equation 2"

products = partial(register, family="arithmetic", exact=True, source=SOURCE)
of_complex = partial(products, complex=True)


def product(op: Product, a: Moments | Tensor, b: Moments | Tensor) -> Moments:
    """A bilinear ``op`` whose outputs are sums of a_i b_i, each element once; one of the factors may be certain."""
    if is_complex(a) or is_complex(b):
        return complex_parts.product(partial(product, op), op, a, b)  # type: ignore[return-value]
    return Moments(*gaussian.bilinear(op, *parts(a), *parts(b)))


def parts(x: Moments | Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and variance, the latter None where there is none."""
    return (x.mean, x.variance) if isinstance(x, Moments) else (x, None)


@of_complex(
    torch.matmul,
    torch.linalg.matmul,
    operator.matmul,
    "matmul",
    "__matmul__",
    source=SOURCE,
    cases=[
        case(Uncertain((2, 3, 3)), Uncertain((3, 3))),
        case(Uncertain((3, 4)), Certain((2, 4, 5))),
        case(Certain((2, 3, 4)), Uncertain((4,))),
        case(Uncertain((4,)), Uncertain((4,))),
    ],
)
def matmul(input: Moments | Tensor, other: Moments | Tensor) -> Moments:
    if input is other and isinstance(input, Moments):
        return _inner_square(input) if input.mean.dim() == 1 else _matrix_square(torch.matmul, input)
    return product(torch.matmul, input, other)


def _matrix_square(op: Product, x: Moments) -> Moments:
    """x @ x: to the moments of independent factors, what x_ij has in common with itself is added.

    y_ij = x_ij (x_ii + x_jj) + the rest: the two products covary by m_ii m_jj v_ij, and one of a diagonal element with
    itself is a square.
    """
    y = product(op, x, x)
    m, v = (part.diagonal(dim1=-2, dim2=-1) for part in x)
    crossed = y.variance + 2 * m.unsqueeze(-1) * m.unsqueeze(-2) * x.variance
    return Moments(y.mean + torch.diag_embed(v), crossed + torch.diag_embed(v * v))


@of_complex(
    torch.bmm,
    "bmm",
    cases=[case(Uncertain((2, 3, 3)), Uncertain((2, 3, 3))), case(Uncertain((2, 3, 4)), Certain((2, 4, 5)))],
)
def bmm(input: Moments | Tensor, mat2: Moments | Tensor) -> Moments:
    if input is mat2 and isinstance(input, Moments):
        return _matrix_square(torch.bmm, input)
    return product(torch.bmm, input, mat2)


@of_complex(
    torch.mm, "mm", cases=[case(Uncertain((3, 3)), Uncertain((3, 3))), case(Certain((3, 4)), Uncertain((4, 5)))]
)
def mm(input: Moments | Tensor, mat2: Moments | Tensor) -> Moments:
    if input is mat2 and isinstance(input, Moments):
        return _matrix_square(torch.mm, input)
    return product(torch.mm, input, mat2)


@of_complex(torch.mv, "mv", cases=[case(Uncertain((3, 4)), Certain((4,))), case(Certain((3, 4)), Uncertain((4,)))])
def mv(input: Moments | Tensor, vec: Moments | Tensor) -> Moments:
    return product(torch.mv, input, vec)


@products(
    torch.dot,
    torch.vdot,
    torch.inner,
    "dot",
    "vdot",
    "inner",
    cases=[case(Uncertain((5,)), Uncertain((5,))), case(Uncertain((5,)), Certain((5,)))],
)
def dot(input: Moments | Tensor, other: Moments | Tensor) -> Moments:
    """Also ``inner``, of last dimensions: of vectors it is the dot product."""
    if input is other and isinstance(input, Moments) and input.mean.dim() == 1:
        return _inner_square(input)
    # Bit for bit torch.dot, torch.vdot and torch.inner of vectors.
    return product(torch.inner, input, other)


def _inner_square(x: Moments) -> Moments:
    """The sum of the squares of a vector."""
    return Moments(torch.dot(x.mean, x.mean) + x.variance.sum(), activation.square(x).variance.sum())


@of_complex(
    torch.outer,
    torch.ger,
    "outer",
    "ger",
    cases=[case(Uncertain((3,)), Uncertain((4,))), case(Uncertain((3,)), Certain((4,)))],
)
def outer(input: Moments | Tensor, vec2: Moments | Tensor) -> Moments:
    y = product(torch.outer, input, vec2)
    if input is vec2 and isinstance(input, Moments):
        m, v = input
        return Moments(y.mean + torch.diag(v), y.variance + torch.diag(v * (v + 2 * m * m)))
    return y


# In place, the result has the shape of the first argument, so their cases are others.
_IN_PLACE: dict[str, Any] = {"beta": 0.5, "alpha": -2.0}


@products("addmm_", cases=[case(Uncertain((3, 5)), Certain((3, 4)), Certain((4, 5)), **_IN_PLACE)])
@products(
    torch.addmm,
    "addmm",
    cases=[
        case(Uncertain((3, 5)), Uncertain((3, 4)), Uncertain((4, 5)), beta=0.5, alpha=-2.0),
        case(Certain((5,)), Uncertain((3, 4)), Certain((4, 5))),
        case(Uncertain((5,)), Certain((3, 4)), Certain((4, 5))),
    ],
)
def addmm(
    input: Moments | Tensor, mat1: Moments | Tensor, mat2: Moments | Tensor, *, beta: float = 1, alpha: float = 1
) -> Moments:
    return fused(partial(torch.addmm, beta=beta, alpha=alpha), input, mm, mat1, mat2, beta, alpha)


@products("addmv_", cases=[case(Uncertain((3,)), Certain((3, 4)), Certain((4,)), **_IN_PLACE)])
@products(torch.addmv, "addmv", cases=[case(Certain((3,)), Certain((3, 4)), Uncertain((4,)), beta=0.5, alpha=-2.0)])
def addmv(
    input: Moments | Tensor, mat: Moments | Tensor, vec: Moments | Tensor, *, beta: float = 1, alpha: float = 1
) -> Moments:
    return fused(partial(torch.addmv, beta=beta, alpha=alpha), input, mv, mat, vec, beta, alpha)


@products("baddbmm_", cases=[case(Uncertain((2, 3, 5)), Certain((2, 3, 4)), Certain((2, 4, 5)), **_IN_PLACE)])
@products(
    torch.baddbmm,
    "baddbmm",
    cases=[
        case(Uncertain((2, 3, 5)), Uncertain((2, 3, 4)), Uncertain((2, 4, 5)), beta=0.5, alpha=-2.0),
        case(Certain((3, 5)), Uncertain((2, 3, 4)), Certain((2, 4, 5))),
    ],
)
def baddbmm(
    input: Moments | Tensor, batch1: Moments | Tensor, batch2: Moments | Tensor, *, beta: float = 1, alpha: float = 1
) -> Moments:
    return fused(partial(torch.baddbmm, beta=beta, alpha=alpha), input, bmm, batch1, batch2, beta, alpha)


@products("addcmul_", cases=[case(Uncertain((3, 4)), Certain((3, 1)), Certain((4,)), value=-2.0)])
@products(
    torch.addcmul,
    "addcmul",
    cases=[
        case(Uncertain((3, 4)), Uncertain((3, 1)), Uncertain((4,)), value=-2.0),
        case(Certain((3, 4)), Certain((4,)), Uncertain((3, 4))),
        case(Uncertain((4,)), Certain((3, 4)), Certain((3, 4))),
    ],
)
def addcmul(
    input: Moments | Tensor, tensor1: Moments | Tensor, tensor2: Moments | Tensor, *, value: float = 1
) -> Moments:
    return fused(partial(torch.addcmul, value=value), input, arithmetic.mul, tensor1, tensor2, 1, value)


def fused(
    op: Callable[..., Tensor],
    input: Moments | Tensor,
    rule: Callable[[Any, Any], Moments],
    a: Moments | Tensor,
    b: Moments | Tensor,
    beta: float,
    alpha: float,
) -> Moments:
    """beta input + alpha rule(a, b), with torch's own ``op`` for the mean."""
    mean, variances = op(*[parts(x)[0] for x in (input, a, b)]), []
    if isinstance(input, Moments):
        variances.append(input.variance * beta**2)
    if isinstance(a, Moments) or isinstance(b, Moments):
        second = rule(a, b)
        variances.append(second.variance * alpha**2)
        if a is b and isinstance(a, Moments):  # what a square adds to its mean
            mean = mean + alpha * (second.mean - rule(a.mean, a).mean)
    return Moments(mean, sum(variances[1:], variances[0]).to(mean.dtype).expand(mean.shape))


@of_complex(
    torch.functional.einsum,
    cases=[
        case("bij,jk->bik", Uncertain((2, 3, 4)), Certain((4, 5))),
        case("...ii,i", Uncertain((2, 3, 3)), Certain((3,))),
        case("nchw->nc", [Uncertain((2, 3, 2, 2))]),
        case("ij->ji", Uncertain((2, 3))),
    ],
    alias=True,  # a permutation is a view
)
def einsum(equation: str, *operands: Moments | Tensor, path: Any = None) -> Any:
    """Any number of factors; one that is given twice is taken as two independent ones."""
    factors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if any(map(is_complex, factors)):
        return _complex_einsum(equation, factors)
    means, variances = zip(*map(parts, factors), strict=True)
    return Moments(*gaussian.einsum(equation, means, variances))


def _complex_einsum(equation: str, factors: Any) -> Any:
    if len(factors) == 1:
        return complex_parts.each_part(original=torch.einsum)(einsum)(equation, factors[0])
    if len(factors) > 2:
        raise InputError(
            f"einsum({equation!r}) of {len(factors)} factors, some of them complex and uncertain, has no rule; "
            "multiply the certain ones first, so that two are left."
        )
    return complex_parts.product(partial(einsum, equation), partial(torch.einsum, equation), *factors)


BILINEAR = [
    case(Uncertain((3, 4)), Uncertain((3, 4)), Certain((2, 4, 4)), Certain((2,))),
    case(Uncertain((2, 3, 4)), Certain((2, 3, 5)), Certain((2, 4, 5))),
]


@products(F.bilinear, cases=BILINEAR)
def bilinear(input1: Moments | Tensor, input2: Moments | Tensor, weight: Tensor, bias: Tensor | None = None) -> Moments:
    (mean1, variance1), (mean2, variance2) = parts(input1), parts(input2)
    mean = F.bilinear(mean1, mean2, weight, bias)
    if input1 is input2 and variance1 is not None:
        return _quadratic_form(mean, mean1, variance1, weight)
    _, variance = gaussian.einsum("...i,oij,...j->...o", (mean1, weight, mean2), (variance1, None, variance2))
    return Moments(mean, variance)


def _quadratic_form(at_mean: Tensor, m: Tensor, v: Tensor, weight: Tensor) -> Moments:
    """x^T A x: mean m^T A m + tr(A V), variance 4 m^T A V A m + 2 tr(A V A V) (Mathai & Provost 1992, section 3.2b)."""
    symmetric = (weight + weight.mT) / 2
    mean = at_mean + F.linear(v, weight.diagonal(dim1=-2, dim2=-1))
    slope = torch.einsum("oij,...j->...oi", symmetric, m)
    linear = torch.einsum("...oi,...i->...o", 4 * slope.square(), v)
    return Moments(mean, linear + 2 * torch.einsum("...i,oij,...j->...o", v, symmetric.square(), v))


@products(
    nn.Bilinear,
    cases=[case(Uncertain((3, 4)), Uncertain((3, 4)), init={"in1_features": 4, "in2_features": 4, "out_features": 2})],
)
class Bilinear(ADFModule, nn.Bilinear):
    many_inputs = True

    def forward(self, input1: Moments | Tensor, input2: Moments | Tensor) -> Moments:
        return bilinear(input1, input2, self.weight, self.bias)
