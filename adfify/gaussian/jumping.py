"""Moments of an elementwise function that jumps, where its jumps are known or can be looked for.

Note [Jumps are edges]
    No quadrature sees a jump between two of its nodes. So each jump, like each kink, is an edge between two segments,
    of 8 Gauss-Legendre nodes each (A&S 25.4.29), over 8 std to both sides; where the Gaussian is wide, nodes crowd
    towards the edges. All is done in float64.

Note [Close to a jump]
    Where s is a few units in the last place of x, x + s z says no longer on which side of the jump t it lies. There the
    nodes are moved away from t by a factor, and what the function changes by from its limit at t is divided by it: on
    such a scale it is linear on each side. Out of reach of all jumps the same is done about the mean.

Note [Many jumps]
    A function of floor(u), u = a x + b, jumps at every whole u. From 2 jumps a std on, u modulo 1 is uniform whatever
    else is known of x, up to exp(-2 pi^2 s^2) (see steps.py): the nodes' u are shifted to 16 places modulo 1 each,
    which widens x by 1 / (12 a^2), and so x is taken as that much narrower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from adfify.gaussian.normal import Pair

Function = Callable[[Tensor], Tensor]
"""Of nodes ``[N, *shape]``."""

_FIXED = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
_NODES = [(float(t + 1) / 2, float(w) / 2) for t, w in zip(*leggauss(8), strict=True)]
_STRETCH = 2.0**-20
_PLACES = 16
MANY = 2.0
"""Std in units of the jumps' distance from which there are too many to split at."""


def expect(f: Function, mean: Tensor, variance: Tensor, jumps: Tensor, kinks: tuple[float, ...]) -> Pair:
    """E[f(x)] - f(mean), and Var[f(x)].

    Args:
        f: the function, on float64 nodes.
        mean, variance: of x, float64; a variance of 0 has to be put right by the caller.
        jumps: where f jumps or bends, ``[K, *shape]``; those that are not there, infinite.
        kinks: where it may bend, likewise.
    """
    std = _root(variance)
    # What is infinite has no derivative that could be multiplied by 0.
    jumps = torch.where(jumps.isfinite(), jumps, mean.detach() + 32 * std.detach())
    z, weight = _nodes(mean, std, jumps, kinks)
    return _moments(_values(f, mean, std, jumps, z), weight, f(mean.unsqueeze(0))[0])


def expect_many(
    f: Function, mean: Tensor, variance: Tensor, slope: Tensor, offset: Tensor, kinks: tuple[float, ...]
) -> Pair:
    """The same, by Note [Many jumps], of an f that jumps wherever u = slope x + offset is whole."""
    slope = torch.where(slope == 0, 1.0, slope)
    std = _root((variance - 1 / (12 * slope * slope)).clamp(min=0) + 1e-300)
    z, weight = _nodes(mean, std, mean.new_empty((0, *mean.shape)), kinks)
    x = mean + std * z
    phase = slope * x + offset
    phase = phase - torch.floor(phase)
    values = []
    for place in range(_PLACES):
        shift = (place + 0.5) / _PLACES - phase
        values.append(f(x + (shift - torch.round(shift)) / slope))
    return _moments(torch.cat(values), torch.cat([weight / _PLACES] * _PLACES), f(mean.unsqueeze(0))[0])


def _root(variance: Tensor) -> Tensor:
    return torch.sqrt(variance.clamp(min=1e-200))


def _moments(values: Tensor, weight: Tensor, centre: Tensor) -> Pair:
    deviation = values - centre
    weight = weight / weight.sum(0)
    first = (weight * deviation).sum(0)
    return first, (weight * (deviation - first).square()).sum(0)


def _nodes(mean: Tensor, std: Tensor, jumps: Tensor, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Nodes in units of std from the mean, and their weights."""
    ends = _FIXED[-1]
    at = torch.cat([jumps, *[torch.full_like(mean, kink).unsqueeze(0) for kink in kinks]])
    fixed = [torch.full_like(mean, z).unsqueeze(0) for z in _FIXED]
    edges = torch.cat([*fixed, ((at - mean) / std).clamp(-ends, ends)]).sort(0).values
    left, length = edges[:-1], edges[1:] - edges[:-1]
    even = 1 / (1 + 0.5 * std)
    z, weight = [], []
    for t, w in _NODES:
        z.append(left + length * (even * t + (1 - even) * (3 * t * t - 2 * t**3)))
        weight.append(length * (even + (1 - even) * (6 * t - 6 * t * t)) * w)
    nodes = torch.cat(z)
    return nodes, torch.cat(weight) * torch.exp(-0.5 * nodes * nodes) * (1 / math.sqrt(2 * math.pi))


def _values(f: Function, mean: Tensor, std: Tensor, jumps: Tensor, z: Tensor) -> Tensor:
    """See Note [Close to a jump]."""
    if jumps.shape[0] == 0:
        jumps = (mean + 32 * std).detach().unsqueeze(0)
    distance = (jumps - mean).abs().amin(0)
    nearest = torch.gather(jumps, 0, (jumps - mean).abs().argmin(0, keepdim=True))[0]
    near = distance <= 9 * std
    anchor = torch.where(near, nearest, mean)
    away = 2.0**-44 * anchor.abs() + 1e-150
    limits = f(torch.stack([anchor - torch.where(near, away, 0.0), anchor + torch.where(near, away, 0.0)]))
    scale = anchor.abs() + limits.detach().abs().amax(0).clamp(max=256.0).nan_to_num(nan=0.0)
    least = _STRETCH * scale
    least = torch.where(near, least, torch.minimum(least, distance / 9))
    factor = (least / std).clamp(min=1.0).detach()
    step = (mean - anchor) + std * z
    limit = torch.where(step > 0, limits[1], limits[0])
    return torch.where(factor > 1, limit + (f(anchor + factor * step) - limit) / factor, f(mean + std * z))


# Looking for jumps

_LIKELY = tuple(sign * place for place in (0.01, 0.1, 0.3, 0.7, 1.5, 3.0, 6.0, 12.0) for sign in (-1, 1))
"""Places between which a wide Gaussian is looked at as well: networks compare with numbers on a scale of 1."""


@dataclass(frozen=True)
class Search:
    """How jumps are looked for: between so many points, and how many are taken."""

    points: int = 32
    most: int = 4
    halvings: int = 60


def crossings(g: Function, mean: Tensor, variance: Tensor, search: Search = Search()) -> Tensor:
    """Where g changes its sign within 8 std of the mean: ``[most, *shape]``, infinite where there is no more."""
    with torch.no_grad():
        std = torch.maximum(_root(variance), 2.0**-30 * (1 + mean.abs()))
        z = torch.linspace(-8.1, 8.1, search.points, dtype=mean.dtype, device=mean.device)
        x = mean + std * z.reshape(-1, *[1] * mean.dim())
        likely = torch.tensor(_LIKELY, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * mean.dim())
        x = torch.cat([x, torch.minimum(torch.maximum(likely, x[:1]), x[-1:])]).sort(0).values
        above = g(x) > 0
        changes = above[1:] != above[:-1]
        # The nearest to the mean first.
        order = torch.where(changes, (0.5 * (x[1:] + x[:-1]) - mean).abs(), math.inf)
        found, index = order.topk(search.most, 0, largest=False)
        low, high = torch.gather(x, 0, index), torch.gather(x, 0, index + 1)
        above_low = torch.gather(above, 0, index)
        for _ in range(search.halvings):
            middle = 0.5 * (low + high)
            same = (g(middle) > 0) == above_low
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return torch.where(found.isfinite(), 0.5 * (low + high), math.inf)
