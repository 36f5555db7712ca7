"""Resizing in whole networks, in both engines, and functions that only exist for positive values.

What one call of a rule gives is tested in test_rules, for every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adfify
from adfify import Moments
from adfify.gaussian import elementary
from adfify.nn.elementary import power, ratio

Pair = tuple[Tensor, Tensor]


class Resized(nn.Module):
    """Every kind of resizing that pyramids have, to the size of another tensor or by a factor."""

    def forward(self, x: Tensor) -> Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        up = F.interpolate(half, size=x.shape[-2:], mode="bicubic", align_corners=False)
        return F.pixel_unshuffle(up, 2) + F.interpolate(half, size=half.shape[-2:]).repeat(1, 4, 1, 1)


class Written(nn.Module):
    """Writes through views, which torch.export makes functional."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 1:  # a branch on a size stops symbolic tracing
            return x
        canvas = torch.zeros(x.shape[0], 2, 4, 4)
        canvas[:, 1:] = x[:, :1]
        canvas[:, 0, 0].fill_(2.0)
        canvas[:, :, 1] = x[:, 1:3, 2]
        return canvas


def jacobian_moments(model: nn.Module, x: Tensor, variance: Tensor) -> Pair:
    slope = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    value = model(x)
    return value, (slope.square() @ variance.flatten()).reshape(value.shape)


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
def test_independent_pixels_through_one_resizing(engine: str) -> None:
    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if engine == "torch.export":
                assert x.shape[0] > 0  # a branch on a size stops symbolic tracing
                x = x if x.shape[0] > 0 else -x
            return F.interpolate(x, size=(5, 7), mode="bicubic", antialias=True)

    x, variance = torch.randn(2, 3, 8, 6).double(), torch.rand(2, 3, 8, 6).double()
    network = adfify.adfify(Once(), example_inputs=(x,))
    got, (mean, spread) = network(Moments(x, variance)), jacobian_moments(Once(), x, variance)
    assert torch.equal(got.mean, mean)
    torch.testing.assert_close(got.variance, spread, rtol=1e-10, atol=1e-12)


def test_a_pyramid_takes_any_size() -> None:
    network = adfify.adfify(Resized())
    for height, width in ((8, 8), (12, 10)):
        x = torch.randn(2, 3, height, width)
        mean, variance = network(Moments(x, torch.full_like(x, 0.1)))
        assert torch.equal(mean, Resized()(x))
        assert variance.shape == mean.shape
        assert (variance > 0).all()


def test_writes_through_views() -> None:
    x = torch.randn(2, 3, 4, 4)
    traced = torch.export.export(Written(), (x,), strict=False).run_decompositions({})
    assert any("scatter" in str(node.target) for node in traced.graph.nodes)
    network = adfify.adfify(Written(), example_inputs=(x,))
    mean, variance = network(Moments(x, torch.full_like(x, 0.1)))
    assert torch.equal(mean, Written()(x))
    written = torch.full_like(mean, 0.1)
    written[:, 0] = 0
    written[:, :, 1] = 0.1
    torch.testing.assert_close(variance, written)


# Functions of positive values, against the integral over x > 0


def truth(
    f: Callable[[np.ndarray], np.ndarray], mean: float, std: float, *, clipped: bool = False
) -> tuple[float, float]:
    """Mean and std of f(x) given x > 0, or, clipped, of f(max(x, 0)) with f(0) = 0."""
    low = -mean / std
    edges = low + np.concatenate([[0.0], np.geomspace(1e-12, 1, 200)]) * (12 + abs(low))
    edges = edges if low > -12 else np.linspace(-12, 12, 400)
    t, w = np.polynomial.legendre.leggauss(30)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, np.diff(edges)[:, None] / 2
    z = middle + half * t
    density = half * w * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    total = 1.0 if clipped else density.sum()
    value = f(mean + std * z)
    average = (density * value).sum() / total
    return average, math.sqrt((density * value**2).sum() / total - average**2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Pair], Callable[[np.ndarray], np.ndarray], float]] = {
    "sqrt": (lambda m, v: elementary.power(m, v, 0.5), np.sqrt, 5.0),
    "x^1.7": (lambda m, v: elementary.power(m, v, 1.7), lambda x: x**1.7, 5.0),
    "log": (elementary.log, np.log, 5.0),
    "log2": (elementary.log2, np.log2, 5.0),
    "log10": (elementary.log10, np.log10, 5.0),
    "log1p": (lambda m, v: elementary.log1p(m - 1, v), np.log, 5.0),
    "rsqrt": (elementary.rsqrt, lambda x: x**-0.5, 6.0),
    "reciprocal": (elementary.reciprocal, lambda x: 1 / x, 10.0),
    "x^-2": (lambda m, v: elementary.negative_power(m, v, -2), lambda x: x**-2, 15.0),
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_positive_values(name: str, scale: float) -> None:
    rule, f, least = FUNCTIONS[name]
    for z in (least, 1.5 * least, 5 * least, 100 * least):
        mean, variance = rule(*(torch.tensor(x, dtype=torch.float64) for x in (z * scale, scale**2)))
        average, std = truth(f, z * scale, scale)
        assert abs(mean.item() - average) < 2e-4 * std + 1e-13 * abs(average)
        assert abs(variance.item() ** 0.5 / std - 1) < 2e-4


@pytest.mark.parametrize("p", [0.25, 0.5, 1.5, 3.3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_positive_powers_clip_at_zero(p: float, as_tensor: bool) -> None:
    for z in (-2.0, 0.0, 1.0, 3.0, 4.0, 8.0):
        exponent = torch.tensor(p, dtype=torch.float64) if as_tensor else p
        mean, variance = elementary.power(torch.tensor(z).double(), torch.tensor(1.0).double(), exponent)
        average, std = truth(lambda x: x**p, z, 1.0, clipped=True)
        assert abs(mean.item() - average) < 1e-3 * std
        assert abs(variance.item() ** 0.5 / std - 1) < 3e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_positive_values_are_finite_everywhere(name: str) -> None:
    mean = torch.linspace(-3, 3, 61, dtype=torch.float32).repeat_interleave(4).requires_grad_()
    variance = torch.tensor([1e-12, 1e-4, 1.0, 100.0]).repeat(61).requires_grad_()
    for part in FUNCTIONS[name][0](mean, variance):
        assert part.isfinite().all()
        for gradient in torch.autograd.grad(part.sum(), [mean, variance], retain_graph=True):
            assert gradient.isfinite().all()


ORIGINALS = {
    "sqrt": torch.sqrt, "log": torch.log, "log2": torch.log2, "log10": torch.log10, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINALS)
def test_functions_of_a_certain_value_are_the_original_s(name: str) -> None:
    mean = torch.tensor([-2.0, 0.0, 1e-3, 0.7, 30.0], requires_grad=True)
    variance = torch.zeros(5, requires_grad=True)
    got, spread = FUNCTIONS[name][0](mean, variance)
    torch.testing.assert_close(got, ORIGINALS[name](mean), rtol=0, atol=0, equal_nan=True)
    assert (spread == 0).all()
    gradients = torch.autograd.grad((got + spread)[2:].sum(), [mean, variance])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("z", [12.0, -12.0])
def test_ratio_against_monte_carlo(z: float) -> None:
    torch.manual_seed(0)
    a = Moments(torch.tensor([0.5, -2.0, 0.0]).double(), torch.tensor([0.3, 0.0, 1.0]).double())
    b = Moments(torch.full((3,), z).double(), torch.ones(3).double())
    mean, variance = ratio(a, b)
    draws = 400_000
    noise = torch.randn(2, draws, 3).double()
    rows = (a.mean + noise[0] * a.std) / (b.mean + noise[1] * b.std)
    assert ((rows.mean(0) - mean).abs() < 5 * rows.std(0) / draws**0.5).all()
    torch.testing.assert_close(variance.sqrt(), rows.std(0), rtol=0.01, atol=0)
    same = ratio(b, b)
    assert torch.equal(same.mean, torch.ones(3).double())
    assert torch.equal(same.variance, torch.zeros(3).double())


def test_ratio_of_certain_values_is_the_original_s() -> None:
    a, b = torch.randn(100), torch.randn(100)
    mean, variance = ratio(Moments(a, torch.zeros(100)), Moments(b, torch.zeros(100)))
    assert torch.equal(mean, a / b)
    assert torch.equal(variance, torch.zeros(100))
    assert torch.equal(ratio(1.0, Moments(torch.zeros(1), torch.zeros(1))).mean, torch.full((1,), math.inf))


@pytest.mark.parametrize("exponent", [-1, -3, 0, 7])
def test_whole_powers_of_negative_values(exponent: int) -> None:
    x = Moments(torch.tensor([-15.0, 15.0]).double(), torch.ones(2).double())
    mean, variance = power(x, exponent)
    torch.manual_seed(1)
    rows = (x.mean + torch.randn(400_000, 2).double()) ** exponent
    torch.testing.assert_close(mean, rows.mean(0), rtol=5e-3, atol=0)
    torch.testing.assert_close(variance.sqrt(), rows.std(0), rtol=1.5e-2, atol=0)
