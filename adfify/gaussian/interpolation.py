"""Covariances of functions of many Gaussian variables, from their gradients at correlated inputs.

Note [Covariance from gradients]
    For X and X' ~ N(m, S) with Cov(X, X') = r S,
        Cov[f(X), g(X)] = integral over r from 0 to 1 of E[grad f(X)' S grad g(X')]
    (Houdre & Perez-Abreu, Ann. Probab. 23, 1995, covariance identities by interpolation; Chatterjee, Probab. Theory
    Relat. Fields 143, 2009, lemma 2.1), exact whatever the functions are, correlations, maxima and residuals of every
    order included: the part of Hermite order n has the integrand n r^(n-1) V_n, and its integral V_n. A gradient holds
    as many numbers as there are inputs, so that a pair of gradients says of the variance what hundreds of values do.

Note [Few pairs and many]
    The integrand is steep at r = 1, where kinks are, and there it is seen without further cost: X with itself. Few
    pairs are all taken at r = 1/2, where a curvature of order 2 has exactly its integral, and X with itself gets the
    weight w = min(1, sqrt(6 / q)) / 16, where q is the ratio of the two: measured on trained networks at noise from
    1e-4 to 1e-1 (docs/accuracy.md). Where gates open and close at independent angles in many layers, the integrand is
    exp(-c arccos r), which asks for w between .045 and .07 while q < 15. Many pairs have the r of the middles of as
    many equal parts of [0, 1], and the weight of X with itself falls as the midpoint rule's error at a kink.
"""

from __future__ import annotations

import torch
from torch import Tensor

MANY = 16
"""From so many pairs on, each has an r of its own."""

_ITSELF, _STEEP = 1 / 16, 6.0


def correlations(pairs: int) -> Tensor:
    """``[pairs]``, float64: r of each; see Note [Few pairs and many]."""
    if pairs < MANY:
        return torch.full((pairs,), 0.5, dtype=torch.float64, device="cpu")
    return (torch.arange(pairs, dtype=torch.float64, device="cpu") + 0.5) / pairs


def weight_of_itself(ratio: Tensor, pairs: int) -> Tensor:
    """w, given q, the mean of X with itself over that of X with X'; see Note [Few pairs and many]."""
    return torch.full_like(ratio, _ITSELF / pairs) if pairs >= MANY else _ITSELF * (_STEEP / ratio).sqrt().clamp(max=1)


def correlated(basis: Tensor, r: Tensor) -> Tensor:
    """Pairs of standard normal vectors of correlation r, ``[P, 2, ...]``, from independent ones of the same shape."""
    r = r.to(basis).reshape(-1, *[1] * (basis.dim() - 2))
    return torch.stack((basis[:, 0], r * basis[:, 0] + (1 - r * r).sqrt() * basis[:, 1]), 1)


def products(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """grad f' S grad g between X and X', and of each with itself, ``[..., k, k]``, both symmetric.

    Args:
        first: ``[..., k, D]``, gradients of k functions at X, times the standard deviations of the D variables.
        second: the same at X'.
    """
    cross = first @ second.mT
    return 0.5 * (cross + cross.mT), 0.5 * (first @ first.mT + second @ second.mT)


def summands(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What each of the D variables adds to the diagonals of :func:`products`, ``[..., k, D]``."""
    return first * second, 0.5 * (first * first + second * second)
