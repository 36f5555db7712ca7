"""Files that are handed over: there, regular, and as large as they say."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from adfify.errors import CheckpointError
from adfify.printable import printable

# A file can claim any size and take no room: its bytes are zeros that come from nowhere. Weights are not such.
_HOLES_MATTER = 64 << 20
_BLOCK = 512  # st_blocks counts these, whatever the file system's own


def existing_file(path: str | Path) -> Path:
    """The path of a regular file that has something in it.

    Raises:
        CheckpointError: there is none, it is a directory, a pipe or a device, it is empty, or most of it is holes.
    """
    file = Path(path)
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{printable(file)} does not exist (looked from {Path.cwd()}).") from error
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{printable(file)} can't be looked at: {printable(reason)}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{printable(file)} is a directory; give the file in it that holds the weights.")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{printable(file)} is a pipe, a socket or a device; give a regular file.")
    if status.st_size == 0:
        raise CheckpointError(f"{printable(file)} is empty (0 bytes): a download or a copy that broke off?")
    taken = getattr(status, "st_blocks", status.st_size) * _BLOCK
    if status.st_size > _HOLES_MATTER and taken < status.st_size // 2:
        raise CheckpointError(
            f"{printable(file)} says that it has {status.st_size:,} bytes, and {taken:,} of them are on the disk: a "
            "download that broke off, or no weights at all."
        )
    return file


def digest_of(file: Path, expected: str | None = None) -> str:
    """The SHA-256 of a file's bytes, as ``sha256sum`` prints it.

    Raises:
        CheckpointError: it is not the expected one.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if expected is not None and found != expected.strip().lower().removeprefix("sha256:"):
        raise CheckpointError(
            f"{printable(file)} has the SHA-256 {found}, and {printable(expected[:100])} was asked for: it is damaged, "
            "or another file."
        )
    return found
