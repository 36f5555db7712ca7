"""Elementwise non-linearities: the two moments of f(x) for x ~ N(mean, variance).

In closed form where there is one, by quadrature elsewhere; the equations are in :mod:`adfify.gaussian`.
Each operation has its function and its module side by side.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.moments import ComplexMoments, Moments
from adfify.nn import complex_parts
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

GRID = case(Uncertain((4, 3)))

elementwise = partial(register, family="elementwise", exact=True)


@elementwise(
    F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", source="Frey & Hinton 1999, equations 9-10", cases=[GRID]
)
def relu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.relu(input.mean, input.variance))


@elementwise(nn.ReLU, source="Frey & Hinton 1999, equations 9-10", cases=[GRID])
class ReLU(ADFModule, nn.ReLU):
    def forward(self, input: Moments) -> Moments:
        return relu(input)


@elementwise(F.relu6, source="doubly truncated normal moments", cases=[GRID])
def relu6(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.clamp(input.mean, input.variance, 0.0, 6.0))


@elementwise(nn.ReLU6, source="doubly truncated normal moments", cases=[GRID])
class ReLU6(ADFModule, nn.ReLU6):
    def forward(self, input: Moments) -> Moments:
        return relu6(input)


@elementwise(
    F.hardtanh, F.hardtanh_, source="doubly truncated normal moments", cases=[GRID, case(Uncertain((4, 3)), -0.5, 2.0)]
)
def hardtanh(input: Moments, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.clamp(input.mean, input.variance, min_val, max_val))


@elementwise(nn.Hardtanh, source="doubly truncated normal moments", cases=[GRID])
class Hardtanh(ADFModule, nn.Hardtanh):
    def forward(self, input: Moments) -> Moments:
        return hardtanh(input, self.min_val, self.max_val)


@elementwise(
    torch.clamp,
    torch.clip,
    torch.clamp_,
    "clamp",
    "clip",
    "clamp_",
    "clip_",
    source="doubly truncated normal moments",
    cases=[
        case(Uncertain((4, 3)), -0.5, 0.5),
        case(Uncertain((4, 3)), min=0.1),
        case(Uncertain((4, 3)), max=0.1),
    ],
)
def clamp(input: Moments, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Moments:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return Moments(*gaussian.clamp_between(input.mean, input.variance, min, max))
    return Moments(*gaussian.clamp(input.mean, input.variance, min, max))


@elementwise(
    F.leaky_relu, F.leaky_relu_, source="ReLU moments and Stein's lemma", cases=[GRID, case(Uncertain((4, 3)), 0.2)]
)
def leaky_relu(input: Moments, negative_slope: float = 0.01, inplace: bool = False) -> Moments:
    return Moments(*gaussian.leaky_relu(input.mean, input.variance, negative_slope))


@elementwise(
    nn.LeakyReLU, source="ReLU moments and Stein's lemma", cases=[case(Uncertain((4, 3)), init={"negative_slope": 0.2})]
)
class LeakyReLU(ADFModule, nn.LeakyReLU):
    def forward(self, input: Moments) -> Moments:
        return leaky_relu(input, self.negative_slope)


@elementwise(
    F.prelu,
    torch.prelu,
    source="ReLU moments and Stein's lemma",
    cases=[case(Uncertain((2, 3, 4)), Certain((3,))), case(Uncertain((2, 3, 4)), Certain((1,)))],
)
def prelu(input: Moments, weight: Tensor) -> Moments:
    # One slope for each element of dimension 1, or one for all, as in torch.
    slope = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.mean.dim() - 2))
    return Moments(*gaussian.leaky_relu(input.mean, input.variance, slope))


@elementwise(
    nn.PReLU, source="ReLU moments and Stein's lemma", cases=[case(Uncertain((2, 3, 4)), init={"num_parameters": 3})]
)
class PReLU(ADFModule, nn.PReLU):
    def forward(self, input: Moments) -> Moments:
        return prelu(input, self.weight)


@elementwise(torch.abs, torch.absolute, "abs", "abs_", source="folded normal moments", complex=True, cases=[GRID])
def absolute(input: Moments | ComplexMoments) -> Moments:
    if isinstance(input, ComplexMoments):
        return complex_parts.magnitude(input)
    return Moments(*gaussian.absolute(input.mean, input.variance))


@elementwise(
    F.sigmoid,
    torch.sigmoid,
    torch.sigmoid_,
    "sigmoid",
    "sigmoid_",
    torch.special.expit,
    source="quadrature",
    cases=[GRID],
)
def sigmoid(input: Moments) -> Moments:
    return Moments(*gaussian.sigmoid(input.mean, input.variance))


@elementwise(nn.Sigmoid, source="quadrature", cases=[GRID])
class Sigmoid(ADFModule, nn.Sigmoid):
    def forward(self, input: Moments) -> Moments:
        return sigmoid(input)


@elementwise(F.silu, source="quadrature", cases=[GRID])
def silu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.silu(input.mean, input.variance))


@elementwise(nn.SiLU, source="quadrature", cases=[GRID])
class SiLU(ADFModule, nn.SiLU):
    def forward(self, input: Moments) -> Moments:
        return silu(input)


@elementwise(F.mish, source="quadrature", cases=[GRID])
def mish(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.mish(input.mean, input.variance))


@elementwise(nn.Mish, source="quadrature", cases=[GRID])
class Mish(ADFModule, nn.Mish):
    def forward(self, input: Moments) -> Moments:
        return mish(input)


@elementwise(F.hardswish, source="quadrature split at the kinks", cases=[GRID])
def hardswish(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.hardswish(input.mean, input.variance))


@elementwise(nn.Hardswish, source="quadrature split at the kinks", cases=[GRID])
class Hardswish(ADFModule, nn.Hardswish):
    def forward(self, input: Moments) -> Moments:
        return hardswish(input)


@elementwise(F.hardsigmoid, source="doubly truncated normal moments", cases=[GRID])
def hardsigmoid(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.hardsigmoid(input.mean, input.variance))


@elementwise(nn.Hardsigmoid, source="doubly truncated normal moments", cases=[GRID])
class Hardsigmoid(ADFModule, nn.Hardsigmoid):
    def forward(self, input: Moments) -> Moments:
        return hardsigmoid(input)


@elementwise(F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_", source="quadrature", cases=[GRID])
def tanh(input: Moments) -> Moments:
    return Moments(*gaussian.tanh(input.mean, input.variance))


@elementwise(nn.Tanh, source="quadrature", cases=[GRID])
class Tanh(ADFModule, nn.Tanh):
    def forward(self, input: Moments) -> Moments:
        return tanh(input)


@elementwise(
    F.gelu,
    source="mean in closed form, variance by quadrature",
    cases=[GRID, case(Uncertain((4, 3)), approximate="tanh")],
)
def gelu(input: Moments, approximate: str = "none") -> Moments:
    return Moments(*gaussian.gelu(input.mean, input.variance, approximate))


@elementwise(nn.GELU, source="mean in closed form, variance by quadrature", cases=[GRID])
class GELU(ADFModule, nn.GELU):
    def forward(self, input: Moments) -> Moments:
        return gelu(input, approximate=self.approximate)


@elementwise(F.softplus, source="quadrature", cases=[GRID, case(Uncertain((4, 3)), 2.0)])
def softplus(input: Moments, beta: float = 1.0, threshold: float = 20.0) -> Moments:
    return Moments(*gaussian.softplus(input.mean, input.variance, beta, threshold))


@elementwise(nn.Softplus, source="quadrature", cases=[GRID])
class Softplus(ADFModule, nn.Softplus):
    def forward(self, input: Moments) -> Moments:
        return softplus(input, self.beta, self.threshold)


@elementwise(F.logsigmoid, source="quadrature", cases=[GRID])
def logsigmoid(input: Moments) -> Moments:
    return Moments(*gaussian.logsigmoid(input.mean, input.variance))


@elementwise(nn.LogSigmoid, source="quadrature", cases=[GRID])
class LogSigmoid(ADFModule, nn.LogSigmoid):
    def forward(self, input: Moments) -> Moments:
        return logsigmoid(input)


@elementwise(F.elu, F.elu_, source="quadrature split at the kink", cases=[GRID, case(Uncertain((4, 3)), 0.5)])
def elu(input: Moments, alpha: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.elu(input.mean, input.variance, alpha))


@elementwise(nn.ELU, source="quadrature split at the kink", cases=[GRID])
class ELU(ADFModule, nn.ELU):
    def forward(self, input: Moments) -> Moments:
        return elu(input, self.alpha)


@elementwise(F.selu, F.selu_, torch.selu, torch.selu_, source="quadrature split at the kink", cases=[GRID])
def selu(input: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.selu(input.mean, input.variance))


@elementwise(nn.SELU, source="quadrature split at the kink", cases=[GRID])
class SELU(ADFModule, nn.SELU):
    def forward(self, input: Moments) -> Moments:
        return selu(input)


@elementwise(
    F.celu,
    F.celu_,
    torch.celu,
    torch.celu_,
    source="quadrature split at the kink",
    cases=[GRID, case(Uncertain((4, 3)), 0.5)],
)
def celu(input: Moments, alpha: float = 1.0, inplace: bool = False) -> Moments:
    return Moments(*gaussian.celu(input.mean, input.variance, alpha))


@elementwise(nn.CELU, source="quadrature split at the kink", cases=[GRID])
class CELU(ADFModule, nn.CELU):
    def forward(self, input: Moments) -> Moments:
        return celu(input, self.alpha)


@elementwise(torch.exp, "exp", torch.exp_, "exp_", source="log-normal moments", cases=[GRID])
def exp(input: Moments) -> Moments:
    return Moments(*gaussian.exp(input.mean, input.variance))


@elementwise(torch.square, "square", "square_", source="fourth moment of a normal", cases=[GRID])
def square(input: Moments) -> Moments:
    return Moments(*gaussian.square(input.mean, input.variance))
