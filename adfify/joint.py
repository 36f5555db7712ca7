"""Correlation-aware moments: what `ADFNetwork.joint` does, whichever way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import sizes
from adfify.errors import InputError
from adfify.layout import (
    Axis,
    Batched,
    Inputs,
    Layout,
    Mixed,
    alike,
    axis_of,
    chosen,
    find,
    fingerprint,
    grown,
    named,
    together,
    unlike,
)
from adfify.moments import JointMoments, Moments, as_moments, is_moments
from adfify.nn import dropout
from adfify.noisy import Original, Precision, autocast_state, most_in_a_pass

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
    batched: Batched = "auto"

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

    def of(self, row: int, count: int) -> Request:
        """The same for one of ``count`` pictures, which may each have indices of their own."""
        if not (isinstance(self.outputs, Tensor) and self.outputs.dim() == 2):
            return self
        if len(self.outputs) != count:
            raise InputError(
                f"outputs is a {self.outputs.dtype} tensor of shape {tuple(self.outputs.shape)}; it is [{count}, k]: "
                "of each input its own indices."
            )
        return replace(self, outputs=self.outputs[row : row + 1])

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
        return torch.tensor(list(listed), dtype=torch.int64, device=means.device).expand(pictures, -1)


# Note [One example at a time]
# What an example's numbers are must not depend on what is beside it, and kernels round differently for batches of
# different sizes. So a pass holds noisy copies of one example, as if it had been given alone: its numbers are the same
# in any batch, bit for bit.


@dataclass(frozen=True)
class Question:
    """A network with the inputs of one example, Moments where they are uncertain, and what is asked of them."""

    network: ADFNetwork
    inputs: Inputs
    layout: Layout
    request: Request
    precision: Precision

    @property
    def first(self) -> Moments:
        """The first uncertain input."""
        return self.inputs.first

    @property
    def repeated(self) -> Inputs:
        """The example as often as the network needs it."""
        return self.inputs.rows([0] * self.layout.least) if self.layout.least > 1 else self.inputs

    def one_pass(self) -> Moments:
        """The ADF network's own moments of that output, ``[1, M]``, in the user's precision; sampled masks are 1."""
        with torch.no_grad(), torch.autocast(*self.precision), dropout.masks_by(_ones):
            outputs = self.network.of_leaves(*self.repeated.arranged())
        parts = (
            pytree.tree_map_only(Moments, part, outputs, is_leaf=is_moments)
            for part in (lambda x: x.mean, lambda x: x.variance)
        )
        return Moments(*(self.layout.values(part, self.layout.least)[:1] for part in parts))


def _ones(x: Tensor, variance: float, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=x.dtype, device=x.device)


def joint(network: ADFNetwork, inputs: Sequence[Any], request: Request) -> JointMoments:
    """See :meth:`ADFNetwork.joint`."""
    with torch.inference_mode(False):
        refuse_training_statistics(network)
        if isinstance(request.outputs, Tensor):
            request = replace(request, outputs=request.outputs.clone())
        asked = questions(network, _as_given(network, inputs), request)
        with torch.autocast(asked[0].precision[0], enabled=False):
            return joined([_method(question)(question) for question in asked])


def questions(network: ADFNetwork, given: Sequence[Any], request: Request) -> list[Question]:
    """One for each example."""
    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    unknown = Inputs.of(given, names)
    if not unknown.uncertain:
        raise InputError("joint() got no uncertain input.")
    precision = autocast_state()
    layout = _layout(network, unknown, request, precision)
    inputs = unknown.along(layout.axes)
    return [
        Question(network, inputs.rows([row]), layout, request.of(row, inputs.count), precision)
        for row in range(inputs.count)
    ]


def _layout(network: ADFNetwork, inputs: Inputs, request: Request, precision: Precision) -> Layout:
    """The network's layout, kept as long as its weights, what is certain, the shapes and the question are the same."""
    leaves = [(x.shape, x.dtype, x.device) if isinstance(x, Moments) else x for x in inputs.leaves]
    certain = [x.clone() for x in leaves if isinstance(x, Tensor)]
    plain = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    key = repr((plain, request.output, request.batched, precision, fingerprint(network)))
    known: dict[str, tuple[list[Tensor], Layout]] = network.__dict__.setdefault("_layouts", {})
    if key in known and all(torch.equal(a, b) for a, b in zip(certain, known[key][0], strict=True)):
        return known[key][1]
    original = Original(network, precision)
    original_at = partial(layout_along, original, request.output)
    try:
        found = find(inputs, request.batched, original_at)
    except InputError:
        original.without_noise(inputs)  # what the network can't take at all is said so
        raise
    if len(known) >= MOST_LAYOUTS:
        known.clear()
    known[key] = (certain, found)
    return found


MOST_LAYOUTS = 8
"""Layouts that a network keeps."""


def layout_along(original: Original, which: str | int | None, inputs: Inputs) -> Layout:
    """The layout if the batch is where ``inputs`` say. Raises Mixed, or an error of torch's, if it isn't."""
    if all(axis is None for axis in inputs.axes):
        outputs, masks, elements = original.without_noise(inputs)
        there = named(outputs)
        name = chosen(there, there, which)
        return Layout(inputs.axes, name, None, (None,) * len(masks), 1, elements, tuple(there[name].shape))
    lone = not any(sizes.refuses_one(original.network.graph, n, axis) for n, axis in enumerate(inputs.axes))
    a, b, c = unlike(inputs, _indexes(original.network, inputs) or not lone)
    runs = [original.without_noise(together(parts)) for parts in ([a], [b, a], [c, a, b])]
    (one, _, _), (two, masks, fewer), (three, other_masks, more) = runs
    name = chosen(named(two), named(three), which)
    rough = original.precision[2]
    leaves = [named(outputs)[name] for outputs in (one, two, three) if name in named(outputs)]
    if len(leaves) < 3:
        raise Mixed(f"output {name!r} is not there for every number of examples")
    block = axis_of(leaves[0], leaves[1], leaves[2], rough)
    if block.length % a.count:
        raise Mixed(f"{a.count} examples have {block.length} elements along axis {block.index} of the output")
    at = Axis(block.index, block.length // a.count)
    _same_in_the_whole(original, inputs, name, at, rough)
    each = max(1, (more - fewer) // a.count)
    if a.count == 1:
        _same_among_many(original, a, leaves[:2], name, at, each)
    where = [grown(torch.empty(x, device="meta"), torch.empty(y, device="meta"))
             for x, y in zip(masks, other_masks, strict=True)]  # fmt: skip
    held = tuple(None if axis is None else Axis(axis.index, axis.length // a.count) for axis in where)
    expected = [at.length if n == at.index else size for n, size in enumerate(leaves[1].shape)]
    alone = leaves[0] if a.count == 1 else named(original.without_noise(inputs.rows([0] * (1 if lone else 2)))[0])[name]
    alone = alone if lone else alone.narrow(at.index, 0, at.length)
    squeezed = list(alone.shape) != expected or not lone
    return Layout(
        inputs.axes,
        name,
        at,
        held,
        2 if squeezed else 1,
        each,
        tuple(at.of_each(alone.reshape(expected), 1).shape[1:]),
    )


def _indexes(network: ADFNetwork, inputs: Inputs) -> bool:
    """Whether fewer examples than there are could put a GPU out of order, by an index that is out of bounds."""
    tensors = [x for x in inputs.leaves if isinstance(x, Tensor)] + [x for x in network.buffers() if x.dim() > 0]
    return inputs.first.device.type == "cuda" and any(not x.is_floating_point() for x in tensors)


def _same_in_the_whole(original: Original, inputs: Inputs, name: str, at: Axis, rough: bool) -> None:
    """Raise Mixed where an input as long as the batch was taken for what it isn't: examples differ in the whole."""
    as_long = [isinstance(x, Tensor) and any(inputs.count == length for length in x.shape) for x in inputs.leaves]
    if inputs.count == 1 or not any(as_long):
        return
    whole = at.apart(named(original.without_noise(inputs)[0])[name], inputs.count)
    for row in (0, inputs.count - 1):
        alone = named(original.without_noise(inputs.rows([row]))[0])[name]
        if alone.numel() != whole[row].numel() or not alike(
            alone.reshape(whole[row].shape), whole[row], (whole[0] - whole[-1]).abs(), rough
        ):
            raise Mixed("an example's output is another in the whole batch than alone")


def _same_among_many(
    original: Original, one: Inputs, results: Sequence[Tensor], name: str, at: Axis, activations: int
) -> None:
    """Raise Mixed where an example is another among as many as there are noisy inputs in one pass: `max(x.shape)`."""
    many = most_in_a_pass(activations)
    together = at.apart(named(original.without_noise(one.rows([0] * many))[0])[name], many)
    other = at.apart(results[1], 2)[0]
    alone = results[0].reshape(other.shape)
    for row in (0, many - 1):
        if together[row].shape != alone.shape or not alike(
            alone, together[row], (alone - other).abs(), original.precision[2]
        ):
            raise Mixed(f"an example's output is another among {many} noisy inputs in one pass than alone")


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
    return (question.layout.outputs if asked == "all" else len(asked)) >= MANY_OUTPUTS


def refuse_training_statistics(network: nn.Module) -> None:
    """Raise InputError where a normalisation would mix the inputs of a batch."""
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(
                f"'{path}' ({type(module).__name__}) takes its statistics from the batch, which would mix its inputs: "
                "call .eval() on the network first, and give the layer running statistics."
            )


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
    return tuple(given)


def joined(parts: Sequence[JointMoments]) -> JointMoments:
    """The moments of several chunks of pictures as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    leaves, specs = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    cat = [torch.cat(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*leaves, strict=True)]
    whole: JointMoments = pytree.tree_unflatten(cat, specs[0])
    return whole
