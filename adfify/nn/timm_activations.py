"""Rules for timm's own activations: those with custom gradients can't be traced, the others keep their exact moments.

Imported only once timm is (see the note in adfify.registry).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers import activations, activations_me
from torch import Tensor

from adfify import gaussian
from adfify.gaussian import shrinkage
from adfify.moments import Moments
from adfify.nn import activation
from adfify.nn.module import ADFModule
from adfify.registry import Uncertain, case, register

QUADRATURE = "quadrature"
KINKS = "quadrature split at the kinks"
TRUNCATED = "doubly truncated normal moments"
GRID = case(Uncertain((4, 3)))

elementwise = partial(register, family="elementwise", exact=True, cases=[GRID])


def _smooth(f: Callable[[Tensor], Tensor], x: Moments, bend: float) -> Moments:
    # timm's own formula, whose rounding is not that of torch's function of the same name.
    return Moments(*shrinkage.smooth(f, x.mean, x.variance, bend))


@elementwise(activations.swish, activations_me.swish_me, activations_me.swish_fwd, source=QUADRATURE)
def swish(x: Moments, inplace: bool = False) -> Moments:
    return _smooth(activations.swish, x, 1.0)


@elementwise(activations.mish, activations_me.mish_me, activations_me.mish_fwd, source=QUADRATURE)
def mish(x: Moments, inplace: bool = False) -> Moments:
    return _smooth(activations.mish, x, 0.85)


@elementwise(activations.quick_gelu, source=QUADRATURE)
def quick_gelu(x: Moments, inplace: bool = False) -> Moments:
    return _smooth(activations.quick_gelu, x, 0.58)


@elementwise(activations.hard_mish, activations_me.hard_mish_me, activations_me.hard_mish_fwd, source=KINKS)
def hard_mish(x: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.expect(activations.hard_mish, x.mean, x.variance, kinks=(-2.0, 0.0)))


@elementwise(activations.hard_swish, source=KINKS)
def hard_swish(x: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.expect(activations.hard_swish, x.mean, x.variance, kinks=(-3.0, 3.0)))


@elementwise(activations_me.hard_swish_me, activations_me.hard_swish_fwd, source=KINKS)
def hard_swish_me(x: Moments, inplace: bool = False) -> Moments:
    return Moments(*gaussian.expect(activations_me.hard_swish_fwd, x.mean, x.variance, kinks=(-3.0, 3.0)))


@elementwise(
    activations.hard_sigmoid, activations_me.hard_sigmoid_me, activations_me.hard_sigmoid_fwd, source=TRUNCATED
)
def hard_sigmoid(x: Moments, inplace: bool = False) -> Moments:
    return activation.hardsigmoid(x)


@elementwise(activations.sigmoid, source=QUADRATURE)
def sigmoid(x: Moments, inplace: bool = False) -> Moments:
    return activation.sigmoid(x)


@elementwise(activations.tanh, source=QUADRATURE)
def tanh(x: Moments, inplace: bool = False) -> Moments:
    return activation.tanh(x)


GELU_SOURCE = "mean in closed form, variance by quadrature"


@elementwise(activations.gelu, source=GELU_SOURCE)
def gelu(x: Moments, inplace: bool = False) -> Moments:
    return activation.gelu(x)


@elementwise(activations.gelu_tanh, source=QUADRATURE)
def gelu_tanh(x: Moments, inplace: bool = False) -> Moments:
    return activation.gelu(x, "tanh")


@elementwise(activations.Swish, source=QUADRATURE)
class Swish(ADFModule, activations.Swish):
    def forward(self, x: Moments) -> Moments:
        return swish(x)


@elementwise(activations.Mish, source=QUADRATURE)
class Mish(ADFModule, activations.Mish):
    def forward(self, x: Moments) -> Moments:
        return mish(x)


@elementwise(activations.QuickGELU, source=QUADRATURE)
class QuickGELU(ADFModule, activations.QuickGELU):
    def forward(self, x: Moments) -> Moments:
        return quick_gelu(x)


@elementwise(activations.HardMish, source=KINKS)
class HardMish(ADFModule, activations.HardMish):
    def forward(self, x: Moments) -> Moments:
        return hard_mish(x)


@elementwise(activations.HardSwish, source=KINKS)
class HardSwish(ADFModule, activations.HardSwish):
    def forward(self, x: Moments) -> Moments:
        return hard_swish(x)


@elementwise(activations.HardSigmoid, source=TRUNCATED)
class HardSigmoid(ADFModule, activations.HardSigmoid):
    def forward(self, x: Moments) -> Moments:
        return hard_sigmoid(x)


@elementwise(activations.Sigmoid, source=QUADRATURE)
class Sigmoid(ADFModule, activations.Sigmoid):
    def forward(self, x: Moments) -> Moments:
        return sigmoid(x)


@elementwise(activations.Tanh, source=QUADRATURE)
class Tanh(ADFModule, activations.Tanh):
    def forward(self, x: Moments) -> Moments:
        return tanh(x)


@elementwise(activations.GELU, source=GELU_SOURCE)
class GELU(ADFModule, activations.GELU):
    def forward(self, x: Moments) -> Moments:
        return gelu(x)


@elementwise(activations.GELUTanh, source=QUADRATURE)
class GELUTanh(ADFModule, activations.GELUTanh):
    def forward(self, x: Moments) -> Moments:
        return gelu_tanh(x)


@register(
    activations.PReLU, family="elementwise", exact=True, source="ReLU moments and Stein's lemma",
    cases=[case(Uncertain((2, 3, 4)), init={"num_parameters": 3})],
)  # fmt: skip
class PReLU(ADFModule, activations.PReLU):
    def forward(self, input: Moments) -> Moments:
        return activation.prelu(input, self.weight)


# With a backward pass of their own, which symbolic tracing can't see into


@elementwise(activations_me.SwishMe, source=QUADRATURE)
class SwishMe(ADFModule, activations_me.SwishMe):
    def forward(self, x: Moments) -> Moments:
        return swish(x)


@elementwise(activations_me.MishMe, source=QUADRATURE)
class MishMe(ADFModule, activations_me.MishMe):
    def forward(self, x: Moments) -> Moments:
        return mish(x)


@elementwise(activations_me.HardMishMe, source=KINKS)
class HardMishMe(ADFModule, activations_me.HardMishMe):
    def forward(self, x: Moments) -> Moments:
        return hard_mish(x)


@elementwise(activations_me.HardSwishMe, source=KINKS)
class HardSwishMe(ADFModule, activations_me.HardSwishMe):
    def forward(self, x: Moments) -> Moments:
        return hard_swish_me(x)


@elementwise(activations_me.HardSigmoidMe, source=TRUNCATED)
class HardSigmoidMe(ADFModule, activations_me.HardSigmoidMe):
    def forward(self, x: Moments) -> Moments:
        return hard_sigmoid(x)
