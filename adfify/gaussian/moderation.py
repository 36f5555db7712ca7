"""Means and variances from a few draws, moderated by what is known of them beside: empirical Bayes."""

from __future__ import annotations

import torch
from torch import Tensor


def moderated(variance: Tensor, error: Tensor, pattern: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Variances drawn towards a pattern, their logarithms (empirical Bayes: Efron & Morris, JASA 70, 1975).

    Args:
        variance: ``[M]``, estimates.
        error: ``[M]``, their standard errors.
        pattern: ``[M]``, proportional to the variances within a channel, as far as is known.
        shape: of the M units; the first dimension is the channel, if there are several.
    """
    if len(shape) < 2:
        return variance
    units = (shape[0], -1)
    variance_, error_, pattern_ = (x.double().reshape(units) for x in (variance, error, pattern))
    known = (variance_ > 0) & (pattern_ > 0)
    count = known.sum(1, keepdim=True).clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(known, x, 0.0).sum(1, keepdim=True) / count

    ratio = torch.log(torch.where(known, variance_, 1.0)) - torch.log(torch.where(known, pattern_, 1.0))
    centre = mean(ratio)
    noise = mean((error_ / variance_.clamp(min=1e-300)).square())
    spread = mean((ratio - centre).square())
    kept = (1 - noise / spread.clamp(min=1e-300)).clamp(0, 1)
    # The logarithm of a variance lies below that of its expectation, by half of its relative variance.
    log = centre + 0.5 * (1 - kept) * noise + kept * (ratio - centre)
    result = torch.where(known, pattern_ * torch.exp(log), variance_)
    return result.to(variance.dtype).reshape(variance.shape)


def moderated_mean(mean: Tensor, error: Tensor, other: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates drawn towards others of unknown bias (James & Stein 1961; Efron & Morris, JASA 70, 1975).

    The bias' variance is what the two differ by over the k estimates, less the square of the standard error; a quarter
    of that is left to it where they agree, as k of them can't show more.

    Args:
        mean: ``[N, k]``, unbiased estimates.
        error: ``[N, k]``, their standard errors.
        other: ``[N, k]``, estimates with a bias.
        scale: ``[N, k]``, variances in units of which errors and biases are alike over the k.

    Returns:
        The estimates, and their standard errors in units of the root of ``scale``, ``[N, 1]``.
    """
    known = scale > 0
    unit = torch.where(known, scale, 1.0)
    own = torch.where(known, error.square() / unit, 0.0).mean(1, keepdim=True)
    apart = torch.where(known, (mean - other).square() / unit, 0.0).mean(1, keepdim=True)
    bias = torch.maximum(apart - own, own / 4)
    weight = own / (own + bias).clamp(min=torch.finfo(mean.dtype).tiny)
    return mean + weight * (other - mean), (weight * bias).sqrt()
