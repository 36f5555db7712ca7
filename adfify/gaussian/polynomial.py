"""Products, squares and exponentials of Gaussian variables: exact."""

from __future__ import annotations

import torch
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32


@in_float32
def product(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """a * b, a and b independent (Goodman, On the exact variance of products, JASA 55, 1960, equation 2)."""
    variance = variance_a * variance_b + mean_a * mean_a * variance_b + mean_b * mean_b * variance_a
    return mean_a * mean_b, variance


@in_float32
def exp(mean: Tensor, variance: Tensor) -> Pair:
    """e^x, the log-normal (Aitchison & Brown, The Lognormal Distribution, 1957, section 2.3): exact."""
    return log_normal(torch.exp(mean), mean, variance)


# Note [Powers of e that overflow]
#   e^m e^(v/2) is 0 times infinity at m = -10^4, v = 10^3, and e^2m (e^v - 1) infinity times 0 at m = 50, v = 0, where
#   the values themselves are ordinary. So small factors are multiplied first, and from v = 1 on up all exponents are
#   added before the exponential is taken.
def log_normal(certain: Tensor, exponent: Tensor, growth: Tensor) -> Pair:
    """Of e^y, y of mean ``exponent`` and variance ``growth``; ``certain`` is e^exponent."""
    little, much = growth.clamp(max=1.0), growth > 1
    exponent, growth = torch.where(much, exponent, 0.0), growth.clamp(min=1.0)
    average = certain * torch.exp(0.5 * little)
    spread = average * (average * torch.expm1(little))
    wide = torch.exp(2 * (exponent + growth)) * -torch.expm1(-growth)
    return torch.where(much, torch.exp(exponent + 0.5 * growth), average), torch.where(much, wide, spread)


@in_float32
def square(mean: Tensor, variance: Tensor) -> Pair:
    """x^2, a scaled non-central chi-square: exact."""
    return mean * mean + variance, 2 * variance * (variance + 2 * mean * mean)


@in_float32
def exp_minus_line(mean: Tensor, variance: Tensor, slope: Tensor) -> Pair:
    """What uncertainty adds to e^x - t x, and its variance: exact.

    With E = E[e^x], Stein's lemma (Annals of Statistics 9, 1981) has Cov(x, e^x) = v E, so that the variance is
    v (E - t)^2 and what the log-normal has beyond v E^2, which :func:`exp` gives.
    """
    average = torch.exp(mean + 0.5 * variance)
    # e^v - 1 - v is a difference of two close numbers for a small v.
    near = variance.clamp(max=0.1)
    series = near * near / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6))))
    beyond = torch.where(variance < 0.1, series, torch.expm1(variance) - variance)
    return torch.exp(mean) * torch.expm1(0.5 * variance), variance * (average - slope).square() + average**2 * beyond
