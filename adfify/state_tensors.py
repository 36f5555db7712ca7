"""The tensors of a state dict from a file: what they may be, before a network takes them.

Note [What load_state_dict does not look at]
    It casts any number to any dtype without a word: 8-bit codes become weights of 0 to 255, a complex number loses its
    imaginary part. It takes NaN, and a running variance below 0. And a view that repeats its elements says that a file
    of a few bytes holds as many weights as it likes. All of these are refused by their key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adfify.errors import CheckpointError
from adfify.printable import printable

State = Mapping[str, Tensor]

CAST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Floating-point dtypes of a file, which become the network's."""

_SHOWN = 5


def is_state(content: Any) -> bool:
    """Whether it is a dictionary of tensors."""
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def checked(state: Mapping[Any, Tensor], origin: str) -> State:
    """The state dict, if its keys are names and its tensors hold the elements that they say.

    Raises:
        CheckpointError: the first that is none, and why.
    """
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"{origin} has the key {_shown(key)}, of type {type(key).__name__}; the keys of a state_dict are names "
                "of parameters, such as 'fc.weight'."
            )
        why = _why_not(value)
        if why:
            raise CheckpointError(f"{origin}: {printable(key)} {why}.")
    return state


def _why_not(value: Tensor) -> str:
    if value.is_meta:
        return "is a meta tensor: it has a shape, and no weights. Save the network after its weights are loaded"
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return "is sparse, quantised or nested; save it as an ordinary tensor: to_dense() or dequantize()"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "is a view that repeats its elements, and the file does not hold them; save it by clone()"
    return ""


def refuse_unfit(state: State, expected: State, origin: str) -> None:
    """Raise CheckpointError unless every tensor is of a kind of number that the network's own is.

    Args:
        state: from the file, of the network's keys.
        expected: the network's own.
        origin: the file, for the error.
    """
    bad = [
        f"{printable(key)} is {_named(value.dtype)}, and should be {_wanted(expected[key])}"
        for key, value in state.items()
        if key in expected and not _fits(value, expected[key])
    ]
    if bad:
        more = f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CheckpointError(
            f"{origin} holds other kinds of numbers than the network takes: {'; '.join(bad[:_SHOWN])}{more}. Quantised "
            "weights need their scales: save the network as floating-point numbers."
        )


def _fits(value: Tensor, own: Tensor) -> bool:
    if own.is_floating_point():
        return value.dtype in CAST
    if own.is_complex():
        return value.is_complex() or value.dtype in CAST
    # A mask or an index: another width of integer holds the same numbers.
    return value.dtype == own.dtype or (_is_integer(value) and _is_integer(own))


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wanted(own: Tensor) -> str:
    return ", ".join(map(_named, CAST)) if own.is_floating_point() else _named(own.dtype)


def refuse_values(model: nn.Module, origin: str) -> None:
    """Raise CheckpointError where a loaded network holds NaN, infinities or a running variance below 0."""
    bad = list(_unusable(model))
    if bad:
        more = f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CheckpointError(
            f"{origin} holds numbers that are no weights: {'; '.join(bad[:_SHOWN])}{more}. A training that diverged, "
            "or a damaged file?"
        )


def _unusable(model: nn.Module) -> Iterator[str]:
    for key, value in model.state_dict().items():
        # An infinite sum of finite numbers is seldom, and is looked at again.
        number = value.is_floating_point() or value.is_complex()
        if number and not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            yield f"{printable(key)} has NaN or infinite elements"
        elif key.endswith("running_var") and bool((value < 0).any()):
            yield f"{printable(key)} has variances below 0"


def _shown(key: Any) -> str:
    # The repr of a foreign object can be of any length, or have no end.
    return printable(repr(key)[:60]) if isinstance(key, (int, float, bool, bytes)) or key is None else "..."
