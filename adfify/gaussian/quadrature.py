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

from adfify.gaussian.blocks import readable
from adfify.gaussian.closures import tensors_of, with_tensors
from adfify.gaussian.narrow import narrow, width_of
from adfify.gaussian.normal import Pair, in_float32

Elementwise = Callable[[Tensor], Tensor]


@in_float32
def expect(f: Elementwise, mean: Tensor, variance: Tensor, kinks: Sequence[float] = ()) -> Pair:
    """E[f(x)] and Var[f(x)] of an elementwise f, called on plain tensors.

    A smooth f: 32 Gauss-Hermite nodes (A&S 25.4.46), exact to rounding while s is below a third of the
    distance over which f changes its form. An f with ``kinks``: 16 Gauss-Legendre nodes (A&S 25.4.29) between
    two kinks and beyond the outer ones; see Note [Nodes that crowd towards a kink].
    """
    if not kinks:
        return integrate(f, mean, variance, width_of(mean), ())
    gap = functools.reduce(torch.minimum, [(mean - kink).abs() for kink in kinks])
    return integrate(f, mean, variance, width_of(mean, gap), sorted(kinks))


# Note [Nodes that crowd towards a kink]
#   Beyond the outermost kink, out to 7 s, nodes are z = k + length (c t + (1 - c) t^2) with t Gauss-Legendre
#   and c = 1 / (1 + s / 2) (out to 2 s past a kink that is further, for what little lies there): evenly
#   spread over a narrow Gaussian, but for a wide one crowded where f bends, which is at the kink on a scale
#   of 1. The kinks are held within 3 s of the mean, else a segment with most of the mass would have too few
#   nodes. Sigmoids and soft ReLUs gain as much from it as functions with a kink: with 32 nodes and s = 10,
#   the variance of a sigmoid is off by 2e-5 (Gauss-Hermite: 20 %), for means up to 3 s from 0.
_WINDOW, _HELD = 7.0, 3.0
_HERMITE = {
    n: [(float(z), float(w) / math.sqrt(2 * math.pi)) for z, w in zip(*hermegauss(n), strict=True)]
    for n in (6, 10, 16, 24, 32)
}
_LEGENDRE = [(float(t + 1) / 2, float(w) / 2) for t, w in zip(*leggauss(16), strict=True)]


@dataclass(frozen=True)
class _Span:
    """Where nodes t in (0, 1) go: z = start + length t^2 + bent (t - t^2), ``bent`` being c times ``length``."""

    start: Tensor
    length: Tensor
    bent: Tensor

    def place(self, t: Tensor | float, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """A node in units of s from the mean, and its weight for the standard normal (negative where length is)."""
        z = _plus(_plus(self.start, t * t, self.length), t - t * t, self.bent)
        weight = weight * (1 / math.sqrt(2 * math.pi))
        density = _plus(self.length * (2 * t * weight), weight * (1 - 2 * t), self.bent)
        return z, density * torch.exp2(z * z * (-0.5 / math.log(2)))


def _plus(x: Tensor, factor: Tensor | float, y: Tensor) -> Tensor:
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _spans(mean: Tensor, std: Tensor, breaks: Sequence[float]) -> Iterator[tuple[_Span, int]]:
    points = [((point - mean) / std).clamp(-_HELD, _HELD) for point in breaks]
    first, last = (breaks[0] - mean) / std, (breaks[-1] - mean) / std
    ends = -(2 - first).clamp(_WINDOW, 2 * _WINDOW), (2 + last).clamp(_WINDOW, 2 * _WINDOW)
    crowded = 1 / (1 + 0.5 * std)
    for start, end, sign in ((points[0], ends[0], -1), (points[-1], ends[1], 1)):
        yield _Span(start, end - start, (end - start) * crowded), sign
    for left, right in itertools.pairwise(points):
        yield _Span(left, right - left, right - left), 1


def integrate(f: Elementwise, mean: Tensor, variance: Tensor, width: Tensor, breaks: Sequence[float]) -> Pair:
    """Mean and variance about f(mean), summed node by node: the memory does not grow with their number."""
    nodes = None if breaks else 32
    return _either(f, mean, variance, width, lambda std, centre: _sums(f, mean, std, centre, breaks, nodes))


def _either(
    f: Elementwise, mean: Tensor, variance: Tensor, width: Tensor, sums: Callable[[Tensor, Tensor], Pair]
) -> Pair:
    """By the Hermite expansion below a width, see Note [Small variances by quadrature], else by an integral.

    Args:
        f, mean, variance: of x.
        width: the std up to which the expansion does.
        sums: gives E[d] and E[d^2] of the deviation d from the centre, for a std and that centre.
    """
    centre, square = f(mean), width * width
    if readable(variance, centre) and not bool(variance.any()):  # as it comes out below, without an integral
        return centre + variance, variance * torch.zeros_like(centre)
    chosen = variance < square
    known = readable(variance, centre)
    if known and bool(chosen.all()):
        shift, spread = narrow(f, mean, variance, centre, width)
        return centre + shift, spread
    first, second = sums(torch.sqrt(torch.maximum(variance, square)), centre)
    # An f that overflows has an infinite variance, and no mean where it does so on both sides.
    unbounded = second.isinf()
    first = torch.where(unbounded, torch.where(first.isnan(), 0.0, first), first)
    spread = torch.where(unbounded, second, torch.addcmul(second, first, first, value=-1).clamp(min=0))
    if not known or bool(chosen.any()):
        shift, small = narrow(f, mean, variance, centre, width)
        first, spread = torch.where(chosen, shift, first), torch.where(chosen, small, spread)
    return centre + first, spread


def _sums(
    f: Elementwise, mean: Tensor, std: Tensor, centre: Tensor, breaks: Sequence[float], hermite: int | None = None
) -> Pair:
    """By so many Gauss-Hermite nodes, or where that is None by those between the breaks."""
    first, second = torch.zeros_like(centre), torch.zeros_like(centre)
    if hermite is None:
        for span, sign in _spans(mean, std, breaks):
            first, second = _span_sums(f, mean, std, centre, span, sign, (first, second))
        return first, second
    for z, weight in _HERMITE[hermite]:
        deviation = f(torch.add(mean, std, alpha=z)) - centre
        first = torch.add(first, deviation, alpha=weight)
        second = torch.addcmul(second, deviation, deviation, value=weight)
    return first, second


def _added(sums: Pair, weight: Tensor | float, deviation: Tensor) -> Pair:
    weighted = weight * deviation
    return sums[0] + weighted, torch.addcmul(sums[1], weighted, deviation)


def _span_sums(f: Elementwise, mean: Tensor, std: Tensor, centre: Tensor, span: _Span, sign: int, sums: Pair) -> Pair:
    if not torch.compiler.is_exporting():
        for t, weight in _LEGENDRE:
            z, node_weight = span.place(t, sign * weight)
            sums = _added(sums, node_weight, f(mean + std * z) - centre)
        return sums

    # Note [A loop in exported programs]
    # Unrolled, 32 nodes of a dozen operations for every activation make programs that take minutes to write and to
    # load. torch.export has a loop; its body may use only what is handed to it.
    def going(step: Tensor, *_: Tensor) -> Tensor:
        return step < len(_LEGENDRE)

    def node(step: Tensor, first: Tensor, second: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, mean, std, centre, start, length, bent, *seen = given
        t, weight = table.index_select(0, step.reshape(1)).unbind(1)
        z, node_weight = _Span(start, length, bent).place(t, sign * weight)
        return step + 1, *_added((first, second), node_weight, with_tensors(f, seen)(mean + std * z) - centre)

    table = torch.tensor(_LEGENDRE, dtype=mean.dtype, device=mean.device)
    given = (table, mean, std, centre, span.start, span.length, span.bent, *tensors_of(f))
    step = torch.zeros((), dtype=torch.int64, device=mean.device)
    _, first, second = torch.ops.higher_order.while_loop(going, node, (step, *sums), given)
    return first, second


# Note [Fewer nodes for a narrow Gaussian]
#   Where s is small against the length over which f changes its form, few Gauss-Hermite nodes are as good as 32 crowded
#   ones, and cost as much less. With s in units of that length, the ``bend`` of the rule, these bounds leave less than
#   2e-6 of the variance, and of the std for the mean, for all the rules here: about the rounding of float32. Each
#   element goes by its own s, so that it does not depend on its neighbours. It takes numbers that can be looked at:
#   compiled and exported programs, and the pass that records gradients, have all nodes.
_NARROW = {6: 0.2, 10: 0.5, 16: 0.85, 24: 1.2}  # nodes: s / bend up to which they do


def soft(f: Elementwise, mean: Tensor, variance: Tensor, bend: float = 0.0) -> Pair:
    """Moments of a smooth f that bends once, at 0: sigmoids and soft ReLUs.

    Args:
        f: the function, called on plain tensors.
        mean, variance: of x.
        bend: over what length f changes its form, if known: see Note [Fewer nodes for a narrow Gaussian].
    """
    if bend and mean.dtype == torch.float32 and readable(mean, variance):
        sums = functools.partial(_sums_by_width, f, mean, bend=bend)
        return _either(f, mean, variance, width_of(mean), sums)
    return integrate(f, mean, variance, width_of(mean), (0.0,))


def _sums_by_width(f: Elementwise, mean: Tensor, std: Tensor, centre: Tensor, bend: float) -> Pair:
    bounds = [0.0, *(bound * bend for bound in _NARROW.values()), math.inf]
    classes = list(zip(itertools.pairwise(bounds), (*_NARROW, None), strict=True))
    least, most = float(std.min()), float(std.max())
    present = [(low, high, nodes) for (low, high), nodes in classes if most > low and least <= high]
    if len(present) <= 1:  # none where there are NaN
        return _sums(f, mean, std, centre, (0.0,), present[0][2] if present else None)
    shape = torch.broadcast_shapes(mean.shape, std.shape)  # type: ignore[no-untyped-call]
    laid_out = centre.expand(shape)  # in memory as the function lays it out
    mean, std, flat = (x.expand(shape).reshape(-1) for x in (mean, std, centre))
    sums = torch.empty_like(flat), torch.empty_like(flat)
    for low, high, nodes in present:
        chosen = ((std > low) & (std <= high)).nonzero().squeeze(1)
        part = _sums(f, mean[chosen], std[chosen], flat[chosen], (0.0,), nodes)
        for whole, x in zip(sums, part, strict=True):
            whole.scatter_(0, chosen, x)
    first, second = (torch.empty_like(laid_out).copy_(x.view(shape)) for x in sums)
    return first, second
