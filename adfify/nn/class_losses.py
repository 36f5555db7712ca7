"""Losses of classes: negative log-likelihood and cross-entropy, of class numbers or of class probabilities.

Of one class, without label smoothing, a cross-entropy is one of the log-softmax' outputs. Otherwise it is a weighted
sum of all of them, which are correlated: see gaussian.log_sums.cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.errors import InputError
from adfify.gaussian import log_sums
from adfify.moments import Moments
from adfify.nn import softmax
from adfify.nn.losses import LEGACY, REDUCTIONS, _OfTwo, _reduced, linear
from adfify.registry import Certain, Uncertain, case, register

aten = torch.ops.aten

of_softmax = partial(register, family="softmax", source=softmax.softmax_rule.keywords["source"], tolerance=0.1)

_CLASSES = torch.tensor([1, 0, 4])
_IGNORED = torch.tensor([[1, -100], [0, 2]])
_NLL = [
    case(Uncertain((3, 5)), _CLASSES),
    case(Uncertain((3, 5)), _CLASSES, Certain((5,), positive=True), reduction="sum"),
    case(Uncertain((2, 3, 2)), _IGNORED, Certain((3,), positive=True)),
    case(Uncertain((3, 5)), _CLASSES, reduction="none"),
    case(Uncertain((5,)), torch.tensor(2)),
]


def _of_class(
    log: Moments, certain: Callable[..., Tensor], target: Tensor, weight: Tensor | None, ignore_index: int,
    reduction: str,
) -> Moments:  # fmt: skip
    """Minus the log-probability of a class, ``[N, C, ...]`` and ``[N, ...]``; ``certain`` is the original."""
    if target.is_floating_point():
        raise InputError(
            f"nll_loss' target is of dtype {target.dtype}; it takes class numbers, of dtype torch.int64. Of class "
            "probabilities there is F.cross_entropy, of the logits."
        )
    classes = 0 if log.mean.dim() == 1 else 1
    there = target != ignore_index
    index = torch.where(there, target, 0)
    share = there.to(log.dtype)
    if weight is not None:
        share = share * weight[index]
    mean, variance = (x.gather(classes, index.unsqueeze(classes)).squeeze(classes) for x in log)
    each = Moments(-mean * share, variance * share * share)
    return _reduced(certain(reduction=reduction), certain(reduction="none"), each, reduction, share.sum())


@linear(F.nll_loss, only=LEGACY, cases=_NLL)
def nll_loss(
    input: Moments, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    certain = partial(F.nll_loss, input.mean, target, weight, ignore_index=ignore_index)
    y = _of_class(input, certain, target, weight, ignore_index, reduction)
    return Moments(certain(reduction=reduction), y.variance)


_SMOOTH = [
    case(Uncertain((3, 5)), Certain((3, 5), positive=True)),
    case(Uncertain((3, 5)), _CLASSES, label_smoothing=0.1),
    case(Uncertain((2, 3, 2)), _IGNORED, Certain((3,), positive=True), label_smoothing=0.4),
    case(Uncertain((2, 3, 2)), Certain((2, 3, 2), unit=True), Certain((3,), positive=True), reduction="sum"),
    case(Uncertain((5,)), Certain((5,), unit=True), reduction="none", label_smoothing=0.2),
]


def _shares(
    target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, like: Tensor, axis: int
) -> tuple[Tensor, float | Tensor]:
    """What each class' -log p is multiplied by, and what a mean divides by."""
    classes = like.shape[axis]
    along = [-1 if place == axis else 1 for place in range(like.dim())]
    own = like.new_ones(classes) if weight is None else weight.to(like.dtype)
    if target.is_floating_point():
        share = target * (1 - smoothing) + smoothing / classes
        return share * own.reshape(along), like.numel() / classes
    there = (target != ignore_index).unsqueeze(axis)
    index = torch.where(target != ignore_index, target, 0)
    one = torch.zeros_like(like).scatter(axis, index.unsqueeze(axis), 1.0)
    share = (one * (1 - smoothing) + smoothing / classes) * own.reshape(along) * there
    return share, (own[index] * there.squeeze(axis)).sum()


@of_softmax(F.cross_entropy, only=LEGACY, cases=[*_NLL, *_SMOOTH])
def cross_entropy(
    input: Moments, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Moments:  # fmt: skip
    axis = 0 if input.mean.dim() == 1 else 1
    certain = partial(
        F.cross_entropy, input.mean, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if not target.is_floating_point() and label_smoothing == 0:
        log = softmax.log_softmax(input, axis)
        return _of_class(log, certain, target, weight, ignore_index, reduction)
    share, count = _shares(target, weight, ignore_index, label_smoothing, input.mean, axis)
    plain = certain(reduction="none")
    shift, spread = log_sums.cross_entropy(input.mean, input.variance, share, axis)
    return _reduced(certain(reduction=reduction), plain, Moments(plain + shift, spread), reduction, count)


# As torch.export has them: the reduction by its number


@linear(aten.nll_loss_nd, cases=[case(Uncertain((3, 5)), _CLASSES, None, 2)])
def aten_nll_loss(
    input: Moments, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100
) -> Moments:
    return nll_loss(input, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction])


@of_softmax(
    aten.cross_entropy_loss,
    cases=[case(Uncertain((3, 5)), _CLASSES, None, 2), case(Uncertain((3, 5)), _CLASSES, None, 1, -100, 0.1)],
)  # fmt: skip
def aten_cross_entropy(
    input: Moments, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Moments:  # fmt: skip
    return cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )  # fmt: skip


# Modules


@linear(nn.NLLLoss, cases=[case(Uncertain((3, 5)), _CLASSES)])
class NLLLoss(_OfTwo, nn.NLLLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


@of_softmax(
    nn.CrossEntropyLoss,
    cases=[case(Uncertain((3, 5)), _CLASSES), case(Uncertain((3, 5)), _CLASSES, init={"label_smoothing": 0.2})],
)
class CrossEntropyLoss(_OfTwo, nn.CrossEntropyLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
