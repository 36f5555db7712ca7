"""Functions that exist on an interval only, of a Gaussian variable given that it lies there.

Note [Given that it lies in the domain]
    Of asin x or logit x, a Gaussian x has some mass where they do not exist: the original's draws there are NaN. The
    moments are those of f(x) given low < x < high, a doubly truncated normal variable (Johnson, Kotz & Balakrishnan,
    Continuous Univariate Distributions 1, 1994, section 13.10.1). With the ends many std away this is the Gaussian
    itself. Nodes are x = a + (b - a) (3 t^2 - 2 t^3), t Gauss-Legendre (A&S 25.4.29), a and b the ends or 7 std from
    the mean: they crowd towards the ends, where f has the slope of a root or a logarithm. Weights are divided by
    their sum. Where the Gaussian is 7 std and more outside, or certain and outside, the value is the original's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.narrow import narrow, width_of
from adfify.gaussian.normal import Pair, in_float32
from adfify.gaussian.quadrature import expect

_WINDOW = 7.0
_NODES = [(float(t + 1) / 2, float(w) / 2) for t, w in zip(*leggauss(48), strict=True)]


def _given_inside(f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, low: float, high: float) -> Pair:
    """Moments of f(x) given low < x < high: see Note [Given that it lies in the domain]."""
    # As in Note [Small variances by quadrature], w being far narrower than the distance to the nearer end.
    gap = torch.minimum(mean - low, high - mean).clamp(min=0)
    width = width_of(mean, gap)
    little = variance < width * width
    std = torch.sqrt(torch.maximum(variance, width * width))
    start, end = ((mean + side * _WINDOW * std).clamp(low, high) for side in (-1, 1))
    within = (mean > low) & (mean < high)
    outside = ~within & (little | (start >= high) | (end <= low))
    somewhere = low + 1.0 if math.isinf(high) else 0.5 * (low + high)
    centre = f(torch.where(within, mean, torch.where(outside, somewhere, 0.5 * (start + end))))
    mass = first = second = torch.zeros_like(centre)
    for t, weight in _NODES:
        place = start + (end - start) * (t * t * (3 - 2 * t))
        x = torch.where(outside, somewhere, place).clamp(*_open(low, high, mean.dtype))
        z = (x - mean) / std
        density = (6 * weight * t * (1 - t)) * torch.exp(-0.5 * z * z)
        deviation = f(x) - centre
        mass, first, second = mass + density, first + density * deviation, second + density * deviation * deviation
    mass = torch.where(mass > 0, mass, 1.0)
    first, second = first / mass, second / mass
    inside = torch.where(within, mean, somewhere)
    shift, small = narrow(f, inside, variance, f(inside), torch.where(within, width, 1e-12))
    average = centre + torch.where(little, shift, first)
    spread = torch.where(little, small, (second - first * first).clamp(min=0))
    return torch.where(outside, f(mean.detach()), average), torch.where(outside, 0.0, spread)


def _open(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The ends of the open interval: what rounds to an end has no weight to speak of, but an infinite slope."""
    kind = torch.finfo(dtype)
    return low + (kind.eps * abs(low) if low else kind.tiny), high if math.isinf(high) else high - kind.eps * abs(high)


@in_blocks
@in_float32
def asin(mean: Tensor, variance: Tensor) -> Pair:
    """arcsin x, -1 < x < 1."""
    return _given_inside(torch.asin, mean, variance, -1.0, 1.0)


@in_blocks
@in_float32
def acos(mean: Tensor, variance: Tensor) -> Pair:
    """arccos x, -1 < x < 1."""
    return _given_inside(torch.acos, mean, variance, -1.0, 1.0)


@in_blocks
@in_float32
def atanh(mean: Tensor, variance: Tensor) -> Pair:
    """artanh x, -1 < x < 1."""
    return _given_inside(torch.atanh, mean, variance, -1.0, 1.0)


@in_blocks
@in_float32
def acosh(mean: Tensor, variance: Tensor) -> Pair:
    """arcosh x, x > 1."""
    return _given_inside(torch.acosh, mean, variance, 1.0, math.inf)


@in_blocks
@in_float32
def erfinv(mean: Tensor, variance: Tensor) -> Pair:
    """The inverse of erf, -1 < x < 1."""
    return _given_inside(torch.erfinv, mean, variance, -1.0, 1.0)


@in_blocks
@in_float32
def ndtri(mean: Tensor, variance: Tensor) -> Pair:
    """The inverse of Phi, 0 < x < 1."""
    return _given_inside(torch.special.ndtri, mean, variance, 0.0, 1.0)


@in_blocks
@in_float32
def entropy(mean: Tensor, variance: Tensor) -> Pair:
    """-x log x, x > 0."""
    return _given_inside(torch.special.entr, mean, variance, 0.0, math.inf)


@in_blocks
@in_float32
def log_gamma(mean: Tensor, variance: Tensor) -> Pair:
    """log Gamma(x), x > 0: between its poles, below 0, it has no use."""
    return _given_inside(torch.lgamma, mean, variance, 0.0, math.inf)


@in_blocks
@in_float32
def logit(mean: Tensor, variance: Tensor, eps: float | None = None) -> Pair:
    """log x / (1 - x), 0 < x < 1; with ``eps`` of an x clamped between eps and 1 - eps, by quadrature."""
    f = functools.partial(torch.logit, eps=eps)
    if eps:
        return expect(f, mean, variance, kinks=(eps, 1 - eps))
    return _given_inside(f, mean, variance, 0.0, 1.0)


@in_blocks
@in_float32
def cross_entropy(mean: Tensor, variance: Tensor, target: Tensor) -> Pair:
    """-t log x - (1 - t) log(1 - x), 0 < x < 1, neither logarithm below -100, as torch has it."""

    def loss(x: Tensor) -> Tensor:
        return (target - 1) * torch.log1p(-x).clamp(min=-100) - target * torch.log(x).clamp(min=-100)

    return _given_inside(loss, mean, variance, 0.0, 1.0)
