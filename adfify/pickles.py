"""How much a pickle of weights makes when it is read, counted without making it."""

from __future__ import annotations

import pickletools
from typing import IO, Any

# Note [A small pickle that grows]
# torch's reader of weights calls nothing dangerous, but makes what it is asked for: a bytearray of any length, a tensor
# of a number. And a list of twice the same list, of twice the same list and so on, has a few bytes and a billion
# elements for whoever counts, hashes or prints it. So its operations are followed first, on a stack of sizes, in which
# what is shared counts as often as it is used.

MOST = 20_000_000
"""Things in one, what is shared counted as often as it is used."""

_MAKERS = ("bytearray", "bytes_", "str_", "void", "ndarray")


class PickleError(ValueError):
    """A pickle that makes more than it holds; the message says what."""


class _Thing:
    """What an operation would make: how many elements, and the name, if it is a global."""

    __slots__ = ("first", "name", "size")

    def __init__(self, size: int = 1, name: str = "", first: str = "") -> None:
        self.size, self.name, self.first = size, name, first


class _Machine:
    """The stack and memory of an unpickler, of sizes."""

    def __init__(self) -> None:
        self.stack: list[_Thing] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Thing] = {}

    def step(self, name: str, argument: Any) -> int:
        """One operation; the size of the largest thing that it touches."""
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "GLOBAL":
            self.stack.append(_Thing(name=argument))
        elif name in _TUPLES:
            taken = self._pop(_TUPLES[name]) if name != "TUPLE" else self._since_mark()
            self.stack.append(_Thing(1 + sum(thing.size for thing in taken), first=taken[0].name if taken else ""))
        elif name in _FILLING:
            taken = self._pop(_FILLING[name]) if _FILLING[name] else self._since_mark()
            self.stack[-1].size += sum(thing.size for thing in taken)
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            _check_call(function.name, arguments.first)
            self.stack.append(_Thing(1 + arguments.size))
        elif name == "BINPERSID":
            self.stack.append(_Thing(1 + self._pop(1)[0].size))
        elif name not in ("PROTO", "STOP", "FRAME"):
            self.stack.append(_Thing())  # the reader of weights takes no others that take something away
        return self.stack[-1].size if self.stack else 0

    def _since_mark(self) -> list[_Thing]:
        return self._pop(len(self.stack) - self.marks.pop())

    def _pop(self, count: int) -> list[_Thing]:
        taken = [self.stack.pop() for _ in range(count)]
        return taken[::-1]


_TUPLES = {"TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLING = {"APPEND": 1, "APPENDS": 0, "SETITEM": 2, "SETITEMS": 0, "BUILD": 1}


def _check_call(name: str, first: str) -> None:
    inner = first if name.endswith("_rebuild_from_type_v2") else ""
    for called in (name, inner):
        kind = called.partition(" ")[2]
        if kind in _MAKERS or kind.endswith(("Tensor", "Storage")):
            raise PickleError(f"it makes a {kind} of any length, which no checkpoint does")


def check_growth(pickled: IO[bytes], count: int = 1) -> None:
    """Follow so many pickles, one after the other.

    Args:
        pickled: the file, at the first.
        count: how many there are.

    Raises:
        PickleError: they make more than they hold.
        ValueError, IndexError, KeyError: they are none.
    """
    for _ in range(count):
        machine = _Machine()
        for operation, argument, _place in pickletools.genops(pickled):
            if machine.step(operation.name, argument) > MOST:
                raise PickleError(f"it makes more than {MOST:,} things out of fewer, shared")
