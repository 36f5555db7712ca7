"""Sampling at the points of a certain grid: a linear map, so the variance takes the squared weights of the corners."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.errors import InputError
from adfify.moments import Moments
from adfify.nn.resampling import laid_out_like, resized
from adfify.registry import Certain, Uncertain, case

_MODES, _PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


@resized(
    F.grid_sample,
    cases=[
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), align_corners=False),
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), padding_mode="border", align_corners=True),
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), padding_mode="reflection", align_corners=False),
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), padding_mode="reflection", align_corners=True),
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), "nearest", align_corners=False),
        case(Uncertain((1, 1, 2, 3, 3)), Certain((1, 2, 1, 2, 3)), padding_mode="border", align_corners=False),
    ],
)
def grid_sample(
    input: Moments, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Moments:
    mean = F.grid_sample(input.mean, grid, mode, padding_mode, align_corners)
    if mode == "nearest":
        return Moments(mean, F.grid_sample(input.variance, grid, mode, padding_mode, align_corners))
    if mode == "bicubic":
        raise InputError("grid_sample(mode='bicubic') has no rule; 'bilinear' and 'nearest' have one.")
    sizes = input.mean.new_tensor(input.mean.shape[:1:-1])  # a grid has x first, the last dimension
    at = _inside(_position(grid, sizes, bool(align_corners)), sizes, padding_mode, bool(align_corners))
    low = at.floor()
    variance = torch.zeros_like(mean)
    for corner in itertools.product((0, 1), repeat=grid.shape[-1]):
        place = low + at.new_tensor(corner)
        weight = (1 - (at - place).abs()).prod(-1).square().unsqueeze(1)
        # A corner is a whole position, so that rounding to the nearest picks it; beyond the border it weighs 0.
        there = F.grid_sample(input.variance, (2 * place + 1) / sizes - 1, "nearest", "zeros", align_corners=False)
        variance = variance + weight * there
    return Moments(mean, laid_out_like(variance, mean))


def _position(grid: Tensor, sizes: Tensor, align_corners: bool) -> Tensor:
    """From -1 to 1 to the elements' own count, from 0 to size - 1."""
    return (grid + 1) / 2 * (sizes - 1) if align_corners else ((grid + 1) * sizes - 1) / 2


def _inside(at: Tensor, sizes: Tensor, padding_mode: str, align_corners: bool) -> Tensor:
    if padding_mode == "zeros":
        return at
    if padding_mode == "reflection":
        low = 0.0 if align_corners else -0.5
        span = (sizes - 1 if align_corners else sizes).clamp(min=1e-6)
        turned = (at - low).abs() % (2 * span)
        at = torch.minimum(turned, 2 * span - turned) + low
    return torch.minimum(at.clamp(min=0), sizes - 1)


@resized(
    torch.grid_sampler,
    cases=[
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), 0, 0, False),
        case(Uncertain((1, 2, 4, 3)), Certain((1, 3, 2, 2)), 0, 2, True),
    ],
)
def aten_grid_sampler(
    input: Moments, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Moments:
    """:func:`grid_sample` with its modes as numbers, as torch's C++ has them."""
    return grid_sample(input, grid, _MODES[interpolation_mode], _PADDINGS[padding_mode], align_corners)
