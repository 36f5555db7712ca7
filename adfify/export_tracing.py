"""The second engine: a graph of aten operations by torch.export, for models that torch.fx can't trace symbolically."""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils import _pytree as pytree

from adfify import sizes
from adfify.call_signature import CallSignature
from adfify.errors import ModelError
from adfify.locations import shortened, stopped_at
from adfify.moments import Moments
from adfify.silence import quiet

# Assertions about the example inputs, which torch.export adds and the original does not have.
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten.sym_constrain_range_for_size.default)


def export(
    root: nn.Module,
    signature: CallSignature,
    tensors: tuple[Any, ...],
    reason: str,
    sizes_vary: bool = True,
    ones_vary: bool = True,
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of a model in aten operations, and the tensors that it made itself.

    Batch and picture sizes stay symbolic wherever the model allows it. Training flags are baked in.

    Args:
        root: the model.
        signature: what it is called with.
        tensors: of the example, plain ones or Moments, in the order of the signature's leaves.
        reason: why symbolic tracing gave up, for the error.
        sizes_vary: whether the model may take inputs of another size; if not, only the batch's is symbolic, and
            tracing takes a fraction of the time.
        ones_vary: whether a batch of one stands for one of any length.

    Raises:
        ModelError: torch.export gave up as well, both reasons are given; or the model is in training mode.
    """
    if any(_depends_on_training(module) for module in root.modules()):
        raise ModelError(
            f"{reason}\ntorch.export would fix {type(root).__name__} in training mode; call model.eval() first."
        )
    plain = _each_its_own(x.mean if isinstance(x, Moments) else x for x in tensors)
    try:
        with _in_silence():
            return _graph(root, signature, plain, sizes_vary, ones_vary)
    except Exception as error:  # torch raises nearly any type here
        raise ModelError(
            f"{reason}\ntorch.export gave up too{stopped_at(error)}: {type(error).__name__}: {shortened(error)}"
        ) from error


def _each_its_own(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """With a copy where one tensor is given twice: torch.export would make both inputs the same one."""
    found: list[Any] = []
    for x in tensors:
        found.append(x.clone() if any(x is other for other in found) else x)
    return tuple(found)


def _graph(
    root: nn.Module, signature: CallSignature, plain: tuple[Any, ...], sizes_vary: bool, ones_vary: bool
) -> tuple[fx.Graph, dict[str, Tensor]]:
    with _called_flat(root, signature):
        program = _exported(root, plain, sizes_vary, ones_vary)
        guards = list(getattr(program, "_guards_code", ()))
    if _writes_through_views(program.graph):
        # Functionalised, every write is an operation with a result; dropout, the identity here, goes with it.
        program = program.run_decompositions({})
    module = program.module(check_guards=False)
    graph = _cleaned(module, program.call_spec.out_spec)
    _checked(graph, program, [leaf.name for leaf in signature.leaves], guards)
    return graph, _constants(module, graph, root)


@contextmanager
def _called_flat(root: nn.Module, signature: CallSignature) -> Iterator[None]:
    """Within it the model's forward takes the tensors among its inputs, one after the other."""
    own, kind = root.__dict__.get("forward"), inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward = root.forward

    def flat(*tensors: Tensor) -> Any:
        args, kwargs = signature.call(tensors)
        return forward(*args, **kwargs)

    flat.__signature__ = inspect.Signature([inspect.Parameter(leaf.name, kind) for leaf in signature.leaves])  # type: ignore[attr-defined]
    root.__dict__["forward"] = flat
    try:
        yield
    finally:
        del root.__dict__["forward"]
        if own is not None:
            root.__dict__["forward"] = own


_TRAINED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU)


def _depends_on_training(module: nn.Module) -> bool:
    """Whether it is in training mode and computes something else then: normalisation, and dropout by any name."""
    rates = [getattr(module, name, None) for name in ("dropout", "drop_prob")]
    drops = any(isinstance(rate, float) and rate > 0 for rate in rates)
    return module.training and (isinstance(module, _TRAINED) or drops)


@contextmanager
def _in_silence() -> Iterator[None]:
    """What torch.export logs, warns of and prints of a failure, whole graphs, is in the error that it raises."""
    stream = sys.stderr
    sys.stderr = _OfOtherThreads(stream)
    try:
        with quiet():
            yield
    finally:
        sys.stderr = stream


class _OfOtherThreads:
    """A stream that takes what other threads write, and drops what this one does."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._mine = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._mine else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# Note [Sizes that are not worth their price]
# A picture's height and width stay free under torch.export as long as the model asks little about them. Windows and
# patches ask much, and sympy then takes minutes to compare floors of quotients; a size with more conditions than this
# on it is fixed (mobilevit: 20 seconds for 240). Convolutional networks of the census have fewer.
_CONDITIONS = 30


def _exported(
    root: nn.Module, plain: tuple[Any, ...], sizes_vary: bool, ones_vary: bool
) -> torch.export.ExportedProgram:
    """With every size free if it can be, else only the batch's: sympy can't solve every condition on two sizes.

    A batch of one is doubled where that will do, for torch.export fixes a size of 1.
    """
    if ones_vary and any(isinstance(x, Tensor) and x.dim() and len(x) == 1 for x in pytree.tree_leaves(plain)):
        with suppress(Exception):
            return _exported(root, pytree.tree_map(_doubled, plain), sizes_vary, ones_vary)
    if sizes_vary:
        limited = symbolic_shapes.patch(symbol_guard_limit_before_specialize=_CONDITIONS)  # type: ignore[attr-defined]
        with suppress(Exception), limited:
            return torch.export.export(root, plain, dynamic_shapes=_dynamic(plain, _all_but_channels), strict=False)
    return torch.export.export(root, plain, dynamic_shapes=_dynamic(plain, _batch), strict=False)


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value


def _all_but_channels(value: Tensor) -> list[int]:
    return [axis for axis in range(value.dim()) if not (axis == 1 and value.dim() == 4)]


def _batch(value: Tensor) -> list[int]:
    return [0] if value.dim() else []


def _dynamic(inputs: tuple[Any, ...], free: Callable[[Tensor], list[int]]) -> Any:
    """The sizes that may vary; of those, torch.export fixes what the model can't do without."""

    def sizes(value: Any) -> Any:
        return dict.fromkeys(free(value), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None

    return pytree.tree_map(sizes, inputs)


def _writes_through_views(graph: fx.Graph) -> bool:
    """Whether an operation that writes into its input is applied to a view."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        source = node.args[0] if node.args else None
        made_by = getattr(getattr(source, "target", None), "_schema", None)
        if made_by is not None and any(result.alias_info is not None for result in made_by.returns):
            return True
    return False


def _cleaned(module: fx.GraphModule, out_spec: Any) -> fx.Graph:
    """A copy with ordinary inputs and outputs, in the structure that the model returned, and without assertions."""
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        env[node] = _copied(new, node, env)
    flat = pytree.tree_leaves(_inlined(new, module, env), is_leaf=lambda value: isinstance(value, fx.Node))
    new.output(pytree.tree_unflatten(list(flat), out_spec))
    return new


def _checked(graph: fx.Graph, program: torch.export.ExportedProgram, names: list[str], guards: list[str]) -> None:
    """Let the graph begin with Note [Sizes that a graph was traced for]."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    expected = sizes.conditions(program, placeholders, names, guards)
    if placeholders and expected:
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(sizes.check, (expected, *placeholders))


# Note [Regions of torch.export]
# A part of forward under `torch.no_grad()` or `torch.autocast(enabled=False)` is a subgraph of its own, called by an
# operator. Moments are the same with gradients and without; and without autocast every operation computes in the dtype
# of its inputs, so that the subgraph can stand in the graph itself. One with autocast on can't: it changes dtypes.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Those operators, and where among their arguments the subgraph is."""


def _inlined(new: fx.Graph, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
    """Copy the operations of a module into ``new``; what it returns."""
    for node in module.graph.nodes:
        if node.op == "placeholder" or node.target in _CHECKS or node.target == "_guards_fn":
            continue
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            continue  # a region
        if node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        place = _REGIONS.get(getattr(node.target, "__name__", ""))
        if place is None or (place == 4 and node.args[2]):
            env[node] = _copied(new, node, env)
            continue
        region, given = getattr(module, str(node.args[place].target)), node.args[place + 1 :]
        inner = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        env[node] = _inlined(new, region, {node: env[value] for node, value in zip(inner, given, strict=True)})
    raise AssertionError("a graph ends with its output")


def _copied(new: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    source = env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if node.target is operator.getitem and isinstance(source, (tuple, list)):
        return source[node.args[1]]  # type: ignore[index]  # one of the results of a region
    if node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]:  # type: ignore[union-attr]
        # `y.to(x.dtype)` that changes nothing: kept, it would hold the network to the dtype it was traced in.
        return source
    copy = new.node_copy(node, env.__getitem__)
    copy.meta = dict(node.meta)
    return copy


def _constants(module: fx.GraphModule, graph: fx.Graph, root: nn.Module) -> dict[str, Tensor]:
    """Tensors that the graph refers to and that are no parameters or buffers, under names without dots."""
    tables = (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    own = {name for table in tables for name, _ in table}
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            name = str(node.target).replace(".", "_")
            found[name] = operator.attrgetter(str(node.target))(module)
            node.target = name
    return dict(sorted(found.items()))
