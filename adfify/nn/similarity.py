"""How alike two vectors are: the cosine of the angle between them, and their distance."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.gaussian import statistics
from adfify.moments import Moments, lift
from adfify.nn.arithmetic import sub
from adfify.nn.layer_norm import added
from adfify.nn.module import ADFModule
from adfify.nn.norms import KNOWN, SOURCE, of_order
from adfify.registry import Certain, Uncertain, case, register

# Measured at input std of .3 to .9 about means within 1.3 of 0, of 12 elements: where noise is as large as the vector.
cosine = partial(register, family="normalization", source="delta method, second order for the mean", tolerance=0.3)
distance = partial(register, family="pooling", source=SOURCE, tolerance=0.05, only={"p": KNOWN})

_BOTH = (Uncertain((3, 12)), Uncertain((3, 12)))
_PAIRS = [case(Uncertain((3, 12)), Uncertain((3, 12))), case(Uncertain((3, 12)), Certain((3, 12)))]


@cosine(F.cosine_similarity, cases=[*_PAIRS, case(Uncertain((2, 9, 3)), Uncertain((2, 9, 3)), dim=-2, eps=1e-6)])
def cosine_similarity(x1: Moments | Tensor, x2: Moments | Tensor, dim: int = 1, eps: float = 1e-8) -> Moments:
    a, b = lift(x1), lift(x2)
    certain = F.cosine_similarity(a.mean, b.mean, dim, eps)
    if x1 is x2:
        return Moments(certain, torch.zeros_like(certain))
    shift, spread = statistics.cosine_shift(a.mean, a.variance, b.mean, b.variance, dim, eps)
    return added(certain, shift.squeeze(dim), spread.squeeze(dim))


@cosine(nn.CosineSimilarity, cases=_PAIRS)
class CosineSimilarity(ADFModule, nn.CosineSimilarity):
    many_inputs = True

    def forward(self, x1: Moments | Tensor, x2: Moments | Tensor) -> Moments:
        return cosine_similarity(x1, x2, self.dim, self.eps)


@distance(
    F.pairwise_distance,
    cases=[
        *_PAIRS,
        case(Uncertain((3, 12)), Uncertain((3, 12)), keepdim=True),
        case(Uncertain((3, 12)), Uncertain((3, 12)), 1.0),
    ],
)
def pairwise_distance(
    x1: Moments | Tensor, x2: Moments | Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Moments:
    gap = sub(x1, x2)
    certain = F.pairwise_distance(
        x1.mean if isinstance(x1, Moments) else x1, x2.mean if isinstance(x2, Moments) else x2, p, eps, True
    )
    return of_order(Moments(gap.mean + eps, gap.variance), p, certain, (-1,), keepdim)


@distance(nn.PairwiseDistance, only={"norm": KNOWN}, cases=_PAIRS)
class PairwiseDistance(ADFModule, nn.PairwiseDistance):
    many_inputs = True

    def forward(self, x1: Moments | Tensor, x2: Moments | Tensor) -> Moments:
        return pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)
