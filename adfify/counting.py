"""Whether what a forward counts decides what it computes, in whatever call.

Note [Counts]
`self.calls += 1` is harmless, and `if self.calls > 3: return self.late(x)` is another network from the fourth call on:
two calls do not tell them apart. So the numbers that change from call to call are replaced by ones that are followed:
each comparison of one is let go the other way, in a run of its own, and the network has to compute the same; used as
anything but a number to count in, to compare and to print, they are read. Lists that grow are tried at other lengths.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from adfify import state

_MOST_DECISIONS = 16
_LENGTHS = (0, 1, 2, 3, 4, 5, 8, 64)


@dataclass
class _Trial:
    """One run.

    Attributes:
        flipped: which of the decisions goes the other way.
        decisions: how many there were.
        is_read: whether a count was used as a value.
        counts: how many counts there are.
    """

    flipped: int | None = None
    decisions: int = 0
    is_read: bool = False
    counts: int = 0

    def decide(self, way: bool) -> bool:
        self.decisions += 1
        return way is not (self.decisions - 1 == self.flipped)


def _arithmetic(operation: Callable[[Any, Any], Any], is_reflected: bool = False) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        value = other.value if type(other) is Count else other
        result = operation(value, self.value) if is_reflected else operation(self.value, value)
        if type(value) in (int, float, bool):
            return Count(result, self.trial)
        self.trial.is_read = True
        return result

    return method


def _comparison(operation: Callable[[Any, Any], Any]) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        value = other.value if type(other) is Count else other
        result = operation(self.value, value)
        if isinstance(result, bool):
            return self.trial.decide(result)
        self.trial.is_read = True
        return result

    return method


class Count:
    """A number that changes from call to call, in a trial."""

    def __init__(self, value: Any, trial: _Trial) -> None:
        self.value, self.trial = value, trial

    __add__, __radd__ = _arithmetic(operator.add), _arithmetic(operator.add, True)
    __sub__, __rsub__ = _arithmetic(operator.sub), _arithmetic(operator.sub, True)
    __mul__, __rmul__ = _arithmetic(operator.mul), _arithmetic(operator.mul, True)
    __mod__, __rmod__ = _arithmetic(operator.mod), _arithmetic(operator.mod, True)
    __truediv__, __rtruediv__ = _arithmetic(operator.truediv), _arithmetic(operator.truediv, True)
    __floordiv__, __rfloordiv__ = _arithmetic(operator.floordiv), _arithmetic(operator.floordiv, True)
    __pow__, __rpow__ = _arithmetic(operator.pow), _arithmetic(operator.pow, True)
    __and__, __or__, __xor__ = _arithmetic(operator.and_), _arithmetic(operator.or_), _arithmetic(operator.xor)
    __lt__, __le__ = _comparison(operator.lt), _comparison(operator.le)
    __gt__, __ge__ = _comparison(operator.gt), _comparison(operator.ge)
    __eq__, __ne__ = _comparison(operator.eq), _comparison(operator.ne)

    def __bool__(self) -> bool:
        return self.trial.decide(bool(self.value))

    def _read(self) -> Any:
        self.trial.is_read = True
        return self.value

    def __hash__(self) -> int:
        return hash(self._read())

    def __index__(self) -> int:
        return operator.index(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __neg__(self) -> Count:
        return Count(-self.value, self.trial)

    def __str__(self) -> str:
        return str(self.value)

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


def matter(root: nn.Module, after: state.Snapshot, moving: Sequence[str], agrees: Callable[[], bool]) -> bool:
    """Return whether what changes from call to call decides what a model computes.

    Args:
        root: the model.
        after: how a call left it; it is as that now.
        moving: what another call changes again.
        agrees: runs the model, and says whether it computes what it did in the first call.
    """
    followed = _Trial()
    if not _tried(root, after, moving, agrees, _following(followed)) or followed.is_read:
        return bool(followed.counts)
    if followed.decisions > _MOST_DECISIONS:
        return True
    trials = [_following(_Trial(flipped=number)) for number in range(followed.decisions)]
    lists = [value for value in after.values(moving) if isinstance(value, list | deque)]
    trials += [_resizing(length) for length in _LENGTHS if lists]
    return not all(_tried(root, after, moving, agrees, change) for change in trials)


def _tried(
    root: nn.Module, after: state.Snapshot, moving: Sequence[str], agrees: Callable[[], bool], change: Any
) -> bool:
    with state.untouched(root):
        after.replace(moving, change)
        try:
            return agrees()
        except Exception:  # the model does not expect it, or what was read is no longer there
            return False


def _following(trial: _Trial) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if type(value) not in (int, float):
            return value
        trial.counts += 1
        return Count(value, trial)

    return change


def _resizing(length: int) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if not isinstance(value, list | deque) or not value:
            return value
        items = (list(value) * length)[:length]
        return deque(items, value.maxlen) if isinstance(value, deque) else items

    return change
