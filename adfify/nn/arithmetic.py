"""Sums and products of two values, at least one of them random; factors and terms are taken as independent."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn import activation
from adfify.registry import Certain, Uncertain, case, register

Operand = Moments | Tensor | float

SUM = "linearity; variances of independent terms add"
PRODUCT = "Goodman 1960, equation 2"

# Note [The same operand twice]
# x + x and x * x are one random variable, not two independent ones. Where both operands are the same object the exact
# moments are used: a variance of 4 v, and those of the square.


@register(
    operator.add, operator.iadd, torch.add, "add", "add_", family="arithmetic", exact=True, source=SUM,
    cases=[case(Uncertain((3, 4)), Uncertain((4,))), case(Uncertain((3, 4)), Certain((4,))), case(Uncertain((3, 4)), 2.5)],
)  # fmt: skip
def add(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    if input is other and isinstance(input, Moments):
        return Moments(input.mean * (1 + alpha), input.variance * (1 + alpha) ** 2)
    mean = torch.add(_mean(input), _mean(other), alpha=alpha) if alpha != 1 else _mean(input) + _mean(other)
    return Moments(mean, _sum_of_variances(input, other, alpha**2, mean))


@register(
    operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract",
    family="arithmetic", exact=True, source=SUM,
    cases=[case(Uncertain((3, 4)), Uncertain((4,))), case(Uncertain((3, 4)), Certain((4,)))],
)  # fmt: skip
def sub(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    if input is other and isinstance(input, Moments):
        return Moments(input.mean * (1 - alpha), input.variance * (1 - alpha) ** 2)
    mean = torch.sub(_mean(input), _mean(other), alpha=alpha) if alpha != 1 else _mean(input) - _mean(other)
    return Moments(mean, _sum_of_variances(input, other, alpha**2, mean))


@register(torch.rsub, family="arithmetic", exact=True, source=SUM, cases=[case(Uncertain((3, 4)), 2.5)])
def rsub(input: Moments | Tensor | float, other: Moments | Tensor | float, *, alpha: float = 1) -> Moments:
    return sub(other, input, alpha=alpha)


@register(
    operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply",
    family="arithmetic", exact=True, source=PRODUCT,
    cases=[case(Uncertain((3, 4)), Uncertain((4,))), case(Uncertain((3, 4)), Certain((3, 1))), case(Uncertain((3, 4)), -2.5)],
)  # fmt: skip
def mul(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    if isinstance(input, Moments) and isinstance(other, Moments):
        if input is other:
            return activation.square(input)
        return Moments(*gaussian.product(input.mean, input.variance, other.mean, other.variance))
    x, factor = (input, other) if isinstance(input, Moments) else (other, input)
    assert isinstance(x, Moments) and not isinstance(factor, Moments)
    return Moments(x.mean * factor, x.variance * factor**2)


@register(
    operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide",
    family="arithmetic", exact=True, source="a certain divisor scales",
    cases=[case(Uncertain((3, 4)), Certain((4,), positive=True)), case(Uncertain((3, 4)), -2.5)],
)  # fmt: skip
def div(input: Moments, other: Tensor | float) -> Moments:
    return Moments(input.mean / other, input.variance / other**2)


@register(
    operator.neg, torch.neg, torch.negative, "neg", "neg_", family="arithmetic", exact=True, source=SUM, cases=[case(Uncertain((3, 4)))]
)
def neg(input: Moments) -> Moments:
    return Moments(-input.mean, input.variance)


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
