"""Smooth special functions of a Gaussian variable that exist everywhere, by quadrature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.narrow import width_of
from adfify.gaussian.normal import Pair, below, in_float32, normal_cdf
from adfify.gaussian.quadrature import expect, integrate, soft
from adfify.gaussian.smooth import levelling


@in_blocks
@in_float32
def asinh(mean: Tensor, variance: Tensor) -> Pair:
    """arsinh x."""
    size = -below(mean)
    unit = _inverse(size)

    def f(x: Tensor) -> Tensor:  # asinh x - asinh |m|, which near |m| is no difference of two logarithms
        ratio, excess = _inverse(x) / unit, (_inverse(x) - unit) / unit
        return torch.where(excess.abs() < 0.5, torch.log1p(excess.clamp(-0.5, 0.5)), torch.log(ratio))

    shift, spread = soft(f, size, variance)
    return torch.asinh(mean) + torch.where(mean > 0, shift, -shift), spread


def _inverse(x: Tensor) -> Tensor:
    """e^(asinh x) = x + sqrt(x^2 + 1)."""
    root = x.abs() + torch.sqrt(x * x + 1)
    return torch.where(x < 0, 1 / root, root)


@in_blocks
@in_float32
def ndtr(mean: Tensor, variance: Tensor) -> Pair:
    """Phi(x): mean Phi(m / sqrt(1 + v)), exact (Owen 1980, 10,010.8); variance by quadrature."""
    shift = normal_cdf(mean * torch.rsqrt(1 + variance)) - normal_cdf(mean)
    return torch.special.ndtr(mean) + shift, levelling(normal_cdf, mean, variance)[1]


@in_blocks
@in_float32
def log_ndtr(mean: Tensor, variance: Tensor) -> Pair:
    """log Phi(x)."""
    average, spread = soft(_log_cdf, mean, variance)
    return torch.special.log_ndtr(mean) + (average - _log_cdf(mean)), spread


def _log_cdf(x: Tensor) -> Tensor:
    """log Phi(x), far down by its asymptotic series (A&S 26.2.12), as torch's own has gradients of NaN there."""
    end = {torch.float32: -8.0, torch.float64: -30.0}[x.dtype]
    far, square = x.clamp(max=end), x.clamp(max=end).square().reciprocal()
    series = square * (-1 + square * (3 + square * (-15 + square * 105)))
    asymptote = -0.5 * far * far - torch.log(-far) - 0.5 * math.log(2 * math.pi) + torch.log1p(series)
    return torch.where(x < end, asymptote, torch.special.log_ndtr(x.clamp(min=end)))


@in_blocks
@in_float32
def sinc(mean: Tensor, variance: Tensor) -> Pair:
    """sin(pi x) / (pi x)."""
    near = (mean.detach().abs() < 0.5) & (variance.detach() < 0.25)

    def f(x: Tensor) -> Tensor:  # less 1 near 0, where it is flat
        turn = x - 2 * torch.round(0.5 * x)  # exact, unlike pi x
        far = torch.sin(math.pi * turn) / (math.pi * torch.where(x == 0, 1.0, x))
        square = (math.pi * x.clamp(-0.5, 0.5)).square()
        series = torch.zeros_like(x)
        for k in range(10, 0, -1):
            series = square / (2 * k * (2 * k + 1)) * (-1 - series)
        inside = x.abs() < 0.5
        return torch.where(near, torch.where(inside, series, far - 1), torch.where(inside, 1 + series, far))

    # Integrated in parts, but smooth where these meet, and no smoother far from 0.
    width = width_of(torch.zeros_like(mean))
    average, spread = integrate(f, mean, variance, width, (-3.0, -1.0, 0.0, 1.0, 3.0))
    return torch.sinc(mean) + (average - f(mean)), spread


@in_blocks
@in_float32
def i0(mean: Tensor, variance: Tensor) -> Pair:
    """The modified Bessel function of order 0 (A&S 9.6.10)."""
    near = (mean.detach().abs() < 1) & (variance.detach() < 1)

    def f(x: Tensor) -> Tensor:  # less 1 near 0, where it is flat
        return torch.where(near, _i0_less_one(x), torch.special.i0(x))

    average, spread = expect(f, mean, variance)
    return torch.special.i0(mean) + (average - f(mean)), spread


def _i0_less_one(x: Tensor) -> Tensor:
    """By its series (A&S 9.6.12) within 1 of 0."""
    square = 0.25 * x.clamp(-1, 1).square()
    series = torch.zeros_like(x)
    for k in range(10, 0, -1):
        series = square / (k * k) * (1 + series)
    return torch.where(x.abs() < 1, series, torch.special.i0(x.clamp(-20, 20)) - 1)


@in_blocks
@in_float32
def i1(mean: Tensor, variance: Tensor) -> Pair:
    """The modified Bessel function of order 1 (A&S 9.6.10)."""
    return expect(torch.special.i1, mean, variance)


@in_blocks
@in_float32
def i0e(mean: Tensor, variance: Tensor) -> Pair:
    """exp(-|x|) I0(x)."""
    near = (mean.detach().abs() < 1) & (variance.detach() < 1)

    def f(x: Tensor) -> Tensor:  # less 1 near 0, where that is the value at the kink
        below_one = torch.expm1(-x.abs()) + torch.exp(-x.abs()) * _i0_less_one(x)
        return torch.where(near, below_one, torch.special.i0e(x))

    average, spread = expect(f, mean, variance, kinks=(0.0,))
    return torch.special.i0e(mean) + (average - f(mean)), spread


@in_blocks
@in_float32
def i1e(mean: Tensor, variance: Tensor) -> Pair:
    """exp(-|x|) I1(x)."""
    return expect(torch.special.i1e, mean, variance, kinks=(0.0,))
