"""Models of joined tensors, systems of equations and repeated differences, under both engines."""

from __future__ import annotations

import operator

import pytest
import torch
from tiny import ByExport
from torch import Tensor, nn

import adfify
from adfify import Moments

MATRIX = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 3.0]])


class Joined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.hstack([+x, x.flip(-1).cpu(), operator.pos(x).fliplr()])
        rows, columns = torch.broadcast_tensors(z.unsqueeze(-1), z.new_ones(9, 2))
        return (rows * columns).flatten(1)


class Differences(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.diff(x, n=2, prepend=x.new_zeros(x.shape[0], 1))


class Solved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", MATRIX)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.linalg.solve(self.matrix, x.unsqueeze(-1)).squeeze(-1)
        return torch.tensordot(y, torch.linalg.inv(self.matrix), dims=1)


class Scattered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([0, 1, 0]).expand(x.shape)
        return x.new_zeros(x.shape[0], 2).scatter_reduce(1, index, x, reduce="mean", include_self=False)


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("model", [Joined(), Differences(), Solved(), Scattered()], ids=lambda m: type(m).__name__)
def test_a_linear_model_is_exact(model: nn.Module, engine: str) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    variance = 0.1 + torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    adf = adfify.adfify(ByExport(model) if engine == "torch.export" else model, x)
    jacobian = torch.stack([model(x + step.reshape(2, 3)) - model(x) for step in torch.eye(6)])
    want = torch.einsum("i...,i->...", jacobian.square(), variance.flatten())
    got = adf(Moments(x, variance))
    assert torch.equal(got.mean, model(x))
    if not isinstance(model, Solved):  # there the second product takes what the first gave as independent
        torch.testing.assert_close(got.variance, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(adf(Moments(x, torch.zeros_like(x))).mean, model(x))
    joint = adf.joint(Moments(x, variance), outputs=[0, 1])
    torch.testing.assert_close(joint.variance, want.flatten(1)[:, :2], rtol=1e-3, atol=1e-4)


def test_an_uncertain_matrix_is_refused_at_conversion() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.solve(x, torch.ones(3, 1))

    with pytest.raises(adfify.UnsupportedOpsError, match="'A' is uncertain here"):
        adfify.adfify(Inverse())


def test_data_is_its_tensor_also_where_gradients_are_taken() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.data

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    adf = adfify.adfify(Cut(), noise_variance=0.04)
    torch.testing.assert_close(adf(x).std, torch.full((2, 3), 0.6))
    torch.testing.assert_close(adf.joint(x, outputs="all").std, torch.full((2, 3), 0.6), rtol=1e-4, atol=0)
