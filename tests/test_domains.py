"""Functions that exist on an interval only, next to its ends; and what has no rule is refused at conversion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import UnsupportedOpsError
from adfify.nn import inverse_functions as rules

CASES = [
    (torch.asin, rules.asin, -1.0, 1.0),
    (torch.acos, rules.acos, -1.0, 1.0),
    (torch.atanh, rules.atanh, -1.0, 1.0),
    (torch.acosh, rules.acosh, 1.0, 3.0),
    (torch.erfinv, rules.erfinv, -1.0, 1.0),
    (torch.special.ndtri, rules.ndtri, 0.0, 1.0),
    (torch.special.entr, rules.entr, 0.0, 2.0),
    (torch.lgamma, rules.lgamma, 0.0, 2.0),
    (torch.logit, rules.logit, 0.0, 1.0),
]


@pytest.mark.parametrize(("original", "rule", "low", "high"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_near_an_end_the_moments_are_those_of_the_draws_that_are_inside(original, rule, low, high):
    """1 std from the end and half a std beyond it, where a sixth and two thirds of the draws are outside."""
    std = 0.1 * (high - low)
    mean = torch.tensor([low + std, low - 0.5 * std], dtype=torch.float64)
    got = rule(Moments(mean, torch.full_like(mean, std**2)))
    draws = mean + std * torch.randn(400_000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for k in range(2):
        inside = draws[:, k][(draws[:, k] > low) & (draws[:, k] < (high if original.__name__ != "acosh" else math.inf))]
        values = original(inside)
        count, spread = len(values), values.var()
        fourth = (values - values.mean()).pow(4).mean()
        assert abs(got.mean[k] - values.mean()) < 5 * (spread / count).sqrt()
        assert abs(got.variance[k] - spread) < 5 * ((fourth - spread**2) / count).sqrt()


def test_an_uncertain_value_far_outside_is_what_the_original_makes_of_it():
    got = rules.asin(Moments(torch.tensor([3.0]), torch.tensor([0.01])))
    assert got.mean.isnan().all()


class Ranked(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.sort(x, 1)[1] * 1.0,
        lambda x: x.gather(1, torch.topk(x, 2, 1)[1]),
        lambda x: x.median(1)[1] * 1.0,
        lambda x: torch.kthvalue(x, 2, 1)[1] * 1.0,
        lambda x: torch.cummax(x, 1)[1] * 1.0,
        lambda x: x.tan(),
        lambda x: torch.atan2(x, x + 1),
        lambda x: torch.linalg.vector_norm(x, 3.0, 1),
        lambda x: torch.linalg.matrix_norm(x, 2),
    ],
)
def test_what_has_no_rule_is_refused_at_conversion(operation):
    with pytest.raises(UnsupportedOpsError, match=r"test_domains\.py"):
        adfify(Ranked(operation), torch.zeros(3, 4))
