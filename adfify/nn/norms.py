"""Norms of vectors, and distances by them: the sum of magnitudes, the Euclidean norm, the largest magnitude."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify import gaussian
from adfify.gaussian import statistics
from adfify.gaussian.extremes import largest_magnitude
from adfify.moments import Moments, lift
from adfify.nn.arithmetic import sub
from adfify.nn.layer_norm import added, dimensions
from adfify.nn.statistics import ROOT
from adfify.registry import Certain, OneOf, Uncertain, case, register

SOURCE = f"{ROOT}; folded normals (Leone, Nelson & Nottingham 1961), their sum or largest"

norms = partial(register, family="pooling", source=SOURCE, tolerance=0.05)
distances = partial(register, family="arithmetic", source=SOURCE, tolerance=0.05)

KNOWN = OneOf(2, 1, math.inf)
FROBENIUS = OneOf("fro", 2, 1, math.inf)
_ONE_AXIS = [case(Uncertain((3, 9)), p, 1) for p in (1, math.inf)]
_CASES = [
    case(Uncertain((3, 9)), dim=1),
    case(Uncertain((2, 3, 5)), 2, (1, 2), True),
    case(Uncertain((3, 4))),
    *_ONE_AXIS,
    case(Uncertain((2, 3, 2)), math.inf, (0, 2), True),
]


def of_order(x: Moments, p: float, certain: Tensor, axes: tuple[int, ...], keepdim: bool) -> Moments:
    """``certain`` is the original of the means, its dimensions kept."""
    if p == 1:
        magnitude, spread = gaussian.absolute(x.mean, x.variance)
        shift, variance = (part.sum(axes, keepdim=True) for part in (magnitude - x.mean.abs(), spread))
    elif p == 2:
        shift, variance = statistics.norm_shift(x.mean, x.variance, certain, axes)
    else:
        largest, variance = largest_magnitude(x.mean, x.variance, axes)
        shift = largest - torch.amax(x.mean.abs(), axes, keepdim=True)
    if not keepdim:
        certain, shift, variance = (part.squeeze(axes) for part in (certain, shift, variance))
    return added(certain, shift, variance)


@norms(torch.linalg.vector_norm, torch.ops.aten.linalg_vector_norm.default, only={"ord": KNOWN}, cases=_CASES)
def vector_norm(
    x: Moments, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Moments:
    values = x if dtype is None else x.to(dtype)
    axes = dimensions(dim, values.mean)
    return of_order(values, ord, torch.linalg.vector_norm(values.mean, ord, axes, keepdim=True), axes, keepdim)


@norms(torch.norm, "norm", only={"p": FROBENIUS}, cases=_CASES)
def norm(
    input: Moments, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Moments:  # fmt: skip
    return vector_norm(input, 2 if p == "fro" else p, dim, keepdim, dtype=dtype)


@norms(
    torch.linalg.norm, only={"ord": None},
    cases=[
        case(Uncertain((3, 9)), dim=1),
        case(Uncertain((2, 3, 5)), dim=(1, 2), keepdim=True),
        case(Uncertain((3, 4))),
    ],
)  # fmt: skip
def linalg_norm(
    input: Moments, ord: None = None, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Moments:
    return vector_norm(input, 2, dim, keepdim, dtype=dtype)


_MATRIX = [case(Uncertain((2, 3, 5))), case(Uncertain((3, 5)), "fro", (0, 1), True)]


@norms(torch.linalg.matrix_norm, only={"ord": "fro"}, cases=_MATRIX)
def matrix_norm(
    input: Moments, ord: str = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Moments:
    return vector_norm(input, 2, dim, keepdim, dtype=dtype)


# Distances


def _plain(x: Moments | Tensor) -> Tensor:
    return x.mean if isinstance(x, Moments) else x


_PAIR = (Uncertain((3, 4)), Uncertain((3, 4)))
_DISTANCES = [case(*_PAIR), case(Uncertain((3, 4)), Certain((3, 4)), 1), case(*_PAIR, math.inf)]


@distances(torch.dist, "dist", only={"p": KNOWN}, cases=_DISTANCES)
def dist(input: Moments | Tensor, other: Moments | Tensor, p: float = 2) -> Moments:
    gap = sub(input, other)
    axes = tuple(range(gap.mean.dim()))
    certain = torch.dist(_plain(input), _plain(other), p).reshape([1] * len(axes))
    return of_order(gap, p, certain, axes, False)


@distances(
    torch.cdist, only={"p": KNOWN},
    cases=[
        case(Uncertain((3, 4)), Uncertain((2, 4))),
        case(Uncertain((2, 3, 4)), Certain((2, 4)), 1),
        case(Uncertain((3, 4)), Uncertain((2, 4)), math.inf),
    ],
)  # fmt: skip
def cdist(
    x1: Moments | Tensor, x2: Moments | Tensor, p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Moments:  # fmt: skip
    a, b = lift(x1), lift(x2)
    certain = torch.cdist(a.mean, b.mean, p, compute_mode)
    gap = Moments(a.mean.unsqueeze(-2) - b.mean.unsqueeze(-3), a.variance.unsqueeze(-2) + b.variance.unsqueeze(-3))
    result = of_order(gap, p, certain.unsqueeze(-1), (-1,), False)
    if x1 is not x2:
        return result
    itself = torch.eye(certain.shape[-1], dtype=torch.bool, device=certain.device)
    return Moments(torch.where(itself, certain, result.mean), result.variance.masked_fill(itself, 0.0))


@distances(F.pdist, only={"p": KNOWN}, cases=[case(Uncertain((4, 5))), case(Uncertain((3, 5)), 1)])
def pdist(input: Moments, p: float = 2.0) -> Moments:
    certain = F.pdist(input.mean, p)
    count = input.mean.shape[0]
    i, j = torch.triu_indices(count, count, 1, device=certain.device)
    gap = Moments(input.mean[i] - input.mean[j], input.variance[i] + input.variance[j])
    return of_order(gap, p, certain.unsqueeze(-1), (-1,), False)
