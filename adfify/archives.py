"""The .pt2 container: a zip, of which only the members that ``save`` writes are ever read.

Note [What is checked is what torch reads]
    torch's own reader looks for whatever it knows in a .pt2: pickles, compiled libraries, packages of Python. So the
    members are read here, by a list of names, and torch is given a new archive, in memory, of those alone. A file whose
    two directories disagree, or that changes while it is read, gains nothing. Nothing is compressed, for torch never
    does that, so that nothing unpacks to more than the file's own size.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adfify.errors import CheckpointError
from adfify.printable import printable

METADATA = "extra/adfify.json"
PROGRAM = "models/model.json"
SERIAL_NUMBER = ".data/serialization_id"  # random, where the same network should give the same bytes
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"

_ROOT = "adfify"
_NEEDED = ("archive_format", "archive_version", PROGRAM, SAMPLES, WEIGHTS, CONSTANTS, METADATA)
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(?:version|serialization_id)|models/model\.json|extra/adfify\.json"
    r"|data/sample_inputs/model\.pt"
    r"|data/weights/(?:model_weights_config\.json|weight_\d{1,6})"
    r"|data/constants/(?:model_constants_config\.json|tensor_\d{1,6})"
)
LARGEST_TEXT = 256 << 20  # bytes of a JSON member; the largest of timm and torchvision needs 30 MB
_MOST = 100_000  # members: two for every layer
_DATE = (1980, 1, 1, 0, 0, 0)  # the same network gives the same bytes

# What Python's reader of archives raises on foreign bytes.
_DAMAGED = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError)

Members = dict[str, bytes]


class ArchiveError(CheckpointError):
    """A .pt2 file that is no archive of adfify's, with what is wrong in it."""


def read(file: Path) -> Members:
    """The members that ``save`` writes, by their names without the archive's own.

    Raises:
        ArchiveError: it is no zip, it lacks a member, or it has one that ``save`` does not write.
    """
    with _opened(file) as archive:
        entries = _entries(archive, file)
        return {name: archive.read(entry) for name, entry in entries.items()}  # every checksum is verified


def member(file: Path, name: str) -> bytes | None:
    """One member of a file, or None where there is no such, or no archive.

    Raises:
        ArchiveError: as `read`.
    """
    if not zipfile.is_zipfile(file):
        return None
    with _opened(file) as archive:
        found = [entry for entry in archive.infolist() if _inner(entry.filename) == name]
        if len(found) != 1:
            return None
        _check_entry(found[0], file)
        return archive.read(found[0])


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except _DAMAGED as error:
        raise ArchiveError(f"{printable(file)} is a damaged archive: {printable(error)}") from error


def names(file: Path) -> list[str]:
    """The names of all members, whatever they are; none where it is no zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except _DAMAGED:  # by its end a zip, and no more
        return []


def _inner(name: str) -> str:
    return name.partition("/")[2]


def _entries(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    listed = archive.infolist()
    if len(listed) > _MOST:
        raise ArchiveError(f"{printable(file)} has {len(listed)} members, and at most {_MOST} are read.")
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        name = _inner(entry.filename)
        if _MEMBERS.fullmatch(name) is None:
            raise ArchiveError(
                f"{printable(file)} holds {printable(entry.filename[:100])}, which adfify.save does not write "
                "and which may be code: it is not opened. If you trust where it comes from: trust=True (--trust)."
            )
        if name in entries:
            raise ArchiveError(f"{printable(file)} holds {printable(name)} twice.")
        _check_entry(entry, file)
        entries[name] = entry
    missing = [name for name in _NEEDED if name not in entries]
    if missing:
        raise ArchiveError(f"{printable(file)} lacks {', '.join(missing)}: it is no archive that adfify.save wrote.")
    if sum(entry.file_size for entry in listed) > file.stat().st_size:
        raise ArchiveError(f"{printable(file)} holds members that lie over one another.")
    return entries


def _check_entry(entry: zipfile.ZipInfo, file: Path) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ArchiveError(f"{printable(file)} holds {printable(entry.filename[:100])} compressed or encrypted.")
    if entry.filename.endswith(".json") and entry.file_size > LARGEST_TEXT:
        raise ArchiveError(f"{printable(file)}: {printable(entry.filename[:100])} has {entry.file_size:,} bytes.")


def written(members: Mapping[str, bytes]) -> bytes:
    """An archive of these members: the same ones give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", _DATE), content)
    return buffer.getvalue()


def of_torch(content: bytes) -> Members:
    """The members of an archive that ``torch.export.save`` has just written."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {_inner(name): archive.read(name) for name in archive.namelist()}


def digests(members: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of every member but the metadata, which they are written into."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in members.items() if name != METADATA}
