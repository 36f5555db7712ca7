"""The converted network's tree of modules: the source's, path by path, with ADF modules where rules put them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor, nn

from adfify.network import WHOLE
from adfify.nn.module import counterpart
from adfify.registry import Rules
from adfify.tracing import Traced

# Containers that are worth keeping as what they are: they can be indexed and iterated.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Scope(nn.Module):
    """Holds the parameters and children of a module whose forward is now part of the graph."""

    def __init__(self, original: str) -> None:
        super().__init__()
        self.original = original

    def _get_name(self) -> str:
        return self.original


def holding(whole: nn.Module) -> Scope:
    """A module that calls another, and has its parameters, buffers and children.

    See Note [A module that is the whole model], adfify.network.
    """
    scope = Scope(type(whole).__name__)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        scope.__dict__[table] = whole.__dict__[table]
    scope.__dict__[WHOLE] = whole
    return scope


def _replacing(source: nn.Module, adf_class: Any) -> nn.Module:
    """The counterpart of a module, which knows what it stands for: see Note [The original beside the rule]."""
    target = counterpart(source, adf_class)
    target.__dict__["replaces"] = type(source)
    return target


class Skeleton:
    """Mirrors a tree of modules; what is shared in the source (tied weights, a module used twice) stays shared.

    Args:
        rules: the table, for the children of converted modules.
        converted: the ADF class for each module that the graph calls on Moments, by the module's id.
        kept: ids of the modules that the graph calls on plain tensors.
        share_weights: use the source's own parameters and buffers instead of copies.
    """

    def __init__(self, rules: Rules, converted: Mapping[int, Any], kept: Set[int], share_weights: bool) -> None:
        self._rules = rules
        self._converted = converted
        self._kept = kept
        self._share_weights = share_weights
        self._mirrored: dict[int, nn.Module] = {}
        self._copies: dict[int, Any] = {}  # deepcopy's memo: one copy of what is tied

    def mirror(self, traced: Traced) -> nn.Module:
        """The whole tree, in the source's order, with the tracer's constants as non-persistent buffers."""
        root = self._mirror(traced.root)
        for name, tensor in traced.constants.items():
            root.register_buffer(name, tensor, persistent=False)
        return root

    def _mirror(self, source: nn.Module) -> nn.Module:
        adf_class = self._converted.get(id(source))
        if adf_class is not None:
            below = self._by_rule if adf_class.converts_children else self._plain
            return self._fill(source, lambda: _replacing(source, adf_class), below)
        if type(source) in CONTAINERS:
            return self._fill(source, lambda: counterpart(source, type(source)), self._mirror)
        if id(source) in self._kept:
            return self._plain(source)
        scope = self._fill(source, lambda: Scope(type(source).__qualname__), self._mirror)
        for name, value in vars(source).items():
            if isinstance(value, Tensor):  # a tensor that is neither parameter nor buffer: the graph may refer to it
                scope.register_buffer(name, self._weight(value), persistent=False)
        return scope

    def _by_rule(self, source: nn.Module) -> nn.Module:
        """A child of a converted module: converted by the rule of its own class; containers are looked through."""
        if type(source) in CONTAINERS:
            return self._fill(source, lambda: counterpart(source, type(source)), self._by_rule)
        rule = self._rules.find(type(source))
        assert rule is not None, f"the plan let {type(source).__name__} pass without a rule"
        below = self._by_rule if rule.apply.converts_children else self._plain  # type: ignore[attr-defined]
        return self._fill(source, lambda: _replacing(source, rule.apply), below)

    def _plain(self, source: nn.Module) -> nn.Module:
        return self._fill(source, lambda: counterpart(source, type(source)), self._plain)

    def _fill(
        self, source: nn.Module, make: Callable[[], nn.Module], below: Callable[[nn.Module], nn.Module]
    ) -> nn.Module:
        """Make the counterpart, once, and give it parameters, buffers and children in the source's order."""
        if id(source) in self._mirrored:
            return self._mirrored[id(source)]
        target = self._mirrored[id(source)] = make()
        target.training = source.training
        target._parameters = {name: self._weight(value) for name, value in source._parameters.items()}
        target._buffers = {name: self._weight(value) for name, value in source._buffers.items()}
        target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
        target._modules = {name: None if child is None else below(child) for name, child in source._modules.items()}
        return target

    def _weight(self, tensor: Any) -> Any:
        return tensor if self._share_weights else copy.deepcopy(tensor, self._copies)
