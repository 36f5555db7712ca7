"""How good predictions and their uncertainties are: small functions on tensors, each with its source."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfify import gaussian
from adfify.moments import Moments
from adfify.preprocessing import needs

CALIBRATION_BINS = 15  # as in Guo et al. 2017


def expected_probabilities(logits: Moments) -> Tensor:
    """E[softmax(logits)] for independent Gaussian logits: what a classifier believes, its input noise averaged out.

    By moment matching of the margin, see :func:`adfify.gaussian.softmax`; for the integral and its other
    approximations Lu, Ie & Sha, "Mean-field approximation to Gaussian-softmax integral", 2020. At variance 0 it is
    the softmax.

    Args:
        logits: ``[N, classes]``. Outputs that are probabilities already (non-negative, sum 1 on every row: the
            network ends in a softmax) are returned as they are.

    Returns:
        ``[N, classes]``, float64, rows sum to 1.
    """
    mean, variance = logits.mean.double(), logits.variance.double()
    if are_probabilities(mean):
        return mean
    return gaussian.softmax(mean, variance, dim=-1)[0]


def are_probabilities(mean: Tensor) -> bool:
    """Whether outputs ``[N, classes]`` are probabilities already: not negative, and every row sums to 1."""
    return bool((mean >= 0).all()) and torch.allclose(mean.sum(-1), mean.new_ones(()), rtol=0, atol=1e-4)


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy ``[N]`` in nats of ``[N, classes]`` (Shannon 1948): 0 is certain, log(classes) clueless."""
    result: Tensor = torch.special.entr(probabilities).sum(-1)
    return result


def log_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood ``[N]`` in nats of the labels ``[N]``; its mean is the NLL (Good, JRSS B 14, 1952)."""
    true = probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -true.clamp(min=torch.finfo(true.dtype).tiny).log()


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Brier score ``[N]``: sum over classes of (p - one-hot)^2, 0 to 2 (Brier, Monthly Weather Review 78, 1950)."""
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities - one_hot).square().sum(-1)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over equal-width bins, from 0 to 1.

    Source: Naeini, Cooper & Hauskrecht, AAAI 2015; Guo et al., ICML 2017. Few pictures give it a bias upwards.

    Args:
        confidence: ``[N]``, the largest probability.
        correct: ``[N]``, bool, whether that class is the label.
        bins: how many.
    """
    library = needs("torchmetrics.functional.classification", "benchmark")
    # Its "binary" form takes a confidence and whether it came true, which is the top-label ECE.
    return float(library.binary_calibration_error(confidence, correct.long(), n_bins=bins, norm="l1"))


def error_auroc(score: Tensor, correct: Tensor) -> float | None:
    """Area under the ROC curve of detecting wrong predictions: P(a wrong one has the larger score). 0.5 is chance.

    Source: Hendrycks & Gimpel, "A baseline for detecting misclassified examples", ICLR 2017.

    Args:
        score: ``[N]``, an uncertainty: larger should mean wrong.
        correct: ``[N]``, bool.

    Returns:
        None where all are right or all are wrong, for then there is nothing to tell apart.
    """
    if bool(correct.all()) or not bool(correct.any()):
        return None
    library = needs("torchmetrics.functional.classification", "benchmark")
    # torchmetrics passes scores outside [0, 1] through a sigmoid, which ties large ones. Ranks are all that counts.
    return float(library.binary_auroc(ranks(score) / len(score), (~correct).long()))


def ranks(values: Tensor) -> Tensor:
    """Position ``[N]`` of each of ``[N]`` values in their order, from 0, float64; equal values share their average."""
    ordered = values.contiguous().sort().values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two ``[N]``, from -1 to 1; NaN where one of them is constant (Spearman 1904)."""
    if len(first) < 2:
        return math.nan
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])
