"""Sums and products of two values, at least one of them random; factors and terms are taken as independent."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify import gaussian
from adfify.gaussian import elementary
from adfify.moments import Moments
from adfify.nn import activation
from adfify.nn.complex_parts import divided, each_part, is_complex, multiplied
from adfify.registry import Certain, Uncertain, case, register

Operand = Moments | Tensor | float

SUM = "linearity; variances of independent terms add"
PRODUCT = "Goodman 1960, equation 2"

arithmetic = partial(register, family="arithmetic", exact=True, complex=True)

# Note [The same operand twice]
# x + x and x * x are one random variable, not two independent ones. Where both operands are the same object the exact
# moments are used: a variance of 4 v, and those of the square.


@arithmetic(
    torch.add,
    "add",
    "add_",
    source=SUM,
    cases=[
        case(Uncertain((3, 4)), Uncertain((4,)), alpha=-3),
        case(Uncertain((3, 4)), Certain((4,)), alpha=2),
        case(Uncertain((3, 4)), 2.5),
    ],
)
@each_part("input", "other", original=torch.add)
def add(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    if input is other and isinstance(input, Moments):
        return Moments(input.mean * (1 + alpha), input.variance * (1 + alpha) ** 2)
    mean = torch.add(_mean(input), _mean(other), alpha=alpha) if alpha != 1 else _mean(input) + _mean(other)
    return Moments(mean, _sum_of_variances(input, other, alpha**2, mean))


@arithmetic(operator.iadd, source=SUM, cases=[case(Uncertain((3, 4)), Uncertain((4,)))])
@arithmetic(
    operator.add,
    source=SUM,
    cases=[
        case(Uncertain((3, 4)), Uncertain((4,))),
        case(Certain((3, 4)), Uncertain((4,))),
        case(2.5, Uncertain((4,))),
    ],
)
def operator_add(a: Moments | Tensor | float, b: Moments | Tensor | float) -> Moments:
    return add(a, b)


@arithmetic(
    torch.sub,
    torch.subtract,
    "sub",
    "sub_",
    "subtract",
    source=SUM,
    cases=[case(Uncertain((3, 4)), Uncertain((4,)), alpha=3), case(Uncertain((3, 4)), Certain((4,)))],
)
@each_part("input", "other", original=torch.sub)
def sub(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    if input is other and isinstance(input, Moments):
        return Moments(input.mean * (1 - alpha), input.variance * (1 - alpha) ** 2)
    mean = torch.sub(_mean(input), _mean(other), alpha=alpha) if alpha != 1 else _mean(input) - _mean(other)
    return Moments(mean, _sum_of_variances(input, other, alpha**2, mean))


@arithmetic(operator.isub, source=SUM, cases=[case(Uncertain((3, 4)), Uncertain((4,)))])
@arithmetic(
    operator.sub,
    source=SUM,
    cases=[
        case(Uncertain((3, 4)), Uncertain((4,))),
        case(Certain((3, 4)), Uncertain((4,))),
        case(2.5, Uncertain((4,))),
    ],
)
def operator_sub(a: Moments | Tensor | float, b: Moments | Tensor | float) -> Moments:
    return sub(a, b)


@arithmetic(
    torch.rsub, source=SUM, cases=[case(Uncertain((3, 4)), 2.5), case(Uncertain((3, 4)), Uncertain((4,)), alpha=3)]
)
def rsub(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    return sub(other, input, alpha=alpha)


@arithmetic(
    operator.mul,
    operator.imul,
    torch.mul,
    torch.multiply,
    "mul",
    "mul_",
    "multiply",
    source=PRODUCT,
    cases=[
        case(Uncertain((3, 4)), Uncertain((4,))),
        case(Uncertain((3, 4)), Certain((3, 1))),
        case(Uncertain((3, 4)), -2.5),
    ],
)
def mul(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Any:
    if is_complex(input) or is_complex(other):
        return multiplied(mul, input, other)
    if isinstance(input, Moments) and isinstance(other, Moments):
        if input is other:
            return activation.square(input)
        return Moments(*gaussian.product(input.mean, input.variance, other.mean, other.variance))
    x, factor = (input, other) if isinstance(input, Moments) else (other, input)
    return scaled(x, factor)  # type: ignore[arg-type]


QUOTIENT = "a certain divisor scales, exactly; by an uncertain one as in gaussian.ratio"

quotient = partial(register, family="arithmetic", source=QUOTIENT, tolerance=0.01, complex=True)


@quotient(
    torch.div,
    torch.divide,
    torch.true_divide,
    "div",
    "div_",
    "divide",
    only={"rounding_mode": None},
    cases=[
        case(Uncertain((3, 4)), Certain((4,), positive=True)),
        case(Uncertain((3, 4)), -2.5),
        case(Uncertain((3, 4)), Uncertain((4,), positive=True)),
        case(Certain((3, 4)), Uncertain((4,), positive=True)),
    ],
)
def div(
    input: Moments | Tensor | float, other: Moments | Tensor | float, *, rounding_mode: str | None = None
) -> Moments:
    if is_complex(input) or is_complex(other):
        return divided(div, input, other)  # type: ignore[return-value]
    if isinstance(other, Moments):
        return ratio(input, other)
    assert isinstance(input, Moments)
    return Moments(input.mean / other, input.variance / other / other)


@quotient(operator.itruediv, cases=[case(Uncertain((3, 4)), Uncertain((4,), positive=True))])
@quotient(
    operator.truediv,
    cases=[
        case(Uncertain((3, 4)), Uncertain((4,), positive=True)),
        case(Certain((3, 4)), Uncertain((4,), positive=True)),
        case(2.5, Uncertain((4,), positive=True)),
        case(Uncertain((3, 4)), -2.5),
    ],
)
def operator_truediv(a: Moments | Tensor | float, b: Moments | Tensor | float) -> Moments:
    return div(a, b)


def ratio(input: Moments | Tensor | float, other: Moments) -> Moments:
    """A quotient by an uncertain value; of a value by itself 1."""
    if input is other:
        return Moments(torch.ones_like(other.mean), torch.zeros_like(other.variance))
    if isinstance(input, Moments):
        return Moments(*elementary.ratio(input.mean, input.variance, other.mean, other.variance))
    if isinstance(input, Tensor):
        return Moments(*elementary.ratio(input, torch.zeros_like(input), other.mean, other.variance))
    return scaled(Moments(*elementary.reciprocal(other.mean, other.variance)), input)


@arithmetic(operator.neg, torch.neg, torch.negative, "neg", "neg_", source=SUM, cases=[case(Uncertain((3, 4)))])
@each_part()
def neg(input: Moments) -> Moments:
    return Moments(-input.mean, input.variance)


def scaled(x: Moments, factor: Tensor | float) -> Moments:
    """A random tensor times a certain one."""
    # Twice, and not by the square, which whole numbers and halves can't hold.
    return Moments(x.mean * factor, x.variance * factor * factor)


def _mean(x: Operand) -> Any:
    return x.mean if isinstance(x, Moments) else x


def _sum_of_variances(a: Operand, b: Operand, scale_b: float, mean: Tensor) -> Tensor:
    terms = []
    if isinstance(a, Moments):
        terms.append(a.variance)
    if isinstance(b, Moments):
        terms.append(b.variance if scale_b == 1 else b.variance * scale_b)
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return total.to(mean.dtype).expand(mean.shape)
