"""Control flow that goes by the kind of an input, its dtype or number of axes: followed, and checked at every call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import AdfifyError, InputError


class Asking(nn.Module):
    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.a = way, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def _floating(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.is_floating_point() else x


def _floating_function(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if torch.is_floating_point(x) and not torch.is_complex(x) else x


def _not_half(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.dtype != torch.float16 else x


def _one_of(net: Asking, x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float16, torch.bfloat16) else net.a(x)


def _identical(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.dtype is torch.float32 else x


def _not_identical(net: Asking, x: Tensor) -> Tensor:
    return x if torch.float32 is not x.dtype else net.a(x)


def _table(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) * {torch.float32: 2.0, torch.float16: 3.0}.get(x.dtype, 5.0)


def _of_weights(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.dtype == net.a.weight.dtype and x.device == net.a.weight.device else x


def _of_a_result(net: Asking, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x)) * 2
    return h + 1 if h.dtype == torch.float32 and not h.is_cuda else h


KINDS = [
    _floating, _floating_function, _not_half, _one_of, _identical, _not_identical, _table, _of_weights, _of_a_result,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("way", KINDS)
def test_the_kind_of_an_input_is_followed_and_checked(way: Callable[..., Tensor], with_example: bool) -> None:
    torch.manual_seed(0)
    model, x = Asking(way).eval(), torch.randn(3, 4)
    adf = adfify(model, x if with_example else None)
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        assert torch.allclose(network(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)
        assert torch.isfinite(network.joint(x, outputs="all").std).all()
        half = copy.deepcopy(network).half()
        given = Moments(x.half(), torch.zeros_like(x))
        expected = copy.deepcopy(model).half()(x.half())
        try:
            found = half(given).mean
        except InputError as error:
            assert way not in (_floating, _floating_function, _of_weights)
            assert "asks at " in str(error) and "test_kinds.py:" in str(error)
        else:
            assert torch.allclose(found, expected, atol=1e-2)


def _axes(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.dim() == 2 else x


def _axes_attribute(net: Asking, x: Tensor) -> Tensor:
    for _ in range(x.ndim):
        x = net.a(x)
    return x


@torch.no_grad()
@pytest.mark.parametrize("way", [_axes, _axes_attribute])
def test_the_number_of_axes_is_the_examples(way: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Asking(way).eval(), torch.randn(3, 4)
    adf = adfify(model, x)
    assert torch.allclose(adf(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)
    with pytest.raises(InputError, match=r"asks at .*test_kinds\.py:\d+ of what kind its inputs are"):
        adf(x[None])
    with pytest.raises(AdfifyError, match="example_inputs"):
        adfify(model)


def test_an_integer_input_is_known_by_the_example() -> None:
    def way(net: Asking, x: Tensor) -> Tensor:
        return net.a(x / 255) if not x.is_floating_point() else net.a(x)

    torch.manual_seed(0)
    model = Asking(way).eval()
    assert torch.allclose(adfify(model)(torch.ones(2, 4)).mean, model(torch.ones(2, 4)), atol=1e-6)
    with pytest.raises(AdfifyError):
        adfify(model)(torch.ones(2, 4, dtype=torch.uint8))
