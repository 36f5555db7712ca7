"""Correlation-aware moments: what `ADFNetwork.joint` does, whichever way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify.errors import InputError
from adfify.moments import JointMoments, Moments, as_moments, is_moments
from adfify.noisy import Draws, Original, Precision, autocast_state

if TYPE_CHECKING:
    from adfify.network import ADFNetwork

METHODS = ("auto", "adjoint", "sketch")
MANY_OUTPUTS = 32
"""From so many on, "auto" is the sketch: the adjoint's price is a pass backwards for every output."""


@dataclass(frozen=True)
class Request:
    """What is asked for: the arguments of :meth:`ADFNetwork.joint`."""

    outputs: int | Sequence[int] | Tensor | str = 5
    method: str = "auto"
    samples: int | None = None
    seed: int = 0
    attribution: bool = False
    output: str | int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.outputs, (int, str, Sequence, Tensor)):
            raise InputError(f"outputs={self.outputs!r:.60}; it is how many, a list of indices, or 'all'.")
        if isinstance(self.outputs, Tensor) and self.outputs.dim() == 1:
            object.__setattr__(self, "outputs", self.outputs.tolist())
        if self.method not in METHODS:
            raise InputError(f"method={self.method!r} is unknown; it is one of {', '.join(map(repr, METHODS))}.")
        if self.samples is not None and not (isinstance(self.samples, int) and self.samples >= 0):
            raise InputError(f"samples={self.samples!r}; it is a whole number, 0 or more, or None: chosen for you.")
        if self.chunk_size is not None and not (isinstance(self.chunk_size, int) and self.chunk_size > 0):
            raise InputError(f"chunk_size={self.chunk_size!r}; it is how many noisy inputs may be in one pass.")

    def of(self, rows: slice | Tensor, count: int) -> Request:
        """The same for some of ``count`` pictures, which may each have indices of their own."""
        own = isinstance(self.outputs, Tensor) and self.outputs.dim() == 2 and len(self.outputs) == count
        return replace(self, outputs=self.outputs[rows]) if own else self  # type: ignore[index]

    def indices(self, means: Tensor) -> Tensor:
        """Which outputs, ``[N, k]``, of those with ``means`` ``[N, M]``."""
        pictures, there = means.shape
        if isinstance(self.outputs, Tensor):
            given = self.outputs.to(means.device)
            fits = given.dim() == 2 and len(given) == pictures and given.dtype in (torch.int32, torch.int64)
            if not (fits and given.numel() and int(given.min()) >= 0 and int(given.max()) < there):
                raise InputError(
                    f"outputs is a {given.dtype} tensor of shape {tuple(given.shape)}; it is indices from 0 to "
                    f"{there - 1}, [{pictures}, k]: of each input its own."
                )
            return given.long()
        if self.outputs == "all":
            return torch.arange(there, device=means.device).expand(pictures, -1)
        if isinstance(self.outputs, int) and not isinstance(self.outputs, bool) and self.outputs > 0:
            if self.outputs >= there:  # all of them, in their own order
                return torch.arange(there, device=means.device).expand(pictures, -1)
            return means.topk(self.outputs).indices
        listed = self.outputs if isinstance(self.outputs, Sequence) and not isinstance(self.outputs, str) else ()
        if not listed or not all(isinstance(index, int) and 0 <= index < there for index in listed):
            raise InputError(
                f"outputs={self.outputs!r}; it is how many of the {there} outputs (those of the largest means), a list "
                f"of indices from 0 to {there - 1}, or 'all'."
            )
        return torch.tensor(list(listed), device=means.device).expand(pictures, -1)


@dataclass(frozen=True)
class Question:
    """A network with its inputs, Moments where they are uncertain, and what is asked of them."""

    network: ADFNetwork
    inputs: tuple[Any, ...]
    request: Request
    precision: Precision

    @property
    def pictures(self) -> int:
        """How many inputs there are, ``N``."""
        return len(self.first.mean)

    @property
    def first(self) -> Moments:
        """The first uncertain input."""
        return next(x for x in self.inputs if isinstance(x, Moments))

    def rows(self, rows: slice | Tensor) -> Question:
        """The same of some of the pictures."""
        count = self.pictures

        def some(x: Any) -> Any:
            if isinstance(x, Moments):
                return Moments(x.mean[rows], x.variance[rows])
            return x[rows] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == count else x

        return replace(self, inputs=tuple(map(some, self.inputs)), request=self.request.of(rows, count))

    def output_of(self, outputs: Any, rows: int) -> tuple[Tensor, tuple[int, ...]]:
        """The output that is asked for, ``[rows, M]``, and its shape without the batch."""
        return selected(outputs, self.request.output, rows)

    def one_pass(self) -> Moments:
        """The ADF network's own moments of that output, ``[N, M]``, in the user's precision."""
        with torch.no_grad(), torch.autocast(*self.precision):
            outputs = self.network.of_leaves(*self.inputs)
        parts = (
            pytree.tree_map_only(Moments, part, outputs, is_leaf=is_moments)
            for part in (lambda x: x.mean, lambda x: x.variance)
        )
        return Moments(*(self.output_of(part, self.pictures)[0] for part in parts))


def joint(network: ADFNetwork, inputs: Sequence[Any], request: Request) -> JointMoments:
    """See :meth:`ADFNetwork.joint`."""
    with torch.inference_mode(False):
        refuse_training_statistics(network)
        given = _as_given(network, inputs)
        if isinstance(request.outputs, Tensor):
            device = next(x.device for x in given if isinstance(x, Moments))
            request = replace(request, outputs=request.outputs.to(device, copy=True))
        question = Question(network, given, request, autocast_state())
        refuse_mixing(question)
        with torch.autocast(question.precision[0], enabled=False):
            return _method(question)(question)


def _method(question: Question) -> Callable[[Question], JointMoments]:
    from adfify import adjoint, interpolated, sketch

    network, request = question.network, question.request
    method: Callable[[Question], JointMoments]
    jump = _jump(network)
    if jump and request.method == "adjoint" and request.samples != 0:
        raise InputError(
            f"'{jump}' jumps, and gradients don't see how much a jump varies: take method='sketch', or samples=0."
        )
    if request.method == "sketch" and request.samples in (0, 1):
        raise InputError(f"samples={request.samples}; a sketch needs at least 2, and samples=0 is for the adjoint.")
    sketched = request.method == "auto" and request.samples != 0 and (jump or _many(question))
    if request.method == "sketch" or sketched:
        method = sketch.moments
    elif request.samples == 0:
        method = adjoint.moments
    else:
        method = interpolated.moments
    if request.attribution and method is sketch.moments:
        raise InputError("attribution=True is for method='adjoint': a sketch has no gradients to attribute by.")
    return method


def _jump(network: ADFNetwork) -> str:
    """The name of the first operation that is not continuous, or ``""``."""
    origins = ((node.name, node.meta.get("origin")) for node in network.graph.nodes)
    return next((name for name, origin in origins if origin is not None and not origin.continuous), "")


def _many(question: Question) -> bool:
    asked = question.request.outputs
    if isinstance(asked, int):
        return asked >= MANY_OUTPUTS
    if isinstance(asked, Tensor):
        return asked.shape[-1] >= MANY_OUTPUTS
    if asked != "all":
        return len(asked) >= MANY_OUTPUTS
    one = question.rows(slice(0, 1))
    outputs, _ = Original(question.network, question.precision).at(one.inputs, Draws(0, range(1)), gradients=False)
    return question.output_of(outputs, 1)[0].shape[1] >= MANY_OUTPUTS


def refuse_training_statistics(network: nn.Module) -> None:
    """Raise InputError where a normalisation would mix the inputs of a batch."""
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(
                f"'{path}' ({type(module).__name__}) takes its statistics from the batch, which would mix its inputs: "
                "call .eval() on the network first, and give the layer running statistics."
            )


def refuse_mixing(question: Question) -> None:
    """Raise InputError where one input's output depends on the others: the batch is not the first dimension, or mixed.

    Once for a network: noisy inputs are run as a batch, so nothing else would be right.
    """
    network = question.network
    if network.__dict__.get("_keeps_inputs_apart"):
        return
    one = question.rows(slice(0, 1))
    two = [_with_another(x) for x in one.inputs]
    original = Original(network)
    with torch.no_grad(), original.without_noise():
        alone = one.output_of(original.run(*map(mean_of, one.inputs)), 1)[0]
        together = original.run(*two)
        beside = one.output_of(together, 2)[0][1:]  # the second: a recurrent network may not know what follows
    close = torch.allclose(alone, beside, rtol=1e-2, atol=1e-3 * float(alone.abs().max()), equal_nan=True)
    if not close:
        raise InputError(
            "the network's output for an input depends on the other inputs beside it: the batch is not its first "
            "dimension (nn.LSTM without batch_first), or it is mixed. Joint moments run noisy inputs as a batch."
        )
    network.__dict__["_keeps_inputs_apart"] = True


def mean_of(x: Any) -> Any:
    """Without its variance."""
    return x.mean if isinstance(x, Moments) else x


def _with_another(x: Any) -> Any:
    """One input, and another before it."""
    if isinstance(x, Moments):
        return torch.cat((x.mean.flip(-1) + 1, x.mean))
    return torch.cat((x, x)) if isinstance(x, Tensor) and x.dim() > 0 and len(x) == 1 else x


def _as_given(network: ADFNetwork, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Every input as the graph takes it: Moments where it is uncertain."""
    placeholders = [node for node in network.graph.nodes if node.op == "placeholder"]
    if any(node.target is as_moments and "origin" not in node.meta for node in network.graph.nodes):
        raise InputError("this network was converted before there were joint moments: convert its model again.")
    if len(inputs) > len(placeholders):
        raise InputError(f"joint() got {len(inputs)} inputs, and the network takes {len(placeholders)}.")
    given = []
    for node, value in zip(placeholders, inputs, strict=False):
        uncertain = any(user.target is as_moments for user in node.users)
        value = pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x.detach(), value)
        given.append(as_moments(value, network.noise_variance, str(node.target)) if uncertain else value)
    lengths = {len(x.mean) if x.mean.dim() else 0 for x in given if isinstance(x, Moments)}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(
            f"joint() takes a batch, [N, ...], in every uncertain input, the same N; there is {sorted(lengths)}."
            if lengths
            else "joint() got no uncertain input."
        )
    return tuple(given)


def selected(outputs: Any, which: str | int | None, rows: int) -> tuple[Tensor, tuple[int, ...]]:
    """One output of a structure, ``[rows, M]``, and its shape without the batch.

    Raises:
        InputError: there are several, or none that is a batch of floating-point values.
    """
    named = {
        pytree.keystr(path).strip("[]'\".<>"): leaf
        for path, leaf in pytree.tree_flatten_with_path(outputs)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0 and len(leaf) == rows
    }
    if which in (None, 0) and len(named) == 1:
        (leaf,) = named.values()
    elif str(which) in named:
        leaf = named[str(which)]
    else:
        there = ", ".join(map(repr, named)) or "none that is a batch of floating-point values"
        asked = "which of them is not said" if which is None else f"output={which!r} is not among them"
        raise InputError(f"the network's outputs are {there}, and {asked}: give output=, one of their names.")
    wide = leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf
    return wide.reshape(rows, -1), tuple(leaf.shape[1:])


def joined(parts: Sequence[JointMoments]) -> JointMoments:
    """The moments of several chunks of pictures as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    leaves, specs = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    cat = [torch.cat(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*leaves, strict=True)]
    whole: JointMoments = pytree.tree_unflatten(cat, specs[0])
    return whole


def replaced(moments: JointMoments, rows: Tensor, others: JointMoments) -> JointMoments:
    """Those of some pictures taken from ``others``."""
    leaves, spec = pytree.tree_flatten(moments)
    put = [
        leaf.index_copy(0, rows, other) if isinstance(leaf, Tensor) else leaf
        for leaf, other in zip(leaves, pytree.tree_leaves(others), strict=True)
    ]
    whole: JointMoments = pytree.tree_unflatten(put, spec)
    return whole
