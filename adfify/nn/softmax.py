"""Softmax and its logarithm: every output depends on every input, and the moments are approximate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register

# Against Monte Carlo, for logits of std up to 1 (see gaussian.softmax for the measured errors).
softmax_rule = partial(
    register, family="softmax", source="margin to the log-sum-exp of the others, see gaussian.softmax", tolerance=0.1
)


@softmax_rule(
    torch.softmax,
    "softmax",
    cases=[case(Uncertain((4, 5)), 1), case(Uncertain((2, 3, 4)), dim=-2, dtype=torch.float64)],
)
def softmax(input: Moments, dim: int, dtype: torch.dtype | None = None) -> Moments:
    x = input if dtype is None else input.to(dtype)
    return Moments(*gaussian.softmax(x.mean, x.variance, dim))


@softmax_rule(F.softmax, cases=[case(Uncertain((4, 5)), 1), case(Uncertain((4, 5)))])
def functional_softmax(
    input: Moments, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Moments:
    return softmax(input, _dimension(dim, input), dtype)


@softmax_rule(torch.log_softmax, "log_softmax", cases=[case(Uncertain((4, 5)), 1, torch.float64)])
def log_softmax(input: Moments, dim: int, dtype: torch.dtype | None = None) -> Moments:
    x = input if dtype is None else input.to(dtype)
    return Moments(*gaussian.log_softmax(x.mean, x.variance, dim))


@softmax_rule(F.log_softmax, cases=[case(Uncertain((4, 5)), 1)])
def functional_log_softmax(
    input: Moments, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Moments:
    return log_softmax(input, _dimension(dim, input), dtype)


def _dimension(dim: Any, x: Moments) -> int:
    """The dimension that torch chooses where none is given: 1, or 0 for 0, 1 and 3 dimensions."""
    return (0 if x.mean.dim() in (0, 1, 3) else 1) if dim is None else int(dim)


@softmax_rule(nn.Softmax, cases=[case(Uncertain((4, 5)), init={"dim": 1})])
class Softmax(ADFModule, nn.Softmax):
    def forward(self, input: Moments) -> Moments:
        return softmax(input, _dimension(self.dim, input))


@softmax_rule(nn.Softmax2d, cases=[case(Uncertain((2, 3, 2, 2)))])
class Softmax2d(ADFModule, nn.Softmax2d):
    def forward(self, input: Moments) -> Moments:
        return softmax(input, -3)


@softmax_rule(nn.LogSoftmax, cases=[case(Uncertain((4, 5)), init={"dim": 1})])
class LogSoftmax(ADFModule, nn.LogSoftmax):
    def forward(self, input: Moments) -> Moments:
        return log_softmax(input, _dimension(self.dim, input))
