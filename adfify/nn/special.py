"""Special functions that exist everywhere, products with logarithms, and other names of elementary functions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adfify.errors import InputError
from adfify.gaussian import special
from adfify.moments import Moments
from adfify.nn import elementary
from adfify.nn.arithmetic import scaled
from adfify.registry import Certain, Uncertain, case, register

GRID = case(Uncertain((4, 3)))

elementwise = partial(register, family="elementwise", exact=True, source="quadrature", cases=[GRID])
# For inputs within 3 std of 0 to 3; beyond, what grows like exp(|x|) is dominated by rare draws.
growing = partial(register, family="elementwise", source="quadrature", tolerance=0.01, cases=[GRID])


@elementwise(torch.asinh, torch.arcsinh, "asinh", "arcsinh", torch.asinh_, torch.arcsinh_, "asinh_", "arcsinh_")
def asinh(input: Moments) -> Moments:
    return Moments(*special.asinh(input.mean, input.variance))


@elementwise(torch.special.ndtr)
def ndtr(input: Moments) -> Moments:
    return Moments(*special.ndtr(input.mean, input.variance))


@elementwise(torch.special.log_ndtr)
def log_ndtr(input: Moments) -> Moments:
    return Moments(*special.log_ndtr(input.mean, input.variance))


@growing(
    torch.sinc, torch.special.sinc, "sinc", torch.sinc_, "sinc_", cases=[case(Uncertain((4, 3), within=(-8.0, 8.0)))]
)
def sinc(input: Moments) -> Moments:
    return Moments(*special.sinc(input.mean, input.variance))


@growing(torch.i0, torch.special.i0, "i0", torch.i0_, "i0_")
def i0(input: Moments) -> Moments:
    return Moments(*special.i0(input.mean, input.variance))


@growing(torch.special.i1)
def i1(input: Moments) -> Moments:
    return Moments(*special.i1(input.mean, input.variance))


@growing(torch.special.i0e)
def i0e(input: Moments) -> Moments:
    return Moments(*special.i0e(input.mean, input.variance))


@elementwise(torch.special.i1e)
def i1e(input: Moments) -> Moments:
    return Moments(*special.i1e(input.mean, input.variance))


@register(
    torch.float_power, "float_power", family="elementwise", exact=True, source=elementary.WHOLE,
    cases=[case(Uncertain((4, 3)), 2), case(Uncertain((4, 3)), 3.0)],
)  # fmt: skip
def float_power(input: Moments, exponent: Tensor | float) -> Moments:
    return elementary._certain_power(input.to(torch.float64), exponent)


@register(
    torch.xlogy, torch.special.xlogy, "xlogy", "xlogy_", family="arithmetic",
    source="a factor times a logarithm, independent", tolerance=0.01,
    cases=[
        case(Certain((4, 3), positive=True), Uncertain((4, 3), positive=True)),
        case(Uncertain((4, 3)), Certain((3,), positive=True)),
    ],
)  # fmt: skip
def xlogy(input: Moments | Tensor | float, other: Moments | Tensor | float) -> Moments:
    if isinstance(input, Moments):
        if isinstance(other, Moments):
            raise InputError("xlogy(x, y) with both x and y uncertain has no rule; write it as x * log(y).")
        slope = torch.xlogy(torch.ones_like(input.mean), other)
        return Moments(torch.xlogy(input.mean, other), input.variance * slope * slope)
    assert isinstance(other, Moments)
    spread = elementary.log(other)
    factor = torch.as_tensor(input, dtype=other.dtype, device=other.device)
    certain = torch.xlogy(factor, other.mean.detach())  # 0 where the factor is, whatever the logarithm
    return Moments(
        torch.where(factor == 0, certain, factor * spread.mean),
        torch.where(factor == 0, 0.0, scaled(spread, factor).variance),
    )


@register(
    torch.nan_to_num, "nan_to_num", family="elementwise", exact=True,
    source="a Gaussian value is a number; what is none is certain", cases=[GRID],
)  # fmt: skip
def nan_to_num(
    input: Moments, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Moments:
    mean = torch.nan_to_num(input.mean, nan, posinf, neginf)
    return Moments(mean, torch.where(input.mean.isfinite(), input.variance, 0.0))
