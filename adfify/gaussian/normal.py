"""The standard normal distribution, its partial moments, and the dtype in which moments are computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
P = ParamSpec("P")

REACH = 40.0  # exp(-40**2 / 2) is 0 in float64: see Note [Variance zero, and a mean far from the kink]


def in_float32(rule: Callable[P, Pair]) -> Callable[P, Pair]:
    """Run ``rule`` in float32 on float16 or bfloat16 inputs, and return their dtype."""

    @functools.wraps(rule)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Pair:
        dtypes = [a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not any(d in (torch.float16, torch.bfloat16) for d in dtypes):
            return rule(*args, **kwargs)
        narrow = functools.reduce(torch.promote_types, dtypes)
        named = {key: _widen(value) for key, value in kwargs.items()}
        mean, variance = rule(*map(_widen, args), **named)  # type: ignore[arg-type]
        return mean.to(narrow), variance.to(narrow)

    return wrapper


def _widen(value: object) -> object:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value  # type: ignore[attr-defined]


# The standard normal and its partial moments


def normal_pdf(z: Tensor) -> Tensor:
    """phi(z) (A&S 26.2.1)."""
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z) = erfc(-z / sqrt 2) / 2 (A&S 26.2.29): accurate in the lower tail, unlike 1 + erf."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def lower_moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi(z), E[(z + xi)+] and E[(z + xi)+^2] of a standard normal xi, for z <= 0.

    Over n! these are I_n, the repeated integrals of phi (A&S 7.2.1, with z = -x sqrt 2), which obey
    n I_n = z I_{n-1} + I_{n-2} (A&S 7.2.5). For z < 0 the two terms cancel, so in the tail the ratios
    q_n = I_n / I_{n-1} are run backwards instead, q_{n-1} = 1 / (n q_n - z) (Gautschi 1961): all terms are
    positive, and an error in the start dies out.
    """
    double = z.dtype == torch.float64
    pdf, cdf = normal_pdf(z), normal_cdf(z)
    first = pdf + z * cdf
    second = cdf + z * first

    depth = 32 if double else 12
    ratios = [2 / (torch.sqrt(z * z + (4 * depth + 2)) - z)]
    for n in range(depth, 0, -1):
        ratios.append(torch.reciprocal(torch.add(-z, ratios[-1], alpha=n)))
    tail_cdf = pdf * ratios[-1]
    tail_first = tail_cdf * ratios[-2]
    tail_second = 2 * tail_first * ratios[-3]

    tail = z < (-3.0 if double else -2.0)
    return (
        torch.where(tail, tail_cdf, cdf),
        torch.where(tail, tail_first, first),
        torch.where(tail, tail_second, second),
    )


def standardise(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(near, s, z): whether 0 is within the Gaussian's reach, and s, z where it is (else 1 and 0)."""
    near = mean * mean < REACH**2 * variance
    std = torch.sqrt(torch.where(near, variance, 1.0))
    return near, std, torch.where(near, mean, 0.0) / std
