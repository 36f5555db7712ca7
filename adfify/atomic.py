"""Files that are written whole or not at all.

Note [Written whole]
    Whoever reads a name finds the old file or the new one: the bytes go to a file of another name in the same folder,
    reach the disk, and take the name in one step. Each writer has a name of its own, so that of two the last one wins,
    whole. A writer holds a lock on its unfinished file, which ends with its process however that ends: an unfinished
    file whose lock is free is left over, and the next writer of that name takes it away.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where an open file can't be taken away: that is lock enough
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".unfinished"


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file, or replace what is there: a link's target, with the mode that it has.

    Args:
        path: where to.
        content: all of it.

    Raises:
        OSError: it can't be written; what was there is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(0, "it is there already, and is no regular file")
    _sweep(target)
    with _unfinished(target) as (descriptor, unfinished):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        with suppress(FileNotFoundError):
            os.chmod(unfinished, stat.S_IMODE(target.stat().st_mode))
        os.fsync(descriptor)
        os.replace(unfinished, target)
    _sync_folder(target.parent)


@contextmanager
def _unfinished(target: Path) -> Iterator[tuple[int, Path]]:
    descriptor, path = _locked(target)
    try:
        yield descriptor, path
    except BaseException:  # Ctrl-C leaves nothing behind, either
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _locked(target: Path) -> tuple[int, Path]:
    while True:
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{_SUFFIX}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is None:
            return descriptor, path
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another writer saw it before the lock, and took it away
            return descriptor, path
        os.close(descriptor)


def _prefix(target: Path) -> str:
    # Short: a name may have 255 bytes in all, and the target's may need them.
    return f".{target.name.encode(errors='surrogateescape')[:100].decode(errors='ignore')}-"


def _sweep(target: Path) -> None:
    """Take away what writers of this name left that are no more."""
    prefix = _prefix(target)
    with suppress(OSError), os.scandir(target.parent) as entries:
        left = [e.path for e in entries if e.name.startswith(prefix) and e.name.endswith(_SUFFIX)]
        for path in left:
            _take_away_unless_held(path)


def _take_away_unless_held(path: str) -> None:
    with suppress(OSError):  # it is gone, held, or not ours
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(descriptor)
        else:
            os.unlink(path)


def _sync_folder(folder: Path) -> None:
    """So that the name survives a power cut; systems that can't open a folder see to that themselves."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
