"""Sampling at the points of a grid.

With a certain grid it is a linear map of the picture, exact: the variance takes the squared weights. Where the grid is
uncertain (a spatial transformer's), it is exact for coordinates that are independent of each other and of the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.errors import InputError
from adfify.gaussian import places
from adfify.moments import Moments, concrete, mean_of
from adfify.nn.resampling import laid_out_like
from adfify.registry import Certain, OneOf, Uncertain, case, register

_MODES, _PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")

SOURCE = "the squared weights; at uncertain places moments of a truncated normal, Barr & Sherrill 1999"

_PLANE, _POINTS = Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2))
_UNCERTAIN_POINTS = Uncertain((1, 2, 1, 2))


@register(
    F.grid_sample, family="pooling", tolerance=0.01, source=SOURCE,
    only_where={"grid": {"mode": "bilinear", "padding_mode": OneOf("zeros", "border")}},
    cases=[
        case(_PLANE, _POINTS, align_corners=False),
        case(_PLANE, _POINTS, padding_mode="border", align_corners=True),
        case(_PLANE, _POINTS, padding_mode="reflection", align_corners=False),
        case(_PLANE, _POINTS, padding_mode="reflection", align_corners=True),
        case(_PLANE, _POINTS, "nearest", align_corners=False),
        case(_PLANE, _POINTS, "bicubic", align_corners=False),
        case(_PLANE, _POINTS, "bicubic", "border", align_corners=True),
        case(_PLANE, _POINTS, "bicubic", "reflection", align_corners=False),
        case(Uncertain((1, 1, 2, 3, 3)), Certain((1, 2, 1, 2, 3)), padding_mode="border", align_corners=False),
        case(_PLANE, _UNCERTAIN_POINTS, align_corners=False),
        case(Certain((1, 2, 4, 3)), _UNCERTAIN_POINTS, padding_mode="border", align_corners=True),
    ],
)  # fmt: skip
def grid_sample(
    input: Moments | Tensor, grid: Moments | Tensor, mode: str = "bilinear", padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Moments:  # fmt: skip
    mean = F.grid_sample(mean_of(input), mean_of(grid), mode, padding_mode, align_corners)
    if isinstance(grid, Moments):
        shift, variance = _at_uncertain(input, grid, padding_mode, bool(align_corners))
        mean, variance = mean + shift.reshape(mean.shape).to(mean.dtype), variance.reshape(mean.shape)
    else:
        assert isinstance(input, Moments)
        variance = _at_certain(input.variance, grid, mode, padding_mode, align_corners)
    return Moments(mean, laid_out_like(variance.to(mean.dtype), mean))


# Certain places


def _at_certain(
    variance: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool | None
) -> Tensor:  # fmt: skip
    if mode == "nearest":
        return F.grid_sample(variance, grid, mode, padding_mode, align_corners)
    sizes = variance.shape[2:]
    axes = []
    for size, along in zip(sizes, reversed(grid.unbind(-1)), strict=True):  # a grid has x, the last dimension, first
        at = _position(along, size, bool(align_corners))
        if mode == "bilinear":
            axes.append(_squared(*_two(_inside(at, size, padding_mode, bool(align_corners))), size))
        else:
            taps, weights = _four(at)
            axes.append(_squared(_inside(taps, size, padding_mode, bool(align_corners)), weights, size))
    return sum(_terms(variance, axes), torch.zeros_like(F.grid_sample(variance, grid, align_corners=False)))


def _terms(variance: Tensor, axes: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Of every choice of one element along each axis, its variance times what the output has of it."""
    flat = variance.flatten(2)
    for chosen in itertools.product(*[range(at.shape[-1]) for at, _ in axes]):
        index = torch.zeros_like(axes[0][0][..., 0])
        share = torch.ones_like(axes[0][1][..., 0])
        for (at, weight), tap, size in zip(axes, chosen, variance.shape[2:], strict=True):
            index, share = index * size + at[..., tap], share * weight[..., tap]
        there = flat.gather(2, index.flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1))
        yield share.unsqueeze(1) * there.reshape(*flat.shape[:2], *share.shape[1:])


def _squared(at: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The elements ``[..., taps]`` and what of their variances is in the output: weights of one element add first."""
    inside = (at >= 0) & (at <= size - 1)
    at, weight = at.clamp(0, size - 1).long(), torch.where(inside, weight, 0.0)
    same = at.unsqueeze(-1) == at.unsqueeze(-2)
    return at, weight * (same * weight.unsqueeze(-2)).sum(-1)


def _two(at: Tensor) -> tuple[Tensor, Tensor]:
    """The elements on either side, and their weights."""
    taps = at.floor().unsqueeze(-1) + torch.arange(2, dtype=at.dtype, device=at.device)
    return taps, 1 - (at.unsqueeze(-1) - taps).abs()


_SHARP = -0.75  # torch's choice of the parameter of cubic convolution (Keys, IEEE ASSP 29, 1981, equation 4)


def _four(at: Tensor) -> tuple[Tensor, Tensor]:
    """The four nearest elements, and their weights in cubic convolution."""
    taps = at.floor().unsqueeze(-1) + torch.arange(-1, 3, dtype=at.dtype, device=at.device)
    off = (at.unsqueeze(-1) - taps).abs()
    near = ((_SHARP + 2) * off - (_SHARP + 3)) * off * off + 1
    far = ((_SHARP * off - 5 * _SHARP) * off + 8 * _SHARP) * off - 4 * _SHARP
    return taps, torch.where(off <= 1, near, far)


def _position(grid: Tensor, size: int, align_corners: bool) -> Tensor:
    """From -1 to 1 to the elements' own count, from 0 to size - 1."""
    return (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2


def _inside(at: Tensor, size: int, padding_mode: str, align_corners: bool) -> Tensor:
    if padding_mode == "zeros":
        return at
    if padding_mode == "reflection":
        low = 0.0 if align_corners else -0.5
        span = max(size - 1 if align_corners else size, 1e-6)
        turned = (at - low).abs() % (2 * span)
        at = torch.minimum(turned, 2 * span - turned) + low
    return at.clamp(0, size - 1)


# Uncertain places

_AT_ONCE = 2**22
"""So many elements around places are looked at at a time."""


def _at_uncertain(
    input: Moments | Tensor, grid: Moments, padding_mode: str, align_corners: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What uncertainty adds to the mean, and the variance, ``[N, C, P]``, of a flat grid ``[N, .., 2]``, P places."""

    if grid.shape[-1] != 2:
        raise InputError(
            f"grid_sample of a volume of shape {tuple(input.shape)} with an uncertain grid has no rule; "
            "that of a picture, [N, C, H, W], has one. Give a certain grid."
        )

    def padded(x: Tensor) -> Tensor:
        pad = (1, 1, 1, 1)
        return F.pad(x.double(), pad) if padding_mode == "zeros" else x.double()

    picture = padded(mean_of(input))
    noise = padded(input.variance) if isinstance(input, Moments) else None
    means, variances = (part.double().flatten(1, -2).unbind(-1) for part in grid)
    look = concrete(grid.variance)
    axes = []
    for size, mean, variance in zip(picture.shape[2:], reversed(means), reversed(variances), strict=True):
        own = size - 2 * (padding_mode == "zeros")
        at = _position(mean, own, align_corners) + (padding_mode == "zeros")
        spread = variance * (((own - 1) if align_corners else own) / 2) ** 2
        axes.append(places.axis(at, spread, size, places.reach_of(spread) if look else None))
    shifts, spreads = [], []
    down, across = axes
    for y, x in _chunks(down, across, picture.shape[0] * picture.shape[1]) if look else [(down, across)]:
        shift, spread = places.read(picture, y, x)
        shifts.append(shift)
        spreads.append(spread if noise is None else spread + places.read_noise(noise, y, x))
    return torch.cat(shifts, -1), torch.cat(spreads, -1)


def _chunks(y: places.Axis, x: places.Axis, pictures: int) -> Iterator[tuple[places.Axis, places.Axis]]:
    count = y.at.shape[-2]
    size = max(1, _AT_ONCE // max(1, pictures * y.at.shape[-1] * (x.at.shape[-1] + 1)))
    for start in range(0, max(count, 1), size):
        yield y.part(start, start + size), x.part(start, start + size)


@register(
    torch.grid_sampler, family="pooling", tolerance=0.01, source=SOURCE,
    only_where={"grid": {"interpolation_mode": 0, "padding_mode": OneOf(0, 1)}},
    cases=[
        case(_PLANE, _POINTS, 0, 0, False),
        case(_PLANE, _POINTS, 2, 2, True),
        case(Certain((1, 2, 4, 3)), _UNCERTAIN_POINTS, 0, 1, False),
    ],
)  # fmt: skip
def aten_grid_sampler(
    input: Moments | Tensor, grid: Moments | Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Moments:
    """:func:`grid_sample` with its modes as numbers, as torch's C++ has them."""
    return grid_sample(input, grid, _MODES[interpolation_mode], _PADDINGS[padding_mode], align_corners)
