"""Padding modules, and padding as torch.export writes it: elements are copied, a padded constant is certain."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from adfify.moments import Moments
from adfify.nn import structural
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register

aten = torch.ops.aten

padded = partial(register, family="structural", exact=True, source=structural.SOURCE, alias=False)

_SHAPES = ((1, 2, 4), (1, 2, 4, 3), (1, 1, 3, 3, 3))


def _widths(dims: int) -> list[int]:
    return [1, 2, 2, 1, 0, 1][: 2 * dims]


def _cases(dims: int, **options: Any) -> list[Any]:
    return [case(Uncertain(_SHAPES[dims - 1]), init={"padding": tuple(_widths(dims)), **options})]


class _Padded(ADFModule):
    padding_mode: ClassVar[str]

    def forward(self, input: Moments) -> Moments:
        return structural.pad(input, self.padding, self.padding_mode, getattr(self, "value", None))


@padded(nn.ConstantPad1d, cases=_cases(1, value=-1.5))
class ConstantPad1d(_Padded, nn.ConstantPad1d):
    padding_mode = "constant"


@padded(nn.ConstantPad2d, cases=_cases(2, value=-1.5))
class ConstantPad2d(_Padded, nn.ConstantPad2d):
    padding_mode = "constant"


@padded(nn.ConstantPad3d, cases=_cases(3, value=-1.5))
class ConstantPad3d(_Padded, nn.ConstantPad3d):
    padding_mode = "constant"


@padded(nn.ZeroPad1d, cases=_cases(1))
class ZeroPad1d(_Padded, nn.ZeroPad1d):
    padding_mode = "constant"


@padded(nn.ZeroPad2d, cases=_cases(2))
class ZeroPad2d(_Padded, nn.ZeroPad2d):
    padding_mode = "constant"


@padded(nn.ZeroPad3d, cases=_cases(3))
class ZeroPad3d(_Padded, nn.ZeroPad3d):
    padding_mode = "constant"


@padded(nn.ReflectionPad1d, cases=_cases(1))
class ReflectionPad1d(_Padded, nn.ReflectionPad1d):
    padding_mode = "reflect"


@padded(nn.ReflectionPad2d, cases=_cases(2))
class ReflectionPad2d(_Padded, nn.ReflectionPad2d):
    padding_mode = "reflect"


@padded(nn.ReflectionPad3d, cases=_cases(3))
class ReflectionPad3d(_Padded, nn.ReflectionPad3d):
    padding_mode = "reflect"


@padded(nn.ReplicationPad1d, cases=_cases(1))
class ReplicationPad1d(_Padded, nn.ReplicationPad1d):
    padding_mode = "replicate"


@padded(nn.ReplicationPad2d, cases=_cases(2))
class ReplicationPad2d(_Padded, nn.ReplicationPad2d):
    padding_mode = "replicate"


@padded(nn.ReplicationPad3d, cases=_cases(3))
class ReplicationPad3d(_Padded, nn.ReplicationPad3d):
    padding_mode = "replicate"


@padded(nn.CircularPad1d, cases=_cases(1))
class CircularPad1d(_Padded, nn.CircularPad1d):
    padding_mode = "circular"


@padded(nn.CircularPad2d, cases=_cases(2))
class CircularPad2d(_Padded, nn.CircularPad2d):
    padding_mode = "circular"


@padded(nn.CircularPad3d, cases=_cases(3))
class CircularPad3d(_Padded, nn.CircularPad3d):
    padding_mode = "circular"


# What torch.export writes once it has decomposed F.pad


@padded(aten.constant_pad_nd, cases=[case(Uncertain((2, 3)), [1, 2], 3.0), case(Uncertain((2, 3, 2)), [0, 1, -1, 2])])
def constant_pad_nd(input: Moments, pad: Any, value: float = 0) -> Moments:
    return structural.pad(input, pad, "constant", value)


def reflection_pad(input: Moments, padding: Any) -> Moments:
    return structural.pad(input, padding, "reflect")


def replication_pad(input: Moments, padding: Any) -> Moments:
    return structural.pad(input, padding, "replicate")


for _dims, _shape in enumerate(_SHAPES, 1):
    _pad = [case(Uncertain(_shape), _widths(_dims))]
    padded(getattr(aten, f"reflection_pad{_dims}d"), cases=_pad)(reflection_pad)
    padded(getattr(aten, f"replication_pad{_dims}d"), cases=_pad)(replication_pad)
