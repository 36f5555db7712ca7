"""The .pt2 half: an ADF network as an exported program that needs torch alone, and back."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import archives, call_signature, vetting
from adfify.atomic import write_whole
from adfify.errors import CheckpointError, ExportError, InputError, ModelError
from adfify.exporting import Exported, export
from adfify.files_on_disk import existing_file
from adfify.metadata import FORMAT, Metadata, Outputs, PlanStep, Versions, from_text
from adfify.moments import Moments, as_moments
from adfify.network import ADFNetwork
from adfify.preprocessing import Preprocessing
from adfify.printable import first_line, printable
from adfify.records import RecordError, parsed
from adfify.silence import quiet
from adfify.sizing import SizeError, check_sizes

NOTE = (
    "The variance takes units as independent. On deep networks it is too small, often by an order of magnitude. "
    "At best it ranks, roughly; it is not a calibrated error bar."
)


class LoadedProgram(nn.Module):
    """An ADF network read from a .pt2 file: it takes what the source model took, tensors or Moments.

    It returns what the source model returned, with Moments in place of uncertain tensors. It is in eval mode, on the
    CPU, without gradients to its weights, and takes inputs of the size that it was exported with.

    Attributes:
        model_name: class name of the source model.
        plan: what became of each operation, as plain data; see :attr:`adfify.network.ADFNetwork.plan`.
        preprocessing: how a picture becomes its input, or None.
        labels: names of the outputs, or None.
        noise_variance: variance of every element of an input given as a plain tensor, in its squared units.
        inputs: what it takes, in order.
        batch_size: the only batch size it takes, or None: any.
        batch_note: why the batch size is fixed, or ``""``.
        random: whether every pass draws new masks (``dropout="sampled"``).
        note: what the variance is and is not.
        versions: of adfify and torch that wrote it.
    """

    def __init__(self, program: nn.Module, metadata: Metadata) -> None:
        super().__init__()
        self.program = program
        self.model_name = metadata.model
        self.plan: list[dict[str, Any]] = metadata.to_json()["plan"]
        self.noise_variance = metadata.noise_variance
        self.batch_size = metadata.batch_size
        self.batch_note = metadata.batch_note
        self.random = metadata.random
        self.note = metadata.note
        self.versions = asdict(metadata.versions)
        self.inputs = metadata.inputs
        self.labels = metadata.labels
        self.preprocessing = metadata.preprocessing
        self._uncertain_outputs = metadata.outputs.uncertain
        self._structure = pytree.treespec_loads(metadata.outputs.structure)
        self.training = False

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes any batch size."""
        return self.batch_size is None

    def forward(self, *args: Tensor | Moments) -> Any:
        """One pass.

        Raises:
            InputError: another number of inputs, shape or dtype than the program was exported with; NaN; a negative
                variance.
            CheckpointError: the program fails on inputs that it should take.
        """
        if len(args) != len(self.inputs):
            names = ", ".join(entry.name for entry in self.inputs)
            raise InputError(f"{self.model_name} takes {len(self.inputs)} inputs ({names}), and was given {len(args)}.")
        tensors: list[Tensor] = []
        for entry, value in zip(self.inputs, args, strict=True):
            checked = as_moments(value, self.noise_variance, entry.name) if entry.uncertain else value
            entry.check(checked)
            tensors += [checked.mean, checked.variance] if isinstance(checked, Moments) else [checked]
        flat = iter(pytree.tree_leaves(self._run(tensors)))
        leaves = [Moments(next(flat), next(flat)) if uncertain else next(flat) for uncertain in self._uncertain_outputs]
        return pytree.tree_unflatten(leaves, self._structure)

    def _run(self, tensors: list[Tensor]) -> Any:
        """The program on what it was checked to take: where it fails now, it was never one that ``save`` wrote."""
        try:
            return self.program(*tensors)
        except Exception as error:  # torch raises nearly any type here
            said = first_line(error)
            raise CheckpointError(
                f"the program of {printable(self.model_name)} can't be run on these inputs: {type(error).__name__}: "
                f"{said}. Too little memory, or a file that was changed after adfify wrote it?"
            ) from error

    def train(self, mode: bool = True) -> LoadedProgram:
        """Refused: a program was exported in eval mode. ``eval()`` changes nothing.

        Raises:
            ModelError: ``mode`` is True.
        """
        if mode:
            raise ModelError(f"{self.model_name} is an exported program in eval mode; train the network it came from.")
        return self

    def extra_repr(self) -> str:
        """The source model and the inputs, for print."""
        return f"{self.model_name}, inputs: {', '.join(str(entry) for entry in self.inputs)}"


def save(
    adf: ADFNetwork,
    path: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    example_inputs: Tensor | Moments | tuple[Any, ...] | None = None,
) -> Path:
    """Write an ADF network as a .pt2 program that runs where only torch is installed.

    There, ``torch.export.load(path).module()`` takes a mean and a variance for every uncertain input, and a tensor for
    every certain one, all as plain tensors in the order of the model's inputs; it returns what the model returned with
    a ``(mean, variance)`` tuple in place of every uncertain tensor. Here, :func:`load` brings Moments back. The file
    holds a copy in eval mode on the CPU; ``adf`` is left as it is. ``adfify.json`` inside it has the plan,
    preprocessing, labels and versions.

    With ``dropout="sampled"`` the program keeps the randomness: every pass draws new masks, from torch's global
    generator. The file says so (``random``).

    Args:
        adf: what :func:`adfify.adfify` returned.
        path: where to write; an existing file is replaced.
        preprocessing: how a picture becomes its input.
        labels: names of the outputs.
        example_inputs: what the network would be called with; by default one picture of
            ``preprocessing.input_size``. All sizes but the batch are fixed to these, and values other than tensors.

    Returns:
        The path.

    Raises:
        ExportError: nothing to export with, torch.export failed, or the program does not give what ``adf`` gives.
        InputError: the network does not take the example inputs.
    """
    if not isinstance(adf, ADFNetwork):
        raise ExportError(f"save() writes what adfify() returns, and was given a {type(adf).__name__}.")
    target = Path(path)
    network = copy.deepcopy(adf).eval().requires_grad_(False).cpu()
    exported = export(network, _examples(network, preprocessing, example_inputs))
    content = _archive(exported, _metadata(network, exported, preprocessing, labels))
    try:
        write_whole(target, content)
    except OSError as error:
        reason = printable(error.strerror or error)
        raise ExportError(f"{printable(target)} can't be written: {reason}.") from error
    return target


def _archive(exported: Exported, metadata: Metadata) -> bytes:
    """In memory first: torch ends the process where it can't write."""
    buffer = io.BytesIO()
    exported.program._example_inputs = None  # whoever gets the file does not get the pictures
    try:
        with quiet():
            torch.export.save(exported.program, buffer)
    except Exception as error:  # torch raises nearly any type here
        said = first_line(error)
        raise ExportError(f"{metadata.model} can't be written as a program: {type(error).__name__}: {said}") from error
    members = archives.of_torch(buffer.getvalue())
    members[archives.SAMPLES] = b""
    members.pop(archives.SERIAL_NUMBER, None)
    program = json.loads(members[archives.PROGRAM])
    members[archives.PROGRAM] = json.dumps(vetting.without_sources(program)).encode()
    described = replace(metadata, digests=archives.digests(members))
    return archives.written({**members, archives.METADATA: described.to_text().encode()})


def load(path: str | Path, *, trust: bool = False) -> LoadedProgram:
    """Read a .pt2 program that :func:`save` wrote.

    Nothing in the file is run, imported or unpickled: only the members that :func:`save` writes are read, their
    checksums are verified, and every text of the program is looked through before torch sees it; see SECURITY.md.

    Args:
        path: the file.
        trust: for files that others' tools changed: what the checks would refuse is let through, with a warning that
            says what, and torch may run any code in the file. Open only what you would also run.

    Raises:
        CheckpointError: no such file, no exported program, one that adfify did not write, that is damaged, or that
            holds what could run code.
    """
    file = existing_file(path)
    if trust:
        return _trusted(file)
    _told_apart(file)
    members = archives.read(file)
    metadata = _described(file, members[archives.METADATA])
    _verify(file, members, metadata)
    program = _made(file, _clean(file, members), metadata)
    try:
        check_sizes(program, metadata.inputs, metadata.batch_size or 1)
    except SizeError as error:
        raise CheckpointError(f"{printable(file)} is not opened: {error}.") from error
    return LoadedProgram(program, metadata)


def _trusted(file: Path) -> LoadedProgram:
    """Whatever torch reads; what is not looked at is said."""
    metadata = read_metadata(file)
    skipped = "its checksums, the names of its members and its program are not checked"
    warnings.warn(f"{printable(file)} is trusted: {skipped}, and code in it may run.", stacklevel=3)
    return LoadedProgram(_made(file, file.read_bytes(), metadata), metadata)


def _verify(file: Path, members: archives.Members, metadata: Metadata) -> None:
    found = archives.digests(members)
    changed = sorted(name for name in {*found, *metadata.digests} if found.get(name) != metadata.digests.get(name))
    if changed:
        named = ", ".join(map(printable, changed[:3]))
        raise CheckpointError(
            f"{printable(file)} is damaged, or was changed after adfify wrote it: {named} differ from their checksums. "
            "Copy it again."
        )


def _clean(file: Path, members: archives.Members) -> bytes:
    """An archive of what was looked through, for torch."""
    try:
        program = vetting.harmless(parsed(members[archives.PROGRAM], archives.LARGEST_TEXT))
        vetting.check_payloads(parsed(members[archives.WEIGHTS], archives.LARGEST_TEXT))
        vetting.check_payloads(parsed(members[archives.CONSTANTS], archives.LARGEST_TEXT))
    except (vetting.VettingError, RecordError) as error:
        raise CheckpointError(
            f"{printable(file)} is not opened: {error}. adfify.save writes no such thing, unless an operation of your "
            "own is in the network. If you trust where the file comes from: trust=True (--trust)."
        ) from error
    return archives.written({**members, archives.PROGRAM: json.dumps(program).encode(), archives.SAMPLES: b""})


def _made(file: Path, content: bytes, metadata: Metadata) -> nn.Module:
    try:
        with quiet():
            return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:  # torch raises nearly any type here
        writer, said = metadata.versions, first_line(error)
        raise CheckpointError(
            f"{printable(file)} was written by adfify {printable(writer.adfify)} with torch {printable(writer.torch)}, "
            f"and torch {torch.__version__} can't read it: {type(error).__name__}: {said}"
        ) from error


def read_metadata(file: Path) -> Metadata:
    """What :func:`save` wrote beside the program, without loading it.

    Raises:
        CheckpointError: it is no exported program, or not one of adfify's.
    """
    content = _told_apart(file)
    return _described(file, content)


def _described(file: Path, content: bytes) -> Metadata:
    try:
        return from_text(content)
    except RecordError as error:
        raise CheckpointError(f"{printable(file)}: its {archives.METADATA} can't be used: {error}.") from error


def _told_apart(file: Path) -> bytes:
    """adfify's own metadata in a file; what else a file may be is said."""
    content = archives.member(file, archives.METADATA)
    if content is not None:
        return content
    names = archives.names(file)
    if any("/models/" in name or name == "serialized_exported_program.json" for name in names):
        raise CheckpointError(
            f"{printable(file)} is an exported program of a plain model, which adfify can't convert yet. Convert the "
            "Python model it was exported from: adfify.adfify(model), or `adfify convert WEIGHTS --arch timm:NAME`."
        )
    if any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{printable(file)} is no exported program but a checkpoint that torch.save wrote. Name it .pth and say "
            "what it is of: arch='timm:NAME' (--arch timm:NAME)."
        )
    raise CheckpointError(
        f"{printable(file)} is not an exported program: torch.export writes a zip archive, and this is none."
    )


def _examples(network: ADFNetwork, preprocessing: Preprocessing | None, given: Any) -> tuple[Any, ...]:
    if given is not None:
        return tuple(network.signature.flatten(call_signature.positional(given), {}))
    if preprocessing is None:
        raise ExportError(
            "save() needs to know the size of the inputs: give example_inputs=x, as the network is called, or the "
            "preprocessing of its pictures."
        )
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return (torch.randn(1, *preprocessing.input_size, generator=generator).to(dtype),)


def _metadata(
    network: ADFNetwork, exported: Exported, preprocessing: Preprocessing | None, labels: Sequence[str] | None
) -> Metadata:
    from adfify import __version__  # not at the top: the package imports this module

    return Metadata(
        format=FORMAT,
        versions=Versions(__version__, str(torch.__version__)),
        model=network._name,
        note=NOTE,
        noise_variance=network.noise_variance,
        inputs=exported.inputs,
        outputs=Outputs(exported.structure, tuple(exported.uncertain_outputs)),
        batch_size=exported.batch_size,
        batch_note=exported.batch_note,
        random=exported.random,
        preprocessing=preprocessing,
        labels=None if labels is None else tuple(labels),
        plan=tuple(PlanStep(**{**record, "missing": tuple(record["missing"])}) for record in network.plan),
        digests={},
    )
