"""Functions that exist on an interval only: inverses of circular and hyperbolic functions, logit, entropy."""

from __future__ import annotations

from functools import partial

import torch

from adfify.gaussian import bounded
from adfify.moments import Moments
from adfify.registry import Uncertain, case, register

SOURCE = "by quadrature, given that x lies in the domain (Johnson, Kotz & Balakrishnan 1994, section 13.10.1)"
# Against fine sums, with std .001 to 3 and the ends 4 std beyond the mean and more inside: std off by 1e-4, and in
# float32 by .5 % at most, for lgamma next to its minimum.
inverse = partial(register, family="elementwise", source=SOURCE, tolerance=0.01)

UNIT = case(Uncertain((4, 3), within=(0.0, 1.0)))
SYMMETRIC = case(Uncertain((4, 3), within=(-1.0, 1.0)))
POSITIVE = case(Uncertain((4, 3), positive=True))


@inverse(torch.asin, torch.arcsin, "asin", "arcsin", torch.asin_, torch.arcsin_, "asin_", "arcsin_", cases=[SYMMETRIC])
def asin(input: Moments) -> Moments:
    return Moments(*bounded.asin(input.mean, input.variance))


@inverse(torch.acos, torch.arccos, "acos", "arccos", torch.acos_, torch.arccos_, "acos_", "arccos_", cases=[SYMMETRIC])
def acos(input: Moments) -> Moments:
    return Moments(*bounded.acos(input.mean, input.variance))


@inverse(
    torch.atanh, torch.arctanh, "atanh", "arctanh", torch.atanh_, torch.arctanh_, "atanh_", "arctanh_",
    cases=[SYMMETRIC],
)  # fmt: skip
def atanh(input: Moments) -> Moments:
    return Moments(*bounded.atanh(input.mean, input.variance))


@inverse(
    torch.acosh, torch.arccosh, "acosh", "arccosh", torch.acosh_, torch.arccosh_, "acosh_", "arccosh_",
    cases=[case(Uncertain((4, 3), within=(1.0, 5.0)))],
)  # fmt: skip
def acosh(input: Moments) -> Moments:
    return Moments(*bounded.acosh(input.mean, input.variance))


@inverse(torch.erfinv, torch.special.erfinv, "erfinv", "erfinv_", cases=[SYMMETRIC])
def erfinv(input: Moments) -> Moments:
    return Moments(*bounded.erfinv(input.mean, input.variance))


@inverse(torch.special.ndtri, cases=[UNIT])
def ndtri(input: Moments) -> Moments:
    return Moments(*bounded.ndtri(input.mean, input.variance))


@inverse(torch.special.entr, cases=[POSITIVE])
def entr(input: Moments) -> Moments:
    return Moments(*bounded.entropy(input.mean, input.variance))


@inverse(torch.lgamma, torch.special.gammaln, "lgamma", "lgamma_", cases=[POSITIVE])
def lgamma(input: Moments) -> Moments:
    return Moments(*bounded.log_gamma(input.mean, input.variance))


@inverse(
    torch.logit, torch.special.logit, "logit", torch.logit_, "logit_",
    cases=[UNIT, case(Uncertain((4, 3), within=(0.0, 1.0)), 0.1)],
)  # fmt: skip
def logit(input: Moments, eps: float | None = None) -> Moments:
    return Moments(*bounded.logit(input.mean, input.variance, eps))
