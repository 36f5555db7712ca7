"""Losses with a margin: hinges of scores, of pairs of scores, and their soft relatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify import gaussian
from adfify.gaussian import hinges
from adfify.moments import Moments
from adfify.nn import activation, arithmetic
from adfify.nn.losses import LEGACY, REDUCTIONS, _OfTwo, _reduced
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten

# Exact but for the quadrature, yet not affine, which is what `exact` promises outside the elementwise family.
hinged = partial(register, family="pooling", source="rectified Gaussian; sums of independent terms", tolerance=0.01)
soft = partial(register, family="pooling", source="quadrature over each score; independent terms", tolerance=0.01)
of_pairs = partial(
    register, family="pooling", source="Hoeffding 1948 over pairs of scores, see gaussian.hinges", tolerance=0.02
)

_SIGNS = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
_SCORES = Uncertain((3, 4))
_CLASSES = torch.tensor([1, 0, 3])
_LABELS = torch.tensor([[1, 3, -1, 0], [2, -1, 1, 0], [0, 1, 2, 3]])


def _mean(x: Moments | Tensor) -> Tensor:
    return x.mean if isinstance(x, Moments) else x


@hinged(
    F.margin_ranking_loss, only=LEGACY,
    cases=[case(_SCORES, Uncertain((3, 4)), _SIGNS), case(_SCORES, Certain((3, 4)), _SIGNS, 0.5, reduction="none")],
)  # fmt: skip
def margin_ranking_loss(
    input1: Moments | Tensor, input2: Moments | Tensor, target: Tensor, margin: float = 0,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    gap = arithmetic.sub(input1, input2)
    each = activation.relu(Moments(margin - target * gap.mean, target * target * gap.variance))
    loss = partial(F.margin_ranking_loss, _mean(input1), _mean(input2), target, margin)
    return _reduced(loss(reduction=reduction), loss(reduction="none"), each, reduction)


@hinged(
    F.hinge_embedding_loss, only=LEGACY,
    cases=[case(_SCORES, _SIGNS), case(_SCORES, _SIGNS, 0.5, reduction="none")],
)  # fmt: skip
def hinge_embedding_loss(
    input: Moments, target: Tensor, margin: float = 1.0, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    """x where the target is 1, max(0, margin - x) where it is -1, and torch's sum of both elsewhere."""
    loss = partial(F.hinge_embedding_loss, input.mean, target, margin)
    plain = loss(reduction="none")
    side = torch.where(target == -1, -1.0, 1.0).to(input.dtype)
    ramp, spread = gaussian.relu(side * (input.mean - margin), input.variance)
    shift = torch.where(target == 1, 0.0, ramp - torch.relu(side * (input.mean - margin)))
    variance = torch.where(target == 1, input.variance, spread)
    return _reduced(loss(reduction=reduction), plain, Moments(plain + shift, variance), reduction)


@soft(F.soft_margin_loss, only=LEGACY, cases=[case(_SCORES, _SIGNS), case(_SCORES, Certain((3, 4)), reduction="none")])
def soft_margin_loss(
    input: Moments, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Moments:  # fmt: skip
    turned, spread = -target * input.mean, target * target * input.variance
    mean, variance = gaussian.softplus(turned, spread)
    loss = partial(F.soft_margin_loss, input.mean, target)
    plain = loss(reduction="none")
    certain = gaussian.softplus(turned, torch.zeros_like(spread))[0]
    return _reduced(loss(reduction=reduction), plain, Moments(plain + (mean - certain), variance), reduction)


@soft(
    F.multilabel_soft_margin_loss, only=LEGACY,
    cases=[
        case(_SCORES, Certain((3, 4), unit=True)),
        case(_SCORES, Certain((3, 4), unit=True), Certain((4,), positive=True), reduction="sum"),
        case(_SCORES, (0.5 * _SIGNS + 0.5), reduction="none"),
    ],
)  # fmt: skip
def multilabel_soft_margin_loss(
    input: Moments, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    def entropy(x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, target.to(x.dtype), weight, reduction="none")

    x, classes = input, input.mean.shape[-1]
    mean, variance = gaussian.expect(entropy, x.mean, x.variance)
    loss = partial(F.multilabel_soft_margin_loss, x.mean, target, weight)
    plain = loss(reduction="none")
    shift = (mean - entropy(x.mean)).sum(-1) / classes
    each = Moments(plain + shift, variance.sum(-1) / classes**2)
    return _reduced(loss(reduction=reduction), plain, each, reduction)


@of_pairs(
    F.multi_margin_loss, only=LEGACY,
    cases=[
        case(_SCORES, _CLASSES),
        case(_SCORES, _CLASSES, 2, 0.5, Certain((4,), positive=True), reduction="none"),
        case(Uncertain((4,)), torch.tensor(2), reduction="sum"),
    ],
)  # fmt: skip
def multi_margin_loss(
    input: Moments, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    mean, variance = input
    index, classes = target.unsqueeze(-1), mean.shape[-1]
    share = torch.full_like(mean, 1 / classes).scatter(-1, index, 0.0)
    if weight is not None:
        share = share * weight[index]
    own, spread = mean.gather(-1, index), variance.gather(-1, index)
    shift, spread = hinges.hinge_pairs(own, spread, mean, variance, share.unsqueeze(-2), float(margin), int(p))
    loss = partial(F.multi_margin_loss, mean, target, p, margin, weight)
    plain = loss(reduction="none")
    each = Moments(plain + shift.reshape(plain.shape), spread.reshape(plain.shape))
    return _reduced(loss(reduction=reduction), plain, each, reduction)


@of_pairs(
    F.multilabel_margin_loss, only=LEGACY,
    cases=[case(_SCORES, _LABELS), case(_SCORES, _LABELS, reduction="none"), case(Uncertain((4,)), _LABELS[1])],
)  # fmt: skip
def multilabel_margin_loss(
    input: Moments, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Moments:  # fmt: skip
    mean, variance = input
    listed = (target >= 0).cumprod(-1).bool()  # the classes up to the first -1
    hit = torch.zeros_like(mean).scatter_add(-1, target.clamp(min=0), listed.to(mean.dtype)) > 0
    share = (hit.unsqueeze(-1) & ~hit.unsqueeze(-2)).to(mean.dtype) / mean.shape[-1]
    shift, spread = hinges.hinge_pairs(mean, variance, mean, variance, share, 1.0, 1)
    loss = partial(F.multilabel_margin_loss, mean, target)
    plain = loss(reduction="none")
    return _reduced(loss(reduction=reduction), plain, Moments(plain + shift, spread), reduction)


# As torch.export has them: the reduction by its number


@hinged(aten.margin_ranking_loss, cases=[case(_SCORES, Uncertain((3, 4)), _SIGNS, 0.5, 2)])
def aten_margin_ranking_loss(
    input1: Moments | Tensor, input2: Moments | Tensor, target: Tensor, margin: float = 0.0, reduction: int = 1
) -> Moments:
    return margin_ranking_loss(input1, input2, target, margin, reduction=REDUCTIONS[reduction])


@hinged(aten.hinge_embedding_loss, cases=[case(_SCORES, _SIGNS, 0.5, 2)])
def aten_hinge_embedding_loss(input: Moments, target: Tensor, margin: float = 1.0, reduction: int = 1) -> Moments:
    return hinge_embedding_loss(input, target, margin, reduction=REDUCTIONS[reduction])


@soft(aten.soft_margin_loss, cases=[case(_SCORES, _SIGNS, 2)])
def aten_soft_margin_loss(input: Moments, target: Tensor, reduction: int = 1) -> Moments:
    return soft_margin_loss(input, target, reduction=REDUCTIONS[reduction])


@of_pairs(aten.multi_margin_loss, cases=[case(_SCORES, _CLASSES, 2, 0.5, None, 2)])
def aten_multi_margin_loss(
    input: Moments, target: Tensor, p: int = 1, margin: float = 1, weight: Tensor | None = None, reduction: int = 1
) -> Moments:
    return multi_margin_loss(input, target, p, margin, weight, reduction=REDUCTIONS[reduction])


@of_pairs(aten.multilabel_margin_loss, cases=[case(_SCORES, _LABELS, 2)])
def aten_multilabel_margin_loss(input: Moments, target: Tensor, reduction: int = 1) -> Moments:
    return multilabel_margin_loss(input, target, reduction=REDUCTIONS[reduction])


# Modules

_HALF: dict[str, Any] = {"margin": 0.5, "reduction": "sum"}


@hinged(nn.MarginRankingLoss, cases=[case(_SCORES, Uncertain((3, 4)), _SIGNS, init=_HALF)])
class MarginRankingLoss(_OfTwo, nn.MarginRankingLoss):
    def forward(self, input1: Moments | Tensor, input2: Moments | Tensor, target: Tensor) -> Moments:
        return margin_ranking_loss(input1, input2, target, self.margin, reduction=self.reduction)


@hinged(nn.HingeEmbeddingLoss, cases=[case(_SCORES, _SIGNS, init=_HALF)])
class HingeEmbeddingLoss(_OfTwo, nn.HingeEmbeddingLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return hinge_embedding_loss(input, target, self.margin, reduction=self.reduction)


@soft(nn.SoftMarginLoss, cases=[case(_SCORES, _SIGNS)])
class SoftMarginLoss(_OfTwo, nn.SoftMarginLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return soft_margin_loss(input, target, reduction=self.reduction)


@soft(nn.MultiLabelSoftMarginLoss, cases=[case(_SCORES, Certain((3, 4), unit=True))])
class MultiLabelSoftMarginLoss(_OfTwo, nn.MultiLabelSoftMarginLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return multilabel_soft_margin_loss(input, target, self.weight, reduction=self.reduction)


@of_pairs(nn.MultiMarginLoss, cases=[case(_SCORES, _CLASSES, init={"p": 2, **_HALF})])
class MultiMarginLoss(_OfTwo, nn.MultiMarginLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


@of_pairs(nn.MultiLabelMarginLoss, cases=[case(_SCORES, _LABELS)])
class MultiLabelMarginLoss(_OfTwo, nn.MultiLabelMarginLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return multilabel_margin_loss(input, target, reduction=self.reduction)
