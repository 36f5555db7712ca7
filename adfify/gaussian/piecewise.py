"""Piecewise linear functions of one or two Gaussian variables: exact.

Note [The kink itself]
    At a kink, f(mean) and the correction have slopes of their own, and only their sum is the slope of the mean, for
    relu Phi(0) = 1/2. So both take the same side there, the one autograd takes in f (torch.relu: slope 0 at 0; `bound`:
    slope 1 at either bound; torch.maximum and abs: halfway).

Note [Cancellation]
    Textbook variances are E[f^2] - E[f]^2, which in float32 is 0 or negative at mean 50, variance 1e-4. Every
    form below is a sum of terms that are positive or that stay well apart, written for the side of the kink
    that holds the smaller part of the mass; the other side follows by reflection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks, readable
from adfify.gaussian.normal import (
    FLOOR,
    REACH,
    Pair,
    below,
    in_float32,
    lower_moments,
    normal_cdf,
    normal_pdf,
    step,
    tail,
)


@in_blocks
@in_float32
def relu(mean: Tensor, variance: Tensor) -> Pair:
    """max(x, 0) (Frey & Hinton 1999, appendix): the case of `maximum` where the other number is 0."""
    correction, variance = _ramp(mean, variance, step(mean))
    return torch.relu(mean) + correction, variance


def _ramp(x: Tensor, variance: Tensor, inside: Tensor) -> Pair:
    """What uncertainty adds to max(x, 0), and its variance; ``inside`` is 1 where that is x, and 0 where it is 0."""
    std, z = tail(below(x), variance)
    cdf, first, second = lower_moments(z)
    spread = torch.addcmul(second, first, first, value=-1) + torch.addcmul(inside, inside, cdf, value=-2)
    return std * first, variance * spread


@in_blocks
@in_float32
def leaky_relu(mean: Tensor, variance: Tensor, slope: float | Tensor = 0.01) -> Pair:
    """max(x, 0) + slope * min(x, 0), for any slope, also negative or a tensor (PReLU)."""
    positive = step(mean)
    base = torch.relu(mean) + slope * (mean - torch.relu(mean))
    correction, variance = _leaky(below(mean), variance, slope, positive)
    return base + correction, variance


def _leaky(distance: Tensor, variance: Tensor, slope: float | Tensor, positive: Tensor) -> Pair:
    """What uncertainty adds to f(mean), and the variance; ``distance`` is -|mean|.

    With x+ and x- the positive and negative parts, f = x+ - slope x-, and x+ x- = 0, so that Var f = Var x+ +
    slope^2 Var x- + 2 slope E[x+] E[x-]. The correlation of x+ and x- is never below -0.47, so the sum does
    not cancel for a negative slope either.
    """
    std, z = tail(distance, variance)
    cdf, first, second = lower_moments(z)
    smaller = torch.addcmul(second, first, first, value=-1)
    squared = slope * slope
    line = squared + (1 - squared) * positive
    spread = line * (1 - 2 * cdf) + (1 + squared) * smaller + (2 * slope) * (first * (first - z))
    return (1 - slope) * (std * first), variance * spread


@in_blocks
@in_float32
def absolute(mean: Tensor, variance: Tensor) -> Pair:
    """|x|, `leaky_relu` of slope -1 (folded normal: Leone, Nelson & Nottingham, Technometrics 3, 1961)."""
    distance = mean.abs()
    correction, variance = _leaky(-distance, variance, -1.0, step(mean))
    return distance + correction, variance


@in_blocks
@in_float32
def maximum(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """max(a, b) of independent a and b (Clark 1961, equations 2 and 3 with correlation 0).

    The variance is rearranged as max(a, b) = a + max(b - a, 0), with a the larger mean, and Cov(a, max(b - a,
    0)) = -Var(a) Phi(z) (Stein 1981, lemma 1), z = -|mean_a - mean_b| / sqrt(Var a + Var b).
    """
    gap, total = mean_a - mean_b, variance_a + variance_b
    std, z = tail(-gap.abs(), total)
    cdf, first, second = lower_moments(z)
    larger = torch.lerp(variance_b, variance_a, step(gap))
    return (
        torch.addcmul(torch.maximum(mean_a, mean_b), std, first),
        larger * (1 - 2 * cdf) + total * torch.addcmul(second, first, first, value=-1),
    )


@in_blocks
@in_float32
def clamp(mean: Tensor, variance: Tensor, low: float | None = None, high: float | None = None) -> Pair:
    """min(max(x, low), high): ReLU6, Hardtanh. Either bound may be None or infinite."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    correction, variance = clamp_correction(mean, variance, low, high)
    return bound(mean, low, high) + correction, variance


@in_float32
def clamp_between(mean: Tensor, variance: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Pair:
    """min(max(x, low), high) with bounds of each element's own, None or infinite ones too: (x - low) / (high - low).

    Bounds out of the Gaussian's reach are brought within it, where they change nothing, so that all are finite.
    """
    lowest = torch.as_tensor(-math.inf if low is None else low, dtype=mean.dtype, device=mean.device)
    highest = torch.as_tensor(math.inf if high is None else high, dtype=mean.dtype, device=mean.device)
    reach = 1 + 50 * torch.sqrt(variance.detach())
    left = torch.maximum(lowest, mean.detach() - reach)
    width = (torch.minimum(highest, mean.detach() + reach) - left).clamp(min=0)
    unit = torch.where(width > 0, width, 1.0)
    correction, spread = clamp_correction((mean - left) / unit, variance / (unit * unit), 0.0, 1.0)
    certain = torch.minimum(torch.maximum(mean, lowest), highest)
    return certain + width * correction, width * width * spread


def bound(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(x, low, high), of slope 1 at either bound: torch.clamp's own differs between versions."""
    if readable(x):
        return x.clamp(low, high)
    return torch.where(x < low, low, torch.where(x > high, high, x))


# Note [The further bound]
#   Where s is below a twelfth of the interval, either x is 6 s and more from the bound that is further, or the mean is
#   outside and what reaches beyond that bound is still less of what is inside: 1e-8 of the result at most. Then the
#   nearer bound is all that there is, at half of the price. In float64, an eighteenth, and 1e-16.
_ONE_BOUND = {torch.float32: 12.0, torch.float64: 18.0}


def clamp_correction(mean: Tensor, variance: Tensor, low: float, high: float) -> Pair:
    """What uncertainty adds to clamp(mean, low, high), and the variance."""
    if low == -math.inf and high == math.inf:
        return torch.zeros_like(mean), variance
    if low == -math.inf or high == math.inf:
        sign, outside = (-1.0, mean - high) if low == -math.inf else (1.0, low - mean)
        correction, variance = _ramp(outside, variance, 1 - step(outside))
        return sign * correction, variance
    if variance.numel() == 0:
        return torch.zeros_like(mean), variance
    if readable(mean, variance) and _ONE_BOUND[mean.dtype] ** 2 * float(variance.max()) < (high - low) ** 2:
        inside = torch.minimum(mean - low if low else mean, torch.rsub(mean, high))
        correction, variance = _ramp(inside, variance, step(inside))
        return torch.sign(0.5 * (low + high) - mean) * correction, variance
    return _two_bounds(mean, variance, low, high)


def _two_bounds(mean: Tensor, variance: Tensor, low: float, high: float) -> Pair:
    """Both bounds at once, as max(x, low) - max(x - high, 0).

    With a, b the distances of the mean to ``low`` and ``high`` over s, both taken negative, w = (high - low) / s,
    psi_n(z) = E[(z + xi)+^n] and D = psi_1(a) - psi_1(b), the mean is f(mean) + s D, and Var / v + D^2 is
        1 - 2 Phi(a) - 2 Phi(b) + psi_2(a) + psi_2(b)   between the bounds,
        psi_2(a) - psi_2(b) - 2 w psi_1(b)              below them, and with a and b exchanged above them,
    as Cov(x, max(x - h, 0)) = v Phi((m - h) / s) (Stein 1981, lemma 1). Once the interval is narrow, w << 1,
    these terms cancel: see `_narrow_clamp`.
    """
    std, a = tail(below(low - mean), variance)
    _, b = tail(below(mean - high), variance)
    under, over = step(low - mean), step(mean - high)
    width = high - low
    w = width / torch.sqrt(variance.clamp(min=max(width / REACH[mean.dtype], FLOOR[mean.dtype]) ** 2))
    (cdf_a, first_a, second_a), (cdf_b, first_b, second_b) = lower_moments(a), lower_moments(b)
    difference = first_a - first_b
    square = (1 - 2 * over) * second_a + (1 - 2 * under) * second_b + (1 - under - over) * (1 - 2 * (cdf_a + cdf_b))
    square = square - 2 * w * (under * first_b + over * first_a)
    spread = square - difference * difference
    narrow = w < (0.01 if mean.dtype == torch.float64 else 0.1)
    if not readable(w) or bool(narrow.any()):
        narrow_difference, narrow_spread = _narrow_clamp(w.clamp(max=1.0), mean - 0.5 * (low + high), variance)
        difference = torch.where(narrow, narrow_difference, difference)
        spread = torch.where(narrow, narrow_spread, spread)
    return std * difference, variance * spread


def _narrow_clamp(w: Tensor, offset: Tensor, variance: Tensor) -> Pair:
    """What `_two_bounds` calls D and Var / v, by Taylor's series in w << 1; ``offset`` is mean - (low + high) / 2.

    Reflected so that the mean is below the middle, at c <= 0 in units of s. With t uniform on (-1/2, 1/2), the mean is
    then w E[Phi(c + w t)] above the bound below it, and the second moment w^2 E[(1 + 2 t) Phi(c - w t)].
    """
    side = torch.where(offset <= 0, offset.new_full((), 1.0), -1.0)
    c = tail(side * offset, variance)[1]
    pdf, c2, w2 = normal_pdf(c), c * c, w * w
    share = normal_cdf(c) - c * pdf * w2 * (1 / 24 + (c2 - 3) * w2 / 1920)
    spread = w2 * (share * (1 - share) - pdf * w * (1 / 6 + (c2 - 1) * w2 / 240))
    return side * (w * share - bound(c + 0.5 * w, 0.0, math.inf)), spread
