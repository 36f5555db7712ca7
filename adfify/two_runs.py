"""Whether a model computes the same in a second call, tried by calling it, for what torch.export traces.

torch.export runs the model on tensors without content, and fails or forgets where one call meets what another one left.
There are inputs to run the model on, so it is called: after a call with other values, and without that.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import counting, state
from adfify.call_signature import CallSignature, mapped
from adfify.moments import Moments


def refuse_state(root: nn.Module, signature: CallSignature, tensors: tuple[Any, ...]) -> None:
    """Raise where a call computes something else after an earlier one.

    Raises:
        StateError: naming what the earlier call left.
    """
    plain = signature.call([x.mean if isinstance(x, Moments) else x for x in tensors])
    # What the model can't be called with, torch.export has said better.
    with suppress(RuntimeError, TypeError, ValueError, IndexError), torch.no_grad():
        fresh, _ = _outputs(root, plain, after=())
        later, changes = _outputs(root, plain, after=(_others(plain),))
        if not _close(fresh, _outputs(root, plain, after=())[0]):
            raise state.other_every_time(root)
        if changes and not _agree(fresh, later) and _agree(fresh, _outputs(root, plain, after=())[0]):
            raise state.refuse(root, changes)
        if changes:
            _refuse_counts(root, plain, fresh)


def _refuse_counts(root: nn.Module, inputs: Any, fresh: list[Any]) -> None:
    with state.untouched(root, runs=True), state.random_state_kept():
        _call(root, inputs)
        after = state.Snapshot(root)
        _call(root, inputs)
        moving = after.changes()
        after.restore()
        if moving and counting.matter(root, after, moving, lambda: _agree(fresh, _outputs(root, inputs, after=())[0])):
            raise state.refuse(root, moving, state.COUNTED)


def _outputs(root: nn.Module, inputs: Any, after: tuple[Any, ...]) -> tuple[list[Any], list[str]]:
    """Outputs after calls with other inputs, and what those changed; everything is put back."""
    with state.untouched(root, runs=True) as before, state.random_state_kept():
        for others in after:
            _call(root, others)
        changes = before.changes()
        torch.manual_seed(0)
        return [_copy(leaf) for leaf in pytree.tree_leaves(_call(root, inputs))], changes


def _call(root: nn.Module, inputs: Any) -> Any:
    args, kwargs = mapped(inputs, lambda x, _: x.clone(), "")
    return root(*args, **kwargs)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _others(inputs: Any) -> Any:
    """Inputs of the same kinds with other values."""
    return mapped(inputs, lambda x, _: x * 0.5 + 0.25 if x.is_floating_point() else x, "")


def _agree(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))


def _close(a: list[Any], b: list[Any]) -> bool:
    """Whether outputs are the same but for the order in which a GPU adds."""
    both = [pair for pair in zip(a, b, strict=True) if isinstance(pair[0], Tensor) and pair[0].is_floating_point()]
    pairs = [(x.double(), y.double()) for x, y in both]
    return all(torch.allclose(x, y, rtol=0.01, atol=0.01 * _size(x), equal_nan=True) for x, y in pairs)


def _size(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and (a == b or not isinstance(a, int | float | str))
