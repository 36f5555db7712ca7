"""Piecewise linear functions of one or two Gaussian variables: exact.

Note [Variance zero, and a mean far from the kink]
    A piecewise linear f is f(mean) plus a correction that vanishes, to every digit, once the kink is 40 s
    away: then f is the line through the mean and the variance is slope**2 * variance. ``|mean| < 40 s`` is
    also false at variance 0, so one `torch.where` serves both. It comes before the division and the square
    root as well ("double where"): a masked branch that divided by zero would still send NaN into the
    gradients.

Note [The kink itself]
    At a kink, f(mean) and the correction have slopes of their own, and only their sum is the slope of the
    mean, for relu Phi(0) = 1/2. So both take the same side there: the comparison that picks the reflection
    (say, mean > 0) must be the one autograd makes in f (torch.relu: slope 0 at 0; `bound`: slope 1 at either
    bound).

Note [Cancellation]
    Textbook variances are E[f^2] - E[f]^2, which in float32 is 0 or negative at mean 50, variance 1e-4. Every
    form below is a sum of terms that are positive or that stay well apart, written for the side of the kink
    that holds the smaller part of the mass; the other side follows by reflection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfify.gaussian.normal import REACH, Pair, in_float32, lower_moments, normal_cdf, normal_pdf, standardise


@in_float32
def relu(mean: Tensor, variance: Tensor) -> Pair:
    """max(x, 0) (Frey & Hinton 1999, appendix): the case of `maximum` where the other number is 0."""
    near, std, z = standardise(mean, variance)
    cdf, first, second = lower_moments(torch.where(mean > 0, -z, z))
    spread = second - first * first
    spread = torch.where(mean > 0, 1 - 2 * cdf + spread, spread)
    step = (mean > 0).to(mean.dtype)
    return (
        torch.relu(mean) + torch.where(near, std * first, 0.0),
        variance * torch.where(near, spread, step),
    )


@in_float32
def leaky_relu(mean: Tensor, variance: Tensor, slope: float | Tensor = 0.01) -> Pair:
    """max(x, 0) + slope * min(x, 0), for any slope, also negative or a tensor (PReLU).

    With x+ and x- the positive and negative parts, f = x+ - slope x-, and x+ x- = 0, so that Var f = Var x+ +
    slope^2 Var x- + 2 slope E[x+] E[x-]. The correlation of x+ and x- is never below -0.47, so the sum does
    not cancel for a negative slope either.
    """
    positive = mean > 0
    base = torch.where(positive, mean, slope * mean)
    near, correction, variance = _leaky(mean, variance, slope)
    return base + torch.where(near, correction, 0.0), variance


def _leaky(mean: Tensor, variance: Tensor, slope: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    near, std, z = standardise(mean, variance)
    tail = torch.where(mean > 0, -z, z)
    cdf, first, second = lower_moments(tail)
    smaller = second - first * first
    larger = 1 - 2 * cdf + smaller
    cross = 2 * first * (first - tail)
    squared = slope * slope
    spread = torch.where(mean > 0, larger + squared * smaller, smaller + squared * larger) + slope * cross
    line = torch.where(mean > 0, torch.ones_like(mean), squared)
    return near, (1 - slope) * (std * first), variance * torch.where(near, spread, line)


@in_float32
def absolute(mean: Tensor, variance: Tensor) -> Pair:
    """|x|, `leaky_relu` of slope -1 (folded normal: Leone, Nelson & Nottingham, Technometrics 3, 1961)."""
    near, correction, variance = _leaky(mean, variance, -1.0)
    base = torch.where(near & (mean <= 0), -mean, mean.abs())
    return base + torch.where(near, correction, 0.0), variance


@in_float32
def maximum(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """max(a, b) of independent a and b (Clark 1961, equations 2 and 3 with correlation 0).

    The variance is rearranged as max(a, b) = a + max(b - a, 0), with a the larger mean, and Cov(a, max(b - a,
    0)) = -Var(a) Phi(z) (Stein 1981, lemma 1), z = -|mean_a - mean_b| / sqrt(Var a + Var b).
    """
    gap, total = mean_a - mean_b, variance_a + variance_b
    near, std, z = standardise(gap, total)
    cdf, first, second = lower_moments(torch.where(gap > 0, -z, z))
    larger = torch.where(gap > 0, variance_a, variance_b)
    return (
        torch.where(near & (gap <= 0), mean_b, torch.maximum(mean_a, mean_b)) + torch.where(near, std * first, 0.0),
        torch.where(near, larger * (1 - 2 * cdf) + total * (second - first * first), larger),
    )


@in_float32
def clamp(mean: Tensor, variance: Tensor, low: float | None = None, high: float | None = None) -> Pair:
    """min(max(x, low), high): ReLU6, Hardtanh. Either bound may be None or infinite."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    correction, variance = clamp_correction(mean, variance, low, high)
    return bound(mean, low, high) + correction, variance


def bound(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(x, low, high), of slope 1 at either bound: torch.clamp's own differs between versions."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def clamp_correction(mean: Tensor, variance: Tensor, low: float, high: float) -> Pair:
    """What uncertainty adds to clamp(mean, low, high), and the variance.

    Reflected so that the mean is on the side of the nearer bound, which it is ``inside`` of (inside > 0) or
    outside, and ``beyond`` < 0 is its signed distance to the other. With a, b, w = (inside, beyond, high -
    low) / s, psi_n(z) = E[(z + xi)+^n] and g = psi_2 - psi_1^2:
        Var / v = 1 - 2 Phi(-a) - 2 Phi(b) + g(-a) + g(b) + 2 psi_1(-a) psi_1(b)              for a > 0
        Var / v = g(a) - psi_2(b) - psi_1(b)^2 - 2 w psi_1(b) + 2 psi_1(a) psi_1(b)     for a <= 0,
    which is Var(max(x, low) - max(x - high, 0)), as Cov(x, max(x - h, 0)) = v Phi((m - h) / s) (Stein 1981,
    lemma 1). Once the interval is narrow, w << 1, these terms cancel: see `_narrow_clamp`.
    """
    if low == -math.inf and high == math.inf:
        return torch.zeros_like(mean), variance
    if low == -math.inf or high == math.inf:
        sign, edge = (1.0, low) if high == math.inf else (-1.0, high)
        shifted, variance = relu(sign * (mean - edge), variance)
        return sign * (shifted - bound(sign * (mean - edge), 0.0, math.inf)), variance
    lower = mean <= 0.5 * (low + high)
    inside = torch.where(lower, mean - low, high - mean)
    beyond = torch.where(lower, mean - high, low - mean)
    near, std, a = standardise(inside, variance)
    # Held within reach before the division, which could overflow and send NaN into the gradients.
    b = torch.maximum(torch.where(near, beyond, 0.0), -REACH * std) / std
    w = (2 * REACH * std).clamp(max=high - low) / std
    cdf_a, first_a, second_a = lower_moments(torch.where(a >= 0, -a, a))
    cdf_b, first_b, second_b = lower_moments(b)
    spread = second_a - first_a * first_a
    within = 1 - 2 * (cdf_a + cdf_b) + spread + second_b - first_b * first_b + 2 * first_a * first_b
    outside = spread - second_b - first_b * first_b + 2 * first_b * (first_a - w)
    narrow = w < (0.01 if mean.dtype == torch.float64 else 0.1)
    narrow_share, narrow_spread = _narrow_clamp(w.clamp(max=1.0), (a - 0.5 * w).clamp(min=-REACH))
    spread = torch.where(narrow, narrow_spread, torch.where(a >= 0, within, outside))
    correction = std * torch.where(narrow, narrow_share - bound(a, 0.0, math.inf), first_a - first_b)
    correction = torch.where(lower, correction, -correction)
    line = (inside > 0).to(mean.dtype)
    return torch.where(near, correction, 0.0), variance * torch.where(near, spread, line)


def _narrow_clamp(w: Tensor, c: Tensor) -> Pair:
    """Mean and variance, over s and s^2, of clamp(x, 0, w), x of mean c + w / 2: Taylor's series in w << 1.

    With t uniform on (-1/2, 1/2), the mean is w E[Phi(c + w t)], the second moment w^2 E[(1 + 2 t) Phi(c - w
    t)].
    """
    pdf, c2, w2 = normal_pdf(c), c * c, w * w
    share = normal_cdf(c) - c * pdf * w2 * (1 / 24 + (c2 - 3) * w2 / 1920)
    return w * share, w2 * (share * (1 - share) - pdf * w * (1 / 6 + (c2 - 1) * w2 / 240))
