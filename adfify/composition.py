"""Elementwise operations whose operands are functions of one random tensor, taken as one function of it.

Note [One random variable]
`x * sigmoid(x)` is a product of two factors that are far from independent: by the rule of the product, which takes
them so, the mean of a Swish written out like that is off by 0.37 of its std at N(0, 1). Where the graph shows that all
uncertain operands of a sum, difference, product or quotient are elementwise functions of the same node, the moments are
those of the one function that they make together, by quadrature over the one variable. So relu(x) - relu(x) is 0.

Note [Jumps of a composition]
Where a step of it jumps, the quadrature has to be split there. What jumps is known: a comparison where the difference
of its operands is 0, a sign where its operand is, a floor where its operand is whole. Where that difference is affine
in the variable, which the steps show, the place is computed; else it is looked for by its sign (gaussian.jumping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adfify import gaussian
from adfify.gaussian import jumping
from adfify.gaussian.blocks import in_blocks
from adfify.gaussian.normal import Pair
from adfify.moments import Moments
from adfify.original import Operation
from adfify.precision import wide

KINKS = (-3.0, 0.0, 3.0)
"""Where the quadrature is split: what is composed is not asked where it bends, and these are where activations do."""

SOURCE = "the one function of the one variable, by quadrature (A&S 25.4.29)"

TOLERANCE = 0.05
"""Measured, in units of the true std: 3e-4 for smooth functions and kinks at those places, up to 0.023 for others
(relu(1 - x) * x, |x - 1| - |x + 1|)."""


@dataclass(frozen=True)
class Result:
    """In a step's arguments: the result of an earlier step; number 0 is the variable, -1 the first certain operand."""

    number: int


@dataclass(frozen=True, eq=False)
class Jump:
    """Where a step jumps.

    Attributes:
        of: its arguments as differences that are 0 there, or of a periodic one whole.
        periodic: whether it jumps at every whole number.
        bent: whether the difference is not affine in the arguments.
    """

    of: Callable[..., Tensor]
    periodic: bool = False
    bent: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        operation: the original.
        args, kwargs: its arguments, :class:`Result` among them.
        affine: whether it is affine in each of its operands, and in all of them together but for a product.
        product: whether it is a product, or a quotient by its second operand.
        cast: whether it changes nothing but the dtype.
        jump: where it jumps, if it does.
    """

    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    affine: bool = False
    product: str = ""
    cast: bool = False
    jump: Jump | None = None

    def given(self, results: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, the results so far being in ``results``, the certain operands at its end."""

        def result(leaf: Any) -> Any:
            return results[leaf.number] if isinstance(leaf, Result) else leaf

        return fx.node.map_aggregate(self.args, result), fx.node.map_aggregate(self.kwargs, result)


@dataclass(frozen=True, eq=False)
class Composition:
    """A function of one tensor, and of certain ones: the original operations, one after the other.

    Attributes:
        steps: the operations.
        split: whether the quadrature is split at their jumps, and they may have certain operands.
    """

    steps: tuple[Step, ...]
    split: bool = False

    __name__ = "composition"

    @property
    def jumps(self) -> bool:
        """Whether a step does."""
        return any(step.jump is not None for step in self.steps)

    def bends(self) -> set[int]:
        """The results that are not affine in the variable, and of which a step jumps at every whole number."""
        affine, found = self.affine(), set()
        for step, known in zip(self.steps, affine, strict=True):
            if step.jump is not None and step.jump.periodic and not known:
                found |= {bend for leaf in _leaves(step) for bend in self._bends_of(leaf.number)}
        return found

    def _bends_of(self, number: int) -> set[int]:
        """The last results, before this one, that are not affine in others."""
        if number <= 0:
            return set()
        step = self.steps[number - 1]
        random = [leaf for leaf in _leaves(step) if leaf.number >= 0]
        if step.affine or step.cast or (step.product and len(random) == 1):
            return {bend for leaf in random for bend in self._bends_of(leaf.number)}
        return {number}

    def __call__(self, x: Tensor, *certain: Any) -> Any:
        results = _Results(x, certain)
        for step in self.steps:
            args, kwargs = step.given(results)
            results.append(step.operation(*args, **kwargs))
        return results[len(self.steps)]

    def in_float64(self, x: Tensor, certain: Sequence[Any], seen: dict[int, Tensor]) -> Tensor:
        """The same in float64, with where its steps jump, by their number, put into ``seen``."""
        results = _Results(x, certain)
        for number, step in enumerate(self.steps):
            args, kwargs = step.given(results)
            if step.jump is not None:
                seen[number] = step.jump.of(*args, **kwargs)
            results.append(_number(args[0]) if step.cast else step.operation(*args, **kwargs))
        return _number(results[len(self.steps)])  # type: ignore[no-any-return]

    def affine(self) -> list[bool]:
        """Of each step whether what decides on its jumps is affine in the variable."""
        degree = {0: 1}  # of results; 2 stands for whatever is not affine
        found = []
        for number, step in enumerate(self.steps, 1):
            degrees = [degree.get(leaf.number, 0) for leaf in _leaves(step)]
            found.append(max(degrees, default=0) <= 1 and not (step.jump is not None and step.jump.bent))
            degree[number] = _degree(step, degree, degrees)
        return found


class _Results(list[Any]):
    """The variable and what the steps gave; certain operands by negative numbers."""

    def __init__(self, x: Tensor, certain: Sequence[Any]) -> None:
        super().__init__([x])
        self._certain = certain

    def __getitem__(self, number: Any) -> Any:
        return self._certain[-1 - number] if number < 0 else super().__getitem__(number)


def _leaves(step: Step) -> list[Result]:
    found: list[Result] = []
    fx.node.map_aggregate((step.args, step.kwargs), lambda x: found.append(x) if isinstance(x, Result) else None)
    return found


def _degree(step: Step, degree: dict[int, int], degrees: list[int]) -> int:
    if max(degrees, default=0) == 0:
        return 0
    if step.product:
        sides = [degree.get(x.number, 0) if isinstance(x, Result) else 0 for x in (*step.args, *step.kwargs.values())]
        flat = sides[1] == 0 if step.product == "quotient" and len(sides) > 1 else True
        return 1 if sum(sides) == 1 and flat else 2
    return 1 if (step.affine or step.cast) and max(degrees) <= 1 else 2


def _number(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, Tensor) and x.dtype is not torch.float64 else x


@dataclass(frozen=True, eq=False)
class Composed:
    """The rule of a :class:`Composition`."""

    function: Composition

    __name__ = "composed"

    def __call__(self, x: Moments, *certain: Any) -> Moments:
        return _moments_of(self.function, x, *certain)


def _of_mean(function: Composition, x: Tensor, *certain: Any) -> Tensor:
    result = function(x, *certain)
    return result if result.is_floating_point() else result.to(x.dtype)  # type: ignore[no-any-return]


@wide(_of_mean)
def _moments_of(function: Composition, x: Moments, *certain: Any) -> Moments:
    if not function.split:
        return Moments(*gaussian.expect(function, x.mean, x.variance, kinks=KINKS))
    exact = _of_mean(function, x.mean, *certain)
    shape = exact.shape
    mean, variance = x.mean.expand(shape), x.variance.expand(shape)
    return Moments(*_with_jumps(mean, variance, exact, function, *certain))


@in_blocks
def _with_jumps(mean: Tensor, variance: Tensor, exact: Tensor, function: Composition, *certain: Any) -> Pair:
    """See Note [Jumps of a composition]; at variance 0 ``exact``."""
    at, spread = mean.double(), variance.double()
    known = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in certain]

    def f(nodes: Tensor) -> Tensor:
        return function.in_float64(nodes, known, {})

    def seen(nodes: Tensor) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        function.in_float64(nodes, known, found)
        return found

    places, many = _places(function, seen, at, spread)
    shift, result = jumping.expect(f, at, spread, torch.cat(places), KINKS)
    for slope, offset in many:
        other = jumping.expect_many(f, at, spread, slope, offset, KINKS)
        is_many = slope.abs() * spread.clamp(min=1e-200).sqrt() > jumping.MANY
        shift, result = (torch.where(is_many, a, b) for a, b in zip(other, (shift, result), strict=True))
    average = (f(at.unsqueeze(0))[0] + shift).to(exact.dtype)
    return torch.where(variance > 0, average, exact), torch.where(variance > 0, result, 0.0).to(variance.dtype)


_FAR = 2.0**60
_EACH_SIDE = 8 * int(jumping.MANY)


def _places(
    function: Composition, seen: Callable[[Tensor], dict[int, Tensor]], mean: Tensor, variance: Tensor
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Where the function jumps, and of what jumps at every whole number, slope and offset."""
    start, far = (torch.full_like(mean, value).unsqueeze(0) for value in (0.0, _FAR))
    here, at_start, at_far = seen(mean.unsqueeze(0)), seen(start), seen(far)
    places = [mean.new_empty((0, *mean.shape))]
    many: list[tuple[Tensor, Tensor]] = []
    for number, affine in enumerate(function.affine()):
        jump = function.steps[number].jump
        if jump is None:
            continue
        if not affine:
            places.append(jumping.crossings(lambda x, number=number: seen(x)[number], mean, variance))  # type: ignore[misc]
            continue
        offset = at_start[number][0].expand(mean.shape)
        slope = (at_far[number][0] - offset) / _FAR
        if not jump.periodic:
            places.append(_zero(slope, offset).unsqueeze(0))
            continue
        many.append((slope, offset))
        nearest = torch.round(here[number][0])
        whole = torch.arange(-_EACH_SIDE, _EACH_SIDE + 1, dtype=mean.dtype, device=mean.device)
        whole = nearest + whole.reshape(-1, *[1] * mean.dim())
        places.append(_zero(slope.unsqueeze(0), offset - whole))
    return places, many


def _zero(slope: Tensor, offset: Tensor) -> Tensor:
    flat = slope == 0
    return torch.where(flat, math.inf, -offset / torch.where(flat, 1.0, slope))
