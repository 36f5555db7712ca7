"""Pictures read at uncertain places, by linear interpolation: exact for independent Gaussian coordinates.

Note [Reading at an uncertain place]
    Between two elements k and k + 1 an interpolated picture is a straight line in the coordinate g, so that its moments
    are sums over the intervals of E[1; g in it], E[g - m; ..] and E[(g - m)^2; ..], the moments of a truncated normal
    (A&S 26.2.1; Barr & Sherrill, Am. Stat. 53, 1999). Lines are taken through the value at the mean place m: what is
    left is a difference, 0 on the interval of m itself when the noise is small, and nothing cancels. Along both axes:
        Var[h] = E[Var[h | y]] + Var[E[h | y]] (law of total variance),
    in which h given y is a sum of two rows at most. Beyond its first and its last element a picture goes on, constant:
    that is padding with the border, and after one row of zeros all around, padding with zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adfify.gaussian.normal import Pair, normal_cdf, normal_pdf

STDS = 7.5
"""Elements further from the mean place than so many standard deviations are not looked at: their mass is 6e-14."""

_END = 39.0  # both tails of the normal distribution are 0 in float64


@dataclass(frozen=True)
class Axis:
    """Gaussian places along one axis of a picture, and the elements within their reach.

    Attributes:
        at: [..., n], whole numbers, the elements.
        distance: [..., n], the mean place less the element.
        mass, first, second: [..., n + 1], E[1], E[g - m], E[(g - m)^2] before the first element, between each and the
            next, and beyond the last.
    """

    at: Tensor
    distance: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor

    def part(self, start: int, end: int) -> Axis:
        """Some of the places, which the last but one dimension counts."""
        parts = (self.at, self.distance, self.mass, self.first, self.second)
        return Axis(*[x[..., start:end, :] for x in parts])

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """E[w_k] and E[w_k^2], [..., n], and E[w_k w_(k+1)], [..., n - 1]: w_k is what element k is multiplied by."""
        inside = slice(1, -1)
        mass, first, second = self.mass[..., inside], self.first[..., inside], self.second[..., inside]
        past = self.distance[..., :-1]
        rise = first + past * mass
        rise_squared = second + 2 * past * first + past.square() * mass
        mixed = rise - rise_squared
        ends = self.mass[..., :1], self.mass[..., -1:]
        mean = torch.cat([ends[0], rise], -1) + torch.cat([mass - rise, ends[1]], -1)
        square = torch.cat([ends[0], rise_squared], -1) + torch.cat([mass - rise - mixed, ends[1]], -1)
        return mean, square, mixed


def axis(mean: Tensor, variance: Tensor | None, size: int, reach: int | None) -> Axis:
    """Places ``[...]``, float64, in elements, the first of ``size`` elements at 0.

    Args:
        mean, variance: of the places; no variance for known ones.
        size: how many elements there are.
        reach: how many elements on either side of the mean are looked at; None for all that there are.
    """
    count = size if reach is None else min(2 * reach + 2, size)
    start = torch.zeros_like(mean) if reach is None else (mean.detach().floor() - reach).clamp(0, size - count)
    at = start.unsqueeze(-1) + torch.arange(count, dtype=mean.dtype, device=mean.device)
    distance = mean.unsqueeze(-1) - at
    spread = torch.zeros_like(distance[..., :1]) if variance is None else variance.unsqueeze(-1)
    known = spread <= 0
    std = torch.where(known, 1.0, spread).sqrt()
    end = torch.where(distance >= 0, -_END, _END)
    z = torch.where(known, end, (-distance / std).clamp(-_END, _END))
    low, high = torch.zeros_like(z[..., :1]), torch.ones_like(z[..., :1])
    density = normal_pdf(z)

    def between(edges: Tensor, last: Tensor) -> Tensor:
        return torch.cat([low, edges, last], -1).diff()

    mass = between(normal_cdf(z), high)
    first = -between(density, low) * torch.where(known, 0.0, std)
    second = (mass - between(z * density, low)) * spread
    return Axis(at, distance, mass, first, second)


def reach_of(variance: Tensor) -> int:
    """How many elements away a place of any of these variances may be, for all that matters."""
    largest = float(variance.detach().max()) if variance.numel() else 0.0
    return math.ceil(STDS * math.sqrt(largest))


@dataclass(frozen=True)
class _Lines:
    """Values at the elements of an axis, as a line on each interval: base + offset + slope (g - m)."""

    base: Tensor
    offset: Tensor
    slope: Tensor
    axis: Axis

    def mean(self) -> Tensor:
        """E of what is added to the base."""
        return (self.offset * self.axis.mass + self.slope * self.axis.first).sum(-1)

    def product(self, other: _Lines) -> Tensor:
        """E of the product of what is added to both bases."""
        mixed = self.offset * other.slope + self.slope * other.offset
        total = self.offset * other.offset * self.axis.mass + mixed * self.axis.first
        return (total + self.slope * other.slope * self.axis.second).sum(-1)

    def rows(self, start: int, end: int | None) -> _Lines:
        """Those of some rows, which the last dimension of the base counts."""
        chosen = slice(start, end)
        return _Lines(self.base[..., chosen], self.offset[..., chosen, :], self.slope[..., chosen, :], self.axis)


def _lines(values: Tensor, along: Axis) -> _Lines:
    """Values [..., n] at the elements of an axis whose shape broadcasts to theirs."""
    none = torch.zeros_like(values[..., :1])
    slope = torch.cat([none, values.diff(), none], -1)
    past = torch.cat([torch.zeros_like(along.distance[..., :1]), along.distance], -1)
    line = torch.cat([values[..., :1], values], -1) + slope * past
    home = (along.distance >= 0).sum(-1, keepdim=True).expand(*line.shape[:-1], 1)
    base = line.gather(-1, home)
    return _Lines(base.squeeze(-1), line - base, slope, along)


def window(picture: Tensor, y: Axis, x: Axis) -> Tensor:
    """``[N, C, P, n, n]``: of a picture ``[N, C, H, W]`` the elements around P places ``[N, P]``."""
    places = (y.at.unsqueeze(-1) * picture.shape[-1] + x.at.unsqueeze(-2)).long()
    index = places.flatten(1).unsqueeze(1).expand(-1, picture.shape[1], -1)
    return picture.flatten(2).gather(2, index).reshape(*picture.shape[:2], *places.shape[1:])


def read(picture: Tensor, y: Axis, x: Axis) -> Pair:
    """A known picture at uncertain places: see Note [Reading at an uncertain place].

    Args:
        picture: ``[N, C, H, W]``, float64.
        y, x: of shape ``[N, P]``.

    Returns:
        What uncertainty adds to the value at the mean places, and the variance, ``[N, C, P]``.
    """
    across = _lines(window(picture, y, x), _over(x, (1, -2)))
    drift = across.mean()
    own = across.product(across) - drift.square()
    next_to = across.rows(0, -1).product(across.rows(1, None)) - drift[..., :-1] * drift[..., 1:]
    y = _over(y, (1,))
    _, square, mixed = y.weights()
    of_rows = (square * own).sum(-1) + 2 * (mixed * next_to).sum(-1)
    down = _lines(across.base + drift, y)
    shift = down.mean()
    variance = of_rows + down.product(down) - shift.square()
    return _lines(drift, y).base + shift, variance.clamp(min=0)


def read_noise(variance: Tensor, y: Axis, x: Axis) -> Tensor:
    """``[N, C, P]``: what the variance ``[N, C, H, W]`` of a picture's independent elements adds at such places."""
    return torch.einsum("npi,npj,ncpij->ncp", y.weights()[1], x.weights()[1], window(variance, y, x))


def _over(along: Axis, dims: tuple[int, ...]) -> Axis:
    """With dimensions of size 1 put in, so that it broadcasts to channels, and to rows."""
    parts = [along.at, along.distance, along.mass, along.first, along.second]
    for dim in dims:
        parts = [part.unsqueeze(dim) for part in parts]
    return Axis(*parts)
