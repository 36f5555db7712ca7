"""Sums of losses of pairs of independent Gaussian variables, which share their members.

Note [Sums over pairs]
    L = sum over j, i of w_ji f(c - x_j + y_i). A term depends on two variables, so that L is a constant, functions of
    one variable each and functions of one pair each, all uncorrelated (Hoeffding, Ann. Math. Stat. 19, 1948, section
    5). Hence Var L is the sum over all variables of the variance of E[L | that variable], and over all pairs of what
    is left of the variance of its own term. Each expectation of a term is in closed form or by quadrature, and E[L |
    one variable] is taken at 32 Gauss-Hermite nodes of it (A&S 25.4.46).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32
from adfify.gaussian.piecewise import relu
from adfify.gaussian.quadrature import _HERMITE, expect


def _hinge(power: int) -> Callable[[Tensor, Tensor], Pair]:
    if power == 1:
        return relu
    return lambda mean, variance: expect(lambda x: torch.relu(x).square(), mean, variance, kinks=(0.0,))


@in_float32
def hinge_pairs(
    mean: Tensor, variance: Tensor, other: Tensor, other_variance: Tensor, weight: Tensor, margin: float, power: int
) -> Pair:
    """What uncertainty adds to the sum of w_ji max(0, c - x_j + y_i)^p, and its variance: see Note [Sums over
    pairs].

    Args:
        mean, variance: of x, [..., J].
        other, other_variance: of y, [..., I].
        weight: w, [..., J, I]; 0 where j and i are the same variable.
        margin: c.
        power: p, 1 or 2.
    """
    hinge = _hinge(power)
    gap = margin - mean.unsqueeze(-1) + other.unsqueeze(-2)
    of_x, of_y = variance.unsqueeze(-1).expand_as(gap), other_variance.unsqueeze(-2).expand_as(gap)
    average, spread = hinge(gap, of_x + of_y)
    total = (weight.square() * spread).sum((-2, -1))
    for own, rest, dim in ((of_x, of_y, -1), (of_y, of_x, -2)):
        together, alone = _by_one(hinge, gap, own, rest, weight, dim)
        total = total + together.sum(-1) - alone.sum((-2, -1))
    return (weight * (average - torch.relu(gap).pow(power))).sum((-2, -1)), total.clamp(min=0)


def _by_one(
    hinge: Callable[[Tensor, Tensor], Pair], gap: Tensor, own: Tensor, rest: Tensor, weight: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Variances of the expectation given one variable: of the sum over ``dim``, and of each term by itself."""
    std, centre = torch.sqrt(torch.where(own > 0, own, 1.0)) * (own > 0), hinge(gap, rest)[0]
    # A step that is lost in the rounding of the gap is taken wider, far from the kink, and its effect scaled.
    share = {torch.float32: 2.0**-8, torch.float64: 2.0**-17}[gap.dtype]
    step = torch.maximum(std, (share * gap.detach().abs()).clamp(min=1e-18))
    ratio = std / step
    sums = [torch.zeros_like(gap.sum(dim)), torch.zeros_like(gap.sum(dim))]
    terms = [torch.zeros_like(gap), torch.zeros_like(gap)]
    for z, share in _HERMITE[32]:
        term = weight * ratio * (hinge(gap + z * step, rest)[0] - centre)
        for moments, value in ((sums, term.sum(dim)), (terms, term)):
            moments[0] = moments[0] + share * value
            moments[1] = moments[1] + share * value.square()
    return tuple(second - first.square() for first, second in (sums, terms))  # type: ignore[return-value]
