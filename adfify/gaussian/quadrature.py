"""Moments of any elementwise function of a Gaussian variable, by quadrature."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32, normal_pdf

Elementwise = Callable[[Tensor], Tensor]


@in_float32
def expect(f: Elementwise, mean: Tensor, variance: Tensor, kinks: Sequence[float] = ()) -> Pair:
    """E[f(x)] and Var[f(x)] of an elementwise f, called on plain tensors.

    A smooth f: 32 Gauss-Hermite nodes (A&S 25.4.46), exact to rounding while s is below a third of the
    distance over which f changes its form. An f with ``kinks``: 16 Gauss-Legendre nodes (A&S 25.4.29) between
    two kinks and beyond the outer ones; see Note [Nodes that crowd towards a kink].
    """
    if not kinks:
        return _integrate(f, mean, variance, _smooth_floor(mean), ())
    gap = functools.reduce(torch.minimum, [(mean - kink).abs() for kink in kinks])
    return _integrate(f, mean, variance, _RESOLUTION[mean.dtype] * gap, sorted(kinks))


# Note [Small variances by quadrature]
#   f(m + s z) - f(m) is all rounding once s is a few units in the last place of m or f(m). Below a floor s0
#   the integral is therefore taken at s0, and the correction and the variance are scaled by (s / s0)^2, as
#   both are linear in s^2 there. s0 is cbrt(eps), where the error of this, s0^2, is that of the rounding, eps
#   / s0. The same line makes variance 0 exact and its gradients right (f'' / 2 for the mean, f'^2 for the
#   variance) without any branch. s0 shrinks towards a kink, so that a kink out of the Gaussian's reach stays
#   out of it.
_RESOLUTION = {torch.float32: 2.0**-8, torch.float64: 2.0**-17}

# Note [Nodes that crowd towards a kink]
#   Beyond the outermost kink, out to 7 s, nodes are z = k + length (c t + (1 - c) t^2) with t Gauss-Legendre
#   and c = 1 / (1 + s / 2) (out to 2 s past a kink that is further, for what little lies there): evenly
#   spread over a narrow Gaussian, but for a wide one crowded where f bends, which is at the kink on a scale
#   of 1. The kinks are held within 3 s of the mean, else a segment with most of the mass would have too few
#   nodes. Sigmoids and soft ReLUs gain as much from it as functions with a kink: with 32 nodes and s = 10,
#   the variance of a sigmoid is off by 2e-5 (Gauss-Hermite: 20 %), for means up to 3 s from 0.
_WINDOW, _HELD = 7.0, 3.0
_HERMITE = [(float(z), float(w) / math.sqrt(2 * math.pi)) for z, w in zip(*hermegauss(32), strict=True)]
_LEGENDRE = [(float(t + 1) / 2, float(w) / 2) for t, w in zip(*leggauss(16), strict=True)]


def _smooth_floor(mean: Tensor) -> Tensor:
    return _RESOLUTION[mean.dtype] * torch.sqrt(1 + mean * mean / 16)


@dataclass(frozen=True)
class _Span:
    """Where nodes t in (0, 1) go: z = start + length (c t + (1 - c) t^2), c being ``evenness``."""

    start: Tensor
    length: Tensor
    evenness: Tensor

    def place(self, t: Tensor | float, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """A node in units of s from the mean, and its weight for the standard normal."""
        z = self.start + self.length * (self.evenness * (t - t * t) + t * t)
        density = self.length.abs() * (self.evenness * (1 - 2 * t) + 2 * t)
        return z, weight * density * normal_pdf(z)


def _spans(mean: Tensor, std: Tensor, breaks: Sequence[float]) -> Iterator[_Span]:
    points = [((point - mean) / std).clamp(-_HELD, _HELD) for point in breaks]
    first, last = (breaks[0] - mean) / std, (breaks[-1] - mean) / std
    ends = -(2 - first).clamp(_WINDOW, 2 * _WINDOW), (2 + last).clamp(_WINDOW, 2 * _WINDOW)
    crowded, even = 1 / (1 + 0.5 * std), torch.ones_like(std)
    yield _Span(points[0], ends[0] - points[0], crowded)
    yield _Span(points[-1], ends[1] - points[-1], crowded)
    for left, right in itertools.pairwise(points):
        yield _Span(left, right - left, even)


def _integrate(f: Elementwise, mean: Tensor, variance: Tensor, floor: Tensor, breaks: Sequence[float]) -> Pair:
    """Mean and variance about f(mean), summed node by node: the memory does not grow with their number."""
    least = floor.detach().square().clamp(min=1e-24)
    widened = torch.where(variance > least, variance, least)
    std, share = torch.sqrt(widened), variance / widened
    centre = f(mean)
    sums = torch.zeros_like(centre), torch.zeros_like(centre)
    if not breaks:
        for z, weight in _HERMITE:
            sums = _added(sums, weight, f(mean + std * z) - centre)
    for span in _spans(mean, std, breaks) if breaks else ():
        sums = _span_sums(f, mean, std, centre, span, sums)
    first, second = sums
    return centre + share * first, share * (second - first * first).clamp(min=0)


def _added(sums: Pair, weight: Tensor | float, deviation: Tensor) -> Pair:
    weighted = weight * deviation
    return sums[0] + weighted, torch.addcmul(sums[1], weighted, deviation)


def _span_sums(f: Elementwise, mean: Tensor, std: Tensor, centre: Tensor, span: _Span, sums: Pair) -> Pair:
    if not torch.compiler.is_exporting():
        for t, weight in _LEGENDRE:
            z, node_weight = span.place(t, weight)
            sums = _added(sums, node_weight, f(mean + std * z) - centre)
        return sums

    # Note [A loop in exported programs]
    # Unrolled, 32 nodes of a dozen operations for every activation make programs that take minutes to write and to
    # load. torch.export has a loop; its body may use only what is handed to it.
    def going(step: Tensor, *_: Tensor) -> Tensor:
        return step < len(_LEGENDRE)

    def node(step: Tensor, first: Tensor, second: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, mean, std, centre, start, length, evenness = given
        t, weight = table.index_select(0, step.reshape(1)).unbind(1)
        z, node_weight = _Span(start, length, evenness).place(t, weight)
        return step + 1, *_added((first, second), node_weight, f(mean + std * z) - centre)

    table = torch.tensor(_LEGENDRE, dtype=mean.dtype, device=mean.device)
    given = (table, mean, std, centre, span.start, span.length, span.evenness)
    step = torch.zeros((), dtype=torch.int64, device=mean.device)
    _, first, second = torch.ops.higher_order.while_loop(going, node, (step, *sums), given)
    return first, second


def soft(f: Elementwise, mean: Tensor, variance: Tensor) -> Pair:
    """Moments of a smooth f that bends once, at 0: sigmoids and soft ReLUs."""
    return _integrate(f, mean, variance, _smooth_floor(mean), (0.0,))
