"""Functions without a module, as those of exec are, can be registered like any other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify, inspect, supported
from adfify.registry import RULES, Rule


def homeless(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"Moments": Moments}
    exec(source, names)
    function: Callable[..., Any] = names["f"]
    assert function.__module__ is None
    return function


double: Callable[..., Any] = torch.neg  # replaced in the test


double: Callable[..., Any] = torch.neg  # replaced in the test


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return double(x) + double(self.known)  # the second is certain, and stays the original's


@pytest.fixture
def registered(monkeypatch) -> Iterator[None]:
    function = homeless("def f(x): return 2 * x if x.sum() > -1e9 else x")  # a branch: only as a leaf it can be traced
    rule = homeless("def f(x): return Moments(2 * x.mean, 4 * x.variance)")
    RULES.register(function)(rule)
    monkeypatch.setattr(sys.modules[__name__], "double", function)
    yield
    del RULES._rules[function]


def test_a_function_without_a_module_breaks_nothing(registered):
    model = Doubled()
    plan = inspect(model)
    assert not plan.missing
    assert "f" in str(plan)
    assert all(rule.name for rule in supported())
    adf = adfify(model, noise_variance=0.25)
    mean, variance = adf(torch.tensor([[1.0, 3.0]]))
    assert mean.tolist() == [[4.0, 8.0]]
    assert variance.tolist() == [[1.0, 1.0]]
    assert adf.plan
    assert "f" in adf.code


@pytest.mark.parametrize("apply", [torch.relu, functools.partial(torch.relu)], ids=["builtin", "partial"])
def test_every_rule_has_a_name(apply):
    rule = Rule((torch.relu,), apply, "custom", False, "", 0.0, False, {}, ())
    assert rule.name
    assert "None" not in rule.name
