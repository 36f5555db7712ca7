"""Where results may be written: looked at before the work starts, so that none is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adfify.atomic import write_whole
from adfify.errors import InputError
from adfify.printable import printable

# Note [Outputs are tried before the work]
# Whether a file can be written only writing tells: permissions say yes to root on /proc, and nothing of a full disk, a
# name that is too long or a folder that is a file. So a new output is made, empty, and taken away again, with the
# folders that it needed.


def check_output(path: Path, force: bool, option: str = "-o") -> None:
    """Raise InputError unless a file can be written there, and nothing is lost by it.

    Args:
        path: what will be written; folders that it needs are made later.
        force: an existing file may be replaced.
        option: of the command line, for the errors.
    """
    name = f"{option} {printable(path)}"
    with _reasons(name):
        if path.is_dir():
            raise InputError(f"{name} is a folder; give the name of the file to write.")
        if not os.path.lexists(path):
            _try(path)
        elif not force:
            raise InputError(f"{name} exists; give another name, or --force to replace it.")
        elif not os.access(path, os.W_OK):
            raise InputError(f"{name} exists and can't be replaced: it is write-protected.")


def check_folder(folder: Path, option: str = "-o") -> None:
    """Raise InputError unless files can be written into a folder, which may have to be made."""
    name = f"{option} {printable(folder)}"
    with _reasons(name):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{name} is no folder, and one is written there: give another name.")
        _try(folder / f".adfify-{os.getpid()}")


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{name} can't be written: {error.strerror or error}.") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a result, whole or not at all. Raises InputError where that can't be."""
    with _reasons(printable(path)):
        write_whole(path, content)


def _try(path: Path) -> None:
    """Make an empty file, and take it away with the folders that it needed. Raises OSError."""
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    nearest = path.parents[len(missing)]
    if not nearest.is_dir():
        raise NotADirectoryError(0, f"{printable(nearest)} is no folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb"):
            pass
        path.unlink()
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
