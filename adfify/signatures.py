"""What a rule takes: which of its arguments are Moments, by its type hints."""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from adfify.moments import ComplexMoments, Moments


class Takes(enum.Enum):
    """What may be given for an argument of a rule.

    Note [What an annotation says]
    An argument whose annotation names only Moments (``Moments``, ``Moments | None``, ``list[Moments]``) is given
    Moments: a certain tensor is lifted to variance 0. One that names Moments beside something else
    (``Moments | Tensor``) is given either, as it comes. One that does not name Moments (``Tensor``, ``int``,
    ``Sequence[int]``) is given what is certain, and an uncertain value there is a gap in the plan. One without an
    annotation, or with ``Any``, is given whatever comes.
    """

    MOMENTS = "Moments"
    EITHER = "Moments or a certain value"
    CERTAIN = "a certain value"


@functools.cache
def signature_of(apply: Callable[..., Any]) -> inspect.Signature:
    """The signature of a rule's function, or of the ``forward`` of its module class, with annotations resolved.

    Args:
        apply: a rule's function or ADF module class; annotations may be types or strings.

    Raises:
        TypeError: an annotation that is a string and means nothing in the module of the function.
    """
    call = apply.forward if isinstance(apply, type) else apply  # type: ignore[attr-defined]
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())[1 if isinstance(apply, type) else 0 :]
    return signature.replace(parameters=[p.replace(annotation=_resolved(p, _function(call))) for p in parameters])


def _function(call: Any) -> Any:
    """The function behind a rule: of a partial what it is of, of an object that is called its class's method."""
    plain = inspect.unwrap(getattr(call, "func", call))
    return plain if hasattr(plain, "__globals__") else inspect.unwrap(type(plain).__call__)


def _resolved(parameter: inspect.Parameter, function: Any) -> Any:
    if parameter.annotation is parameter.empty:
        return parameter.empty
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        # One at a time: what is not needed here (a return type under TYPE_CHECKING) need not be known.
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}), {})[parameter.name]
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise TypeError(
            f"the annotation {parameter.annotation!r} of '{parameter.name}' in the rule {function.__qualname__} can't "
            f"be resolved ({error}), and it says whether that argument is Moments; make its names importable from "
            f"{function.__module__}, or leave the annotation out."
        ) from error


def takes(parameter: inspect.Parameter) -> Takes:
    """What may be given for a parameter of :func:`signature_of`. See Note [What an annotation says]."""
    random, certain = _kinds(parameter.annotation)
    return Takes.EITHER if random and certain else Takes.MOMENTS if random else Takes.CERTAIN


def _kinds(hint: Any) -> tuple[bool, bool]:
    """Whether a hint names Moments, and whether it names something else."""
    if hint in (inspect.Parameter.empty, Any, object) or isinstance(hint, typing.TypeVar):
        return True, True
    if hint in (None, type(None), Ellipsis):
        return False, False
    if isinstance(hint, type) and issubclass(hint, (Moments, ComplexMoments)):
        return True, False
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType) or _is_container(origin):
        inner = typing.get_args(hint)
        # The keys of a mapping are certain, and say nothing of its values.
        values = inner[1:] if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping) else inner
        kinds = [_kinds(part) for part in values]
        return any(random for random, _ in kinds), any(certain for _, certain in kinds)
    return False, True


def admits(hint: Any, value: Any) -> bool:
    """Whether a hint allows for a Python number or a list: what a rule for tensors might be given by its place.

    Of a list, what is in it is not looked at; what is neither a number nor a list is allowed.
    """
    parts = set(_parts(hint))
    if parts & {inspect.Parameter.empty, Any, object} or any(isinstance(part, typing.TypeVar) for part in parts):
        return True
    kinds = [part for part in parts if isinstance(part, type)]
    if isinstance(value, list | tuple):
        return any(_is_container(kind) for kind in kinds) or not isinstance(value, list)
    if isinstance(value, int | float | complex):
        return any(issubclass(kind, int | float | complex) for kind in kinds) or len(kinds) < len(parts)
    return True


def _parts(hint: Any) -> Iterator[Any]:
    """The types that a hint is made of."""
    origin = typing.get_origin(hint)
    if origin is None:
        yield hint
        return
    yield origin
    for part in typing.get_args(hint):
        yield from _parts(part)


def _is_container(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, collections.abc.Collection)


Place = int | str
"""Where an argument stands in a call: a position or a keyword."""


def parameter_at(signature: inspect.Signature, place: Place) -> inspect.Parameter | None:
    """The parameter that an argument at a position, or by a keyword, goes to."""
    parameters = signature.parameters.values()
    if isinstance(place, str):
        named = (p for p in parameters if p.name == place and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        return next(named, None) or next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if place < len(positional):
        return positional[place]
    return next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
