"""Moments of values that come in blocks: numerically stable, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Powers:
    """Sums of the first four powers of deviations from a centre, in float64.

    Args:
        centre: what the values lie around: a small variance beside a large mean then loses no digits.
    """

    def __init__(self, centre: Tensor) -> None:
        self._centre = centre
        self._sums = [torch.zeros_like(centre, dtype=torch.float64) for _ in range(4)]
        self.count = 0

    @property
    def shape(self) -> torch.Size:
        """Of the centre."""
        return self._centre.shape

    def add(self, values: Tensor) -> None:
        """More of them, ``[K, *centre.shape]``."""
        deviation = values.double() - self._centre.double()
        power = torch.ones_like(deviation)
        for total in self._sums:
            power = power * deviation
            total += power.sum(0)
        self.count += len(values)

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, sample variance, and the standard errors of the mean and of the standard deviation."""
        n = self.count
        m1, m2, m3, m4 = (total / n for total in self._sums)
        central2 = (m2 - m1**2).clamp(min=0)
        central4 = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4).clamp(min=0)
        variance = central2 * n / (n - 1)
        variance_error = ((central4 - central2**2).clamp(min=0) / n).sqrt()
        std_error = torch.where(variance > 0, variance_error / (2 * variance.sqrt().clamp(min=1e-300)), 0.0)
        found = (self._centre + m1, variance, (variance / n).sqrt(), std_error)
        return tuple(part.to(self._centre.dtype) for part in found)  # type: ignore[return-value]
