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
#   costs more than all of A. The polynomials are products of z^2 - p z + q, and of one r - s z in that of odd degree,
#   with p, q, r, s > 0: no sum cancels.
_Factors = tuple[tuple[tuple[float, float], ...], tuple[float, float] | None]  # the (p, q), and (r, s)
_FITS: dict[torch.dtype, tuple[_Factors, _Factors]] = {
    torch.float32: (
        (((8.9175824491541858, 25.130665268462954), (3.5960589596192616, 18.691259903895562)), None),
        (
            ((5.6979669955779381, 14.096282927909507), (3.0978756056381898, 14.283646146034813)),
            (3.7230595681741696 / 2.0001430455604649, 1 / 2.0001430455604649),
        ),
    ),
    torch.float64: (
        (
            (
                (9.7140882669412987105, 28.880140561050740331),
                (7.1010699542280338388, 27.502298897327811891),
                (3.2735899712978274078, 20.454942084717067244),
                (4.7192756936599822533, 27.970278048578596222),
            ),
            (1.9999999999264772325 * 5.4343602816635281073, 1.9999999999264772325),
        ),
        (
            (
                (8.914554368632852251, 20.674466215575538421),
                (7.6566120842404248236, 20.881895363053775124),
                (3.4556494722224592699, 15.949873130686635154),
                (5.7249053516027987, 21.433403277895918242),
                (4.4906628817787156791, 26.701104940955062599),
            ),
            None,
        ),
    ),
}


def lower_moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi(z), E[(z + xi)+] and E[(z + xi)+^2] of a standard normal xi, for z from -REACH to 0.

    By the recurrence of Gautschi 1961 from a fitted start: see Note [Partial moments by one rational function]. They
    are off by 6e-7 of their value at z = -4 and 4e-6 at z = -10 in float32, all rounding, and by 7e-15 in float64.
    """
    square = z * z
    numerator, denominator = (_polynomial(z, square, *factors) for factors in _FITS[z.dtype])
    third = torch.addcmul(numerator, z, denominator, value=-1)
    fourth = torch.addcmul(denominator, z, third, value=-1)
    scale = _pdf(square) / fourth
    return scale * third, scale * denominator, scale * numerator


def _polynomial(
    z: Tensor, square: Tensor, quadratics: tuple[tuple[float, float], ...], linear: tuple[float, float] | None
) -> Tensor:
    factors = [torch.add(square, z, alpha=-p) + q for p, q in quadratics]
    if linear is not None:
        factors.append(z * -linear[1] + linear[0])
    return functools.reduce(torch.mul, factors)


def _pdf(square: Tensor) -> Tensor:
    """phi of z^2, and 0 where that is z = -REACH. By exp2, which costs half of exp on a CPU."""
    power = torch.exp2(square * (-0.5 / math.log(2))) * (1 / math.sqrt(2 * math.pi))
    return F.threshold(power, 1.01 * math.exp(-0.5 * REACH[square.dtype] ** 2) / math.sqrt(2 * math.pi), 0.0)


# Note [Variance zero, and a mean far from the kink]
#   A piecewise linear f is f(mean) plus a correction, and slope^2 variance plus another, that are products with partial
#   moments at z = -|mean| / s. These are 0 to every digit once z is below -REACH, where phi is at the end of the
#   dtype's range: z is held there, short of the numbers that CPUs are slow at, and phi is set to 0. At variance 0 the
#   same formulas hold with s held at a floor, far below any other s: the variance is a product with 0, and so is the
#   correction of the mean, s less the floor. Both are held *before* the square root and the division, where a number
#   that overflows would send NaN into the gradients, as would a derivative of the root at 0.
REACH = {torch.float32: 13.2, torch.float64: 37.6}
FLOOR = {torch.float32: 2.0**-50, torch.float64: 2.0**-200}


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
