"""What a forward counts from call to call: refused where it decides anything, in whatever call; harmless otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import ModelError

CALLS = 0


class Net(nn.Module):
    def __init__(self, step: Callable[..., Tensor], asks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.asks, self.a = step, asks, nn.Linear(4, 4)
        self.calls, self.share, self.seen, self.last = 0, 0.0, {"calls": 0}, deque(maxlen=8)
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and not isinstance(x, Tensor):  # which torch.export answers
            return x
        return self.step(self, x)


def _late(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return net.a(x) * 2 if net.calls > 3 else net.a(x)


def _in_one_call(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return net.a(x) * 2 if net.calls == 37 else net.a(x)


def _now_and_then(net: Net, x: Tensor) -> Tensor:
    net.calls = net.calls + 1
    return x if net.calls % 10 == 9 else net.a(x)


def _in_a_table(net: Net, x: Tensor) -> Tensor:
    net.seen["calls"] += 1
    return x if net.seen["calls"] >= 5 else net.a(x)


def _warming_up(net: Net, x: Tensor) -> Tensor:
    net.share += 0.25
    return x if not net.share < 1 else net.a(x)


def _at_most(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return net.a(x) * max(net.calls, 5)


def _of_the_module(net: Net, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return x if CALLS > 4 else net.a(x)


def _as_long_as(net: Net, x: Tensor) -> Tensor:
    net.history.append(1)
    return x if len(net.history) > 4 else net.a(x)


def _as_long_as_kept(net: Net, x: Tensor) -> Tensor:
    net.last.append(0)
    return x if len(net.last) == 8 else net.a(x)


DECIDING = {
    _late: "calls", _in_one_call: "calls", _now_and_then: "calls", _in_a_table: "seen", _warming_up: "share",
    _at_most: "calls", _of_the_module: "CALLS", _as_long_as: "history", _as_long_as_kept: "last",
}  # fmt: skip


@pytest.mark.parametrize("asks", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("step", DECIDING)
def test_a_count_that_decides_is_refused_by_name(step: Callable[..., Tensor], asks: bool) -> None:
    model = Net(step, asks).eval()
    with pytest.raises(ModelError, match=f"'{DECIDING[step]}"):
        adfify(model, torch.randn(2, 4) if asks else None)
    assert (model.calls, model.share, model.seen, model.history, CALLS) == (0, 0.0, {"calls": 0}, [], 0)


def _only_counted(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    net.seen["calls"] += 2
    net.share = net.share * 0.9 + 0.1
    return net.a(x)


def _printed(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    if net.calls % 100 == 0:
        net.seen["text"] = f"{net.calls} calls"
    return net.a(x)


def _bounded(net: Net, x: Tensor) -> Tensor:
    net.history.append(x)
    if len(net.history) > 5:
        net.history.pop(0)
    return net.a(x)


@pytest.mark.parametrize("asks", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("step", [_only_counted, _printed, _bounded])
def test_a_count_that_decides_nothing_is_harmless(step: Callable[..., Tensor], asks: bool) -> None:
    model, x = Net(step, asks).eval(), torch.randn(2, 4)
    adf = adfify(model, x if asks else None)
    assert torch.allclose(adf(Moments(x, torch.zeros_like(x))).mean, model.a(x), atol=1e-6)
    assert (model.calls, model.seen, model.history) == (0, {"calls": 0}, [])


def test_the_clock_is_refused_without_an_example_too() -> None:
    def timed(net: Net, x: Tensor) -> Tensor:
        return net.a(x) * (time.perf_counter() % 1)

    with pytest.raises(ModelError, match="computes with other values in every call"):
        adfify(Net(timed, False).eval())
