"""Averages and covariances of outputs that come in blocks, of some pictures at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from adfify.gaussian import moderation


class Average:
    """A mean of values that come in blocks, with its standard error; float64, about a centre.

    Args:
        centre: ``[N, k]``, what the values lie around.
        variance: ``[N, k]``, of the outputs: the unit of errors.
        other: ``[N, k]``, a second estimate, without noise but with a bias that nobody knows, if there is one.
    """

    def __init__(self, centre: Tensor, variance: Tensor, other: Tensor | None) -> None:
        self._centre, self._variance, self._other = centre, variance, other
        self._sum, self._squares = (torch.zeros_like(centre, dtype=torch.float64) for _ in range(2))
        self.weight = torch.zeros_like(self._sum[:, :1])

    def add(self, values: Tensor) -> None:
        """More of them, ``[K, N, k]``."""
        from_centre = (values - self._centre).double()
        self._sum += from_centre.sum(0)
        self._squares += from_centre.square().sum(0)
        self.weight += len(values)

    def moderated(self) -> tuple[Tensor, Tensor]:
        """The mean ``[N, k]``, and its standard error in units of the std, ``[N, 1]``."""
        mean, error = self._plain()
        if self._other is None:
            return mean, self._relative(error)
        return moderation.moderated_mean(mean, error, self._other, self._variance)

    def _plain(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self.weight
        spread = (self._squares / self.weight - mean.square()).clamp(min=0)
        error = (spread / (self.weight - 1)).sqrt()
        return (self._centre + mean).to(self._centre.dtype), error.to(self._centre.dtype)

    def _relative(self, error: Tensor) -> Tensor:
        return torch.where(self._variance > 0, error.square() / self._variance, 0.0).mean(1, keepdim=True).sqrt()


class Values:
    """The sample covariance of outputs; float64, about a centre ``[N, k]``."""

    def __init__(self, centre: Tensor) -> None:
        self._centre = centre
        self._sum = torch.zeros_like(centre, dtype=torch.float64)
        self._products = torch.zeros(*centre.shape, centre.shape[1], dtype=torch.float64, device=centre.device)
        self._blocks: list[Tensor] = []
        self.count: Tensor | None = None
        """``[N, 1]``: how many; None before the first."""

    def add(self, values: Tensor) -> None:
        """More of them, ``[K, N, k]``, at least 2 in all."""
        if self.count is None:
            self.count = torch.zeros_like(self._sum[:, :1])
        from_centre = (values - self._centre).double()
        self._sum += from_centre.sum(0)
        self._products += torch.einsum("cni,cnj->nij", from_centre, from_centre)
        self._blocks.append(from_centre)
        self.count += len(values)

    def covariance(self) -> Tensor:
        """``[N, k, k]``."""
        assert self.count is not None
        count = self.count.unsqueeze(-1)
        outer = self._sum.unsqueeze(-1) * self._sum.unsqueeze(-2) / count
        return ((self._products - outer) / (count - 1)).to(self._centre.dtype)

    def relative_error(self) -> Tensor:
        """``[N, k]``: standard error of the std, relative to it, by the fourth moment."""
        values = torch.cat(self._blocks)
        away = (values - values.mean(0)).square()
        count, variance = len(values), away.mean(0)
        return ((away - variance).square().mean(0) / (variance.square() * count).clamp(min=1e-300) / 4).sqrt()
