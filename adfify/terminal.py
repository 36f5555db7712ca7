"""What the command line prints with: tables and messages, a progress bar, errors on one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

from adfify.printable import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAD_USE = 2


class Commands(TyperGroup):
    """The commands, whose usage errors are one line on standard error, as all others are."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line, and end the process with its exit code if ``standalone_mode``."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        _never_fail_to_print()
        try:
            result = run()
        except Exception as error:
            # Known by what it has, for its class is typer's, or click's, depending on the version.
            if not hasattr(error, "format_message"):
                raise
            _usage(error)
            sys.exit(BAD_USE)
        sys.exit(result if isinstance(result, int) else 0)


def _usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # its help is printed already
        return
    command = getattr(getattr(error, "ctx", None), "command_path", "adfify")
    said = " ".join(str(error.format_message()).split()).rstrip(".")
    stderr(f"error: {said}. See {command} --help.")


def _never_fail_to_print() -> None:
    """A terminal without the sign ± gets it escaped, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, if that is a terminal; call what it gives with how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A sign of life on standard error, if that is a terminal, for work whose length nobody knows."""
    from rich.text import Text

    console = _console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(printable(what))):
        yield


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200  # piped into a file or a pager: lines as long as they are, not 80
    return console


def stdout(*parts: RenderableType) -> None:
    """Print texts and tables; see Note [Foreign text is escaped]."""
    console = _console()
    for part in parts:
        console.print(printable_lines(part) if isinstance(part, str) else part)


def stderr(text: str) -> None:
    """Print a message."""
    _console(stderr=True).print(printable_lines(text))


def print_json(value: Any) -> None:
    """Print JSON of dataclasses, paths and numbers, and nothing else."""
    from adfify import display

    print(display.to_json(value))
