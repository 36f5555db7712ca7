"""Functions of two coordinates of a point: its distance from the origin, and of complex values the modulus."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adfify import gaussian
from adfify.gaussian import planar
from adfify.moments import Moments, lift
from adfify.nn.layer_norm import added
from adfify.registry import Certain, Uncertain, case, register

# Exact, but not affine, which is what `exact` promises outside the elementwise family.
plane = partial(
    register, family="arithmetic", source="quadrature over a transform, see gaussian.planar", tolerance=1e-3
)


@plane(
    torch.hypot, "hypot", "hypot_",
    cases=[case(Uncertain((3, 4)), Uncertain((4,))), case(Uncertain((3, 4)), Certain((3, 4)))],
)  # fmt: skip
def hypot(input: Moments | Tensor, other: Moments | Tensor) -> Moments:
    a, b = lift(input), lift(other)
    certain = _length(a.mean, b.mean)
    if input is other:  # sqrt 2 |x|
        mean, spread = gaussian.absolute(a.mean, a.variance)
        return added(certain, 2**0.5 * (mean - a.mean.abs()), 2 * spread)
    return added(certain, *planar.length_shift(a.mean, a.variance, b.mean, b.variance))


def _length(a: Tensor, b: Tensor) -> Tensor:
    """torch.hypot, with the gradient 0 at the origin, where torch's is NaN."""
    origin = (a == 0) & (b == 0)
    return torch.where(origin, 0.0, torch.hypot(torch.where(origin, 1.0, a), b))
