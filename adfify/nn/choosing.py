"""Choices by an uncertain mask: `torch.where`, and writes where a mask holds, taken as independent of the values.

Where mask and values are functions of one variable they are composed instead, and where they share one otherwise the
plan refuses them: see adfify.composition and adfify.dependence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.gaussian.comparison import chosen
from adfify.moments import Moments, lift, variance_dtype
from adfify.nn import writing
from adfify.registry import Rule

SOURCE = "law of total variance, the choice being independent of the values"


def where(condition: Moments, input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    """`torch.where` by a mask."""
    p = condition.mean
    either = torch.where(p > 0.5, _mean(input), _mean(other))
    return _chosen(p, input, other, either.dtype if either.is_floating_point() else p.dtype)


def where_method(input: Moments | Tensor, condition: Moments, /, other: Moments | Tensor | float) -> Moments:
    """`Tensor.where`."""
    return where(condition, input, other)


def masked_fill(input: Moments | Tensor, mask: Moments, value: Moments | Tensor | float) -> Moments:
    """`Tensor.masked_fill`: its result has the dtype of what is filled."""
    return _chosen(mask.mean, value, input, input.dtype)


def setitem(input: Moments | Tensor, index: Moments, value: Moments | Tensor | float) -> Moments:
    """``input[mask] = value``, the mask being of the leading dimensions; the result is what ``input`` is then."""
    if isinstance(value, (Moments, Tensor)) and value.shape.numel() != 1:
        raise InputError(
            f"values of shape {tuple(value.shape)} are written where an uncertain mask holds, so that their number is "
            "uncertain: write one number, or torch.where(mask, values, x) with values of the shape of x."
        )
    value = _scalar(value)
    rest = (1,) * (len(input.shape) - len(index.shape))
    return masked_fill(input, Moments(*[part.reshape(*part.shape, *rest) for part in index]), value)


def index_put(
    input: Moments | Tensor, indices: Sequence[Moments], values: Moments | Tensor, accumulate: bool = False
) -> Moments:
    """`Tensor.index_put` by one mask: what torch.export makes of ``input[mask] = value``."""
    return setitem(input, indices[0], values)


def _scalar(value: Any) -> Any:
    if isinstance(value, Moments):
        return Moments(value.mean.reshape(()), value.variance.reshape(()))
    return value.reshape(()) if isinstance(value, Tensor) else value


def _mean(x: Any) -> Any:
    return x.mean if isinstance(x, Moments) else x


def _chosen(p: Tensor, input: Any, other: Any, dtype: torch.dtype) -> Moments:
    wide = variance_dtype(torch.promote_types(dtype, p.dtype))
    a, b = (_moments(x, wide, p.device) for x in (input, other))
    shape = torch.broadcast_shapes(p.shape, a.shape, b.shape)  # type: ignore[no-untyped-call]
    parts = [x.expand(shape) for x in (p.to(wide), *a, *b)]
    mean, variance = chosen(*parts)
    # A choice that is certain takes the value as it is, in its own dtype.
    certain = torch.where(p > 0.5, _mean(input), _mean(other)).to(dtype).expand(shape)
    mean = torch.where((parts[0] == 0) | (parts[0] == 1), certain, mean.to(dtype))
    return Moments(mean, variance.to(variance_dtype(dtype)))


def _moments(x: Any, dtype: torch.dtype, device: torch.device) -> Moments:
    if not isinstance(x, (Moments, Tensor)):
        x = torch.tensor(float(x), dtype=dtype, device=device)
    moments = lift(x)
    return Moments(moments.mean.to(dtype), moments.variance.to(dtype))


def _rule(apply: Callable[..., Any]) -> Rule:
    return Rule((), apply, "arithmetic", False, SOURCE, 0.005, False, {"accumulate": False}, ())


BY_MASK: Mapping[Callable[..., Any], tuple[str, Rule]] = {
    writing.where: ("condition", _rule(where)),
    writing.where_method: ("condition", _rule(where_method)),
    writing.masked_fill: ("mask", _rule(masked_fill)),
    writing.setitem: ("index", _rule(setitem)),
    writing.index_put: ("indices", _rule(index_put)),
}
"""Of rules that take a certain mask: the argument that it is, and the rule that takes an uncertain one."""
