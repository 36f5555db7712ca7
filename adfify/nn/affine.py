"""Linear maps of their input: exact, the variance passes through the squared weights.

For y = W x + b with independent x: E[y] = W E[x] + b, Var[y] = W^2 Var[x], the square elementwise
(Gast & Roth 2018, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import precision
from adfify.moments import Moments
from adfify.nn.complex_parts import is_complex, product
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "Gast & Roth 2018, section 3.2"

affine = partial(register, family="affine", exact=True, source=SOURCE)


def _affine(op: Callable[..., Tensor], x: Moments, weight: Tensor, bias: Tensor | None, *args: Any) -> Moments:
    mean = op(x.mean, weight, bias, *args)
    return Moments(mean, precision.full(op, x.variance, precision.widened(weight).square(), None, *args))


@affine(
    F.linear,
    torch._C._nn.linear,
    complex=True,
    cases=[case(Uncertain((3, 5)), Certain((4, 5)), Certain((4,))), case(Uncertain((2, 3, 5)), Certain((4, 5)))],
)
@precision.by_itself
def linear(input: Moments, weight: Tensor, bias: Tensor | None = None) -> Any:
    if is_complex(input):
        return product(linear, partial(F.linear, bias=bias), input, weight)
    return _affine(F.linear, input, weight, bias)


@affine(
    nn.Linear,
    complex=True,
    cases=[
        case(Uncertain((3, 5)), init={"in_features": 5, "out_features": 4}),
        case(Uncertain((2, 3, 5)), init={"in_features": 5, "out_features": 4, "bias": False}),
    ],
)
class Linear(ADFModule, nn.Linear):
    def forward(self, input: Moments) -> Moments:
        return linear(input, self.weight, self.bias)  # type: ignore[no-any-return]


@affine(
    F.conv1d,
    torch.conv1d,
    cases=[
        case(Uncertain((2, 4, 9)), Certain((6, 2, 3)), Certain((6,)), stride=2, padding=1, groups=2),
        case(Uncertain((2, 4, 9)), Certain((3, 4, 3)), None, 1, 0, 2),
    ],
)
@precision.by_itself
def conv1d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv1d, input, weight, bias, stride, padding, dilation, groups)


@affine(
    F.conv2d,
    torch.conv2d,
    cases=[
        case(Uncertain((2, 4, 7, 6)), Certain((6, 2, 3, 3)), Certain((6,)), stride=2, padding=1, groups=2),
        case(Uncertain((2, 4, 7, 6)), Certain((3, 4, 3, 2)), None, 1, "same", 2),
    ],
)
@precision.by_itself
def conv2d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv2d, input, weight, bias, stride, padding, dilation, groups)


@affine(
    F.conv3d,
    torch.conv3d,
    cases=[
        case(Uncertain((2, 2, 4, 5, 4)), Certain((3, 2, 3, 2, 2)), Certain((3,)), stride=(1, 2, 1), padding=1),
        case(Uncertain((1, 2, 4, 5, 4)), Certain((4, 1, 2, 2, 2)), None, 1, 0, (1, 2, 2), 2),
    ],
)
@precision.by_itself
def conv3d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv3d, input, weight, bias, stride, padding, dilation, groups)


class _Convolution(ADFModule):
    """What the three convolutions share: torch's own `_conv_forward`, which knows the padding modes."""

    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Moments) -> Moments:
        return _affine(self._conv_forward, input, self.weight, self.bias)


@affine(
    nn.Conv1d,
    cases=[case(Uncertain((2, 4, 9)), init={"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2})],
)
class Conv1d(_Convolution, nn.Conv1d):
    pass


@affine(
    nn.Conv2d,
    cases=[
        case(
            Uncertain((2, 4, 7, 6)),
            init={"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
        ),
        case(
            Uncertain((1, 2, 6, 6)),
            init={
                "in_channels": 2,
                "out_channels": 3,
                "kernel_size": (3, 1),
                "padding": "same",
                "dilation": 2,
                "bias": False,
            },
        ),
    ],
)
class Conv2d(_Convolution, nn.Conv2d):
    pass


@affine(
    nn.Conv3d,
    cases=[
        case(Uncertain((2, 2, 4, 5, 4)), init={"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1})
    ],
)
class Conv3d(_Convolution, nn.Conv3d):
    pass


@affine(
    F.conv_transpose1d,
    torch.conv_transpose1d,
    cases=[
        case(Uncertain((2, 4, 5)), Certain((4, 3, 3)), Certain((3,)), stride=2, padding=1, output_padding=1),
        case(Uncertain((2, 4, 5)), Certain((4, 2, 3)), None, 1, 0, 0, 2, 2),
    ],
)
@precision.by_itself
def conv_transpose1d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv_transpose1d, input, weight, bias, stride, padding, output_padding, groups, dilation)


@affine(
    F.conv_transpose2d,
    torch.conv_transpose2d,
    cases=[
        case(Uncertain((2, 4, 4, 3)), Certain((4, 3, 3, 2)), Certain((6,)), stride=2, padding=1, groups=2),
        case(Uncertain((1, 2, 4, 3)), Certain((2, 3, 2, 2)), None, 2, 0, 1, 1, 2),
    ],
)
@precision.by_itself
def conv_transpose2d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv_transpose2d, input, weight, bias, stride, padding, output_padding, groups, dilation)


@affine(
    F.conv_transpose3d,
    torch.conv_transpose3d,
    cases=[
        case(
            Uncertain((1, 2, 3, 3, 2)), Certain((2, 3, 2, 2, 2)), Certain((3,)), stride=2, padding=1, output_padding=1
        ),
        case(Uncertain((1, 2, 3, 3, 2)), Certain((2, 3, 2, 2, 2)), None, 1, 0, 0, 2, 2),
    ],
)
@precision.by_itself
def conv_transpose3d(
    input: Moments, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Moments:  # fmt: skip
    return _affine(F.conv_transpose3d, input, weight, bias, stride, padding, output_padding, groups, dilation)


class _TransposedConvolution(ADFModule):
    """What the three transposed convolutions share; ``functional`` is the rule of the family member."""

    functional: Callable[..., Moments]
    dimensions: int

    def forward(self, input: Moments, output_size: list[int] | None = None) -> Moments:
        padding = self._output_padding(  # type: ignore[operator]
            input.mean, output_size, self.stride, self.padding, self.kernel_size, self.dimensions, self.dilation
        )
        functional = type(self).functional
        return functional(input, self.weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


@affine(
    nn.ConvTranspose1d,
    cases=[case(Uncertain((2, 4, 5)), init={"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2})],
)
class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    functional, dimensions = staticmethod(conv_transpose1d), 1


@affine(
    nn.ConvTranspose2d,
    cases=[
        case(
            Uncertain((2, 4, 4, 3)),
            init={
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": 3,
                "stride": 2,
                "padding": 1,
                "output_padding": 1,
                "groups": 2,
            },
        )
    ],
)
class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    functional, dimensions = staticmethod(conv_transpose2d), 2


@affine(
    nn.ConvTranspose3d,
    cases=[case(Uncertain((1, 2, 3, 3, 2)), init={"in_channels": 2, "out_channels": 3, "kernel_size": 2, "stride": 2})],
)
class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    functional, dimensions = staticmethod(conv_transpose3d), 3
