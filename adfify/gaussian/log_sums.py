"""Logarithms of sums of exponentials of independent Gaussian variables."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.categorical import softmax
from adfify.gaussian.normal import Pair, in_float32
from adfify.gaussian.quadrature import soft


@in_blocks
@in_float32
def log_add(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """log(e^a + e^b): mean and variance exact, by quadrature over d = a - b alone.

    It is b + softplus(d), and b = E[b] - k (d - E[d]) + e, with k = v_b / (v_a + v_b) and e independent of d, of
    variance v_a v_b / (v_a + v_b) (regression of one Gaussian variable on another: Anderson, An Introduction to
    Multivariate Statistical Analysis, 2003, theorem 2.5.1).
    """
    gap, total = mean_a - mean_b, variance_a + variance_b
    k = torch.where(total > 0, variance_b / torch.where(total > 0, total, 1.0), 0.5)
    average, spread = soft(lambda d: (1 - k) * F.softplus(d) + k * F.softplus(-d), gap, total)  # softplus(d) - k d
    return mean_b + k * gap + average, spread + (1 - k) * variance_b


@in_float32
def log_sum(mean: Tensor, variance: Tensor, dim: int) -> Pair:
    """What uncertainty adds to log(sum over ``dim`` of e^x), and the variance; ``dim`` is kept.

    By pairs, each sum taken as Gaussian again (Schwartz & Yeh, Bell System Technical Journal 61, 1982, section II).
    """
    first, spread = mean.movedim(dim, 0), variance.movedim(dim, 0)
    certain, zero = first, torch.zeros_like(spread)
    while first.shape[0] > 1:
        half = first.shape[0] // 2
        rest = [part[2 * half :] for part in (first, spread, certain)]
        certain = torch.cat([log_add(certain[:half], zero[:half], certain[half : 2 * half], zero[:half])[0], rest[2]])
        first, spread = log_add(first[:half], spread[:half], first[half : 2 * half], spread[half : 2 * half])
        first, spread = torch.cat([first, rest[0]]), torch.cat([spread, rest[1]])
    return (first - certain).movedim(0, dim), spread.movedim(0, dim)


@in_float32
def cumulative_log_sum(mean: Tensor, variance: Tensor, dim: int) -> Pair:
    """As `log_sum`, of the elements up to each along ``dim``, one after the other."""
    means, variances = mean.unbind(dim), variance.unbind(dim)
    shifts, spreads = [torch.zeros_like(means[0])], [variances[0]]
    first, spread, certain = means[0], variances[0], means[0]
    for m, v in zip(means[1:], variances[1:], strict=True):
        zero = torch.zeros_like(v)
        certain = log_add(certain, zero, m, zero)[0]
        first, spread = log_add(first, spread, m, v)
        shifts.append(first - certain)
        spreads.append(spread)
    return torch.stack(shifts, dim), torch.stack(spreads, dim)


@in_float32
def cross_entropy(mean: Tensor, variance: Tensor, share: Tensor, dim: int) -> Pair:
    """What uncertainty adds to L = sum of q_c (LSE(x) - x_c) along ``dim``, which goes, and the variance.

    With Q the sum of the shares q, dL/dx_c = Q p_c - q_c: the terms of first order (Houdre & Perez-Abreu, Ann. Probab.
    23, 1995) are the sum of v_c (Q E[p_c] - q_c)^2, and what is left is Q^2 times what is left of Var LSE.
    """
    total = share.sum(dim, keepdim=True)
    shift, spread = log_sum(mean, variance, dim)
    likely = softmax(mean, variance, dim)[0]
    first = (variance * (total * likely - share).square()).sum(dim, keepdim=True)
    rest = (spread - (variance * likely.square()).sum(dim, keepdim=True)).clamp(min=0)
    return (total * shift).squeeze(dim), (first + total.square() * rest).squeeze(dim)


LOG_2 = math.log(2)
