"""Functions that shrink, cut or jump: exact, by the moments of the truncated normal.

Note [A jump]
    With A = max(x - t, 0), B = 1 where x > t else 0, and P = E[B]: A B = A, so that for any d
    Var(A + d B) = Var A + 2 d E[A] (1 - P) + d^2 P (1 - P).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, below, in_float32, lower_moments, tail
from adfify.gaussian.piecewise import relu
from adfify.gaussian.quadrature import expect, soft
from adfify.gaussian.smooth import levelling


def _jump(height: Tensor, variance: Tensor, rise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of A + rise B for x - t of mean ``height``: its mean, what uncertainty adds to that, and its variance."""
    above = height > 0
    beyond = torch.where(variance > 0, lower_moments(tail(below(height), variance)[1])[0], 0.0)
    ramp, spread = relu(height, variance)
    share = torch.where(above, 1 - beyond, beyond)
    shift = ramp - torch.relu(height) + rise * torch.where(above, -beyond, beyond)
    lower = torch.where(above, beyond, 1 - beyond)
    variance = spread + 2 * rise * ramp * lower + rise * rise * beyond * (1 - beyond)
    return ramp + rise * share, shift, variance.clamp(min=0)


@in_blocks
@in_float32
def threshold(mean: Tensor, variance: Tensor, threshold: float, value: float) -> Pair:
    """x where x > threshold, else value."""
    _, shift, spread = _jump(mean - threshold, variance, threshold - value)
    return F.threshold(mean, threshold, value) + shift, spread


@in_blocks
@in_float32
def hardshrink(mean: Tensor, variance: Tensor, lambd: float = 0.5) -> Pair:
    """x where |x| > lambd, else 0: `_shrunk` with a jump of lambd."""
    shift, spread = _shrunk(mean, variance, lambd, lambd)
    return F.hardshrink(mean, lambd) + shift, spread


@in_blocks
@in_float32
def softshrink(mean: Tensor, variance: Tensor, lambd: float = 0.5) -> Pair:
    """x moved towards 0 by lambd: `_shrunk` without a jump."""
    shift, spread = _shrunk(mean, variance, lambd, 0.0)
    return F.softshrink(mean, lambd) + shift, spread


def _shrunk(mean: Tensor, variance: Tensor, lambd: float, rise: float) -> Pair:
    """Two sides that are never both there, U - L with U L = 0, so that Var = Var U + Var L + 2 E[U] E[L]."""
    upper, upper_shift, upper_spread = _jump(mean - lambd, variance, rise)
    lower, lower_shift, lower_spread = _jump(-mean - lambd, variance, rise)
    return upper_shift - lower_shift, upper_spread + lower_spread + 2 * upper * lower


@in_blocks
@in_float32
def tanhshrink(mean: Tensor, variance: Tensor) -> Pair:
    """x - tanh x, by quadrature split at 0, where it is as flat as x^3."""
    average, spread = expect(_tanhshrink, mean, variance, kinks=(0.0,))
    return F.tanhshrink(mean) + (average - _tanhshrink(mean)), spread


def _tanhshrink(x: Tensor) -> Tensor:
    """x - tanh x, near 0 by its series (A&S 4.5.64), as the difference is mostly rounding there."""
    square = x.clamp(-0.2, 0.2).square()
    series = torch.full_like(x, -21844 / 6081075)
    for coefficient in (1382 / 155925, -62 / 2835, 17 / 315, -2 / 15, 1 / 3):
        series = torch.addcmul(torch.full_like(x, coefficient), series, square)
    return torch.where(x.abs() < 0.2, series * x * square, F.tanhshrink(x))


@in_blocks
@in_float32
def softsign(mean: Tensor, variance: Tensor) -> Pair:
    """x / (1 + |x|), by quadrature split at 0."""
    level = mean.detach().abs() > 1

    def f(x: Tensor) -> Tensor:
        return torch.where(level, (1 + 2 * torch.relu(x)) / (1 + x.abs()), F.softsign(x))  # 1 more, or not

    shift, spread = levelling(f, mean, variance, partial(expect, kinks=(0.0,)))
    return F.softsign(mean) + shift, spread


@in_blocks
@in_float32
def smooth(f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, bend: float = 0.0) -> Pair:
    """Any smooth f that bends once, at 0, by quadrature; ``bend`` is that of `soft`."""
    return soft(f, mean, variance, bend)
