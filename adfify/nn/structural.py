"""Operations that move elements and compute nothing: applied to mean and variance alike, exact.

Also the metadata of a random tensor, its shape, dtype and device, which are certain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.errors import InputError
from adfify.moments import ComplexMoments, Moments, lift, variance_dtype
from adfify.nn.complex_parts import each_part, with_mean
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "moves elements"

structural = partial(register, family="structural", exact=True, source=SOURCE, complex=True)


@each_part()
def both(op: Callable[..., Tensor], x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """The same operation on mean and variance."""
    return Moments(op(x.mean, *args, **kwargs), op(x.variance, *args, **kwargs))


@each_part()
def parts(op: Callable[..., Sequence[Tensor]], x: Moments, *args: Any, **kwargs: Any) -> tuple[Moments, ...]:
    """The same operation, which cuts a tensor into several, on mean and variance."""
    pairs = zip(op(x.mean, *args, **kwargs), op(x.variance, *args, **kwargs), strict=True)
    return tuple(Moments(mean, variance) for mean, variance in pairs)


@structural(
    torch.flatten, "flatten", cases=[case(Uncertain((2, 3, 4)), 1), case(Uncertain((2, 3, 4)), start_dim=0, end_dim=1)]
)
def flatten(input: Moments, start_dim: int = 0, end_dim: int = -1) -> Moments:
    return both(torch.flatten, input, start_dim, end_dim)


@structural(nn.Flatten, cases=[case(Uncertain((2, 3, 4)))])
class Flatten(ADFModule, nn.Flatten):
    def forward(self, input: Moments) -> Moments:
        return flatten(input, self.start_dim, self.end_dim)


@structural(nn.Unflatten, cases=[case(Uncertain((2, 12)), init={"dim": 1, "unflattened_size": (3, 4)})])
class Unflatten(ADFModule, nn.Unflatten):
    def forward(self, input: Moments) -> Moments:
        return unflatten(input, self.dim, self.unflattened_size)


@structural(torch.unflatten, "unflatten", cases=[case(Uncertain((2, 12)), 1, (3, 4))])
def unflatten(input: Moments, dim: Any, sizes: Any) -> Moments:
    return both(torch.unflatten, input, dim, sizes)


@structural(torch.ops.aten._unsafe_view, cases=[case(Uncertain((2, 6)), [3, 4])])
@structural("view", cases=[case(Uncertain((2, 6)), 3, 4), case(Uncertain((2, 6)), (-1, 3))])
@each_part()
def view(input: Moments, *shape: Any) -> Moments:
    # The variance may lie in memory otherwise than the mean does.
    return Moments(input.mean.view(*shape), input.variance.reshape(*shape))


@structural("view_as", reads_metadata_of=("other",), cases=[case(Uncertain((2, 6)), Certain((3, 4)))])
def view_as(input: Moments, other: Moments | Tensor) -> Moments:
    return both(Tensor.view, input, other.shape)


@structural(torch.reshape, "reshape", cases=[case(Uncertain((2, 6)), (3, 4)), case(Uncertain((2, 6)), (-1,))])
def reshape(input: Moments, *shape: Any) -> Moments:
    return both(Tensor.reshape, input, *shape)


@structural("reshape_as", reads_metadata_of=("other",), cases=[case(Uncertain((2, 6)), Certain((3, 4)))])
def reshape_as(input: Moments, other: Moments | Tensor) -> Moments:
    return both(Tensor.reshape, input, other.shape)


@structural(torch.permute, "permute", cases=[case(Uncertain((2, 3, 4)), (0, 2, 1))])
def permute(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    return both(Tensor.permute, input, *args, **kwargs)


@structural(
    torch.transpose,
    torch.swapaxes,
    torch.swapdims,
    "transpose",
    "swapaxes",
    "swapdims",
    cases=[case(Uncertain((2, 3, 4)), 1, 2)],
)
def transpose(input: Moments, dim0: int, dim1: int) -> Moments:
    return both(torch.transpose, input, dim0, dim1)


@structural(torch.t, "t", cases=[case(Uncertain((2, 3)))])
def t(input: Moments) -> Moments:
    return both(torch.t, input)


@structural(".T", cases=[case(Uncertain((2, 3))), case(Uncertain((2, 3, 4)))])
def reversed_axes(input: Moments) -> Moments:
    return both(torch.permute, input, tuple(reversed(range(input.mean.dim()))))


@structural(".mT", cases=[case(Uncertain((2, 3, 4)))])
def matrix_transpose(input: Moments) -> Moments:
    return both(torch.transpose, input, -2, -1)


@structural(torch.squeeze, "squeeze", cases=[case(Uncertain((2, 1, 4)), 1), case(Uncertain((2, 1, 4)))])
def squeeze(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    return both(torch.squeeze, input, *args, **kwargs)


@structural(torch.unsqueeze, "unsqueeze", cases=[case(Uncertain((2, 3)), 1)])
def unsqueeze(input: Moments, dim: int) -> Moments:
    return both(torch.unsqueeze, input, dim)


@structural("expand", cases=[case(Uncertain((2, 1)), 2, 3)])
def expand(input: Moments, *size: Any) -> Moments:
    return both(Tensor.expand, input, *size)


@structural("expand_as", reads_metadata_of=("other",), cases=[case(Uncertain((2, 1)), Certain((2, 3)))])
def expand_as(input: Moments, other: Moments | Tensor) -> Moments:
    return both(Tensor.expand, input, other.shape)


@structural("repeat", alias=False, cases=[case(Uncertain((2, 3)), 2, 1)])
def repeat(input: Moments, *sizes: Any) -> Moments:
    return both(Tensor.repeat, input, *sizes)


@structural("contiguous", cases=[case(Uncertain((2, 3)))])
def contiguous(input: Moments, memory_format: torch.memory_format = torch.contiguous_format) -> Moments:
    return both(Tensor.contiguous, input, memory_format=memory_format)


@structural(torch.clone, "clone", alias=False, cases=[case(Uncertain((2, 3)))])
def clone(input: Moments, *, memory_format: torch.memory_format = torch.preserve_format) -> Moments:
    return both(torch.clone, input, memory_format=memory_format)


@structural(torch.detach, "detach", cases=[case(Uncertain((2, 3)))])
def detach(input: Moments) -> Moments:
    return both(torch.detach, input)


@structural(
    "to",
    reads_metadata_of=("args", "kwargs"),
    cases=[case(Uncertain((2, 3)), torch.float64), case(Uncertain((2, 3)), Uncertain((1,)))],
)
def to(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    target = [x.mean if isinstance(x, (Moments, ComplexMoments)) else x for x in args]
    # torch.export writes `cpu()` with a layout, which the method has no argument for.
    kwargs = {name: value for name, value in kwargs.items() if name not in ("layout", "pin_memory")}
    return cast(Tensor.to, input, *target, **kwargs)  # type: ignore[no-any-return]


def cast(op: Callable[..., Tensor], x: Moments | ComplexMoments, *args: Any, **kwargs: Any) -> Any:
    """A cast, which has to be to a floating-point dtype, or to a complex one; a variance is float32 at least."""
    mean = op(x.mean, *args, **kwargs)
    if mean.is_complex():
        real, imag = (x.real, x.imag) if isinstance(x, ComplexMoments) else (x, None)
        return with_mean(mean, real.variance.to(mean.real), None if imag is None else imag.variance.to(mean.real))
    if isinstance(x, ComplexMoments):
        raise InputError(
            f"a complex uncertain value is cast to {mean.dtype} here, without its imaginary part: take .real."
        )
    if not mean.is_floating_point():
        raise InputError(
            f"an uncertain value is cast to {mean.dtype} here; whole numbers have no variance. Take what needs them "
            "from a certain input, or register a rule for the function that does."
        )
    return Moments(mean, x.variance.to(mean.device, variance_dtype(mean.dtype)))


@structural("type_as", reads_metadata_of=("other",), cases=[case(Uncertain((2, 3)), Certain((2,)))])
def type_as(input: Moments, other: Moments | Tensor) -> Moments:
    return cast(Tensor.to, input, other.dtype)  # type: ignore[no-any-return]


@structural("float", complex=False, cases=[case(Uncertain((2, 3)))])
def float_(input: Moments) -> Moments:
    return cast(Tensor.float, input)  # type: ignore[no-any-return]


@structural(nn.Identity, cases=[case(Uncertain((2, 3)))])
class Identity(ADFModule, nn.Identity):
    def forward(self, input: Moments) -> Moments:
        return input


class Sequential(nn.Sequential):
    """A chain of ADF modules: ``torch.nn.Sequential`` that is also called with two tensors, mean and variance.

    Everything else is torch's: OrderedDict, index, slice, setting and deleting items, append, ``+``.
    """

    def forward(self, input: Moments | Tensor, variance: Tensor | None = None) -> Any:
        value = Moments(input, variance) if isinstance(input, Tensor) and variance is not None else input
        return super().forward(value)  # type: ignore[no-untyped-call]


@structural(
    operator.getitem,
    cases=[
        case(Uncertain((4, 3)), (slice(None), 1)),
        case(Uncertain((4, 3)), (Ellipsis, slice(0, 2))),
        case(Uncertain((4, 3)), [0, 2]),
    ],
)
def getitem(x: Moments | Sequence[Any] | dict[Any, Any], index: Any) -> Any:
    return both(operator.getitem, x, index) if isinstance(x, (Moments, ComplexMoments)) else x[index]


@structural(
    torch.split,
    torch.functional.split,
    "split",
    cases=[case(Uncertain((4, 3)), 2), case(Uncertain((4, 3)), [1, 2], dim=1)],
)
def split(tensor: Moments, split_size_or_sections: Any, dim: int = 0) -> tuple[Moments, ...]:
    return parts(torch.split, tensor, split_size_or_sections, dim)


@structural(torch.chunk, "chunk", cases=[case(Uncertain((4, 3)), 2, dim=1)])
def chunk(input: Moments, chunks: int, dim: int = 0) -> tuple[Moments, ...]:
    return parts(torch.chunk, input, chunks, dim)


@structural(torch.unbind, "unbind", cases=[case(Uncertain((4, 3)), 1)])
def unbind(input: Moments, dim: int = 0) -> tuple[Moments, ...]:
    return parts(torch.unbind, input, dim)


@structural(
    "unfold",
    torch.ops.aten.unfold,
    cases=[case(Uncertain((2, 7)), 1, 3, 2), case(Uncertain((5, 3)), 0, 2, 1)],
)
def unfold(input: Moments, dimension: int, size: int, step: int) -> Moments:
    return both(Tensor.unfold, input, dimension, size, step)


@structural(
    torch.cat,
    torch.concat,
    torch.concatenate,
    alias=False,
    cases=[case([Uncertain((2, 3)), Uncertain((2, 4))], 1), case([Uncertain((2, 3)), Certain((1, 3))])],
)
@each_part()
def cat(tensors: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    all_random = [lift(x) for x in tensors]
    return Moments(torch.cat([x.mean for x in all_random], dim), torch.cat([x.variance for x in all_random], dim))


@structural(torch.stack, alias=False, cases=[case([Uncertain((2, 3)), Uncertain((2, 3))], 1)])
@each_part()
def stack(tensors: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    all_random = [lift(x) for x in tensors]
    return Moments(torch.stack([x.mean for x in all_random], dim), torch.stack([x.variance for x in all_random], dim))


@structural(
    F.pad,
    alias=False,
    cases=[case(Uncertain((2, 3)), (1, 2), value=3.0), case(Uncertain((2, 3, 4)), (1, 2), mode="reflect")],
)
@each_part("value")
def pad(input: Moments, pad: Any, mode: str = "constant", value: float | None = None) -> Moments:
    # A padded constant is certain: its variance is 0 whatever its value.
    return Moments(F.pad(input.mean, pad, mode, value), F.pad(input.variance, pad, mode))


@structural(torch.roll, "roll", alias=False, cases=[case(Uncertain((4, 3)), 1, 0)])
def roll(input: Moments, shifts: Any, dims: Any = ()) -> Moments:
    return both(torch.roll, input, shifts, dims)


@structural(torch.flip, "flip", alias=False, cases=[case(Uncertain((4, 3)), (0,))])
def flip(input: Moments, *args: Any, **kwargs: Any) -> Moments:
    return both(Tensor.flip, input, *args, **kwargs)


@structural(F.channel_shuffle, torch.channel_shuffle, alias=False, cases=[case(Uncertain((2, 4, 3, 3)), 2)])
def channel_shuffle(input: Moments, groups: int) -> Moments:
    return both(torch.channel_shuffle, input, groups)


@structural(nn.ChannelShuffle, alias=False, cases=[case(Uncertain((2, 4, 3, 3)), init={"groups": 2})])
class ChannelShuffle(ADFModule, nn.ChannelShuffle):
    def forward(self, input: Moments) -> Moments:
        return channel_shuffle(input, self.groups)


METADATA = "shape, dtype and device are certain"
metadata = partial(register, family="metadata", exact=True, source=METADATA, complex=True)


@metadata(".shape", cases=[case(Uncertain((2, 3)))])
def shape_of(x: Moments) -> torch.Size:
    return x.mean.shape


@metadata(".dtype", cases=[case(Uncertain((2, 3)))])
def dtype_of(x: Moments) -> torch.dtype:
    return x.mean.dtype


@metadata(".device", cases=[case(Uncertain((2, 3)))])
def device_of(x: Moments) -> torch.device:
    return x.mean.device


@metadata("dim", "ndimension", ".ndim", cases=[case(Uncertain((2, 3)))])
def dim_of(x: Moments) -> int:
    return x.mean.dim()


@metadata("size", cases=[case(Uncertain((2, 3)), 1)])
def size(x: Moments, *args: Any, **kwargs: Any) -> Any:
    return x.mean.size(*args, **kwargs)


@metadata("numel", "nelement", torch.numel, cases=[case(Uncertain((2, 3)))])
def numel(x: Moments) -> int:
    return x.mean.numel()
