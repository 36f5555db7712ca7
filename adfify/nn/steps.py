"""Rounding, signs and remainders: functions that are constant, or linear, between jumps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.gaussian import steps
from adfify.gaussian.comparison import positive
from adfify.moments import Moments, variance_dtype
from adfify.precision import by_itself, widened
from adfify.registry import Certain, Rule, Uncertain, case, register

COUNTED = "sums of Phi over the jumps; Fourier series of the fraction where there are many (A&S 26.2.17)"
NORMAL = "Phi of the mean over the std (A&S 26.2.29)"

stepping = partial(register, family="step", exact=True, source=COUNTED, continuous=False)

GRID = case(Uncertain((3, 4)))
_DIVIDED = [case(Uncertain((3, 4)), 0.7), case(Uncertain((3, 4)), Certain((4,), positive=True))]


def _moments(original: Callable[[Tensor], Tensor], of: Callable[..., Any], x: Moments, scale: Any = 1.0) -> Moments:
    """Of ``scale`` times a function of x, whose own value at variance 0 is ``original``'s."""
    exact = original(x.mean)
    mean, variance = of(widened(x.mean).double(), x.variance.double())
    mean, variance = mean * scale, variance * scale * scale
    mean = torch.where(x.variance > 0, mean, exact.to(mean.dtype))
    variance = torch.where(x.variance > 0, variance, 0.0)
    return Moments(mean.to(exact.dtype), variance.to(variance_dtype(exact.dtype)))


@stepping(torch.floor, "floor", torch.floor_, "floor_", cases=[GRID])
@by_itself
def floor(input: Moments) -> Moments:
    return _moments(torch.floor, steps.floor, input)


@stepping(torch.ceil, "ceil", torch.ceil_, "ceil_", cases=[GRID])
@by_itself
def ceil(input: Moments) -> Moments:
    return _moments(torch.ceil, steps.ceil, input)


@stepping(
    torch.round,
    "round",
    torch.round_,
    "round_",
    torch.special.round,
    cases=[GRID, case(Uncertain((3, 4)), decimals=1)],
)
@by_itself
def round(input: Moments, *, decimals: int = 0) -> Moments:
    scale = 10.0**decimals

    def of(mean: Tensor, variance: Tensor) -> Any:
        return steps.round(mean * scale, variance * scale * scale)

    return _moments(lambda x: torch.round(x, decimals=decimals), of, input, 1 / scale)


@stepping(torch.trunc, "trunc", torch.trunc_, "trunc_", torch.fix, "fix", torch.fix_, "fix_", cases=[GRID])
@by_itself
def trunc(input: Moments) -> Moments:
    return _moments(torch.trunc, steps.trunc, input)


@stepping(torch.frac, "frac", torch.frac_, "frac_", cases=[GRID])
@by_itself
def frac(input: Moments) -> Moments:
    return _moments(torch.frac, steps.signed_fraction, input)


@stepping(torch.sign, "sign", "sign_", torch.sgn, "sgn", "sgn_", source=NORMAL, cases=[GRID])
@by_itself
def sign(input: Moments) -> Moments:
    def of(mean: Tensor, variance: Tensor) -> Any:
        p, spread = positive(mean, variance)
        return 2 * p - 1, 4 * spread

    return _moments(torch.sign, of, input)


@stepping(torch.heaviside, "heaviside", "heaviside_", source=NORMAL, cases=[case(Uncertain((3, 4)), Certain((4,)))])
@by_itself
def heaviside(input: Moments, values: Tensor) -> Moments:
    return _moments(lambda x: torch.heaviside(x.detach(), values), positive, input)


# By a certain divisor


def _divided(
    original: Callable[[Tensor], Tensor], of: Callable[..., Any], x: Moments, other: Tensor | float, rescaled: bool
) -> Moments:
    """Of a function of x / other, in float64, for a whole quotient jumps."""
    # torch takes a number in the dtype of the tensor beside it.
    divisor = other if isinstance(other, Tensor) else torch.tensor(other, dtype=x.dtype, device=x.device)
    divisor = divisor.double()

    def quotient(mean: Tensor, variance: Tensor) -> Any:
        mean = mean / divisor
        return of(mean, (variance / divisor / divisor).expand(mean.shape))

    exact = original(x.mean)
    wide = Moments(x.mean.expand(exact.shape), x.variance.expand(exact.shape))
    return _moments(lambda _: exact, quotient, wide, divisor if rescaled else 1.0)


@stepping(operator.mod, operator.imod, torch.remainder, "remainder", "remainder_", cases=_DIVIDED)
@by_itself
def remainder(input: Moments, other: Tensor | float) -> Moments:
    return _divided(lambda x: torch.remainder(x, other), steps.fraction, input, other, True)


@stepping(torch.fmod, "fmod", "fmod_", cases=_DIVIDED)
@by_itself
def fmod(input: Moments, other: Tensor | float) -> Moments:
    return _divided(lambda x: torch.fmod(x, other), steps.signed_fraction, input, other, True)


@stepping(operator.floordiv, operator.ifloordiv, torch.floor_divide, "floor_divide", "floor_divide_", cases=_DIVIDED)
@by_itself
def floor_divide(input: Moments, other: Tensor | float) -> Moments:
    return _divided(lambda x: torch.floor_divide(x.detach(), other), steps.floor, input, other, False)


def divided_by_floor(input: Moments, other: Tensor | float, *, rounding_mode: str) -> Moments:
    """`torch.div(..., rounding_mode="floor")`."""
    return _divided(lambda x: torch.div(x, other, rounding_mode="floor"), steps.floor, input, other, False)


def divided_by_trunc(input: Moments, other: Tensor | float, *, rounding_mode: str) -> Moments:
    """`torch.div(..., rounding_mode="trunc")`."""
    return _divided(lambda x: torch.div(x, other, rounding_mode="trunc"), steps.trunc, input, other, False)


def _rule(apply: Callable[..., Moments]) -> Rule:
    return Rule((), apply, "step", True, COUNTED, 0.0, False, {}, (), False)


BY_ROUNDING: Mapping[str, Rule] = {"floor": _rule(divided_by_floor), "trunc": _rule(divided_by_trunc)}
"""The rules of `torch.div` by its rounding_mode."""

WHOLE = frozenset({floor, ceil, round, trunc, frac, remainder, fmod, floor_divide, divided_by_floor, divided_by_trunc})
"""What jumps at every whole number."""
EVERY = WHOLE | {sign, heaviside}
