"""Averages and maxima over windows.

An average of n independent elements has the average variance divided by n once more: the sum of the variances over
the *window's* count squared (the published code divides by the whole image's). A maximum is taken pairwise by
Clark's formulas, in a balanced tree along each axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.moments import Moments
from adfify.nn.complex_parts import each_part
from adfify.nn.module import ADFModule, per_dimension
from adfify.registry import Uncertain, case, register

AVERAGE = "linear map: the variance of a mean of independent elements"

average = partial(register, family="pooling", exact=True, source=AVERAGE)


@average(
    torch.mean,
    "mean",
    complex=True,
    cases=[
        case(Uncertain((2, 3, 4)), (1, 2), keepdim=True),
        case(Uncertain((2, 3, 4)), -1),
        case(Uncertain((2, 3))),
        case(Uncertain((2, 3)), 0, dtype=torch.float64),
    ],
)
@each_part(original=torch.mean)
def mean(input: Moments, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Moments:
    result = torch.mean(input.mean, dim, keepdim, dtype=dtype)
    variance = torch.mean(input.variance, dim, keepdim, dtype=dtype)
    count = input.mean.numel() or 1  # an empty batch
    return Moments(result, variance * (result.numel() / count))


@average(
    torch.sum,
    "sum",
    complex=True,
    cases=[
        case(Uncertain((2, 3, 4)), (1, 2), keepdim=True),
        case(Uncertain((2, 3))),
        case(Uncertain((2, 3)), 0, dtype=torch.float64),
    ],
)
@each_part(original=torch.sum)
def sum(input: Moments, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Moments:
    total = torch.sum(input.mean, dim, keepdim, dtype=dtype)
    return Moments(total, torch.sum(input.variance, dim, keepdim, dtype=dtype))


def _avg_pool(
    dims: int, x: Moments, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor: int | None = None,
) -> Moments:  # fmt: skip
    kernel, padding = per_dimension(kernel_size, dims), per_dimension(padding, dims)
    stride = kernel if stride in (None, [], ()) else per_dimension(stride, dims)
    window = (kernel, stride, padding, ceil_mode, count_include_pad)
    if dims == 1:
        average, variance = F.avg_pool1d(x.mean, *window), F.avg_pool1d(x.variance, *window)
    else:
        pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        average, variance = pool(x.mean, *window, divisor), pool(x.variance, *window, divisor)
    if divisor is not None:
        return Moments(average, variance / abs(divisor))
    if not ceil_mode and (count_include_pad or not any(padding)):
        return Moments(average, variance / torch.Size(kernel).numel())
    return Moments(average, variance * _inverse_counts(x.mean, *window))


def _inverse_counts(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool
) -> Tensor:
    """One over the divisor that torch uses for each window, where borders make it differ from window to window."""
    size = x.shape[-len(kernel) :]
    ones = x.new_ones((1, 1, *[1] * (2 - len(kernel)), *size))
    widen = ((1,) * (2 - len(kernel)), (0,) * (2 - len(kernel)))  # one dimension is pooled as a row of two
    args = (widen[0] + kernel, widen[0] + stride, widen[1] + padding, ceil_mode, count_include_pad)
    pool = F.avg_pool3d if len(kernel) == 3 else F.avg_pool2d
    inverse = pool(ones, *args) / pool(ones, *args, divisor_override=1)
    return inverse.reshape(inverse.shape[-len(kernel) :])


@average(
    F.avg_pool1d,
    torch.avg_pool1d,
    cases=[case(Uncertain((2, 3, 7)), 3, 2, 1, count_include_pad=False), case(Uncertain((2, 3, 8)), 3, ceil_mode=True)],
)
def avg_pool1d(
    input: Moments, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Moments:  # fmt: skip
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


@average(
    F.avg_pool2d,
    torch._C._nn.avg_pool2d,
    cases=[
        case(Uncertain((2, 3, 6, 6)), 2),
        case(Uncertain((2, 3, 7, 6)), (3, 2), 2, 1, True, False),
        case(Uncertain((1, 2, 5, 5)), 3, 2, 1, ceil_mode=True),
        case(Uncertain((1, 2, 5, 5)), 2, divisor_override=3),
    ],
)
def avg_pool2d(
    input: Moments, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Moments:  # fmt: skip
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@average(
    F.avg_pool3d,
    torch._C._nn.avg_pool3d,
    cases=[
        case(Uncertain((1, 2, 4, 5, 4)), 2, 2, 1, count_include_pad=False),
        case(Uncertain((1, 2, 4, 5, 4)), 2, ceil_mode=True),
        case(Uncertain((1, 2, 4, 5, 4)), 2, divisor_override=3),
    ],
)
def avg_pool3d(
    input: Moments, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Moments:  # fmt: skip
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@average(nn.AvgPool1d, cases=[case(Uncertain((2, 3, 7)), init={"kernel_size": 3, "padding": 1})])
class AvgPool1d(ADFModule, nn.AvgPool1d):
    def forward(self, input: Moments) -> Moments:
        return avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


@average(
    nn.AvgPool2d,
    cases=[
        case(Uncertain((2, 3, 7, 6)), init={"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False})
    ],
)
class AvgPool2d(ADFModule, nn.AvgPool2d):
    def forward(self, input: Moments) -> Moments:
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


@average(nn.AvgPool3d, cases=[case(Uncertain((1, 2, 4, 4, 4)), init={"kernel_size": 2})])
class AvgPool3d(ADFModule, nn.AvgPool3d):
    def forward(self, input: Moments) -> Moments:
        return avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


def _adaptive_avg_pool(dims: int, x: Moments, output_size: Any) -> Moments:
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    average, variance = pool(x.mean, output_size), pool(x.variance, output_size)
    for axis in range(-dims, 0):
        # Bin i of n over a length L runs from floor(i L / n) to ceil((i + 1) L / n).
        length, bins = x.mean.shape[axis], average.shape[axis]
        i = torch.arange(bins, device=x.mean.device)
        count = ((i + 1) * length + bins - 1) // bins - i * length // bins
        variance = variance / count.to(variance.dtype).reshape(-1, *[1] * (-axis - 1))
    return Moments(average, variance)


@average(F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, cases=[case(Uncertain((2, 3, 7)), 3)])
def adaptive_avg_pool1d(input: Moments, output_size: Any) -> Moments:
    return _adaptive_avg_pool(1, input, output_size)


@average(
    F.adaptive_avg_pool2d,
    torch._C._nn.adaptive_avg_pool2d,
    cases=[case(Uncertain((2, 3, 7, 6)), (3, 1)), case(Uncertain((2, 3, 2, 6)), (7, 6))],
)
def adaptive_avg_pool2d(input: Moments, output_size: Any) -> Moments:
    return _adaptive_avg_pool(2, input, output_size)


@average(F.adaptive_avg_pool3d, torch._C._nn.adaptive_avg_pool3d, cases=[case(Uncertain((1, 2, 4, 5, 3)), 2)])
def adaptive_avg_pool3d(input: Moments, output_size: Any) -> Moments:
    return _adaptive_avg_pool(3, input, output_size)


@average(nn.AdaptiveAvgPool1d, cases=[case(Uncertain((2, 3, 7)), init={"output_size": 2})])
class AdaptiveAvgPool1d(ADFModule, nn.AdaptiveAvgPool1d):
    def forward(self, input: Moments) -> Moments:
        return adaptive_avg_pool1d(input, self.output_size)


@average(nn.AdaptiveAvgPool2d, cases=[case(Uncertain((2, 3, 5, 6)), init={"output_size": (2, 1)})])
class AdaptiveAvgPool2d(ADFModule, nn.AdaptiveAvgPool2d):
    def forward(self, input: Moments) -> Moments:
        return adaptive_avg_pool2d(input, self.output_size)


@average(nn.AdaptiveAvgPool3d, cases=[case(Uncertain((1, 2, 4, 5, 3)), init={"output_size": 2})])
class AdaptiveAvgPool3d(ADFModule, nn.AdaptiveAvgPool3d):
    def forward(self, input: Moments) -> Moments:
        return adaptive_avg_pool3d(input, self.output_size)
