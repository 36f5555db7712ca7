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

from adfify.gaussian import student
from adfify.gaussian.moderation import moderated
from adfify.joint import Question
from adfify.moments import JointMoments, Moments
from adfify.noisy import LEAST_CHUNK, Draws, Original
from adfify.rare import LARGER, at_larger_noise
from adfify.streaming import Powers

SAMPLES = 32
LARGEST_COVARIANCE = 1024
"""Outputs of which the covariance is given."""
FEW = 0.35
"""A relative error of the std, from which on few draws make the variance: about three."""
LARGEST_KEPT = 2**18
"""Outputs of which the draws are kept, for that covariance."""


def moments(question: Question) -> JointMoments:
    """Of one picture."""
    original = Original(question.network, question.precision)
    request, shape = question.request, question.layout.shape
    samples = max(2, request.samples or SAMPLES)
    powers, kept, masks = _drawn(original, question, samples)
    mean, drawn, mean_error, std_error = powers.moments()
    indices = request.indices(mean.unsqueeze(0))[0]
    # Of few draws the fourth moment, and so the error, comes out too small.
    error = torch.maximum(2 * drawn.sqrt() * std_error, drawn * (2 / (samples - 1)) ** 0.5)
    one_pass = question.one_pass().variance[0]
    variance = drawn if masks else moderated(drawn, error, one_pass, shape)  # of masks, it knows none
    std, std_error = _with_unseen(original, question, Moments(mean, variance), error, one_pass, samples)
    variance, mean_error = std.square(), torch.where(drawn > 0, mean_error, std_error)
    model_variance = None
    if masks:
        certain = question.inputs.without_variance()
        alone = _drawn(original, replace(question, inputs=certain), samples)[0].moments()[1]
        model_variance = torch.minimum(alone, variance)[indices].unsqueeze(0)
    covariance = None
    if len(indices) <= LARGEST_COVARIANCE and kept:
        chosen = torch.cat([values[:, indices] for values in kept])
        covariance = _scaled(torch.cov(chosen.double().T).reshape(len(indices), -1).to(mean), variance[indices])
    one = torch.tensor([samples], dtype=torch.int64, device=mean.device)
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
        batch_axis=question.layout.batch_axis,
    )


# Note [Few draws of many outputs]
# An output that did not vary in any of the draws may all the same, seldom: whether it does, shows at larger noise. Its
# variance is then that of the one pass, at the level that this has among the others, as far as it is not above what
# the draws exclude. Where few of the draws make all of the variance, the bar is widened as Student's t is, and holds
# the one pass if that is larger.


def _with_unseen(
    original: Original, question: Question, found: Moments, error: Tensor, one_pass: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Standard deviations ``[M]`` and their errors; see the note above.

    Args:
        original: of the network.
        question: of one picture.
        found: by the draws.
        error: of their variances.
        one_pass: its variances.
        samples: how many draws.
    """
    std = found.std
    some = std > 8 * torch.finfo(found.mean.dtype).eps * found.mean.abs()
    relative = student.widened(torch.where(some, error / (2 * found.variance.clamp(min=1e-300)), 0.0))
    sane = torch.where(one_pass.isfinite() & (one_pass > 0), one_pass, 0.0)
    known = some & (sane > 0)
    level = (found.variance[known] / sane[known]).median() if bool(known.any()) else sane.new_ones(())
    pattern = (level * sane).sqrt().to(std)
    few = some & (relative > FEW)
    # What is merely another pattern than the one pass has, is no sign of anything; what is much smaller, is.
    lacking = torch.where(few, pattern - std, torch.where(pattern > LARGER * std, (pattern - std) / 3, 0.0))
    bar = torch.maximum(std * relative, lacking)
    if bool(some.all()):
        return std, bar
    possible = at_larger_noise(original, question, samples).to(std)
    # Constant there too, but seldom on by the one pass: what varies in less than one of the draws has so little.
    little = (std[some].square().mean() / samples).sqrt() if bool(some.any()) else pattern.amax()
    seldom = torch.where(pattern <= little, pattern, 0.0)
    unseen = torch.where(possible > 0, torch.minimum(pattern, possible), seldom)
    return torch.where(some, std, unseen), torch.where(some, bar, torch.maximum(possible, seldom))


def _drawn(original: Original, question: Question, samples: int) -> tuple[Powers, list[Tensor], bool]:
    """The outputs' powers, the outputs ``[K, M]`` themselves, and whether there were random masks."""
    chunk = question.request.chunk_size or LEAST_CHUNK
    powers: Powers | None = None
    kept: list[Tensor] = []
    masks = False
    for at in range(0, samples, chunk):
        draws = Draws(question.request.seed, range(at, min(at + chunk, samples)))
        values, sources = original.at(question.inputs, question.layout, draws, gradients=False)
        masks = any(source.is_mask for source in sources)
        powers = powers or Powers(values.mean(0))
        powers.add(values)
        if values.shape[1] <= LARGEST_KEPT:
            kept.append(values)
    assert powers is not None
    return powers, kept, masks


def _scaled(covariance: Tensor, variance: Tensor) -> Tensor:
    """The same correlations, with these variances."""
    own = covariance.diagonal()
    scale = torch.where(own > 0, variance / torch.where(own > 0, own, 1.0), 0.0).sqrt()
    return covariance * scale.unsqueeze(0) * scale.unsqueeze(1)
