"""Types that training scripts put beside the weights, and that hold data alone: the allow-list of a safe load."""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy

# Note [Weights only, and plain types]
# A pickle can call any function that it names, so torch.load(weights_only=True) reads tensors and few containers alone.
# Real checkpoints hold their options, metrics and dates as well. The types below are made of data and do nothing when
# they are made, so allowing them gives a file no power. What is not here is refused by name; weights_only=False never
# comes into question. The list holds for one load, and is torch's own means (torch.serialization.safe_globals).

_NUMBERS = (
    "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128", "str_", "bytes_",
)  # fmt: skip

_LONGEST = 1 << 20  # bytes of one element: a number without value is made of so many zeros

Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


def plain_types() -> list[Allowed]:
    """For :func:`torch.serialization.safe_globals`: types, and types under a name that they had in other versions."""
    scalars = [numpy.dtype(getattr(numpy, name)) for name in _NUMBERS]
    return [
        argparse.Namespace, types.SimpleNamespace, uuid.UUID,
        (_as_dict, "collections.defaultdict"), (_as_list, "collections.deque"),
        datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone,
        decimal.Decimal, (_of_text(fractions.Fraction), "fractions.Fraction"),
        *((_of_things(kind), f"builtins.{kind.__name__}") for kind in (list, dict, tuple, frozenset)),
        *((_of_text(kind), f"builtins.{kind.__name__}") for kind in (int, float, str, bool)),
        (_as_text, "builtins.range"), (slice, "builtins.slice"),
        *_paths(),
        (_dtype, "numpy.dtype"), numpy.ndarray,
        *(type(scalar) for scalar in scalars), *(scalar.type for scalar in scalars),
        *((_numpy(name), f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
          for name in ("scalar", "_reconstruct")),
    ]  # fmt: skip


def _paths() -> list[Allowed]:
    """Paths, under the names of Python 3.13 too; those of another system as pure ones, which this one can make."""
    own = {
        "PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath,
        "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath,
    }  # fmt: skip
    return [(kind, f"{module}.{name}") for name, kind in own.items() for module in ("pathlib", "pathlib._local")]


def _as_dict(*_: Any) -> dict[Any, Any]:
    """For containers that torch's reader can't fill: a plain one."""
    return {}


def _of_things(kind: type) -> Callable[..., Any]:
    """A container of what is there already: one of a range, or of a million zero bytes, would be made of nothing."""

    def made(things: Any = ()) -> Any:
        if not isinstance(things, (list, tuple, dict, set, frozenset)):
            raise ValueError(f"a {kind.__name__} of a {type(things).__name__} is no plain data")
        return kind(things)

    return made


def _of_text(kind: type) -> Callable[..., Any]:
    """A number or text of short ones: one of 1e999999999, exactly, or of nested lists would not end."""

    def made(*given: Any) -> Any:
        short = all(
            isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 1000) for value in given
        )
        power = kind is fractions.Fraction and any("e" in str(value).lower() for value in given)
        if not short or power:
            raise ValueError(f"a {kind.__name__} of this is no plain data")
        return kind(*given)

    return made


def _as_text(*bounds: int) -> str:
    """A range as text: it would be made into a list of any length by whoever reads it."""
    return f"range{bounds}"


def _as_list(*_: Any) -> list[Any]:
    return []


def _dtype(*args: Any) -> numpy.dtype[Any]:
    """A dtype of numbers or text; one of Python objects could hold anything."""
    made: numpy.dtype[Any] = numpy.dtype(*args)
    if made.kind not in "biufcSU" or made.itemsize > _LONGEST:
        raise ValueError(f"an array of {made} is no plain data")
    return made


def _numpy(name: str) -> Callable[..., Any]:
    """What numpy's own pickles call."""
    core = getattr(numpy, "_core", None) or numpy.core
    function: Callable[..., Any] = getattr(core.multiarray, name)
    return function
