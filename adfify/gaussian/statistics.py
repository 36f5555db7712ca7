"""Statistics of many Gaussian variables, sums of squares, and what is divided by a power of one.

Note [A normalised value and its statistics]
    y = u S^-p, with u an element (less the average) and S a sum of squares of all elements: u and S are correlated,
    and S is itself random. Mean and variance of S, Cov(u, S) and Cov((u - a)^2, S) are exact here, for independent
    Gaussian elements (Stein 1981, lemma 1; Mathai & Provost, Quadratic Forms in Random Variables, 1992, theorem
    3.2b.2). With log S taken as Gaussian together with u, E[y] and E[y^2] follow in closed form. To first order in
    the variances that is the delta method, whose Jacobian is (delta_ij - 1/n - y_i y_j / n) / sigma, and S is
    centred on E[S], the variance of the noisy elements (law of total variance), not on that of the means.

    Measured for layer norm, for elements of std 0.03 to 2 times the spread of their means, equal or log-normally
    unequal variances: the std is off by 3.6 / 1 / 0.5 % at most for groups of 4 / 16 / 64 elements of equal variance
    and by 17 / 2 / 2.5 % of unequal, the mean by .10 / .01 / .01 of its std. With one element 3 sqrt(n) from the
    others, by 10 % (n = 16), 7 % (64) for that element. (The delta method on the statistics of the means: the std by
    120 %, the mean by 1.5 std, at std 2.)

    RMS and unit norm, 4 / 8 / 64 elements: 2 / 1.5 / 1 % of equal variance, 23 / 13 / 5 % of unequal; for 2 elements
    19 %, and for 2 of unequal variance the std can be missed altogether. Local response norm: 1 % at alpha 1e-4, but
    up to 50 % at alpha 1 and std 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Squares:
    """A sum of squares S of Gaussian variables, and the variables u that are to be divided by it.

    Attributes:
        centre: a = E[u].
        spread: Var[u].
        certain: S of the means, without uncertainty.
        excess: E[S] less that: exactly 0 at variance 0.
        variance: Var[S].
        covariance: Cov(u, S).
        curvature: Cov((u - a)^2, S).
    """

    centre: Tensor
    spread: Tensor
    certain: Tensor
    excess: Tensor
    variance: Tensor
    covariance: Tensor
    curvature: Tensor


def _plain(mean: Tensor, variance: Tensor, dim: Dims, scale: float, offset: float) -> Squares:
    """S = scale * (sum of x^2) + offset, u = x."""
    squares = mean * mean
    return Squares(
        mean,
        variance,
        scale * squares.sum(dim, keepdim=True) + offset,
        scale * variance.sum(dim, keepdim=True),
        scale**2 * (variance * (4 * squares + 2 * variance)).sum(dim, keepdim=True),
        (2 * scale) * (mean * variance),
        (2 * scale) * (variance * variance),
    )


def _centred(mean: Tensor, variance: Tensor, dim: Dims, scale: float, offset: float) -> Squares:
    """S = scale * (sum of (x - average)^2) + offset, u = x - average."""
    n = _count(mean, dim)
    average, square = variance.mean(dim, keepdim=True), variance * variance
    a = mean - mean.mean(dim, keepdim=True)
    total, product = square.sum(dim, keepdim=True), a * variance
    overlap = square * (1 - 2 / n) + total / n**2 - (variance - average).square() / n
    return Squares(
        a,
        variance * (1 - 2 / n) + average / n,
        scale * a.square().sum(dim, keepdim=True) + offset,
        scale * (n - 1) * average,
        scale**2 * (2 * (total * (1 - 2 / n) + average * average) + 4 * (a * product).sum(dim, keepdim=True)),
        (2 * scale) * (product - product.mean(dim, keepdim=True)),
        (2 * scale) * overlap,
    )


def _unbiased(x: Tensor, dim: Dims, correction: float) -> float:
    """One over the count less the correction; NaN, as torch's result, where nothing is left."""
    left = _count(x, dim) - correction
    return 1 / left if left > 0 else math.nan


def size_of(mean: Tensor, variance: Tensor, dim: Dims) -> Tensor:
    """The size of a group's largest element, in units of which squares of variances neither underflow nor overflow."""
    if 0 in mean.shape:
        return torch.ones_like(mean.sum(dim, keepdim=True))
    size = torch.maximum(mean.detach().abs(), variance.detach().sqrt()).amax(dim, keepdim=True)
    return _safe(size)


def _count(x: Tensor, dim: Dims) -> int:
    count = 1
    for axis in dim:
        count *= x.shape[axis]
    return count or 1  # an empty batch


def _safe(x: Tensor) -> Tensor:
    """x where it is positive, else 1: a divisor whose masked branch sends no NaN into the gradients."""
    return torch.where(x > 0, x, 1.0)


def _divide(s: Squares, power: float) -> Pair:
    """What uncertainty adds to the mean of u S^-p, and its variance; see Note [A normalised value ...].

    With L = log S Gaussian of variance t, k = Cov(u, L), r = exp(p (p + 1) t / 2) / E[S]^p:
        E[y] = r (a - p k),    E[y^2] = r^2 exp(p^2 t) (w + (a - 2 p k)^2).
    That model knows Cov(u, S) only. As u^2 is part of S, y varies less than that: the part of Var[u] that L does not
    explain is divided by 1 + 2 p Cov((u - a)^2, S) / (Var[u] E[S]), which is exact to second order for a = 0.
    """
    level = s.certain + s.excess
    t = torch.log1p(s.variance / level / level)
    k = power * (s.covariance / level)
    bend = (2 * power) * s.curvature / level / _safe(s.spread)
    unexplained = (s.spread - (k / power).square() / _safe(t)).clamp(min=0)
    spread = s.spread - unexplained * (bend / (1 + bend))
    gain = level.pow(-power) * torch.exp((power * (power + 1) / 2) * t)
    mean = gain * (s.centre - k) - s.certain.pow(-power) * s.centre
    q = power**2 * t
    inner = spread * torch.exp(q) + (s.centre - 2 * k).square() * torch.expm1(q) + k * (3 * k - 2 * s.centre)
    return mean, gain.square() * inner.clamp(min=0)


@in_float32
def root_shift(squares: Tensor, excess: Tensor, variance: Tensor, certain: Tensor) -> Pair:
    """What uncertainty adds to ``certain`` = sqrt S of the means, and the variance of sqrt S.

    S, ``squares`` for the means alone and E[S] = squares + excess, is taken as Gamma distributed (Nakagami, The
    m-distribution, 1960), whose shape is 1 / c with c = Var[S] / E[S]^2. Then
    Var[sqrt S] / E[S] = 1 - c Gamma(1/c + 1/2)^2 / Gamma(1/c)^2, here to 0.3 % by (c / 4) / (1 + c / 8 + c^2 / 32),
    which has the right expansion to c^2.
    """
    random = squares + excess > 0
    level = torch.where(random, squares + excess, 1.0)
    c = variance / level / level
    h = 0.25 * c / (1 + c / 8 + c * c / 32)
    shift = (excess - level * h) / (torch.sqrt(level * (1 - h)) + certain)
    return torch.where(random, shift, 0.0), torch.where(random, level * h, 0.0)


# Each returns what uncertainty *adds* to the mean, exactly 0 at variance 0, so that the mean itself can be the original
# operation's, bit for bit.


@in_float32
def standardise_shift(mean: Tensor, variance: Tensor, dim: Dims, eps: float) -> Pair:
    """(x - average) / sqrt(variance of the group + eps): layer, group and instance normalisation."""
    return _divide(_centred(mean, variance, dim, 1 / _count(mean, dim), eps), 0.5)


@in_float32
def rms_shift(mean: Tensor, variance: Tensor, dim: Dims, eps: float) -> Pair:
    """x / sqrt(mean of x^2 + eps)."""
    return _divide(_plain(mean, variance, dim, 1 / _count(mean, dim), eps), 0.5)


@in_float32
def simple_norm_shift(mean: Tensor, variance: Tensor, dim: Dims, eps: float) -> Pair:
    """x / sqrt(unbiased variance of the group + eps)."""
    n = _count(mean, dim)
    s = _centred(mean, variance, dim, 1 / (n - 1), eps)
    scale = 2 / (n - 1)
    product = scale * (s.centre * variance)
    return _divide(
        Squares(mean, variance, s.certain, s.excess, s.variance, product, scale * (1 - 1 / n) * variance * variance),
        0.5,
    )


@in_float32
def unit_shift(mean: Tensor, variance: Tensor, dim: Dims, eps: float) -> Pair:
    """x / max(norm of x, eps)."""
    s, least = _plain(mean, variance, dim, 1.0, 0.0), eps**2
    level = s.certain + s.excess
    short = level <= least  # so short that the divisor is eps, which is certain
    excess = torch.where(s.certain < least, level - least, s.excess)
    divided = (~short).to(mean.dtype)
    held = Squares(
        mean,
        variance,
        torch.where(short, 1.0, s.certain.clamp(min=least)),
        torch.where(short, 0.0, excess),
        s.variance * divided,
        s.covariance * divided,
        s.curvature * divided,
    )
    shift, spread = _divide(held, 0.5)
    return shift * divided, torch.where(short, variance / least, spread)


@in_float32
def local_response_shift(
    mean: Tensor, variance: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Pair:
    """x (k + alpha * average of x^2 over ``size`` neighbouring channels)^-beta."""

    def window(x: Tensor) -> Tensor:
        padded = F.pad(x, [0, 0] * (x.dim() - 2) + [size // 2, (size - 1) // 2])
        total = padded.narrow(1, 0, x.shape[1])
        for offset in range(1, size):
            total = total + padded.narrow(1, offset, x.shape[1])
        return total

    scale, squares = alpha / size, mean * mean
    s = Squares(
        mean,
        variance,
        scale * window(squares) + k,
        scale * window(variance),
        scale**2 * window(variance * (4 * squares + 2 * variance)),
        (2 * scale) * (mean * variance),
        (2 * scale) * (variance * variance),
    )
    return _divide(s, beta)


@in_float32
def norm_shift(mean: Tensor, variance: Tensor, certain: Tensor, dim: Dims) -> Pair:
    """The Euclidean norm, ``certain`` that of the means, with dimensions kept."""
    unit = size_of(mean, variance, dim)
    s = _plain(mean / unit, variance / unit / unit, dim, 1.0, 0.0)
    shift, spread = root_shift(s.certain, s.excess, s.variance, certain / unit)
    return unit * shift, unit * unit * spread


@in_float32
def variance_shift(mean: Tensor, variance: Tensor, dim: Dims, correction: float = 1) -> Pair:
    """The sample variance, dimensions kept: exact (Mathai & Provost, theorem 3.2b.2)."""
    s = _centred(mean, variance, dim, _unbiased(mean, dim, correction), 0.0)
    return s.excess, s.variance


@in_float32
def deviation_shift(mean: Tensor, variance: Tensor, certain: Tensor, dim: Dims, correction: float = 1) -> Pair:
    """The sample standard deviation, ``certain`` that of the means, dimensions kept."""
    unit = size_of(mean - mean.mean(dim, keepdim=True), variance, dim)
    s = _centred(mean / unit, variance / unit / unit, dim, _unbiased(mean, dim, correction), 0.0)
    shift, spread = root_shift(s.certain, s.excess, s.variance, certain / unit)
    return unit * shift, unit * unit * spread


@in_float32
def cosine_shift(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor, dim: int, eps: float) -> Pair:
    """What uncertainty adds to the cosine c of the angle between a and b, along ``dim``, which is kept; the variance.

    c = a.b (|a|^2 |b|^2)^-1/2 by the delta method (Oehlert, The American Statistician 46, 1992) about the expected
    product and squares S = |mean|^2 + sum of variances, with their exact variances and covariances (Stein 1981, lemma
    1; Goodman 1960, equation 2): what is left when both vectors are all noise is right, a variance of 1 / n.
    """

    def squares(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(mean, dim=dim, keepdim=True).clamp(min=eps)
        expected = norm.square() + variance.sum(dim, keepdim=True)
        return norm, torch.sqrt(expected)

    norm_a, root_a = squares(mean_a, variance_a)
    norm_b, root_b = squares(mean_b, variance_b)
    product = (mean_a * mean_b).sum(dim, keepdim=True)
    u, w = mean_a / root_a, mean_b / root_b
    share_a, share_b = variance_a / root_a.square(), variance_b / root_b.square()
    cosine = product / (root_a * root_b)
    bend = sum(
        cosine * 0.75 * (share * (2 * unit.square() + share)).sum(dim, keepdim=True)
        - (u * w * share).sum(dim, keepdim=True)
        for unit, share in ((u, share_a), (w, share_b))
    )
    slopes = share_a * (w - cosine * u).square() + share_b * (u - cosine * w).square() + share_a * share_b
    return cosine - product / (norm_a * norm_b) + bend, slopes.sum(dim, keepdim=True)
