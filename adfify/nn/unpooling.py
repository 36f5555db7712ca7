"""Undoing a pooling at certain places, and grids of affine maps: linear, so exact.

The places that max pooling of an uncertain tensor returns are uncertain themselves (see adfify.nn.extrema), and are
refused; those of a certain one, or an input of whole numbers, are certain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.moments import Moments
from adfify.nn.module import ADFModule
from adfify.nn.structural import SOURCE, both
from adfify.registry import Uncertain, case, register

placed = partial(register, family="structural", exact=True, source=SOURCE, alias=False)

_LINE = (Uncertain((1, 2, 3)), torch.tensor([[[1, 2, 5], [0, 3, 4]]]))
_PLANE = (Uncertain((1, 1, 2, 2)), torch.tensor([[[[5, 2], [8, 15]]]]))
_SPACE = (Uncertain((1, 1, 1, 2, 1)), torch.tensor([[[[[5], [10]]]]]))


@placed(F.max_unpool1d, cases=[case(*_LINE, 2), case(*_LINE, kernel_size=2, output_size=(7,))])
def max_unpool1d(
    input: Moments, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Moments:
    return both(F.max_unpool1d, input, indices, kernel_size, stride, padding, output_size)


@placed(F.max_unpool2d, cases=[case(*_PLANE, 2), case(*_PLANE, (2, 2), 2, 0, (5, 4))])
def max_unpool2d(
    input: Moments, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Moments:
    return both(F.max_unpool2d, input, indices, kernel_size, stride, padding, output_size)


@placed(F.max_unpool3d, cases=[case(*_SPACE, 2)])
def max_unpool3d(
    input: Moments, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Moments:
    return both(F.max_unpool3d, input, indices, kernel_size, stride, padding, output_size)


@placed(torch.ops.aten.max_unpool2d, cases=[case(*_PLANE, [4, 4])])
def aten_max_unpool2d(self: Moments, indices: Tensor, output_size: Any) -> Moments:
    return both(torch.ops.aten.max_unpool2d.default, self, indices, output_size)


class _Unpool(ADFModule):
    many_inputs = True
    original: Any

    def forward(self, input: Moments, indices: Tensor, output_size: Any = None) -> Moments:
        return both(type(self).original, input, indices, self.kernel_size, self.stride, self.padding, output_size)


@placed(nn.MaxUnpool1d, cases=[case(*_LINE, init={"kernel_size": 2})])
class MaxUnpool1d(_Unpool, nn.MaxUnpool1d):
    original = staticmethod(F.max_unpool1d)


@placed(nn.MaxUnpool2d, cases=[case(*_PLANE, init={"kernel_size": 2})])
class MaxUnpool2d(_Unpool, nn.MaxUnpool2d):
    original = staticmethod(F.max_unpool2d)


@placed(nn.MaxUnpool3d, cases=[case(*_SPACE, init={"kernel_size": 2})])
class MaxUnpool3d(_Unpool, nn.MaxUnpool3d):
    original = staticmethod(F.max_unpool3d)


GRID = "linear map: the variance by the squared coordinates"


@register(
    F.affine_grid, family="affine", exact=True, source=GRID,
    cases=[case(Uncertain((2, 2, 3)), (2, 1, 3, 2), align_corners=False),
           case(Uncertain((1, 3, 4)), [1, 1, 2, 3, 2], align_corners=True)],
)  # fmt: skip
def affine_grid(theta: Moments, size: Any, align_corners: bool | None = None) -> Moments:
    mean = F.affine_grid(theta.mean, size, align_corners)
    dims = len(size) - 2
    plain = torch.eye(dims, dims + 1, dtype=mean.dtype, device=mean.device).unsqueeze(0)
    places = F.affine_grid(plain, [1, *size[1:]], align_corners).reshape(-1, dims).square()
    squares = torch.cat([places, torch.ones_like(places[:, :1])], 1)
    return Moments(mean, torch.matmul(squares, theta.variance.mT).reshape(mean.shape))


@register(
    torch.affine_grid_generator, family="affine", exact=True, source=GRID,
    cases=[case(Uncertain((2, 2, 3)), (2, 1, 3, 2), False)],
)  # fmt: skip
def affine_grid_generator(theta: Moments, size: Any, align_corners: bool) -> Moments:
    return affine_grid(theta, size, align_corners)
