"""Losses, of models that return one: of an uncertain prediction, a sum or an average over independent elements.

Sums and averages add the variances of the elements' losses, which is exact where these are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.moments import Moments
from adfify.nn import activation, arithmetic
from adfify.nn.module import ADFModule
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten
REDUCTIONS = ("none", "mean", "sum")
LEGACY = {"size_average": None, "reduce": None}

# Exact but not affine, which is what `exact` promises outside the elementwise family.
of_difference = partial(
    register, family="pooling", source="moments of the difference's function; sums of independent terms", tolerance=0.01
)
linear = partial(register, family="pooling", exact=True, source="linear in the prediction; sums of independent terms")


def _reduced(
    certain: Tensor, plain: Tensor, each: Moments, reduction: str, count: float | Tensor | None = None
) -> Moments:
    """A loss of every element as it is asked for.

    Args:
        certain: the original loss of the means, to the last bit: what uncertainty adds is added to it.
        plain: its elements.
        each: moments of the elements.
        reduction: none, mean or sum.
        count: what a mean divides by; by default the number of elements.
    """
    shift, variance = each.mean - plain, each.variance
    if reduction != "none":
        shift, variance = shift.sum(), variance.sum()
    if reduction == "mean":
        divisor = float(plain.numel()) if count is None else count
        shift, variance = shift / divisor, variance / divisor / divisor
    return Moments(certain + shift.to(certain.dtype), variance.to(certain.dtype))


def _of_difference(
    rule: Callable[[Moments], Moments], loss: Callable[..., Tensor], input: Any, target: Any, reduction: str
) -> Moments:
    """``rule`` has the moments of the function of the difference that ``loss``, the original, is a sum of."""
    means = [x.mean if isinstance(x, Moments) else x for x in (input, target)]
    each = rule(arithmetic.sub(input, target))
    return _reduced(loss(*means, reduction=reduction), loss(*means, reduction="none"), each, reduction)


def _expected(f: Callable[[Tensor], Tensor], *kinks: float) -> Callable[[Moments], Moments]:
    return lambda x: Moments(*gaussian.expect(f, x.mean, x.variance, kinks))


_PAIR = (Uncertain((3, 4)), Certain((3, 4)))
_CASES = [
    case(*_PAIR),
    case(Uncertain((3, 4)), Uncertain((3, 4)), reduction="none"),
]


@of_difference(F.mse_loss, only=LEGACY, cases=_CASES)
def mse_loss(
    input: Moments | Tensor, target: Moments | Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Moments:  # fmt: skip
    return _of_difference(activation.square, F.mse_loss, input, target, reduction)


@of_difference(F.l1_loss, only=LEGACY, cases=_CASES)
def l1_loss(
    input: Moments | Tensor, target: Moments | Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Moments:  # fmt: skip
    return _of_difference(activation.absolute, F.l1_loss, input, target, reduction)


@of_difference(F.smooth_l1_loss, only=LEGACY, cases=[*_CASES, case(*_PAIR, beta=0.3), case(*_PAIR, beta=0.0)])
def smooth_l1_loss(
    input: Moments | Tensor, target: Moments | Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", beta: float = 1.0,
) -> Moments:  # fmt: skip
    if beta == 0:
        return l1_loss(input, target, reduction=reduction)

    def f(x: Tensor) -> Tensor:
        return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=beta)

    loss = partial(F.smooth_l1_loss, beta=beta)
    return _of_difference(_expected(f, -beta, beta), loss, input, target, reduction)


@of_difference(F.huber_loss, cases=[*_CASES, case(*_PAIR, delta=0.3), case(*_PAIR, "sum")])
def huber_loss(
    input: Moments | Tensor, target: Moments | Tensor, reduction: str = "mean", delta: float = 1.0
) -> Moments:
    def f(x: Tensor) -> Tensor:
        return F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=delta)

    loss = partial(F.huber_loss, delta=delta)
    return _of_difference(_expected(f, -delta, delta), loss, input, target, reduction)


@of_difference(
    F.gaussian_nll_loss,
    cases=[case(*_PAIR, Certain((3, 4), positive=True)),
           case(*_PAIR, Certain((3, 1), positive=True), full=True, reduction="sum")],
)  # fmt: skip
def gaussian_nll_loss(
    input: Moments | Tensor, target: Moments | Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Moments:  # fmt: skip
    difference = arithmetic.sub(input, target)
    mean, wanted = (x.mean if isinstance(x, Moments) else x for x in (input, target))
    loss = partial(F.gaussian_nll_loss, mean, wanted, var, full, eps)
    plain = loss(reduction="none")
    spread = (var if isinstance(var, Tensor) else mean.new_tensor(var)).clamp(min=eps)
    spread = spread.unsqueeze(-1) if spread.shape == plain.shape[:-1] else spread
    square = activation.square(difference)
    half = Moments(plain + difference.variance / spread / 2, square.variance / spread / spread / 4)
    return _reduced(loss(reduction=reduction), plain, half, reduction)


# Of log-probabilities and of logits


@linear(
    F.kl_div, only=LEGACY,
    cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True)),
           case(Uncertain((3, 4)), Certain((3, 4)), reduction="batchmean", log_target=True),
           case(Uncertain((3, 4)), Certain((3, 4), positive=True), reduction="sum")],
)  # fmt: skip
def kl_div(
    input: Moments, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", log_target: bool = False,
) -> Moments:  # fmt: skip
    certain = partial(F.kl_div, input.mean, target, log_target=log_target)
    plain = certain(reduction="none")
    share = target.exp() if log_target else target
    each = Moments(plain, input.variance * share * share)
    count = float(len(plain)) if reduction == "batchmean" else None
    spread = _reduced(plain, plain, each, "mean" if count else reduction, count).variance
    return Moments(certain(reduction=reduction), spread)


@register(
    F.binary_cross_entropy_with_logits, family="pooling", only=LEGACY, tolerance=0.01,
    source="quadrature over each logit; sums of independent terms",
    cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True)),
           case(Uncertain((3, 4)), Certain((3, 4), positive=True), Certain((4,), positive=True), reduction="sum"),
           case(Uncertain((3, 4)), Certain((3, 4)), pos_weight=Certain((4,), positive=True), reduction="none")],
)  # fmt: skip
def binary_cross_entropy_with_logits(
    input: Moments, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean", pos_weight: Tensor | None = None,
) -> Moments:  # fmt: skip
    loss = partial(F.binary_cross_entropy_with_logits, target=target, weight=weight, pos_weight=pos_weight)
    share = target if pos_weight is None else target * pos_weight

    def f(x: Tensor) -> Tensor:  # the same, without a difference of two large numbers
        each = (1 - target) * F.softplus(x) + share * F.softplus(-x)
        return each if weight is None else weight * each

    return _reduced(loss(input.mean, reduction=reduction), f(input.mean), _expected(f)(input), reduction)


# As torch.export has them: the reduction by its number


@of_difference(aten.mse_loss, cases=[case(*_PAIR, 2)])
def aten_mse_loss(input: Moments | Tensor, target: Moments | Tensor, reduction: int = 1) -> Moments:
    return mse_loss(input, target, reduction=REDUCTIONS[reduction])


@of_difference(aten.l1_loss, cases=[case(*_PAIR, 2)])
def aten_l1_loss(input: Moments | Tensor, target: Moments | Tensor, reduction: int = 1) -> Moments:
    return l1_loss(input, target, reduction=REDUCTIONS[reduction])


@of_difference(aten.smooth_l1_loss, cases=[case(*_PAIR, 2, 0.5)])
def aten_smooth_l1_loss(
    input: Moments | Tensor, target: Moments | Tensor, reduction: int = 1, beta: float = 1.0
) -> Moments:
    return smooth_l1_loss(input, target, reduction=REDUCTIONS[reduction], beta=beta)


@of_difference(aten.huber_loss, cases=[case(*_PAIR, 2, 0.5)])
def aten_huber_loss(
    input: Moments | Tensor, target: Moments | Tensor, reduction: int = 1, delta: float = 1.0
) -> Moments:
    return huber_loss(input, target, REDUCTIONS[reduction], delta)


@linear(aten.kl_div, cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True), 2)])
def aten_kl_div(input: Moments, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Moments:
    return kl_div(input, target, reduction=REDUCTIONS[reduction], log_target=log_target)


@register(
    aten.binary_cross_entropy_with_logits, family="pooling", tolerance=0.01,
    source="quadrature over each logit; sums of independent terms",
    cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True), None, None, 1)],
)  # fmt: skip
def aten_bce_with_logits(
    input: Moments, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Moments:
    return binary_cross_entropy_with_logits(
        input, target, weight, reduction=REDUCTIONS[reduction], pos_weight=pos_weight
    )


# Modules


class _OfTwo(ADFModule):
    many_inputs = True


@of_difference(nn.MSELoss, cases=[case(*_PAIR), case(Uncertain((3, 4)), Uncertain((3, 4)), init={"reduction": "sum"})])
class MSELoss(_OfTwo, nn.MSELoss):
    def forward(self, input: Moments | Tensor, target: Moments | Tensor) -> Moments:
        return mse_loss(input, target, reduction=self.reduction)


@of_difference(nn.L1Loss, cases=[case(*_PAIR, init={"reduction": "none"})])
class L1Loss(_OfTwo, nn.L1Loss):
    def forward(self, input: Moments | Tensor, target: Moments | Tensor) -> Moments:
        return l1_loss(input, target, reduction=self.reduction)


@of_difference(nn.SmoothL1Loss, cases=[case(*_PAIR, init={"beta": 0.5})])
class SmoothL1Loss(_OfTwo, nn.SmoothL1Loss):
    def forward(self, input: Moments | Tensor, target: Moments | Tensor) -> Moments:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


@of_difference(nn.HuberLoss, cases=[case(*_PAIR, init={"delta": 0.5})])
class HuberLoss(_OfTwo, nn.HuberLoss):
    def forward(self, input: Moments | Tensor, target: Moments | Tensor) -> Moments:
        return huber_loss(input, target, self.reduction, self.delta)


@of_difference(nn.GaussianNLLLoss, cases=[case(*_PAIR, Certain((3, 4), positive=True), init={"full": True})])
class GaussianNLLLoss(_OfTwo, nn.GaussianNLLLoss):
    def forward(self, input: Moments | Tensor, target: Moments | Tensor, var: Tensor | float) -> Moments:
        return gaussian_nll_loss(input, target, var, self.full, self.eps, self.reduction)


@linear(nn.KLDivLoss, cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True), init={"reduction": "batchmean"})])
class KLDivLoss(_OfTwo, nn.KLDivLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


@register(
    nn.BCEWithLogitsLoss, family="pooling", tolerance=0.01,
    source="quadrature over each logit; sums of independent terms",
    cases=[case(Uncertain((3, 4)), Certain((3, 4), positive=True))],
)  # fmt: skip
class BCEWithLogitsLoss(_OfTwo, nn.BCEWithLogitsLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )
