"""Comparisons of uncertain values, and the logic of what they give: masks.

Note [Masks]
A comparison of uncertain values is a random variable that is 0 or 1: Moments of a mean p, the probability that it
holds, in the floating-point dtype of what is compared, and of the variance p (1 - p). It is a number wherever torch
takes it as one (``mask * x``, ``mask.sum()``), and chooses where torch lets it (``torch.where``). Where torch computes
with bools otherwise than with numbers (``mask + mask`` is "or"), conversion refuses it: see adfify.mask_kinds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.gaussian.comparison import positive
from adfify.moments import Moments, lift, variance_dtype
from adfify.nn.layer_norm import dimensions
from adfify.precision import by_itself, widened
from adfify.registry import Uncertain, case, register

NORMAL = "Phi of the difference over its std (A&S 26.2.29); an indicator's variance"
NOWHERE = "a continuous variable equals nothing, with probability 1"
LOGIC = "probabilities of independent events"

comparison = partial(register, family="step", exact=True, source=NORMAL, continuous=False)
equality = partial(register, family="step", exact=True, source=NOWHERE)
logic = partial(register, family="step", exact=True, source=LOGIC)

_ONE = [case(Uncertain((3, 4)), 0.25), case(Uncertain((3, 4)), torch.tensor([0.25, -1.0, 0.5, 0.0]))]
_COMPARED = [*_ONE, case(Uncertain((3, 4)), Uncertain((4,)))]

Operand = Moments | Tensor | float


def _mean(x: Any) -> Any:
    return x.mean if isinstance(x, Moments) else x


def _compared(op: Callable[..., Tensor], sign: int, input: Operand, other: Operand) -> Moments:
    """P[sign (input - other) > 0]; at variance 0 the comparison itself, for which > and >= differ."""
    known = op(_mean(input), _mean(other))
    of = [x.mean for x in (input, other) if isinstance(x, Moments)]
    dtype = of[0].dtype if len(of) == 1 else torch.promote_types(of[0].dtype, of[1].dtype)
    if input is other:
        return lift(known.to(dtype))
    height = sign * (_wide(_mean(input)) - _wide(_mean(other)))
    variance = sum((x.variance for x in (input, other) if isinstance(x, Moments)), torch.zeros_like(height))
    variance = variance.to(height.dtype).expand(height.shape)
    p, spread = positive(height, variance)
    p = torch.where(variance > 0, p, known.to(p.dtype))
    return Moments(p.to(dtype), spread.to(variance_dtype(dtype)))


def _wide(x: Any) -> Any:
    return widened(x) if isinstance(x, Tensor) else float(x)


def _equal(op: Callable[..., Tensor], input: Operand, other: Operand, otherwise: float) -> Moments:
    known = op(_mean(input), _mean(other))
    dtype = next(x.mean.dtype for x in (input, other) if isinstance(x, Moments))
    if input is other:
        return lift(known.to(dtype))
    varies = torch.zeros_like(known)
    for x in (input, other):
        varies = varies | (x.variance > 0) if isinstance(x, Moments) else varies
    return lift(torch.where(varies, otherwise, known.to(dtype)))


@comparison(operator.gt, torch.gt, torch.greater, "gt", "greater", cases=_COMPARED)
@by_itself
def gt(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _compared(torch.gt, 1, input, other)


@comparison(operator.ge, torch.ge, torch.greater_equal, "ge", "greater_equal", cases=_COMPARED)
@by_itself
def ge(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _compared(torch.ge, 1, input, other)


@comparison(operator.lt, torch.lt, torch.less, "lt", "less", cases=_COMPARED)
@by_itself
def lt(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _compared(torch.lt, -1, input, other)


@comparison(operator.le, torch.le, torch.less_equal, "le", "less_equal", cases=_COMPARED)
@by_itself
def le(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _compared(torch.le, -1, input, other)


# Note [Equal to what varies]
# A continuous random variable equals a number with probability 0, and another variable as well: `d == 0` is False
# wherever d has a variance, whatever else depends on d, and the exact comparison where it has none. So it is certain.


@equality(operator.eq, torch.eq, "eq", cases=_ONE)
@by_itself
def eq(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _equal(torch.eq, input, other, 0.0)


@equality(operator.ne, torch.ne, torch.not_equal, "ne", "not_equal", cases=_ONE)
@by_itself
def ne(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    return _equal(torch.ne, input, other, 1.0)


# Numbers that are none: Moments hold finite values


@equality(torch.isnan, "isnan", cases=[case(Uncertain((3, 4)))])
@by_itself
def isnan(input: Moments) -> Moments:
    return lift(torch.isnan(input.mean).to(input.dtype))


@equality(torch.isinf, "isinf", cases=[case(Uncertain((3, 4)))])
@by_itself
def isinf(input: Moments) -> Moments:
    return lift(torch.isinf(input.mean).to(input.dtype))


@equality(torch.isfinite, "isfinite", cases=[case(Uncertain((3, 4)))])
@by_itself
def isfinite(input: Moments) -> Moments:
    return lift(torch.isfinite(input.mean).to(input.dtype))


# Logic, of masks alone: see adfify.mask_kinds


def _of(p: Tensor, dtype: torch.dtype, otherwise: Tensor | None = None) -> Moments:
    """Of an event: its probability, and that of the contrary where it is better known than by 1 - p."""
    contrary = 1 - p if otherwise is None else otherwise
    return Moments(p.to(dtype), (p * contrary).to(variance_dtype(dtype)))


def _contrary(p: Tensor, mask: Moments | Tensor | bool) -> Tensor:
    """1 - p: beside a p near 1, in which it is rounded, as p (1 - p) is what the variance is."""
    if not isinstance(mask, Moments):
        return 1 - p
    likely = p > 0.5
    return torch.where(likely, mask.variance.to(p.dtype) / torch.where(likely, p, 1.0), 1 - p)


def _probabilities(*masks: Moments | Tensor | bool) -> tuple[list[Any], torch.dtype]:
    like = next(x.mean for x in masks if isinstance(x, Moments))
    wide = variance_dtype(like.dtype)
    known = [x.mean if isinstance(x, Moments) else x if isinstance(x, Tensor) else like.new_tensor(x) for x in masks]
    return [x.to(wide) for x in known], like.dtype


def _two_events(
    a: Moments | Tensor | bool, b: Moments | Tensor | bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], torch.dtype]:
    """Of each the probability and that of the contrary."""
    (p, q), dtype = _probabilities(a, b)
    return (p, _contrary(p, a)), (q, _contrary(q, b)), dtype


_EVENT = case(Uncertain((2, 5), mask=True))
_EVENTS = [
    case(Uncertain((2, 5), mask=True), Uncertain((5,), mask=True)),
    case(Uncertain((2, 5), mask=True), torch.tensor([True, False, True, True, False])),
]
_REDUCED = [
    case(Uncertain((4,), mask=True)),
    case(Uncertain((4, 3), mask=True), 1),
    case(Uncertain((2, 5), mask=True), dim=0, keepdim=True),
]


@logic(
    operator.and_,
    operator.iand,
    torch.logical_and,
    torch.bitwise_and,
    "logical_and",
    "bitwise_and",
    "__and__",
    "__iand__",
    cases=_EVENTS,
)
@by_itself
def logical_and(input: Moments | Tensor, other: Moments | Tensor | bool) -> Moments:
    if input is other and isinstance(input, Moments):
        return input
    (p, not_p), (q, not_q), dtype = _two_events(input, other)
    return _of(p * q, dtype, not_p + p * not_q)


@logic(
    operator.or_,
    operator.ior,
    torch.logical_or,
    torch.bitwise_or,
    "logical_or",
    "bitwise_or",
    "__or__",
    "__ior__",
    cases=_EVENTS,
)
@by_itself
def logical_or(input: Moments | Tensor, other: Moments | Tensor | bool) -> Moments:
    if input is other and isinstance(input, Moments):
        return input
    (p, not_p), (q, not_q), dtype = _two_events(input, other)
    return _of(p + q * not_p, dtype, not_p * not_q)


@logic(
    operator.xor,
    operator.ixor,
    torch.logical_xor,
    torch.bitwise_xor,
    "logical_xor",
    "bitwise_xor",
    "__xor__",
    "__ixor__",
    cases=_EVENTS,
)
@by_itself
def logical_xor(input: Moments | Tensor, other: Moments | Tensor | bool) -> Moments:
    if input is other and isinstance(input, Moments):
        return lift(torch.zeros_like(input.mean))
    (p, not_p), (q, not_q), dtype = _two_events(input, other)
    return _of(p * not_q + q * not_p, dtype, p * q + not_p * not_q)


@logic(operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", cases=[_EVENT])
@by_itself
def logical_not(input: Moments) -> Moments:
    return Moments(1 - input.mean, input.variance)


@logic(torch.any, "any", cases=_REDUCED)
@by_itself
def any_(input: Moments, dim: Any = None, keepdim: bool = False) -> Moments:
    (p,), dtype = _probabilities(input)
    return _of(1 - _all(1 - p, dim, keepdim), dtype)


@logic(torch.all, "all", cases=_REDUCED)
@by_itself
def all_(input: Moments, dim: Any = None, keepdim: bool = False) -> Moments:
    (p,), dtype = _probabilities(input)
    return _of(_all(p, dim, keepdim), dtype)


def _all(p: Tensor, dim: Any, keepdim: bool) -> Tensor:
    for axis in dimensions(() if dim is None else dim, p):
        p = torch.prod(p, axis, True)
    if keepdim:
        return p
    return p.squeeze(dimensions(() if dim is None else dim, p))


# A mask as a whole number is the same number


@logic("bool", "int", "long", "short", "byte", "char", cases=[_EVENT])
@by_itself
def counted(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    return input
