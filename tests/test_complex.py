"""Complex values: every rule that says it takes them, the models that have them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from oracles import Trial
from tiny import ByExport
from torch import Tensor, nn

import adfify
from adfify import Moments
from adfify.registry import RULES, Case, Certain, Uncertain

# Elementwise, and no map of parts: tested below.
NOT_LINEAR = {"adfify.nn.activation.absolute"}
# Its quotient by an uncertain value is approximate, and by a complex uncertain one refused.
SKIPPED = {"adfify.nn.arithmetic.div", "adfify.nn.arithmetic.operator_truediv"}


def complexified(value: Any) -> Any:
    """A case with its random and known floating-point tensors complex."""
    match value:
        case Uncertain() | Certain():
            return replace(value, complex=True)
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(complexified, value))
    if value is torch.float64:
        return torch.complex128
    return value


def complex_trials() -> list[Trial]:
    found = []
    for rule in RULES:
        if not rule.complex or rule.name in NOT_LINEAR | SKIPPED or rule.certain:
            continue
        for index, case in enumerate(rule.cases):
            if any(spec.complex for spec in Trial(rule, rule.targets[0], case, RULES, "").uncertain()):
                continue
            kwargs = {name: complexified(value) for name, value in case.kwargs.items()}
            own = Case(tuple(map(complexified, case.args)), kwargs, case.init)
            found.append(Trial(rule, rule.targets[0], own, RULES, f"{rule.name}-complex-{index}"))
    return found


# A module's own weights would have to be complex: linear layers of complex weights are tested below.
COMPLEX = [t for t in complex_trials() if not t.is_module and "polar" not in t.name and "complex_values" not in t.name]


@pytest.mark.parametrize("trial", COMPLEX, ids=[t.name for t in COMPLEX])
def test_a_rule_that_takes_complex_values_is_right_on_them(trial: Trial) -> None:
    inputs = trial.moments()
    truth = oracles.multiaffine(trial.original(torch.float64), inputs)
    results = trial.converted(torch.float64)(*inputs)
    for got, want in zip(results, truth, strict=True):
        torch.testing.assert_close(got.mean, want.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.variance, want.variance, rtol=1e-9, atol=1e-9)
    certain = trial.converted(torch.float64)(*[Moments(x.mean, torch.zeros_like(x.mean)) for x in inputs])
    for got, want in zip(certain, trial.original(torch.float64)(*[x.mean for x in inputs]), strict=True):
        assert torch.equal(got.mean, want)
        assert not got.variance.any()


# Models


class SpectralConvolution(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self, engine_writes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(2, 3, 3, 3, dtype=torch.cfloat, generator=torch.Generator().manual_seed(1))
        )
        self.writes = engine_writes

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft2(x, norm="ortho")
        low = torch.einsum("bixy,ioxy->boxy", z[:, :, :3, :3], self.weight)
        if self.writes:
            out = torch.zeros(x.shape[0], 3, 6, 4, dtype=torch.cfloat)
            out[:, :, :3, :3] = low
        else:
            out = torch.nn.functional.pad(low, (0, 1, 0, 3))
        return torch.fft.irfft2(out, s=(6, 6), norm="ortho")


class Mixing(nn.Module):
    """FNet's mixing of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class Rotated(nn.Module):
    """Rotary positions, as complex factors."""

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.polar(torch.ones(6, 3), torch.arange(18.0).reshape(6, 3))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * turn).flatten(-2)


class Power(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x)
        return (z * z.conj()).real + z.abs()


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "spectral convolution": (SpectralConvolution(False), (2, 2, 6, 6)),
    "spectral convolution, written": (SpectralConvolution(True), (2, 2, 6, 6)),
    "mixing": (Mixing(), (2, 6, 6)),
    "rotated": (Rotated(), (2, 6, 6)),
    "power": (Power(), (2, 6)),
}


# What the one pass' std may be off by: |z|^2 + |z| takes its two terms as independent.
ONE_PASS = {**dict.fromkeys(MODELS, 0.1), "power": 0.35}


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_complex_values(name: str, engine: str) -> None:
    model, shape = MODELS[name]
    model = ByExport(model) if engine == "torch.export" else model
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    adf = adfify.adfify(model, x, noise_variance=0.04)
    certain = adf(Moments(x, torch.zeros_like(x)))
    assert torch.equal(certain.mean, model(x))
    assert not certain.variance.any()
    mean, variance = (part.flatten(1) for part in adf(x))
    draws = torch.randn(2_000, *shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        drawn = model((x + 0.2 * draws).flatten(0, 1)).unflatten(0, (2_000, -1)).flatten(2)
    std = drawn.std(0)
    # 2000 draws tell a std to 1.6 %, and a mean to 2.2 % of it: six of these.
    assert ((mean - drawn.mean(0)).abs() <= 0.13 * std + 1e-6).all()
    assert ((variance.sqrt() - std).abs() <= ONE_PASS[name] * std + 1e-6).all()
    joint = adf.joint(x, outputs=[0, 1, 2, 3])
    assert ((joint.std - std[:, :4]).abs() <= 0.1 * std[:, :4]).all()


class Refused(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.fft.rfft(x))


class Exponential(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.exp(z).real


@pytest.mark.parametrize("end", [Exponential(), nn.Tanh(), nn.Conv1d(2, 3, 3, dtype=torch.cfloat)])
def test_what_has_no_rule_for_complex_values_is_refused_at_conversion(end: nn.Module) -> None:
    with pytest.raises(adfify.UnsupportedOpsError, match="is complex here, and the rule"):
        adfify.adfify(Refused(end).eval(), torch.randn(2, 2, 6))


class Phase(nn.Module):
    """A complex factor that torch.fx knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = [torch.polar(torch.ones(4), torch.arange(4.0))]

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x.to(torch.cfloat), self.phases[0], 0.5).abs()


def test_nothing_is_computed_with_a_complex_variance() -> None:
    with pytest.raises(adfify.errors.AdfifyError, match="complex"):
        adfify.adfify(Phase(), torch.randn(2, 4))(torch.randn(2, 4))
    with pytest.raises(adfify.errors.AdfifyError, match="complex"):
        Moments(torch.randn(3, dtype=torch.cfloat), torch.ones(3))


def test_the_modulus_is_within_its_tolerance_of_monte_carlo() -> None:
    draw = torch.Generator().manual_seed(4)
    mean, variance = torch.randn(40, 2, generator=draw), 0.1 + torch.rand(40, 2, generator=draw)
    draws = mean + variance.sqrt() * torch.randn(200_000, 40, 2, generator=draw)
    truth = torch.linalg.vector_norm(draws, dim=-1)

    class Modulus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_complex(x).abs()

    got = adfify.adfify(Modulus(), mean)(Moments(mean, variance))
    std = truth.std(0)
    assert ((got.mean - truth.mean(0)).abs() <= 0.06 * std).all()
    assert ((got.std - std).abs() <= 0.06 * std).all()
    assert ((got.mean - mean.norm(dim=-1)).abs() > 0.1 * std).any(), "what uncertainty adds is no rounding"


class Products(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = torch.view_as_complex(x)
        return torch.view_as_real(z * z), torch.view_as_real(z * z.conj()), torch.view_as_real(z / (1 + 2j))


def test_products_of_a_complex_value_with_itself_are_exact() -> None:
    draw = torch.Generator().manual_seed(5)
    mean, variance = torch.randn(6, 2, generator=draw), 0.1 + torch.rand(6, 2, generator=draw)
    adf = adfify.adfify(Products(), mean)
    draws = mean + variance.sqrt() * torch.randn(200_000, 6, 2, generator=draw)
    for got, truth in zip(adf(Moments(mean, variance)), Products()(draws.flatten(0, 1)), strict=True):
        drawn = truth.unflatten(0, (200_000, 6))
        std = drawn.std(0)
        assert ((got.mean - drawn.mean(0)).abs() <= 6 * std / 200_000**0.5 + 1e-5).all()
        assert ((got.std - std).abs() <= 0.02 * std + 1e-6).all()
