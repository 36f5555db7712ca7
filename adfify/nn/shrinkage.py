"""The rarer activations of torch.nn: shrinking, thresholds, gates; each function beside its module."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from adfify import gaussian
from adfify.gaussian import shrinkage
from adfify.moments import Moments
from adfify.nn import activation, softmax
from adfify.nn.module import ADFModule
from adfify.nn.structural import parts
from adfify.registry import Uncertain, case, register

GRID = case(Uncertain((4, 3)))
TRUNCATED = "truncated normal moments"

elementwise = partial(register, family="elementwise", exact=True)


@elementwise(
    F.hardshrink, torch.hardshrink, source=TRUNCATED, continuous=False, cases=[GRID, case(Uncertain((4, 3)), 1.0)]
)  # fmt: skip
def hardshrink(input: Moments, lambd: float = 0.5) -> Moments:
    return Moments(*shrinkage.hardshrink(input.mean, input.variance, lambd))


@elementwise(nn.Hardshrink, source=TRUNCATED, continuous=False, cases=[case(Uncertain((4, 3)), init={"lambd": 0.75})])
class Hardshrink(ADFModule, nn.Hardshrink):
    def forward(self, input: Moments) -> Moments:
        return hardshrink(input, self.lambd)


@elementwise(F.softshrink, source=TRUNCATED, cases=[GRID, case(Uncertain((4, 3)), 1.0)])
def softshrink(input: Moments, lambd: float = 0.5) -> Moments:
    return Moments(*shrinkage.softshrink(input.mean, input.variance, lambd))


@elementwise(nn.Softshrink, source=TRUNCATED, cases=[case(Uncertain((4, 3)), init={"lambd": 0.75})])
class Softshrink(ADFModule, nn.Softshrink):
    def forward(self, input: Moments) -> Moments:
        return softshrink(input, self.lambd)


@elementwise(
    F.threshold, torch.threshold, source=TRUNCATED, continuous=False,
    cases=[case(Uncertain((4, 3)), 0.5, -1.0), case(Uncertain((4, 3)), -0.25, 2.0)],
)  # fmt: skip
def threshold(input: Moments, threshold: float, value: float, inplace: bool = False) -> Moments:
    return Moments(*shrinkage.threshold(input.mean, input.variance, threshold, value))


elementwise(torch.threshold_, source=TRUNCATED, continuous=False, cases=[case(Uncertain((4, 3)), 0.5, -1.0)])(threshold)


@elementwise(
    nn.Threshold,
    source=TRUNCATED,
    continuous=False,
    cases=[case(Uncertain((4, 3)), init={"threshold": 0.25, "value": 2.0})],
)
class Threshold(ADFModule, nn.Threshold):
    def forward(self, input: Moments) -> Moments:
        return threshold(input, self.threshold, self.value)


@elementwise(F.tanhshrink, source="quadrature split at 0", cases=[GRID])
def tanhshrink(input: Moments) -> Moments:
    return Moments(*shrinkage.tanhshrink(input.mean, input.variance))


@elementwise(nn.Tanhshrink, source="quadrature split at 0", cases=[GRID])
class Tanhshrink(ADFModule, nn.Tanhshrink):
    def forward(self, input: Moments) -> Moments:
        return tanhshrink(input)


@elementwise(F.softsign, source="quadrature split at the kink", cases=[GRID])
def softsign(input: Moments) -> Moments:
    return Moments(*shrinkage.softsign(input.mean, input.variance))


@elementwise(nn.Softsign, source="quadrature split at the kink", cases=[GRID])
class Softsign(ADFModule, nn.Softsign):
    def forward(self, input: Moments) -> Moments:
        return softsign(input)


RANDOM_SLOPE = "ReLU moments and Stein's lemma, at the middle slope"


@elementwise(
    F.rrelu, torch.rrelu, source=RANDOM_SLOPE, only={"training": False}, cases=[GRID, case(Uncertain((4, 3)), 0.2, 0.5)]
)
def rrelu(
    input: Moments, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False
) -> Moments:
    return activation.leaky_relu(input, (lower + upper) / 2)


@elementwise(nn.RReLU, source=RANDOM_SLOPE, cases=[GRID])
class RReLU(ADFModule, nn.RReLU):
    def forward(self, input: Moments) -> Moments:
        return rrelu(input, self.lower, self.upper)


GATE = "Goodman 1960, equation 2, with the gate's moments by quadrature"

# Independent halves, so it is exact to the quadrature of the sigmoid; not of degree 1 in every element, though.
gated = partial(register, family="arithmetic", tolerance=0.005, source=GATE)


@gated(F.glu, cases=[case(Uncertain((2, 6))), case(Uncertain((2, 4, 3)), 1)])
def glu(input: Moments, dim: int = -1) -> Moments:
    value, gate = parts(torch.chunk, input, 2, dim)
    opened = activation.sigmoid(gate)
    shift = value.mean * (opened.mean - torch.sigmoid(gate.mean))
    _, variance = gaussian.product(value.mean, value.variance, opened.mean, opened.variance)
    return Moments(F.glu(input.mean, dim) + shift, variance)


@gated(nn.GLU, cases=[case(Uncertain((2, 6)))])
class GLU(ADFModule, nn.GLU):
    def forward(self, input: Moments) -> Moments:
        return glu(input, self.dim)


@softmax.softmax_rule(F.softmin, cases=[case(Uncertain((4, 5)), 1)])
def softmin(input: Moments, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Moments:
    return softmax.softmax(Moments(-input.mean, input.variance), dim, dtype=dtype)


@softmax.softmax_rule(nn.Softmin, cases=[case(Uncertain((4, 5)), init={"dim": 1})])
class Softmin(ADFModule, nn.Softmin):
    def forward(self, input: Moments) -> Moments:
        return softmin(input, softmax._dimension(self.dim, input))
