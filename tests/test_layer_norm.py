"""Normalisation by uncertain statistics, and extrema: what the automatic oracles of test_rules don't cover."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import norm, norm_act
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

import adfify
from adfify import Moments
from adfify.errors import InputError, UnsupportedOpsError
from adfify.gaussian.extremes import largest
from adfify.nn import layer_norm as rules
from adfify.nn import norms
from adfify.nn import statistics as reductions
from adfify.nn.extrema import Positions
from adfify.nn.extrema import max as max_rule


def against_monte_carlo(
    f: Callable[..., Tensor], x: Moments, got: Moments, mean: float, std: float, least: float = 0.0
) -> None:
    """Errors in units of the true std, with what chance allows in 40,000 draws, and ``least`` of the largest std."""
    draws = 40_000
    (truth,) = oracles.monte_carlo(lambda value: (f(value),), [x], [got], draws)
    spread, limit = truth.variance.sqrt(), oracles.z_limit(2 * got.mean.numel())
    floor = least * spread.max()
    oracles.assert_within(truth.mean_error, floor + mean * spread + limit * truth.mean_deviation, "mean")
    oracles.assert_within(got.std - spread, floor + std * spread + limit * truth.std_deviation, "std")


def group(size: int, std: float, unequal: bool) -> Moments:
    """Means of spread 1, and variances that are equal, or log-normally distributed."""
    draw = torch.Generator().manual_seed(size)
    mean = torch.randn(1, size, generator=draw, dtype=torch.float64)
    mean = (mean - mean.mean()) / mean.std(correction=0)
    log = torch.randn(1, size, generator=draw, dtype=torch.float64) * unequal
    return Moments(mean, std**2 * torch.exp(log))


@pytest.mark.parametrize("std", [0.03, 0.1, 0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize(
    ("size", "unequal", "tolerance"),
    [(4, False, 0.05), (16, False, 0.01), (64, False, 0.005), (16, True, 0.03), (64, True, 0.03)],
)
def test_layer_norm_errors_are_as_stated(size: int, unequal: bool, tolerance: float, std: float) -> None:
    x = group(size, std, unequal)
    got = rules.layer_norm(x, [size])
    against_monte_carlo(lambda v: F.layer_norm(v, [size]), x, got, 0.1 if size == 4 else 0.015, tolerance)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Moments], Moments]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, [9]), lambda x: rules.layer_norm(x, [9])),
    "rms_norm": (lambda x: F.rms_norm(x, [9]), lambda x: rules.rms_norm(x, [9])),
    "normalize": (lambda x: F.normalize(x), lambda x: rules.normalize(x)),
    "local_response_norm": (
        lambda x: F.local_response_norm(x[..., None], 3, 2.0),
        lambda x: rules.local_response_norm(Moments(x.mean[..., None], x.variance[..., None]), 3, 2.0),
    ),
    "norm": (lambda x: torch.norm(x, dim=1), lambda x: norms.norm(x, dim=1)),
    "std": (lambda x: x.std(1), lambda x: reductions.std(x, 1)),
    "var": (lambda x: x.var(1), lambda x: reductions.var(x, 1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_small_variances_follow_the_jacobian(name: str) -> None:
    """To first order the variance is J^2 v, all elements of J included: the statistics move with the element."""
    original, rule = OPERATIONS[name]
    x = group(9, 1e-5, unequal=True)
    jacobian = torch.func.jacrev(original)(x.mean)
    expected = (jacobian.flatten(0, -3).flatten(1) ** 2) @ x.variance.flatten()
    got = rule(x)
    torch.testing.assert_close(got.variance.flatten(), expected, rtol=1e-6, atol=0)
    assert (got.mean - original(x.mean)).abs().max() < 1e-8


def test_running_statistics_of_instance_norm_are_those_of_the_noisy_elements() -> None:
    torch.manual_seed(0)
    x = Moments(torch.randn(4, 3, 50).double(), 0.5 + torch.rand(4, 3, 50).double())
    original = nn.InstanceNorm1d(3, track_running_stats=True).double()
    converted = adfify.nn.InstanceNorm1d(3, track_running_stats=True).double()
    converted(x)
    for _ in range(400):  # the running average of many draws
        original.momentum = 1 / (_ + 2)
        original(x.mean + torch.randn_like(x.mean) * x.std)
    torch.testing.assert_close(converted.running_mean, 0.1 * x.mean.mean((0, 2)))
    drawn = (original.running_var - 1 / 401) / (400 / 401)
    torch.testing.assert_close((converted.running_var - 0.9) / 0.1, drawn, rtol=0.02, atol=0)


def test_vectors_of_length_zero_and_dead_channels_are_finite() -> None:
    x = Moments(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    for got in (rules.normalize(x), norms.norm(x, dim=(2, 3)), rules.group_norm(x, 1), reductions.std(x, 1)):
        assert got.mean.isfinite().all()
        assert (got.variance == 0).all()


# Extrema


def integral(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the maximum, by the trapezoidal rule on a fine grid."""
    x = torch.linspace(float((mean - 9 * std).amax()), float((mean + 9 * std).amax()), 20001, dtype=torch.float64)
    cdf = torch.special.log_ndtr((x[:, None] - mean) / std).sum(1).exp()
    first = torch.trapezoid(cdf, x)
    second = torch.trapezoid(2 * (x[-1] - x) * cdf, x)
    return x[-1] - first, (second - first**2).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("count", [2, 9, 49, 1000])
def test_the_largest_of_many(count: int, spread: float, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(count)
    mean = spread * torch.randn(count, generator=draw, dtype=torch.float64)
    std = torch.exp(0.5 * torch.randn(count, generator=draw, dtype=torch.float64))
    want, want_std = integral(mean, std)
    got, variance = largest(mean.to(dtype), std.square().to(dtype), (0,))
    assert abs(float(got - want)) < 2e-3 * float(want_std)
    assert abs(float(variance.sqrt() / want_std) - 1) < 3e-3


def test_the_largest_where_some_are_certain() -> None:
    """max(0, x) is a rectified Gaussian; a certain element far above is the maximum, and certain."""
    mean, variance = (
        torch.tensor([[0.0, 0.0, -5.0], [0.0, 9.0, 8.0]]),
        torch.tensor([[1.0, 0.0, 0.0], [1e-2, 0.0, 0.0]]),
    )
    got, spread = largest(mean.double(), variance.double(), (1,))
    assert float(got[0]) == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-6)
    assert float(spread[0]) == pytest.approx(0.5 - 0.5 / math.pi, abs=1e-6)
    assert float(got[1]) == pytest.approx(9.0, abs=1e-9)
    assert float(spread[1]) == pytest.approx(0.0, abs=1e-9)


class Unpacks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.max(x, dim=1)
        return values - x.min(1)[0] + torch.max(x) + F.adaptive_max_pool2d(x[:, None, None], 1).flatten(1).sum(1)


def test_max_and_min_over_a_dimension_give_values() -> None:
    model, x = Unpacks(), torch.randn(3, 6, dtype=torch.float64)
    converted = adfify.adfify(model, noise_variance=0.0)
    assert torch.equal(converted(x).mean, model(x))
    noisy = adfify.adfify(model, noise_variance=0.1, min_variance=1e-6)(x)
    assert (noisy.variance > 0).all()


def test_exported_max_over_a_dimension_is_the_same_rule() -> None:
    assert adfify.registry.RULES.find(torch.ops.aten.max.dim).apply is max_rule


class UsesPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.gather(x, 1, torch.max(x, dim=1, keepdim=True)[1])


def test_positions_of_a_random_maximum_are_refused() -> None:
    with pytest.raises(UnsupportedOpsError, match="gather"):
        adfify.adfify(UsesPositions())
    x = Moments(torch.zeros(2, 3), torch.ones(2, 3))
    values, positions = max_rule(x, 1)
    assert isinstance(values, Moments)
    assert isinstance(positions, Positions)
    with pytest.raises(InputError, match="use the values only"):
        positions.shape  # noqa: B018


def test_exported_adaptive_max_pool_is_not_taken_for_the_function_that_returns_one_tensor() -> None:
    rule = adfify.registry.RULES.find(torch.ops.aten.adaptive_max_pool2d.default)
    assert rule is None or rule.apply is not adfify.registry.RULES.find(F.adaptive_max_pool2d).apply


# timm's classes


CLASSES = [
    *[getattr(norm, n) for n in vars(norm) if n.endswith(("Norm", "Norm1", "Norm2d", "Fp32", "Exp2d"))],
    *[getattr(norm_act, n) for n in vars(norm_act) if "NormAct" in n or n == "GroupNorm1Act"],
    GlobalResponseNorm,
]
CLASSES = [c for c in dict.fromkeys(CLASSES) if inspect.isclass(c) and c.__module__.startswith("timm")]


class Around(nn.Module):
    """A network in which the class is one module of several, as it is in use."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2


@pytest.mark.parametrize("cls", CLASSES, ids=[c.__name__ for c in CLASSES])
def test_timm_norm_converts_and_loses_nothing(cls: type[nn.Module]) -> None:
    torch.manual_seed(1)
    channels = 16
    options = {"num_groups": 2} if cls.__name__ in ("GroupNorm", "GroupNormAct") else {}
    model = Around(cls(channels, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    last = "2d" not in cls.__name__ and ("Layer" in cls.__name__ or "Rms" in cls.__name__ or "Simple" in cls.__name__)
    shape = (2, 4, 4, channels) if last or cls is GlobalResponseNorm else (2, channels, 4, 4)
    x = Moments(torch.randn(shape), 0.05 + 0.3 * torch.rand(shape))
    converted = adfify.adfify(model)
    assert {*model.state_dict()} <= {*converted.state_dict()}
    assert torch.equal(converted(Moments(x.mean, torch.zeros_like(x.mean))).mean, model(x.mean))
    # Where an activation is all but certain, its variance comes from tails, which are not quite those of a Gaussian.
    against_monte_carlo(model, x, converted(x), 0.04, 0.05, least=0.02 if "Act" in cls.__name__ else 0.0)


def test_timm_has_the_classes_that_are_meant() -> None:
    names = {c.__name__ for c in CLASSES}
    assert {"LayerNorm", "LayerNorm2d", "RmsNorm2d", "SimpleNorm2dFp32", "GroupNormAct", "RmsNormAct2dFp32"} <= names
    assert hasattr(layers, "FrozenBatchNormAct2d")
