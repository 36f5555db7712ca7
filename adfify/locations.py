"""Where in a user's model something stands: the line of its source, and the module whose forward that is in."""

from __future__ import annotations

import importlib.util
import inspect
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

_LINES, _CHARACTERS = 6, 600
"""How much of an error of torch's is passed on: it may print whole graphs."""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's code that made a node, or ``""``."""
    if "location" in node.meta:  # of a network that was pickled
        return str(node.meta["location"])
    trace_text = node.meta.get("stack_trace") or node.stack_trace or ""
    frames = [line.strip() for line in trace_text.splitlines() if line.strip().startswith('File "')]
    split = [frame.removeprefix('File "').partition('", line ') for frame in frames]
    return _innermost([(path, rest.split(",")[0]) for path, _, rest in split])


def module_path(node: fx.Node) -> str:
    """The path of the module in whose forward a node stands, ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    if node.op == "call_module" and paths and paths[-1] == node.target:
        paths.pop()
    return paths[-1] if paths else ""


def stopped_at(error: Exception) -> str:
    """``, stopped at file:line`` of the user's code in which an error was raised, or ``""``."""
    frames = traceback.extract_tb(error.__traceback__)
    line = _innermost([(frame.filename, str(frame.lineno)) for frame in frames])
    return f", stopped at {line}" if line else ""


def _innermost(frames: Sequence[tuple[str, str]]) -> str:
    """``file:line`` of the last frame that is the user's own and not in a function that it calls, or ``""``."""
    written = [(path, line) for path, line in frames if not _is_library(path)]
    # Where a module of torchvision's is the model itself, its own lines are those that matter.
    chosen = [frame for frame in written if not frame[0].startswith(_FUNCTIONS)] or written
    return ":".join(chosen[-1]) if chosen else ""


def forward_of(root: nn.Module) -> str:
    """``, in its forward at file:line``, or ``""`` where that is not written in Python."""
    code = getattr(inspect.unwrap(root.forward), "__code__", None)
    return f", in its forward at {code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def shortened(error: Exception) -> str:
    """The beginning of what an error says."""
    text = "\n".join(str(error).splitlines()[:_LINES])
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ..."


# By their folders, not by the word: a user's own may be called torch, or adfify.
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def _folders_of_functions() -> tuple[str, ...]:
    """Where functions stand that users call in their forwards; not the models beside them, which users convert."""
    found = importlib.util.find_spec("torchvision")
    roots = found.submodule_search_locations if found is not None else None
    return tuple(f"{Path(root) / name}{os.sep}" for root in roots or () for name in ("ops", "transforms"))


_FUNCTIONS = _folders_of_functions()


def is_own(path: str) -> bool:
    """Whether a file is adfify's."""
    return path.startswith(_LIBRARIES[1])


def _is_library(path: str) -> bool:
    return path.startswith((*_LIBRARIES, "<frozen", "<string>", "<eval_with_key>", "fx_generated_"))
