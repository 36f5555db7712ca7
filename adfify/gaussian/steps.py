"""Functions that are constant between jumps of 1: floor, ceil, round, trunc; and what they cut off.

Note [Counting jumps]
    T(x) - T(m) = j once x has passed j jumps upwards, so that with t_j the j-th jump above the mean, and s_j the j-th
    below,
        E[T] - T(m) = sum P[x >= t_j] - sum P[x < s_j],   E[(T - T(m))^2] = sum (2 j - 1) (P[x >= t_j] + P[x < s_j]).
    Every probability is at most 1/2: nothing cancels, however small the variance. This takes some 8 std of jumps.

Note [A wide Gaussian modulo 1]
    The fraction {x} = x - floor(x) has the Fourier series 1/2 - sum sin(2 pi k x) / (pi k), its square 1/3 + sum cos(2
    pi k x) / (pi k)^2 - sin(2 pi k x) / (pi k), and a Gaussian takes the k-th term times exp(-2 pi^2 k^2 v) (its
    characteristic function, A&S 26.2.17): two terms are exact to 3e-9 from a std of 1/2 on. The covariance with x is v
    E[d{x}/dx] (Stein's lemma), of which the jumps are a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.comparison import beyond
from adfify.gaussian.normal import Pair, in_float32, normal_pdf

_WIDE = 0.5  # std, in units of the jumps' distance, from which the Fourier series serves
_WIDE_TRUNC = 2.0  # likewise where the jump at 0 is missing, and the series of Euler and Maclaurin has to end there
_REACH = 8


@dataclass(frozen=True)
class _Counted:
    """Sums of Note [Counting jumps], and the density of x at all jumps together."""

    shift: Tensor
    square: Tensor
    density: Tensor

    @property
    def variance(self) -> Tensor:
        return (self.square - self.shift * self.shift).clamp(min=0)


def _std(variance: Tensor, most: float) -> Tensor:
    return torch.sqrt(variance.clamp(1e-30, most * most))


def _jumps(mean: Tensor, at: Tensor, offset: float, count: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The j-th jump on each side: its distance from the mean, 0 or more, where it is, and j with its sign."""
    for j in range(1, count + 1):
        yield (at - mean) + (j - offset), at + (j - offset), j
        yield (mean - at) + (j - 1 + offset), at - (j - 1 + offset), -j


def _count(mean: Tensor, variance: Tensor, at: Tensor, offset: float, wide: float, skip_zero: bool) -> _Counted:
    """Of the jumps next to the mean, up to a std of ``wide``.

    Args:
        mean, variance: of x, in units of the jumps' distance.
        at: T(mean).
        offset: from where T becomes T(mean) + 1 back to the whole number: 0 for floor, 1/2 for round, 1 for ceil.
        wide: the largest std.
        skip_zero: whether there is no jump at 0.
    """
    narrow = variance.clamp(max=wide * wide)
    std = _std(variance, wide)
    shift, square, density = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    passed = {1: torch.zeros_like(mean), -1: torch.zeros_like(mean)}
    for distance, place, j in _jumps(mean, at, offset, math.ceil(_REACH * wide) + 1):
        sign = 1 if j > 0 else -1
        there = (place != 0).to(mean.dtype) if skip_zero else torch.ones_like(mean)
        passed[sign] = passed[sign] + there
        # At the jump itself half lies beyond it.
        probability = there * beyond(-distance, narrow)
        shift = shift + sign * probability
        square = square + (2 * passed[sign] - 1) * probability
        density = density + there * normal_pdf((distance / std).clamp(max=30.0)) / std
    return _Counted(shift, square, torch.where(variance > 0, density, 0.0))


@dataclass(frozen=True)
class _Fraction:
    """Of {x} for a wide x: mean, mean square, variance, and the mean of its derivative, jumps included."""

    mean: Tensor
    square: Tensor
    slope: Tensor

    @property
    def variance(self) -> Tensor:
        return self.square - self.mean * self.mean


def _fraction(mean: Tensor, variance: Tensor, wide: float) -> _Fraction:
    """See Note [A wide Gaussian modulo 1]; for a std of ``wide`` at least."""
    v, w = variance.clamp(min=wide * wide), mean - torch.floor(mean)
    first, square, slope = torch.full_like(w, 0.5), torch.full_like(w, 1 / 3), torch.zeros_like(w)
    for k in (1, 2):
        factor, angle = torch.exp(-2 * math.pi**2 * k * k * v), 2 * math.pi * k * w
        sine, cosine = factor * torch.sin(angle), factor * torch.cos(angle)
        first = first - sine / (math.pi * k)
        square = square + cosine / (math.pi * k) ** 2 - sine / (math.pi * k)
        slope = slope - 2 * cosine
    return _Fraction(first, square, slope)


def _chosen(variance: Tensor, wide: float, narrow_result: Pair, wide_result: Pair) -> Pair:
    is_wide = variance >= wide * wide
    a, b = (torch.where(is_wide, x, y) for x, y in zip(wide_result, narrow_result, strict=True))
    return a, b


def _stepped(mean: Tensor, variance: Tensor, at: Tensor, offset: float) -> Pair:
    """The shift of the mean of T from ``at``, and the variance."""
    counted = _count(mean, variance, at, offset, _WIDE, False)
    # T is floor(x + offset), up to where x is at a jump, which has no probability.
    fraction = _fraction(mean + offset, variance, _WIDE)
    wide = (mean - at) + offset - fraction.mean, variance + fraction.variance - 2 * variance * fraction.slope
    return _chosen(variance, _WIDE, (counted.shift, counted.variance), wide)


@in_blocks
@in_float32
def floor(mean: Tensor, variance: Tensor) -> Pair:
    """The largest whole number up to x."""
    at = torch.floor(mean)
    shift, spread = _stepped(mean, variance, at, 0.0)
    return at + shift, spread


@in_blocks
@in_float32
def ceil(mean: Tensor, variance: Tensor) -> Pair:
    """The smallest whole number from x on."""
    at = torch.ceil(mean)
    shift, spread = _stepped(mean, variance, at, 1.0)
    return at + shift, spread


@in_blocks
@in_float32
def round(mean: Tensor, variance: Tensor) -> Pair:
    """The nearest whole number; a half, which has no probability, to the even one."""
    at = torch.round(mean)
    shift, spread = _stepped(mean, variance, at, 0.5)
    return at + shift, spread


@in_blocks
@in_float32
def fraction(mean: Tensor, variance: Tensor) -> Pair:
    """x - floor(x)."""
    at = torch.floor(mean)
    counted = _count(mean, variance, at, 0.0, _WIDE, False)
    narrow = variance.clamp(max=_WIDE * _WIDE)
    spread = (narrow * (1 - 2 * counted.density) + counted.variance).clamp(min=0)
    wide = _fraction(mean, variance, _WIDE)
    shift, spread = _chosen(variance, _WIDE, (-counted.shift, spread), (wide.mean - (mean - at), wide.variance))
    return (mean - at) + shift, spread


# Note [Cut off at zero]
#   trunc(x) is floor(x), and one more below 0: it has no jump at 0. Of a wide Gaussian this takes E[{x}; x < 0], by the
#   series of Euler and Maclaurin (A&S 23.1.30) in the density p at 0: P / 2 + p / 12 - p'' / 720.


@dataclass(frozen=True)
class _Below:
    """Of a wide x: P[x < 0], E[x; x < 0] and E[{x}; x < 0]."""

    share: Tensor
    first: Tensor
    fraction: Tensor


def _below_zero(mean: Tensor, variance: Tensor) -> _Below:
    v = variance.clamp(min=_WIDE_TRUNC * _WIDE_TRUNC)
    std = torch.sqrt(v)
    z = (mean / std).clamp(-30.0, 30.0)
    far, density = beyond(mean, v), normal_pdf(z) / std
    share = torch.where(mean > 0, far, 1 - far)
    return _Below(share, mean * share - v * density, share / 2 + density / 12 - density * (z * z - 1) / v / 720)


@in_blocks
@in_float32
def trunc(mean: Tensor, variance: Tensor) -> Pair:
    """The whole part of x: floor above 0, ceil below."""
    at = torch.trunc(mean)
    offset = (mean < 0).to(mean.dtype)
    counted = _truncated(mean, variance, at, offset)
    part, below = _fraction(mean, variance, _WIDE_TRUNC), _below_zero(mean, variance)
    floor_mean = mean - part.mean
    # Cov[floor(x), 1{x < 0}]
    joint = (below.first - below.fraction) - floor_mean * below.share
    spread = variance + part.variance - 2 * variance * part.slope + below.share * (1 - below.share) + 2 * joint
    wide = (mean - at) - part.mean + below.share, spread
    shift, spread = _chosen(variance, _WIDE_TRUNC, (counted.shift, counted.variance), wide)
    return at + shift, spread


def _truncated(mean: Tensor, variance: Tensor, at: Tensor, offset: Tensor) -> _Counted:
    """Jumps at all whole numbers but 0: next to a mean below 0 as those of ceil."""
    up, down = (_count(mean, variance, at, side, _WIDE_TRUNC, True) for side in (0.0, 1.0))
    return _Counted(*[
        torch.where(offset > 0, b, a)
        for a, b in ((up.shift, down.shift), (up.square, down.square), (up.density, down.density))
    ])  # fmt: skip


@in_blocks
@in_float32
def signed_fraction(mean: Tensor, variance: Tensor) -> Pair:
    """x - trunc(x), of the sign of x."""
    at = torch.trunc(mean)
    counted = _truncated(mean, variance, at, (mean < 0).to(mean.dtype))
    narrow = variance.clamp(max=_WIDE_TRUNC * _WIDE_TRUNC)
    spread = (narrow * (1 - 2 * counted.density) + counted.variance).clamp(min=0)
    part, below = _fraction(mean, variance, _WIDE_TRUNC), _below_zero(mean, variance)
    average = part.mean - below.share
    wide = average - (mean - at), part.square - 2 * below.fraction + below.share - average * average
    shift, spread = _chosen(variance, _WIDE_TRUNC, (-counted.shift, spread), wide)
    return (mean - at) + shift, spread
