"""Every registered function and method, called in every form that torch's signature of it has.

From the cases of the rules: by position, by torch's names, by numpy's, with sizes one by one or as a list or a tuple,
with defaults written out. What torch accepts must convert, and be what the case itself is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from oracles import Trial
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import adfify
from adfify import Moments, arguments, call_forms
from adfify.call_forms import REQUIRED, Form
from adfify.moments import lift
from adfify.registry import RULES, Certain, Uncertain

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

TRIALS = [
    trial
    for trial in oracles.trials(RULES, adfify.supported())
    if not trial.is_module
    and not (isinstance(trial.target, str) and trial.target.startswith("."))
    and not any(spec.complex for spec in trial.uncertain())  # the same rules, called the same way
]

NUMPY = {"dim": "axis", "keepdim": "keepdims", "input": "x", "other": "x2"}


def forms(trial: Trial, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """Other ways to write a call; not all of them are torch's."""
    first = 1 if isinstance(trial.target, str) else 0
    for form in call_forms.forms_of(trial.target):
        names = [argument.name for argument in form.positional]
        if len(args) > len(names) and not form.sizes:
            continue
        yield from _by_name(form, names, args, kwargs, first)
        yield from _with_defaults(form, args, kwargs)
        if form.sizes:
            sizes = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
            yield (args[0], *sizes), kwargs
            yield (args[0], tuple(sizes)), kwargs
            yield (args[0], list(sizes)), kwargs
            yield args[:1], {names[1]: tuple(sizes), **kwargs}
    yield tuple(tuple(value) if type(value) is list else value for value in args), kwargs
    yield tuple(list(value) if type(value) is tuple else value for value in args), kwargs


def _by_name(
    form: Form, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], first: int
) -> Iterator[Arguments]:
    for cut in range(first, min(len(args), len(names))):
        named = {**dict(zip(names[cut:], args[cut:], strict=False)), **kwargs}
        yield args[:cut], named
        yield args[:cut], dict(reversed(list(named.items())))
        if form.schema:
            yield args[:cut], {NUMPY.get(name, name): value for name, value in named.items()}
    longer, rest = list(args), dict(kwargs)
    while len(longer) < len(names) and names[len(longer)] in rest:
        longer.append(rest.pop(names[len(longer)]))
    yield tuple(longer), rest


def _with_defaults(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """Every default written out, by itself by name, and one after the other by position."""
    for argument in form.arguments[len(args) :]:
        if argument.default is not REQUIRED and argument.name not in kwargs:
            yield args, {**kwargs, argument.name: argument.default}
    longer = list(args)
    for argument in form.positional[len(args) :]:
        if argument.default is REQUIRED or argument.name in kwargs:
            break
        longer.append(argument.default)
        yield tuple(longer), kwargs


def planned(trial: Trial, args: Any, kwargs: Any) -> tuple[fx.Node, arguments.Call | str, dict[fx.Node, Any]]:
    """The node of a call, what is planned for it, and what its inputs stand for."""
    graph, given = fx.Graph(), {}

    def entered(value: Any) -> Any:
        if not isinstance(value, (Uncertain, Certain, Tensor)):
            return value
        node = graph.placeholder(f"x{len(given)}")
        given[node] = value
        return node

    args, kwargs = oracles._fill((args, kwargs), entered, entered)
    kind = "call_method" if isinstance(trial.target, str) else "call_function"
    node = graph.create_node(kind, trial.target, args, kwargs)
    call_forms.normalise(node, trial.target)
    uncertain = {node for node, value in given.items() if isinstance(value, Uncertain)}
    return node, arguments.fit(node, trial.target, trial.rule, None, uncertain), given


class Values:
    """The same tensor for the same place of a case, as Moments and as what the original is given."""

    def __init__(self, trial: Trial) -> None:
        pairs = zip(trial.uncertain(), trial.moments(), strict=True)
        self._random = [(spec, moments) for spec, moments in pairs]
        self._draw = torch.Generator().manual_seed(trial.seed)
        self._known: dict[int, Tensor] = {}

    def moments(self, spec: Any) -> Any:
        found = next((moments for own, moments in self._random if own is spec), None)
        return oracles._joined(spec, found) if found is not None else self.tensor(spec)

    def tensor(self, spec: Any) -> Tensor:
        if isinstance(spec, Tensor):
            return spec.clone()
        if isinstance(spec, Uncertain):
            return oracles._joined(spec, next(moments.mean.clone() for own, moments in self._random if own is spec))
        if id(spec) not in self._known:
            made = 0.1 + 0.8 * torch.rand(spec.shape, generator=self._draw, dtype=torch.float64)
            self._known[id(spec)] = torch.complex(made, made) if spec.complex else made
        return self._known[id(spec)].clone()  # the original may write into it


def original(trial: Trial, values: Values, args: Any, kwargs: Any) -> Any:
    args, kwargs = oracles._fill((args, dict(kwargs)), values.tensor, values.tensor)
    torch.manual_seed(0)
    return oracles._callable(trial.target)(*args, **kwargs)


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return left[1] == right[1] and all(map(_same_leaf, left[0], right[0]))


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    # Positions of what is uncertain are objects that nothing can be read from.
    return a == b or (type(a) is type(b) and type(a).__eq__ is object.__eq__)


def computed(trial: Trial, values: Values, call: arguments.Call, given: dict[fx.Node, Any]) -> Any:
    def value(place: Any) -> Callable[[fx.Node], Any]:
        return lambda node: (lift if (place, node) in call.lifts else lambda x: x)(values.moments(given[node]))

    args = [fx.map_arg(argument, value(place)) for place, argument in enumerate(call.args)]
    kwargs = {name: fx.map_arg(argument, value(name)) for name, argument in call.kwargs.items()}
    torch.manual_seed(0)
    return trial.rule.apply(*args, **kwargs)


def check(trial: Trial) -> list[str]:
    """What is wrong with a trial's call forms."""
    values, args, kwargs = Values(trial), trial.case.args, dict(trial.case.kwargs)
    _, call, given = planned(trial, args, kwargs)
    assert isinstance(call, arguments.Call), call
    want, plain = computed(trial, values, call, given), original(trial, values, args, kwargs)
    wrong, seen = [], set()
    for other_args, other_kwargs in forms(trial, args, kwargs):
        if repr((other_args, other_kwargs)) in seen:
            continue
        seen.add(repr((other_args, other_kwargs)))
        try:
            if not same(original(trial, values, other_args, other_kwargs), plain):
                continue  # another call, not another form of this one
        except Exception:
            continue  # torch has no such form
        written = f"{other_args}, {other_kwargs}"
        _, call, given = planned(trial, other_args, other_kwargs)
        if isinstance(call, str):
            wrong.append(f"{written}: {call}")
            continue
        if not same(computed(trial, values, call, given), want):
            wrong.append(f"{written} gives other moments")
        tensors = {node: values.tensor(spec) for node, spec in given.items()}
        again = fx.map_arg((call.args, call.kwargs), tensors.__getitem__)
        if not same(oracles._callable(trial.target)(*again[0], **again[1]), plain):
            wrong.append(f"{written}: the original takes the rule's arguments otherwise")
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trial", TRIALS, ids=[trial.name for trial in TRIALS])
def test_what_torch_accepts_converts_and_is_the_same(trial: Trial) -> None:
    assert check(trial) == []


def test_the_forms_are_found() -> None:
    """That the test above tries something: forms of each kind, and most targets with several."""
    tried = {trial.target: list(forms(trial, trial.case.args, dict(trial.case.kwargs))) for trial in TRIALS}
    assert sum(len(written) > 4 for written in tried.values()) > 0.7 * len(tried)
    assert any(kwargs.get("axis") is not None for written in tried.values() for _, kwargs in written)
    assert any(len(args) == 3 for args, _ in tried["flip"] + tried["view"])


WITH_OUT = [trial for trial in TRIALS if trial.target in (torch.add, torch.relu, torch.sum, torch.cat, torch.matmul)]


@pytest.mark.parametrize("trial", WITH_OUT, ids=[trial.name for trial in WITH_OUT])
def test_out_is_a_gap(trial: Trial) -> None:
    _, call, _ = planned(trial, trial.case.args, {**trial.case.kwargs, "out": Certain((1,))})
    assert isinstance(call, str)
    assert "out" in call


WRITTEN = {
    "flip(-1)": lambda x: x.flip(-1),
    "flip(1, 2)": lambda x: x.flip(1, 2),
    "flip([1, 2])": lambda x: x.flip([1, 2]),
    "flip(dims=)": lambda x: x.flip(dims=(1, 2)),
    "permute one by one": lambda x: x.permute(0, 2, 1),
    "permute(dims=)": lambda x: torch.permute(input=x, dims=(0, 2, 1)),
    "view(size=)": lambda x: x.view(size=(2, 12)),
    "view of sizes": lambda x: x.view(x.size(0), -1),
    "reshape(shape=)": lambda x: torch.reshape(x, shape=(2, 12)),
    "expand": lambda x: x[:1].expand(2, -1, -1),
    "repeat(repeats=)": lambda x: x.repeat(repeats=(1, 2, 1)),
    "mul(x, other=)": lambda x: torch.mul(x, other=x + 1),
    "mul_(other=)": lambda x: (x + 1).mul_(other=2),
    "add with alpha": lambda x: torch.add(x, 2.5, alpha=2),
    "add by numpy's names": lambda x: torch.add(x1=x, x2=x.flip(0), alpha=2),
    "sum(input=, dim=)": lambda x: torch.sum(input=x, dim=(1, 2)),
    "sum(axis=)": lambda x: x.sum(axis=1, keepdims=True),
    "mean(-1, True)": lambda x: x.mean(-1, True),
    "cat(tensors=, axis=)": lambda x: torch.cat(tensors=[x, x], axis=1),
    "cpu()": lambda x: x.cpu(),
    "relu_(input=)": lambda x: torch.relu_(input=x + 0),
    "swapaxes(axis0=)": lambda x: torch.swapaxes(x, axis0=0, axis1=2),
    "F.relu(input=)": lambda x: torch.nn.functional.relu(input=x, inplace=False),
    "softmax(dtype=)": lambda x: torch.nn.functional.softmax(x, dim=1, dtype=torch.float64),
    "a module by keyword": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()),
}


class Calling(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        modules = isinstance(self.function, torch.nn.Sequential)
        return self.function[1](input=self.function[0](input=x)) if modules else self.function(x)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_model_that_is_written_so_converts(name: str) -> None:
    torch.manual_seed(3)
    model, x = Calling(WRITTEN[name]), torch.randn(2, 3, 4)
    adf = adfify.adfify(model)
    torch.testing.assert_close(adf(Moments(x, torch.zeros_like(x))).mean, model(x))
    noisy = adf(Moments(x, torch.full_like(x, 0.1)))
    assert noisy.variance.shape == model(x).shape
    assert (noisy.variance > 0).any()
