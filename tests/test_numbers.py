"""Numbers at the ends of their range: half precision, tiny and huge variances, nothing at all."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from oracles import Trial
from torch import Tensor, nn

import adfify
from adfify import Moments, gaussian
from adfify.errors import InputError, ModelError
from adfify.moments import ComplexMoments
from adfify.registry import RULES

HALVES = (torch.float16, torch.bfloat16)


def variances(x: Moments | ComplexMoments) -> list[Tensor]:
    return [x.variance] if isinstance(x, Moments) else [x.real.variance, x.imag.variance]


def trials() -> list[Trial]:
    """Every rule once, by its first case."""
    found: dict[int, Trial] = {}
    for trial in oracles.trials(RULES, adfify.supported()):
        if not trial.rule.certain:
            found.setdefault(id(trial.rule), trial)
    return list(found.values())


# Half precision: variances are held in float32


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_a_half_precision_rule_keeps_small_variances_and_the_original_s_mean(trial: Trial) -> None:
    inputs = [x.to(torch.float16) for x in trial.moments(torch.float32)]
    try:
        original = trial.original(torch.float16)(*[x.mean for x in inputs])
    except (NotImplementedError, RuntimeError):  # torch has no such kernel on a CPU
        return
    for got, want in zip(trial.converted(torch.float16)(*[at(x, 0.0) for x in inputs]), original, strict=True):
        assert torch.equal(got.mean, want)
        assert all(not part.any() and part.dtype != torch.float16 for part in variances(got))
    small, wide = [at(x, 5e-9) for x in inputs], [Moments(x.mean.float(), 5e-9 * x.variance) for x in inputs]
    for got, want in zip(trial.converted(torch.float16)(*small), trial.converted(torch.float32)(*wide), strict=True):
        for part, exact in zip(variances(got), variances(want), strict=True):
            torch.testing.assert_close(part, exact.to(part.dtype), rtol=0.02, atol=float(1e-3 * exact.max()))


def at(x: Moments, scale: float) -> Moments:
    return Moments(x.mean, x.variance * scale)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    return nn.Sequential(*layers, nn.LayerNorm(5), nn.Softmax(-1)).eval()


@pytest.mark.parametrize("variance", [5e-9, 300.0**2])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_network(dtype: torch.dtype, variance: float, tmp_path) -> None:
    network, x = small_network(), torch.rand(2, 3, 8, 8).to(dtype)
    given = Moments(x, torch.full(x.shape, variance))
    want = adfify.adfify(network)(Moments(x.float(), given.variance))
    adf = adfify.adfify(copy.deepcopy(network).to(dtype), noise_variance=variance)
    for result in (adf(x), adf(given), torch.compile(adf, backend="eager")(given)):
        assert result.mean.dtype == dtype
        assert result.variance.dtype == torch.float32
        torch.testing.assert_close(result.std, want.std, rtol=0.1, atol=0)
    with torch.autocast("cpu", dtype):
        mixed, plain = adfify.adfify(network)(Moments(x.float(), given.variance)), network(x.float())
        certain = adfify.adfify(network)(Moments(x.float(), torch.zeros(x.shape)))
    torch.testing.assert_close(mixed.std, want.std, rtol=0.1, atol=0)
    assert mixed.variance.dtype == torch.float32
    assert torch.equal(certain.mean, plain)
    assert not certain.variance.any()
    if variance == 5e-9 and dtype == torch.float16:  # it takes seconds
        check_program(adf, x, given, tmp_path)


def check_program(adf, x: Tensor, given: Moments, tmp_path) -> None:
    program = adfify.load(adfify.save(adf, tmp_path / "half.pt2", example_inputs=x))
    torch.testing.assert_close(program(given).std, adf(given).std, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_joint_moments_of_a_half_precision_network(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    network, x = nn.Linear(16, 2), torch.rand(1, 16)
    want = adfify.adfify(network, noise_variance=5e-9)(x).std
    half = adfify.adfify(copy.deepcopy(network).to(dtype), noise_variance=5e-9)
    torch.testing.assert_close(half.joint(x.to(dtype), outputs="all").std, want, rtol=0.05, atol=0)


def test_the_largest_of_large_negative_halves() -> None:
    pooled = adfify.adfify(nn.MaxPool2d(2).half())(Moments(torch.full((1, 1, 2, 2), -3e4).half(), torch.zeros(1)))
    assert pooled.mean.item() == -30000
    assert pooled.variance.item() == 0


def test_a_cast_to_half_keeps_the_variance() -> None:
    x = Moments(torch.ones(3), torch.full((3,), 5e-9))
    for cast in (adfify.nn.casting.half(x), x.to(torch.float16), adfify.nn.structural.to(x, torch.float16)):
        assert cast.mean.dtype == torch.float16
        assert torch.equal(cast.variance, x.variance)


# Nothing, and what is no number


def emptied(trial: Trial) -> list[Moments]:
    return [Moments(x.mean[:0], x.variance[:0]) for x in trial.moments(torch.float32)]


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_an_empty_batch_passes_where_the_original_takes_it(trial: Trial) -> None:
    if any(x.dim() == 0 for x, _ in trial.moments()):
        return
    trial = trial.without_examples()
    try:
        original = trial.original(torch.float32)(*[x.mean for x in emptied(trial)])
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return
    for got, want in zip(trial.converted(torch.float32)(*emptied(trial)), original, strict=True):
        assert got.mean.shape == want.shape


def test_an_empty_batch_passes_through_a_network() -> None:
    layers = (nn.ReLU6(), nn.Hardtanh(), nn.Hardsigmoid(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    adf = adfify.adfify(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 2)).eval())
    mean, variance = adf(torch.zeros(0, 3, 4))
    assert mean.shape == variance.shape == (0, 2)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_is_refused(number: float) -> None:
    adf, x = adfify.adfify(nn.Linear(3, 2)), torch.ones(2, 3)
    faulty = x.clone()
    faulty[1, 2] = number
    for given in (faulty, Moments(faulty, x), Moments(x, faulty)):
        with pytest.raises(InputError, match=r"has 1 (NaN|infinite) among its"):
            adf(given)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(number: float) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    adf = adfify.adfify(network)
    with torch.no_grad():
        network[1].weight[0, 0] = number
    with pytest.raises(ModelError, match=r"'1\.weight'"):
        adfify.adfify(network)
    with pytest.raises(ModelError, match=r"'1\.weight'"):
        adf.load_state_dict(network.state_dict())


# Softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", [gaussian.softmax, gaussian.log_softmax])
def test_softmax_and_its_gradients_are_finite(rule, dtype: torch.dtype) -> None:
    for lead in (0.0, 1.0, 51.0, 1e3, 1e4):
        for spread in (0.0, 1e-30, 1e-6, 1.0, 100.0, 800.0, 1e4, 1e8):
            for classes in (1, 2, 5):
                mean = (torch.arange(classes, dtype=dtype) == 1) * lead + 0.1 * torch.arange(classes, dtype=dtype)
                mean, variance = mean.requires_grad_(), torch.full_like(mean, spread).requires_grad_()
                results = rule(mean, variance)
                assert all(part.isfinite().all() for part in results)
                assert (results[1] >= 0).all()
                for part in results:
                    weighted = (part * torch.arange(1, classes + 1)).sum()
                    for gradient in torch.autograd.grad(
                        weighted, (mean, variance), retain_graph=True, allow_unused=True
                    ):
                        assert gradient is None or gradient.isfinite().all(), (lead, spread, classes)


def test_softmax_of_wide_logits_is_near_monte_carlo() -> None:
    mean, variance = torch.tensor([0.0, 10.0, 40.0]).double(), torch.tensor([800.0, 900.0, 1000.0]).double()
    draws = mean + variance.sqrt() * torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0)).double()
    truth = torch.softmax(draws, -1)
    got = gaussian.softmax(mean, variance)
    torch.testing.assert_close(got[0], truth.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(got[1].sqrt(), truth.std(0), rtol=0.25, atol=0)


def test_a_transformer_trained_through_adf_stays_finite() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    adf = adfify.adfify(nn.Sequential(layer, nn.Linear(8, 3)), noise_variance=1.0).train()
    optimizer = torch.optim.SGD(adf.parameters(), lr=0.5)
    x, y = 3 * torch.randn(8, 6, 8), torch.randint(0, 3, (8, 6))
    for _ in range(50):
        mean, variance = adf(x)
        loss = nn.functional.cross_entropy(mean.transpose(1, 2), y) + 0.1 * variance.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(weight.isfinite().all() for weight in adf.parameters())
