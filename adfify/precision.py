"""Half precision and autocast: means in the network's own dtype, variances in float32.

Note [Variances are held in float32]
    The noise of a camera, a variance of 5e-9, is 0 in float16, and 300^2 overflows it; in bfloat16 a sum of variances
    loses all but two digits. So a variance is float32 whatever the network's dtype, and float64 beside float64. A rule
    is written for one dtype: where it is given anything of half precision, or runs under autocast, it is evaluated in
    float32 throughout, and the mean is the original operation's own, in its own dtype, plus what uncertainty adds to
    it. At variance 0 that is the original's result, bit for bit. What moves elements (the structural rules) needs none
    of this.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from adfify.moments import HALF, ComplexMoments, Moments, held_in

Rule = TypeVar("Rule", bound=Callable[..., Any])
Operation = Callable[..., Any]


def by_itself(rule: Rule) -> Rule:
    """Mark a rule that sees to its own precision, because it writes into its arguments or saves a pass."""
    rule.sees_to_precision = True  # type: ignore[attr-defined]
    return rule


def wide(original: Operation | None, linear: bool = False) -> Callable[[Rule], Rule]:
    """Decorate a rule so that it keeps Note [Variances are held in float32].

    Args:
        original: the operation on plain tensors, with the rule's arguments; None where it can't be called, because it
            draws random numbers: then the mean is the rule's, rounded.
        linear: whether the mean of the result is the original of the means, so that uncertainty adds nothing to it.
    """

    def decorate(rule: Rule) -> Rule:
        if getattr(rule, "sees_to_precision", False):
            return rule
        plain = original if original is None else _out_of_place(original, rule)

        @functools.wraps(rule)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            low, autocast = _found_in((args, kwargs))
            if not low and autocast is None:
                return rule(*args, **kwargs)
            same: list[tuple[Any, Any]] = []
            wide_args, wide_kwargs = (_mapped(part, lambda x: _widened(x, same)) for part in (args, kwargs))
            if autocast is None:
                result, exact = _exactly(rule, plain if not linear else None, wide_args, wide_kwargs)
            else:
                with torch.autocast(autocast, enabled=False):
                    result, exact = _exactly(rule, plain if not linear else None, wide_args, wide_kwargs)
            if plain is None:
                return _mapped(result, lambda x: _rounded(x, _common_dtype((args, kwargs))))
            means, named = (_mapped(part, _mean) for part in (args, kwargs))
            return _joined(result, plain(*means, **named), exact)

        wrapper.widens = (rule, original, linear)  # type: ignore[attr-defined]
        return by_itself(cast(Rule, wrapper))

    return decorate


def original_of(targets: Sequence[Any]) -> Operation | None:
    """The operation on plain tensors that a rule for these targets stands for, out of place; None for modules."""
    operations = [target for target in targets if not isinstance(target, type)]
    if not operations:
        return None
    chosen = next((target for target in operations if not _writes(target)), operations[0])
    operation = _called(chosen) if isinstance(chosen, str) else chosen
    return _on_copy(operation) if _writes(chosen) else operation


def full(op: Operation, x: Tensor, *args: Any) -> Tensor:
    """``op`` of tensors of full precision, autocast or not."""
    if _autocast_on(x) is None:
        return op(x, *args)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        return op(x, *args)  # type: ignore[no-any-return]


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 in float32."""
    return x.float() if x.dtype in HALF else x


def _exactly(rule: Operation, original: Operation | None, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The rule in float32, and what the original is of the means alone."""
    result = rule(*args, **kwargs)
    if original is None:
        return result, None
    means, named = (_mapped(part, _mean) for part in (args, kwargs))
    return result, original(*means, **named)


def _joined(result: Any, base: Any, exact: Any) -> Any:
    """Means from the original in its own dtype, ``base``; ``exact`` is the same in float32, None for a linear one."""
    if isinstance(result, Moments) and isinstance(base, Tensor):
        mean = base if exact is None else _corrected(result.mean, base, exact)
        return Moments(mean, held_in(result.variance, mean.dtype))
    if isinstance(result, ComplexMoments) and isinstance(base, Tensor):
        return ComplexMoments(
            _joined(result.real, base.real, None if exact is None else exact.real),
            _joined(result.imag, base.imag, None if exact is None else exact.imag),
        )
    if isinstance(result, (tuple, list)) and isinstance(base, (tuple, list)):
        parts = (None,) * len(base) if exact is None else exact
        joined = [_joined(*each) for each in zip(result, base, parts, strict=False)]
        return type(result)(*joined) if hasattr(result, "_fields") else type(result)(joined)
    return result


def _corrected(mean: Tensor, base: Tensor, exact: Tensor) -> Tensor:
    """The mean, with the rounding of the original in its own dtype: ``base`` where uncertainty adds nothing."""
    rounding = (base.to(mean.dtype) - exact).detach()
    return (mean + torch.where(rounding.isfinite(), rounding, 0.0)).to(base.dtype)


def _rounded(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Moments) or dtype not in HALF:
        return x
    return Moments(x.mean.to(dtype), x.variance)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A structure of arguments with each leaf changed."""
    if type(value) is tuple or isinstance(value, list):
        return type(value)([_mapped(item, change) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) is tuple or isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _found_in(given: Any) -> tuple[bool, str | None]:
    """Whether anything is of half precision, and the kind of device whose autocast is on."""
    low, autocast = False, None
    for leaf in _leaves(given):
        tensor = leaf.mean if isinstance(leaf, Moments) else leaf
        if isinstance(tensor, Tensor):
            low = low or tensor.dtype in HALF
            autocast = autocast or _autocast_on(tensor)
        elif isinstance(leaf, torch.dtype):
            low = low or leaf in HALF
    return low, autocast


def _autocast_on(x: Tensor) -> str | None:
    kind = x.device.type
    return kind if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) else None


# One object stays one object: a rule may know its operands apart by that (x * x).
def _widened(value: Any, same: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    if not isinstance(value, (Moments, Tensor)):
        return value
    for before, after in same:
        if before is value:
            return after
    wider = Moments(widened(value.mean), widened(value.variance)) if isinstance(value, Moments) else widened(value)
    same.append((value, wider))
    return wider


def _common_dtype(given: Any) -> torch.dtype:
    tensors = [x.mean if isinstance(x, Moments) else x for x in _leaves(given) if isinstance(x, (Moments, Tensor))]
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x.is_floating_point()])


def _mean(value: Any) -> Any:
    return value.mean if isinstance(value, (Moments, ComplexMoments)) else value


def _called(name: str) -> Operation:
    """A method, or an attribute (``".T"``), as a function."""
    if name.startswith("."):
        return lambda x: getattr(x, name[1:])
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def _writes(target: Any) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or (getattr(target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}


def _on_copy(operation: Operation) -> Operation:
    return lambda x, *args, **kwargs: operation(x.clone(), *args, **kwargs)


def _out_of_place(original: Operation, rule: Operation) -> Operation:
    """The original with its argument ``inplace``, where the rule has one, taken for False."""
    names = list(inspect.signature(rule).parameters)
    if "inplace" not in names:
        return original
    place = names.index("inplace")

    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args[:place], **{key: value for key, value in kwargs.items() if key != "inplace"})

    return call
