"""Comparisons: moments of an indicator, and of what is chosen by one."""

from __future__ import annotations

import torch
from torch import Tensor

from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair, below, in_float32, lower_moments, tail


def beyond(height: Tensor, variance: Tensor) -> Tensor:
    """P[x lies on the other side of 0 than its mean], at most 1/2: Phi(-|height| / s) (A&S 26.2.29), 0 at variance 0.

    Args:
        height: the mean of x.
        variance: of x.
    """
    return torch.where(variance > 0, lower_moments(tail(below(height), variance)[1])[0], 0.0)


@in_blocks
@in_float32
def positive(height: Tensor, variance: Tensor) -> Pair:
    """Moments of the indicator of x > 0: p = Phi(height / s), and p (1 - p), each accurate in both tails.

    At variance 0 it is 1 for a height above 0, else 0.

    Args:
        height: the mean of x.
        variance: of x.
    """
    far = beyond(height, variance)
    return torch.where(height > 0, 1 - far, far), far * (1 - far)


def chosen(probability: Tensor, mean: Tensor, variance: Tensor, other: Tensor, other_variance: Tensor) -> Pair:
    """Moments of a choice between two values that are independent of it: the law of total variance.

    What is never chosen does not matter, however large or undefined.

    Args:
        probability: of the first value.
        mean, variance: of the first value.
        other, other_variance: of the second.
    """
    p, q = probability, 1 - probability
    first, second = (torch.where(p > 0, a, b) for a, b in ((mean, other), (variance, other_variance)))
    other, other_variance = torch.where(q > 0, other, mean), torch.where(q > 0, other_variance, variance)
    apart = first - other
    # From the likelier one, so that a choice that is almost certain is not rounded.
    average = torch.where(p < 0.5, other + p * apart, first - q * apart)
    return average, p * second + q * other_variance + p * q * apart * apart
