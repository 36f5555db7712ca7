"""Joint moments by noisy passes alone, for many outputs at once: every pixel of a segmenter.

Note [A moderated variance]
The variance of K draws is off by sqrt(2 / K) of itself. How the variances differ *between* units is known beside it:
the one pass has their pattern within a channel, not their level. So each unit's variance is drawn towards its channel's
level times that pattern, by as much as its own standard error says against the spread that there really is (empirical
Bayes: Efron & Morris, JASA 70, 1975; of variances: Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adfify.gaussian.moderation import moderated
from adfify.joint import Question, joined
from adfify.moments import JointMoments, Moments
from adfify.noisy import LEAST_CHUNK, Draws, Original
from adfify.streaming import Powers

SAMPLES = 32
LARGEST_COVARIANCE = 1024
"""Outputs of which the covariance is given."""
LARGEST_KEPT = 2**18
"""Outputs of which the draws are kept, for that covariance."""


def moments(question: Question) -> JointMoments:
    """Of all pictures, one after the other."""
    original = Original(question.network, question.precision)
    return joined([_of_one(original, question.rows(slice(at, at + 1))) for at in range(question.pictures)])


def _of_one(original: Original, question: Question) -> JointMoments:
    request = question.request
    samples = max(2, request.samples or SAMPLES)
    powers, kept, shape, masks = _drawn(original, question, samples)
    mean, variance, mean_error, std_error = powers.moments()
    indices = request.indices(mean.unsqueeze(0))[0]
    # Of few draws the fourth moment, and so the error, comes out too small.
    error = torch.maximum(2 * variance.sqrt() * std_error, variance * (2 / (samples - 1)) ** 0.5)
    if not masks:  # the one pass would draw them
        variance = moderated(variance, error, question.one_pass().variance[0], shape)
    model_variance = None
    if masks:
        certain = tuple(Moments(x.mean, 0 * x.variance) if isinstance(x, Moments) else x for x in question.inputs)
        alone = _drawn(original, replace(question, inputs=certain), samples)[0].moments()[1]
        model_variance = torch.minimum(alone, variance)[indices].unsqueeze(0)
    covariance = None
    if len(indices) <= LARGEST_COVARIANCE and kept:
        chosen = torch.cat([values[:, indices] for values in kept])
        covariance = _scaled(torch.cov(chosen.double().T).reshape(len(indices), -1).to(mean), variance[indices])
    one = torch.tensor([samples], device=mean.device)
    return JointMoments(
        mean=mean[indices].unsqueeze(0),
        covariance=None if covariance is None else covariance.unsqueeze(0),
        indices=indices.unsqueeze(0).contiguous(),
        variance=variance[indices].unsqueeze(0),
        method="sketch",
        samples=one,
        draws=one,
        mean_error=mean_error[indices].unsqueeze(0),
        std_error=std_error[indices].unsqueeze(0),
        model_variance=model_variance,
        shape=shape,
    )


def _drawn(original: Original, question: Question, samples: int) -> tuple[Powers, list[Tensor], tuple[int, ...], bool]:
    """The outputs' powers, the outputs ``[K, M]`` themselves, their shape, and whether there were random masks."""
    chunk = question.request.chunk_size or LEAST_CHUNK
    powers: Powers | None = None
    kept: list[Tensor] = []
    shape: tuple[int, ...] = ()
    masks = False
    for at in range(0, samples, chunk):
        draws = Draws(question.request.seed, range(at, min(at + chunk, samples)))
        outputs, sources = original.at(question.inputs, draws, gradients=False)
        values, shape = question.output_of(outputs, draws.count)
        masks = any(source.is_mask for source in sources)
        powers = powers or Powers(values.mean(0))
        powers.add(values)
        if values.shape[1] <= LARGEST_KEPT:
            kept.append(values)
    assert powers is not None
    return powers, kept, shape, masks


def _scaled(covariance: Tensor, variance: Tensor) -> Tensor:
    """The same correlations, with these variances."""
    own = covariance.diagonal()
    scale = torch.where(own > 0, variance / torch.where(own > 0, own, 1.0), 0.0).sqrt()
    return covariance * scale.unsqueeze(0) * scale.unsqueeze(1)
