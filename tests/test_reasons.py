"""What can have no rule says why, and what to write instead; what it says to write converts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import adfify
from adfify.errors import UnsupportedOpsError


class Of(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


@pytest.mark.parametrize(
    ("operation", "instead"),
    [
        (lambda x: x.tan(), r"poles.*torch\.sin"),
        (lambda x: torch.tan(x), r"poles.*torch\.sin"),
        (lambda x: torch.atan2(x, x + 1), r"torch\.hypot"),
        (lambda x: x.arctan2(x + 1), r"torch\.hypot"),
        (lambda x: torch.complex(x, x + 1).angle(), r"z\.imag"),
        (lambda x: torch.complex(x, x + 1).sgn(), r"z\.imag"),
        (lambda x: F.triplet_margin_loss(x, x + 1, 2 * x), r"F\.pairwise_distance"),
        (lambda x: F.cosine_embedding_loss(x, x + 1, torch.ones(3)), r"F\.cosine_similarity"),
        (lambda x: F.poisson_nll_loss(x, torch.ones(3, 4), log_input=False), r"log_input"),
    ],
)
def test_the_refusal_says_what_to_write(operation, instead):
    with pytest.raises(UnsupportedOpsError, match=rf"test_reasons\.py:\d+\): .*{instead}"):
        adfify(Of(operation), torch.zeros(3, 4))


ANCHOR, NEGATIVE = torch.linspace(-1, 2, 12).reshape(3, 4), torch.linspace(2, -1, 12).reshape(3, 4).square()
SIGNS = torch.tensor([1.0, -1.0, 1.0])


def triplet(x: Tensor) -> Tensor:
    return F.relu(F.pairwise_distance(x, ANCHOR) - F.pairwise_distance(x, NEGATIVE) + 1).mean()


def cosine(x: Tensor) -> Tensor:
    c = F.cosine_similarity(x, ANCHOR + 1)
    return torch.where(SIGNS > 0, 1 - c, F.relu(c - 0.2)).mean()


@pytest.mark.parametrize(
    ("written", "original"),
    [
        (triplet, lambda x: F.triplet_margin_loss(x, ANCHOR, NEGATIVE)),
        (cosine, lambda x: F.cosine_embedding_loss(x, ANCHOR + 1, SIGNS, 0.2)),
        (lambda x: x / torch.hypot(x, x + 1), lambda x: torch.sin(torch.atan2(x, x + 1))),
    ],
)
def test_what_it_says_to_write_converts_and_is_the_same(written, original):
    torch.manual_seed(2)
    x = torch.rand(3, 4) + 0.1
    got = adfify(Of(written), torch.zeros(3, 4))(x)
    torch.testing.assert_close(got.mean, original(x), rtol=0, atol=0.02)
    assert (got.variance > 0).all()
