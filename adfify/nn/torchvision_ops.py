"""Rules for torchvision's own operations. Imported only once torchvision is (see the note in adfify.registry)."""

from __future__ import annotations

from torchvision import ops

from adfify.moments import Moments
from adfify.nn import dropout
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register


@register(
    ops.stochastic_depth, family="dropout", exact=True, source=dropout.OFF_SOURCE, alias=True,
    cases=[case(Uncertain((3, 4, 2)), 0.3, "row", False), case(Uncertain((3, 4, 2)), 0.3, "batch", False)],
)  # fmt: skip
def stochastic_depth(input: Moments, p: float, mode: str, training: bool = True) -> Moments:
    return input


@dropout.sampled(ops.stochastic_depth)
def sampled_stochastic_depth(input: Moments, p: float, mode: str, training: bool = True) -> Moments:
    return dropout.stochastic_depth_draw(input, p, 1 if mode == "row" else 0, True)


@dropout.analytical(ops.stochastic_depth)
def analytic_stochastic_depth(input: Moments, p: float, mode: str, training: bool = True) -> Moments:
    return dropout.analytic(input, p)


@register(
    ops.StochasticDepth, family="dropout", exact=True, source=dropout.OFF_SOURCE, alias=True,
    cases=[case(Uncertain((3, 4, 2)), init={"p": 0.3, "mode": "row"})],
)  # fmt: skip
class StochasticDepth(dropout._Off, ops.StochasticDepth):
    pass


@dropout.sampled(ops.StochasticDepth)
class SampledStochasticDepth(ADFModule, ops.StochasticDepth):
    def forward(self, input: Moments) -> Moments:
        return sampled_stochastic_depth(input, self.p, self.mode)


@dropout.analytical(ops.StochasticDepth)
class AnalyticStochasticDepth(ADFModule, ops.StochasticDepth):
    def forward(self, input: Moments) -> Moments:
        return dropout.analytic(input, self.p)
