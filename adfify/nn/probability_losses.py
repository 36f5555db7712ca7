"""The loss of predicted probabilities: binary cross-entropy after a sigmoid."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.gaussian import bounded
from adfify.moments import Moments
from adfify.nn.inverse_functions import SOURCE
from adfify.nn.losses import LEGACY, _OfTwo, _reduced
from adfify.registry import Certain, Uncertain, case, register

_PAIR = (Uncertain((3, 4), within=(0.0, 1.0)), Certain((3, 4), unit=True))

of_probability = partial(register, family="pooling", source=f"{SOURCE}; sums of independent terms", tolerance=0.01)


@of_probability(
    F.binary_cross_entropy, only=LEGACY,
    cases=[
        case(*_PAIR),
        case(*_PAIR, Certain((4,), positive=True), reduction="sum"),
        case(*_PAIR, reduction="none"),
    ],
)  # fmt: skip
def binary_cross_entropy(
    input: Moments, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    mean, spread = bounded.cross_entropy(input.mean, input.variance, target)
    plain, _ = bounded.cross_entropy(input.mean, torch.zeros_like(input.variance), target)
    if weight is not None:
        mean, plain, spread = mean * weight, plain * weight, spread * weight * weight
    certain = F.binary_cross_entropy(input.mean, target, weight, reduction=reduction)
    return _reduced(certain, plain, Moments(mean, spread), reduction)


@of_probability(nn.BCELoss, cases=[case(*_PAIR), case(*_PAIR, init={"reduction": "none"})])
class BCELoss(_OfTwo, nn.BCELoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)
