"""The rewriter: plan what becomes of every operation of a traced model, then apply the plan.

Nothing else edits graphs. One node in gives one node out with the same name, so at zero variance the
network computes what the original does, and its code reads like the original's.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from adfify import tracing
from adfify.errors import MissingOp, UnsupportedOpsError
from adfify.moments import as_moments
from adfify.network import ADFNetwork
from adfify.registry import Rule, Rules, Target, target_name
from adfify.skeleton import Skeleton

Action = Literal["input", "convert", "keep", "missing", "output"]


@dataclass(frozen=True)
class Step:
    """What becomes of one node of the traced graph.

    Attributes:
        node: the node.
        action: ``input`` becomes Moments, ``convert`` follows ``rule``, ``keep`` carries no variance and stays
            as it is, ``missing`` has no rule, ``output``.
        rule: the rule followed.
        op: the operation as the user knows it.
        missing: the operations without a rule; several for a module with children.
    """

    node: fx.Node
    action: Action
    op: str
    rule: Rule | None = None
    missing: tuple[MissingOp, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What becomes of a model: the traced graph and a :class:`Step` for every node."""

    traced: tracing.Traced
    steps: tuple[Step, ...]
    rules: Rules

    @property
    def model(self) -> str:
        """The model's class name."""
        return type(self.traced.root).__name__

    @property
    def missing(self) -> tuple[MissingOp, ...]:
        """Every place without a rule."""
        return tuple(op for step in self.steps for op in step.missing)

    def records(self) -> list[dict[str, Any]]:
        """The steps as plain data, for JSON: node, action, op, module path, rule, exact."""
        return [
            {
                "node": step.node.name,
                "action": step.action,
                "op": step.op,
                "path": step.node.target if step.node.op == "call_module" else tracing.module_path(step.node),
                "rule": step.rule.name if step.rule else None,
                "exact": step.rule.exact if step.rule else None,
                "missing": [str(op) for op in step.missing],
            }
            for step in self.steps
        ]


# Note [Plan on the untouched model, then apply]
# torchvision calls `layer1.0.relu` at two nodes: a rewriter that converts as it goes finds at the second one
# a module that is already converted. It also lets every missing operation be listed at once.


def plan(traced: tracing.Traced, rules: Rules) -> Plan:
    """Decide what becomes of every node, without touching the model."""
    unsafe = _functionalize(traced, rules)
    uncertain: set[fx.Node] = set()
    steps = []
    for node in traced.graph.nodes:
        step = _step(node, traced, rules, uncertain)
        if node in unsafe:
            step = Step(node, "missing", step.op, None, (_missing(node, step.op, unsafe[node]),))
        if step.action == "input" or (step.action == "convert" and step.rule and not step.rule.certain):
            uncertain.add(node)
        if step.action == "missing":
            uncertain.add(node)
        steps.append(step)
    return Plan(traced, tuple(steps), rules)


def apply(plan: Plan, noise_variance: float, min_variance: float, share_weights: bool) -> ADFNetwork:
    """Build the ADF network that a plan describes.

    Raises:
        UnsupportedOpsError: the plan has missing operations; all are listed.
    """
    if plan.missing:
        raise UnsupportedOpsError(plan.model, plan.missing)
    called = [
        (id(plan.traced.root.get_submodule(str(step.node.target))), step)
        for step in plan.steps
        if step.node.op == "call_module"
    ]
    converted = {module: step.rule.apply for module, step in called if step.rule is not None}
    kept = {module for module, step in called if step.action == "keep"}
    root = Skeleton(plan.rules, converted, kept, share_weights).mirror(plan.traced)
    graph = _rewrite(plan, min_variance)
    return ADFNetwork(root, graph, plan.model, noise_variance, plan.records())


def _rewrite(plan: Plan, min_variance: float) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for step in plan.steps:
        new = env[step.node] = _emit(graph, step, env)
        if step.rule is not None and step.action == "convert" and _asks_for_min_variance(step.rule):
            new.kwargs = {**new.kwargs, "min_variance": min_variance}
        if step.action == "input":
            noise = graph.create_node("get_attr", "noise_variance", name="noise_variance")
            env[step.node] = graph.create_node(
                "call_function", as_moments, (new, noise, str(step.node.target)), name=f"{step.node.name}_moments"
            )
        if step.action == "convert" and step.rule is not None and step.rule.keeps and min_variance > 0:
            env[step.node] = graph.create_node(
                "call_function", plan.rules.keep_variance, (new, min_variance), name=f"{step.node.name}_kept"
            )
    graph.lint()
    return graph


def _emit(graph: fx.Graph, step: Step, env: dict[fx.Node, fx.Node]) -> fx.Node:
    node = step.node
    if step.action != "convert" or step.rule is None or node.op == "call_module":
        return graph.node_copy(node, env.__getitem__)
    args, kwargs = fx.map_arg((_call_args(node), node.kwargs), env.__getitem__)
    new = graph.create_node("call_function", step.rule.apply, tuple(args), dict(kwargs), name=node.name)
    new.meta = dict(node.meta)
    return new


def _asks_for_min_variance(rule: Rule) -> bool:
    """Whether a rule takes ``min_variance`` itself, because it keeps a variance between two of its own steps."""
    call = rule.apply.forward if isinstance(rule.apply, type) else rule.apply  # type: ignore[attr-defined]
    return "min_variance" in inspect.signature(call).parameters


def _step(node: fx.Node, traced: tracing.Traced, rules: Rules, uncertain: set[fx.Node]) -> Step:
    if node.op == "placeholder":
        certain = str(node.target) in traced.certain_inputs
        return Step(node, "keep" if certain else "input", "input")
    if node.op == "output":
        return Step(node, "output", "output")
    if node.op == "get_attr":
        return Step(node, "keep", "parameter or buffer")
    target = _target(node, traced.root)
    op = target_name(target)
    if not any(argument in uncertain for argument in node.all_input_nodes):
        # Note [No uncertain input, no conversion]
        # Shapes, sizes, assertions, position embeddings: what carries no variance stays as the user wrote it.
        return Step(node, "keep", op)
    rule = rules.find(target)
    if rule is None:
        return Step(node, "missing", op, None, (_missing(node, op, "there is no rule for it"),))
    module = traced.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    misfit = _misfit(node, rule, module, uncertain)
    if misfit:
        return Step(node, "missing", op, rule, (_missing(node, op, misfit),))
    if module is not None:
        children = tuple(_missing_children(node, module, rule, rules))
        if children:
            return Step(node, "missing", op, rule, children)
    return Step(node, "convert", op, rule)


def _target(node: fx.Node, root: nn.Module) -> Target:
    """What the registry knows a node by."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target)))
    if node.target is getattr:
        return f".{node.args[1]}"
    return node.target


def _call_args(node: fx.Node) -> tuple[Any, ...]:
    return node.args[:1] if node.target is getattr else node.args


def _missing(node: fx.Node, op: str, reason: str) -> MissingOp:
    path = str(node.target) if node.op == "call_module" else tracing.module_path(node)
    return MissingOp(op, path, tracing.source_line(node), reason)


def _missing_children(node: fx.Node, module: nn.Module, rule: Rule, rules: Rules) -> Iterator[MissingOp]:
    """Of a module whose rule calls its converted children: those that have no rule themselves."""
    if not getattr(rule.apply, "converts_children", False):
        return
    for name, child in module.named_children():
        op, path = target_name(type(child)), f"{node.target}.{name}"
        found = rules.find(type(child))
        if found is None:
            yield MissingOp(op, path, tracing.source_line(node), "there is no rule for it")
        else:
            yield from _missing_children(node, child, found, rules)


def _misfit(node: fx.Node, rule: Rule, module: nn.Module | None, uncertain: set[fx.Node]) -> str:
    """Why a rule can't take the arguments of this node, or ``""``."""
    if isinstance(rule.apply, type):
        signature = inspect.signature(rule.apply.forward)  # type: ignore[attr-defined]
        args: tuple[Any, ...] = (None, *node.args)
    else:
        signature, args = inspect.signature(rule.apply), _call_args(node)
    try:
        bound = signature.bind(*args, **node.kwargs)
    except TypeError as error:
        return f"the rule {rule.name}{signature} does not take these arguments: {error}"
    for name, allowed in rule.only.items():
        given = bound.arguments.get(name, getattr(module, name, allowed))
        if given != allowed:
            return f"there is a rule only for {name}={allowed!r}, and it is {given!r} here"
    for name, value in bound.arguments.items():
        kind = str(signature.parameters[name].annotation)
        random = any(used in uncertain for used in _nodes_in(value))
        if random and "Moments" not in kind and kind not in _ANY:
            return f"its argument '{name}' is uncertain here, and the rule {rule.name} takes it only as certain"
        if not random and kind == "Moments":
            return f"its argument '{name}' is certain here, and the rule {rule.name} takes it only as uncertain"
    return ""


_ANY = ("Any", "typing.Any", str(inspect.Parameter.empty))


def _nodes_in(value: Any) -> Sequence[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


# Note [In-place operations]
# A rule never writes into its input. Where the original does, every later reader of that input must see the
# result, so those readers are pointed at it. What can't be expressed so, a write through a view of a tensor that is
# read afterwards, is reported as missing rather than computed wrongly.


def _functionalize(traced: tracing.Traced, rules: Rules) -> dict[fx.Node, str]:
    """Point later readers of a tensor written in place at the result; the rest comes back with its reason."""
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    unsafe: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        written = _written(node, traced.root)
        if written is None:
            continue
        for alias in _aliases(written, traced.root, rules):
            if alias is not node and any(order[user] > order[node] for user in alias.users):
                unsafe[node] = f"it writes in place into a tensor that '{alias.name}' shares, which is read afterwards"
        for user in [user for user in written.users if order[user] > order[node]]:
            user.replace_input_with(written, node)
    return unsafe


def _aliases(written: fx.Node, root: nn.Module, rules: Rules) -> set[fx.Node]:
    """Nodes that may share the memory of ``written``, itself left out."""

    def shares(node: fx.Node) -> fx.Node | None:
        """The node of whose memory ``node`` may be a view."""
        if node.op not in ("call_function", "call_method", "call_module") or not node.args:
            return None
        if _written(node, root) is not None:
            return None
        rule = rules.find(_target(node, root))
        source = node.args[0]
        return source if rule is not None and rule.alias and isinstance(source, fx.Node) else None

    base = written
    while (source := shares(base)) is not None:
        base = source
    group, queue = {base}, [base]
    while queue:
        current = queue.pop()
        new = [user for user in current.users if user not in group and shares(user) is current]
        group.update(new)
        queue += new
    return group - {written}


def _written(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The node into whose tensor this one writes, if it does."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return None
    if node.op == "call_module":
        writes = getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    elif node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        writes = _function_writes(node)
    else:
        return None
    return node.args[0] if writes else None


_INPLACE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
)


def _function_writes(node: fx.Node) -> bool:
    function = node.target
    assert callable(function)
    if isinstance(function, torch._ops.OpOverload):
        written = function._schema.arguments[0].alias_info
        return written is not None and written.is_write
    name = getattr(function, "__name__", "")
    if function in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.kwargs.get("inplace") is True:
        return True
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature has no `inplace` argument either
        return False
    if "inplace" not in parameters:
        return False
    position = parameters.index("inplace")
    return len(node.args) > position and node.args[position] is True
