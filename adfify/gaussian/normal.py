"""The standard normal distribution, its partial moments, and the dtype in which moments are computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]
P = ParamSpec("P")


def in_float32(rule: Callable[P, Pair]) -> Callable[P, Pair]:
    """Run ``rule`` in float32 on float16 or bfloat16 inputs, and return their dtype."""

    @functools.wraps(rule)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Pair:
        dtypes = [a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not any(d in (torch.float16, torch.bfloat16) for d in dtypes):
            return rule(*args, **kwargs)
        narrow = functools.reduce(torch.promote_types, dtypes)
        named = {key: _widen(value) for key, value in kwargs.items()}
        mean, variance = rule(*map(_widen, args), **named)  # type: ignore[arg-type]
        return mean.to(narrow), variance.to(narrow)

    return wrapper


def _widen(value: object) -> object:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value  # type: ignore[attr-defined]


# The standard normal and its partial moments


def normal_pdf(z: Tensor) -> Tensor:
    """phi(z) (A&S 26.2.1)."""
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z) = erfc(-z / sqrt 2) / 2 (A&S 26.2.29): accurate in the lower tail, unlike 1 + erf."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


# Note [Partial moments by one rational function]
#   Over n! the partial moments are I_n, the repeated integrals of phi (A&S 7.2.1, with z = -x sqrt 2), and
#   n I_n = z I_{n-1} + I_{n-2}, I_{-1} = phi (A&S 7.2.5). For z < 0 the two terms cancel; downwards, I_{n-2} = n I_n -
#   z I_{n-1}, both are positive, and an error in the start dies out (Gautschi 1961). The start is the ratio 2 I_2 / I_1
#   = A / B, a minimax fit of polynomials in -z, of degrees 4 and 5 over -14.5 <= z <= 0 for float32, 9 and 10 over
#   -38.6 <= z <= 0 for float64: off by 1.0e-8 and 2.1e-16 at most, relative. With C = A - z B and D = B - z C,
#       I_0 = phi C / D,   I_1 = phi B / D,   2 I_2 = phi A / D,
#   so that one division serves all three, and neither erfc nor a choice between two forms is needed: `torch.where`
#   costs more than all of A. All coefficients are positive: no sum cancels.
_FITS: dict[torch.dtype, tuple[tuple[float, ...], tuple[float, ...]]] = {  # coefficients of A and B, the constant first
    torch.float32: (
        (
            469.72379609,
            257.05220527,
            75.890077437,
            12.513641409,
            1,
        ),
        (
            374.78536091,
            333.44529094,
            148.20658679,
            39.38666695,
            6.2590034234,
            0.49996424117,
        ),
    ),
    torch.float64: (
        (
            4939031.105222174309,
            5469166.627005801634,
            3135544.814752117136,
            1180259.345020454959,
            316708.7366370059686,
            62363.67114287856309,
            8990.331958809658261,
            916.9081879052370291,
            60.48476833335784021,
            1.999999999926477257,
        ),
        (
            3940776.664181886219,
            5713302.222769805421,
            4179359.107799992182,
            1992132.642624626973,
            678283.2317704092779,
            171476.8926132682498,
            32545.19998943892786,
            4585.893080856032585,
            461.4540947839676061,
            30.24238415847725081,
            1,
        ),
    ),
}


def lower_moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi(z), E[(z + xi)+] and E[(z + xi)+^2] of a standard normal xi, for z from -REACH to 0.

    By the recurrence of Gautschi 1961 from a fitted start: see Note [Partial moments by one rational function]. They
    are off by 6e-7 of their value at z = -4 and 4e-6 at z = -10 in float32, all rounding, and by 7e-15 in float64.
    """
    square = z * z
    numerator, denominator = (_polynomial(z, square, fit) for fit in _FITS[z.dtype])
    third = torch.addcmul(numerator, z, denominator, value=-1)
    fourth = torch.addcmul(denominator, z, third, value=-1)
    scale = _pdf(square) / fourth
    return scale * third, scale * denominator, scale * numerator


def _polynomial(z: Tensor, square: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """In -z, by Horner's rule in z^2, as a coefficient and one of -z are a single operation."""
    pairs = [torch.rsub(z, a, alpha=b) for a, b in zip(coefficients[::2], coefficients[1::2], strict=False)]
    if len(coefficients) % 2 == 1:
        pairs[-1] = torch.add(pairs[-1], square, alpha=coefficients[-1])
    result = pairs.pop()
    while pairs:
        result = torch.addcmul(pairs.pop(), square, result)
    return result


def _pdf(square: Tensor) -> Tensor:
    """phi of z^2, and 0 where that is z = -REACH. By exp2, which costs half of exp on a CPU."""
    logarithm = -0.5 * math.log2(2 * math.pi)
    least = logarithm - 0.5 * REACH[square.dtype] ** 2 / math.log(2)
    power = torch.exp2(torch.rsub(square, logarithm, alpha=0.5 / math.log(2)))
    return F.threshold(power, 1.01 * 2.0**least, 0.0)


# Note [Variance zero, and a mean far from the kink]
#   A piecewise linear f is f(mean) plus a correction, and slope^2 variance plus another, that are products with partial
#   moments at z = -|mean| / s. These are 0 to every digit once z is below -REACH, where phi is at the end of the
#   dtype's range: z is held there, short of the numbers that CPUs are slow at, and phi is set to 0. At variance 0 the
#   same formulas hold with s held at a floor, far below any other s: the variance is a product with 0, and so is the
#   correction of the mean, s less the floor. Both are held *before* the square root and the division, where a number
#   that overflows would send NaN into the gradients, as would a derivative of the root at 0.
REACH = {torch.float32: 13.2, torch.float64: 37.6}
FLOOR = {torch.float32: 2.0**-62, torch.float64: 2.0**-200}


def tail(distance: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(s, z): s = sqrt(variance), and z = distance / s for a distance <= 0: what `lower_moments` takes."""
    floor = FLOOR[variance.dtype]
    std = torch.sqrt(variance.clamp(min=floor * floor))
    return std - floor, torch.maximum(distance, std * -REACH[variance.dtype]) / std


def below(x: Tensor) -> Tensor:
    """-|x|, whose slope at 0 is that of x (of -x.abs() it is 0)."""
    return torch.sub(x, torch.relu(x), alpha=2)


def step(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, many times faster than a comparison on a CPU."""
    return torch.relu(torch.sign(x))
