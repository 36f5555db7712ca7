"""Outputs that are seldom active: what sampling may have missed of their variance, and how far off it then is.

Note [What was not sampled]
A variance of samples is too small, and its error with it, where what makes the output vary was not drawn: a ReLU that
is on in one of a thousand inputs. The one pass needs no draws, and on ordinary networks it is too small, not too large:
so an output of which it is the larger is looked at again; of a small network, for which that is cheap, any of which it
is another: a gate that is seldom closed is missed as one that is seldom open. Noise of 2 to 4 times the size shows
where it varies at all (scaled-sigma sampling: Sun, Li, Liu, Luo & Gu, IEEE Trans. CAD 34, 2015); what is constant even
there, as x - x, is certain. Along the gradients found there, noise is drawn STRETCH times as wide, and weighted by its
likelihood: a defensive mixture (Hesterberg, Technometrics 37, 1995) with the balance heuristic (Veach & Guibas,
SIGGRAPH 1995), of which no weight is above 1 / PLAIN whatever the number of inputs is. The variance of what is linear
along those directions is known, so that draws of a nearly linear network leave little open. The more precise of the
two is taken; where they agree, the one that stood keeps standing, and its error bar becomes that of the second look if
that is wider: what the pairs have not seen, their differences can't tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adfify.gaussian import student
from adfify.joint import Question
from adfify.moments import Moments
from adfify.noisy import Draws, Original, Source, gradients

SCALES = (2.0, 3.0, 4.0)
STRETCH, PLAIN, DIRECTIONS = 3.0, 0.25, 32
PROBES, FEW_PROBES = 48, 12
LEAST_VALUES, MOST_VALUES = 64, 8192
LARGER, OTHER, UNLIKE, UNSURE = 1.15, 0.005, 1e-4, 0.1
"""How much larger the one pass' std has to be for a second look; by how much another, or another mean in units of the
std, for one of a small network; or how unsure that of the pairs is."""
MOST_NUMBERS = 2**22
"""Of all noise that is drawn at a time."""


@dataclass(frozen=True)
class Seen:
    """Of one picture and its k outputs, by weighted draws.

    Attributes:
        mean, mean_error, std, std_error: ``[1, k]``.
        correlation: ``[1, k, k]``.
        varies: ``[1, k]``, whether it did at larger noise.
        shares: of each source ``[1, k, D]``, how squared gradients there are spread over it; 0 if there are none.
    """

    mean: Tensor
    mean_error: Tensor
    std: Tensor
    std_error: Tensor
    correlation: Tensor
    varies: Tensor
    shares: dict[str, Tensor]


@dataclass(frozen=True)
class _Given(Draws):
    """Noise that was drawn before."""

    given: dict[str, Tensor] | None = None

    def noise(self, name: str, shape: Sequence[int], first: bool = True) -> Tensor:
        """See :meth:`Draws.noise`."""
        assert self.given is not None
        return self.given[name]


class Look:
    """A second look at some outputs.

    Args:
        original: of the network.
        question: of one picture.
        indices: ``[1, k]``, of the outputs.
        sources: of the noise.
        chunk: how many noisy inputs may be in one pass.
        free: how many noisy inputs take little.
    """

    def __init__(
        self,
        original: Original,
        question: Question,
        indices: Tensor,
        sources: Sequence[Source],
        chunk: int,
        free: int,
    ) -> None:
        self._original, self._question, self._indices, self._chunk = original, question, indices, chunk
        self._sources, self._free = list(sources), free

    def again(self, doubtful: Tensor) -> Seen:
        """What is to be seen of the outputs, in the directions of those that are ``doubtful``, ``[1, k]``."""
        directions, varies, shares = self._directions(doubtful[0].nonzero()[:, 0].tolist())
        values, along = self._weighted(directions)
        weights = _weight(along)
        unit = (weights / weights.sum()).unsqueeze(1)
        near = slice(len(along) // 16)  # so many as that many draws can fit
        mean, mean_error, covariance, error = _moments(values, along[:, near], directions[near], unit)
        std = covariance.diagonal().sqrt()
        rounding = _rounding(values, self._question)  # what is rounded varies too
        std = torch.where(std > rounding, std, 0.0)
        scale = torch.where(std > 0, std, torch.inf)
        std_error = torch.where(std > 0, (std * student.widened(error / (2 * scale.square()))).clamp(min=rounding), 0.0)
        correlation = covariance / scale / scale.unsqueeze(1)
        like = self._question.first.mean
        found = [x.unsqueeze(0).to(like) for x in (mean, mean_error, std, std_error, correlation)]
        of_each = torch.split(shares.unsqueeze(0).to(like), [x.drawn[0].numel() for x in self._sources], 2)
        by_source = {source.name: share for source, share in zip(self._sources, of_each, strict=True)}
        return Seen(found[0], found[1], found[2], found[3], found[4], varies.unsqueeze(0), by_source)

    def _directions(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """``[J, D]``, unit vectors in the space of all noise, of the masks' 0; which varied, ``[k]``; shares."""
        count = PROBES if self._free > PROBES else FEW_PROBES
        every = []
        kept: list[list[Tensor]] = [[] for _ in positions]
        drawn = self._drawn("probes", count)
        for numbers in _blocks(range(count), self._chunk):
            scale = torch.tensor([SCALES[n % len(SCALES)] for n in numbers], device="cpu")
            noise = {name: scale.reshape(-1, *[1] * (x.dim() - 1)) * x for name, x in _part(drawn, numbers).items()}
            draws = _Given(self._question.request.seed, numbers, given=noise)
            with torch.enable_grad():
                outputs, sources = self._original.at(
                    self._question.inputs, self._question.layout, draws, gradients=True
                )
                chosen = outputs[:, self._indices[0]]
                found = gradients([chosen[:, n] for n in positions], sources)
            every.append(chosen.detach())
            parts = [torch.zeros_like(g) if s.is_mask else g for s, g in zip(sources, found, strict=True)]
            whole = torch.cat([part.to(torch.float64).cpu() for part in parts], 2)
            for rows, gradient in zip(kept, whole.unbind(1), strict=True):
                norms = gradient.norm(dim=1, keepdim=True)
                good = (norms[:, 0] > 0) & norms[:, 0].isfinite()
                rows += list((gradient[good] / norms[good]).unbind(0))
        of_each = max(1, DIRECTIONS // len(positions))
        directions = [row for rows in kept for row in rows[:of_each]]
        values = torch.cat(every)
        shares = torch.zeros(values.shape[1], self._elements, dtype=torch.float64, device="cpu")
        for position, rows in zip(positions, kept, strict=True):
            if rows:
                shares[position] = torch.stack(rows).square().mean(0)
        empty = torch.zeros(0, self._elements, dtype=torch.float64, device="cpu")
        varied = (values - values[:1]).abs().amax(0) > _rounding(values, self._question)
        return torch.stack(directions) if directions else empty, varied, shares

    def _weighted(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``[K, k]`` at noise that is wider along ``directions``, and it times those, ``[K, J]``; float64."""
        count = max(LEAST_VALUES, min(4 * self._free, MOST_VALUES, MOST_NUMBERS // self._elements))
        values, products, drawn = [], [], self._drawn("values", count)
        plain = max(1, round(1 / PLAIN)) if len(directions) else 1
        for numbers in _blocks(range(count), self._chunk):
            noise = _part(drawn, numbers)
            flat = torch.cat([x.flatten(1) for x in noise.values()], 1).double()
            wide = torch.tensor([n % plain != 0 for n in numbers], device="cpu")
            if len(directions):
                along = directions[torch.tensor([(n - n // plain) % len(directions) for n in numbers], device="cpu")]
                amount = (STRETCH - 1) * (along * flat).sum(1) * wide
                flat = flat + amount.unsqueeze(1) * along
            products.append(flat @ directions.T)
            sizes = [x[0].numel() for x in noise.values()]
            given = {
                name: part.reshape(x.shape).float()
                for (name, x), part in zip(noise.items(), torch.split(flat, sizes, 1), strict=True)
            }
            draws = _Given(self._question.request.seed, numbers, given=given)
            outputs, _ = self._original.at(self._question.inputs, self._question.layout, draws, gradients=False)
            values.append(outputs[:, self._indices[0]].double().cpu())
        return torch.cat(values), torch.cat(products)

    @property
    def _elements(self) -> int:
        return sum(source.drawn[0].numel() for source in self._sources)

    def _drawn(self, what: str, count: int) -> dict[str, Tensor]:
        """Of each source ``[count, ...]``, standard normal and independent of all other draws."""
        found = {}
        for source in self._sources:
            seed = Draws(self._question.request.seed, range(0)).seed_of(source.name, what)
            generator = torch.Generator("cpu").manual_seed(seed)
            shape = (count, *source.drawn.shape[1:])
            found[source.name] = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return found


def at_larger_noise(original: Original, question: Question, draws: int) -> Tensor:
    """``[M]``: how much the outputs vary at noise of 2 to 4 times the size, by draw, in units of that size.

    Of an event that was in none of ``draws``, the share of all may be 1 / draws, and what it does shows there: so the
    deviation that it makes is about that, times the root of the share.
    """
    found: list[Tensor] = []

    def widened(x: Moments, scale: float) -> Moments:
        return Moments(x.mean, scale**2 * x.variance)

    for n, scale in enumerate(SCALES):
        wider = question.inputs.changed_moments(partial(widened, scale=scale))
        numbers = range(FEW_PROBES // len(SCALES))
        noise = Draws(Draws(question.request.seed, range(0)).seed_of("larger noise", n), numbers)
        values, _ = original.at(wider, question.layout, noise, gradients=False)
        found.append((values - values.mean(0)) / scale)
    deviation: Tensor = torch.cat(found).square().mean(0).sqrt()
    return deviation / float(draws**0.5)


def by_one_pass(question: Question, indices: Tensor, std: Tensor) -> Moments:
    """Moments of the outputs ``[1, k]`` by the one pass, or ``std`` where it has none."""
    mean, variance = (x.gather(1, indices).to(std) for x in question.one_pass())
    good = variance.isfinite() & mean.isfinite() & (variance >= 0)
    return Moments(torch.where(good, mean, 0.0), torch.where(good, variance, std.square()))


def _moments(values: Tensor, along: Tensor, directions: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments of weighted values: what is linear in the noise has the mean 0, and its variance is known.

    Args:
        values: ``[K, k]``.
        along: ``[K, J]``, products of the noise and the directions.
        directions: ``[J, D]``.
        unit: ``[K, 1]``, weights that sum to 1.

    Returns:
        Means ``[k]`` and their standard errors, the covariance ``[k, k]``, and the standard errors of the variances.
    """
    design = torch.cat((torch.ones_like(unit), along), 1)
    fitted = torch.linalg.lstsq(unit.sqrt() * design, unit.sqrt() * values, driver="gelsd").solution
    linear, residual = along @ fitted[1:], values - design @ fitted
    slopes = fitted[1:].T @ directions
    covariance = slopes @ slopes.T + (unit * residual).T @ residual
    each = residual * (2 * linear + residual)  # the two are uncorrelated, as fitted: the first part is but of the error
    error = (unit * (each - (unit * each).sum(0))).square().sum(0).sqrt()
    return fitted[0], (unit * residual).square().sum(0).sqrt(), covariance, error


def _part(drawn: dict[str, Tensor], numbers: range) -> dict[str, Tensor]:
    return {name: x[numbers.start : numbers.stop] for name, x in drawn.items()}


def _rounding(values: Tensor, question: Question) -> Tensor:
    """``[k]``: by how much values ``[K, k]`` of the network's precision may differ without a reason."""
    return 8 * torch.finfo(question.first.mean.dtype).eps * values.abs().amax(0)


def _weight(along: Tensor) -> Tensor:
    """``[K]``: the likelihood of noise over that of the mixture, from its products with the directions ``[K, J]``."""
    if not along.shape[1]:
        return along.new_ones(len(along))
    wider = (along.square() * (0.5 - 0.5 / STRETCH**2)).exp() / STRETCH
    return 1 / (PLAIN + (1 - PLAIN) * wider.mean(1))


def _blocks(numbers: range, size: int) -> Iterator[range]:
    for at in range(numbers.start, numbers.stop, size):
        yield range(at, min(at + size, numbers.stop))
