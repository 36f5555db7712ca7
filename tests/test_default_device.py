"""Whatever torch's default device and dtype are: tensors are made where the inputs are, and as these are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adfify import Moments, adfify, monte_carlo, predict, supported
from adfify.registry import RULES


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Defaults that are right for nothing: values on "meta" are none, and float64 is another dtype than the inputs'."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


class Small(nn.Module):
    """Some of everything that a picture network has."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.GELU()
        )
        self.head = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).mean((2, 3))
        there: Tensor = self.head(pooled)
        return there


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        there: Tensor = self.attention(states, states, states)[0].mean(1)
        return there


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "picture": (Small, (2, 1, 4, 4)),
    "recurrent": (Recurrent, (2, 3, 4)),
}

ASKED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "conversion": lambda model, x: dict(adfify(model, noise_variance=0.1).named_parameters()),
    "conversion by export": lambda model, x: adfify(model, example_inputs=(x,), noise_variance=0.1)(x),
    "one pass": lambda model, x: adfify(model, noise_variance=0.1)(x),
    "adjoint": lambda model, x: adfify(model, noise_variance=0.1).joint(x, attribution=True),
    "many pairs": lambda model, x: adfify(model, noise_variance=0.1).joint(x, samples=64),
    "linearised": lambda model, x: adfify(model, noise_variance=0.1).joint(x, samples=0),
    "sketch": lambda model, x: adfify(model, noise_variance=0.1).joint(x, method="sketch", samples=16),
    "prediction": lambda model, x: predict(adfify(model, noise_variance=0.1, dropout="sampled"), x),
    "published": lambda model, x: predict(adfify(model, noise_variance=0.1, dropout="sampled"), x, 3, one_pass=True),
    "monte carlo": lambda model, x: monte_carlo(model, x, 0.1, draws=8),
    "control": lambda model, x: monte_carlo(model, x, 0.1, draws=8, control=adfify(model)),
}


RULES_ONCE = [
    trial
    for trial in oracles.trials(RULES, supported())
    if trial.target is trial.rule.targets[0] and not trial.rule.certain
]


@pytest.fixture
def usual(request: pytest.FixtureRequest) -> Any:
    """A rule, its inputs and its results with torch's own defaults; made before `elsewhere`, which comes after it."""
    trial = request.getfixturevalue("trial")
    rule, x = trial.converted(torch.float32), trial.moments(torch.float32)
    torch.manual_seed(5)
    return rule, x, tensors({"all": rule(*x)})


@pytest.mark.parametrize("trial", RULES_ONCE, ids=[trial.name for trial in RULES_ONCE])
def test_the_defaults_change_no_rule(usual: Any, elsewhere: None, trial: oracles.Trial) -> None:
    rule, x, expected = usual
    torch.manual_seed(5)
    same(tensors({"all": rule(*x)}), expected)


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for here, there in zip(got, expected, strict=True):
        assert here.device == there.device and here.dtype == there.dtype
        # Attention and recurrent layers have faster kernels where torch's defaults are its own.
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5, equal_nan=True)


def made(name: str) -> tuple[nn.Module, Tensor]:
    model, shape = MODELS[name]
    torch.manual_seed(0)
    return model().eval(), torch.randn(shape)


def tensors(result: Any) -> list[Tensor]:
    parts = vars(result) if not isinstance(result, (dict, Tensor)) else result
    found = []
    for leaf in pytree.tree_leaves(parts, is_leaf=lambda value: isinstance(value, Moments)):
        found += [leaf.mean, leaf.variance] if isinstance(leaf, Moments) else [leaf]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


@pytest.fixture
def expected(request: pytest.FixtureRequest) -> Any:
    """With torch's own defaults; made before `elsewhere`, which comes after it among a test's fixtures."""
    name, asked = request.getfixturevalue("name"), request.getfixturevalue("asked")
    model, x = made(name)
    return model, x, tensors(ASKED[asked](model, x))


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_change_nothing(expected: Any, elsewhere: None, name: str, asked: str) -> None:
    model, x, usual = expected
    same(tensors(ASKED[asked](model, x)), usual)
