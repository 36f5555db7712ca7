"""Standard errors that were estimated from few events themselves."""

from __future__ import annotations

from torch import Tensor

LARGEST = 0.5
"""A variance that one event alone makes is off by all of itself, and its root by half."""
_T = (1.21, 1.44, 1.30)


def widened(relative: Tensor) -> Tensor:
    """Relative standard errors of standard deviations such that twice them holds in 95 of 100 cases.

    A variance that is a sum over n independent, equal events has a relative standard error of 1 / sqrt(n), its root of
    half that; so the error tells n, and with it how well it is known itself: the bar is widened by the ratio of the
    97.5 % points of Student's t of n degrees of freedom and of the normal distribution, by the expansion in 1 / n
    (Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.5).

    Args:
        relative: of any shape; above :data:`LARGEST` as that, where errors that are not of events may lie.
    """
    few = 4 * relative.clamp(max=LARGEST).square()  # 1 / n
    first, second, third = _T
    return relative * (1 + few * (first + few * (second + few * third)))
