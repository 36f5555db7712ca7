"""Metrics against their definitions, written out, and against scipy."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from adfify import Moments, metrics


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def probabilities(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(200, 7, generator=generator, dtype=torch.float64).mul(2).softmax(-1)


@pytest.fixture
def labels(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 7, (200,), generator=generator)


def test_expected_probabilities_are_the_softmax_without_variance(generator):
    logits = torch.randn(5, 9, generator=generator) * 4
    result = metrics.expected_probabilities(Moments(logits, torch.zeros_like(logits)))
    torch.testing.assert_close(result, logits.double().softmax(-1), rtol=1e-12, atol=1e-15)


def test_expected_probabilities_are_those_of_noisy_logits(generator):
    mean = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    variance = torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(200_000, 3, 6, generator=generator, dtype=torch.float64)
    sampled = (mean + variance.sqrt() * noise).softmax(-1).mean(0)
    plain = mean.softmax(-1)
    result = metrics.expected_probabilities(Moments(mean, variance))
    assert (result - sampled).abs().max() < 0.02
    assert (plain - sampled).abs().max() > 0.05  # or the test would not tell them apart
    torch.testing.assert_close(result.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_outputs_that_are_probabilities_stay(probabilities):
    moments = Moments(probabilities.float(), torch.full_like(probabilities, 0.01).float())
    torch.testing.assert_close(metrics.expected_probabilities(moments), probabilities.float().double())


def test_entropy():
    rows = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(3), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(metrics.entropy(rows), expected, rtol=1e-12, atol=0)


def test_log_loss_is_the_cross_entropy(generator, labels):
    logits = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(metrics.log_loss(logits.softmax(-1), labels), expected, rtol=1e-12, atol=1e-12)


def test_log_loss_of_the_impossible_is_large_and_finite():
    loss = metrics.log_loss(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert 700 < loss.item() < math.inf


def test_brier(probabilities, labels):
    expected = [
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(metrics.brier(probabilities, labels), torch.tensor(expected, dtype=torch.float64))
    assert metrics.brier(torch.tensor([[0.0, 1.0]]), torch.tensor([0])).item() == 2


def test_calibration_error_by_its_definition(generator):
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    correct = torch.rand(500, generator=generator, dtype=torch.float64) < confidence**2  # overconfident
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.sum().item() * abs(confidence[inside].mean() - correct[inside].double().mean()).item()
    assert metrics.calibration_error(confidence, correct) == pytest.approx(total / 500, abs=1e-6)
    assert metrics.calibration_error(confidence, correct) > 0.1


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-6])
def test_error_auroc_counts_pairs(generator, scale):
    score = (torch.randn(80, generator=generator, dtype=torch.float64) * 4).round() * scale  # with ties
    correct = torch.rand(80, generator=generator) < 0.6
    wrong, right = score[~correct], score[correct]
    pairs = [(w > r).item() + 0.5 * (w == r).item() for w in wrong for r in right]
    assert metrics.error_auroc(score, correct) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


@pytest.mark.parametrize("correct", [[True, True], [False, False]])
def test_error_auroc_needs_both_kinds(correct):
    assert metrics.error_auroc(torch.tensor([0.1, 0.2]), torch.tensor(correct)) is None


def test_ranks_and_their_correlation_are_scipys(generator):
    first = (torch.randn(60, generator=generator, dtype=torch.float64) * 5).round()
    second = first + torch.randn(60, generator=generator, dtype=torch.float64) * 3
    expected = torch.from_numpy(scipy.stats.rankdata(first.numpy())) - 1
    torch.testing.assert_close(metrics.ranks(first), expected)
    rho = scipy.stats.spearmanr(first.numpy(), second.numpy()).statistic
    assert metrics.rank_correlation(first, second) == pytest.approx(rho, abs=1e-12)
    assert 0.3 < rho < 0.99


def test_rank_correlation_of_one_picture_is_undefined():
    assert math.isnan(metrics.rank_correlation(torch.tensor([1.0]), torch.tensor([2.0])))
