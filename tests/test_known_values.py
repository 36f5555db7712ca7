"""Control flow that goes by the model's own buffers: followed, and checked at every call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import ModelError


class Going(nn.Module):
    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.a = way, nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(2))
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def _branch(net: Going, x: Tensor) -> Tensor:
    return net.a(x) if net.steps > 1 else x


def _flag(net: Going, x: Tensor) -> Tensor:
    return net.a(x) if net.on and net.steps != 7 else x


def _loop(net: Going, x: Tensor) -> Tensor:
    for _ in range(int(net.steps)):
        x = net.a(x).relu()
    return x


def _item(net: Going, x: Tensor) -> Tensor:
    for _ in range(net.steps.item() + 1):
        x = net.a(x)
    return x


WAYS = [_branch, _flag, _loop, _item]


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_way_is_followed_and_checked(way: Callable[..., Tensor], with_example: bool) -> None:
    torch.manual_seed(0)
    model, x = Going(way).eval(), torch.randn(3, 4)
    adf = adfify(model, x if with_example else None)
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        assert torch.allclose(network(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)
        assert torch.isfinite(network.joint(x, outputs="all").std).all()
        network.steps.fill_(-1)
        network.on.fill_(False)
        with pytest.raises(ModelError, match=r"went by a buffer's value .*test_known_values\.py:\d+.* now"):
            network(x)


def test_a_buffer_that_forward_writes_is_not_known() -> None:
    def counted(net: Going, x: Tensor) -> Tensor:
        net.steps.add_(1)
        return net.a(x) if net.steps > 2 else x

    with pytest.raises(ModelError):
        adfify(Going(counted).eval())
