"""Softmax and its logarithm: an approximation, with its measured error."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32
from adfify.gaussian.smooth import logsigmoid, sigmoid


@in_float32
def softmax(mean: Tensor, variance: Tensor, dim: int = -1) -> Pair:
    """exp(x_k) / sum_j exp(x_j), with the competition of class k taken as one Gaussian (see `_margin`).

    An approximation: softmax_k = sigmoid(x_k - log sum_{j != k} exp(x_j)), whose moments are `sigmoid`'s,
    normalised to sum to 1. Against Monte Carlo, 3 to 1000 classes, logits' std 0.1 / 0.3 / 1 / 3: mean off by
    .01 / .01 / .03 / .13 of its std at most, std off by 1 / 1 / 3 / 25 % (the delta method: .05 / .14 / .37 /
    .39 and 1 / 5 / 26 / 104 %), for the classes within a factor 5 of the most probable one.
    """
    if mean.dim() == 0 or mean.shape[dim] <= 1:
        return _alone(torch.softmax(mean, dim), variance)
    certain, margin, spread = _margin(mean, variance, dim)
    one, one_variance = sigmoid(margin, spread)
    zero, total = torch.sigmoid(certain), one.sum(dim, keepdim=True).clamp(min=_LEAST)
    # The difference is exactly 0 at variance 0, and sums to 0 over the classes at any other.
    average = torch.softmax(mean, dim) + (one / total - zero / zero.sum(dim, keepdim=True))
    average = average.clamp(0, 1)
    # Of the one class above a half, 1 less its probability is summed afresh: the difference is mostly rounding.
    leading = average > 0.5
    rest = torch.where(leading, torch.where(leading, 0.0, average).sum(dim, keepdim=True), 1 - average)
    return average, torch.minimum(one_variance / total / total, average * rest)


_LEAST = 1e-15  # of the sum of all probabilities, before it is made 1: its square is not to underflow


def _alone(certain: Tensor, variance: Tensor) -> Pair:
    """One class alone is certain, whatever its logit, and so is none."""
    return certain + 0 * variance, 0 * variance


@in_float32
def log_softmax(mean: Tensor, variance: Tensor, dim: int = -1) -> Pair:
    """x_k - log sum_j exp(x_j) = log sigmoid of the margin: approximated as in `softmax`."""
    if mean.dim() == 0 or mean.shape[dim] <= 1:
        return _alone(torch.log_softmax(mean, dim), variance)
    certain, margin, spread = _margin(mean, variance, dim)
    one, one_variance = logsigmoid(margin, spread)
    return torch.log_softmax(mean, dim) + (one - F.logsigmoid(certain)), one_variance


# Note [Sums over the others]
#   A sum of exp(x_j) over j != k is taken relative to the largest of its own terms: that is the top class, and for the
#   top class itself the second. So no sum is below 1, however far the top class leads, and no power of one underflows
#   or sends an infinity into the gradients. The sum of the top class is summed afresh: as a difference it would be
#   mostly rounding.
_FAR = 1e6  # beyond which a logit, or a margin, is held: further than any noise reaches


def _margin(mean: Tensor, variance: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """m_k - L_k at variance 0, and mean and variance of x_k - L_k, where L_k = log sum_{j != k} exp(x_j).

    L_k by the delta method (its gradient is the softmax q of the others, its Hessian's diagonal q (1 - q)),
    which is better here than matching moments (Fenton, IRE Trans. Commun. Syst. 8, 1960), the more so at
    unequal variances. For a std above 9 it would be far too high: it is held at what E[max_j x_j] can be at most, for n
    variables s sqrt(2 log n) above their means (Boucheron, Lugosi & Massart, Concentration Inequalities, 2013, section
    2.5). Masked classes (mean -inf, variance 0) are held at a margin of -10^6, where they weigh nothing.
    """
    mean, variance = mean + torch.zeros_like(variance), variance + torch.zeros_like(mean)
    top = mean.argmax(dim, keepdim=True)
    other = torch.ones_like(mean, dtype=torch.bool).scatter(dim, top, False)
    shifted = (mean - mean.gather(dim, top)).clamp(min=-_FAR)
    second = torch.where(other, shifted, -_FAR).amax(dim, keepdim=True)
    far = torch.where(other, torch.exp(shifted), 0.0)
    near = torch.exp(torch.where(other, shifted - second, -_FAR))

    def others(power: int, factor: Tensor) -> Tensor:
        term = far**power * factor
        rest = (term.sum(dim, keepdim=True) - term).clamp(min=0) + factor.gather(dim, top)
        return torch.where(other, rest, (near**power * factor).sum(dim, keepdim=True))

    total = others(1, torch.ones_like(mean))
    square = others(2, variance) / total / total
    average = others(1, variance) / total
    most = math.sqrt(2 * math.log(max(mean.shape[dim] - 1, 2))) * torch.sqrt(1 + average)
    shift = torch.minimum(0.5 * (average - square), most)
    certain = (shifted - torch.where(other, 0.0, second) - torch.log(total)).clamp(-_FAR, _FAR)
    return certain, certain - shift, variance + square
