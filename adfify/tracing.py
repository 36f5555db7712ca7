"""From a model to a graph of its operations.

Symbolic tracing by torch.fx comes first: it keeps modules and readable code. Where it gives up, torch.export
is the next engine; both end in the same :class:`Traced` and the same registry.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from adfify import (
    call_signature,
    counting,
    export_tracing,
    functionalisation,
    inplace,
    known_values,
    locations,
    reading,
    state,
    threads,
    two_calls,
    two_runs,
    verification,
    watching,
)
from adfify.call_signature import CallSignature
from adfify.errors import InputError, ModelError
from adfify.locations import forward_of, shortened, stopped_at
from adfify.moments import Moments
from adfify.proxies import Proxy
from adfify.registry import Rules
from adfify.state import StateError

# torch.nn classes whose forward is only a loop over their children: traced through, not leaves.
_LOOPS = (nn.Sequential,)


# Functions that look into a tensor, and that have no rule: they are leaves, so that they are missing by their name.
PACKING = (rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.unpack_sequence)


@dataclass(frozen=True)
class Traced:
    """A model's operations in order.

    Attributes:
        root: the model itself, wrappers taken off; untouched.
        graph: its operations; owned by us, free to be edited.
        engine: which tracer made it.
        constants: tensors that the model made while being traced, by the graph's name for them.
        signature: what it is called with.
        gaps: nodes that write in place into what can't be followed, and why.
    """

    root: nn.Module
    graph: fx.Graph
    engine: str
    constants: dict[str, Tensor]
    signature: CallSignature
    gaps: Mapping[fx.Node, str] = field(default_factory=dict)

    @property
    def certain_inputs(self) -> frozenset[str]:
        """Names of the inputs that carry no variance: integers."""
        placeholders = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        pairs = zip(placeholders, self.signature.leaves, strict=True)
        return frozenset(name for name, leaf in pairs if not leaf.uncertain)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile wrappers, any number of them."""
    # A compiled model has imported torch._dynamo, which is heavy; without it there is none.
    compiled = sys.modules.get("torch._dynamo.eval_frame")
    while True:
        if type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel):
            model = model.module  # type: ignore[assignment]
        elif compiled is not None and isinstance(model, compiled.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...] | None, example_kwargs: Mapping[str, Any], rules: Rules
) -> Traced:
    """The model's graph.

    Args:
        model: any module; wrappers are taken off.
        example_inputs: inputs by position, which tell what is an integer, a structure, or replaces a default.
        example_kwargs: likewise, by keyword.
        rules: the table; what has a rule is a leaf.

    Raises:
        ModelError: not a module, a scripted module, hooks or parametrizations, or a forward that can't be
            traced, with the line that stopped it.
    """
    root = unwrap(_checked_model(model))
    _refuse_hooks(root)
    signature = call_signature.of_model(root, example_inputs, example_kwargs)
    if _is_leaf(root, rules):
        return _functional(root, _of_whole(root, signature), "torch.fx", {}, signature, rules)
    try:
        example = _complete(signature, example_inputs, example_kwargs)
        graph, constants = _symbolic(root, rules, signature, _known(root, rules, signature, example))
        _drop_unused_rest(graph, type(root).__name__)
        traced = _functional(root, graph, "torch.fx", constants, signature, rules)
        if example:
            _verify(traced, example)
    except StateError:
        raise
    except ModelError as error:
        return _exported(root, example_inputs, example_kwargs, error, rules)
    return traced


def _known(root: nn.Module, rules: Rules, signature: CallSignature, example: Sequence[Any]) -> known_values.Known:
    uncertain = frozenset(leaf.name for leaf in signature.leaves if leaf.uncertain)
    tensors = [x.mean if isinstance(x, Moments) else x for x in example]
    names = [leaf.name for leaf in signature.leaves]
    return known_values.Known(root, rules, uncertain, dict(zip(names, tensors, strict=False)))


def _complete(signature: CallSignature, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> list[Any]:
    """The example's tensors, none of an example that leaves out an input."""
    try:
        return signature.flatten(args or (), kwargs) if signature.is_of_example else []
    except InputError:
        return []


def _verify(traced: Traced, tensors: Sequence[Any]) -> None:
    """Raise ModelError where the graph is not the model: see Note [A trace is checked on the example]."""
    found = verification.disagreement(traced, tensors)
    if found is None:
        return
    if found.is_of_model:
        raise state.other_every_time(traced.root)
    name = type(traced.root).__name__
    raise ModelError(
        f"The graph that {traced.engine} traces of {name} does not compute what {name} does on example_inputs: "
        f"{found.said}. Usually forward asks there for what only a running model knows: a type, whether something "
        "traces, whether a size is an int. Write it without asking, or register a rule for that module."
    )


def _functional(
    root: nn.Module, graph: fx.Graph, engine: str, constants: dict[str, Tensor], signature: CallSignature, rules: Rules
) -> Traced:
    done = functionalisation.functional(graph, root, rules, constants)
    return Traced(root, done.graph, engine, constants, signature, _that_matter(done))


def _that_matter(done: functionalisation.Functional) -> dict[fx.Node, str]:
    """The gaps that an output may depend on."""
    live = reading.live(done.graph)
    return {
        node: why
        for node, why in done.gaps.items()
        if node not in done.concerned or not live.isdisjoint(done.concerned[node])
    }


def _is_leaf(module: nn.Module, rules: Rules) -> bool:
    """Whether a module is one operation: it has a rule, or is torch's, whose missing rule is reported by its name."""
    if any("forward" in vars(part) for part in module.modules()):
        return False  # its class does not say what it does
    if rules.find(type(module)) is not None:
        return True
    return type(module).__module__.startswith("torch.nn.") and type(module) not in _LOOPS


def _of_whole(root: nn.Module, signature: CallSignature) -> fx.Graph:
    """A graph that calls the model itself: see Note [A module that is the whole model], adfify.network."""
    graph = fx.Graph()
    args, kwargs = signature.call([graph.placeholder(leaf.name) for leaf in signature.leaves])
    graph.output(graph.call_module("", tuple(args), kwargs))
    return graph


class _Tracer(fx.Tracer):
    """Leaves are what has a rule, and every torch.nn class, so that a missing one is reported by its name."""

    record_stack_traces = True
    # Buffers stay references: baked in as constants they would go stale, silently, at the next load_state_dict.
    proxy_buffer_attributes = True

    def __init__(
        self,
        rules: Rules,
        signature: CallSignature,
        known: known_values.Known,
        name_of_constants: str,
        makes_tensors: bool = False,
    ) -> None:
        with_rules = [target for rule in rules for target in rule.targets if inspect.isfunction(target)]
        functions: list[Callable[..., Any]] = [*with_rules, *PACKING]
        super().__init__(autowrap_functions=tuple(functions))
        modules = {function.__module__ for function in functions}
        # A registered function is a leaf also where it is called as `library.function`: its home is patched too.
        homes = (sys.modules.get(name) for name in modules if not name.startswith("torch."))
        self._autowrap_search += [rnn, *(home for home in homes if home is not None)]
        self.rules = rules
        self.signature = signature
        self.known = known
        self.constants = watching.Constants()
        self.makes_tensors = makes_tensors
        self._name_of_constants = name_of_constants
        self.swapped = ""
        self._stop: Exception | None = None
        self._autocast = _autocast()
        self._untraced = threads.Module()
        self._weights: dict[nn.Module, dict[str, Tensor | None]] = {}

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of a model, unless something in it could not be followed, whether forward minds that or not."""
        self._weights = {module: {**module._parameters, **module._buffers} for module in root.modules()}
        self._untraced = threads.Module()
        graph = super().trace(root, concrete_args)
        if self._stop is not None:
            raise self._stop
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """See :meth:`torch.fx.Tracer.create_args_for_root`, and Note [Bystanders]."""
        forward, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return self._untraced.for_others(forward), args

    def stop(self, why: str) -> NoReturn:
        """Give up: see Note [An error that forward catches]."""
        try:
            raise fx.proxy.TraceError(why)
        except fx.proxy.TraceError as error:
            self._stop = error
            raise

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """See :meth:`torch.fx.Tracer.iter`."""
        try:
            return super().iter(obj)
        except fx.proxy.TraceError as error:
            self._stop = error
            raise

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See :meth:`torch.fx.Tracer.call_module`, and Note [Bystanders]."""
        if self._untraced.is_bystander:
            return forward(*args, **kwargs)
        for part in m.modules() if _is_leaf(m, self.rules) else ():
            self._note_swapped(part)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """See :meth:`torch.fx.Tracer.getattr`, and Note [Bystanders]."""
        if self._untraced.is_bystander:
            return attr_val
        if isinstance(attr_val, Tensor):
            for part in self._weights:
                if part._parameters.get(attr) is attr_val or part._buffers.get(attr) is attr_val:
                    self._note_swapped(part)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _note_swapped(self, module: nn.Module) -> None:
        """Note weights that stand in a module for its own: the graph would refer to its own."""
        before = self._weights.get(module, {})
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            if before.get(name, x) is not x:
                self.swapped = f"{self.path_of_module(module)}.{name}".lstrip(".")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def _proxy_placeholder(self, name: str, *args: Any) -> Any:
        # Inputs left at their defaults, or that are no tensors, are what they are, and no inputs of the graph.
        structure = self.signature.structures[name.lstrip("*")]
        if name.startswith("*") and not structure and not self.signature.is_of_example:
            return super()._proxy_placeholder(name, *args)
        return call_signature.mapped(
            structure, lambda leaf, path: self.create_proxy("placeholder", leaf.name, (), {}), name
        )

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a proxy is true: see Note [A value that is traced in], adfify.known_values."""
        return bool(self.value_of(obj, lambda: super(_Tracer, self).to_bool(obj)))

    def value_of(self, proxy: fx.Proxy, otherwise: Callable[[], Any]) -> Any:
        """What a proxy stands for, where buffers or the kind of the inputs say it; else what ``otherwise`` says."""
        try:
            known, of_inputs = self.known.of(proxy.node)
        except LookupError:
            try:
                return otherwise()
            except fx.proxy.TraceError as error:
                self._stop = error
                raise
        value = known.item() if isinstance(known, Tensor) else known
        check = known_values.assert_inputs_as_traced if of_inputs else known_values.assert_as_traced
        checked = self.create_proxy("call_function", check, (proxy, value, ""), {})
        checked.node.update_arg(2, locations.source_line(checked.node))
        return value

    def make(self, function: Any, args: Any, kwargs: Any) -> fx.Proxy:
        """A call that makes a tensor, as an operation of the graph."""
        return self.create_proxy("call_function", function, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Generator):
            self.stop("random numbers are drawn by a generator, anew in every call")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            free = (f"{self._name_of_constants}{number}" for number in itertools.count())
            name = next(n for n in free if n not in self.constants.tensors and not hasattr(self.root, n))
            self.tensor_attrs[a] = name
            self.constants.add(name, a)
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if _autocast() != self._autocast:
            self.stop("forward turns torch.autocast on or off, which changes the dtype of what is computed")
        written = inplace.written_by(node, self.root)
        if written is not None and written.op == "get_attr":
            path = str(written.target)
            self.constants.write(path, self._real(path))
        return node

    def _real(self, path: str) -> Tensor:
        known = [tensor for tensor, name in self.tensor_attrs.items() if name == path]
        return known[0] if known else operator.attrgetter(path)(self.root)  # type: ignore[return-value]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m, self.rules)


# Note [An error that forward catches]
# A trace that meets a question it can't answer stops by an error. `try: n = len(x)` with a bare `except` goes on with
# the other branch, and the graph would hold that for good: so an error of tracing is one, whether forward minds or not.


def _autocast() -> tuple[Any, ...]:
    """What autocast does now."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def _drop_unused_rest(graph: fx.Graph, model: str) -> None:
    """Remove `*args` and `**kwargs` that the model does nothing with."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and str(node.target).startswith("*")]:
        if node.users:
            raise ModelError(
                f"{model}.forward uses {node.target}, whose contents can't be traced; name its inputs one by one."
            )
        graph.erase_node(node)


def _symbolic(
    root: nn.Module, rules: Rules, signature: CallSignature, known: known_values.Known
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph by torch.fx, and the tensors that the model made."""
    with state.untouched(root) as before, state.random_state_kept() as random:
        tracer = _Tracer(rules, signature, known, "_tensor_constant")
        graph = None
        try:
            graph = _run(tracer, root)
        except ModelError:
            if not tracer.constants.are_stale:
                raise
        if graph is not None and not tracer.constants.are_stale and not random.drawn():
            _refuse_state(root, graph, tracer, before)
            _refuse_swapped(root, tracer)
            return graph, tracer.constants.tensors
    # See Note [Real tensors in a symbolic trace].
    with state.untouched(root) as before, state.random_state_kept() as random:
        tracer = _Tracer(rules, signature, known, "_tensor_constant", makes_tensors=True)
        graph = _run(tracer, root)
        if random.drawn():
            raise _frozen_draws(root, random.drawn())
        if tracer.constants.are_stale:
            raise ModelError(
                f"{type(root).__name__} writes in place into a tensor that it made, which torch.fx would lose."
            )
        _refuse_state(root, graph, tracer, before)
        _refuse_swapped(root, tracer)
        return graph, tracer.constants.tensors


def _refuse_swapped(root: nn.Module, tracer: _Tracer) -> None:
    if tracer.swapped:
        raise ModelError(
            f"{type(root).__name__}.forward{forward_of(root)} puts another tensor in the place of '{tracer.swapped}' "
            "for a while (torch.func.functional_call does), which torch.fx would not see; compute with that tensor by "
            "torch.nn.functional."
        )


def _run(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    if "forward" in vars(root) or type(root).__call__ is not nn.Module.__call__:
        raise ModelError(
            f"{type(root).__name__} has a forward set on the object, or a __call__ of its own, which torch.fx does not "
            "run; write what it does into the forward of a class."
        )
    try:
        with watching.Watch(tracer.constants, tracer.make if tracer.makes_tensors else None):
            return _with_structured_output(tracer.trace(root))
    except Exception as error:
        raise ModelError(
            f"{type(root).__name__} can't be traced by torch.fx{stopped_at(error) or forward_of(root)}: "
            f"{type(error).__name__}: {shortened(error)}\n"
            "Usually a branch or loop there depends on the values or the size of a tensor. Move that code into a "
            "function or module of its own and register a rule for it with adfify.register."
        ) from error


def _with_structured_output(graph: fx.Graph) -> fx.Graph:
    """What the model returns as it returns it: for structured inputs, torch.fx makes a flat list of it."""
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = (pytree.tree_unflatten(output.args[0], codegen.pytree_info.out_spec),)  # type: ignore[arg-type]
        graph.set_codegen(CodeGen())
    return graph


def _frozen_draws(root: nn.Module, libraries: list[str]) -> ModelError:
    return ModelError(
        f"{type(root).__name__}.forward draws random numbers by {' and '.join(libraries)}, which tracing would freeze. "
        "Make them an input of forward, given as Moments(mean, variance), or a function with a rule of its own."
    )


def _refuse_state(root: nn.Module, graph: fx.Graph, tracer: _Tracer, before: state.Snapshot) -> None:
    """Raise where a second call would read what the first one leaves: see Note [State], adfify.state."""
    changes = before.changes()
    written = functionalisation.functional(graph, root, tracer.rules, tracer.constants.tensors).written
    names = [name for name in dict.fromkeys([*changes, *sorted(written)]) if name not in tracer.constants.tensors]
    for node in reading.live(graph):
        called = str(node.target) if node.op == "call_module" else None
        holds = [name for name in names if called is not None and name.startswith(f"{called}.")]
        if holds or (node.op == "get_attr" and node.target in changes):
            raise state.refuse(root, holds or [str(node.target)])
    after = state.Snapshot(root)
    try:
        same = _traced_alike(root, graph, tracer, bool(names))
    except (ModelError, KeyError, RuntimeError) as error:
        raise (state.refuse(root, names) if names else state.other_every_time(root)) from error
    if not same:
        raise state.refuse(root, names) if names else state.other_every_time(root)
    moving = after.changes()
    after.restore()
    if moving and counting.matter(root, after, moving, lambda: _traced_alike(root, graph, tracer, True)):
        raise state.refuse(root, moving, state.COUNTED)


def _traced_alike(root: nn.Module, graph: fx.Graph, tracer: _Tracer, writes: bool) -> bool:
    """Whether a trace of the model as it is now computes what the first one, a graph, does."""
    again = _Tracer(tracer.rules, tracer.signature, tracer.known, "_tensor_of_second_call", tracer.makes_tensors)
    again.record_stack_traces = False
    second = _run(again, root)
    if not writes and two_calls.are_one(graph, tracer.constants.tensors, second, again.constants.tensors):
        return True
    numbering = two_calls.Numbering(root, tracer.rules, {**tracer.constants.tensors, **again.constants.tensors})
    return bool(numbering.output(graph) == numbering.output(two_calls.in_sequence(graph, second)))


def exported(
    root: nn.Module, example_inputs: tuple[Any, ...] | None, example_kwargs: Mapping[str, Any], rules: Rules
) -> Traced | None:
    """The graph by torch.export where that can make one: it needs inputs to run the model on."""
    try:
        return _exported(root, example_inputs, example_kwargs, ModelError(""), rules)
    except StateError:
        raise
    except ModelError:
        return None


def _exported(
    root: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    example_kwargs: Mapping[str, Any],
    reason: ModelError,
    rules: Rules,
) -> Traced:
    """The second engine, for what the first can't trace."""
    has_example = example_inputs is not None or bool(example_kwargs)
    args = example_inputs if has_example else derive_inputs(root)
    if args is None and not has_example:
        raise ModelError(
            f"{reason}\nWith inputs to run the model on, torch.export may do: adfify(model, example_inputs=(x,))."
        ) from reason
    signature = call_signature.of_model(root, args, example_kwargs)
    tensors = tuple(signature.flatten(args or (), example_kwargs))
    given = (root, signature, tensors, reason, rules)
    if not any(x.dim() and len(x) == 1 for x in tensors):
        return _by_export(*given, ones_vary=False)
    try:
        return _by_export(*given, ones_vary=True)
    except StateError:
        raise
    except ModelError:  # one example may be computed otherwise than several
        return _by_export(*given, ones_vary=False)


def _by_export(
    root: nn.Module,
    signature: CallSignature,
    tensors: tuple[Any, ...],
    reason: ModelError,
    rules: Rules,
    ones_vary: bool,
) -> Traced:
    sizes_vary = not _configuration(root).get("fixed_input_size")
    with state.untouched(root), state.random_state_kept() as random:
        graph, constants = export_tracing.export(root, signature, tensors, str(reason), sizes_vary, ones_vary)
        if random.drawn():
            raise _frozen_draws(root, random.drawn())
    two_runs.refuse_state(root, signature, tensors)
    traced = _functional(root, graph, "torch.export", constants, signature, rules)
    try:
        _verify(traced, tensors)
    except StateError:
        raise
    except ModelError as error:
        raise ModelError(f"{reason}\n{error}".strip()) from error
    verification.refuse_ones(traced, tensors)
    return traced


def derive_inputs(root: nn.Module) -> tuple[Tensor, ...] | None:
    """A batch of two of the size that the model's own configuration names (timm, torchvision), else None."""
    size = _configuration(root).get("input_size")
    if size is None and type(root).__module__.startswith("torchvision.models."):
        side = getattr(root, "image_size", 224)
        size = (3, side, side)
    if size is None:
        return None
    like = next((parameter for parameter in root.parameters()), torch.zeros(()))
    return (torch.zeros(2, *size, dtype=like.dtype, device=like.device),)


def _configuration(root: nn.Module) -> dict[str, Any]:
    """What timm tells of a model."""
    config = getattr(root, "pretrained_cfg", None) or getattr(root, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _checked_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"adfify() converts a torch.nn.Module, and was given {model!r:.80} of type {type(model).__name__}."
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"'{path}' in {type(model).__name__}" if path else type(model).__name__
            raise ModelError(f"{where} is a scripted model; convert the Python model it was made from.")
    return model


_LISTED = 10
"""How many hooks an error names."""


def _refuse_hooks(root: nn.Module) -> None:
    """Raise for what tracing would ignore without a word."""
    found = []
    for path, module in root.named_modules():
        where = f"'{path}' ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
        if torch.nn.utils.parametrize.is_parametrized(module):
            names = ", ".join(module.parametrizations.keys())
            found.append(f"{where}: parametrization of {names}")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found.append(f"{where}: extra state (get_extra_state), which its state_dict would lose")
        for kind, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
            found += [f"{where}: {kind} {_hook_name(hook)}" for hook in hooks.values()]
    if found:
        more = [f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
        lines = "\n".join(f"  - {line}" for line in found[:_LISTED] + more)
        raise ModelError(
            f"{type(root).__name__} has hooks, parametrizations or extra state, which tracing would silently ignore:\n"
            f"{lines}\nRemove them (handle.remove(), torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm ...) or write what they do into the module's forward, and convert again."
        )


def _hook_name(hook: Any) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
