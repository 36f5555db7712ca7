"""Casts to another dtype, and certain tensors of the same shape, dtype or device as a random one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adfify.moments import Moments
from adfify.nn.structural import METADATA, SOURCE, cast
from adfify.registry import Uncertain, case, register

aten = torch.ops.aten

casting = partial(register, family="structural", exact=True, source=SOURCE)
metadata = partial(register, family="metadata", exact=True, source=METADATA, complex=True)


@casting("double", cases=[case(Uncertain((2, 3)))])
def double(input: Moments) -> Moments:
    return cast(Tensor.double, input)  # type: ignore[no-any-return]


@casting("half", cases=[case(Uncertain((2, 3)))])
def half(input: Moments) -> Moments:
    return cast(Tensor.half, input)  # type: ignore[no-any-return]


@casting("bfloat16", cases=[case(Uncertain((2, 3)))])
def bfloat16(input: Moments) -> Moments:
    return cast(Tensor.bfloat16, input)  # type: ignore[no-any-return]


@casting("type", cases=[case(Uncertain((2, 3)), torch.float64)])
def type_(input: Moments, dtype: Any, non_blocking: bool = False) -> Moments:
    return cast(Tensor.type, input, dtype, non_blocking)  # type: ignore[no-any-return]


@casting(aten._to_copy, alias=False, cases=[case(Uncertain((2, 3)), dtype=torch.float64), case(Uncertain((2, 3)))])
def to_copy(input: Moments, **kwargs: Any) -> Moments:
    return cast(aten._to_copy.default, input, **kwargs)  # type: ignore[no-any-return]


# Certain tensors of the same shape, dtype or device


@metadata(torch.zeros_like, cases=[case(Uncertain((1,)))])
def zeros_like(input: Moments, **kwargs: Any) -> Tensor:
    return torch.zeros_like(input.mean, **kwargs)


@metadata(torch.ones_like, cases=[case(Uncertain((1,)))])
def ones_like(input: Moments, **kwargs: Any) -> Tensor:
    return torch.ones_like(input.mean, **kwargs)


@metadata(torch.full_like, cases=[case(Uncertain((1,)), 2.5)])
def full_like(input: Moments, fill_value: float, **kwargs: Any) -> Tensor:
    return torch.full_like(input.mean, fill_value, **kwargs)


@metadata("new_zeros", cases=[case(Uncertain((2, 3)), (1,)), case(Uncertain((2, 3)), 1, 1)])
def new_zeros(input: Moments, *size: Any, **kwargs: Any) -> Tensor:
    return input.mean.new_zeros(*size, **kwargs)


@metadata("new_ones", cases=[case(Uncertain((2, 3)), (1,))])
def new_ones(input: Moments, *size: Any, **kwargs: Any) -> Tensor:
    return input.mean.new_ones(*size, **kwargs)


@metadata("new_full", cases=[case(Uncertain((2, 3)), (1,), 2.5)])
def new_full(input: Moments, size: Any, fill_value: float, **kwargs: Any) -> Tensor:
    return input.mean.new_full(size, fill_value, **kwargs)


@metadata("new_tensor", cases=[case(Uncertain((2, 3)), [2.5])])
def new_tensor(input: Moments, data: Any, **kwargs: Any) -> Tensor:
    return input.mean.new_tensor(data, **kwargs)


# Sizes as torch.export asks for them where they are dynamic


@metadata(aten.sym_size.int, cases=[case(Uncertain((2, 3)), 1)])
def sym_size(input: Moments, dim: int) -> int:
    return input.mean.size(dim)


@metadata(aten.sym_numel.default, cases=[case(Uncertain((2, 3)))])
def sym_numel(input: Moments) -> int:
    return input.mean.numel()


@metadata(aten.sym_stride.int, cases=[case(Uncertain((2, 3)), 0)])
def sym_stride(input: Moments, dim: int) -> int:
    return input.mean.stride(dim)
