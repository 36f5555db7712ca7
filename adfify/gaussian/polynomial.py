"""Products, squares and exponentials of Gaussian variables: exact."""

from __future__ import annotations

import torch
from torch import Tensor

from adfify.gaussian.normal import Pair, in_float32


@in_float32
def product(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Pair:
    """a * b, a and b independent (Goodman, On the exact variance of products, JASA 55, 1960, equation 2)."""
    variance = variance_a * variance_b + mean_a * mean_a * variance_b + mean_b * mean_b * variance_a
    return mean_a * mean_b, variance


@in_float32
def exp(mean: Tensor, variance: Tensor) -> Pair:
    """e^x, the log-normal (Aitchison & Brown, The Lognormal Distribution, 1957, section 2.3): exact."""
    return torch.exp(mean + 0.5 * variance), torch.exp(2 * (mean + variance)) * -torch.expm1(-variance)


@in_float32
def square(mean: Tensor, variance: Tensor) -> Pair:
    """x^2, a scaled non-central chi-square: exact."""
    return mean * mean + variance, 2 * variance * (variance + 2 * mean * mean)
