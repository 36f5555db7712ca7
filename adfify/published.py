"""The rules of the published code, quirks included, as an overlay on the default rules.

``adfify(model, rules=published.RULES, min_variance=1e-3)`` computes what the code published with Loquercio, Segu &
Scaramuzza, "A General Framework for Uncertainty Estimation in Deep Learning" (RA-L 2020), computes: use it to reproduce
the paper, and the default rules for everything else. What differs from the default rules:

- ``min_variance`` is added to the variance, not a lower bound of it, and max pooling adds it after either half-step;
- batch normalisation multiplies the variance by weight**2, and does not divide it by running_var + eps;
- average pooling divides the average variance by the size of the input image, not of the window;
- the normal cdf is (1 + erf) / 2 and variances are differences of moments: they may come out slightly negative;
- softmax takes the exponentials as log-normal and their sum as certain;
- dropout follows the training flag: sampled in training, with the squared mask on the variance, off in evaluation.

Operations that the published code does not have keep their default rule, and ``min_variance`` is added after those
too. Among them are AdaptiveAvgPool2d, mean over space, max pooling other than 2 x 2, and timm's BatchNormAct2d.

Note [Nothing to reproduce]
    Where the published code divides zero by zero or overflows it returns NaN. Here a variance of 0, or one that
    cancellation left below 0, is that of a known number, and softmax shifts large exponents. Every other value is
    computed by the published sequence of floating-point operations: in the tails the rounding errors *are* the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import registry
from adfify.errors import InputError
from adfify.gaussian import normal_pdf
from adfify.moments import Moments, on_each
from adfify.nn import dropout as masks
from adfify.nn import max_pooling
from adfify.nn.module import ADFModule, per_dimension
from adfify.registry import Rules

LOQUERCIO = "Loquercio, Segu & Scaramuzza 2020, as published"
GAST = "Gast & Roth 2018, as published by Loquercio et al. 2020"
SOFTMAX_EPS = 1e-5

aten = torch.ops.aten


def keep_variance(variance: Tensor, min_variance: float) -> Tensor:
    """What the published code does to every variance of a layer: it adds ``min_variance``. Any shape."""
    return variance + min_variance


def add(value: Any, min_variance: float) -> Any:
    """The published meaning of ``min_variance``: :func:`keep_variance` of every variance; means stay. Any shape."""
    return on_each(lambda x: Moments(x.mean, keep_variance(x.variance, min_variance)), value)


# Not after the addition of a residual.
RULES = Rules(registry.RULES, keep_variance=add, keeping=registry.COMPUTING - {"arithmetic"})
"""The published rules, over the default ones."""

register = partial(RULES.register, source=LOQUERCIO)


def _cdf(z: Tensor) -> Tensor:
    # Not gaussian.normal_cdf: 1 + erf loses the lower tail, and what it loses is part of the published numbers.
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _standardise(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(certain, s, z): where there is no variance, else s = sqrt(variance) and z = mean / s."""
    certain = variance <= 0
    std = torch.sqrt(torch.where(certain, 1.0, variance))
    return certain, std, mean / std


def _unless(certain: Tensor, known: Tensor, mean: Tensor, variance: Tensor) -> Moments:
    return Moments(torch.where(certain, known, mean), torch.where(certain, 0.0, variance))


@register(
    F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", aten.relu.default, aten.relu_.default,
    family="elementwise", source=GAST,
)  # fmt: skip
def relu(input: Moments, inplace: bool = False) -> Moments:
    """Rectified Gaussian, variance as E[y^2] - E[y]^2. Any shape."""
    mean, variance = input
    certain, std, z = _standardise(mean, variance)
    pdf, cdf = normal_pdf(z), _cdf(z)
    first = mean * cdf + std * pdf
    second = (mean**2 + variance) * cdf + mean * std * pdf
    return _unless(certain, torch.relu(mean), first, second - first**2)


@register(nn.ReLU, family="elementwise", source=GAST)
class ReLU(ADFModule, nn.ReLU):
    """:func:`relu` as a module."""

    def forward(self, input: Moments) -> Moments:
        return relu(input)


@register(
    F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default, family="elementwise", source=GAST
)
def leaky_relu(input: Moments, negative_slope: float = 0.01, inplace: bool = False) -> Moments:
    """y = x+ - slope * x-, of the moments of the positive part x+ and the negative part x-. Any shape."""
    mean, variance = input
    certain, std, z = _standardise(mean, variance)
    cdf, density, square = _cdf(z), std * normal_pdf(z), mean**2 + variance
    below = 1.0 - cdf
    positive = mean * cdf + density
    negative = density - mean * below
    positive_variance = square * cdf + mean * density - positive**2
    negative_variance = square * below - mean * density - negative**2
    # x+ x- is always 0, so their covariance is minus the product of their means.
    total = positive_variance + negative_slope**2 * negative_variance + 2 * negative_slope * (positive * negative)
    return _unless(certain, F.leaky_relu(mean, negative_slope), positive - negative_slope * negative, total)


@register(nn.LeakyReLU, family="elementwise", source=GAST)
class LeakyReLU(ADFModule, nn.LeakyReLU):
    """:func:`leaky_relu` as a module."""

    def forward(self, input: Moments) -> Moments:
        return leaky_relu(input, self.negative_slope)


@register(F.batch_norm, family="normalization")
def batch_norm(
    input: Moments, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Moments:  # fmt: skip
    """Batch normalisation ``[N, C, ...]``: variance * weight**2; in training, the statistics of the means alone."""
    mean = F.batch_norm(input.mean, running_mean, running_var, weight, bias, training, momentum, eps)
    return Moments(mean, _weighted(input.variance, weight))


@register(torch.batch_norm, aten.batch_norm.default, family="normalization")
def aten_batch_norm(
    input: Moments, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool = True,
) -> Moments:  # fmt: skip
    """:func:`batch_norm` with the arguments in aten's order."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _weighted(variance: Tensor, weight: Tensor | None) -> Tensor:
    """The variance times the squared weight of its channel (dimension 1); without weights, as it is."""
    if weight is None:
        return variance
    return variance * weight.reshape(1, -1, *[1] * (variance.dim() - 2)) ** 2


class _BatchNorm(ADFModule):
    """What the batch normalisations share: the mean is torch's own, running statistics included."""

    weight: Tensor | None

    def forward(self, input: Moments) -> Moments:
        mean = super().forward(input.mean)  # torch's BatchNorm, next in the subclass's order of resolution
        return Moments(mean, _weighted(input.variance, self.weight))


@register(nn.BatchNorm1d, family="normalization")
class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:func:`batch_norm` of ``[N, C]`` or ``[N, C, L]``."""


@register(nn.BatchNorm2d, family="normalization")
class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:func:`batch_norm` of ``[N, C, H, W]``."""


@register(nn.BatchNorm3d, family="normalization")
class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:func:`batch_norm` of ``[N, C, D, H, W]``."""


@register(F.avg_pool2d, torch._C._nn.avg_pool2d, aten.avg_pool2d.default, family="pooling")
def avg_pool2d(
    input: Moments, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Moments:  # fmt: skip
    """Average pooling of ``[N, C, H, W]``: the average variance divided by H * W of the input, whatever the window."""
    window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    height, width = input.mean.shape[-2:]
    return Moments(F.avg_pool2d(input.mean, *window), F.avg_pool2d(input.variance, *window) / (height * width))


@register(nn.AvgPool2d, family="pooling")
class AvgPool2d(ADFModule, nn.AvgPool2d):
    """:func:`avg_pool2d` as a module; the window may also be given in the call, as in the published networks."""

    def __init__(self, kernel_size: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(kernel_size, *args, **kwargs)

    def forward(self, input: Moments, kernel_size: Any = None) -> Moments:
        if kernel_size is not None:
            return avg_pool2d(input, kernel_size)
        if self.kernel_size is None:
            raise InputError("no window given: AvgPool2d(4)(mean, variance), or AvgPool2d()(mean, variance, 4).")
        return avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


def _larger(a: Moments, b: Moments) -> Moments:
    """The larger of two independent Gaussians (Clark 1961, equations 2 and 3), as published."""
    (mean_a, variance_a), (mean_b, variance_b) = a, b
    gap = mean_a - mean_b
    certain, std, z = _standardise(gap, variance_a + variance_b)
    pdf, cdf = normal_pdf(z), _cdf(z)
    first = std * pdf + gap * cdf + mean_b
    second = (mean_a + mean_b) * std * pdf + (mean_a**2 + variance_a) * cdf + (mean_b**2 + variance_b) * (1.0 - cdf)
    return _unless(certain, torch.maximum(mean_a, mean_b), first, second - first**2)


def _two_by_two(x: Moments, keep: Callable[[Tensor], Tensor]) -> Moments:
    """Pairs along the width, then along the height; a last odd column or row is left out, as torch does."""
    height, width = (size // 2 * 2 for size in x.mean.shape[-2:])
    mean, variance = x.mean[..., :height, :width], x.variance[..., :height, :width]
    wide = _larger(*(Moments(mean[..., side::2], variance[..., side::2]) for side in (0, 1)))
    mean, variance = wide.mean, keep(wide.variance)
    return _larger(*(Moments(mean[..., side::2, :], variance[..., side::2, :]) for side in (0, 1)))


def _max_pool2d(
    x: Moments, window: tuple[Any, ...], ceil_mode: bool, return_indices: bool, keep: Callable[[Tensor], Tensor]
) -> Moments:
    if return_indices:
        raise InputError("max pooling of random values has no indices to return; set return_indices=False.")
    kernel, stride, padding, dilation = window
    stride = kernel if stride in (None, [], ()) else stride
    shape = tuple(per_dimension(value, 2) for value in (kernel, stride, padding, dilation))
    even = not any(size % 2 for size in x.mean.shape[-2:])
    if shape == ((2, 2), (2, 2), (0, 0), (1, 1)) and (even or not ceil_mode):
        return _two_by_two(x, keep)
    return max_pooling.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


# Note [The variance kept inside max pooling]
# The published module adds min_variance after the pairs along the width as well, where it changes the mean of the pairs
# along the height. So this rule asks for min_variance, by name; the addition at the end is that of every other rule.


@register(F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default, family="pooling")
def max_pool2d(
    input: Moments, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False, *, min_variance: float = 0.0,
) -> Moments:  # fmt: skip
    """Maximum of 2 x 2 windows of ``[N, C, H, W]``, pairwise by Clark's formulas; other windows by the default rule.

    Raises:
        InputError: indices are asked for; which element is the largest is random.
    """
    keep = partial(keep_variance, min_variance=min_variance)
    return _max_pool2d(input, (kernel_size, stride, padding, dilation), ceil_mode, return_indices, keep)


@register(nn.MaxPool2d, family="pooling")
class MaxPool2d(ADFModule, nn.MaxPool2d):
    """:func:`max_pool2d` as a module, by default of 2 x 2 windows; ``keep_variance_fn`` acts after either half-step."""

    def __init__(self, kernel_size: Any = 2, *args: Any, **kwargs: Any) -> None:
        super().__init__(kernel_size, *args, **kwargs)

    def forward(self, input: Moments, *, min_variance: float = 0.0) -> Moments:
        keep = self.keep_variance_fn or partial(keep_variance, min_variance=min_variance)
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return _max_pool2d(input, window, self.ceil_mode, self.return_indices, keep)


@register(torch.softmax, "softmax", torch.special.softmax, aten.softmax.int, family="softmax")
def softmax(input: Moments, dim: int, dtype: torch.dtype | None = None) -> Moments:
    """Each exponential as log-normal, over their summed means plus 1e-5, taken as certain. Any shape, over ``dim``."""
    mean, variance = input if dtype is None else input.to(dtype)
    log_mean = mean + 0.5 * variance
    # See Note [Nothing to reproduce]: below 40 the shift is 0, and above it float32 would overflow.
    shift = torch.relu(log_mean.amax(dim, keepdim=True) - 40).detach()
    average = torch.exp(log_mean - shift)
    spread = torch.exp(2 * (log_mean - shift)) * (torch.exp(variance) - 1)
    total = average.sum(dim, keepdim=True) + SOFTMAX_EPS * torch.exp(-shift)
    return Moments(average / total, spread / total**2)


@register(F.softmax, family="softmax")
def functional_softmax(
    input: Moments, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Moments:
    """:func:`softmax` with the arguments of torch.nn.functional; without ``dim`` it is torch's implicit one."""
    return softmax(input, (0 if input.mean.dim() in (0, 1, 3) else 1) if dim is None else dim, dtype)


@register(nn.Softmax, family="softmax")
class Softmax(ADFModule, nn.Softmax):
    """:func:`softmax` as a module, by default over the channels (dimension 1)."""

    def __init__(self, dim: int | None = 1, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)

    def forward(self, input: Moments) -> Moments:
        return functional_softmax(input, self.dim)


@register(nn.Softmax2d, family="softmax")
class Softmax2d(ADFModule, nn.Softmax2d):
    """:func:`softmax` over the channels of ``[N, C, H, W]`` or ``[C, H, W]``."""

    def forward(self, input: Moments) -> Moments:
        return softmax(input, -3)


@register(F.dropout, torch.dropout, aten.dropout.default, family="dropout", alias=True)
def dropout(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    """One mask of mean 1 on the mean, its square on the variance; a draw for every element. Any shape."""
    return masks.masked(input, masks.draw_mask(input.mean, p, None)) if training else input


@register(
    F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout, aten.feature_dropout.default,
    family="dropout", alias=True,
)  # fmt: skip
def channel_dropout(input: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    """:func:`dropout` with one draw for every channel of ``[N, C, ...]``."""
    return masks.masked(input, masks.draw_mask(input.mean, p, 2)) if training else input


@register(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, family="dropout", alias=True)
class Dropout(ADFModule, nn.Dropout2d):
    """:func:`channel_dropout` as a module: the published ``Dropout`` is that of ``torch.nn.Dropout2d``."""

    def forward(self, input: Moments) -> Moments:
        return channel_dropout(input, self.p, self.training)


@register(nn.Dropout, family="dropout", alias=True)
class DropoutElementwise(ADFModule, nn.Dropout):
    """:func:`dropout` as a module, for networks that have ``torch.nn.Dropout``."""

    def forward(self, input: Moments) -> Moments:
        return dropout(input, self.p, self.training)
