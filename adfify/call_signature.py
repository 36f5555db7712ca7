"""What a network is called with: the inputs of the model's own forward, of which every tensor is one of the graph's.

Note [Inputs in the structure of the model's own call]
A model may take a tuple of states, a dictionary of pictures and measurements, a flag or None. A graph takes tensors. So
every tensor of the example inputs becomes an input of the graph, and whatever else they hold is what the graph is made
for. The network remembers the structure, takes the same at every call, and refuses another by name: what was None, a
flag or a length at conversion is traced into the graph, and would be that, without a word, at every later call.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from adfify.errors import InputError, ModelError
from adfify.moments import Moments


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor among the inputs: a placeholder of the graph.

    Attributes:
        name: of the placeholder.
        uncertain: whether it carries a variance.
    """

    name: str
    uncertain: bool = True


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """How a network is called.

    Attributes:
        model: its class name.
        parameters: of the model's forward: name, kind, and whether it has a default.
        structures: by parameter, the value that it was converted for, a :class:`Leaf` in place of every tensor.
        is_of_example: whether there were example inputs, which say that nothing else is given.
    """

    model: str
    parameters: tuple[tuple[str, inspect._ParameterKind, bool], ...]
    structures: dict[str, Any]
    is_of_example: bool = True

    @property
    def leaves(self) -> list[Leaf]:
        """The tensors, in the order of the graph's placeholders."""
        return [
            leaf for name, _, _ in self.parameters for leaf in leaves(self.structures.get(name)) if _is_tensor(leaf)
        ]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the tensors and Moments of a call, in the order of :attr:`leaves`.

        Raises:
            InputError: an input too many, missing, unknown, of another structure than at conversion, or another value
                where the graph was made for one.
        """
        given = self._by_name(args, kwargs)
        found: list[Any] = []
        for name, _, has_default in self.parameters:
            structure = self.structures.get(name)
            if name in given:
                found += _matched(structure, given[name], name)
            elif has_tensors(structure):
                why = "it was given when the model was converted" if has_default else "it has no default"
                raise InputError(f"{self}: input '{name}' is missing; {why}.")
        return found

    def call(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments, by position and by keyword, of the model's own forward for some :attr:`leaves`."""
        rest = iter(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, kind, _ in self.parameters:
            value = mapped(self.structures[name], lambda leaf, path: next(rest), name)
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args += value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        return args, kwargs

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        rest, named = list(args), dict(kwargs)
        given: dict[str, Any] = {}
        for name, kind, _ in self.parameters:
            if kind is inspect.Parameter.VAR_POSITIONAL:
                given[name], rest = tuple(rest), []
            elif kind is inspect.Parameter.VAR_KEYWORD:
                given[name], named = named, {}
            elif kind is not inspect.Parameter.KEYWORD_ONLY and rest:
                given[name] = rest.pop(0)
                if name in named:
                    raise InputError(f"{self}: input '{name}' is given twice, by position and by keyword.")
            elif name in named and kind is not inspect.Parameter.POSITIONAL_ONLY:
                given[name] = named.pop(name)
        if rest:
            raise InputError(f"{self} takes {len(args) - len(rest)} inputs by position, and was given {len(args)}.")
        if named:
            raise InputError(f"{self} has no input {', '.join(map(repr, named))}.")
        return given

    def __str__(self) -> str:
        marks = {kind: "" for _, kind, _ in self.parameters}
        marks |= {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        return f"{self.model}({', '.join(marks[kind] + name for name, kind, _ in self.parameters)})"


def of_model(root: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any]) -> CallSignature:
    """Return how a converted model is called: as its forward is, with tensors where the example has tensors.

    Args:
        root: the model.
        args: example inputs by position; None if there are none.
        kwargs: example inputs by keyword. Inputs that have no example are one uncertain tensor, or their default.

    Raises:
        ModelError: forward does not take such inputs, or one holds tensors in an object that can't be looked into.
    """
    signature, name = inspect.signature(root.forward), type(root).__name__
    try:
        given = signature.bind_partial(*(args or ()), **kwargs).arguments
    except TypeError as error:
        raise ModelError(
            f"{name}.forward{signature} does not take these example inputs: {len(args or ())} by position"
            f"{''.join(f', {key}=' for key in kwargs)}: {error}."
        ) from error
    names = _Names()

    def leaf(value: Any, path: str) -> Leaf:
        return Leaf(names.of(path), _is_floating(value, path))

    structures: dict[str, Any] = {}
    for key, parameter in signature.parameters.items():
        if key in given:
            structures[key] = mapped(given[key], leaf, key)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            structures[key] = ()
        elif parameter.kind is parameter.VAR_KEYWORD:
            structures[key] = {}
        else:
            is_input = parameter.default is parameter.empty
            structures[key] = Leaf(names.of(key)) if is_input else parameter.default
    parameters = tuple((p.name, p.kind, p.default is not p.empty) for p in signature.parameters.values())
    return CallSignature(name, parameters, structures, args is not None or bool(kwargs))


def of_placeholders(model: str, names: Sequence[str]) -> CallSignature:
    """Return the signature of a graph that takes one tensor each: of networks that were pickled before."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return CallSignature(model, tuple((name, kind, False) for name in names), {name: Leaf(name) for name in names})


class _Names:
    """Names of placeholders: identifiers, each once."""

    def __init__(self) -> None:
        self._taken = {"self"}  # of the graph's own forward

    def of(self, path: str) -> str:
        name = base = re.sub(r"\W+", "_", path).strip("_")
        number = 1
        while name in self._taken or keyword.iskeyword(name):
            name, number = f"{base}_{number}", number + 1
        self._taken.add(name)
        return name


def positional(inputs: Any) -> tuple[Any, ...]:
    """Return what a network is called with by position: a tuple or list of inputs, or one that is no such."""
    several = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")
    return tuple(inputs) if several else (inputs,)


def mapped(value: Any, change: Callable[[Any, str], Any], path: str) -> Any:
    """Return a value with every tensor, Moments or :class:`Leaf` in it changed, the rest as it is.

    Args:
        value: nested lists, tuples, dictionaries, named tuples and dataclasses.
        change: called with a tensor and its path: ``batch['image']``.
        path: of the value.

    Raises:
        ModelError: an object that holds tensors and is none of these.
    """
    if _is_tensor(value):
        return change(value, path)
    children = _children(value, path)
    if not children:
        _refuse_opaque(value, path)
        return value
    return _rebuilt(value, [(key, mapped(child, change, where)) for key, child, where in children])


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is nested in a value, in order."""
    if _is_tensor(value):
        yield value
        return
    children = _children(value, "")
    if not children:
        yield value
    for _, child, _ in children:
        yield from leaves(child)


def has_tensors(value: Any) -> bool:
    """Return whether a tensor is nested in a value."""
    return any(map(_is_tensor, leaves(value)))


def _children(value: Any, path: str) -> list[tuple[Any, Any, str]]:
    """Key, value and path of what a container holds; nothing of what is none."""
    if isinstance(value, Mapping):
        return [(key, child, f"{path}[{key!r}]") for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(key, getattr(value, key), f"{path}.{key}") for key in value._fields]
    if isinstance(value, (list, tuple)):
        return [(position, child, f"{path}[{position}]") for position, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)]
    return []


def _rebuilt(value: Any, children: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, tuple):
        parts = [child for _, child in children]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [child for _, child in children]
    other = copy.copy(value)
    for key, child in children:
        if isinstance(value, Mapping):
            other[key] = child
        else:
            object.__setattr__(other, key, child)
    return other


def _refuse_opaque(value: Any, path: str) -> None:
    held = list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) else []
    if any(_is_tensor(leaf) for child in held for leaf in leaves(child)):
        raise ModelError(
            f"input '{path}' is a {type(value).__name__}, which holds tensors that can't be followed; give them in a "
            "tuple, list, dictionary, named tuple or dataclass."
        )


def _is_tensor(value: Any) -> bool:
    if isinstance(value, PackedSequence):
        raise ModelError(
            "torch.nn.utils.rnn.PackedSequence is no input that adfify can follow: its batch changes from step to "
            "step. Give the padded tensor, sequences of one length."
        )
    return isinstance(value, (Tensor, Moments, Leaf))


def _is_floating(value: Any, path: str) -> bool:
    if isinstance(value, Tensor) and value.is_complex():
        raise ModelError(
            f"input '{path}' is complex, and Moments are of real values; make its real and its imaginary part two "
            "inputs of forward, and put them together there: torch.complex(real, imag)."
        )
    return isinstance(value, Moments) or value.is_floating_point()


def _matched(structure: Any, given: Any, path: str) -> list[Any]:
    """The tensors of ``given``, which has to be what ``structure`` is."""
    if isinstance(structure, Leaf):
        return [_as_leaf(structure, given, path)]
    expected = _children(structure, path)
    if not expected:
        if not _same(structure, given):
            raise InputError(
                f"input '{path}' is {_described(given)}, and the model was converted for {_described(structure)}, "
                "which is part of the graph. Convert it once more with that among example_inputs."
            )
        return []
    there = {key: child for key, child, _ in _children(given, path)}
    if _is_tensor(given) or not _alike(structure, given) or set(there) != {key for key, _, _ in expected}:
        raise InputError(
            f"input '{path}' is {_described(given)}, and the model was converted for {_described(structure)}."
        )
    return [leaf for key, part, where in expected for leaf in _matched(part, there[key], where)]


def _as_leaf(leaf: Leaf, given: Any, path: str) -> Any:
    holds_tensors = not _is_tensor(given) and has_tensors(given)
    if given is None or holds_tensors:
        raise InputError(
            f"input '{path}' is {_described(given)}, and the model was converted for a tensor there. Convert it once "
            "more with that among example_inputs."
        )
    if not leaf.uncertain and isinstance(given, Moments):
        raise InputError(f"input '{path}' is Moments; it was certain when the model was converted: give a tensor.")
    return given


def _alike(structure: Any, given: Any) -> bool:
    """Whether a container is of the kind of another: lists may be given for tuples."""
    if isinstance(structure, Mapping):
        return isinstance(given, Mapping)
    if isinstance(structure, (list, tuple)) and not hasattr(structure, "_fields"):
        return isinstance(given, (list, tuple)) and not hasattr(given, "_fields")
    return type(structure) is type(given)


def _same(expected: Any, given: Any) -> bool:
    if expected is given:
        return True
    if _is_tensor(given) or isinstance(expected, bool) is not isinstance(given, bool):
        return False
    try:
        return bool(expected == given)
    except (TypeError, ValueError, RuntimeError):  # an array, whose elements are compared
        return False


def _described(value: Any) -> str:
    if isinstance(value, Leaf):
        return "a tensor"
    if _is_tensor(value):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    children = _children(value, "")
    if not children:
        return f"{value!r:.60}"
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return f"a {type(value).__name__} of {len(children)}"
    return f"a {type(value).__name__} with {', '.join(map(repr, (key for key, _, _ in children)))[:200]}"
