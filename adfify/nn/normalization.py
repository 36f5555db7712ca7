"""Normalisation layers. With stored statistics they are affine maps, and exact.

BatchNorm in eval mode is y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, so its variance is
multiplied by weight^2 / (running_var + eps). The published code multiplies by weight^2 only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import precision
from adfify.errors import InputError
from adfify.moments import Moments, lift
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "affine map with stored statistics; batch statistics by the law of total variance"

normalization = partial(register, family="normalization", exact=True, source=SOURCE)


@normalization(
    F.batch_norm,
    cases=[
        case(Uncertain((3, 4, 5)), Certain((4,)), Certain((4,), positive=True), Certain((4,)), Certain((4,))),
        case(Uncertain((3, 4)), Certain((4,)), Certain((4,), positive=True), eps=1e-3),
    ],
)
@precision.by_itself  # it writes into the running statistics
def batch_norm(
    input: Moments, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Moments:  # fmt: skip
    """Batch normalisation; in training the batch's statistics are those of the noisy activations.

    Note [Batch statistics of uncertain activations]
    The original would see noisy activations and normalise them by their variance. By the law of total variance that
    is the variance of the means plus the mean of the variances. The statistics themselves are taken as certain, as
    averages over a whole batch.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise InputError("batch_norm(training=False) needs running_mean and running_var, and one of them is None.")
        mean = F.batch_norm(input.mean, running_mean, running_var, weight, bias, False, 0.0, eps)
        return Moments(mean, input.variance * _gain(running_var, weight, eps, input.mean.dim()))
    batch_mean, batch_var = _batch_statistics(input)
    if running_mean is not None and running_var is not None:
        count = input.mean.numel() / input.mean.shape[1]
        with torch.no_grad():
            running_mean.lerp_(batch_mean.to(running_mean.dtype), momentum)
            running_var.lerp_((batch_var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    # Written out: torch's own takes no gradient through statistics that are given to it.
    along = (1, -1, *[1] * (input.mean.dim() - 2))
    scale = (batch_var + eps).rsqrt() if weight is None else (batch_var + eps).rsqrt() * weight
    mean = (input.mean - batch_mean.reshape(along)) * scale.reshape(along)
    if bias is not None:
        mean = mean + bias.reshape(along)
    return Moments(mean.to(input.mean.dtype), input.variance * scale.square().reshape(along))


@normalization(
    torch.batch_norm,
    cases=[
        case(
            Uncertain((3, 4, 5)), Certain((4,)), Certain((4,)), Certain((4,)), Certain((4,), positive=True),
            False, 0.1, 1e-5, False,
        )
    ],
)  # fmt: skip
@precision.by_itself
def aten_batch_norm(
    input: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Moments:
    """:func:`batch_norm` with its arguments in the order that torch's C++ has them in."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@normalization(
    torch.ops.aten._native_batch_norm_legit_no_training,
    cases=[
        case(
            Uncertain((3, 4, 5)), Certain((4,)), Certain((4,)), Certain((4,)), Certain((4,), positive=True), 0.1, 1e-5,
        )
    ],
)  # fmt: skip
def functional_batch_norm(
    input: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Moments, Moments, Moments]:
    """What torch.export's functional form has; its second and third results are empty outside training."""
    functional = torch.ops.aten._native_batch_norm_legit_no_training.default
    mean, *saved = functional(input.mean, weight, bias, running_mean, running_var, momentum, eps)
    variance = input.variance * _gain(running_var, weight, eps, input.mean.dim())
    return Moments(mean, variance), lift(saved[0]), lift(saved[1])


def _batch_statistics(x: Moments) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.mean.dim()) if d != 1]
    mean = precision.widened(x.mean)
    return mean.mean(dims), mean.var(dims, correction=0) + x.variance.mean(dims)


def _gain(variance: Tensor, weight: Tensor | None, eps: float, dim: int) -> Tensor:
    """What a variance is multiplied by: weight^2 / (variance + eps), laid out along dimension 1."""
    gain = (precision.widened(variance) + eps).reciprocal()
    if weight is not None:
        gain = gain * precision.widened(weight).square()
    return gain.reshape(1, -1, *[1] * (dim - 2))


class _BatchNorm(ADFModule):
    """What the three batch normalisations share: which statistics are used, and counting batches."""

    def forward(self, input: Moments) -> Moments:
        self._check_input_dim(input.mean)  # type: ignore[operator]
        stored = self.running_mean is not None
        batch = self.training or not stored
        return batch_norm(
            input,
            self.running_mean if stored and (not self.training or self.track_running_stats) else None,  # type: ignore[arg-type]
            self.running_var if stored and (not self.training or self.track_running_stats) else None,  # type: ignore[arg-type]
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            batch,
            self._average_factor(),
            self.eps,  # type: ignore[arg-type]
        )

    def _average_factor(self) -> float:
        """How far the running statistics move: the momentum, or a cumulative average where that is None."""
        count: Any = self.num_batches_tracked
        if self.training and self.track_running_stats and count is not None:
            count.add_(1)
            if self.momentum is None:
                return 1.0 / float(count)
        return 0.0 if self.momentum is None else float(self.momentum)  # type: ignore[arg-type]


@normalization(
    nn.BatchNorm1d,
    cases=[case(Uncertain((3, 4)), init={"num_features": 4}), case(Uncertain((3, 4, 5)), init={"num_features": 4})],
)
class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    pass


@normalization(
    nn.BatchNorm2d,
    cases=[
        case(Uncertain((3, 4, 3, 2)), init={"num_features": 4}),
        case(Uncertain((3, 4, 3, 2)), init={"num_features": 4, "affine": False, "eps": 1e-2}),
    ],
)
class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    pass


@normalization(nn.BatchNorm3d, cases=[case(Uncertain((2, 4, 2, 3, 2)), init={"num_features": 4})])
class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    pass


# In training it would need the statistics of all processes.
@normalization(
    nn.SyncBatchNorm, only={"training": False}, cases=[case(Uncertain((3, 4, 3, 2)), init={"num_features": 4})]
)
class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    pass
