"""What a .pt2 file says of the program in it: plain data, with a schema and bounds."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from adfify import vetting
from adfify.exporting import Input
from adfify.preprocessing import Preprocessing
from adfify.records import RecordError, parsed, read

FORMAT = 2
"""Of the file; 1 had no digests."""

_LONGEST = 64 << 20  # bytes; the largest of timm and torchvision needs 1 MB
_BATCHES = range(1, 1 << 16)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Versions:
    """Of what wrote the file."""

    adfify: str
    torch: str


@dataclass(frozen=True)
class Outputs:
    """What comes out.

    Attributes:
        structure: the model's output structure, Moments as leaves, as pytree's JSON.
        uncertain: for each leaf of it, whether it is Moments: two tensors of the program.
    """

    structure: str
    uncertain: tuple[bool, ...]


@dataclass(frozen=True)
class PlanStep:
    """What became of one operation; see :attr:`adfify.network.ADFNetwork.plan`."""

    node: str
    action: str
    op: str
    path: str
    rule: str | None
    exact: bool | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Metadata:
    """All that a file says; its fields are those of :class:`adfify.program.LoadedProgram`.

    Attributes:
        format: of the file.
        digests: SHA-256 of every other member of the archive, by its name.
        digest: SHA-256 of the rest of the metadata itself.
    """

    format: int
    versions: Versions
    model: str
    note: str
    noise_variance: float
    inputs: tuple[Input, ...]
    outputs: Outputs
    batch_size: int | None
    batch_note: str
    random: bool
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    plan: tuple[PlanStep, ...]
    digests: dict[str, str]
    digest: str = ""

    def __post_init__(self) -> None:
        """Refuse values that no network has.

        Raises:
            RecordError: which, and why.
        """
        if self.noise_variance < 0:
            raise RecordError(f"noise_variance is {self.noise_variance}, and a variance is at least 0")
        if self.batch_size is not None and self.batch_size not in _BATCHES:
            raise RecordError(f"batch_size is {self.batch_size}, and should be from 1 to {_BATCHES[-1]}")
        if self.batch_size is not None and any(None in entry.shape for entry in self.inputs):
            raise RecordError(f"batch_size is {self.batch_size}, and inputs have an open one")
        if vetting.leaves(self.outputs.structure) != len(self.outputs.uncertain):
            raise RecordError(f"outputs.uncertain has {len(self.outputs.uncertain)} entries, and should have one each")
        if not self.inputs:
            raise RecordError("inputs is empty")
        bad = next((name for name, digest in self.digests.items() if not _DIGEST.fullmatch(digest)), None)
        if bad is not None:
            raise RecordError(f"digests.{bad} is no SHA-256")

    @property
    def own_digest(self) -> str:
        """SHA-256 of all fields but ``digest``."""
        return hashlib.sha256(json.dumps(asdict(replace(self, digest="")), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = json.loads(self.to_text())
        return plain

    def to_text(self) -> str:
        """JSON, with the digest of the rest."""
        return json.dumps(asdict(replace(self, digest=self.own_digest)))


def from_text(text: bytes) -> Metadata:
    """The inverse of :meth:`Metadata.to_text`, verified.

    Raises:
        RecordError: it is no such text, of a newer format, or not as it was written.
    """
    data = parsed(text, _LONGEST)
    if isinstance(data, dict):
        written, by = data.get("format"), data.get("versions")
        if type(written) is not int or written not in range(1, FORMAT + 1):
            writer = by.get("adfify") if isinstance(by, dict) else None
            newer = type(written) is int and written > FORMAT
            raise RecordError(
                f"it was written by a newer adfify, {writer if isinstance(writer, str) else '?'}"
                if newer
                else f"its format is {written!r:.40}, and should be a number up to {FORMAT}"
            )
        if written < FORMAT:
            raise RecordError("it was written by an older adfify, without checksums: convert the model again")
    metadata = read(Metadata, data, "metadata")
    if metadata.digest != metadata.own_digest:
        raise RecordError("its checksum is another: the file is damaged, or was changed after adfify wrote it")
    return metadata
