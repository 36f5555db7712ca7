"""What a forward leaves behind on the model and in the process: noticed, named, and undone.

Note [State]
A trace runs the model's forward once, with symbols in place of tensors. What it stores on the way (features kept for
later, a counter) would be left on the user's model; so everything reachable from the model, containers and objects
included, is put back as it was, into the very same objects. And what a *later* call reads of it can't be converted: the
network would repeat the first call for ever. Whether any output does so is found by a second trace, of a model as the
first one left it: where both compute the same, nothing was read.
"""

from __future__ import annotations

import dis
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from adfify.errors import ModelError
from adfify.locations import forward_of

_TABLES = ("_parameters", "_buffers", "_modules")


class StateError(ModelError):
    """A forward reads what an earlier call left on the model."""


@dataclass(frozen=True)
class _Kept:
    """One object and how it was.

    Attributes:
        path: by which the user knows it.
        changes: names what has changed in it since.
        restore: puts it back.
        items: what it holds that may be replaced: path, value, and what sets another.
    """

    path: str
    changes: Callable[[], list[str]]
    restore: Callable[[], None]
    items: Callable[[], list[_Item]] = list


_Item = tuple[str, Any, Callable[[Any], None]]


class Snapshot:
    """Everything reachable from a model as it is now.

    Args:
        root: the model.
        runs: whether it will be run, and not only traced: its forward may write into its own parameters then
            (nn.Embedding with max_norm), so a copy of them is kept.
    """

    def __init__(self, root: nn.Module, runs: bool = False) -> None:
        self._runs = runs
        self._kept: list[_Kept] = []
        self._seen: dict[int, Any] = {}  # the objects themselves, so that no id is used twice
        self._queue: list[tuple[str, Any]] = [("", root)]
        while self._queue:
            path, value = self._queue.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._keep(path, value)

    def changes(self) -> list[str]:
        """Paths of what is no longer as it was."""
        return list(dict.fromkeys(path for kept in self._kept for path in kept.changes()))

    def restore(self) -> None:
        """Put everything back as it was."""
        for kept in self._kept:
            kept.restore()

    def values(self, paths: Collection[str]) -> list[Any]:
        """What is at some paths now."""
        return [value for kept in self._kept for path, value, _ in kept.items() if path in paths]

    def replace(self, paths: Collection[str], change: Callable[[Any], Any]) -> None:
        """Put other values in the place of those at some paths."""
        for kept in self._kept:
            for path, value, put in kept.items():
                if path in paths and (new := change(value)) is not value:
                    put(new)

    def _keep(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._keep_tensor(path, value)
        elif isinstance(value, nn.Module):
            self._keep_dict(path, vars(value), "." if path else "")
            for kind in type(value).__mro__:
                self._keep_class(kind)
            self._go_into_function(path, getattr(type(value), "forward", None))
        elif isinstance(value, dict):
            self._keep_dict(path, value, None)
        elif isinstance(value, list | deque | set):
            self._keep_sequence(path, value)
        elif isinstance(value, tuple | frozenset):
            self._queue += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, FunctionType | MethodType):
            self._go_into_function(path, value)
        else:
            self._keep_object(path, value)

    def _keep_dict(self, path: str, value: dict[Any, Any], joint: str | None) -> None:
        """A dictionary: of attributes, written with dots, or any other."""
        before = dict(value)

        def named(key: Any) -> str:
            return f"{path}[{key!r}]" if joint is None else f"{path}{joint}{key}"

        def changes() -> list[str]:
            keys = [*before, *[key for key in value if key not in before]]
            return [named(key) for key in keys if not _same(before.get(key, value), value.get(key, before))]

        def restore() -> None:
            # The order is part of it, and a value may be another object that is equal.
            if list(value) != list(before) or any(value[key] is not before[key] for key in before):
                value.clear()
                value.update(before)

        def items() -> list[_Item]:
            return [(named(key), item, partial(value.__setitem__, key)) for key, item in value.items()]

        self._kept.append(_Kept(path, changes, restore, items))
        for key, item in before.items():
            if joint is not None and key in _TABLES:
                self._seen[id(item)] = item
                self._keep_dict(path, item, joint)
            else:
                self._queue.append((named(key), item))

    def _keep_sequence(self, path: str, value: Any) -> None:
        before = list(value)

        def same() -> bool:
            return len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))

        def restore() -> None:
            if not same():
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(before)

        def items() -> list[_Item]:
            places = [] if isinstance(value, set) else range(len(value))
            return [(path, value[place], partial(value.__setitem__, place)) for place in places]

        self._kept.append(_Kept(path, lambda: [] if same() else [path], restore, items))
        self._queue += [(f"{path}[{i}]", item) for i, item in enumerate(before)]

    def _keep_class(self, kind: type) -> None:
        if _is_library(kind.__module__):
            return
        for name, item in list(vars(kind).items()):
            if name.startswith("__") or isinstance(item, FunctionType | property | classmethod | staticmethod | type):
                continue
            path = f"{kind.__qualname__}.{name}"

            def items(name: str = name, path: str = path) -> list[_Item]:
                return [(path, vars(kind).get(name), partial(setattr, kind, name))]

            def changes(name: str = name, item: Any = item, path: str = path) -> list[str]:
                return [] if _same(item, vars(kind).get(name, kind)) else [path]

            def restore(name: str = name, item: Any = item) -> None:
                if vars(kind).get(name, kind) is not item:
                    setattr(kind, name, item)

            self._kept.append(_Kept(path, changes, restore, items))
            self._queue.append((path, item))

    def _go_into_function(self, path: str, function: Any) -> None:
        """What a function holds: its closure, its defaults, and containers among the globals that it names."""
        if isinstance(function, MethodType):
            self._queue += [(path, function.__self__), (path, function.__func__)]
            return
        if not isinstance(function, FunctionType) or _is_library(function.__module__ or "torch"):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                self._keep_cell(name, cell)
        self._queue += [(f"{function.__name__}'s default", item) for item in function.__defaults__ or ()]
        self._queue += [(f"{function.__name__}'s {k}", item) for k, item in (function.__kwdefaults__ or {}).items()]
        self._queue.append((function.__name__, vars(function)))
        self._keep_globals(function)
        for name in function.__code__.co_names:
            item = function.__globals__.get(name)
            if isinstance(item, list | dict | deque | set | Tensor | torch.Generator | random.Random):
                self._queue.append((name, item))

    def _keep_globals(self, function: FunctionType) -> None:
        """Global names that a function sets."""
        code, space = function.__code__, function.__globals__
        for name in {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL"}:
            before = space.get(name, space)

            def changes(name: str = name, before: Any = before) -> list[str]:
                return [] if _same(before, space.get(name, space)) else [name]

            def restore(name: str = name, before: Any = before) -> None:
                if before is space:
                    space.pop(name, None)
                else:
                    space[name] = before

            def items(name: str = name) -> list[_Item]:
                return [(name, space.get(name), partial(space.__setitem__, name))]

            self._kept.append(_Kept(name, changes, restore, items))

    def _keep_cell(self, name: str, cell: Any) -> None:
        before = cell.cell_contents

        def restore() -> None:
            if cell.cell_contents is not before:
                cell.cell_contents = before

        def items() -> list[_Item]:
            return [(name, cell.cell_contents, partial(setattr, cell, "cell_contents"))]

        self._kept.append(_Kept(name, lambda: [] if _same(before, cell.cell_contents) else [name], restore, items))
        self._queue.append((name, before))

    def _keep_object(self, path: str, value: Any) -> None:
        for kind, get, put in _GENERATORS:
            if isinstance(value, kind):
                self._keep_generator(path, value, get, put)
                return
        kind = type(value)
        if isinstance(value, type | ModuleType | BuiltinFunctionType) or _is_library(kind.__module__):
            return
        if isinstance(getattr(value, "__dict__", None), dict):
            self._keep_dict(path, vars(value), ".")

    def _keep_generator(
        self, path: str, value: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], None]
    ) -> None:
        before = get(value)
        self._kept.append(
            _Kept(
                path, lambda: [] if str(list(get(value))) == str(list(before)) else [path], lambda: put(value, before)
            )
        )

    def _keep_tensor(self, path: str, value: Tensor) -> None:
        if value.grad is not None:
            self._queue.append((f"{path}.grad", value.grad))
        requires_grad, grad, plain = value.requires_grad, value.grad, _is_plain(value)
        # A copy of all weights would be dear where nothing is run on them.
        is_copied = plain and (self._runs or not isinstance(value, nn.Parameter))
        content = value.detach().clone() if is_copied else None

        def changes() -> list[str]:
            return [path] if content is not None and not _equal(value, content) else []

        def restore() -> None:
            if content is not None and not _equal(value, content):
                value.data.copy_(content)
            if value.grad is not grad:
                value.grad = grad
            if value.requires_grad != requires_grad:
                value.requires_grad_(requires_grad)

        self._kept.append(_Kept(path, changes, restore))


_GENERATORS: list[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]]] = [
    (torch.Generator, torch.Generator.get_state, lambda generator, state: generator.set_state(state) and None),
    (random.Random, random.Random.getstate, random.Random.setstate),
]


def _is_library(module: str) -> bool:
    """Whether classes and functions of a module hold nothing of the user's."""
    top = module.partition(".")[0]
    return top in ("torch", "numpy", "torchvision", "timm", "adfify") or (
        top in sys.stdlib_module_names and module not in ("types", "__main__")
    )


def _is_plain(value: Tensor) -> bool:
    fake = isinstance(value, torch._subclasses.FakeTensor)
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized and not fake


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and isinstance(a, int | float | str | bytes | complex | torch.Size) and a == b


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x = a.detach()
    return bool(((x == b) | ((x != x) & (b != b))).all())


@contextmanager
def untouched(root: nn.Module, runs: bool = False) -> Iterator[Snapshot]:
    """Undo whatever happens to a model within; for ``runs`` see :class:`Snapshot`."""
    snapshot = Snapshot(root, runs)
    try:
        yield snapshot
    finally:
        snapshot.restore()


class RandomState:
    """The state of every generator that a process has by default: torch's, its devices', numpy's and Python's."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def drawn(self) -> list[str]:
        """Whose numbers have been drawn since."""
        now = RandomState()
        by_torch = torch.equal(self._torch, now._torch) and all(map(torch.equal, self._cuda, now._cuda))
        by_numpy = self._numpy is None or _comparable(self._numpy) == _comparable(now._numpy)
        same = {"torch": by_torch, "numpy": by_numpy, "random": self._python == now._python}
        return [name for name, unchanged in same.items() if not unchanged]

    def restore(self) -> None:
        """Let the numbers come again that came since."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _comparable(state: Any) -> Any:
    return [part.tolist() if hasattr(part, "tolist") else part for part in state]


@contextmanager
def random_state_kept() -> Iterator[RandomState]:
    """Leave the random numbers of the process as they were."""
    before = RandomState()
    try:
        yield before
    finally:
        before.restore()


def other_every_time(root: nn.Module) -> StateError:
    """The error for a forward that computes with other values in every call, wherever it has them from."""
    return StateError(
        f"{type(root).__name__}.forward{forward_of(root)} computes with other values in every call (random numbers, "
        "the clock), which tracing would freeze. Make them an input of forward, given as Moments(mean, variance)."
    )


COUNTED = "goes by what it counts, from call to call, in"


def refuse(root: nn.Module, names: list[str], why: str = "reads what an earlier call left in") -> StateError:
    """The error for a forward that reads state."""
    said = ", ".join(f"'{name}'" for name in names[:5]) + (" and others" if len(names) > 5 else "")
    return StateError(
        f"{type(root).__name__}.forward {why} {said}: the converted network would repeat one call for ever. Make what "
        "is carried from call to call an input and an output of forward, forward(self, x, state) -> (y, state), and "
        "convert that."
    )
