"""Normalisation by the statistics of the very elements that are normalised, which are as uncertain as they are.

What uncertainty adds to the mean, and the variance, come from adfify.gaussian.statistics, with the covariance of the
element and its statistics; the rest of the mean is the original operation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import precision
from adfify.errors import InputError
from adfify.gaussian import statistics
from adfify.moments import Moments, held_in
from adfify.nn import normalization
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "exact moments of the sum of squares and the element, log-normal quotient: see gaussian.statistics"
TOLERANCE = 0.05  # for 8 elements or more of similar variance; gaussian.statistics has what was measured

normalized = partial(register, family="normalization", source=SOURCE, tolerance=TOLERANCE)


def added(mean: Tensor, shift: Tensor, variance: Tensor, weight: Tensor | None = None) -> Moments:
    """The original's own mean, what uncertainty adds to it, and the variance, both still to be scaled by the weight."""
    if weight is not None:
        shift, variance = shift * weight, variance * precision.widened(weight).square()
    return Moments(mean + shift.to(mean.dtype), held_in(variance, mean.dtype))


def _last(normalized_shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


@normalized(
    F.layer_norm,
    torch.layer_norm,
    cases=[
        case(Uncertain((3, 12)), [12], Certain((12,)), Certain((12,))),
        case(Uncertain((2, 3, 16)), [16], eps=1e-2),
        case(Uncertain((2, 4, 4)), (4, 4), Certain((4, 4))),
    ],
)
def layer_norm(
    input: Moments, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Moments:  # fmt: skip
    mean = F.layer_norm(input.mean, list(normalized_shape), weight, bias, eps)
    return added(mean, *statistics.standardise_shift(input.mean, input.variance, _last(normalized_shape), eps), weight)


@normalized(
    nn.LayerNorm,
    cases=[
        case(Uncertain((2, 3, 16)), init={"normalized_shape": 16}),
        case(Uncertain((3, 3, 4)), init={"normalized_shape": (3, 4), "elementwise_affine": False}),
    ],
)
class LayerNorm(ADFModule, nn.LayerNorm):
    def forward(self, input: Moments) -> Moments:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@normalized(
    F.group_norm,
    torch.group_norm,
    cases=[
        case(Uncertain((2, 4, 3, 3)), 2, Certain((4,)), Certain((4,))),
        case(Uncertain((2, 16)), 2),
        case(Uncertain((2, 4, 6)), 1, Certain((4,)), eps=1e-2),
    ],
)
def group_norm(
    input: Moments, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Moments:  # fmt: skip
    mean = F.group_norm(input.mean, num_groups, weight, bias, eps)
    groups = [torch.unflatten(part, 1, (num_groups, -1)) for part in input]  # a view, whatever the memory format
    pair = statistics.standardise_shift(groups[0], groups[1], tuple(range(2, groups[0].dim())), eps)
    shift, variance = (part.flatten(1, 2) for part in pair)
    return added(mean, shift, variance, along_channels(weight, mean))


def along_channels(weight: Tensor | None, x: Tensor, axis: int = 1) -> Tensor | None:
    """A weight for each channel, laid out to multiply x."""
    return None if weight is None else weight.reshape(-1, *[1] * (x.dim() - axis - 1))


@normalized(
    nn.GroupNorm, cases=[case(Uncertain((2, 4, 3, 3)), init={"num_groups": 2, "num_channels": 4, "affine": True})]
)
class GroupNorm(ADFModule, nn.GroupNorm):
    def forward(self, input: Moments) -> Moments:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


@normalized(
    F.instance_norm,
    cases=[
        case(Uncertain((2, 3, 4, 4)), weight=Certain((3,)), bias=Certain((3,))),
        case(Uncertain((2, 3, 12))),
        case(
            Uncertain((2, 3, 4)), Certain((3,)), Certain((3,), positive=True), Certain((3,)), use_input_stats=False
        ),
    ],
)  # fmt: skip
@precision.by_itself  # it writes into the running statistics
def instance_norm(
    input: Moments, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Moments:  # fmt: skip
    """Every channel of every sample by itself; by stored statistics, the affine map of batch normalisation."""
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise InputError("instance_norm(use_input_stats=False) needs running_mean and running_var.")
        return normalization.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    mean = F.instance_norm(input.mean, None, None, weight, bias, True, momentum, eps)
    dim = tuple(range(2, mean.dim()))
    if running_mean is not None and running_var is not None:
        count = input.mean[0, 0].numel()
        noisy = precision.widened(input.mean).var(dim, correction=0) + input.variance.mean(dim)
        with torch.no_grad():
            running_mean.lerp_(input.mean.mean((0, *dim)).to(running_mean.dtype), momentum)
            running_var.lerp_((noisy.mean(0) * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    return added(
        mean, *statistics.standardise_shift(input.mean, input.variance, dim, eps), along_channels(weight, mean)
    )


# Not torch.instance_norm as well: torch's own table of overrides has its arguments in another order than it takes them.
@normalized(
    torch.ops.aten.instance_norm.default,
    cases=[case(Uncertain((2, 3, 12)), Certain((3,)), Certain((3,)), None, None, True, 0.1, 1e-5, False)],
)
@precision.by_itself
def aten_instance_norm(
    input: Moments, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Moments:  # fmt: skip
    """:func:`instance_norm` with its arguments in the order that torch's C++ has them in."""
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


class _InstanceNorm(ADFModule):
    """What the three instance normalisations share: a sample without a batch, and which statistics are used."""

    def forward(self, input: Moments) -> Moments:
        self._check_input_dim(input.mean)  # type: ignore[operator]
        unbatched = input.mean.dim() == self._get_no_batch_dim()  # type: ignore[operator]
        x = Moments(input.mean.unsqueeze(0), input.variance.unsqueeze(0)) if unbatched else input
        y = instance_norm(
            x,
            self.running_mean,  # type: ignore[arg-type]
            self.running_var,  # type: ignore[arg-type]
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else float(self.momentum),  # type: ignore[arg-type]
            self.eps,  # type: ignore[arg-type]
        )
        return Moments(y.mean.squeeze(0), y.variance.squeeze(0)) if unbatched else y


@normalized(
    nn.InstanceNorm1d,
    cases=[
        case(Uncertain((2, 3, 12)), init={"num_features": 3}),
        case(Uncertain((3, 12)), init={"num_features": 3, "affine": True}),
    ],
)
class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    pass


@normalized(
    nn.InstanceNorm2d,
    cases=[
        case(Uncertain((2, 3, 4, 3)), init={"num_features": 3, "affine": True}),
        case(Uncertain((2, 3, 4, 3)), init={"num_features": 3, "affine": True, "track_running_stats": True}),
    ],
)
class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    pass


@normalized(nn.InstanceNorm3d, cases=[case(Uncertain((2, 3, 2, 3, 2)), init={"num_features": 3})])
class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    pass


@normalized(
    F.rms_norm,
    torch.rms_norm,
    cases=[case(Uncertain((3, 12)), [12], Certain((12,)), 1e-5), case(Uncertain((2, 3, 4)), (3, 4))],
)
def rms_norm(
    input: Moments, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Moments:
    mean = F.rms_norm(input.mean, list(normalized_shape), weight, eps)
    least = torch.finfo(input.mean.dtype).eps if eps is None else eps
    return added(mean, *statistics.rms_shift(input.mean, input.variance, _last(normalized_shape), least), weight)


@normalized(
    nn.RMSNorm,
    cases=[
        case(Uncertain((3, 12)), init={"normalized_shape": 12}),
        case(Uncertain((3, 12)), init={"normalized_shape": (12,), "eps": 1e-2, "elementwise_affine": False}),
    ],
)
class RMSNorm(ADFModule, nn.RMSNorm):
    def forward(self, x: Moments) -> Moments:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


@normalized(
    F.local_response_norm,
    cases=[case(Uncertain((2, 6, 3)), 3, 0.5), case(Uncertain((2, 6, 3, 2)), 5, alpha=1.0, beta=0.5, k=2.0)],
)
def local_response_norm(
    input: Moments, size: int, alpha: float = 0.0001, beta: float = 0.75, k: float = 1.0
) -> Moments:
    mean = F.local_response_norm(input.mean, size, alpha, beta, k)
    return added(mean, *statistics.local_response_shift(input.mean, input.variance, size, alpha, beta, k))


@normalized(nn.LocalResponseNorm, cases=[case(Uncertain((2, 6, 3, 2)), init={"size": 5, "alpha": 0.1})])
class LocalResponseNorm(ADFModule, nn.LocalResponseNorm):
    def forward(self, input: Moments) -> Moments:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


def dimensions(dim: Any, x: Tensor) -> tuple[int, ...]:
    """Dimensions as torch's reductions take them: all of them, one, or several."""
    if dim is None or dim == () or dim == []:
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


@normalized(
    F.normalize, only={"p": 2.0, "out": None},
    cases=[case(Uncertain((3, 12))), case(Uncertain((2, 9, 3)), dim=-2, eps=1e-6)],
)  # fmt: skip
def normalize(input: Moments, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Moments:
    mean = F.normalize(input.mean, 2.0, dim, eps)
    return added(mean, *statistics.unit_shift(input.mean, input.variance, dimensions(dim, mean), eps))
