"""Moments of a smooth function of a narrow Gaussian variable, from its derivatives.

Note [Small variances by quadrature]
    f(m + s z) - f(m) is all rounding once s is a few units in the last place of m or f(m), and scaling what a wider
    Gaussian gives is wrong where f is flat, as the variance goes by s^4 at a minimum. Below a width w the moments are
    therefore taken from the derivatives of f, as
        Var = sum over k of v^k / k! E[f^(k)]^2,    E[f'] = f' + v f''' / 2 + O(v^2)
    (Houdre & Perez-Abreu, Ann. Probab. 23, 1995), here to k = 3: no term is negative. The derivatives are differences
    of fourth order over five points (A&S, section 25.3): off by w^4, relative. Variance 0 is exact, and its gradients
    are right (f'' / 2 for the mean, f'^2 for the variance).

Note [Steps that float32 has]
    m + w is rounded by up to half a unit in the last place of m, which at m = 1e4 is some per cent of w. The step that
    was made is known exactly, and it is what the differences are divided by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

_WIDTH = {torch.float32: 2.0**-6, torch.float64: 2.0**-10}  # of a function that bends over a length of 1 or so
_SHARE = {torch.float32: 2.0**-10, torch.float64: 2.0**-24}  # of the mean, so that steps are not all rounding
_LEAST = {torch.float32: 2.0**-20, torch.float64: 2.0**-49}  # of the mean: a few units in its last place
_GAP = {torch.float32: 1 / 16, torch.float64: 1 / 40}  # of the distance to a kink, which is then out of reach
_STEP = 1.5  # of w


def width_of(mean: Tensor, gap: Tensor | None = None) -> Tensor:
    """w, of a function whose nearest kink is ``gap`` away: see Note [Small variances by quadrature]."""
    size = mean.detach().abs()
    width = _SHARE[mean.dtype] * size + _WIDTH[mean.dtype]
    if gap is not None:
        width = torch.maximum(torch.minimum(width, _GAP[mean.dtype] * gap.detach()), _LEAST[mean.dtype] * size)
    return width.clamp(min=1e-12)


def narrow(f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor, centre: Tensor, width: Tensor) -> Pair:
    """What uncertainty adds to ``centre`` = f(mean), and the variance, for variances of at most ``width`` squared."""
    step = _STEP * width
    made = ((mean + step) - mean).detach()
    step = torch.where(made == 0, step, made)
    upper, lower = f(mean + step) - centre, f(mean - step) - centre
    odd, even = upper - lower, upper + lower
    upper, lower = f(mean + 2 * step) - centre, f(mean - 2 * step) - centre
    far_odd, far_even = upper - lower, upper + lower
    variance = torch.minimum(variance, width * width)
    share = variance / step / step
    first, second = (8 * odd - far_odd) / (12 * step), (16 * even - far_even) / 12
    third = (0.5 * far_odd - odd) / step
    slope = first + 0.5 * share * third
    curved = 0.5 * (share * second).square() + variance * (share * third).square() / 6
    return 0.5 * share * second, variance * slope * slope + curved
