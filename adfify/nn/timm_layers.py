"""Rules for timm's own layer classes: those that torch.fx can't trace through, or whose training flag it would bake in.

Imported only once timm is (see the note in adfify.registry).
"""

from __future__ import annotations

import torch.nn.functional as F
from timm import layers
from timm.layers.padding import pad_same
from timm.layers.pool2d_same import AvgPool2dSame as TimmAvgPool2dSame
from timm.layers.pool2d_same import MaxPool2dSame as TimmMaxPool2dSame
from torch import Tensor

from adfify.moments import Moments
from adfify.nn import affine, dropout, max_pooling, normalization, pooling
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register


def same_padded(x: Moments, kernel: list[int], stride: list[int], dilation: list[int], value: float = 0.0) -> Moments:
    """TensorFlow's SAME padding: the padded constant is certain."""
    mean = pad_same(x.mean, kernel, stride, dilation, value=value)
    return Moments(mean, pad_same(x.variance, kernel, stride, dilation))


def _two(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


_BATCH_NORM_CASES = [
    case(Uncertain((3, 4, 3, 2)), init={"num_features": 4}),
    case(Uncertain((3, 4, 3, 2)), init={"num_features": 4, "apply_act": False}),
]


@register(
    layers.BatchNormAct2d, family="normalization", exact=False, tolerance=0.02,
    source="batch normalisation, then the activation's own rule", cases=_BATCH_NORM_CASES,
)  # fmt: skip
class BatchNormAct2d(normalization._BatchNorm, layers.BatchNormAct2d):
    converts_children = True

    def forward(self, x: Moments) -> Moments:
        activated: Moments = self.act(self.drop(super().forward(x)))
        return activated


@register(
    layers.DropPath, family="dropout", exact=True, source=dropout.OFF_SOURCE, alias=True,
    cases=[case(Uncertain((3, 4, 2)), init={"drop_prob": 0.3})],
)  # fmt: skip
class DropPath(dropout._Off, layers.DropPath):
    pass


@dropout.sampled(layers.DropPath)
class SampledDropPath(ADFModule, layers.DropPath):
    def forward(self, x: Moments) -> Moments:
        return dropout.stochastic_depth_draw(x, self.drop_prob, 1, self.scale_by_keep)


@dropout.analytical(layers.DropPath)
class AnalyticDropPath(ADFModule, layers.DropPath):
    def forward(self, x: Moments) -> Moments:
        kept = dropout.analytic(x, self.drop_prob)
        scale = 1.0 if self.scale_by_keep else 1 - self.drop_prob
        return Moments(kept.mean * scale, kept.variance * scale**2)


@register(
    layers.Conv2dSame, family="affine", exact=True, source=affine.SOURCE,
    cases=[case(Uncertain((2, 4, 7, 6)), init={"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2})],
)  # fmt: skip
class Conv2dSame(ADFModule, layers.Conv2dSame):
    def forward(self, x: Moments) -> Moments:
        padded = same_padded(x, list(self.kernel_size), _two(self.stride), _two(self.dilation))
        return affine.conv2d(padded, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class _StandardisedConv2d(ADFModule):
    """Convolution with weight standardisation (Qiao et al. 2019): the weight is certain, its standardisation too."""

    def standardised(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Moments) -> Moments:
        if self.same_pad:
            x = same_padded(x, list(self.kernel_size), _two(self.stride), _two(self.dilation))  # type: ignore[arg-type]
        return affine.conv2d(
            x,
            self.standardised(),
            self.bias,  # type: ignore[arg-type]
            self.stride,
            self.padding,
            self.dilation,
            self.groups,  # type: ignore[arg-type]
        )


_STANDARDISED_CASES = [
    case(Uncertain((2, 4, 7, 6)), init={"in_channel": 4, "out_channels": 3, "kernel_size": 3, "stride": 2})
]


@register(layers.StdConv2dSame, family="affine", exact=True, source=affine.SOURCE, cases=_STANDARDISED_CASES)
class StdConv2dSame(_StandardisedConv2d, layers.StdConv2dSame):
    def standardised(self) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)


@register(
    layers.ScaledStdConv2dSame, family="affine", exact=True, source=affine.SOURCE,
    cases=[case(Uncertain((2, 4, 7, 6)), init={"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2})],
)  # fmt: skip
class ScaledStdConv2dSame(_StandardisedConv2d, layers.ScaledStdConv2dSame):
    def standardised(self) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        return F.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)


@register(
    TimmAvgPool2dSame, family="pooling", exact=True, source=pooling.AVERAGE,
    cases=[case(Uncertain((2, 3, 7, 6)), init={"kernel_size": 3, "stride": 2})],
)  # fmt: skip
class AvgPool2dSame(ADFModule, TimmAvgPool2dSame):
    def forward(self, x: Moments) -> Moments:
        padded = same_padded(x, _two(self.kernel_size), _two(self.stride), [1, 1])
        return pooling.avg_pool2d(
            padded, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


@register(
    TimmMaxPool2dSame, family="pooling", source=max_pooling.SOURCE, tolerance=max_pooling.TOLERANCE,
    cases=[case(Uncertain((2, 3, 7, 6)), init={"kernel_size": 3, "stride": 2})],
)  # fmt: skip
class MaxPool2dSame(ADFModule, TimmMaxPool2dSame):
    def forward(self, x: Moments) -> Moments:
        lowest = max_pooling.lowest(x.mean)
        padded = same_padded(x, _two(self.kernel_size), _two(self.stride), _two(self.dilation), lowest)
        return max_pooling.max_pool2d(padded, self.kernel_size, self.stride, (0, 0), self.dilation, self.ceil_mode)


from adfify.nn import timm_activations as timm_activations  # noqa: E402  registered with them
from adfify.nn import timm_norms as timm_norms  # noqa: E402  registered with them
