"""Smooth special functions of a Gaussian variable that exist everywhere, by quadrature."""

from __future__ import annotations

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, in_float32, normal_cdf
from adfify.gaussian.quadrature import expect, soft


@in_blocks
@in_float32
def asinh(mean: Tensor, variance: Tensor) -> Pair:
    """arsinh x."""
    return soft(torch.asinh, mean, variance)


@in_blocks
@in_float32
def ndtr(mean: Tensor, variance: Tensor) -> Pair:
    """Phi(x): mean Phi(m / sqrt(1 + v)), exact (Owen 1980, 10,010.8); variance by quadrature."""
    shift = normal_cdf(mean * torch.rsqrt(1 + variance)) - normal_cdf(mean)
    return torch.special.ndtr(mean) + shift, soft(torch.special.ndtr, mean, variance)[1]


@in_blocks
@in_float32
def log_ndtr(mean: Tensor, variance: Tensor) -> Pair:
    """log Phi(x)."""
    return soft(torch.special.log_ndtr, mean, variance)


@in_blocks
@in_float32
def sinc(mean: Tensor, variance: Tensor) -> Pair:
    """sin(pi x) / (pi x)."""
    return expect(torch.sinc, mean, variance, kinks=(-3.0, -1.0, 0.0, 1.0, 3.0))


@in_blocks
@in_float32
def i0(mean: Tensor, variance: Tensor) -> Pair:
    """The modified Bessel function of order 0 (A&S 9.6.10)."""
    return expect(torch.special.i0, mean, variance)


@in_blocks
@in_float32
def i1(mean: Tensor, variance: Tensor) -> Pair:
    """The modified Bessel function of order 1 (A&S 9.6.10)."""
    return expect(torch.special.i1, mean, variance)


@in_blocks
@in_float32
def i0e(mean: Tensor, variance: Tensor) -> Pair:
    """exp(-|x|) I0(x)."""
    return expect(torch.special.i0e, mean, variance, kinks=(0.0,))


@in_blocks
@in_float32
def i1e(mean: Tensor, variance: Tensor) -> Pair:
    """exp(-|x|) I1(x)."""
    return expect(torch.special.i1e, mean, variance, kinks=(0.0,))
