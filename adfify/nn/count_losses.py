"""The loss of predicted counts: the Poisson likelihood of a logarithm of the rate."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfify.gaussian import polynomial
from adfify.moments import Moments
from adfify.nn.losses import LEGACY, REDUCTIONS, _OfTwo, _reduced
from adfify.registry import Certain, Uncertain, case, register

# Exact but not affine, which is what `exact` promises outside the elementwise family.
of_count = partial(
    register, family="pooling", source="log-normal less a line, see gaussian.polynomial; sums of independent terms",
    tolerance=0.01,
)  # fmt: skip

_PAIR = (Uncertain((3, 4)), Certain((3, 4), positive=True))


@of_count(
    F.poisson_nll_loss, only={"log_input": True, **LEGACY},
    cases=[case(*_PAIR), case(*_PAIR, full=True, reduction="sum"), case(*_PAIR, reduction="none")],
)  # fmt: skip
def poisson_nll_loss(
    input: Moments, target: Tensor, log_input: bool = True, full: bool = False, size_average: bool | None = None,
    eps: float = 1e-8, reduce: bool | None = None, reduction: str = "mean",
) -> Moments:  # fmt: skip
    loss = partial(F.poisson_nll_loss, input.mean, target, True, full, eps=eps)
    shift, spread = polynomial.exp_minus_line(input.mean, input.variance, target)
    plain = loss(reduction="none")
    return _reduced(loss(reduction=reduction), plain, Moments(plain + shift, spread), reduction)


@of_count(torch.ops.aten.poisson_nll_loss, only={"log_input": True}, cases=[case(*_PAIR, True, False, 1e-8, 2)])
def aten_poisson_nll_loss(
    input: Moments, target: Tensor, log_input: bool, full: bool, eps: float, reduction: int
) -> Moments:
    return poisson_nll_loss(input, target, full=full, eps=eps, reduction=REDUCTIONS[reduction])


@of_count(nn.PoissonNLLLoss, only={"log_input": True}, cases=[case(*_PAIR), case(*_PAIR, init={"full": True})])
class PoissonNLLLoss(_OfTwo, nn.PoissonNLLLoss):
    def forward(self, input: Moments, target: Tensor) -> Moments:
        return poisson_nll_loss(input, target, full=self.full, eps=self.eps, reduction=self.reduction)
