"""Plain data into dataclasses, by their type hints: what does not fit is named, and nothing else can happen.

Note [Metadata is data]
    What a file says of itself may be anything. It becomes the dataclass that it should be, field by field, or an error
    that says which field is wrong; bounds on values are the dataclass's own (``__post_init__``).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from adfify.printable import printable

Record = TypeVar("Record")

LONGEST_TEXT = 1 << 16
"""Characters of a text in metadata: names, notes, labels."""

_SHOWN, _LARGEST = 60, 1e300


class RecordError(ValueError):
    """Data that does not fit; the message says where."""


def parsed(text: bytes, longest: int) -> Any:
    """JSON as plain data: numbers are finite, keys occur once, nesting ends.

    Raises:
        RecordError: it is none, or longer than so many bytes.
    """
    if len(text) > longest:
        raise RecordError(f"it has {len(text)} bytes, and at most {longest} are read")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refused)
    except RecursionError as error:
        raise RecordError("it is nested without end") from error
    except ValueError as error:  # no UTF-8, no JSON, a number of a million digits
        raise RecordError(f"it is no JSON: {printable(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def read(cls: type[Record], data: Any, where: str) -> Record:
    """The dataclass that ``data`` describes.

    Args:
        cls: its class; what its fields may hold is read from their type hints.
        data: plain data, as from JSON.
        where: what it is, for the error.

    Raises:
        RecordError: a field is missing, is not known, or holds something else; or the class refuses its values.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"{where} is {_shown(data)}, and should have named fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = next((key for key in data if key not in fields), None)
    if unknown is not None:
        raise RecordError(f"{where} has the field {_shown(unknown)}, which is not known")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}.{name} is missing")
    try:
        return cls(**values)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from error


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _value(hint, data, where)
    if origin is typing.Literal:
        if not isinstance(data, str) or data not in args:
            raise RecordError(f"{where} is {_shown(data)}, and should be one of {', '.join(map(repr, args))}")
        return data
    if origin is tuple:
        return _sequence(args, data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(f"{where} is {_shown(data)}, and should have named entries")
        return {_text(key, where): _value(args[1], value, f"{where}.{_key(key)}") for key, value in data.items()}
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), data, where)
    return _plain(hint, data, where)


def _sequence(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise RecordError(f"{where} is {_shown(data)}, and should be a list")
    if args[-1] is Ellipsis:
        args = args[:1] * len(data)
    elif len(args) != len(data):
        raise RecordError(f"{where} has {len(data)} entries, and should have {len(args)}")
    return tuple(_value(hint, entry, f"{where}[{k}]") for k, (hint, entry) in enumerate(zip(args, data, strict=True)))


def _plain(hint: Any, data: Any, where: str) -> Any:
    if hint is str:
        return _text(data, where)
    number = isinstance(data, (int, float)) and not isinstance(data, bool)
    if hint is float and number:
        # An integer may be too large for any float, and JSON's 1e999 is infinite.
        if abs(data) <= _LARGEST:
            return float(data)
        raise RecordError(f"{where} is {_shown(data)}, and should be finite")
    if (hint is int and number and isinstance(data, int)) or (hint is bool and isinstance(data, bool)):
        return data
    raise RecordError(f"{where} is {_shown(data)}, and should be of type {hint.__name__}")


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str):
        raise RecordError(f"{where} is {_shown(data)}, and should be text")
    if len(data) > LONGEST_TEXT:
        raise RecordError(f"{where} has {len(data)} characters, and at most {LONGEST_TEXT} are read")
    return data


def _key(key: str) -> str:
    return printable(key[:_SHOWN])


def _shown(data: Any) -> str:
    if isinstance(data, (list, dict)):
        return f"a {'list' if isinstance(data, list) else 'dictionary'} of {len(data)}"
    return printable(repr(data)[:_SHOWN]) if not isinstance(data, int) or abs(data) < 10**30 else "a huge number"
