"""Pooling of regions: averages within certain boxes, which are linear, and maxima.

Note [Shares of a region]
    A bin is a rectangle, and its average, of elements or of interpolated samples, is the product of what each axis has
    of it: with A the rows' shares and B the columns', y = A x B', and Var[y] = A^2 Var[x] (B^2)', elementwise squares.
    The shares of the rows are what the operation itself makes of an identity matrix, each element of which is two alike
    columns (ps_roi_pool never reads the last one), in a box one column wide: rounding, clipping and the number of
    samples are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision import ops
from torchvision.ops import _utils, poolers

from adfify.gaussian.extremes import largest
from adfify.moments import Moments, concrete
from adfify.nn import extrema
from adfify.nn.max_pooling import lowest
from adfify.nn.module import ADFModule, per_dimension
from adfify.nn.positions import Positions
from adfify.registry import Certain, Uncertain, case, register

Boxes = Tensor | list[Tensor] | tuple[Tensor, ...]
Pool = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]

own = torch.ops.torchvision

averaged = partial(
    register, family="pooling", exact=True, source="linear map with certain boxes: variance by the squared shares"
)
maximum = partial(
    register, family="pooling", source=f"composed of bins, of each the {extrema.MANY}", tolerance=extrema.TOLERANCE
)

_BY_PICTURE = ("kqj,kcrsij->kcrsiq", "kpi,kcrsiq->kcpq")
_BY_CHANNEL = ("kqj,kcpqij->kcpqi", "kpi,kcpqi->kcpq")

_AT_ONCE = 2**24
"""So many elements of boxes are looked at at a time."""


def _regions(boxes: Boxes) -> Tensor:
    """``[K, 5]``: the picture's number, and the corners x, y, x, y."""
    return boxes if isinstance(boxes, Tensor) else _utils.convert_boxes_to_roi_format(list(boxes))


def _shares(
    pool: Pool, regions: Tensor, size: tuple[int, int], bins: tuple[int, int], scale: float, own_channel: bool
) -> tuple[Tensor, Tensor]:
    """What each bin has of the rows ``[K, bins, H]``, and of the columns: see Note [Shares of a region]."""
    shares = []
    none = torch.zeros_like(regions[:, 0])
    unit = torch.full_like(none, 1 / scale)
    for axis, (length, count) in enumerate(zip(size, bins, strict=True)):
        eye = torch.eye(length, dtype=regions.dtype, device=regions.device)
        if own_channel:
            eye = eye.repeat_interleave(count, 0)
        if axis == 0:
            box = torch.stack([none, none, regions[:, 2], unit, regions[:, 4]], 1)
            shares.append(pool(eye[None, :, :, None].expand(-1, -1, -1, 2), box, (count, 1)).squeeze(3).mT)
        else:
            box = torch.stack([none, regions[:, 1], none, regions[:, 3], unit], 1)
            shares.append(pool(eye[None, :, None, :].expand(-1, -1, 2, -1), box, (1, count)).squeeze(2).mT)
    return shares[0], shares[1]


def _chunks(regions: Tensor, elements: int) -> Iterator[slice]:
    """Some regions at a time; all of them where their number is a symbol."""
    count = regions.shape[0]
    if not isinstance(count, int) or not isinstance(elements, int):
        yield slice(None)
        return
    step = max(1, _AT_ONCE // max(1, elements))
    yield from (slice(start, start + step) for start in range(0, max(count, 1), step))


def _averages(
    pool: Pool, x: Moments, boxes: Boxes, output_size: Any, scale: float, own_channel: bool = False
) -> Moments:
    """Of an operation that averages; ``own_channel`` where each bin reads channels of its own."""
    regions, (high, wide) = _regions(boxes), per_dimension(output_size, 2)
    mean = pool(x.mean, regions, (high, wide))
    rows, columns = _shares(pool, regions, x.variance.shape[2:], (high, wide), scale, own_channel)  # type: ignore[arg-type]
    variance = torch.unflatten(x.variance, 1, (-1, high, wide) if own_channel else (-1, 1, 1))
    parts = []
    for some in _chunks(regions, variance[:1].numel()):
        chosen = variance[regions[some, 0].long()]
        rightward, down = _BY_CHANNEL if own_channel else _BY_PICTURE
        across = torch.einsum(rightward, columns[some].square(), chosen)
        parts.append(torch.einsum(down, rows[some].square(), across))
    return Moments(mean, torch.cat(parts).to(mean.dtype))


# Averages


def _aligned(scale: float, sampling_ratio: int, aligned: bool) -> Pool:
    return lambda x, boxes, bins: own.roi_align(x, boxes, scale, *bins, sampling_ratio, aligned)


def _boxes(*shape: int) -> Certain:
    return Certain(shape, positive=True, of_examples=True)


_PICTURES, _LISTED = Uncertain((2, 2, 5, 6)), [_boxes(2, 4), _boxes(1, 4)]
_NUMBERED = _boxes(3, 5)
_MANY_CHANNELS = Uncertain((2, 8, 4, 5))


@averaged(
    ops.roi_align,
    cases=[
        case(_PICTURES, _LISTED, (2, 3), 4.0),
        case(_PICTURES, _NUMBERED, 2, spatial_scale=3.0, sampling_ratio=2, aligned=True),
    ],
)
def roi_align(
    input: Moments, boxes: Boxes, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = -1,
    aligned: bool = False,
) -> Moments:  # fmt: skip
    return _averages(_aligned(spatial_scale, sampling_ratio, aligned), input, boxes, output_size, spatial_scale)


@averaged(own.roi_align, cases=[case(_PICTURES, _NUMBERED, 4.0, 2, 3, 0, False)])
def aten_roi_align(
    input: Moments, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int,
    aligned: bool,
) -> Moments:  # fmt: skip
    return roi_align(input, rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned)


@averaged(own.ps_roi_align, cases=[case(_MANY_CHANNELS, _NUMBERED, 4.0, 2, 2, 2)])
def aten_ps_roi_align(
    input: Moments, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> tuple[Moments, Tensor]:
    def pool(x: Tensor, boxes: Tensor, bins: tuple[int, int]) -> Tensor:
        return own.ps_roi_align(x, boxes, spatial_scale, *bins, sampling_ratio)[0]  # type: ignore[no-any-return]

    _, channels = own.ps_roi_align(input.mean, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio)
    return _averages(pool, input, rois, (pooled_height, pooled_width), spatial_scale, own_channel=True), channels


@averaged(
    ops.ps_roi_align, cases=[case(_MANY_CHANNELS, _LISTED, 2, 4.0, 1), case(_MANY_CHANNELS, _NUMBERED, (4, 1), 3.0, 2)]
)
def ps_roi_align(
    input: Moments, boxes: Boxes, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = -1
) -> Moments:
    high, wide = per_dimension(output_size, 2)
    return aten_ps_roi_align(input, _regions(boxes), spatial_scale, high, wide, sampling_ratio)[0]


# Boxes away from the last row and column: there torchvision's own gradient is not that of its values (seen with 0.29).
@averaged(own.ps_roi_pool, cases=[case(_MANY_CHANNELS, _NUMBERED, 1.0, 2, 2)])
def aten_ps_roi_pool(
    input: Moments, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Moments, Tensor]:
    def pool(x: Tensor, boxes: Tensor, bins: tuple[int, int]) -> Tensor:
        return own.ps_roi_pool(x, boxes, spatial_scale, *bins)[0]  # type: ignore[no-any-return]

    _, channels = own.ps_roi_pool(input.mean, rois, spatial_scale, pooled_height, pooled_width)
    return _averages(pool, input, rois, (pooled_height, pooled_width), spatial_scale, own_channel=True), channels


@averaged(ops.ps_roi_pool, cases=[case(_MANY_CHANNELS, _LISTED, 2, 1.0), case(_MANY_CHANNELS, _NUMBERED, (4, 1), 1.0)])
def ps_roi_pool(input: Moments, boxes: Boxes, output_size: Any, spatial_scale: float = 1.0) -> Moments:
    high, wide = per_dimension(output_size, 2)
    return aten_ps_roi_pool(input, _regions(boxes), spatial_scale, high, wide)[0]


# Maxima


def _members(share: Tensor) -> tuple[Tensor, Tensor]:
    """Of bins ``[K, bins, L]`` which elements each has: their places ``[K, bins, n]``, and which of those it lacks."""
    inside = share > 0
    count = inside.sum(-1)
    most = share.shape[-1]
    if concrete(share):
        most = max(int(count.max()) if count.numel() else 0, 1)
    places = torch.arange(most, device=share.device)
    index = inside.long().argmax(-1, keepdim=True) + places
    return index.clamp(max=share.shape[-1] - 1), places >= count.unsqueeze(-1)


@maximum(own.roi_pool, cases=[case(_PICTURES, _NUMBERED, 4.0, 2, 3)])
def aten_roi_pool(
    input: Moments, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Moments, Positions]:
    def pool(x: Tensor, boxes: Tensor, bins: tuple[int, int]) -> Tensor:
        return own.roi_pool(x, boxes, spatial_scale, *bins)[0]  # type: ignore[no-any-return]

    bins, size = (pooled_height, pooled_width), input.mean.shape[2:]
    base = pool(input.mean, rois, bins)
    # Of an identity matrix the largest in a bin is 1 where the bin has the element.
    (rows, no_row), (columns, no_column) = map(_members, _shares(pool, rois, size, bins, spatial_scale, False))  # type: ignore[arg-type]
    places = (rows[:, :, None, :, None] * size[1] + columns[:, None, :, None, :]).flatten(3)
    absent = (no_row[:, :, None, :, None] | no_column[:, None, :, None, :]).flatten(3)
    parts = []
    for some in _chunks(rois, input.mean.shape[1] * places[:1].numel()):
        index = places[some].flatten(1).unsqueeze(1).expand(-1, input.mean.shape[1], -1)
        outside = absent[some].unsqueeze(1)
        mean, variance = (
            torch.unflatten(part.flatten(2)[rois[some, 0].long()].gather(2, index), 2, places.shape[1:])
            for part in input
        )
        best = largest(mean.masked_fill(outside, lowest(mean)), variance.masked_fill(outside, 0.0), (-1,))
        empty = outside.all(-1)
        parts.append([part.squeeze(-1).masked_fill(empty, 0.0) for part in best])
    mean, variance = (torch.cat(part) for part in zip(*parts, strict=True))
    return Moments(torch.where(variance > 0, mean, base), variance), Positions()


@maximum(ops.roi_pool, cases=[case(_PICTURES, _LISTED, (2, 3), 4.0)])
def roi_pool(input: Moments, boxes: Boxes, output_size: Any, spatial_scale: float = 1.0) -> Moments:
    high, wide = per_dimension(output_size, 2)
    return aten_roi_pool(input, _regions(boxes), spatial_scale, high, wide)[0]


# Modules


class _Regions(ADFModule):
    many_inputs = True


@averaged(
    ops.RoIAlign, cases=[case(_PICTURES, _LISTED, init={"output_size": 2, "spatial_scale": 4.0, "sampling_ratio": 2})]
)
class RoIAlign(_Regions, ops.RoIAlign):
    def forward(self, input: Moments, rois: Boxes) -> Moments:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


@averaged(
    ops.PSRoIAlign,
    cases=[case(_MANY_CHANNELS, _LISTED, init={"output_size": 2, "spatial_scale": 4.0, "sampling_ratio": 2})],
)
class PSRoIAlign(_Regions, ops.PSRoIAlign):
    def forward(self, input: Moments, rois: Boxes) -> Moments:
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)


@averaged(ops.PSRoIPool, cases=[case(_MANY_CHANNELS, _LISTED, init={"output_size": 2, "spatial_scale": 1.0})])
class PSRoIPool(_Regions, ops.PSRoIPool):
    def forward(self, input: Moments, rois: Boxes) -> Moments:
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)


@maximum(ops.RoIPool, cases=[case(_PICTURES, _LISTED, init={"output_size": 2, "spatial_scale": 4.0})])
class RoIPool(_Regions, ops.RoIPool):
    def forward(self, input: Moments, rois: Boxes) -> Moments:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)


@averaged(
    ops.MultiScaleRoIAlign,
    cases=[
        case({"fine": Uncertain((1, 2, 8, 8)), "coarse": Uncertain((1, 2, 4, 4))}, [_boxes(6, 4)],
             [(2, 2)], init={"featmap_names": ["fine", "coarse"], "output_size": 2, "sampling_ratio": 2,
                             "canonical_scale": 0.5, "canonical_level": -1}),
    ],
)  # fmt: skip
class MultiScaleRoIAlign(_Regions, ops.MultiScaleRoIAlign):
    scales: Any
    map_levels: Any

    def forward(self, x: dict[str, Moments], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Moments:
        features = [value for name, value in x.items() if name in self.featmap_names]
        if self.scales is None or self.map_levels is None:  # once, like the original
            self.scales, self.map_levels = poolers._setup_scales(
                [value.mean for value in features], image_shapes, self.canonical_scale, self.canonical_level
            )
        regions = _regions(boxes)
        pooled = partial(roi_align, output_size=self.output_size, sampling_ratio=self.sampling_ratio)
        if len(features) == 1:
            return pooled(features[0], regions, spatial_scale=self.scales[0])
        with regions.device:  # torchvision makes a number of its own on the default device
            levels = self.map_levels(boxes)
        shape = (len(regions), features[0].shape[1], *self.output_size)
        mean, variance = features[0].mean.new_zeros(shape), features[0].variance.new_zeros(shape)
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            chosen = torch.where(levels == level)
            part = pooled(feature, regions[chosen], spatial_scale=scale)
            mean, variance = mean.index_put(chosen, part.mean), variance.index_put(chosen, part.variance)
        return Moments(mean, variance)
