"""Smooth activations, all by quadrature over one bend at 0 unless they say otherwise.

Note [Tails that level off]
    In float32 tanh is 1 from 9 on up, and elu -1 below -17, and no difference of two values shows that they still vary.
    A constant changes neither the variance nor what uncertainty adds to the mean, so what is integrated is f less the
    level of its tail: e^x for elu, and for a function that is odd but for a constant, that of the mean's own side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, below, in_float32, normal_cdf, normal_pdf
from adfify.gaussian.piecewise import bound, clamp_correction
from adfify.gaussian.quadrature import expect, soft

Integral = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Pair]


def levelling(f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, integral: Integral = soft) -> Pair:
    """What uncertainty adds to the mean, and the variance, of an increasing f that is odd but for a constant.

    Args:
        f: less its limit at -infinity, to full relative accuracy below 0: see Note [Tails that level off].
        mean, variance: of x.
        integral: gives the moments of f.
    """
    low = below(mean)
    average, spread = integral(f, low, variance)
    shift = average - f(low)
    return torch.where(mean > 0, -shift, shift), spread


@in_blocks
@in_float32
def sigmoid(mean: Tensor, variance: Tensor) -> Pair:
    """1 / (1 + exp(-x))."""
    shift, spread = levelling(torch.sigmoid, mean, variance, functools.partial(soft, bend=1.0))
    return torch.sigmoid(mean) + shift, spread


@in_blocks
@in_float32
def tanh(mean: Tensor, variance: Tensor) -> Pair:
    """tanh x = 2 sigmoid(2 x) - 1."""
    shift, spread = levelling(lambda x: torch.sigmoid(2 * x), mean, variance, functools.partial(soft, bend=0.5))
    return torch.tanh(mean) + 2 * shift, 4 * spread


@in_blocks
@in_float32
def silu(mean: Tensor, variance: Tensor) -> Pair:
    """x sigmoid(x)."""
    return soft(F.silu, mean, variance, bend=1.0)


@in_blocks
@in_float32
def mish(mean: Tensor, variance: Tensor) -> Pair:
    """x tanh(softplus(x))."""
    return soft(F.mish, mean, variance, bend=0.85)


@in_blocks
@in_float32
def gelu(mean: Tensor, variance: Tensor, approximate: str = "none") -> Pair:
    """x Phi(x), whose mean is exact: m Phi(m r) + v r phi(m r) with r = 1 / sqrt(1 + v).

    E[x Phi(x)] = m E[Phi(x)] + v E[phi(x)] (Stein 1981, lemma 1), and E[Phi(x)] = Phi(m r), E[phi(x)] = r
    phi(m r) (Owen, A table of normal integrals, 1980, 10,010.8, and its derivative). The tanh form goes by
    quadrature.
    """
    if approximate != "none":
        return soft(functools.partial(F.gelu, approximate=approximate), mean, variance, bend=0.7)
    # F.gelu takes Phi as 1 + erf, which is 0 from -5.5 on down.
    smooth_variance = soft(lambda x: x * normal_cdf(x), mean, variance, bend=0.7)[1]
    r = torch.rsqrt(1 + variance)
    shift = mean * (normal_cdf(mean * r) - normal_cdf(mean)) + variance * r * normal_pdf(mean * r)
    return F.gelu(mean) + shift, smooth_variance


@in_blocks
@in_float32
def softplus(mean: Tensor, variance: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Pair:
    """log(1 + exp(beta x)) / beta, and x above threshold / beta; the jump there, exp(-threshold) / beta, is ignored."""
    unit = functools.partial(F.softplus, threshold=threshold)
    unit_mean, unit_variance = soft(unit, beta * mean, beta * beta * variance, bend=1.0)
    shift = (unit_mean - unit(beta * mean)) / beta
    return F.softplus(mean, beta, threshold) + shift, unit_variance / (beta * beta)


@in_blocks
@in_float32
def logsigmoid(mean: Tensor, variance: Tensor) -> Pair:
    """log sigmoid(x)."""
    return soft(F.logsigmoid, mean, variance, bend=1.0)


@in_blocks
@in_float32
def elu(mean: Tensor, variance: Tensor, alpha: float = 1.0) -> Pair:
    """x for x > 0, else alpha (exp(x) - 1)."""
    shift, spread = _exponential_unit(mean, variance, 1.0, alpha, 1.0)
    return F.elu(mean, alpha) + shift, spread


def _exponential_unit(mean: Tensor, variance: Tensor, slope: float, height: float, rate: float) -> Pair:
    """Of slope x for x > 0, else height (exp(rate x) - 1), as `levelling`."""

    level = rate * mean.detach() < -1

    def f(x: Tensor) -> Tensor:
        exponent = rate * x.clamp(max=0)
        return slope * torch.relu(x) + height * torch.where(level, torch.exp(exponent), torch.expm1(exponent))

    average, spread = expect(f, mean, variance, kinks=(0.0,))
    return average - f(mean), spread


@in_blocks
@in_float32
def selu(mean: Tensor, variance: Tensor) -> Pair:
    """1.0507 elu(x, 1.6733)."""
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    shift, spread = _exponential_unit(mean, variance, scale, scale * alpha, 1.0)
    return F.selu(mean) + shift, spread


@in_blocks
@in_float32
def celu(mean: Tensor, variance: Tensor, alpha: float = 1.0) -> Pair:
    """x for x > 0, else alpha (exp(x / alpha) - 1)."""
    shift, spread = _exponential_unit(mean, variance, 1.0, alpha, 1 / alpha)
    return F.celu(mean, alpha) + shift, spread


@in_blocks
@in_float32
def hardswish(mean: Tensor, variance: Tensor) -> Pair:
    """x clamp(x + 3, 0, 6) / 6, by quadrature between its kinks."""
    return expect(F.hardswish, mean, variance, kinks=(-3.0, 3.0))


@in_blocks
@in_float32
def hardsigmoid(mean: Tensor, variance: Tensor) -> Pair:
    """clamp(x + 3, 0, 6) / 6: exact, as `clamp`."""
    correction, clamped = clamp_correction(mean, variance, -3.0, 3.0)
    base = torch.where(variance > 0, bound(mean + 3, 0.0, 6.0) / 6, F.hardsigmoid(mean))
    return base + correction / 6, clamped / 36
