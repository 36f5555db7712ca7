"""The dropout family under three policies: off, sampled, analytic.

Dropout multiplies by b / (1 - p) with b ~ Bernoulli(1 - p): a factor of mean 1 and variance p / (1 - p).
Sampled draws it anew in every pass (Gal & Ghahramani, ICML 2016); analytic takes it as one more independent factor.
The policy decides, not the training flag: uncertainty is asked for in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn.module import ADFModule
from adfify.precision import wide
from adfify.registry import RULES, Case, Rule, Rules, Target, Uncertain, case, register

SAMPLED = Rules(RULES)
"""Overlay: a new mask in every pass."""

ANALYTIC = Rules(RULES)
"""Overlay: the variance of the mask is added."""

POLICIES: dict[str, Rules | None] = {"off": None, "sampled": SAMPLED, "analytic": ANALYTIC}

OFF_SOURCE = "the identity: dropout is off"
SAMPLED_SOURCE = "Monte Carlo dropout, Gal & Ghahramani 2016, section 3; stochastic depth, Huang et al. 2016"
ANALYTIC_SOURCE = "product of independent factors, Goodman 1960, equation 2; mask variance p / (1 - p)"

sampled = partial(SAMPLED.register, family="dropout", exact=True, source=SAMPLED_SOURCE)
analytical = partial(ANALYTIC.register, family="dropout", exact=True, source=ANALYTIC_SOURCE)

# SELU's value at minus infinity, to which alpha dropout sets what it drops (Klambauer et al.
# 2017, section "new dropout").
ALPHA = -1.7580993408473766


def _case(shape: tuple[int, ...]) -> Case:
    return case(Uncertain(shape), 0.5, False)


Factor = Callable[[Tensor, float, tuple[int, ...]], Tensor]
"""What gives a mask for a tensor, of the given variance and shape, and mean 1."""

_factor: ContextVar[Factor | None] = ContextVar("factor", default=None)


@contextmanager
def masks_by(factor: Factor) -> Iterator[None]:
    """Within it, sampled dropout multiplies by what ``factor`` gives instead of by random zeros and ones."""
    token = _factor.set(factor)
    try:
        yield
    finally:
        _factor.reset(token)


def mask_rule(target: Target, rule: Rule) -> Rule | None:
    """The rule that draws masks, for a dropout whose masks are random by the policy of ``rule``; else None."""
    return SAMPLED.find(target) if rule.family == "dropout" and rule is not RULES.find(target) else None


def is_random(module: nn.Module) -> bool:
    """Whether it is an ADF dropout whose masks are random."""
    random = {rule.apply for table in (SAMPLED, ANALYTIC) for rule in table._rules.values()}
    return type(module) in random and getattr(module, "p", getattr(module, "drop_prob", 0.0)) > 0


def draw_mask(x: Tensor, p: float, shared_from: int | None) -> Tensor:
    """A dropout mask of mean 1 for ``x``; from dimension ``shared_from`` on, one draw is shared by all elements."""
    shape = x.shape if shared_from is None else (*x.shape[:shared_from], *[1] * (x.dim() - shared_from))
    factor = _factor.get()
    if factor is not None and p < 1:
        return factor(x, p / (1 - p), tuple(shape))
    keep = torch.full(shape, 1 - p, dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return keep / (1 - p) if p < 1 else torch.zeros_like(keep)


def masked(x: Moments, mask: Tensor) -> Moments:
    """One draw of the mask, given."""
    return Moments(x.mean * mask, x.variance * mask.square())


def stochastic_depth_draw(x: Moments, p: float, shared_from: int, rescale: bool) -> Moments:
    """One draw of stochastic depth, for each sample (``shared_from=1``) or for the batch (0)."""
    mask = draw_mask(x.mean, p, shared_from)
    return masked(x, mask if rescale else mask * (1 - p))


@wide(None)
def analytic(x: Moments, p: float) -> Moments:
    """The mask as an independent random factor; at p = 1 the result is certainly 0."""
    if p >= 1:
        return masked(x, torch.zeros_like(x.mean))
    one = torch.ones_like(x.mean)
    return Moments(*gaussian.product(x.mean, x.variance, one, one * (p / (1 - p))))


def _alpha_affine(p: float) -> tuple[float, float]:
    """The scale a and shift c that give alpha dropout's result mean 0 and variance 1 (Klambauer et al. 2017)."""
    scale = ((1 - p) * (1 + p * ALPHA**2)) ** -0.5
    return scale, -scale * ALPHA * p


@register(
    F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    family="dropout", exact=True, source=OFF_SOURCE, alias=True,
    cases=[case(Uncertain((3, 4)), p, False) for p in (0.5, 0.0, 1.0)],
)  # fmt: skip
def dropout(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    return input


@sampled(F.dropout, torch.dropout)
def sampled_dropout(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    return masked(input, draw_mask(input.mean, p, None))


def _channel_masked(x: Moments, p: float, batched: int) -> Moments:
    """One draw for each channel; with fewer dimensions than ``batched``, torch takes the first one for the channels."""
    return masked(x, draw_mask(x.mean, p, 2 if x.mean.dim() == batched else 1))


@sampled(F.dropout1d, cases=[_case((2, 3, 4)), _case((3, 4))])
def sampled_dropout1d(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    return _channel_masked(input, p, 3)


@sampled(F.dropout2d, cases=[_case((2, 3, 2, 2))])
def sampled_dropout2d(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    # Unlike its siblings, torch's takes the second dimension for the channels whatever there is.
    return masked(input, draw_mask(input.mean, p, 2))


@sampled(F.dropout3d, cases=[_case((2, 3, 2, 2, 2)), _case((3, 2, 2, 2))])
def sampled_dropout3d(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    return _channel_masked(input, p, 5)


def _sampled_alpha(x: Moments, p: float, shared_from: int | None) -> Moments:
    if p >= 1:
        return masked(x, torch.zeros_like(x.mean))
    keep = draw_mask(x.mean, p, shared_from) * (1 - p)
    scale, shift = _alpha_affine(p)
    return Moments((x.mean * keep + ALPHA * (1 - keep)) * scale + shift, x.variance * (keep * scale).square())


@sampled(F.alpha_dropout)
def sampled_alpha_dropout(input: Moments, p: float = 0.5, training: bool = False, inplace: bool = False) -> Moments:
    return _sampled_alpha(input, p, None)


@sampled(F.feature_alpha_dropout)
def sampled_feature_alpha_dropout(
    input: Moments, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Moments:
    return _sampled_alpha(input, p, 2)


# The variance of one element is the same whether its mask is its own or its channel's.
@analytical(F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def analytic_dropout(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    return analytic(input, p)


@analytical(F.alpha_dropout, F.feature_alpha_dropout)
def analytic_alpha_dropout(input: Moments, p: float = 0.5, training: bool = False, inplace: bool = False) -> Moments:
    """y = a (x b + alpha (1 - b)) + c: Var[y] = a^2 (q v + q p (m - alpha)^2), q = 1 - p (law of total variance)."""
    if p >= 1:
        return masked(input, torch.zeros_like(input.mean))
    scale, shift = _alpha_affine(p)
    mean = (input.mean * (1 - p) + ALPHA * p) * scale + shift
    variance = (1 - p) * (input.variance + p * (input.mean - ALPHA).square()) * scale**2
    return Moments(mean, variance)


class _Off(ADFModule):
    """Nothing is dropped."""

    def forward(self, input: Moments) -> Moments:
        return input


_CASES = [case(Uncertain((3, 4, 2)), init={"p": 0.3})]


@register(nn.Dropout, family="dropout", exact=True, source=OFF_SOURCE, alias=True, cases=_CASES)
class Dropout(_Off, nn.Dropout):
    pass


@register(
    nn.Dropout1d,
    family="dropout",
    exact=True,
    source=OFF_SOURCE,
    alias=True,
    cases=[case(Uncertain((2, 3, 4)), init={"p": 0.3}), case(Uncertain((3, 4)), init={"p": 0.3})],
)
class Dropout1d(_Off, nn.Dropout1d):
    pass


@register(
    nn.Dropout2d,
    family="dropout",
    exact=True,
    source=OFF_SOURCE,
    alias=True,
    cases=[case(Uncertain((2, 3, 2, 2)), init={"p": 0.3})],
)
class Dropout2d(_Off, nn.Dropout2d):
    pass


@register(
    nn.Dropout3d,
    family="dropout",
    exact=True,
    source=OFF_SOURCE,
    alias=True,
    cases=[case(Uncertain((2, 3, 2, 2, 2)), init={"p": 0.3}), case(Uncertain((3, 2, 2, 2)), init={"p": 0.3})],
)
class Dropout3d(_Off, nn.Dropout3d):
    pass


@register(nn.AlphaDropout, family="dropout", exact=True, source=OFF_SOURCE, alias=True, cases=_CASES)
class AlphaDropout(_Off, nn.AlphaDropout):
    pass


@register(nn.FeatureAlphaDropout, family="dropout", exact=True, source=OFF_SOURCE, alias=True, cases=_CASES)
class FeatureAlphaDropout(_Off, nn.FeatureAlphaDropout):
    pass


@sampled(nn.Dropout)
class SampledDropout(ADFModule, nn.Dropout):
    def forward(self, input: Moments) -> Moments:
        return sampled_dropout(input, self.p)


@sampled(nn.Dropout1d)
class SampledDropout1d(ADFModule, nn.Dropout1d):
    def forward(self, input: Moments) -> Moments:
        return sampled_dropout1d(input, self.p)


@sampled(nn.Dropout2d)
class SampledDropout2d(ADFModule, nn.Dropout2d):
    def forward(self, input: Moments) -> Moments:
        return sampled_dropout2d(input, self.p)


@sampled(nn.Dropout3d)
class SampledDropout3d(ADFModule, nn.Dropout3d):
    def forward(self, input: Moments) -> Moments:
        return sampled_dropout3d(input, self.p)


@sampled(nn.AlphaDropout)
class SampledAlphaDropout(ADFModule, nn.AlphaDropout):
    def forward(self, input: Moments) -> Moments:
        return _sampled_alpha(input, self.p, None)


@sampled(nn.FeatureAlphaDropout)
class SampledFeatureAlphaDropout(ADFModule, nn.FeatureAlphaDropout):
    def forward(self, input: Moments) -> Moments:
        return _sampled_alpha(input, self.p, 2)


@analytical(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
class AnalyticDropout(ADFModule, nn.Dropout):
    def forward(self, input: Moments) -> Moments:
        return analytic(input, self.p)


@analytical(nn.AlphaDropout, nn.FeatureAlphaDropout)
class AnalyticAlphaDropout(ADFModule, nn.AlphaDropout):
    def forward(self, input: Moments) -> Moments:
        return analytic_alpha_dropout(input, self.p)
