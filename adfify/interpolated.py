"""Joint moments by gradients of the original network at noisy inputs: the default for few outputs.

Note [What decides the cost]
A pair of noisy inputs costs two passes and, for each output, two passes backwards. How far off its estimate may be, the
pair itself shows: by d, the difference of |grad f|^2 at its two inputs over their mean, whose square is 1.7 times the
relative variance of the estimate, give or take a factor of 1.7, on every network and at every noise that was measured
(docs/accuracy.md); further pairs, by their differences. Pairs are added until the standard error of the std is below
TOLERANCE, and passes without gradients until that of the mean, drawn towards the one pass' own, is below
MEAN_TOLERANCE: both have an end, since a large network is dear. A small one, of which hundreds of inputs pass in the
time of a few, gets 16 pairs, and thousands if those do not do. Each picture gets its own number, whatever else is in
the batch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from adfify.averages import Average, Values
from adfify.gaussian import interpolation, student
from adfify.joint import Question
from adfify.moments import Attribution, JointMoments
from adfify.noisy import FREE, LEAST_CHUNK, Draws, Original, Source, gradients, most_in_a_pass
from adfify.rare import LARGER, OTHER, UNLIKE, UNSURE, Look, by_one_pass

TOLERANCE, MOST_PAIRS = 0.02, 4
LOOSE_TOLERANCE, MOST_LOOSE_PAIRS, WORTH = 0.055, 12, 0.2
"""Up to more pairs where the error is still large, unless that of one is: then single passes are worth more."""
MEAN_TOLERANCE, SINGLES, MOST_SINGLES, MOST_LOOSE_SINGLES = 0.12, 4, 24, 64
EASY_SINGLES = 64
"""Of a small network."""
SURE = 14.0
"""By how many of its standard errors the std of values has to be larger to be believed more than gradients."""
WITHIN, LEAST = 0.6, 4e-6
"""Relative variance of one pair's estimate over d^2; see Note [What decides the cost]. And what it is at least."""
EASY_TOLERANCE, MORE, MOST_FREE = 0.008, 16, 2**14
"""For small networks: their tolerance, how many more pairs when they are cheap, and how many there may be."""


def moments(question: Question) -> JointMoments:
    """Of one picture."""
    original = Original(question.network, question.precision)
    chunk = question.request.chunk_size or most_in_a_pass(question.layout.activations)
    return _Estimate(original, question, chunk).run()


def unbiased(question: Question) -> JointMoments:
    """With ``samples`` noisy inputs, at correlations drawn at random: the expectation is exact, as Monte Carlo's is."""
    original = Original(question.network, question.precision)
    return _Unbiased(original, question, max(2, question.request.chunk_size or LEAST_CHUNK)).run()


class _Estimate:
    """Of one picture. Shapes: k outputs, P pairs, 2 of each pair, K noisy inputs, D elements of a source."""

    def __init__(self, original: Original, question: Question, chunk: int, pairs: int | None = None) -> None:
        self._original, self._question, self._chunk, self._enough = original, question, chunk, pairs
        self._request = question.request
        self._free = FREE // max(1, question.layout.activations)
        self._sources: dict[str, Source] = {}
        # Sums over the pairs; [2, ...] is X with X', and X with itself.
        self._products: dict[bool, Tensor] = {}  # by whether they are the model's: [2, 1, k, k]
        self._gradients: dict[str, Tensor] = {}  # by source: [1, k, D]
        self._summands: dict[str, Tensor] = {}  # by source: [2, 1, k, D]
        self._each: list[Tensor] = []  # [2, 1, k], variances of each pair
        self._unlike: list[Tensor] = []  # [1, k], d^2 of each pair
        self._values: list[tuple[Draws, Tensor, Tensor]] = []  # draws, values and linear [K, 1, k]

    def run(self) -> JointMoments:
        asked, many = self._request.samples, self._free >= interpolation.MANY
        first = self._singles(range(EASY_SINGLES if many else SINGLES))
        if self._enough is not None:
            pairs = self._enough
        elif asked is not None:
            pairs = max(1, asked // 2)
        else:
            pairs = interpolation.MANY if many else 1
        self._pairs(range(pairs), first)
        if asked is None and self._enough is None:
            if pairs > 1:
                return self._with_more(min(MORE * self._free, MOST_FREE), first)
            self._add_pairs(first)
        return self._looked_at(self._finish(first))

    def _error(self) -> float:
        """Of the std, relative to it, over the outputs."""
        return float(self.relative_error().square().mean().sqrt())

    def _add_pairs(self, first: Tensor) -> None:
        """As many as the picture seems to need, together: a pass of several is faster than several passes."""
        while True:
            error, ran = self._error(), len(self._each)
            needed = min(ran * (error / TOLERANCE) ** 2, MOST_PAIRS) if error > TOLERANCE else ran
            if error > LOOSE_TOLERANCE and error * ran**0.5 < WORTH:
                needed = max(needed, min(ran * (error / LOOSE_TOLERANCE) ** 2, MOST_LOOSE_PAIRS))
            if needed <= ran:
                return
            self._pairs(range(ran, math.ceil(needed)), first)

    def _with_more(self, most: int, first: Tensor) -> JointMoments:
        """The result, with more pairs, a power of two of them as Sobol points want, where those so far do not do."""
        needed = len(self._each) * min((self._error() / EASY_TOLERANCE) ** 2, MOST_FREE)
        pairs: int = 2 ** math.ceil(math.log2(min(max(needed, 1), max(most, 1))))
        if pairs <= len(self._each):
            return self._looked_at(self._finish(first))
        return _Estimate(self._original, self._question, self._chunk, pairs).run()

    def _singles(self, numbers: range) -> Tensor:
        """``[K, 1, M]``: outputs at independent noisy inputs."""
        question, values = self._question, []
        for block in _blocks(numbers, self._chunk):
            draws = Draws(self._request.seed, block)
            values.append(self._original.at(question.inputs, question.layout, draws, gradients=False)[0])
        return torch.cat(values).unsqueeze(1)

    def _pairs(self, numbers: range, first: Tensor | None) -> None:
        r, many = self._correlations(len(numbers))
        for block in _blocks(numbers, max(1, self._chunk // 2)):
            position = slice(block.start - numbers.start, block.stop - numbers.start)
            self._pair_block(Draws(self._request.seed, block, r[position], many), first)

    def _correlations(self, pairs: int) -> tuple[Tensor, bool]:
        """r of each pair, and whether they are points of a Sobol sequence."""
        return interpolation.correlations(pairs), pairs >= interpolation.MANY

    def _pair_block(self, draws: Draws, first: Tensor | None) -> None:
        question = self._question
        with torch.enable_grad():
            outputs, sources = self._original.at(question.inputs, question.layout, draws, gradients=True)
            values = outputs.unsqueeze(1)
            if not self._each:
                self._start(values.detach() if first is None else first)
            chosen = values.gather(2, self._indices.expand(draws.count, -1, -1))
            found = gradients(list(chosen[:, 0].unbind(1)), sources)
        linear = torch.zeros_like(chosen)
        each, norms = (chosen.new_zeros(2, len(draws.numbers), 1, chosen.shape[2]) for _ in range(2))
        for source, gradient in zip(sources, found, strict=True):
            a, b = torch.unflatten(gradient.unsqueeze(1), 0, (-1, 2)).unbind(1)  # [P, 1, k, D]
            both, self._sources[source.name] = torch.stack(interpolation.products(a, b)), source
            self._products[source.is_mask] += both.sum(1)
            each += both.diagonal(dim1=-2, dim2=-1)
            middle = 0.5 * (a + b)
            linear += _along(middle.repeat_interleave(2, 0), self._noise(draws, source))
            self._add(self._gradients, source.name, middle.sum(0))
            if self._request.attribution:
                self._add(self._summands, source.name, torch.stack(interpolation.summands(a, b)).sum(1))
            norms += torch.stack([(x * x).sum(-1) for x in (a, b)])
        unlike = (2 * norms.diff(dim=0)[0] / norms.sum(0).clamp(min=torch.finfo(norms.dtype).tiny)).square()
        self._unlike += unlike.unbind(0)
        self._each += each.unbind(1)
        self._values.append((draws, chosen.detach(), linear))

    def _start(self, values: Tensor) -> None:
        """Choose outputs by some values ``[K, 1, M]``."""
        means = values.mean(0)
        self._indices = self._request.indices(means)
        self._centre = means.gather(1, self._indices)
        chosen = values.gather(2, self._indices.expand(len(values), -1, -1))
        self._rough = (chosen.var(0) if len(values) > 2 else torch.zeros_like(self._centre), len(values))
        shape = (2, *self._indices.shape, self._indices.shape[1])
        self._products = {model: means.new_zeros(shape) for model in (False, True)}

    def _add(self, table: dict[str, Tensor], name: str, value: Tensor) -> None:
        table[name] = table[name] + value if name in table else value

    def _noise(self, draws: Draws, source: Source) -> Tensor:
        """``[K, D]``, standard normal."""
        return draws.noise(source.name, source.drawn.shape[1:], source.first).to(self._centre).flatten(1)

    def _ratio(self) -> Tensor:
        """``[N]``: how much larger the gradients' products are of X with itself than with X'."""
        cross, itself = (self._products[False] + self._products[True]).diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.where(cross > 0, itself / cross.clamp(min=torch.finfo(cross.dtype).tiny), 1e6).clamp(1, 1e6)

    def _weights(self) -> Tensor:
        """``[2, N]``: of X with X', and of X with itself."""
        itself = interpolation.weight_of_itself(self._ratio(), len(self._each))
        return torch.stack((1 - itself, itself))

    def relative_error(self) -> Tensor:
        """``[N, k]``: standard error of the std, relative to it; see Note [What decides the cost]."""
        variance, relative = self._by_pairs()
        return torch.where(self._doubtful(variance, relative), 1.0, relative).to(self._centre.dtype)

    def _by_pairs(self) -> tuple[Tensor, Tensor]:
        """``[N, k]``: variances, and the relative error of their roots by what the pairs differ."""
        # Double: variances have squares here, which float32 may not hold.
        variances = torch.einsum("pwnk,wn->pnk", torch.stack(self._each).double(), self._weights().double())
        ran, mean = len(variances), variances.mean(0)
        if ran >= interpolation.MANY:  # neighbours differ little in r
            spread = 0.5 * variances.diff(dim=0).square().mean(0)
        else:
            between = (variances - mean).square().sum(0)  # (P - 1) times the sample variance
            within = WITHIN * torch.stack(self._unlike).sum(0) * mean.square()
            spread = (between + within) / (2 * ran - 1)
        relative = ((spread / mean.square()).clamp(min=LEAST) / ran / 4).sqrt()
        widened = student.widened(relative) if ran >= interpolation.MANY else relative
        return mean, torch.where(mean > 0, widened, 0.0)

    def _of_values(self, relative: Tensor, count: int) -> Tensor:
        """``[N, k]``: what the relative error of the std of so many values is at least, if that of the pairs is this.

        What is rare for the pairs is so for the values, which may have seen none of it.
        """
        ran = len(self._each)
        as_rare = relative * (ran / count) ** 0.5 if ran >= interpolation.MANY else torch.zeros_like(relative)
        return as_rare.clamp(min=(0.5 / max(count - 1, 1)) ** 0.5)

    def _doubtful(self, variance: Tensor, relative: Tensor) -> Tensor:
        """Where gradients say too little: nothing, though they or the values vary, or much less than the values do."""
        rough, count = self._rough
        itself = torch.stack(self._each)[:, 1].sum(0)
        nothing = (variance <= 0) & ((itself > 0) | (rough > 0))
        much_less: Tensor = rough > (1 + SURE * self._of_values(relative, count)) * variance
        return nothing | much_less

    def _finish(self, first: Tensor | None) -> JointMoments:
        ran = len(self._each)
        weights = self._weights() / ran
        parts = {model: torch.einsum("wnij,wn->nij", total, weights) for model, total in self._products.items()}
        parts[True] = self._mended(parts[True])
        by_gradients = self._mended(parts[False]) + parts[True]
        values = Values(self._centre)
        average = self._average(first, by_gradients.diagonal(dim1=-2, dim2=-1), values)
        covariance, error = self._with_values(by_gradients, values)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        mean, mean_error = average.moderated()
        return JointMoments(
            mean=mean,
            covariance=covariance,
            indices=self._indices.contiguous(),
            variance=variance,
            method="adjoint",
            samples=self._indices.new_tensor([2 * ran]),
            draws=average.weight[:, 0].to(torch.int64),
            mean_error=mean_error * variance.sqrt(),
            std_error=error * variance.sqrt(),
            model_variance=parts[True].diagonal(dim1=-2, dim2=-1),
            model_covariance=parts[True],
            attribution=self._attribution(weights, variance) if self._request.attribution else None,
            shape=self._question.layout.shape,
            batch_axis=self._question.layout.batch_axis,
        )

    def _looked_at(self, found: JointMoments) -> JointMoments:
        """With the variances of what was hardly sampled mended; see Note [What was not sampled]."""
        std, error, mean_error = found.std, found.std_error, found.mean_error
        assert error is not None and mean_error is not None
        one_pass = by_one_pass(self._question, self._indices, std)
        apart, aside = (one_pass.std - std).abs(), (one_pass.mean - found.mean).abs()
        doubtful = (one_pass.std > LARGER * std) & (apart > 3 * error)
        if self._request.samples is None and self._free >= interpolation.MANY:
            doubtful |= (apart > OTHER * std) & (apart > 2 * error)
            doubtful |= (aside > UNLIKE * std) & (aside > 3 * mean_error)
            doubtful |= error > UNSURE * std
        doubtful &= one_pass.std > 0
        if not doubtful.any():
            return found
        look = Look(
            self._original, self._question, self._indices, list(self._sources.values()), self._chunk, self._free
        )
        seen = look.again(doubtful)
        # Constant at wider noise too, though not at larger noise: the one pass is all that there is.
        unseen = doubtful & (seen.std <= 0) & (std <= 0) & seen.varies
        both, differ = torch.hypot(seen.std_error, error), (seen.std - std).abs()
        better = 2 * seen.std_error * std < error * seen.std
        mended = doubtful & (seen.std > 0) & (better | (std <= 0) | ((differ > 3 * both) & (seen.std > std)))
        changed = torch.where(mended, seen.std, torch.where(unseen, one_pass.std, std))
        # As far as the draws can't exclude the one pass.
        widened = torch.maximum(torch.minimum(seen.std_error, apart), torch.where(differ > 2 * both, differ / 2, 0.0))
        widened = torch.where(doubtful, torch.maximum(error, widened), error)
        nearer = doubtful & ((seen.mean - one_pass.mean).abs() < (seen.mean - found.mean).abs())
        mean_error = torch.where(nearer, torch.maximum(mean_error, torch.minimum(seen.mean_error, aside)), mean_error)
        new_error = torch.where(mended, seen.std_error, torch.where(unseen, one_pass.std, widened))
        unlike = (seen.mean - found.mean).abs() > 3 * torch.hypot(seen.mean_error, mean_error)
        other = mended | (doubtful & ~unseen & unlike)
        mean = torch.where(other, seen.mean, torch.where(unseen, one_pass.mean, found.mean))
        by_draws = torch.where(unseen, torch.maximum(one_pass.std, aside), mean_error)
        return self._with_std(
            replace(found, mean=mean, std_error=new_error, mean_error=torch.where(other, seen.mean_error, by_draws)),
            changed,
            torch.where((mended | unseen).unsqueeze(-1), seen.correlation, 0.0),
            mended | unseen,
            seen.shares,
        )

    def _with_std(
        self, found: JointMoments, std: Tensor, correlation: Tensor, changed: Tensor, shares: dict[str, Tensor]
    ) -> JointMoments:
        """The same with other deviations ``[N, k]`` and correlations ``[N, k, k]`` of those that are ``changed``.

        Of what had no variance at all, ``shares`` ``[N, k, D]`` of each source are what it is made of.
        """
        if not changed.any():
            return found
        before = found.correlation
        assert before is not None and found.model_covariance is not None and found.model_variance is not None
        either = changed.unsqueeze(-1) | changed.unsqueeze(-2)
        mixed = torch.where(either, torch.where(changed.unsqueeze(-1), correlation, correlation.mT), before)
        own = torch.eye(mixed.shape[-1], dtype=torch.bool, device=mixed.device)
        mixed = self._mended(torch.where(own, (std > 0).to(mixed).unsqueeze(-1), mixed))
        scale = std / mixed.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(mixed.dtype).tiny).sqrt()
        covariance = mixed * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        factor = torch.where(found.variance > 0, variance / torch.where(found.variance > 0, found.variance, 1.0), 0.0)
        model = found.model_covariance * (factor.unsqueeze(-1) * factor.unsqueeze(-2)).sqrt()
        attribution = found.attribution
        if attribution is not None:
            new = torch.where(found.variance > 0, 0.0, variance).unsqueeze(-1)
            inputs, masks = (
                {
                    name: share * factor.reshape(*factor.shape, *[1] * (share.dim() - 2))
                    + (new * shares[name]).reshape(share.shape)
                    for name, share in part.items()
                }
                for part in (attribution.inputs, attribution.masks)
            )
            attribution = replace(attribution, inputs=inputs, masks=masks)
        return replace(
            found,
            covariance=covariance,
            variance=variance,
            model_covariance=model,
            model_variance=model.diagonal(dim1=-2, dim2=-1),
            attribution=attribution,
        )

    def _with_values(self, covariance: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """The covariance by gradients and that of the values, each by its precision, and the std's relative error."""
        error = self.relative_error()
        if values.count is None or any(source.is_mask for source in self._sources.values()):
            return covariance, error  # of the values, nobody can say what the masks' part is
        least = self._of_values(self._by_pairs()[1], int(values.count[0, 0]))
        other = torch.maximum(values.relative_error(), least).to(error)
        own = error.square()
        if len(self._each) < interpolation.MANY:
            # What one pair shows of its error is rough: the others' have a part in the weight, though not in the bar.
            own = 0.5 * (own + own.median(1, keepdim=True).values)
        weight = own / (own + other.square())
        weight = torch.where(weight > 1e-3, weight, 0.0)  # what is linear stays exact
        together = _lerped(covariance, values.covariance(), weight)
        return self._mended(together), torch.hypot((1 - weight) * error, weight * other)

    def _average(self, first: Tensor | None, variance: Tensor, outputs: Values) -> Average:
        """Of what the mean gradient leaves of the outputs: a control variate, whose own mean is 0."""
        average, ran = Average(self._centre, variance, None if first is None else self._one_pass()), len(self._each)
        if ran > 1:  # a single pair has no other, whose gradient is independent of its noise
            for draws, values, linear in self._values:
                average.add(values - (self._linear(draws) - linear) / (ran - 1))
        if first is None:
            return average
        error, values, numbers = self._error(), first, range(len(first))
        while True:
            chosen = values.gather(2, self._indices.expand(len(values), -1, -1))
            outputs.add(chosen)
            average.add(chosen - self._linear(Draws(self._request.seed, numbers)) / ran)
            more = float(average.moderated()[1][0, 0]) > MEAN_TOLERANCE and numbers.stop < MOST_SINGLES
            more |= error > LOOSE_TOLERANCE and numbers.stop < MOST_LOOSE_SINGLES
            if self._request.samples is not None or not more:
                return average
            numbers = range(numbers.stop, numbers.stop + SINGLES)
            values = self._singles(numbers)

    def _one_pass(self) -> Tensor | None:
        """``[N, k]``: the means of the one pass, which are good where its variances do not matter much."""
        if any(source.is_mask for source in self._sources.values()):
            return None  # sampled masks would be in it
        return self._question.one_pass().mean.gather(1, self._indices)

    def _mended(self, covariance: Tensor) -> Tensor:
        """The nearest covariance: of few pairs, an estimate may have a negative eigenvalue near 0."""
        values, vectors = torch.linalg.eigh(covariance.double())
        nearest = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
        return torch.where((values[..., :1] < 0).unsqueeze(-1), nearest.to(covariance.dtype), covariance)

    def _linear(self, draws: Draws) -> Tensor:
        """``[K, 1, k]``: the gradients, summed over the pairs, times the noise."""
        parts = [_along(self._gradients[s.name], self._noise(draws, s)) for s in self._sources.values()]
        return sum(parts[1:], parts[0])

    def _attribution(self, weights: Tensor, variance: Tensor) -> Attribution:
        shares: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        found = {name: torch.einsum("wnkd,wn->nkd", parts, weights) for name, parts in self._summands.items()}
        total = sum(share.sum(2) for share in found.values())
        assert isinstance(total, Tensor)
        scale = torch.where(total > 0, variance / torch.where(total > 0, total, 1.0), 0.0).unsqueeze(-1)
        for name, source in self._sources.items():
            share = scale * found[name]
            shares[source.is_mask][name] = share.reshape(*share.shape[:2], *source.drawn.shape[1:])
        return Attribution(inputs=shares[False], masks=shares[True], layers={})


class _Unbiased(_Estimate):
    """With pairs alone, nothing that depends on what was seen, and no eigenvalue mended."""

    def run(self) -> JointMoments:
        self._pairs(range((self._request.samples or 0) // 2), None)
        return self._finish(None)

    def _correlations(self, pairs: int) -> tuple[Tensor, bool]:
        offsets = torch.rand(
            pairs, generator=torch.Generator("cpu").manual_seed(self._request.seed), dtype=torch.float64, device="cpu"
        )
        return (torch.arange(pairs, device="cpu") + offsets) / pairs, False

    def _weights(self) -> Tensor:
        return self._centre.new_tensor([[1.0], [0.0]])

    def _mended(self, covariance: Tensor) -> Tensor:
        return covariance


def _lerped(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Covariances ``[N, k, k]`` of which each variance has its own weight ``[N, k]``, 0: of a, 1: of b."""
    own, other = (x.diagonal(dim1=-2, dim2=-1) for x in (a, b))
    std = torch.lerp(own, other, weight).sqrt()
    more = torch.maximum(weight.unsqueeze(-1), weight.unsqueeze(-2))
    mixed = torch.lerp(_correlations(a), _correlations(b), more) * std.unsqueeze(-1) * std.unsqueeze(-2)
    return mixed.diagonal_scatter(std.square(), dim1=-2, dim2=-1)


def _correlations(covariance: Tensor) -> Tensor:
    """``[N, k, k]``, 0 of what does not vary."""
    std = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(std > 0, std, torch.inf)
    return covariance / unit.unsqueeze(-1) / unit.unsqueeze(-2)


def _along(gradient: Tensor, noise: Tensor) -> Tensor:
    """``[K, n, k]``: gradients ``[n, k, D]``, or one for each draw, ``[K, n, k, D]``, times noise ``[K, D]``."""
    equation = "nkd,cd->cnk" if gradient.dim() == 3 else "cnkd,cd->cnk"
    return torch.einsum(equation, gradient, noise)


def _blocks(numbers: range, size: int) -> list[range]:
    return [range(at, min(at + size, numbers.stop)) for at in range(numbers.start, numbers.stop, size)]
