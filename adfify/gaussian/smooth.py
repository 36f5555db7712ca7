"""Smooth activations, all by quadrature over one bend at 0 unless they say otherwise."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, in_float32, normal_cdf, normal_pdf
from adfify.gaussian.piecewise import bound, clamp_correction
from adfify.gaussian.quadrature import expect, soft


@in_blocks
@in_float32
def sigmoid(mean: Tensor, variance: Tensor) -> Pair:
    """1 / (1 + exp(-x))."""
    return soft(torch.sigmoid, mean, variance, bend=1.0)


@in_blocks
@in_float32
def tanh(mean: Tensor, variance: Tensor) -> Pair:
    """tanh x."""
    return soft(torch.tanh, mean, variance, bend=0.5)


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
    smooth_mean, smooth_variance = soft(functools.partial(F.gelu, approximate=approximate), mean, variance, bend=0.7)
    if approximate != "none":
        return smooth_mean, smooth_variance
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
    return expect(functools.partial(F.elu, alpha=alpha), mean, variance, kinks=(0.0,))


@in_blocks
@in_float32
def selu(mean: Tensor, variance: Tensor) -> Pair:
    """1.0507 elu(x, 1.6733)."""
    return expect(F.selu, mean, variance, kinks=(0.0,))


@in_blocks
@in_float32
def celu(mean: Tensor, variance: Tensor, alpha: float = 1.0) -> Pair:
    """x for x > 0, else alpha (exp(x / alpha) - 1)."""
    return expect(functools.partial(F.celu, alpha=alpha), mean, variance, kinks=(0.0,))


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
