"""Resizing, sliding windows and padding: linear maps with certain weights, so exact.

A resized element is a weighted sum of independent ones, so its variance takes the *squared* weights. They come from
torch itself: an identity matrix, resized with the same options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.moments import Moments
from adfify.nn import pooling, structural
from adfify.nn.module import ADFModule, per_dimension
from adfify.registry import Uncertain, case, register

aten = torch.ops.aten

RESIZED = "linear map: variance by the squared interpolation weights"
OVERLAPS = "linear map: variances of overlapping elements add"

resized = partial(register, family="pooling", exact=True, source=RESIZED)
moved = partial(register, family="structural", exact=True, source=structural.SOURCE, alias=False)

_LINEAR = ("linear", "bilinear", "trilinear", "bicubic")


@resized(
    F.interpolate,
    cases=[
        case(Uncertain((1, 2, 3, 4)), (5, 3), mode="bilinear"),
        case(Uncertain((1, 2, 4, 3)), scale_factor=1.5, mode="bilinear", align_corners=True),
        case(Uncertain((1, 1, 4, 3)), (7, 5), mode="bicubic"),
        case(Uncertain((1, 1, 5, 6)), (3, 2), mode="bicubic", antialias=True),
        case(Uncertain((1, 1, 5, 6)), (3, 2), mode="bilinear", antialias=True),
        case(Uncertain((1, 2, 5)), scale_factor=(1.7,), mode="linear", recompute_scale_factor=True),
        case(Uncertain((1, 1, 2, 3, 3)), scale_factor=(2, 1.5, 0.7), mode="trilinear"),
        case(Uncertain((1, 2, 3, 4)), scale_factor=2),
        case(Uncertain((1, 2, 3, 4)), (5, 3), mode="nearest-exact"),
        case(Uncertain((1, 2, 5, 4)), (2, 3), mode="area"),
    ],
)
def interpolate(
    input: Moments, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Moments:  # fmt: skip
    """Separable: the weights of each axis apply to it alone, and so do their squares."""
    options = (align_corners, recompute_scale_factor, antialias)
    mean = F.interpolate(input.mean, size, scale_factor, mode, *options)
    dims = input.mean.dim() - 2
    if mode == "area":
        return pooling._adaptive_avg_pool(dims, input, mean.shape[2:])
    if mode not in _LINEAR:
        return Moments(mean, F.interpolate(input.variance, size, scale_factor, mode, *options))
    sizes: tuple[Any, ...] = (None,) * dims if size is None else per_dimension(size, dims)
    scales: tuple[Any, ...] = (None,) * dims if scale_factor is None else per_dimension(scale_factor, dims)
    along = "bicubic" if mode == "bicubic" else "bilinear"

    def one_axis(axis: int) -> Callable[[Tensor], Tensor]:
        to = None if sizes[axis] is None else (1, sizes[axis])
        by = None if scales[axis] is None else (1.0, float(scales[axis]))
        return lambda eye: F.interpolate(eye, to, by, along, *options)

    return Moments(mean, _by_squared_weights(input.variance, mean, [one_axis(axis) for axis in range(dims)]))


def _by_squared_weights(variance: Tensor, mean: Tensor, resizers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The variance of ``mean``: its last axes are resized by linear maps, given as what resizes [n, 1, 1, n]."""
    # Not [n, 1, n, 1]: torch's antialiased kernel resizes a column of width 1 wrongly (seen with 2.14).
    exact = variance.double() if variance.dtype == torch.float64 else variance.float()
    for axis, resize in zip(range(-len(resizers), 0), resizers, strict=True):
        length = exact.shape[axis]
        eye = torch.eye(length, dtype=exact.dtype, device=exact.device).reshape(length, 1, 1, length)
        weight = resize(eye).reshape(length, -1)
        exact = torch.matmul(exact.movedim(axis, -1), weight.square()).movedim(-1, axis)
    return laid_out_like(exact.to(mean.dtype), mean)


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """x, of the same shape, in the memory format of the other."""
    last = other.dim() == 4 and not other.is_contiguous() and other.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Upsample(ADFModule):
    def forward(self, input: Moments) -> Moments:
        recompute = getattr(self, "recompute_scale_factor", None)
        return interpolate(input, self.size, self.scale_factor, self.mode, self.align_corners, recompute)  # type: ignore[arg-type]


@resized(
    nn.Upsample,
    cases=[
        case(Uncertain((1, 2, 3, 4)), init={"scale_factor": 2, "mode": "bilinear"}),
        case(Uncertain((1, 2, 3)), init={"size": 5}),
    ],
)
class Upsample(_Upsample, nn.Upsample):
    pass


@resized(nn.UpsamplingNearest2d, cases=[case(Uncertain((1, 2, 3, 4)), init={"scale_factor": 2})])
class UpsamplingNearest2d(_Upsample, nn.UpsamplingNearest2d):
    pass


@resized(nn.UpsamplingBilinear2d, cases=[case(Uncertain((1, 2, 3, 4)), init={"size": (5, 3)})])
class UpsamplingBilinear2d(_Upsample, nn.UpsamplingBilinear2d):
    pass


# What torch.export writes: one overload for each number of dimensions


def aten_nearest(input: Moments, output_size: Any, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors)


def aten_nearest_exact(input: Moments, output_size: Any, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors, "nearest-exact")


def aten_linear(input: Moments, output_size: Any, align_corners: bool, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors, _LINEAR[input.mean.dim() - 3], align_corners)


def aten_bicubic(input: Moments, output_size: Any, align_corners: bool, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors, "bicubic", align_corners)


def aten_linear_antialiased(input: Moments, output_size: Any, align_corners: bool, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors, "bilinear", align_corners, antialias=True)


def aten_bicubic_antialiased(input: Moments, output_size: Any, align_corners: bool, scale_factors: Any) -> Moments:
    return interpolate(input, output_size, scale_factors, "bicubic", align_corners, antialias=True)


_SHAPES = ((1, 2, 5), (1, 2, 3, 4), (1, 1, 2, 3, 3))

for _dims, _shape in enumerate(_SHAPES, 1):
    _to, _twice = [4, 2, 5][:_dims], [2.0] * _dims
    _nearest = [case(Uncertain(_shape), _to, None), case(Uncertain(_shape), None, _twice)]
    _linear = [case(Uncertain(_shape), _to, True, None), case(Uncertain(_shape), None, False, _twice)]
    resized(getattr(aten, f"upsample_nearest{_dims}d").vec, cases=_nearest)(aten_nearest)
    resized(getattr(aten, f"_upsample_nearest_exact{_dims}d").vec, cases=_nearest)(aten_nearest_exact)
    resized(getattr(aten, f"upsample_{_LINEAR[_dims - 1]}{_dims}d").vec, cases=_linear)(aten_linear)
    if _dims == 2:
        resized(aten.upsample_bicubic2d.vec, cases=_linear)(aten_bicubic)
        resized(aten._upsample_bilinear2d_aa.vec, cases=_linear)(aten_linear_antialiased)
        resized(aten._upsample_bicubic2d_aa.vec, cases=_linear)(aten_bicubic_antialiased)


# Windows


@moved(
    F.unfold,
    aten.im2col,
    cases=[
        case(Uncertain((1, 2, 4, 5)), (2, 3), (1, 1), (1, 0), (2, 1)),
        case(Uncertain((1, 1, 4, 3)), [2, 2], [1, 2], [0, 0], [1, 1]),
    ],
)
def unfold(input: Moments, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Moments:
    return structural.both(F.unfold, input, kernel_size, dilation, padding, stride)


@register(
    F.fold, aten.col2im, family="pooling", exact=True, source=OVERLAPS,
    cases=[
        case(Uncertain((1, 8, 6)), (3, 4), (2, 2), (1, 1), (0, 0), (1, 1)),
        case(Uncertain((1, 4, 9)), [4, 4], [2, 2], [1, 1], [1, 1], [2, 2]),
    ],
)  # fmt: skip
def fold(
    input: Moments, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Moments:
    return structural.both(F.fold, input, output_size, kernel_size, dilation, padding, stride)


@moved(nn.Unfold, cases=[case(Uncertain((1, 2, 4, 5)), init={"kernel_size": 3, "padding": 1, "stride": 2})])
class Unfold(ADFModule, nn.Unfold):
    def forward(self, input: Moments) -> Moments:
        return unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


@register(
    nn.Fold, family="pooling", exact=True, source=OVERLAPS,
    cases=[case(Uncertain((1, 8, 6)), init={"output_size": (3, 4), "kernel_size": 2})],
)  # fmt: skip
class Fold(ADFModule, nn.Fold):
    def forward(self, input: Moments) -> Moments:
        return fold(input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)


@moved(F.pixel_shuffle, torch.pixel_shuffle, cases=[case(Uncertain((1, 8, 2, 3)), 2)])
def pixel_shuffle(input: Moments, upscale_factor: int) -> Moments:
    return structural.both(F.pixel_shuffle, input, upscale_factor)


@moved(F.pixel_unshuffle, torch.pixel_unshuffle, cases=[case(Uncertain((1, 2, 4, 6)), 2)])
def pixel_unshuffle(input: Moments, downscale_factor: int) -> Moments:
    return structural.both(F.pixel_unshuffle, input, downscale_factor)


@moved(nn.PixelShuffle, cases=[case(Uncertain((1, 8, 2, 3)), init={"upscale_factor": 2})])
class PixelShuffle(ADFModule, nn.PixelShuffle):
    def forward(self, input: Moments) -> Moments:
        return pixel_shuffle(input, self.upscale_factor)


@moved(nn.PixelUnshuffle, cases=[case(Uncertain((1, 2, 4, 6)), init={"downscale_factor": 2})])
class PixelUnshuffle(ADFModule, nn.PixelUnshuffle):
    def forward(self, input: Moments) -> Moments:
        return pixel_unshuffle(input, self.downscale_factor)
