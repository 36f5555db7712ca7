"""Powers, logarithms, exponentials, circular and hyperbolic functions, quotients and interpolation of two values."""

from __future__ import annotations

import operator
from functools import partial

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.gaussian import elementary
from adfify.moments import Moments, lift
from adfify.nn.activation import clamp
from adfify.nn.arithmetic import SUM, ratio
from adfify.registry import Certain, Uncertain, case, register

GRID = case(Uncertain((4, 3)))
POSITIVE = case(Uncertain((4, 3), positive=True))

elementwise = partial(register, family="elementwise", exact=True)
# For a mean of 5 std and more off by 1e-4 of the std, x^-1/2 by 1 %; 1 / x of 10 std and more: see gaussian.elementary.
positive = partial(
    register, family="elementwise", tolerance=0.01, source="quadrature over x > 0; log-normal within 3 std of 0"
)

BASE_OR_EXPONENT = ("input", "exponent")
WHOLE = "whole powers and exponentials in closed form; others by quadrature over x > 0"
_LARGEST = 32  # a whole power beyond it is taken over x > 0


@elementwise("pow", "pow_", source=WHOLE, one_uncertain_of=BASE_OR_EXPONENT, cases=[case(Uncertain((4, 3)), 3.0)])
@elementwise(
    torch.pow,
    operator.pow,
    source=WHOLE,
    one_uncertain_of=BASE_OR_EXPONENT,
    cases=[
        case(Uncertain((4, 3)), 2),
        case(Uncertain((4, 3)), 1),
        case(1.5, Uncertain((4, 3))),
        case(Uncertain((4, 3)), torch.tensor(3)),
    ],
)
def power(input: Moments | Tensor | float, exponent: Moments | Tensor | float) -> Moments:
    if isinstance(exponent, Moments):
        if isinstance(input, Moments):
            raise InputError("pow(x, y) with both x and y uncertain has no rule; write it as exp(y * log(x)).")
        return Moments(*elementary.exponential(exponent.mean, exponent.variance, input))
    assert isinstance(input, Moments)
    return _certain_power(input, exponent)


def _certain_power(x: Moments, exponent: Tensor | float) -> Moments:
    if isinstance(exponent, Tensor):
        return Moments(*elementary.elementwise_power(x.mean, x.variance, exponent))
    if exponent == 0:
        return Moments(torch.pow(x.mean, exponent), torch.zeros_like(x.variance))
    whole = float(exponent).is_integer()
    if whole and 0 < exponent <= _LARGEST:
        return Moments(*elementary.whole_power(x.mean, x.variance, int(exponent)))
    if whole and exponent < 0:
        return Moments(*elementary.negative_power(x.mean, x.variance, int(exponent)))
    return Moments(*elementary.power(x.mean, x.variance, float(exponent)))


@positive(torch.sqrt, "sqrt", torch.sqrt_, "sqrt_", cases=[POSITIVE])
def sqrt(input: Moments) -> Moments:
    return Moments(*elementary.power(input.mean, input.variance, 0.5))


@positive(torch.rsqrt, "rsqrt", torch.rsqrt_, "rsqrt_", cases=[POSITIVE])
def rsqrt(input: Moments) -> Moments:
    return Moments(*elementary.rsqrt(input.mean, input.variance))


@positive(torch.reciprocal, "reciprocal", torch.reciprocal_, "reciprocal_", cases=[POSITIVE])
def reciprocal(input: Moments) -> Moments:
    return Moments(*elementary.reciprocal(input.mean, input.variance))


@positive(torch.log, "log", torch.log_, "log_", cases=[POSITIVE])
def log(input: Moments) -> Moments:
    return Moments(*elementary.log(input.mean, input.variance))


@positive(torch.log2, "log2", torch.log2_, "log2_", cases=[POSITIVE])
def log2(input: Moments) -> Moments:
    return Moments(*elementary.log2(input.mean, input.variance))


@positive(torch.log10, "log10", torch.log10_, "log10_", cases=[POSITIVE])
def log10(input: Moments) -> Moments:
    return Moments(*elementary.log10(input.mean, input.variance))


@positive(torch.log1p, "log1p", torch.log1p_, "log1p_", cases=[POSITIVE])
def log1p(input: Moments) -> Moments:
    return Moments(*elementary.log1p(input.mean, input.variance))


@elementwise(torch.exp2, "exp2", torch.exp2_, "exp2_", torch.special.exp2, source="log-normal moments", cases=[GRID])
def exp2(input: Moments) -> Moments:
    return Moments(*elementary.exp2(input.mean, input.variance))


@elementwise(torch.expm1, "expm1", torch.expm1_, "expm1_", source="log-normal moments", cases=[GRID])
def expm1(input: Moments) -> Moments:
    return Moments(*elementary.expm1(input.mean, input.variance))


CIRCULAR = "closed form: the Hermite expansion's sum of squares"


@elementwise(torch.sin, "sin", torch.sin_, "sin_", source=CIRCULAR, cases=[GRID])
def sin(input: Moments) -> Moments:
    return Moments(*elementary.sin(input.mean, input.variance))


@elementwise(torch.cos, "cos", torch.cos_, "cos_", source=CIRCULAR, cases=[GRID])
def cos(input: Moments) -> Moments:
    return Moments(*elementary.cos(input.mean, input.variance))


@elementwise(torch.sinh, "sinh", torch.sinh_, "sinh_", source=CIRCULAR, cases=[GRID])
def sinh(input: Moments) -> Moments:
    return Moments(*elementary.sinh(input.mean, input.variance))


@elementwise(torch.cosh, "cosh", torch.cosh_, "cosh_", source=CIRCULAR, cases=[GRID])
def cosh(input: Moments) -> Moments:
    return Moments(*elementary.cosh(input.mean, input.variance))


ERF = "mean in closed form, variance by quadrature"


@elementwise(torch.erf, "erf", torch.erf_, "erf_", torch.special.erf, source=ERF, cases=[GRID])
def erf(input: Moments) -> Moments:
    return Moments(*elementary.erf(input.mean, input.variance))


@elementwise(torch.erfc, "erfc", torch.erfc_, "erfc_", torch.special.erfc, source=ERF, cases=[GRID])
def erfc(input: Moments) -> Moments:
    return Moments(*elementary.erfc(input.mean, input.variance))


@elementwise(
    torch.atan, torch.arctan, "atan", "arctan", torch.atan_, "atan_", "arctan_", source="quadrature", cases=[GRID]
)
def atan(input: Moments) -> Moments:
    return Moments(*elementary.atan(input.mean, input.variance))


TRUNCATED = "doubly truncated normal moments"


@elementwise(
    torch.clamp_min, "clamp_min", torch.clamp_min_, "clamp_min_", source=TRUNCATED, cases=[case(Uncertain((4, 3)), 0.1)]
)
def clamp_min(input: Moments, min: Tensor | float) -> Moments:
    return clamp(input, min, None)


@elementwise(
    torch.clamp_max, "clamp_max", torch.clamp_max_, "clamp_max_", source=TRUNCATED, cases=[case(Uncertain((4, 3)), 0.1)]
)
def clamp_max(input: Moments, max: Tensor | float) -> Moments:
    return clamp(input, None, max)


# Two values


@register(
    torch.lerp, "lerp", "lerp_", family="arithmetic", exact=True, source=SUM,
    cases=[
        case(Uncertain((3, 4)), Uncertain((3, 4)), 0.3),
        case(Uncertain((3, 4)), Certain((4,)), 0.3),
        case(Uncertain((3, 4)), Uncertain((3, 4)), Certain((3, 1))),
    ],
)  # fmt: skip
def lerp(input: Moments | Tensor, end: Moments | Tensor, weight: Tensor | float) -> Moments:
    a, b = lift(input), lift(end)
    if input is end:
        return a
    rest = 1 - weight
    return Moments(torch.lerp(a.mean, b.mean, weight), rest * rest * a.variance + weight * weight * b.variance)


@register(
    torch.addcdiv, "addcdiv", "addcdiv_", family="arithmetic", exact=True,
    source="linearity; a certain divisor scales, an uncertain one as in gaussian.ratio",
    cases=[
        case(Uncertain((3, 4)), Uncertain((3, 4)), Certain((4,), positive=True), value=0.5),
        case(Uncertain((3, 4)), Certain((4,)), Certain((3, 4), positive=True)),
    ],
)  # fmt: skip
def addcdiv(
    input: Moments | Tensor, tensor1: Moments | Tensor, tensor2: Moments | Tensor, *, value: float = 1
) -> Moments:
    a, b, c = lift(input), lift(tensor1), lift(tensor2)
    if input is tensor1 and not isinstance(tensor2, Moments):
        return Moments(torch.addcdiv(a.mean, a.mean, c.mean, value=value), a.variance * (1 + value / c.mean) ** 2)
    certain = c.variance == 0
    mean = torch.addcdiv(a.mean, b.mean, torch.where(certain, c.mean, 1.0), value=value)
    if not isinstance(tensor2, Moments):
        return Moments(mean, a.variance + b.variance * (value / c.mean) ** 2)
    quotient = ratio(b, c)
    mean = torch.where(certain, mean, a.mean + value * quotient.mean)
    return Moments(mean, a.variance + value**2 * quotient.variance)
