"""Between real and complex values: parts, views, conjugates, polar coordinates. See Note [Complex values]."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.moments import ComplexMoments, Moments, lift
from adfify.nn.arithmetic import mul, neg
from adfify.nn.complex_parts import with_mean
from adfify.nn.elementary import cos, sin
from adfify.nn.structural import SOURCE, cast
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten

taken = partial(register, family="structural", exact=True, source=SOURCE, complex=True)

_Z = case(Uncertain((3, 4), complex=True))
_X = case(Uncertain((3, 4)))


@taken(torch.view_as_real, cases=[_Z])
def view_as_real(input: ComplexMoments) -> Moments:
    parts = (input.real, input.imag)
    return Moments(torch.stack([x.mean for x in parts], -1), torch.stack([x.variance for x in parts], -1))


@taken(torch.view_as_complex, complex=False, cases=[case(Uncertain((3, 4, 2)))])
def view_as_complex(input: Moments) -> ComplexMoments:
    return with_mean(torch.view_as_complex(input.mean), *input.variance.unbind(-1))


@taken(torch.real, ".real", cases=[_Z, _X])
def real(input: Moments | ComplexMoments) -> Moments:
    return input.real if isinstance(input, ComplexMoments) else input


@taken(torch.imag, ".imag", cases=[_Z])
def imag(input: ComplexMoments) -> Moments:
    return input.imag


# Note [A value and its conjugate]
# z * z.conj() is written for |z|^2. The conjugate keeps the very object of the real part, by which a product knows that
# its factors are of one variable.


@taken(torch.conj, torch.conj_physical, "conj", "conj_physical", aten._conj, cases=[_Z])
def conj(input: Any) -> Any:
    return ComplexMoments(input.real, neg(input.imag)) if isinstance(input, ComplexMoments) else input


@taken(torch.resolve_conj, torch.resolve_neg, "resolve_conj", "resolve_neg", cases=[_Z])
def resolve(input: Any) -> Any:
    return input


@taken(".H", ".mH", cases=[case(Uncertain((3, 4), complex=True)), _X])
def adjoint(input: Any) -> Any:
    def turned(x: Moments) -> Moments:
        return Moments(x.mean.mT, x.variance.mT)

    if isinstance(input, ComplexMoments):
        return ComplexMoments(turned(input.real), turned(neg(input.imag)))
    return turned(input)


taken(torch.adjoint, "adjoint", cases=[_Z])(adjoint)


@taken(
    torch.complex, complex=False, alias=False,
    cases=[case(Uncertain((3, 4)), Uncertain((3, 4))), case(Uncertain((3, 4)), Certain((3, 4))),
           case(Certain((3, 4)), Uncertain((4,)))],
)  # fmt: skip
def complex_(real: Moments | Tensor, imag: Moments | Tensor) -> ComplexMoments:
    re, im = lift(real), lift(imag)
    return with_mean(torch.complex(re.mean, im.mean), re.variance, im.variance)


@taken("cfloat", alias=False, cases=[_X])
def cfloat(input: Moments | ComplexMoments) -> ComplexMoments:
    return cast(Tensor.to, input, torch.complex64)  # type: ignore[no-any-return]


@taken("cdouble", alias=False, cases=[_X])
def cdouble(input: Moments | ComplexMoments) -> ComplexMoments:
    return cast(Tensor.to, input, torch.complex128)  # type: ignore[no-any-return]


POLAR = "products with the closed-form moments of sine and cosine"


@register(
    torch.polar, family="arithmetic", source=POLAR, tolerance=1e-3,
    # Its gradient in torch is that of a length, which is positive.
    cases=[case(Uncertain((3, 4), positive=True), Certain((3, 4))),
           case(Certain((3, 4), positive=True), Uncertain((3, 4))),
           case(Uncertain((3, 4), positive=True), Uncertain((3, 4)))],
)  # fmt: skip
def polar(abs: Moments | Tensor, angle: Moments | Tensor) -> ComplexMoments:
    r, t = lift(abs), lift(angle)
    certain = torch.polar(r.mean, t.mean)
    if not isinstance(angle, Moments):
        return with_mean(certain, r.variance * t.mean.cos().square(), r.variance * t.mean.sin().square())
    re, im = mul(abs, cos(angle)), mul(abs, sin(angle))
    shift = torch.complex(re.mean - r.mean * t.mean.cos(), im.mean - r.mean * t.mean.sin())
    return with_mean(certain + shift, re.variance, im.variance)
