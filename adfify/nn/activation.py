"""Elementwise non-linearities: the two moments of f(x) for x ~ N(mean, variance).

In closed form where there is one, by quadrature elsewhere; the equations are in :mod:`adfify.gaussian`.
Each operation has its function and its module side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

GRID = case(Uncertain((4, 3)))


@register(
    F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", family="elementwise", exact=True,
    source="Frey & Hinton 1999, equations 9-10", cases=[GRID],
)  # fmt: skip
def relu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.relu(input.mean, input.variance))


@register(nn.ReLU, family="elementwise", exact=True, source="Frey & Hinton 1999, equations 9-10", cases=[GRID])
class ReLU(ADFModule, nn.ReLU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return relu(input)


@register(F.relu6, family="elementwise", exact=True, source="doubly truncated normal moments", cases=[GRID])
def relu6(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.clamp(input.mean, input.variance, 0.0, 6.0))


@register(nn.ReLU6, family="elementwise", exact=True, source="doubly truncated normal moments", cases=[GRID])
class ReLU6(ADFModule, nn.ReLU6):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return relu6(input)


@register(
    F.hardtanh, F.hardtanh_, family="elementwise", exact=True, source="doubly truncated normal moments",
    cases=[GRID, case(Uncertain((4, 3)), -0.5, 2.0)],
)  # fmt: skip
def hardtanh(input: Moments, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.clamp(input.mean, input.variance, min_val, max_val))


@register(nn.Hardtanh, family="elementwise", exact=True, source="doubly truncated normal moments", cases=[GRID])
class Hardtanh(ADFModule, nn.Hardtanh):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return hardtanh(input, self.min_val, self.max_val)


@register(
    torch.clamp, torch.clip, torch.clamp_, "clamp", "clip", "clamp_", "clip_",
    family="elementwise", exact=True, source="doubly truncated normal moments",
    cases=[case(Uncertain((4, 3)), -0.5, 0.5), case(Uncertain((4, 3)), min=0.1), case(Uncertain((4, 3)), max=0.1)],
)  # fmt: skip
def clamp(input: Moments, min: float | None = None, max: float | None = None) -> Moments:
    return Moments(*gaussian.clamp(input.mean, input.variance, min, max))


@register(
    F.leaky_relu, F.leaky_relu_, family="elementwise", exact=True, source="ReLU moments and Stein's lemma",
    cases=[GRID, case(Uncertain((4, 3)), 0.2)],
)  # fmt: skip
def leaky_relu(input: Moments, negative_slope: float = 0.01, inplace: bool = False) -> Moments:
    return Moments(*gaussian.leaky_relu(input.mean, input.variance, negative_slope))


@register(
    nn.LeakyReLU, family="elementwise", exact=True, source="ReLU moments and Stein's lemma",
    cases=[case(Uncertain((4, 3)), init={"negative_slope": 0.2})],
)  # fmt: skip
class LeakyReLU(ADFModule, nn.LeakyReLU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return leaky_relu(input, self.negative_slope)


@register(
    F.prelu, torch.prelu, family="elementwise", exact=True, source="ReLU moments and Stein's lemma",
    cases=[case(Uncertain((2, 3, 4)), Certain((3,))), case(Uncertain((2, 3, 4)), Certain((1,)))],
)  # fmt: skip
def prelu(input: Moments, weight: Tensor) -> Moments:
    # One slope for each element of dimension 1, or one for all, as in torch.
    slope = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.mean.dim() - 2))
    return Moments(*gaussian.leaky_relu(input.mean, input.variance, slope))


@register(
    nn.PReLU, family="elementwise", exact=True, source="ReLU moments and Stein's lemma",
    cases=[case(Uncertain((2, 3, 4)), init={"num_parameters": 3})],
)  # fmt: skip
class PReLU(ADFModule, nn.PReLU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return prelu(input, self.weight)


@register(
    torch.abs, torch.absolute, "abs", "abs_", family="elementwise", exact=True, source="folded normal moments", cases=[GRID]
)
def absolute(input: Moments) -> Moments:
    return Moments(*gaussian.absolute(input.mean, input.variance))


@register(
    F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_", torch.special.expit,
    family="elementwise", exact=True, source="quadrature", cases=[GRID],
)  # fmt: skip
def sigmoid(input: Moments) -> Moments:
    return Moments(*gaussian.sigmoid(input.mean, input.variance))


@register(nn.Sigmoid, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class Sigmoid(ADFModule, nn.Sigmoid):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return sigmoid(input)


@register(F.silu, family="elementwise", exact=True, source="quadrature", cases=[GRID])
def silu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.silu(input.mean, input.variance))


@register(nn.SiLU, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class SiLU(ADFModule, nn.SiLU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return silu(input)


@register(F.mish, family="elementwise", exact=True, source="quadrature", cases=[GRID])
def mish(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.mish(input.mean, input.variance))


@register(nn.Mish, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class Mish(ADFModule, nn.Mish):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return mish(input)


@register(F.hardswish, family="elementwise", exact=True, source="quadrature split at the kinks", cases=[GRID])
def hardswish(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.hardswish(input.mean, input.variance))


@register(nn.Hardswish, family="elementwise", exact=True, source="quadrature split at the kinks", cases=[GRID])
class Hardswish(ADFModule, nn.Hardswish):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return hardswish(input)


@register(F.hardsigmoid, family="elementwise", exact=True, source="doubly truncated normal moments", cases=[GRID])
def hardsigmoid(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.hardsigmoid(input.mean, input.variance))


@register(nn.Hardsigmoid, family="elementwise", exact=True, source="doubly truncated normal moments", cases=[GRID])
class Hardsigmoid(ADFModule, nn.Hardsigmoid):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return hardsigmoid(input)


@register(
    F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_", family="elementwise", exact=True, source="quadrature", cases=[GRID]
)
def tanh(input: Moments) -> Moments:
    return Moments(*gaussian.tanh(input.mean, input.variance))


@register(nn.Tanh, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class Tanh(ADFModule, nn.Tanh):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return tanh(input)


@register(
    F.gelu, family="elementwise", exact=True, source="mean in closed form, variance by quadrature",
    cases=[GRID, case(Uncertain((4, 3)), approximate="tanh")],
)  # fmt: skip
def gelu(input: Moments, approximate: str = "none") -> Moments:
    return Moments(*gaussian.gelu(input.mean, input.variance, approximate))


@register(nn.GELU, family="elementwise", exact=True, source="mean in closed form, variance by quadrature", cases=[GRID])
class GELU(ADFModule, nn.GELU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return gelu(input, self.approximate)


@register(F.softplus, family="elementwise", exact=True, source="quadrature", cases=[GRID, case(Uncertain((4, 3)), 2.0)])
def softplus(input: Moments, beta: float = 1.0, threshold: float = 20.0) -> Moments:
    return Moments(*gaussian.softplus(input.mean, input.variance, beta, threshold))


@register(nn.Softplus, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class Softplus(ADFModule, nn.Softplus):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return softplus(input, self.beta, self.threshold)


@register(F.logsigmoid, family="elementwise", exact=True, source="quadrature", cases=[GRID])
def logsigmoid(input: Moments) -> Moments:
    return Moments(*gaussian.logsigmoid(input.mean, input.variance))


@register(nn.LogSigmoid, family="elementwise", exact=True, source="quadrature", cases=[GRID])
class LogSigmoid(ADFModule, nn.LogSigmoid):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return logsigmoid(input)


@register(
    F.elu, F.elu_, family="elementwise", exact=True, source="quadrature split at the kink", cases=[GRID, case(Uncertain((4, 3)), 0.5)]
)
def elu(input: Moments, alpha: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.elu(input.mean, input.variance, alpha))


@register(nn.ELU, family="elementwise", exact=True, source="quadrature split at the kink", cases=[GRID])
class ELU(ADFModule, nn.ELU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return elu(input, self.alpha)


@register(
    F.selu, F.selu_, torch.selu, torch.selu_, family="elementwise", exact=True, source="quadrature split at the kink", cases=[GRID]
)
def selu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.selu(input.mean, input.variance))


@register(nn.SELU, family="elementwise", exact=True, source="quadrature split at the kink", cases=[GRID])
class SELU(ADFModule, nn.SELU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return selu(input)


@register(
    F.celu, F.celu_, torch.celu, torch.celu_, family="elementwise", exact=True, source="quadrature split at the kink",
    cases=[GRID, case(Uncertain((4, 3)), 0.5)],
)  # fmt: skip
def celu(input: Moments, alpha: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.celu(input.mean, input.variance, alpha))


@register(nn.CELU, family="elementwise", exact=True, source="quadrature split at the kink", cases=[GRID])
class CELU(ADFModule, nn.CELU):
    def forward(self, input: Moments) -> Moments:  # type: ignore[override]
        return celu(input, self.alpha)


@register(torch.exp, "exp", torch.exp_, "exp_", family="elementwise", exact=True, source="log-normal moments", cases=[GRID])
def exp(input: Moments) -> Moments:
    return Moments(*gaussian.exp(input.mean, input.variance))


@register(torch.square, "square", "square_", family="elementwise", exact=True, source="fourth moment of a normal", cases=[GRID])
def square(input: Moments) -> Moments:
    return Moments(*gaussian.square(input.mean, input.variance))
