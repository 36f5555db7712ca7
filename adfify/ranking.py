"""Which classes of a picture are shown, in which order and with which probability: by the moments that are shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adfify import metrics
from adfify.gaussian.competition import expected_softmax, log_sum
from adfify.moments import JointMoments, Moments

FEW, SPARE = 16, 4
"""Up to so many outputs joint moments are taken of all; of more, of the shown ones and so many beside them."""

# Note [What is shown belongs together]
# Order, label, probability, mean and std of a picture come from one set of moments. The probability is E[softmax] under
# them: of joint moments with their covariance, of the one pass' with none, for it has none. The order is that of the
# means. Joint moments of 1000 outputs are dear, so there the candidates are the largest means of 32 noisy passes (a
# sketch), a few more than are shown; the joint moments of these decide. The outputs that are no candidates take part in
# the softmax as one competitor, the logarithm of their summed exponentials, by the means and variances of the sketch,
# independent of the candidates.


@dataclass(frozen=True)
class Ranked:
    """The leading classes of one picture, the largest mean first.

    Attributes:
        indices: ``[k]``, which outputs.
        probability: ``[k]``, E[softmax] under these moments; see Note [What is shown belongs together].
        mean: ``[k]``, of the logits.
        std: ``[k]``, of the logits.
    """

    indices: Tensor
    probability: Tensor
    mean: Tensor
    std: Tensor

    def first(self, top: int) -> Ranked:
        """The ``top`` largest means."""
        order = self.mean.argsort(descending=True, stable=True)[:top]
        return Ranked(self.indices[order], self.probability[order], self.mean[order], self.std[order])


def by_one_pass(logits: Moments, top: int) -> Ranked:
    """By the moments of the one pass of one picture, ``[1, classes]``, whose logits are taken as independent."""
    every = torch.arange(logits.mean.shape[1])
    return Ranked(every, metrics.expected_probabilities(logits)[0], logits.mean[0], logits.std[0]).first(top)


def by_joint(candidates: JointMoments, others: Moments, top: int, *, softmaxed: bool) -> Ranked:
    """By joint moments.

    Args:
        candidates: joint moments of one picture, ``[1, k]``.
        others: of the outputs that are no candidates, ``[m]``, m may be 0.
        top: how many are shown.
        softmaxed: the network's outputs are probabilities already, which their means then are.
    """
    mean, indices = candidates.mean[0], candidates.indices[0]
    if softmaxed:
        probability = mean.clamp(0, 1)
    else:
        covariance = torch.diag(candidates.variance[0]) if candidates.covariance is None else candidates.covariance[0]
        probability = _beside(mean, covariance, others)
    return Ranked(indices, probability, mean, candidates.std[0]).first(top)


def _beside(mean: Tensor, covariance: Tensor, others: Moments) -> Tensor:
    """``[k]``: probabilities of the candidates, the others being one more competitor."""
    if not len(others.mean):
        return expected_softmax(mean, covariance)
    rest, spread = log_sum(others.mean, others.variance)
    together = torch.nn.functional.pad(covariance.double(), (0, 1, 0, 1))  # independent
    together[-1, -1] = spread
    return expected_softmax(torch.cat((mean.double(), rest.reshape(1))), together)[:-1]
