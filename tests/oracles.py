"""Trials, made from the registry, and the truth about each: from the *original* operation, never from a rule.

A :class:`Trial` is one target of one rule with one of its cases. Four oracles know its moments: quadrature
(elementwise), differences (what is affine in every element), Monte Carlo in z-scores (everything), and for sampled
dropout the law of total variance.
"""

from __future__ import annotations

import itertools
import math
import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from adfify.moments import ComplexMoments, Moments
from adfify.nn import comparisons
from adfify.nn.complex_values import view_as_complex, view_as_real
from adfify.original import OnCopy
from adfify.registry import RULES, Case, Certain, Rule, Rules, Target, Uncertain, target_name
from adfify.skeleton import Skeleton
from adfify.tracing import Traced

Operation = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Trial:
    """One call of an original operation, and of the rule that stands for it."""

    rule: Rule
    target: Target
    case: Case
    rules: Rules
    name: str

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def composed(self) -> bool:
        """Whether it is a small network, of which a tolerance can only be stated with weights as torch draws them."""
        return "composed" in self.rule.source

    @property
    def is_module(self) -> bool:
        return isinstance(self.target, type)

    def uncertain(self) -> list[Uncertain]:
        """The uncertain arguments, in order."""
        found: list[Uncertain] = []
        _fill((self.case.args, dict(self.case.kwargs)), found.append, lambda spec: None)
        return found

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the uncertain arguments, in order; a complex one is given as its parts, [..., 2]."""
        return [(*spec.shape, 2) if spec.complex else spec.shape for spec in self.uncertain()]

    def without_examples(self) -> Trial:
        """The same call for an empty batch; its uncertain arguments are still to be cut."""

        def none(spec: Certain | Tensor) -> Any:
            return replace(spec, shape=(0, *spec.shape[1:])) if isinstance(spec, Certain) and spec.of_examples else spec

        args, kwargs = _fill((self.case.args, dict(self.case.kwargs)), lambda spec: spec, none)
        return replace(self, case=replace(self.case, args=args, kwargs=kwargs))

    def domain(self, inputs: Sequence[Moments]) -> list[Moments]:
        """Those inputs that have to be positive, or within bounds, are made so."""
        return [_moved(spec, x) for spec, x in zip(self.uncertain(), inputs, strict=True)]

    def moments(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Moments]:
        """Generic means (within 1.3 scale of 0) and variances (0.1 to 0.8) of the uncertain arguments."""
        draw = torch.Generator().manual_seed(self.seed)
        pairs = [torch.rand((2, *shape), generator=draw, dtype=torch.float64) for shape in self.shapes()]
        generic = [Moments(scale * (2.6 * mean - 1.3), 0.1 + 0.7 * variance) for mean, variance in pairs]
        return [x.to(dtype) for x in self.domain(generic)]

    def original(
        self, dtype: torch.dtype, device: str = "cpu", *, train: bool = False, on_copies: bool = True
    ) -> Operation:
        """The original as a function of the uncertain tensors alone; what it writes in place, it writes to a copy."""
        module = self._module().train(train) if self.is_module else None
        operation = _callable(self.target) if module is None else module.to(device, _floating(dtype))
        case = _in_training(self.case) if train and module is None else self.case
        return self._bound(operation, case, dtype, device, Tensor.clone if on_copies else lambda x: x)

    def converted(self, dtype: torch.dtype, device: str = "cpu") -> Operation:
        """The rule as a function of the uncertain Moments alone."""
        operation = self.adf_module().to(device, _floating(dtype)) if self.is_module else self.rule.apply
        return self._bound(operation, self.case, dtype, device, lambda x: x)

    def original_module(self) -> nn.Module:
        """The original module in eval mode, float64, with random weights and statistics."""
        return self._module().eval()

    def adf_module(self) -> nn.Module:
        """Its counterpart, with the same weights, as conversion makes it."""
        source = self.original_module()
        traced = Traced(source, fx.Graph(), "", {}, frozenset())
        return Skeleton(self.rules, {id(source): self.rule.apply}, frozenset(), False).mirror(traced)

    def _module(self) -> nn.Module:
        assert isinstance(self.target, type)
        torch.manual_seed(self.seed)
        module = self.target(**self.case.init).double()
        if self.composed:
            return module
        draw = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64).float())
            for name, buffer in module.named_buffers():
                if name.endswith("running_var"):
                    buffer.copy_((0.3 + torch.rand(buffer.shape, generator=draw, dtype=torch.float64)).float())
                elif name.endswith("running_mean"):
                    buffer.copy_(torch.randn(buffer.shape, generator=draw, dtype=torch.float64).float())
        return module

    def _bound(
        self, operation: Callable[..., Any], case: Case, dtype: torch.dtype, device: str, enter: Callable[[Any], Any]
    ) -> Operation:
        draw = torch.Generator().manual_seed(self.seed + 2)

        def known(spec: Certain | Tensor) -> Tensor:
            if isinstance(spec, Tensor):
                return spec.to(device)
            made = torch.rand if spec.positive or spec.unit else torch.randn
            shape = (*spec.shape, 2) if spec.complex else spec.shape
            # float32 numbers, so that every wider dtype is given the same ones
            drawn = made(shape, generator=draw, dtype=torch.float64).float() + 0.3 * spec.positive
            drawn = drawn.to(device, dtype)
            return torch.view_as_complex(drawn) if spec.complex else drawn

        fixed = _fill((case.args, dict(case.kwargs)), lambda spec: spec, known)

        def call(*values: Any) -> tuple[Any, ...]:
            given = iter(values)
            args, kwargs = _fill(fixed, lambda spec: _joined(spec, enter(next(given))), lambda tensor: tensor)
            result = operation(*args, **kwargs)
            if self.rule.certain:
                return tuple(result) if isinstance(result, (tuple, list)) else (result,)
            counts = any(spec.mask for spec in self.uncertain())
            if isinstance(result, Tensor) and (result.dtype is torch.bool or (counts and not result.is_complex())):
                result = _numbers(result, dtype, values if counts or not self.rule.continuous else ())
            return tuple(_values(result))

        return call


def trials(rules: Rules, only: Sequence[Rule] | None = None) -> list[Trial]:
    """Every target and case of the rules; an overlay's rule is tried with the cases of the rule beneath it."""
    found = []
    for rule in list(rules) if only is None else only:
        for target in dict.fromkeys(rule.targets):
            for index, case in enumerate(cases_of(rule, target)):
                name = f"{rule.name.removeprefix('adfify.nn.')}-{target_name(target)}-{index}"
                found.append(Trial(rule, target, case, rules, name))
    return found


def cases_of(rule: Rule, target: Target) -> tuple[Case, ...]:
    beneath = RULES.find(target)
    return rule.cases or (beneath.cases if beneath is not None else ())


def _moved(spec: Uncertain, x: Moments) -> Moments:
    if spec.within is None:
        return Moments(2 + x.mean.abs(), 0.05 * x.variance) if spec.positive else x
    low, high = spec.within
    half = 0.5 * (high - low)
    return Moments(low + half * (1 + 0.5 * torch.tanh(x.mean)), (0.05 * half) ** 2 * x.variance)


def _joined(spec: Uncertain, value: Any) -> Any:
    """A complex argument from its parts."""
    if spec.mask:
        return comparisons.gt(value, 0.0) if isinstance(value, Moments) else value > 0
    if not spec.complex:
        return value
    return view_as_complex(value) if isinstance(value, Moments) else torch.view_as_complex(value)


def _numbers(result: Tensor, dtype: torch.dtype, given: Sequence[Any]) -> Tensor:
    """A mask as numbers; probabilities have derivatives by what is given, where bools have none."""
    numbers = result.to(dtype)
    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in given) and torch.is_grad_enabled()
    return numbers.requires_grad_() if differentiable and not numbers.requires_grad else numbers


def _fill(value: Any, uncertain: Callable[[Uncertain], Any], known: Callable[[Certain], Any]) -> Any:
    match value:
        case Uncertain():
            return uncertain(value)
        case Certain():
            return known(value)
        case tuple() if hasattr(value, "n_fields"):  # what torch.max returns
            return type(value)([_fill(item, uncertain, known) for item in value])
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(_fill(item, uncertain, known) for item in value)
        case dict():
            return {key: _fill(item, uncertain, known) for key, item in value.items()}
        case Tensor():
            return known(value)
    return value


def _values(result: Any) -> Iterator[Any]:
    """The random tensors among what an operation returned: not None, positions, whole numbers or nothing at all."""
    match result:
        case ComplexMoments():
            yield from _values(view_as_real(result))
        case Moments():
            yield from [result] * (result.mean.numel() > 0)
        case Tensor():
            if result.is_complex():
                yield from _values(torch.view_as_real(result.resolve_conj()))
            if result.is_floating_point() and result.numel():
                yield result
        case tuple() | list():
            for item in result:
                yield from _values(item)


def _callable(target: Target) -> Callable[..., Any]:
    if target is operator.setitem:
        return OnCopy(operator.setitem)  # its result is what it wrote into
    if not isinstance(target, str):
        return target
    if target.startswith("."):
        return lambda x: getattr(x, target[1:])
    return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)


def _in_training(case: Case) -> Case:
    """The same call with its training flag set: in the dropout family, the one False that it has."""
    assert sum(value is False for value in case.args) == 1, f"which of {case.args} is the training flag?"
    return Case(tuple(True if value is False else value for value in case.args), case.kwargs)


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float64


# Affine in every element


@torch.no_grad()
def multiaffine(f: Operation, moments: Sequence[Moments], randomness: str = "error") -> list[Moments]:
    """Moments of an f of degree 1 in each single element: a sum of products of independent elements at most of two.

    Means are f(m). Variances are J^2 v + sum over pairs of H_ij^2 v_i v_j, with J and H as differences of f, which
    are exact for such an f and ask for no gradient (``detach`` has none).

    Raises:
        ValueError: f is not of that form, so this is no oracle for it.
    """
    shapes = [x.shape for x in moments]
    start = torch.cat([x.mean.flatten() for x in moments])
    variance = torch.cat([x.variance.flatten() for x in moments])
    assert start.dtype == torch.float64

    def at(points: Tensor) -> list[Tensor]:
        split = points.split([s.numel() for s in shapes], 1)
        return batched(f, [part.reshape(-1, *shape) for part, shape in zip(split, shapes, strict=True)], randomness)

    size = start.numel()
    step = torch.eye(size, dtype=start.dtype)
    truth = []
    base, once, twice = f(*[x.mean for x in moments]), at(start + step), at(start + 2 * step)
    for value, one, two in zip(base, once, twice, strict=True):
        rounding = 64 * torch.finfo(value.dtype).eps * (1 + value.abs().amax())
        if not torch.allclose(two - value, 2 * (one - value), rtol=0, atol=float(rounding)):
            raise ValueError("the original is not affine in its elements: the rule's family or `exact` is wrong")
        truth.append(torch.einsum("i...,i->...", (one - value).double().square(), variance))
    if len(moments) > 1:
        first, second = torch.tensor(list(itertools.combinations(range(size), 2))).T
        both = at(start + step[first] + step[second])
        for k, value in enumerate(base):
            mixed = both[k] - once[k][first] - once[k][second] + value
            truth[k] = truth[k] + torch.einsum(
                "p...,p->...", mixed.double().square(), variance[first] * variance[second]
            )
    return [Moments(value, spread) for value, spread in zip(base, truth, strict=True)]


def batched(f: Operation, stacks: Sequence[Tensor], randomness: str = "error") -> list[Tensor]:
    """f of every item of the stacks' first dimension."""
    try:
        return list(torch.func.vmap(f, randomness=randomness)(*stacks))
    except RuntimeError:  # what vmap does not know (rrelu, a torch.autograd.Function) goes item by item
        return [torch.stack(rows) for rows in zip(*[f(*item) for item in zip(*stacks, strict=True)], strict=True)]


# Elementwise

_PANELS, _NODES = 14, 20
_BENDS = (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0)  # where smooth activations turn, or have a kink of higher order


def kinks_of(f: Operation, tail: tuple[int, ...], hints: Sequence[float]) -> list[float]:
    """Where f bends sharply: at multiples of 0.05, or at the case's own numbers, up to 10."""
    step = 2.0**-20
    at = torch.tensor(sorted({*[k / 20 for k in range(-200, 201)], *hints}), dtype=torch.float64)
    points = torch.stack([at - step, at, at + step], 1).flatten().reshape(-1, *[1] * len(tail)).expand(-1, *tail)
    left, middle, right = f(points)[0].reshape(at.numel(), 3, -1).unbind(1)
    turn = (right - 2 * middle + left).abs() / (step + (right - left).abs())
    bends = turn.amax(1) > 1e-3
    return [float(k) for k in at[bends] if k.abs() <= 10]


def quadrature(f: Operation, x: Moments, kinks: Sequence[float]) -> Moments:
    """Moments of an elementwise f, which takes any number of rows: 20 Gauss-Legendre nodes on each unit of z."""
    t, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_NODES))
    mean, std = x.mean.double(), x.variance.double().sqrt()
    edges = [torch.full_like(mean, float(k)) for k in range(-_PANELS, _PANELS + 1)]
    # At std 0 any split will do: the density is what matters, f is the same at every node.
    edges += [((k - mean) / std.clamp(min=1e-300)).clamp(-_PANELS, _PANELS) for k in {*kinks, *_BENDS}]
    edge = torch.stack(edges).sort(0).values
    middle, half = (edge[1:] + edge[:-1]) / 2, (edge[1:] - edge[:-1]) / 2
    centre = f(mean)[0]
    first = second = torch.zeros_like(centre)
    for node, weight in zip(t, w, strict=True):
        z = middle + half * node
        density = half * weight * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        deviation = f((mean + std * z).flatten(0, 1))[0].reshape(z.shape) - centre
        first = first + (density * deviation).sum(0)
        second = second + (density * deviation.square()).sum(0)
    return Moments(centre + first, (second - first.square()).clamp(min=0))


# Monte Carlo


def assert_within(error: Tensor, allowed: Tensor, what: str, where: Tensor | None = None) -> None:
    """Every error is at most what is allowed; the worst of those that are not is shown."""
    excess = error.abs() - allowed
    excess = excess if where is None else torch.where(where, excess, -math.inf)
    if bool((excess > 0).any() | excess.isnan().any()):
        worst = int(excess.nan_to_num(nan=math.inf).argmax())
        error, allowed = (x.detach().expand(excess.shape).flatten()[worst].item() for x in (error, allowed))
        raise AssertionError(
            f"{what}: off by {error:.4g} where {allowed:.4g} is allowed, at {worst} of {tuple(excess.shape)}; "
            f"{int((excess > 0).sum())} of {excess.numel()} are off by too much"
        )


def z_limit(comparisons: int) -> float:
    """What no |z| of that many exceeds, in all but one of a million sets (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 1e-6 / (2 * comparisons))


@dataclass(frozen=True)
class Sampled:
    """Draws of the original about a predicted mean: their averages, with standard errors."""

    mean_error: Tensor
    mean_deviation: Tensor
    variance: Tensor
    variance_deviation: Tensor

    @property
    def std_deviation(self) -> Tensor:
        return self.variance_deviation / (2 * self.variance.sqrt()).clamp(min=1e-12)

    @property
    def rare(self) -> Tensor:
        """Whether the variance comes from a few extreme draws, or none at all, so that its error isn't known."""
        return self.variance_deviation >= 0.07 * self.variance


@torch.no_grad()
def monte_carlo(f: Operation, inputs: Sequence[Moments], predicted: Sequence[Moments], draws: int) -> list[Sampled]:
    """What the original makes of Gaussian inputs, against predicted means."""
    # Centred on the prediction, so that nothing cancels, and so that what is certain has no error at all.
    sums = [[torch.zeros(p.shape, dtype=torch.float64) for _ in range(4)] for p in predicted]
    for stacks in _draws(inputs, draws):
        for output, prediction, powers in zip(batched(f, stacks), predicted, sums, strict=True):
            deviation = output.double() - prediction.mean.double()
            power = torch.ones_like(deviation)
            for total in powers:
                power = power * deviation
                total += power.sum(0)
    return [_sampled([total / draws for total in powers], draws) for powers in sums]


def _sampled(powers: list[Tensor], draws: int) -> Sampled:
    error = powers[0]
    variance = (powers[1] - error.square()).clamp(min=0)
    fourth = powers[3] - 4 * error * powers[2] + 6 * error.square() * powers[1] - 3 * error**4
    return Sampled(
        error, (variance / draws).sqrt(), variance, ((fourth - variance.square()).clamp(min=0) / draws).sqrt()
    )


def _draws(inputs: Sequence[Moments], draws: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(20)
    size = max(1, min(draws, 2_000_000 // max(x.mean.numel() for x in inputs)))
    for start in range(0, draws, size):
        count = min(size, draws - start)
        noise = [torch.randn(count, *x.shape, generator=generator, dtype=x.dtype) for x in inputs]
        yield [x.mean + n * x.std for x, n in zip(inputs, noise, strict=True)]


def product_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Averages of all elements and products of two elements over the rows, and the squares of their errors."""
    flat = rows.reshape(rows.shape[0], -1)
    products = torch.cat([flat, (flat[:, :, None] * flat[:, None, :]).flatten(1)], 1)
    return products.mean(0), products.var(0) / rows.shape[0]
