"""Conversions in several threads, while others run networks.

Note [Bystanders]
    To trace, torch.fx puts functions of its own in the place of ``nn.Module.__call__`` and ``__getattr__``, for the
    whole process: a module that another thread calls meanwhile would be traced too, and two traces that end in another
    order than they began leave one of these functions there for good. So conversions take turns, and what torch.fx has
    put there is seen by the thread that traces alone: the others get what was there before. Between the two moments
    others may still come to the tracer, which sends them on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
Result = TypeVar("Result")

_TURN = threading.RLock()


def one_at_a_time(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let threads call a function, and all others so decorated, one after the other."""

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> Result:
        with _TURN:
            return function(*args, **kwargs)

    return waiting


class Module:
    """What ``nn.Module`` is when nothing traces, and which thread is about to trace: this one."""

    def __init__(self) -> None:
        self._call: Any = nn.Module.__call__
        self._look_up: Any = nn.Module.__getattr__
        self._thread = threading.get_ident()

    @property
    def is_bystander(self) -> bool:
        """Whether another thread asks."""
        return threading.get_ident() != self._thread

    def for_others(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with what is patched in ``nn.Module`` when it begins seen by its own thread only."""

        @functools.wraps(forward)
        def traced(*args: Any) -> Any:
            call, look_up = nn.Module.__call__, nn.Module.__getattr__

            def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return (self._call if self.is_bystander else call)(module, *args, **kwargs)

            def looked_up(module: nn.Module, name: str) -> Any:
                return (self._look_up if self.is_bystander else look_up)(module, name)

            nn.Module.__call__, nn.Module.__getattr__ = called, looked_up  # type: ignore[method-assign]
            try:
                return forward(*args)
            finally:
                nn.Module.__call__, nn.Module.__getattr__ = call, look_up  # type: ignore[method-assign]

        return traced
