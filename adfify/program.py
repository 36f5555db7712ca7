"""The .pt2 half: an ADF network as an exported program that needs torch alone, and back."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import call_signature
from adfify.errors import CheckpointError, ExportError, InputError, ModelError
from adfify.exporting import Exported, Input, export
from adfify.moments import Moments, as_moments
from adfify.network import ADFNetwork
from adfify.preprocessing import Preprocessing
from adfify.printable import printable

METADATA = "adfify.json"
FORMAT = 1
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

    def __init__(self, program: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.model_name: str = metadata["model"]
        self.plan: list[dict[str, Any]] = metadata["plan"]
        self.noise_variance: float = metadata["noise_variance"]
        self.batch_size: int | None = metadata["batch_size"]
        self.batch_note: str = metadata["batch_note"]
        self.random: bool = metadata["random"]
        self.note: str = metadata["note"]
        self.versions: dict[str, str] = metadata["versions"]
        self.inputs = tuple(Input.from_json(record) for record in metadata["inputs"])
        labels, preprocessing = metadata["labels"], metadata["preprocessing"]
        self.labels = None if labels is None else tuple(labels)
        self.preprocessing = None if preprocessing is None else Preprocessing.from_json(preprocessing)
        self._uncertain_outputs: list[bool] = metadata["outputs"]["uncertain"]
        self._structure = pytree.treespec_loads(metadata["outputs"]["structure"])
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
        """
        if len(args) != len(self.inputs):
            names = ", ".join(entry.name for entry in self.inputs)
            raise InputError(f"{self.model_name} takes {len(self.inputs)} inputs ({names}), and was given {len(args)}.")
        tensors: list[Tensor] = []
        for entry, value in zip(self.inputs, args, strict=True):
            checked = as_moments(value, self.noise_variance, entry.name) if entry.uncertain else value
            entry.check(checked)
            tensors += [checked.mean, checked.variance] if isinstance(checked, Moments) else [checked]
        flat = iter(pytree.tree_leaves(self.program(*tensors)))
        leaves = [Moments(next(flat), next(flat)) if uncertain else next(flat) for uncertain in self._uncertain_outputs]
        return pytree.tree_unflatten(leaves, self._structure)

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
    text = json.dumps(_metadata(network, exported, preprocessing, labels))
    unfinished = target.with_name(f".{target.stem}-unfinished.pt2")  # so that an interrupted save leaves no program
    try:
        torch.export.save(exported.program, unfinished, extra_files={METADATA: text})
        unfinished.replace(target)
    except Exception as error:  # torch raises nearly any type here
        unfinished.unlink(missing_ok=True)
        raise ExportError(f"{printable(target)} can't be written: {type(error).__name__}: {error}") from error
    return target


def load(path: str | Path) -> LoadedProgram:
    """Read a .pt2 program that :func:`save` wrote.

    As ``torch.export.load`` does, this may run code that is in the file: open only what you trust.

    Raises:
        CheckpointError: no such file, no exported program, or one that adfify did not write.
    """
    file = existing_file(path)
    metadata = read_metadata(file)
    try:
        program = torch.export.load(file).module()
        return LoadedProgram(program, metadata)
    except Exception as error:  # torch raises nearly any type here
        writer = metadata["versions"]
        raise CheckpointError(
            f"{printable(file)} was written by adfify {writer['adfify']} with torch {writer['torch']}, and torch "
            f"{torch.__version__} can't read it: {type(error).__name__}: {error}"
        ) from error


def read_metadata(file: Path) -> dict[str, Any]:
    """What :func:`save` wrote beside the program, without loading it.

    Raises:
        CheckpointError: it is no exported program, or not one of adfify's.
    """
    names = []
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            own = [name for name in names if name.endswith(f"extra/{METADATA}")]
            if own:
                metadata: dict[str, Any] = json.loads(archive.read(own[0]))
                if metadata["format"] > FORMAT:
                    raise CheckpointError(
                        f"{printable(file)} was written by a newer adfify, {metadata['versions']['adfify']}."
                    )
                return metadata
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


def existing_file(path: str | Path) -> Path:
    """The path of a file that has something in it.

    Raises:
        CheckpointError: there is none, it is a directory, or it is empty.
    """
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"{printable(file)} is a directory; give the file in it that holds the weights.")
    if not file.exists():
        raise CheckpointError(f"{printable(file)} does not exist (looked from {Path.cwd()}).")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{printable(file)} is empty (0 bytes): a download or a copy that broke off?")
    return file


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
) -> dict[str, Any]:
    from adfify import __version__  # not at the top: the package imports this module

    return {
        "format": FORMAT,
        "versions": {"adfify": __version__, "torch": str(torch.__version__)},
        "model": network._name,
        "note": NOTE,
        "noise_variance": network.noise_variance,
        "inputs": [entry.to_json() for entry in exported.inputs],
        "outputs": {"structure": exported.structure, "uncertain": exported.uncertain_outputs},
        "batch_size": exported.batch_size,
        "batch_note": exported.batch_note,
        "random": exported.random,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
        "labels": None if labels is None else list(labels),
        "plan": network.plan,
    }
