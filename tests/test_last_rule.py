"""A rule of the user's on the last operation: nothing comes after it that would fail on what it returns."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from adfify import Moments, adfify
from adfify.cli import app
from adfify.errors import RuleError
from adfify.network import ADFNetwork
from adfify.registry import RULES, Rules

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return swish(self.a(x))


def _other_shape(x: Moments) -> Moments:
    return Moments(x.mean[:, :3], x.variance[:, :3])


def _more_axes(x: Moments) -> Moments:
    return Moments(x.mean[None], x.variance[None])


def _a_tensor(x: Moments) -> Moments:
    return x.mean  # type: ignore[return-value]


def _negative(x: Moments) -> Moments:
    result = Moments(x.mean, x.variance)
    object.__setattr__(result, "variance", -x.variance)
    return result


def _not_a_number(x: Moments) -> Moments:
    return Moments(x.mean * float("nan"), x.variance)


def _right(x: Moments) -> Moments:
    return Moments(swish(x.mean), x.variance)


SAID = {
    _other_shape: r"Moments of shape \(2, 3\), float32, on cpu, and not Moments of shape \(2, 4\)",
    _more_axes: r"Moments of shape \(1, 2, 4\), float32, on cpu, and not Moments of shape \(2, 4\)",
    _a_tensor: "a Tensor of shape",
    _negative: "a variance of -",
    _not_a_number: "holds NaN, of what holds none",
}


def _network(rule: Callable[..., Any]) -> ADFNetwork:
    rules = Rules(RULES)
    rules.register(swish)(rule)
    return adfify(Net().eval(), rules=rules)


@pytest.mark.parametrize("rule", SAID)
def test_what_is_wrong_with_its_result_is_said(rule: Callable[..., Any]) -> None:
    adf = _network(rule)
    line = inspect.getsourcelines(rule)[1]
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        for _ in range(2):
            with pytest.raises(RuleError, match=SAID[rule]) as caught:
                network(X)
            assert f"so the rule at {__file__}:{line} is wrong" in str(caught.value)
            assert caught.value.location.startswith(f"{__file__}:")
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_right_rule_is_run_beside_the_original_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from adfify import failures

    adf, runs = _network(_right), []
    of_original = failures._of_original
    monkeypatch.setattr(failures, "_of_original", lambda *given: runs.append(1) or of_original(*given))
    for _ in range(3):
        assert torch.equal(adf(X).mean, swish(adf.a(Moments(X, torch.zeros_like(X))).mean))
    assert len(runs) == 1
    adf(torch.cat([X, X]))
    assert len(runs) == 2


def test_it_is_seen_where_it_comes_later() -> None:
    def sometimes(x: Moments) -> Moments:
        return _negative(x) if float(x.mean.sum()) > 0 else _right(x)

    adf = _network(sometimes)
    with torch.no_grad():
        adf.a.bias.fill_(-10.0)
        adf(X)
        adf.a.bias.fill_(10.0)
    with pytest.raises(RuleError, match="a variance of -"):
        adf(X)


def test_the_command_line_says_whose_fault_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from adfify import prediction

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuleError("relu", "torch.relu", "adfify.nn.relu", "net.py:3", "KeyError: 'nothing'")

    monkeypatch.setattr(prediction, "open_model", broken)
    result = CliRunner().invoke(app, ["inspect", "demo"])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert "a fault of adfify" in result.output
    assert "report" in result.output
    assert "Traceback" not in result.output
