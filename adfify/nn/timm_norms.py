"""Rules for timm's normalisation: its functions, which most of its classes only call, and three classes.

Its LayerNorm, GroupNorm, RmsNorm and SimpleNorm classes, with an activation or without, are traced through: what they
call has a rule here or in adfify.nn.layer_norm. As leaves, the functions keep the covariance of an element and its
statistics, which a trace into their pow, mean and rsqrt would lose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm import layers
from timm.layers import fast_norm, grn
from torch import Tensor

from adfify.gaussian import statistics
from adfify.moments import Moments
from adfify.nn import normalization
from adfify.nn.layer_norm import added, along_channels, normalized
from adfify.nn.module import ADFModule
from adfify.precision import widened
from adfify.registry import Certain, Uncertain, case, register


def _last(normalized_shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


_RMS_CASES = [case(Uncertain((3, 12)), [12], Certain((12,))), case(Uncertain((3, 3, 4)), [3, 4], eps=1e-2)]
_RMS_2D_CASES = [case(Uncertain((2, 12, 3, 2)), [12], Certain((12,))), case(Uncertain((2, 12, 3, 2)), [12], eps=1e-2)]


@normalized(fast_norm.rms_norm, cases=_RMS_CASES)
def rms_norm(x: Moments, normalized_shape: list[int], weight: Tensor | None = None, eps: float = 1e-5) -> Moments:
    mean = fast_norm.rms_norm(x.mean, normalized_shape, weight, eps)
    return added(mean, *statistics.rms_shift(x.mean, x.variance, _last(normalized_shape), eps), weight)


@normalized(fast_norm.rms_norm2d, cases=_RMS_2D_CASES)
def rms_norm2d(x: Moments, normalized_shape: list[int], weight: Tensor | None = None, eps: float = 1e-5) -> Moments:
    mean = fast_norm.rms_norm2d(x.mean, normalized_shape, weight, eps)
    return added(mean, *statistics.rms_shift(x.mean, x.variance, (1,), eps), along_channels(weight, mean))


@normalized(fast_norm.simple_norm, cases=_RMS_CASES)
def simple_norm(x: Moments, normalized_shape: list[int], weight: Tensor | None = None, eps: float = 1e-5) -> Moments:
    mean = fast_norm.simple_norm(x.mean, normalized_shape, weight, eps)
    return added(mean, *statistics.simple_norm_shift(x.mean, x.variance, _last(normalized_shape), eps), weight)


@normalized(layers.norm.LayerNormExp2d, cases=[case(Uncertain((2, 12, 3, 2)), init={"num_channels": 12})])
class LayerNormExp2d(ADFModule, layers.norm.LayerNormExp2d):
    """Chooses its formula by the memory format, on which torch.fx can't branch."""

    def forward(self, x: Moments) -> Moments:
        mean = super().forward(x.mean)
        shift, variance = statistics.standardise_shift(x.mean, x.variance, (1,), self.eps)
        return added(mean, shift, variance, along_channels(self.weight, mean))


@normalized(
    layers.SyncBatchNormAct, source=normalization.SOURCE, tolerance=0.02,
    cases=[case(Uncertain((3, 4, 3, 2)), init={"num_features": 4})],
)  # fmt: skip
class SyncBatchNormAct(normalization._BatchNorm, layers.SyncBatchNormAct):
    converts_children = True

    def forward(self, x: Moments) -> Moments:
        y = super().forward(x)
        for name in ("drop", "act"):  # set by timm's conversion of a BatchNormAct2d, and only by it
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y


# Global response normalisation

GLOBAL_SOURCE = "second-order moments of the norms and their average, product with the covariance of x (Goodman 1960)"


@register(
    grn.GlobalResponseNorm, family="normalization", source=GLOBAL_SOURCE, tolerance=0.05,
    cases=[
        case(Uncertain((2, 4, 4, 6)), init={"dim": 6}),
        case(Uncertain((2, 6, 4, 3)), init={"dim": 6, "channels_last": False}),
    ],
)  # fmt: skip
class GlobalResponseNorm(ADFModule, grn.GlobalResponseNorm):
    """y = x + bias + weight x N, N_c the norm of channel c over the average of the channels' norms."""

    def forward(self, x: Moments) -> Moments:
        mean = super().forward(x.mean)  # type: ignore[no-untyped-call]
        weight = widened(self.weight).view(self.wb_shape)
        shift, variance = _respond(widened(x.mean), x.variance, weight, self.spatial_dim, self.channel_dim, self.eps)
        return added(mean, shift, variance)


def _respond(
    mean: Tensor, variance: Tensor, weight: Tensor, spatial: tuple[int, int], channel: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What uncertainty adds to the mean of x (1 + weight N), and its variance.

    With G_c the norms and A their average + eps: Cov(G_c, A) = Var(G_c) / n, Cov(x, G) = Var(x) E[x / G] and
    Cov((x - m)^2, G) = Var(x)^2 E[G''] (Stein 1981, lemma 1), taken at the means, and N = G / A to second order.
    Measured at std 0.1 to 2 of the elements' spread and weights of 0.5 to 3: the std is off by 8 / 4.5 / 2 % at most
    for 12 / 49 / 196 elements a channel, the mean by less than .02 of its std.
    """
    certain = mean.norm(p=2, dim=spatial, keepdim=True)
    shift, spread = statistics.norm_shift(mean, variance, certain, spatial)
    norm, n = certain + shift, mean.shape[channel]
    average = norm.mean(channel, keepdim=True) + eps
    average_spread = spread.mean(channel, keepdim=True) / n
    ratio = norm / average
    expected = ratio + (ratio * average_spread - spread / n) / average.square()
    ratio_spread = (spread + ratio * (ratio * average_spread - 2 * spread / n)) / average.square()
    slope = weight * (1 - ratio / n) / torch.where(norm > 0, norm, 1.0) / average
    shared, bend = slope * mean * variance, slope * variance * variance

    factor, factor_spread = 1 + weight * expected, weight.square() * ratio_spread.clamp(min=0)
    base = mean * (1 + weight * (certain / (certain.mean(channel, keepdim=True) + eps)))
    product = factor_spread * (mean * mean + variance) + variance * factor.square()
    product = product + shared * (shared + 2 * mean * factor) + 2 * factor * bend
    return (mean * factor + shared) - base, product.clamp(min=0)
