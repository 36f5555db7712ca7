"""From an ADF network to a torch.export program of plain tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from adfify.errors import ExportError, InputError
from adfify.moments import Moments, as_moments, is_moments
from adfify.network import ADFNetwork
from adfify.printable import printable
from adfify.threads import one_at_a_time

_CHECKED_BATCHES = (1, 3)

_DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_SIZES, _MOST_SIZES = range(1 << 24), 64  # torch's own most


@dataclass(frozen=True)
class Input:
    """One input of an exported program.

    Attributes:
        name: the parameter of the source model's forward.
        uncertain: whether it is two tensors in the program, a mean and a variance, or one.
        shape: its sizes, None for the batch.
        dtype: such as ``"float32"``.
    """

    name: str
    uncertain: bool
    shape: tuple[int | None, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what no input is.

        Raises:
            ValueError: which, and why.
        """
        if not self.name.isidentifier():
            raise ValueError(f"the name {printable(repr(self.name[:60]))} is no parameter's")
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.name} has the dtype {printable(repr(self.dtype[:60]))}, and should have one of torch's"
            )
        if len(self.shape) > _MOST_SIZES or any(size is not None and size not in _SIZES for size in self.shape):
            raise ValueError(f"{self.name} has the shape {self.shape!r:.200}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return _DTYPES[self.dtype]

    def check(self, value: Any) -> None:
        """Raise InputError where a value has another shape or dtype."""
        given = tuple(value.shape) if isinstance(value, (Tensor, Moments)) else None
        fits = given is not None and len(given) == len(self.shape)
        fits = fits and all(own is None or own == size for own, size in zip(self.shape, given or (), strict=True))
        if not fits or str(value.dtype) != f"torch.{self.dtype}":
            what = f"shape {given} and dtype {value.dtype}" if given is not None else f"type {type(value).__name__}"
            raise InputError(f"this program was exported for the input {self}, and was given {what}.")

    def __str__(self) -> str:
        sizes = ", ".join("batch" if size is None else str(size) for size in self.shape)
        return f"{self.name} [{sizes}] {self.dtype}{'' if self.uncertain else ' (certain)'}"


@dataclass(frozen=True)
class Exported:
    """A program with what its user has to know.

    Attributes:
        program: takes and returns plain tensors.
        inputs: what it takes.
        structure: the model's output structure, Moments as leaves, as JSON.
        uncertain_outputs: for each leaf of it, whether it is Moments: two tensors of the program.
        batch_size: the only one it takes, or None: any.
        batch_note: why it is fixed, or ``""``.
        random: whether it draws random numbers.
    """

    program: ExportedProgram
    inputs: tuple[Input, ...]
    structure: str
    uncertain_outputs: list[bool]
    batch_size: int | None
    batch_note: str
    random: bool


class _Plain(nn.Module):
    """The network over plain tensors: no class of adfify may be left in the program's signature."""

    def __init__(self, network: ADFNetwork, examples: Sequence[Any], names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._examples = [value if not isinstance(value, (Tensor, Moments)) else type(value) for value in examples]

        # By name: torch 2.9 compiles guards that it can't find the place of among `*tensors`.
        def forward(*tensors: Tensor) -> Any:
            return self._of_plain(tensors)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def _of_plain(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        args = [
            Moments(next(given), next(given)) if slot is Moments else next(given) if slot is Tensor else slot
            for slot in self._examples
        ]
        return pytree.tree_map(
            lambda leaf: (leaf.mean, leaf.variance) if isinstance(leaf, Moments) else leaf,
            self.network.of_leaves(*args),
            is_leaf=is_moments,
        )


def _names(names: Sequence[str], values: Sequence[Any]) -> list[str]:
    """Of the program's inputs: ``x`` and ``x_variance``, or ``x`` alone where it is certain."""
    found: list[str] = []
    for name, value in zip(names, values, strict=False):
        own = [name, f"{name}_variance"] if isinstance(value, Moments) else [name] * isinstance(value, Tensor)
        for wanted in own:
            while wanted in found:
                wanted += "_"
            found.append(wanted)
    return found


@one_at_a_time
def export(network: ADFNetwork, examples: tuple[Any, ...]) -> Exported:
    """Export a network in eval mode, with any batch size where that is possible, and check what came out.

    Args:
        network: it is not changed; its weights are shared with the program.
        examples: its arguments. Values other than tensors are fixed in the program.

    Raises:
        ExportError: torch.export failed, or the program does not give what the network gives.
        InputError: the network does not take the examples.
    """
    names = [(record["node"], record["action"] == "input") for record in network.plan if record["op"] == "input"]
    values = [
        as_moments(value, network.noise_variance, name) if uncertain else value
        for (name, uncertain), value in zip(names, _on_cpu(examples), strict=False)
    ]
    structure, uncertain_outputs = _structure(network, values)  # first: it shows whether the network takes them at all
    wrapper = _Plain(network, values, _names([name for name, _ in names], values))
    tensors = _flat(values)
    batch, note = _batch(values), ""
    program = None
    if batch is None:
        note = "the inputs have no batch dimension"
    else:
        try:
            program = _with_any_batch(wrapper, tensors, batch)
        except Exception as error:  # torch raises nearly any type here; what matters is whether the next try works
            note = f"torch.export could not leave the batch size open: {type(error).__name__}: {error}"[:1000]
    if program is None:
        program = _with_this_batch(wrapper, tensors)
    fixed = batch if note else None
    return Exported(
        program,
        tuple(
            Input(name, uncertain, _shape(value, batch, bool(note)), str(value.dtype).removeprefix("torch."))
            for (name, uncertain), value in zip(names, values, strict=False)
            if isinstance(value, (Tensor, Moments))
        ),
        structure,
        uncertain_outputs,
        fixed,
        note,
        _draws(program),
    )


def _with_any_batch(wrapper: _Plain, tensors: list[Tensor], batch: int) -> ExportedProgram:
    # An example of one would be taken for the constant 1 (torch.export specialises sizes 0 and 1).
    examples = tensors if batch > 1 else [_resized(tensor, batch, 2) for tensor in tensors]
    dimension = torch.export.Dim("batch")
    size = max(batch, 2)
    shapes = tuple({0: dimension} if _is_batched(tensor, size) else None for tensor in examples)
    program = torch.export.export(wrapper, tuple(examples), dynamic_shapes=shapes, strict=False)
    _compare(program, wrapper, [[_resized(tensor, batch, count) for tensor in tensors] for count in _CHECKED_BATCHES])
    return program


def _with_this_batch(wrapper: _Plain, tensors: list[Tensor]) -> ExportedProgram:
    try:
        program = torch.export.export(wrapper, tuple(tensors), strict=False)
        _compare(program, wrapper, [tensors])
        return program
    except ExportError:
        raise
    except Exception as error:  # torch raises nearly any type here
        raise ExportError(
            f"torch.export can't export {wrapper.network._name}: {type(error).__name__}: {error}\n"
            "The network itself works: use it in Python, or keep it with torch.save(adf, path)."
        ) from error


def _compare(program: ExportedProgram, wrapper: _Plain, calls: list[list[Tensor]]) -> None:
    """Raise ExportError unless the program gives what the network gives; for random ones, the shapes of it."""
    module, random = program.module(), _draws(program)
    for tensors in calls:
        with torch.no_grad():
            pairs = zip(pytree.tree_leaves(wrapper(*tensors)), pytree.tree_leaves(module(*tensors)), strict=True)
        if not all(_agree(expected, given, random) for expected, given in pairs):
            raise ExportError(
                f"the exported program of {wrapper.network._name} does not give what the network gives on inputs of "
                f"shape {tuple(tensors[0].shape)}."
            )


def _agree(expected: Any, given: Any, random: bool) -> bool:
    if not isinstance(expected, Tensor) or random or expected.numel() == 0:
        return getattr(expected, "shape", None) == getattr(given, "shape", None)
    if expected.shape != given.shape:
        return False
    scale = float(expected.detach().abs().amax())
    return torch.allclose(expected, given, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)


def _draws(program: ExportedProgram) -> bool:
    tag = torch.Tag.nondeterministic_seeded
    return any(tag in getattr(node.target, "tags", ()) for node in program.graph.nodes)


def _structure(network: ADFNetwork, values: list[Any]) -> tuple[str, list[bool]]:
    with torch.no_grad():
        leaves, spec = pytree.tree_flatten(network.of_leaves(*values), is_leaf=is_moments)
    try:
        return pytree.treespec_dumps(spec), [isinstance(leaf, Moments) for leaf in leaves]
    except NotImplementedError as error:
        raise ExportError(f"{network._name} returns a structure that can't be written to a file: {error}") from error


def _on_cpu(values: Sequence[Any]) -> list[Any]:
    return [value.to("cpu") if isinstance(value, (Tensor, Moments)) else value for value in values]


def _flat(values: Sequence[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Moments):
            tensors += [value.mean, value.variance.contiguous()]  # not a broadcast view
        elif isinstance(value, Tensor):
            tensors.append(value)
    return tensors


def _batch(values: Sequence[Any]) -> int | None:
    """The batch size: the first size of the first uncertain input."""
    shapes = [value.shape for value in values if isinstance(value, Moments) and value.shape]
    return shapes[0][0] if shapes else None


def _is_batched(tensor: Tensor, batch: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == batch


def _resized(tensor: Tensor, batch: int, count: int) -> Tensor:
    if not _is_batched(tensor, batch):
        return tensor
    return tensor[torch.arange(count) % batch]


def _shape(value: Tensor | Moments, batch: int | None, fixed: bool) -> tuple[int | None, ...]:
    batched = not fixed and len(value.shape) > 0 and value.shape[0] == batch
    return (None, *value.shape[1:]) if batched else tuple(value.shape)
