"""Power-average pooling: the root of a sum of squares, or for the power 1 a plain sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adfify.gaussian import statistics
from adfify.moments import Moments
from adfify.nn import pooling
from adfify.nn.layer_norm import added
from adfify.nn.module import ADFModule, per_dimension
from adfify.nn.statistics import ROOT
from adfify.registry import OneOf, Uncertain, case, register

lp = partial(register, family="pooling", source=ROOT, tolerance=0.05, only={"norm_type": OneOf(2, 1)})


def _lp_pool(dims: int, x: Moments, power: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Moments:
    kernel = per_dimension(kernel_size, dims)
    pool = partial(
        pooling._avg_pool, dims, kernel_size=kernel, stride=stride, padding=0, ceil_mode=ceil_mode,
        count_include_pad=True,
    )  # fmt: skip
    count = torch.Size(kernel).numel()
    if power == 1:
        average = pool(x)
        # As in the original: no absolute values, yet written with signs.
        signed = torch.sign(average.mean) * torch.relu(average.mean.abs())
        return Moments(signed.mul(count).pow(1.0), average.variance * count**2)
    squares = pool(Moments(x.mean.pow(2), x.variance)).mean.mul(count)
    certain = torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).pow(0.5), 0.0)
    unit = statistics.size_of(x.mean, x.variance, tuple(range(-dims, 0)))
    square, variance = (x.mean / unit).square(), x.variance / unit / unit
    excess = pool(Moments(variance, variance)).mean
    total = pool(Moments(square, variance * (4 * square + 2 * variance)))
    shift, spread = statistics.root_shift(total.mean * count, count * excess, count**2 * total.variance, certain / unit)
    return added(certain, unit * shift, unit * unit * spread)


@lp(F.lp_pool1d, cases=[case(Uncertain((2, 3, 8)), 2, 3, 2), case(Uncertain((2, 3, 8)), 1, 3, ceil_mode=True)])
def lp_pool1d(
    input: Moments, norm_type: float, kernel_size: int, stride: Any = None, ceil_mode: bool = False
) -> Moments:
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


@lp(F.lp_pool2d, cases=[case(Uncertain((2, 3, 7, 6)), 2, (3, 2), 2), case(Uncertain((1, 2, 5, 5)), 2.0, 3, 2, True)])
def lp_pool2d(
    input: Moments, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Moments:
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


@lp(F.lp_pool3d, cases=[case(Uncertain((1, 2, 4, 5, 4)), 2, 2)])
def lp_pool3d(
    input: Moments, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Moments:
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


@lp(nn.LPPool1d, cases=[case(Uncertain((2, 3, 8)), init={"norm_type": 2, "kernel_size": 3})])
class LPPool1d(ADFModule, nn.LPPool1d):
    def forward(self, input: Moments) -> Moments:
        return _lp_pool(1, input, float(self.norm_type), int(self.kernel_size), self.stride, self.ceil_mode)  # type: ignore[arg-type]


@lp(
    nn.LPPool2d,
    cases=[
        case(Uncertain((2, 3, 7, 6)), init={"norm_type": 2, "kernel_size": (3, 2), "stride": 2}),
        case(Uncertain((2, 3, 7, 6)), init={"norm_type": 1, "kernel_size": 2, "ceil_mode": True}),
    ],
)
class LPPool2d(ADFModule, nn.LPPool2d):
    def forward(self, input: Moments) -> Moments:
        return _lp_pool(2, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


@lp(nn.LPPool3d, cases=[case(Uncertain((1, 2, 4, 5, 4)), init={"norm_type": 2, "kernel_size": 2})])
class LPPool3d(ADFModule, nn.LPPool3d):
    def forward(self, input: Moments) -> Moments:
        return _lp_pool(3, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)
