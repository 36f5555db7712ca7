"""Whether a traced graph is the model: both are run on the example inputs.

Note [A trace is checked on the example]
Tracing follows one way through forward. What it can't see it takes the other way on, without a word: the type of a
value, `hasattr`, a flag that is set while something traces, a size that is an `int` only when the model runs. Where
there are inputs to run the model on, the graph has to give what the model gives on them, and on a batch of another
length, of other values, if the model takes that. Without inputs nothing is checked.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adfify import inplace, locations, original, sizes, state
from adfify.arguments import call_of
from adfify.call_signature import CallSignature, mapped
from adfify.errors import InputError
from adfify.moments import Moments

if TYPE_CHECKING:
    from adfify.tracing import Traced


@dataclass(frozen=True)
class Disagreement:
    """How a graph differs from its model.

    Attributes:
        said: what it gives, and what for.
        is_of_model: whether the model gives something else at every call.
    """

    said: str
    is_of_model: bool = False


def disagreement(traced: Traced, tensors: Sequence[Any]) -> Disagreement | None:
    """Return how the graph differs from the model, None where they agree; the model stays as it was.

    What the model can't be run on, because it only says what is an integer, can't be held against the graph.

    Args:
        traced: the model and its graph.
        tensors: the example's, in the order of the signature's leaves.
    """
    example = _plain(tensors)
    return _compared(traced, example, may_refuse=False) or _compared(traced, [_other(x) for x in example])


# Note [A size of one]
# torch.export takes every free size for at least 2, and follows that side of `x.shape[0] > 1` without a condition. A
# size of one is what the graph may do as well; it is tried, and where the model does something else, refused.


def refuse_ones(traced: Traced, tensors: Sequence[Any]) -> None:
    """Let the graph refuse a size of one wherever it does not give then what the model gives."""
    example = _plain(tensors)
    places = [(n, axis) for n, x in enumerate(example) for axis in range(1, x.dim()) if x.shape[axis] > 1]
    batches = [n for n, x in enumerate(example) if x.dim() and len(x) > 1]
    if batches and _compared(traced, [x[:1] if n in batches else x for n, x in enumerate(example)]):
        for n in batches:
            sizes.demand(traced.graph, sizes.at_least_two(n, 0))
    for n, axis in places:
        if _compared(traced, [x.narrow(axis, 0, 1) if m == n else x for m, x in enumerate(example)]):
            sizes.demand(traced.graph, sizes.at_least_two(n, axis))


def _plain(tensors: Sequence[Any]) -> list[Tensor]:
    return [x.mean if isinstance(x, Moments) else x for x in tensors]


def _compared(traced: Traced, tensors: Sequence[Tensor], may_refuse: bool = True) -> Disagreement | None:
    run = _Run(traced)
    found: list[Any] = []
    said = ""
    try:
        found = run.outputs(tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, InputError) and may_refuse:
            return None  # as it does at every call, by name
        said = f"it fails with {type(error).__name__}: {locations.shortened(error)}"
    try:
        expected = _model(traced.root, traced.signature, tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    said = said or _difference(expected.outputs, found)
    if not said:
        return None
    if _difference(expected.outputs, _model(traced.root, traced.signature, tensors).outputs):
        return Disagreement(said, is_of_model=True)
    if expected.drawn:
        return None  # by the one in another order than by the other; that it draws is reported for itself
    return Disagreement(said + _first_place(traced, run, tensors))


@dataclass(frozen=True)
class _Result:
    outputs: list[Any]
    drawn: bool


def _model(root: nn.Module, signature: CallSignature, tensors: Sequence[Any]) -> _Result:
    with _without_a_trace(root) as random:
        args, kwargs = mapped(signature.call(tensors), lambda x, _: _copy(x), "")
        result = root(*args, **kwargs)
        outputs = [_copy(leaf) for leaf in pytree.tree_leaves(result)]
        return _Result(outputs, bool(random.drawn()))


@contextmanager
def _without_a_trace(root: nn.Module) -> Iterator[state.RandomState]:
    """Run with the same random numbers every time, and leave the model and the process as they were."""
    with state.untouched(root, runs=True), state.random_state_kept(), torch.no_grad():
        torch.manual_seed(0)
        yield state.RandomState()


class _Run(fx.Interpreter):
    """Runs a traced graph on tensors; what writes does so into a copy."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(fx.GraphModule(nn.Module(), fx.Graph()), graph=traced.graph)
        self.extra_traceback = False
        self._traced = traced

    def outputs(self, tensors: Sequence[Any]) -> list[Any]:
        """What it returns, one after the other."""
        with _without_a_trace(self._traced.root):
            return [_copy(leaf) for leaf in pytree.tree_leaves(self.run(*map(_copy, tensors)))]

    def values(self, tensors: Sequence[Any]) -> list[Tensor]:
        """The tensors that its nodes give, as far as it comes."""
        found: list[Tensor] = []

        class Watched(_Run):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                found.extend(_copy(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
                return result

        try:
            Watched(self._traced).outputs(tensors)
        except Exception:
            return found
        return found

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output", "get_attr") or inplace.written_by(n, self._traced.root) is None:
            return super().run_node(n)
        call = call_of(n)
        args, kwargs = fx.map_arg((tuple(call.args), call.kwargs), self.env.__getitem__)
        if n.op == "call_module":
            return self._traced.root.get_submodule(str(n.target))(*map(_copy, args), **kwargs)
        return original.OnCopy(original.named(n))(*args, **kwargs)

    def fetch_attr(self, target: str) -> Any:
        constants = self._traced.constants
        return constants[target] if target in constants else operator.attrgetter(target)(self._traced.root)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._traced.root.get_submodule(target)(*args, **kwargs)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _other(x: Tensor) -> Tensor:
    """Another number of examples, and other values."""
    if not x.dim() or not len(x):
        return x
    part = x[:-1] if len(x) > 2 else torch.cat([x, x])
    return part * 0.5 + 0.25 if part.is_floating_point() else part


# Comparing


def _difference(expected: list[Any], found: list[Any]) -> str:
    """What is other than expected, ``""`` for nothing."""
    if len(expected) != len(found):
        return f"it returns {len(found)} values for {len(expected)}"
    for position, (want, got) in enumerate(zip(expected, found, strict=True)):
        said = ""
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            said = _difference_of_tensors(want, got)
        elif isinstance(want, Tensor) or isinstance(got, Tensor):
            said = f"is a {type(got).__name__} for a {type(want).__name__}"
        elif isinstance(want, int | float | str) and want != got and want == want:
            said = f"is {got!r:.60} for {want!r:.60}"
        if said:
            return f"output {position} {said}"
    return ""


def _difference_of_tensors(want: Tensor, got: Tensor) -> str:
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"is {_kind(got)} for {_kind(want)}"
    if _alike(want, got):
        return ""
    off = (got.to(_wide(want)) - want.to(_wide(want))).abs().nan_to_num()
    return f"is off by {float(off.max()):.3g}, where the largest is {float(_largest(want)):.3g}"


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _alike(want: Tensor, got: Tensor) -> bool:
    """Whether two tensors of one shape are the same up to rounding: in another order of sums, amplified by depth."""
    if want.is_meta or got.is_meta or not want.numel():
        return True
    exact = not (want.is_floating_point() or want.is_complex())
    relative = 0.0 if exact else torch.finfo(want.dtype).eps ** 0.5
    a, b = got.to(_wide(want)), want.to(_wide(want))
    return torch.allclose(a, b, rtol=relative, atol=relative * float(_largest(want)), equal_nan=True)


def _wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def _largest(x: Tensor) -> Tensor:
    return x.to(_wide(x)).abs().nan_to_num(posinf=0.0).max()


# Where


def _first_place(traced: Traced, run: _Run, tensors: Sequence[Any]) -> str:
    """The first module of the model that returns what no node of the graph gives."""
    known = run.values(tensors)
    returned: list[tuple[str, list[Tensor]]] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, result, path=path: returned.append(
                (path, [_copy(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)])
            )
        )
        for path, module in traced.root.named_modules()
    ]
    try:
        _model(traced.root, traced.signature, tensors)
    finally:
        for handle in handles:
            handle.remove()
    for path, results in returned:
        if not all(any(one.shape == x.shape and _alike(x, one) for one in known) for x in results):
            return f"; it has nothing like the result of {_where(path, traced.root)}"
    return ""


def _where(path: str, root: nn.Module) -> str:
    """A module, and the user's forward that computes or calls it."""
    module = root.get_submodule(path)
    if not type(module).__module__.startswith("torch.nn."):
        return f"{f'{path!r} ' if path else ''}{type(module).__name__}{locations.forward_of(module)}"
    above = root.get_submodule(path.rpartition(".")[0])
    return f"'{path}' ({type(module).__name__}), called by {type(above).__name__}{locations.forward_of(above)}"
