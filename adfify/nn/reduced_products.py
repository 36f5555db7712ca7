"""Products of all elements along dimensions, and of those up to each: exact for independent elements."""

from __future__ import annotations

from functools import partial

import torch

from adfify import gaussian
from adfify.moments import Moments
from adfify.registry import Uncertain, case, register

SOURCE = "Goodman 1960, equation 2, one factor after the other"

# Exact, but of a higher degree than `exact` promises outside the elementwise family.
products = partial(register, family="pooling", source=SOURCE, tolerance=1e-3)


def _converted(input: Moments, dtype: torch.dtype | None) -> Moments:
    return input if dtype is None else input.to(dtype)


@products(
    torch.prod, "prod",
    cases=[case(Uncertain((4, 3)), 1), case(Uncertain((2, 3, 4)), -2, True), case(Uncertain((3,)))],
)  # fmt: skip
def prod(input: Moments, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Moments:
    x = _converted(input, dtype)
    if x.mean.dim() == 0:
        return x
    certain = torch.prod(x.mean) if dim is None else torch.prod(x.mean, dim, keepdim)
    parts = [part.flatten() if dim is None else part.movedim(dim, 0) for part in x]
    mean, variance = parts
    while mean.shape[0] > 1:
        half = mean.shape[0] // 2
        product = gaussian.product(mean[:half], variance[:half], mean[half : 2 * half], variance[half : 2 * half])
        mean, variance = (
            torch.cat([new, part[2 * half :]]) for new, part in zip(product, (mean, variance), strict=True)
        )
    spread = variance.sum(0)  # of one element, or of none
    return Moments(certain, spread.reshape(certain.shape).to(certain.dtype))


@products(torch.cumprod, "cumprod", "cumprod_", cases=[case(Uncertain((4, 3)), 1), case(Uncertain((3, 2)), dim=-2)])
def cumprod(input: Moments, dim: int, *, dtype: torch.dtype | None = None) -> Moments:
    x = _converted(input, dtype)
    certain = torch.cumprod(x.mean, dim)
    if x.mean.dim() == 0:
        return Moments(certain, x.variance)
    mean, variance = (list(part.unbind(dim)) for part in x)
    for k in range(1, len(mean)):
        mean[k], variance[k] = gaussian.product(mean[k - 1], variance[k - 1], mean[k], variance[k])
    return Moments(certain, torch.stack(variance, dim))
