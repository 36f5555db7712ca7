"""From a model to a graph of its operations.

Symbolic tracing by torch.fx comes first: it keeps modules and readable code. Where it gives up, torch.export
is the next engine; both end in the same :class:`Traced` and the same registry.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adfify import export_tracing
from adfify.errors import ModelError
from adfify.moments import Moments, is_moments
from adfify.proxies import Proxy
from adfify.registry import Rules

# torch.nn classes whose forward is only a loop over their children: traced through, not leaves.
_LOOPS = (nn.Sequential,)


@dataclass(frozen=True)
class Traced:
    """A model's operations in order.

    Attributes:
        root: the model itself, wrappers taken off; untouched.
        graph: its operations; owned by us, free to be edited.
        engine: which tracer made it.
        constants: tensors that the model made while being traced, by the graph's name for them.
        certain_inputs: names of the inputs that carry no variance (integers, defaults left alone).
    """

    root: nn.Module
    graph: fx.Graph
    engine: str
    constants: dict[str, Tensor]
    certain_inputs: frozenset[str]


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


def trace(model: nn.Module, example_inputs: tuple[Any, ...] | None, rules: Rules) -> Traced:
    """The model's graph.

    Args:
        model: any module; wrappers are taken off.
        example_inputs: positional inputs, which tell what is an integer and which defaults are replaced.
        rules: the table; what has a rule is a leaf.

    Raises:
        ModelError: not a module, a scripted module, hooks or parametrizations, or a forward that can't be
            traced, with the line that stopped it.
    """
    root = unwrap(_checked_model(model))
    _refuse_hooks(root)
    names = _input_names(root)
    given = example_inputs or ()
    if len(given) > len(names):
        raise ModelError(
            f"{type(root).__name__}.forward takes {len(names)} inputs ({', '.join(names)}) and example_inputs has "
            f"{len(given)}."
        )
    defaults = {
        name: parameter.default
        for name, parameter in list(names.items())[len(given) :]
        if parameter.default is not inspect.Parameter.empty
    }
    certain = {name for name, value in zip(names, given, strict=False) if not _is_uncertain(value)}
    concrete = {
        name: value for name, value in zip(names, given, strict=False) if not isinstance(value, (Tensor, Moments))
    }
    baked = {**defaults, **concrete}
    try:
        with _left_untouched(root) as constants:
            graph = _symbolic(root, rules, baked)
    except ModelError as error:
        return _exported(root, example_inputs or derive_inputs(root), error)
    _drop_unused_rest(graph, type(root).__name__)
    return Traced(root, graph, "torch.fx", constants, frozenset(certain - set(baked)))


class _Tracer(fx.Tracer):
    """Leaves are what has a rule, and every torch.nn class, so that a missing one is reported by its name."""

    record_stack_traces = True
    # Buffers stay references: baked in as constants they would go stale, silently, at the next load_state_dict.
    proxy_buffer_attributes = True

    def __init__(self, rules: Rules, baked: dict[str, Any]) -> None:
        functions = [target for rule in rules for target in rule.targets if inspect.isfunction(target)]
        super().__init__(autowrap_functions=tuple(functions))
        modules = {function.__module__ for function in functions}
        # A registered function is a leaf also where it is called as `library.function`: its home is patched too.
        homes = (sys.modules.get(name) for name in modules if not name.startswith("torch."))
        self._autowrap_search += [home for home in homes if home is not None]
        self._rules = rules
        self._baked = baked

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def _proxy_placeholder(self, name: str, *args: Any) -> Any:
        # Inputs left at their defaults, or that are no tensors, are what they are, and no inputs of the graph.
        return self._baked[name] if name in self._baked else super()._proxy_placeholder(name, *args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._rules.find(type(m)) is not None:
            return True
        return type(m).__module__.startswith("torch.nn.") and type(m) not in _LOOPS


def _drop_unused_rest(graph: fx.Graph, model: str) -> None:
    """Remove `*args` and `**kwargs` that the model does nothing with."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and str(node.target).startswith("*")]:
        if node.users:
            raise ModelError(
                f"{model}.forward uses {node.target}, whose contents can't be traced; name its inputs one by one."
            )
        graph.erase_node(node)


def _symbolic(root: nn.Module, rules: Rules, baked: dict[str, Any]) -> fx.Graph:
    tracer, random_state = _Tracer(rules, baked), torch.get_rng_state()
    try:
        graph = tracer.trace(root)
        if not torch.equal(torch.get_rng_state(), random_state):
            torch.set_rng_state(random_state)
            raise RuntimeError("forward draws random numbers, which tracing would freeze")
        return graph
    except Exception as error:
        location = _user_line(traceback.extract_tb(error.__traceback__))
        raise ModelError(
            f"{type(root).__name__} can't be traced by torch.fx{f', stopped at {location}' if location else ''}: "
            f"{type(error).__name__}: {error}\n"
            "Usually a branch or loop there depends on the values or the size of a tensor. Move that code into a "
            "function or module of its own and register a rule for it with adfify.register."
        ) from error


def exported(root: nn.Module, example_inputs: tuple[Any, ...] | None) -> Traced | None:
    """The graph by torch.export where that can make one: it needs inputs to run the model on."""
    inputs = example_inputs or derive_inputs(root)
    try:
        return None if inputs is None else _exported(root, inputs, ModelError(""))
    except ModelError:
        return None


def _exported(root: nn.Module, inputs: tuple[Any, ...] | None, reason: ModelError) -> Traced:
    """The second engine, for what the first can't trace."""
    if inputs is None:
        raise ModelError(
            f"{reason}\nWith inputs to run the model on, torch.export may do: adfify(model, example_inputs=(x,))."
        ) from reason
    graph, constants = export_tracing.export(
        root, inputs, str(reason), not _configuration(root).get("fixed_input_size")
    )
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(inputs, is_leaf=is_moments)
    certain = {str(node.target) for node, value in zip(placeholders, leaves, strict=True) if not _is_uncertain(value)}
    return Traced(root, graph, "torch.export", constants, frozenset(certain))


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


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's code that made a node, or ``""``."""
    trace_text = node.meta.get("stack_trace") or node.stack_trace or ""
    frames = [line.strip() for line in trace_text.splitlines() if line.strip().startswith('File "')]
    for frame in reversed(frames):
        path, _, rest = frame.removeprefix('File "').partition('", line ')
        if not _is_library(path):
            return f"{path}:{rest.split(',')[0]}"
    return ""


def module_path(node: fx.Node) -> str:
    """The path of the module in whose forward a node stands, ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    if node.op == "call_module" and paths and paths[-1] == node.target:
        paths.pop()
    return paths[-1] if paths else ""


def _user_line(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if not _is_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _is_library(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return "torch" in parts or "adfify" in parts or path.startswith("<")


def _checked_model(model: Any) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{type(model).__name__} is a scripted model; convert the Python model it was made from.")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"adfify() converts a torch.nn.Module, and was given {model!r:.80} of type {type(model).__name__}."
        )
    return model


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
        lines = "\n".join(f"  - {line}" for line in found)
        raise ModelError(
            f"{type(root).__name__} has hooks, parametrizations or extra state, which tracing would silently ignore:\n"
            f"{lines}\nRemove them (handle.remove(), torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm ...) or write what they do into the module's forward, and convert again."
        )


def _hook_name(hook: Any) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def _input_names(root: nn.Module) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(root.forward).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _is_uncertain(value: Any) -> bool:
    return isinstance(value, Moments) or (isinstance(value, Tensor) and value.is_floating_point())


def _refuse_stored_results(root: nn.Module) -> None:
    """Raise where a forward assigns a buffer."""
    for path, module in root.named_modules():
        for table in _TABLES:
            for name, value in vars(module)[table].items():
                if isinstance(value, fx.Proxy):
                    raise ModelError(
                        f"{type(root).__name__} stores what it computes in '{f'{path}.' if path else ''}{name}', which "
                        "torch.fx would lose."
                    )


_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def _left_untouched(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Undo what a traced forward stores on the model; the tensors that torch.fx puts there are what it yields."""
    before = [(module, dict(vars(module)), [dict(vars(module)[t]) for t in _TABLES]) for module in root.modules()]
    constants: dict[str, Tensor] = {}
    try:
        yield constants
        _refuse_stored_results(root)
    finally:
        for name in set(vars(root)) - set(before[0][1]):
            if isinstance(vars(root)[name], Tensor):
                constants[name] = vars(root)[name]
        for module, attributes, tables in before:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in zip(_TABLES, tables, strict=True):
                vars(module)[table].clear()
                vars(module)[table].update(content)
