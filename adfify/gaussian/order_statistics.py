"""The smallest, the second smallest, ... of independent Gaussian variables, by the integral over what each exceeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adfify.gaussian.blocks import readable
from adfify.gaussian.normal import Pair, in_float32

# Note [Nodes of an order statistic]
#   An element with `above` others above it is at most t if no more than so many lie above t: F(t) = P(A(t) <= above),
#   A the sum of independent Bernoulli variables of the probabilities Phi((m_j - t) / s_j) (David & Nagaraja, Order
#   Statistics, 2003, section 5.2). About a place c, E[X] = c + integral of 1 - F above c - integral of F below it, and
#   E[(X - c)^2] = 2 integral of |t - c| (1 - F) above + of |t - c| F below. F is 0 below the element of that rank among
#   the m_j - 6 s_j, and 1 above that among the m_j + 6 s_j. In between it jumps where an element is certain, rises
#   steeply at one that nearly is, and is flat in a gap, so that no fixed nodes do: the intervals with the largest width
#   times rise, which bounds their error, are halved again and again, and each has three nodes of Gauss and Legendre.
#   Everything is relative to the mean of that rank: a std of 1e-15 at a mean of 1e4 does not drown. Where one looks has
#   no gradient.
_REACH, _START, _ROUNDS, _HALVED = 6.0, 13, 7, 4
_LEGENDRE = [(float(t), float(w)) for t, w in zip(*leggauss(3), strict=True)]

# Note [How many lie above]
#   Exact, by the recursion over the elements, for up to 64 elements, or 8 places from an end. Else by it for the 24
#   that are least decided at that t, and for the rest by a shifted binomial variable of the same first three
#   cumulants (Pekoz, Rollin, Cekanavicius & Shwartz, J. Appl. Prob. 46, 2009), whose distribution function is by the
#   saddlepoint formula of Lugannani & Rice with Daniels' continuity correction (Int. Stat. Rev. 55, 1987, eq. 6.4).
_FEW, _FROM_AN_END, _AT_MOST, _LEAST_DECIDED = 64, 8, 4096, 24

_BLOCK = 1 << 20  # probabilities at once


@in_float32
def order_statistics(mean: Tensor, variance: Tensor, ranks: Sequence[int]) -> Pair:
    """The elements of those ranks along the last dimension, 0 being the smallest: ``[..., n]`` to ``[..., k]``.

    Mean and std to 1 % of the std, and where Note [How many lie above] says approximate to 3 %.
    """
    size = mean.shape[-1]
    if size == 0:  # of nothing, torch's own is no number
        shape = (*mean.shape[:-1], len(ranks))
        return mean.new_full(shape, math.nan), variance.new_full(shape, math.nan)
    upper = [rank for rank in ranks if 2 * rank >= size - 1]
    lower = [rank for rank in ranks if 2 * rank < size - 1]
    columns: dict[int, tuple[Tensor, Tensor]] = {}
    for sign, chosen, above in ((1, upper, [size - 1 - rank for rank in upper]), (-1, lower, lower)):
        few = size <= _FEW
        ends = [few or (a < _FROM_AN_END and size <= _AT_MOST) for a in above]
        for exact in (True, False):
            some = [(rank, a) for rank, a, end in zip(chosen, above, ends, strict=True) if end == exact]
            if some:
                found, spread = _upper(sign * mean, variance, [a for _, a in some], exact)
                for place, (rank, _) in enumerate(some):
                    columns[rank] = (sign * found[..., place], spread[..., place])
    shape = (*mean.shape[:-1], 0)
    if not ranks:
        return mean.new_empty(shape), variance.new_empty(shape)
    means, variances = zip(*[columns[rank] for rank in ranks], strict=True)
    return torch.stack(means, -1), torch.stack(variances, -1)


def _upper(mean: Tensor, variance: Tensor, above: list[int], exact: bool) -> Pair:
    """The elements with so many ``above`` them."""
    size, count = mean.shape[-1], len(above)
    places = [size - 1 - a for a in above]
    certain, index = mean.sort(-1)
    certain, winner = certain[..., places], variance.gather(-1, index)[..., places]
    origin = certain.detach()
    rows, spreads, origins = mean.reshape(-1, size), variance.reshape(-1, size), origin.reshape(-1, count)
    allowed = torch.tensor(above, device=mean.device)

    def solved(row: Tensor, column: Tensor) -> Pair:
        distance = rows[row] - origins[row, column].unsqueeze(-1)
        return _moments(distance, spreads[row], allowed[column], exact)

    problems = torch.arange(origins.shape[0] * count, device=mean.device)
    row, column = problems // count, problems % count
    states = max(above) + 1 if exact else _LEAST_DECIDED
    shift, spread = _in_blocks(solved, row, column, max(1, _BLOCK // (64 * max(size, states))), mean)
    shift, spread = shift.reshape(origin.shape), spread.reshape(origin.shape)
    # Where all that it could be is certain, the slope is that of the original.
    settled = spread == 0
    return torch.where(settled, certain, origin + shift), torch.where(settled, winner, spread)


def _in_blocks(solved: Callable[[Tensor, Tensor], Pair], row: Tensor, column: Tensor, block: int, x: Tensor) -> Pair:
    """Some problems at a time; where gradients are recorded, what is in a block is computed twice and not kept."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
    if traced or row.is_meta or len(row) <= block:
        return solved(row, column)
    pairs = zip(torch.split(row, block), torch.split(column, block), strict=True)
    if readable(x) or not torch.is_grad_enabled():
        parts = [solved(*pair) for pair in pairs]
    else:
        parts = [checkpoint(solved, *pair, use_reentrant=False) for pair in pairs]
    shifts, spreads = zip(*parts, strict=True)
    return torch.cat(shifts), torch.cat(spreads)


def _moments(distance: Tensor, variance: Tensor, above: Tensor, exact: bool) -> Pair:
    """Of each problem, elements ``[P, n]`` as seen from the origin: mean from there, and variance."""
    random = variance > 0
    std = torch.sqrt(torch.where(random, variance, 1.0))
    rank = (distance.shape[-1] - 1 - above).unsqueeze(-1)

    def exceeding(t: Tensor) -> Tensor:
        """``[P, m, n]``: the probability of each element to lie above t."""
        gap = distance.unsqueeze(1) - t.unsqueeze(-1)
        certain = (gap > 0).to(gap.dtype)
        return torch.where(random.unsqueeze(1), 0.5 * torch.erfc(gap / std.unsqueeze(1) * -math.sqrt(0.5)), certain)

    with torch.no_grad():
        reach = torch.where(random, _REACH * std, 0.0)
        low, high = ((distance + sign * reach).sort(-1).values.gather(-1, rank) for sign in (-1, 1))
        rough = _exact if exact and distance.shape[-1] <= _LEAST_DECIDED else _rough
        edges, values = _intervals(lambda t: rough(exceeding(t), above), low, high)
        centre = edges.gather(-1, (values - 0.5).abs().argmin(-1, keepdim=True))
        middle, half = 0.5 * (edges[:, 1:] + edges[:, :-1]), 0.5 * edges.diff(dim=-1)
        t = torch.cat([middle + half * place for place, _ in _LEGENDRE], -1)
        weight = torch.cat([half * share for _, share in _LEGENDRE], -1)
    p = exceeding(t)
    values = _exact(p, above) if exact else _partly_exact(p, above)
    offset = t - centre
    tails = weight * torch.where(offset > 0, 1 - values, -values)
    shift = tails.sum(-1)
    return centre.squeeze(-1) + shift, (2 * (offset * tails).sum(-1) - shift * shift).clamp(min=0)


def _intervals(distribution: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Pair:
    """Edges of the intervals to look at, and what is seen there: see Note [Nodes of an order statistic]."""
    share = torch.linspace(0, 1, _START, dtype=low.dtype, device=low.device)
    t = low + (high - low) * share
    values = distribution(t)
    for _ in range(_ROUNDS):
        worth = t.diff(dim=-1) * values.diff(dim=-1).abs()
        chosen = worth.topk(_HALVED, -1).indices
        between = 0.5 * (t.gather(-1, chosen) + t.gather(-1, chosen + 1))
        t, order = torch.cat([t, between], -1).sort(-1)
        values = torch.cat([values, distribution(between)], -1).gather(-1, order)
    return t, values


def _recursion(p: Tensor, states: int) -> Tensor:
    """``[..., n]`` probabilities to ``[..., states]``: of 0, 1, 2 ... events."""
    law = F.pad(torch.ones_like(p[..., :1]), (0, states - 1))
    for each in p.unbind(-1):
        each = each.unsqueeze(-1)
        law = law * (1 - each) + each * F.pad(law[..., :-1], (1, 0))
    return law


def _exact(p: Tensor, above: Tensor) -> Tensor:
    """P(no more than ``above`` events), of each problem."""
    size = p.shape[-1]
    states = size // 2 + 1 if size <= _FEW else _FROM_AN_END
    counted = torch.arange(states, device=p.device) <= above[:, None, None]
    return (_recursion(p, states) * counted).sum(-1)


def _partly_exact(p: Tensor, above: Tensor) -> Tensor:
    """As :func:`_exact`, by the recursion for the least decided alone."""
    chosen = (p * (1 - p)).detach().topk(_LEAST_DECIDED, -1).indices
    law = _recursion(p.gather(-1, chosen), _LEAST_DECIDED + 1)
    rest = p.scatter(-1, chosen, 0.0)
    left = above.unsqueeze(-1) - torch.arange(_LEAST_DECIDED + 1, device=p.device)
    return (law * _shifted_binomial(rest, left.unsqueeze(1))).sum(-1)


def _rough(p: Tensor, above: Tensor) -> Tensor:
    """As :func:`_exact`, by a normal variable that is a bit too wide: it has to rise wherever the law does."""
    average, spread = p.sum(-1), (p * (1 - p)).sum(-1)
    return 0.5 * torch.erfc((average - above.unsqueeze(-1) - 0.5) * torch.rsqrt(2 * spread + 0.5))


def _shifted_binomial(p: Tensor, above: Tensor) -> Tensor:
    """P(at most ``above`` events), ``[P, m, n]`` and ``[P, 1, k]`` to ``[P, m, k]``; in float64 but for the sums."""
    square = p * (1 - p)
    sums = [part.sum(-1, keepdim=True).double() for part in (p, square, p * square)]
    average, spread, third = sums
    random = spread > 1e-9
    spread = torch.where(random, spread, 0.25)
    success = torch.where(random, third / spread, 0.5).clamp(1e-9, 1 - 1e-9)
    failure = 1 - success
    trials = spread / (success * failure)
    x = above.double() + 0.5 - (average - spread / failure)
    inside = random & (x > 0) & (x < trials)
    certain = torch.where(random, x > 0, above + 0.5 > average).to(trials.dtype)
    x = torch.where(inside, x, 0.25 * trials)
    y = trials - x
    tilt = torch.log(x * failure) - torch.log(y * success)
    near = tilt.abs() < 1e-3  # where the formula is a difference of two poles
    away = torch.where(near, 1.0, tilt)
    distance = x * torch.log(x / (trials * success)) + y * torch.log(y / (trials * failure))
    w = torch.where(
        near, tilt * torch.sqrt(spread), torch.sign(away) * torch.sqrt(2 * torch.where(near, 1.0, distance))
    )
    u = 2 * torch.sinh(0.5 * away) * torch.sqrt(x * y / trials)
    limit = (success - failure) / (6 * torch.sqrt(spread))
    correction = torch.where(near, limit, 1 / u - 1 / torch.where(near, 1.0, w))
    density = torch.exp(-0.5 * w * w) / math.sqrt(2 * math.pi)
    value = 0.5 * torch.erfc(-w * math.sqrt(0.5)) - density * correction
    return torch.where(inside, value.clamp(0, 1), certain).to(p.dtype)
