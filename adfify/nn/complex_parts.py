"""Rules of complex values made from rules of real ones: of the real and the imaginary part, see Note [Complex values].

An operation that is linear over the reals acts on each part by itself (:func:`each_part`). A product of two complex
values is made of the four products of their parts (:func:`product`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.gaussian import planar
from adfify.moments import ComplexMoments, Moments, held_in, lift

P = ParamSpec("P")
R = TypeVar("R")


def is_complex(value: Any) -> bool:
    """Whether it is a complex value, random or certain."""
    return isinstance(value, (ComplexMoments, complex)) or (isinstance(value, Tensor) and value.is_complex())


def each_part(
    *numbers: str, original: Callable[..., Tensor] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a rule for real values take complex ones too: it is applied to the real parts and to the imaginary parts.

    Args:
        numbers: arguments of the rule that may be a Python number which is a *value*, with an imaginary part of 0; any
            other number is a dimension or a size, the same for both parts.
        original: the operation, where it rounds complex values otherwise than their parts: the mean is then its own.
    """

    def decorate(rule: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(rule)

        @functools.wraps(rule)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if not any(map(_has_complex, (*args, *kwargs.values()))):
                return rule(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            result = _joined(*[_on_part(rule, signature, bound, numbers, part) for part in (real_of, imag_of)])
            if original is not None:
                mean = original(*map(mean_of, args), **{name: mean_of(value) for name, value in kwargs.items()})
                result = with_mean(mean, result.real.variance, result.imag.variance)
            return result  # type: ignore[no-any-return]

        return wrapper

    return decorate


def _has_complex(value: Any) -> bool:
    return any(map(is_complex, value)) if isinstance(value, (list, tuple)) else is_complex(value)


def _on_part(rule: Any, signature: inspect.Signature, bound: Any, numbers: Any, part: Callable[[Any], Any]) -> Any:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(of(name, item) for item in value)
        if isinstance(value, torch.dtype):
            return value.to_real() if value.is_complex else value
        takes = is_complex(value) or isinstance(value, (Moments, Tensor)) or name in numbers
        return part(value) if takes and not isinstance(value, bool) else value

    changed = inspect.BoundArguments(signature, type(bound)((name, of(name, x)) for name, x in bound.items()))
    return rule(*changed.args, **changed.kwargs)


def _joined(real: Any, imag: Any) -> Any:
    if isinstance(real, (list, tuple)):
        return tuple(ComplexMoments(a, b) for a, b in zip(real, imag, strict=True))
    return ComplexMoments(real, imag)


def real_of(value: Any) -> Any:
    """The real part: of a real value itself."""
    return value.real if is_complex(value) else value


def imag_of(value: Any) -> Any:
    """The imaginary part: of a real value zeros; whole numbers and masks choose or count, and stay."""
    if is_complex(value):
        return value.imag
    if isinstance(value, Moments):
        return lift(torch.zeros_like(value.mean))
    if isinstance(value, Tensor):
        return torch.zeros_like(value) if value.is_floating_point() else value
    return 0.0 if isinstance(value, (int, float)) else value


def parts_of(x: ComplexMoments | Moments | Tensor | complex) -> tuple[Any, Any]:
    """Real and imaginary part, the latter None where there is none."""
    return (x.real, x.imag) if is_complex(x) else (x, None)  # type: ignore[union-attr]


def mean_of(x: Any) -> Any:
    """The expected values, of a certain value itself."""
    return x.mean if isinstance(x, (Moments, ComplexMoments)) else x


def with_mean(mean: Tensor, real_variance: Tensor | None, imag_variance: Tensor | None) -> ComplexMoments:
    """A complex mean with the variances of its parts, 0 where there is none."""
    parts = (mean.real, real_variance), (mean.imag, imag_variance)
    return ComplexMoments(*[
        lift(m) if v is None else Moments(m, held_in(v, m.dtype).expand(m.shape)) for m, v in parts
    ])  # fmt: skip


def product(rule: Callable[[Any, Any], Moments], op: Callable[[Any, Any], Tensor], a: Any, b: Any) -> ComplexMoments:
    """A bilinear ``rule`` of two values of which one at least is complex: (a + ib)(c + id) = ac - bd + i(ad + bc).

    Exact for independent factors, as the two terms of either part have no element in common.

    Args:
        rule: of real values, of which one at least is random.
        op: the original, for the mean: to the last bit.
        a: random or certain.
        b: random or certain.

    Raises:
        InputError: both are the same value; then the terms are not independent.
    """
    if a is b:
        raise InputError("a product of a complex uncertain value with itself has no rule here; compute with its parts.")
    (ar, ai), (br, bi) = parts_of(a), parts_of(b)
    real = _sum_of_variances(rule, (ar, br), (ai, bi))
    imag = _sum_of_variances(rule, (ar, bi), (ai, br))
    return with_mean(op(mean_of(a), mean_of(b)), real, imag)


def _sum_of_variances(rule: Callable[[Any, Any], Moments], *factors: tuple[Any, Any]) -> Tensor | None:
    """Of products of parts; a missing part, and two certain ones, have none."""
    terms = [
        rule(a, b).variance
        for a, b in factors
        if a is not None and b is not None and (isinstance(a, Moments) or isinstance(b, Moments))
    ]
    return sum(terms[1:], terms[0]) if terms else None


def multiplied(mul: Callable[[Any, Any], Moments], a: Any, b: Any) -> ComplexMoments:
    """An elementwise product, one factor at least complex; also of a value with itself or its conjugate."""
    if not (isinstance(a, ComplexMoments) and isinstance(b, ComplexMoments) and a.real is b.real):
        return product(mul, torch.mul, a, b)
    re, im = mul(a.real, a.real), mul(a.imag, a.imag)
    mean, excess_re, excess_im = a.mean * b.mean, re.mean - a.real.mean.square(), im.mean - a.imag.mean.square()
    if a.imag is b.imag:  # a^2 - b^2 + 2 i a b
        cross = mul(a.real, a.imag).variance
        return with_mean(mean + (excess_re - excess_im), re.variance + im.variance, 4 * cross)
    return with_mean(mean + (excess_re + excess_im), re.variance + im.variance, None)  # a^2 + b^2, see `conj`


def divided(div: Callable[[Any, Any], Moments], a: Any, b: Any) -> ComplexMoments:
    """A quotient of two values of which one at least is complex.

    Raises:
        InputError: the divisor is complex and uncertain.
    """
    if isinstance(b, ComplexMoments):
        raise InputError("division by a complex uncertain value has no rule; it has one by a real or a certain value.")
    if not is_complex(b):
        return ComplexMoments(div(a.real, b), div(a.imag, b))
    mean = mean_of(a)
    divisor = torch.tensor(b, dtype=mean.dtype.to_complex(), device=mean.device) if isinstance(b, complex) else b
    inverse = torch.reciprocal(divisor)

    def scaled(x: Moments, factor: Tensor) -> Moments:
        return Moments(x.mean * factor, x.variance * factor * factor)

    return product(scaled, lambda mean, _: mean / b, a, inverse)


def magnitude(x: ComplexMoments) -> Moments:
    """The modulus |z|, exact for independent parts of any variances: see gaussian.planar."""
    certain = torch.abs(x.mean)
    shift, spread = planar.length_shift(x.real.mean, x.real.variance, x.imag.mean, x.imag.variance)
    return Moments(certain + shift.to(certain.dtype), spread)
