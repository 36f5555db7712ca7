"""Powers, logarithms, circular and hyperbolic functions, and quotients of Gaussian variables.

Note [Variance as a sum of squares]
    Var f(x) = sum over k >= 1 of v^k / k! E[f^(k)(x)]^2 (Houdre & Perez-Abreu, Ann. Probab. 23, 1995; the
    Hermite expansion of f). No term is negative, so nothing cancels. For whole powers the sum is finite, for
    sines and exponentials it is a closed form.

Note [Domains that end at 0]
    Of x^p and log x, a Gaussian x always has some mass where they do not exist: at z = mean / s = 5 one part
    in 3 million. From there on up they are integrated, and held constant below mean / 8: off by 1e-4 of the
    std at most (x^-1/2 by .9 % at z = 5; 1 / x is exact to 3e-5 from z = 10 up, and has no variance at all,
    where its rare draws beyond 0 are counted). Below z = 3, x^p with p > 0 is that of max(x, 0), by
    quadrature; for x^-p and log x, x is taken as log-normal, with mean and variance of the Gaussian given x >
    0: a closed form, and finite where the moments of 1 / x are not (log x, against x given x > 0: mean high
    by .18 std, std low by 39 %). In between the two are blended. Where x is certain and outside the domain,
    the value is the original's, an infinity or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, in_float32, lower_moments
from adfify.gaussian.polynomial import log_normal
from adfify.gaussian.quadrature import expect, soft
from adfify.gaussian.smooth import levelling

_SOLID, _LOOSE = 5.0, 3.0  # z from which up f is integrated, and from which down x is taken as log-normal


@in_blocks
@in_float32
def whole_power(mean: Tensor, variance: Tensor, exponent: int) -> Pair:
    """x^n, n >= 1: exact. With M_j = E[x^j] = m M_{j-1} + (j - 1) v M_{j-2} (Stein 1981, lemma 1),
    Var = sum over k of C(n, k)^2 k! v^k M_{n-k}^2 (Note [Variance as a sum of squares]).
    """
    moments, shift = [torch.ones_like(mean), mean], [torch.zeros_like(mean), torch.zeros_like(mean)]
    for j in range(2, exponent + 1):
        spread = (j - 1) * variance * moments[j - 2]
        moments.append(mean * moments[j - 1] + spread)
        shift.append(mean * shift[j - 1] + spread)  # M_j - m^j
    total = torch.zeros_like(variance)
    for k in range(exponent, 0, -1):
        weight = math.comb(exponent, k) ** 2 * math.factorial(k)
        total = variance * (weight * moments[exponent - k].square() + total)
    return torch.pow(mean, exponent) + shift[exponent], total


@in_blocks
@in_float32
def power(mean: Tensor, variance: Tensor, exponent: float) -> Pair:
    """x^p of a positive x: see Note [Domains that end at 0]."""
    return _positive(lambda x: torch.pow(x, exponent), mean, variance, exponent)


@in_blocks
@in_float32
def elementwise_power(mean: Tensor, variance: Tensor, exponent: Tensor) -> Pair:
    """x^p, each x with a p of its own: whole powers as `whole_power` and `negative_power`, others as `power`.

    A whole power from 0 to 31 of an x that may be negative is a polynomial, whose moments 32 Gauss-Hermite nodes
    (A&S 25.4.46) give exactly. Its p has no gradient there: log x has no value.
    """
    p = exponent.to(mean.dtype)
    mean, variance = (part + torch.zeros_like(p) for part in (mean, variance))
    whole = p == p.round()
    polynomial = whole & (p >= 0) & (p <= 31) & (mean < 5 * variance.detach().sqrt())
    exact = _of_polynomial(mean, variance, torch.where(polynomial, p.detach(), 1.0))
    inverse = whole & (p < 0) & (mean < 0)
    rest = torch.where(polynomial, 1.0, p)
    size = torch.where(polynomial, 1.0, torch.where(inverse, -mean, mean))
    side = torch.where(inverse & (p % 2 == 1), -1.0, 1.0).to(mean.dtype)
    value, spread = _positive(lambda x: torch.pow(x, rest), size, variance, rest)
    return torch.where(polynomial, exact[0], side * value), torch.where(polynomial, exact[1], spread)


def _of_polynomial(mean: Tensor, variance: Tensor, degree: Tensor) -> Pair:
    """By nodes in a unit in which x is about 1, so that its scale does not matter."""
    size = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 1e-30)
    unit = torch.maximum(mean.abs(), size).detach()
    average, spread = expect(lambda x: torch.pow(x, degree), mean / unit, variance / unit / unit)
    factor = torch.pow(unit, degree)
    return factor * average, factor * factor * spread


@in_blocks
@in_float32
def reciprocal(mean: Tensor, variance: Tensor) -> Pair:
    """1 / x of an x that keeps its sign, which is that of its mean: as `power`."""
    side = torch.where(mean < 0, mean.new_full((), -1.0), 1.0)  # in the dtype of the mean, not torch's default
    result, spread = _positive(torch.reciprocal, side * mean, variance, -1.0)
    return side * result, spread


@in_blocks
@in_float32
def rsqrt(mean: Tensor, variance: Tensor) -> Pair:
    """x^-1/2 of a positive x, as `power`."""
    return _positive(torch.rsqrt, mean, variance, -0.5)


@in_blocks
@in_float32
def negative_power(mean: Tensor, variance: Tensor, exponent: int) -> Pair:
    """x^-n of an x that keeps its sign, as `reciprocal`."""
    side = torch.where((mean < 0) & (exponent % 2 == 1), mean.new_full((), -1.0), 1.0)
    result, spread = _positive(lambda x: torch.pow(x, exponent), mean.abs(), variance, float(exponent))
    return side * result, spread


@in_blocks
@in_float32
def log(mean: Tensor, variance: Tensor) -> Pair:
    """log x of a positive x: see Note [Domains that end at 0]."""
    return _positive(torch.log, mean, variance, None)


@in_blocks
@in_float32
def log2(mean: Tensor, variance: Tensor) -> Pair:
    """log x / log 2."""
    return _positive(torch.log2, mean, variance, None, unit=1 / math.log(2))


@in_blocks
@in_float32
def log10(mean: Tensor, variance: Tensor) -> Pair:
    """log x / log 10."""
    return _positive(torch.log10, mean, variance, None, unit=1 / math.log(10))


@in_blocks
@in_float32
def log1p(mean: Tensor, variance: Tensor) -> Pair:
    """log (1 + x), as `log`."""
    return _positive(torch.log1p, mean, variance, None, start=1.0)


@in_blocks
@in_float32
def ratio(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """a / b, independent: a times `reciprocal` of b, whose moments multiply (Goodman 1960, equation 2)."""
    inverse, spread = reciprocal(mean_b, variance_b)
    loose, zero = mean_b * mean_b < variance_b, (mean_b == 0) & (variance_b == 0)
    divisor = torch.where(loose | zero, 1.0, mean_b)
    average = mean_a / divisor + mean_a * (torch.where(zero, 1.0, inverse) - torch.reciprocal(divisor))
    average = torch.where(loose, mean_a * torch.where(zero, 1.0, inverse), average)
    spread_a = torch.where(zero, 1.0, inverse).square() * variance_a
    variance = variance_a * spread + mean_a * mean_a * spread + spread_a
    return torch.where(zero, (mean_a / mean_b).detach(), average), variance


def _positive(
    f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, p: float | Tensor | None, start: float = 0.0,
    unit: float = 1.0,
) -> Pair:  # fmt: skip
    """Moments of f(x) = x^p, or of unit log(x + start) where p is None."""
    certain, height = variance == 0, mean + start
    std = torch.sqrt(torch.where(certain, 1.0, variance))
    z = torch.where(certain, torch.where(height > 0, height.new_full((), _SOLID), _LOOSE), height / std)
    outside = certain & (height <= 0)
    # Either form, where it is not used, is given what it can take: gradients pass through both.
    solid = z > _LOOSE
    centre, reach = torch.where(solid, mean, 1.0), torch.where(solid, height, 1.0 + start)
    integral, spread = _integrated(f(centre), torch.where(solid, variance, 0.0) / reach / reach, p, unit)
    approximate, wide = _near_zero(std, torch.where(z < _SOLID, z, 0.0).clamp(min=-8.0), p, unit)
    share = ((z - _LOOSE) / (_SOLID - _LOOSE)).clamp(0, 1)
    share = share * share * (3 - 2 * share)
    integral = torch.where(z < _SOLID, share * integral + (1 - share) * approximate, integral)
    spread = torch.where(z < _SOLID, share * spread + (1 - share) * wide, spread)
    return torch.where(outside, f(mean.detach()), integral), torch.where(outside, 0.0, spread)


def _integrated(base: Tensor, share: Tensor, p: float | Tensor | None, unit: float) -> Pair:
    """By quadrature over u = x / m, so that the scale of x does not matter: f(m u) = m^p u^p, log m + log u."""
    if p is None:
        shift, spread = expect(lambda u: torch.log(u.clamp(min=0.125)), torch.ones_like(share), share)
        return base + unit * shift, unit * unit * spread
    factor, spread = expect(lambda u: torch.pow(u.clamp(min=0.125), p), torch.ones_like(share), share)
    return base * factor, base * base * spread


def _near_zero(std: Tensor, z: Tensor, p: float | Tensor | None, unit: float) -> Pair:
    """For x = s (z + xi): the log-normal form, but that of max(x, 0) where p > 0."""
    if isinstance(p, float) and p > 0:
        return _clipped_power(std, z, p)
    closed = _aslog_normal(std, z, p, unit)
    if not isinstance(p, Tensor):
        return closed
    clipped = _clipped_power(std, z, p.clamp(min=0))
    return torch.where(p > 0, clipped[0], closed[0]), torch.where(p > 0, clipped[1], closed[1])


def _clipped_power(std: Tensor, z: Tensor, p: float | Tensor) -> Pair:
    def clipped(u: Tensor) -> Tensor:
        return torch.where(u > 0, torch.pow(torch.where(u > 0, u, 1.0), p), 0.0)

    average, spread = expect(clipped, z, torch.ones_like(z), kinks=(0.0,))
    scale = torch.pow(std, p)
    return scale * average, scale * scale * spread


def _aslog_normal(std: Tensor, z: Tensor, p: float | Tensor | None, unit: float) -> Pair:
    """x = exp(y), y Gaussian, with the mean and variance of s (z + xi) given that it is positive.

    With c = Var x / E[x]^2: Var y = log(1 + c), E[y] = log E[x] - Var y / 2, E[x^p] = E[x]^p (1 + c)^(p (p - 1) / 2),
    and Var x^p = E[x^p]^2 ((1 + c)^(p^2) - 1) (Aitchison & Brown 1957, section 2.3).
    """
    cdf, first, second = lower_moments(-z.abs())
    mass = torch.where(z > 0, 1 - cdf, cdf)
    first = torch.where(z > 0, z + first, first) / mass
    second = torch.where(z > 0, z * z + 1 - second, second) / mass
    width = torch.log(second) - 2 * torch.log(first)
    if p is None:
        return unit * (torch.log(std * first) - 0.5 * width), unit * unit * width
    average = torch.pow(std * first, p) * torch.exp(0.5 * p * (p - 1) * width)
    return average, average * average * torch.expm1(p * p * width)


# Exponentials, circular and hyperbolic functions


@in_blocks
@in_float32
def exponential(mean: Tensor, variance: Tensor, base: float | Tensor) -> Pair:
    """b^x, b > 0: a log-normal (Aitchison & Brown 1957, section 2.3), exact. b = 0 is 0 for a certain x > 0."""
    rate = torch.as_tensor(base, dtype=mean.dtype, device=mean.device)
    rate = torch.log(torch.where(rate > 0, rate, 1.0))
    growth = rate * rate * variance
    return log_normal(torch.pow(base, mean), rate * mean, growth)


@in_blocks
@in_float32
def exp2(mean: Tensor, variance: Tensor) -> Pair:
    """2^x, as `exponential`."""
    growth = math.log(2) ** 2 * variance
    return log_normal(torch.exp2(mean), math.log(2) * mean, growth)


@in_blocks
@in_float32
def expm1(mean: Tensor, variance: Tensor) -> Pair:
    """e^x - 1: exact, as `exp`."""
    average, spread = log_normal(torch.exp(mean), mean, variance)
    little = torch.exp(mean) * torch.expm1(0.5 * variance.clamp(max=1.0))
    return torch.where(variance > 1, average - 1, torch.expm1(mean) + little), spread


@in_blocks
@in_float32
def sin(mean: Tensor, variance: Tensor) -> Pair:
    """sin x: exact. E = exp(-v / 2) sin m, Var = cos^2 m (1 - exp(-2 v)) / 2 + sin^2 m (1 - exp(-v))^2 / 2."""
    sine, cosine = torch.sin(mean), torch.cos(mean)
    return sine * torch.exp(-0.5 * variance), _circular(cosine, sine, variance)


@in_blocks
@in_float32
def cos(mean: Tensor, variance: Tensor) -> Pair:
    """cos x: exact, as `sin` with the two exchanged."""
    sine, cosine = torch.sin(mean), torch.cos(mean)
    return cosine * torch.exp(-0.5 * variance), _circular(sine, cosine, variance)


@in_blocks
@in_float32
def sinh(mean: Tensor, variance: Tensor) -> Pair:
    """sinh x: exact. E = exp(v / 2) sinh m, Var as that of `sin`, with -v for v and hyperbolic functions."""
    sine, cosine = torch.sinh(mean), torch.cosh(mean)
    average = torch.where(sine == 0, sine, sine * torch.exp(0.5 * variance))  # not 0 times infinity
    return average, _hyperbolic(cosine, sine, variance)


@in_blocks
@in_float32
def cosh(mean: Tensor, variance: Tensor) -> Pair:
    """cosh x: exact, as `sinh` with the two exchanged."""
    sine, cosine = torch.sinh(mean), torch.cosh(mean)
    return cosine * torch.exp(0.5 * variance), _hyperbolic(sine, cosine, variance)


def _circular(slope: Tensor, value: Tensor, variance: Tensor) -> Tensor:
    """The odd terms of the sum of squares have the slope, the even ones the value (Note [Variance as a sum of
    squares]): slope^2 exp(-v) sinh v + value^2 exp(-v) (cosh v - 1).
    """
    once = torch.expm1(-variance)
    return 0.5 * (slope.square() * -torch.expm1(-2 * variance) + value.square() * once.square())


def _hyperbolic(slope: Tensor, value: Tensor, variance: Tensor) -> Tensor:
    """The same, with exp(v) for exp(-v): as Note [Powers of e that overflow]."""
    first, second = slope * (slope * torch.expm1(2 * variance)), (value * torch.expm1(variance)).square()
    return 0.5 * (torch.where(slope == 0, 0.0, first) + torch.where(value == 0, 0.0, second))


def _erf_variance(mean: Tensor, variance: Tensor) -> Tensor:
    return levelling(lambda x: torch.erfc(-x), mean, variance, partial(soft, bend=0.65))[1]


@in_blocks
@in_float32
def erf(mean: Tensor, variance: Tensor) -> Pair:
    """erf x: mean erf(m / sqrt(1 + 2 v)), exact (Owen 1980, 10,010.8); variance by quadrature."""
    return torch.erf(mean * torch.rsqrt(1 + 2 * variance)), _erf_variance(mean, variance)


@in_blocks
@in_float32
def erfc(mean: Tensor, variance: Tensor) -> Pair:
    """1 - erf x."""
    return torch.erfc(mean * torch.rsqrt(1 + 2 * variance)), _erf_variance(mean, variance)


@in_blocks
@in_float32
def atan(mean: Tensor, variance: Tensor) -> Pair:
    """arctan x, by quadrature."""
    shift, spread = levelling(lambda x: torch.atan2(torch.ones_like(x), -x), mean, variance, partial(soft, bend=0.5))
    return torch.atan(mean) + shift, spread
