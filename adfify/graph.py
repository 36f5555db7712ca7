"""The rewriter: plan what becomes of every operation of a traced model, then apply the plan.

Nothing else edits graphs. One node in gives one node out with the same name, so at zero variance the
network computes what the original does, and its code reads like the original's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Set
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from adfify import (
    arguments,
    chains,
    chosen,
    complex_kinds,
    dependence,
    inplace,
    locations,
    random_draws,
    reading,
    repeated,
    sizes,
    tracing,
)
from adfify.arguments import Call, call_of
from adfify.call_forms import nodes_in
from adfify.chains import OfOneVariable
from adfify.errors import MissingOp, UnsupportedOpsError
from adfify.inplace import target_of
from adfify.mask_kinds import Masks
from adfify.moments import as_moments, lift, mean_of
from adfify.network import WHOLE, ADFNetwork
from adfify.nn.dropout import mask_rule
from adfify.nn.writing import Written
from adfify.original import OnCopy, Operation, Origin, identity, named, of_node
from adfify.reasons import reason_for
from adfify.registry import RULES, Rule, Rules, target_name
from adfify.signatures import Place
from adfify.skeleton import CONTAINERS, Skeleton, holding

Action = Literal["input", "convert", "lift", "build", "keep", "missing", "unused", "output"]


@dataclass(frozen=True)
class Step:
    """What becomes of one node of the traced graph.

    Attributes:
        node: the node.
        action: ``input`` becomes Moments, ``convert`` follows ``rule``, ``lift`` does so on a certain tensor taken
            with variance 0, ``build`` puts values into a dataclass or named tuple, ``keep`` carries no variance and
            stays as it is, ``missing`` has no rule, ``unused`` is read by no output and left out, ``output``.
        rule: the rule followed.
        op: the operation as the user knows it.
        missing: the operations without a rule; several for a module with children.
        call: how the rule is called, where one is followed.
        of: where several operands are functions of one variable, that variable.
        described: uncertain arguments of what is kept, which reads nothing but their dtype, shape or device.
    """

    node: fx.Node
    action: Action
    op: str
    rule: Rule | None = None
    missing: tuple[MissingOp, ...] = ()
    call: Call | None = None
    of: OfOneVariable | None = None
    described: frozenset[fx.Node] = frozenset()


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

    def __str__(self) -> str:
        """One line for each operation: its name in the graph, what it is, and the rule or why there is none."""
        lines = [f"{self.model}, traced by {self.traced.engine}:"]
        for step in self.steps:
            rule = step.rule.name if step.rule is not None and step.action == "convert" else ""
            said = "; ".join(op.reason for op in step.missing) or rule
            lines.append(f"  {step.node.name:24} {step.action:8} {step.op:36} {said}".rstrip())
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """The steps as plain data, for JSON: node, action, op, module path, rule, exact."""
        return [
            {
                "node": step.node.name,
                "action": step.action,
                "op": step.op,
                "path": step.node.target if step.node.op == "call_module" else locations.module_path(step.node),
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
    steps = _steps(traced, rules, frozenset())
    mixed = _mixed_modules(steps, traced.root)
    return Plan(traced, tuple(_steps(traced, rules, mixed) if mixed else steps), rules)


def _steps(traced: tracing.Traced, rules: Rules, lifted: Set[int]) -> list[Step]:
    live = reading.live(traced.graph) | reading.ancestors(list(traced.gaps))
    uncertain: set[fx.Node] = set()
    complex_nodes: set[fx.Node] = set()
    planned: dict[fx.Node, Rule] = {}
    masks = Masks(traced, uncertain, set())
    first = repeated.first_of(traced.graph, traced.root, rules)
    steps = []
    for node in traced.graph.nodes:
        if node not in live:
            steps.append(Step(node, "unused", _op(node, traced.root)))
            continue
        step = _of_known_kind(_step(node, traced, rules, uncertain, masks), complex_nodes, live)
        if complex_kinds.is_complex(node, _rule_of(node, traced.root, rules), traced, complex_nodes):
            complex_nodes.add(node)
        if node.op == "call_module" and id(traced.root.get_submodule(str(node.target))) in lifted:
            step = _lifted(step, traced, rules)
        if step.action == "convert" and step.rule is not None:
            planned[node] = step.rule
            masks.add(node, step.rule)
            of = chains.of_one_variable(node, traced.root, rules, uncertain - complex_nodes, planned, first)
            if of is not None:
                step = replace(step, rule=of.rule, of=of)
            elif reason := dependence.reason(node, uncertain, planned, first):
                step = Step(node, "missing", step.op, step.rule, (_missing(node, step.op, reason),))
        certain = step.action in ("keep", "output") or (step.action == "convert" and step.rule and step.rule.certain)
        if not certain:
            uncertain.add(node)
        steps.append(step)
    return steps


def _rule_of(node: fx.Node, root: nn.Module, rules: Rules) -> Rule | None:
    return rules.find(target_of(node, root)) if node.op.startswith("call_") else None


def _of_known_kind(step: Step, complex_nodes: Set[fx.Node], live: Set[fx.Node]) -> Step:
    """The step, or a missing one where a complex value meets a rule for real ones, or random positions are used."""
    if step.action != "convert" or step.rule is None or step.call is None:
        return step
    reason = complex_kinds.misfit(step.node, step.rule, complex_nodes)
    reason = reason or chosen.misuse(step.node, step.rule, step.call, live)
    return Step(step.node, "missing", step.op, step.rule, (_missing(step.node, step.op, reason),)) if reason else step


# Note [A module called on both]
# A module that is called on an uncertain tensor in one place and on a certain one in another (the two sides of a
# Siamese network) has one counterpart, which takes Moments: what is certain is given to it with variance 0.


def _mixed_modules(steps: list[Step], root: nn.Module) -> Set[int]:
    """Ids of the modules that are called on uncertain tensors and on certain ones."""
    called = [step for step in steps if step.node.op == "call_module"]
    ids = {
        action: {id(root.get_submodule(str(step.node.target))) for step in called if step.action == action}
        for action in ("convert", "keep")
    }
    return ids["convert"] & ids["keep"]


def _lifted(step: Step, traced: tracing.Traced, rules: Rules) -> Step:
    if step.action != "keep":
        return step
    # What is planned as if its inputs were uncertain is then given them as Moments of variance 0.
    every = set(step.node.all_input_nodes)
    other = _step(step.node, traced, rules, every, Masks(traced, every, set()))
    if other.action != "convert" or other.call is None:
        return other
    return Step(step.node, "lift", step.op, other.rule, call=other.call.all_lifted())


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
    if id(plan.traced.root) in {*converted, *kept}:
        root = holding(root)
    return ADFNetwork(root, graph, plan.model, noise_variance, plan.records(), plan.traced.signature)


def _rewrite(plan: Plan, min_variance: float) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    absorbed = {node for step in plan.steps if step.of is not None for node in step.of.through}
    spare: list[fx.Node] = []  # what a composition computes by itself, and nothing else may need
    for step in plan.steps:
        if step.action == "unused":
            continue
        new = env[step.node] = _emit(graph, step, env, plan.traced.root)
        follows = step.rule if step.action in ("convert", "lift") else None
        if follows is not None and _asks_for_min_variance(follows):
            new.kwargs = {**new.kwargs, "min_variance": min_variance}
        if step.action == "input":
            noise = graph.create_node("get_attr", "noise_variance", name="noise_variance")
            env[step.node] = graph.create_node(
                "call_function", as_moments, (new, noise, str(step.node.target)), name=f"{step.node.name}_moments"
            )
            env[step.node].meta["origin"] = Origin(identity)
        if follows is not None and plan.rules.keeps(follows) and min_variance > 0:
            env[step.node] = graph.create_node(
                "call_function", plan.rules.keep_variance, (new, min_variance), name=f"{step.node.name}_kept"
            )
            env[step.node].meta["origin"] = Origin(identity)
        if step.node in absorbed:
            spare += dict.fromkeys((new, env[step.node]))
    for node in reversed(spare):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _emit(graph: fx.Graph, step: Step, env: dict[fx.Node, fx.Node], root: nn.Module) -> fx.Node:
    node = step.node
    if step.of is not None and step.rule is not None:
        given = tuple(env[value] for value in (step.of.base, *step.of.certain))
        new = graph.create_node("call_function", step.rule.apply, given, {}, name=node.name)
        new.meta = {**node.meta, **_origin(step, root, step.of.function)}
        return new
    if step.action == "keep" and (step.described or inplace.written_by(node, root) is not None):
        return _kept(graph, step, env, root)
    if step.rule is None or step.call is None or step.action not in ("convert", "lift"):
        new = graph.node_copy(node, env.__getitem__)
        if node.op == "call_module":
            new.target = node.target or WHOLE
        return new
    args, kwargs = _given(graph, step.call, env)
    if node.op == "call_module":
        new = graph.create_node("call_module", node.target or WHOLE, args, kwargs, name=node.name)
        new.meta = {**node.meta, **_origin(step, root, None)}
        return new
    new = graph.create_node("call_function", step.rule.apply, args, kwargs, name=node.name)
    new.meta = {**node.meta, **_origin(step, root, of_node(node, root))}
    return new


def _given(graph: fx.Graph, call: Call, env: dict[fx.Node, fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rule's call in the new graph, those that have to be lifted lifted."""
    lifted: dict[fx.Node, fx.Node] = {}
    for known in dict.fromkeys(node for place, value in call.places() for node in nodes_in(value)):
        if any(node is known for _, node in call.lifts):
            lifted[known] = graph.call_function(lift, (env[known],))
            lifted[known].meta["origin"] = Origin(identity)

    def given(place: Place, value: Any) -> Any:
        return fx.map_arg(value, lambda node: lifted[node] if (place, node) in call.lifts else env[node])

    args = tuple(given(place, value) for place, value in enumerate(call.args))
    return args, {name: given(name, value) for name, value in call.kwargs.items()}


# Note [Kept writes]
# What carries no variance stays as the user wrote it, and where it writes in place it would write into the user's own
# input, into a buffer, or into a constant that the next call starts from. So it works on a copy.


def _kept(graph: fx.Graph, step: Step, env: dict[fx.Node, fx.Node], root: nn.Module) -> fx.Node:
    """What stays as it is, and writes (see Note [Kept writes]) or reads the metadata of what is uncertain."""
    node = step.node

    def given(value: fx.Node) -> fx.Node:
        if value not in step.described:
            return env[value]
        mean = graph.call_function(mean_of, (env[value],))
        mean.meta["origin"] = Origin(identity)
        return mean

    writes = inplace.written_by(node, root) is not None
    if writes and node.op == "call_module":
        copy = graph.call_method("clone", (env[node.args[0]],))  # type: ignore[index]
        return graph.node_copy(node, lambda value: copy if value is node.args[0] else env[value])
    if not writes:
        return graph.node_copy(node, given)
    args, kwargs = fx.map_arg((call_of(node).args, node.kwargs), given)
    new = graph.create_node("call_function", OnCopy(named(node)), tuple(args), dict(kwargs), name=node.name)
    new.meta = dict(node.meta)
    return new


def _origin(step: Step, root: nn.Module, operation: Operation | None) -> dict[str, Any]:
    """What a node remembers: see Note [The original beside the rule]."""
    if step.rule is None:
        return {"origin": Origin(operation)}
    mask = mask_rule(target_of(step.node, root), step.rule)
    draws = mask.apply if mask is not None else None
    return {"origin": Origin(operation, step.rule.family, step.rule.exact, draws, step.rule.continuous)}


def _asks_for_min_variance(rule: Rule) -> bool:
    """Whether a rule takes ``min_variance`` itself, because it keeps a variance between two of its own steps."""
    call = rule.apply.forward if isinstance(rule.apply, type) else rule.apply  # type: ignore[attr-defined]
    return "min_variance" in inspect.signature(call).parameters


def _step(node: fx.Node, traced: tracing.Traced, rules: Rules, uncertain: set[fx.Node], masks: Masks) -> Step:
    if node.op == "placeholder":
        certain = str(node.target) in traced.certain_inputs
        return Step(node, "keep" if certain else "input", "input")
    if node.op == "output":
        return Step(node, "output", "output")
    if node.op == "get_attr":
        return Step(node, "keep", "parameter or buffer")
    target = target_of(node, traced.root)
    op = target_name(target)
    if node in traced.gaps:
        return Step(node, "missing", op, None, (_missing(node, op, traced.gaps[node]),))
    if target is sizes.check:
        return Step(node, "keep", op)
    rule = target.rule if isinstance(target, Written) else rules.find(target)
    touched = frozenset(argument for argument in node.all_input_nodes if argument in uncertain)
    described = touched & reading.described(node, traced.root, rules)
    if not touched or (touched == described and not (rule is not None and rule.certain)):
        return _certain(node, op, described, traced.root, rules)
    if node.op == "call_function" and isinstance(target, type) and _is_record(target):
        return Step(node, "build", op)
    if rule is None:
        random = random_draws.draws(node, traced.root)
        reason = random_draws.REASON if random else reason_for(target)
        return Step(node, "missing", op, None, (_missing(node, op, reason),))
    rule = masks.rule(node, rule)
    if reason := masks.misfit(node, rule):
        return Step(node, "missing", op, rule, (_missing(node, op, reason),))
    module = traced.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = arguments.fit(node, target, rule, module, uncertain)
    if isinstance(call, str):
        return Step(node, "missing", op, rule, (_missing(node, op, call),))
    if module is not None:
        children = tuple(_missing_children(node, module, rule, rules))
        if children:
            return Step(node, "missing", op, rule, children)
    return Step(node, "convert", op, rule, call=call)


def _certain(node: fx.Node, op: str, described: frozenset[fx.Node], root: nn.Module, rules: Rules) -> Step:
    """The step of what has no uncertain input, and is certain unless it draws random numbers."""
    # Note [No uncertain input, no conversion]
    # Shapes, sizes, assertions, position embeddings: what carries no variance stays as the user wrote it.
    rule = rules.find(target_of(node, root))
    if rule is not None and rule.family == "dropout":
        # The policy decides on dropout, not the training flag.
        random = RULES.find(target_of(node, root)) is not rule or random_draws.draws(node, root)
        return _of_certain("lift", node, op, rule, root) if random else Step(node, "keep", op)
    if not random_draws.draws(node, root):
        return Step(node, "keep", op, described=described)
    if rule is None or rule.apply.__module__.startswith("adfify."):  # F.rrelu's is that of a random argument
        return Step(node, "missing", op, None, (_missing(node, op, random_draws.REASON),))
    return _of_certain("convert", node, op, rule, root)


def _of_certain(action: Literal["lift", "convert"], node: fx.Node, op: str, rule: Rule, root: nn.Module) -> Step:
    """The step of a rule that is called on nothing uncertain: what it needs as Moments, for a lift all, is lifted."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = arguments.fit(node, target_of(node, root), rule, module, set())
    if isinstance(call, str):
        return Step(node, "missing", op, rule, (_missing(node, op, call),))
    return Step(node, action, op, rule, call=call.all_lifted() if action == "lift" else call)


def _op(node: fx.Node, root: nn.Module) -> str:
    """A node's operation as the user knows it."""
    return target_name(target_of(node, root)) if node.op.startswith("call") else node.op


def _is_record(kind: type) -> bool:
    """Whether it is a dataclass or a named tuple: what a model returns its outputs in."""
    return is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def _missing(node: fx.Node, op: str, reason: str) -> MissingOp:
    path = str(node.target) if node.op == "call_module" else locations.module_path(node)
    return MissingOp(op, path, locations.source_line(node), reason)


def _missing_children(node: fx.Node, module: nn.Module, rule: Rule, rules: Rules) -> Iterator[MissingOp]:
    """Of a module whose rule calls its converted children: those that have no rule themselves."""
    if getattr(rule.apply, "converts_children", False):
        yield from _missing_below(node, module, str(node.target), rules)


def _missing_below(node: fx.Node, module: nn.Module, above: str, rules: Rules) -> Iterator[MissingOp]:
    for name, child in module.named_children():
        op, path = target_name(type(child)), f"{above}.{name}"
        found = rules.find(type(child))
        if found is None and type(child) not in CONTAINERS:
            yield MissingOp(op, path, locations.source_line(node), "there is no rule for it")
        elif found is None or getattr(found.apply, "converts_children", False):
            yield from _missing_below(node, child, path, rules)
