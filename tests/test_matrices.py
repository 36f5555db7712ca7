"""Systems of equations, products of matrices and moves to a device, in models, under both engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import ByExport
from torch import Tensor, nn

import adfify
from adfify import Moments
from adfify.errors import UnsupportedOpsError

torch.manual_seed(4)
A = torch.eye(4) + 0.2 * torch.randn(4, 4)
LU, PIVOTS = torch.linalg.lu_factor(A.double())


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("matrix", A)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.matrix, x)


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": torch.linalg.solve,
    "inv @ x": lambda a, x: torch.linalg.inv(a) @ x,
    "matrix_power": lambda a, x: torch.linalg.matrix_power(a, 3) @ x,
    "pinv": lambda a, x: torch.linalg.pinv(a) @ x,
    "lu_factor, lu_solve": lambda a, x: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), x),
    "torch.lu_solve": lambda a, x: torch.lu_solve(x, LU, PIVOTS),
    "cholesky_solve": lambda a, x: torch.cholesky_solve(x, torch.linalg.cholesky(a @ a.mT)),
    "solve_triangular": lambda a, x: torch.linalg.solve_triangular(a, x, upper=False),
    "multi_dot": lambda a, x: torch.linalg.multi_dot([a, x, x.new_ones(3, 2)]),
    "chain_matmul": lambda a, x: torch.linalg.multi_dot((a, a, x)),
    "trace": lambda a, x: torch.trace(x @ x.new_ones(3, 4)),
    "addbmm": lambda a, x: torch.addbmm(x, a.expand(2, 4, 4), x.new_ones(2, 4, 3), beta=0.5),
}


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_has_the_variance_of_its_matrix(name: str, engine: str) -> None:
    model, x = Written(LINEAR[name]).double(), torch.randn(4, 3, dtype=torch.float64)
    spread = 0.1 + torch.rand(4, 3, dtype=torch.float64)
    adf = adfify.adfify(ByExport(model) if engine == "torch.export" else model, x)
    got = adf(Moments(x, spread))
    slopes = torch.func.jacrev(model)(x)
    torch.testing.assert_close(got.mean, model(x))
    torch.testing.assert_close(got.variance, torch.einsum("...ij,ij->...", slopes.square(), spread))


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": lambda a, x: torch.linalg.solve(x, a),
    "inv": lambda a, x: torch.linalg.inv(x),
    "matrix_power": lambda a, x: torch.linalg.matrix_power(x, 3),
    "det": lambda a, x: torch.linalg.det(x),
    "cholesky": lambda a, x: torch.linalg.cholesky(x),
    "lu_solve": lambda a, x: torch.lu_solve(a, x, PIVOTS),
    "solve_triangular": lambda a, x: torch.linalg.solve_triangular(x, a, upper=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_uncertain_matrix_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedOpsError, match=name) as caught:
        adfify.adfify(Written(REFUSED[name]))
    assert "test_matrices.py" in str(caught.value)


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], torch.device]] = {
    "cuda()": (lambda x: x.cuda(), torch.device("cuda")),
    "cuda(1)": (lambda x: x.cuda(1), torch.device("cuda", 1)),
    "cuda(device=)": (lambda x: x.cuda(device="cuda:2", non_blocking=True), torch.device("cuda", 2)),
    "xpu()": (lambda x: x.xpu(), torch.device("xpu")),
}


class Moved(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x) * 2


@pytest.mark.parametrize("name", MOVES)
def test_a_move_to_a_kind_of_device_is_one_to_that_device(name: str) -> None:
    move, device = MOVES[name]
    (moved,) = [node for node in adfify.adfify(Moved(move)).graph.nodes if device in node.args or "cuda:2" in node.args]
    assert moved.args[1:] in ((device,), (str(device),))


CASTS: list[tuple[Callable[[Tensor], Tensor], torch.dtype]] = [
    (lambda x: x.double(), torch.float64),
    (lambda x: x.half(), torch.float16),
    (lambda x: x.bfloat16(), torch.bfloat16),
    (lambda x: x.type(torch.float16), torch.float16), (lambda x: x.type("torch.DoubleTensor"), torch.float64),
    (lambda x: x.to("cpu", torch.float16), torch.float16), (lambda x: x.double().float(), torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("cast, dtype", CASTS)
def test_a_cast_keeps_a_small_variance(cast: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    got = adfify.adfify(Moved(cast))(Moments(torch.ones(3), torch.full((3,), 5e-9)))
    assert got.mean.dtype == dtype
    assert got.variance.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.variance.double(), torch.full((3,), 2e-8).double(), rtol=1e-5, atol=0)


def test_a_division_by_a_complex_number_is_made_where_its_tensor_is() -> None:
    class Divided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.complex(x, x) / (1 + 2j))

    adf = adfify.adfify(Divided())
    x = torch.randn(3, dtype=torch.float64)
    with torch.device("meta"):
        got = adf(Moments(x, torch.ones_like(x, device="cpu")))
    assert got.mean.device.type == "cpu"
    torch.testing.assert_close(got.variance, torch.full((3, 2), 0.2, dtype=torch.float64))
