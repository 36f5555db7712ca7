"""Error bars hold what they say, over an ensemble of small networks: gates, saturation, rare events, maxima."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from adfify import adfify
from adfify.gaussian import student

DRAWS = 160_000
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.Hardtanh, nn.SiLU, nn.ReLU6, nn.Softplus)
GATES = (nn.ReLU, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid)


def convolutional(rng: random.Random, activation: type[nn.Module], outputs: int) -> tuple[nn.Sequential, Tensor]:
    pool = rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)])
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), activation(), pool, nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 8), activation(), nn.Linear(8, outputs)), torch.randn(1, 1, 8, 8)


def dense(rng: random.Random, activation: type[nn.Module], outputs: int) -> tuple[nn.Sequential, Tensor]:
    inputs, layers = rng.choice([2, 6, 20]), []
    widths = [inputs] + [rng.choice([4, 12])] * rng.choice([1, 2, 6])
    for before, width in itertools.pairwise(widths):
        layers += [nn.Linear(before, width), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs)), torch.randn(1, inputs)


def network(number: int) -> tuple[nn.Module, Tensor, float]:
    """A network with its input and the std of its noise; every second one ends in gates that are seldom between."""
    rng = random.Random(7000 + number)
    torch.manual_seed(7000 + number)
    make = convolutional if number % 3 == 0 else dense
    model, x = make(rng, rng.choice(ACTIVATIONS), outputs := rng.choice([1, 3]))
    std, gain = 10 ** rng.uniform(-3, 0), rng.choice([1.0, 2.5])
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight.mul_(gain)
        model.eval()
        if number % 2:
            values = model(x + std * torch.randn(2000, *x.shape[1:]))
            away = torch.tensor([rng.uniform(-3.2, 3.2) for _ in range(outputs)])
            model[-1].bias += away * values.std(0) - values.mean(0)
            model = nn.Sequential(model, rng.choice(GATES)())
    return model.eval().requires_grad_(False), x, std


def drawn(model: nn.Module, x: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """The std of a network's outputs by plain draws, and its standard error."""
    generator, size = torch.Generator().manual_seed(3), 20_000
    with torch.no_grad():
        noise = (std * torch.randn(size, *x.shape[1:], generator=generator) for _ in range(DRAWS // size))
        values = torch.cat([model(x + one) for one in noise]).double()
    square = (values - values.mean(0)).square()
    variance = square.mean(0)
    return variance.sqrt(), square.std(0) / DRAWS**0.5 / (2 * variance.sqrt()).clamp(min=1e-300)


def test_bars_hold_over_an_ensemble() -> None:
    off, bars = [], []
    for number in range(18):
        model, x, std = network(number)
        joint, (expected, error) = adfify(model, noise_variance=std**2).joint(x, outputs="all"), drawn(model, x, std)
        found, bar = joint.std[0].double(), joint.std_error[0].double()
        assert (bar > 0).all()
        off.append((found - expected).abs() / torch.hypot(bar, error))
        bars.append(bar / expected)
    z, relative = torch.cat(off), torch.cat(bars)
    assert len(z) >= 30
    assert (z <= 2).double().mean() >= 0.9, z
    assert z.max() <= 6, z
    assert relative.median() <= 0.03  # honest, and of use


class Gated(nn.Module):
    """An ordinary output beside some that are never on: one's error is not the other's."""

    def forward(self, x: Tensor) -> Tensor:
        ordinary = x.sum(1, keepdim=True).clamp(-2, 2)
        return torch.cat((ordinary, torch.relu(x[:, :2] - 3.7), torch.relu(-x[:, :2] - 3.9)), 1)


def test_what_one_output_lacks_is_not_mended_by_the_values_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(2_000_000, generator=generator, dtype=torch.float64) * 8**0.5
    expected = float(t.clamp(-2, 2).std())
    for seed in range(4):
        joint = adfify(Gated(), noise_variance=1.0).joint(torch.zeros(1, 8), outputs="all", seed=seed)
        assert abs(float(joint.std[0, 0]) - expected) <= 4 * float(joint.std_error[0, 0])
        assert joint.std_error[0, 0] <= 0.02 * expected


@pytest.mark.parametrize(
    ("events", "ratio"), [(1, 6.48), (2, 2.195), (3, 1.624), (5, 1.311), (10, 1.137), (100, 1.012)]
)
def test_few_events_widen_a_bar_as_student_s_t(events: int, ratio: float) -> None:
    relative = torch.tensor(0.5 / events**0.5, dtype=torch.float64)
    widened = float(student.widened(relative) / relative)
    assert abs(widened / ratio - 1) <= (0.25 if events == 1 else 0.05)  # the expansion is in 1 / n


class Map(nn.Module):
    """Maps whose pixels are on in all draws, in a few of them, or in next to none; one channel never varies."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-4, 3, 64).reshape(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((torch.relu(x + self.shift), x - x.detach() + 1), 1)


def test_bars_of_a_sketch_hold_what_its_draws_did_not_see() -> None:
    z, never = [], 0
    for seed in range(5):
        joint = adfify(Map().requires_grad_(False), noise_variance=1.0).joint(
            torch.zeros(1, 1, 8, 8), outputs="all", seed=seed
        )
        assert joint.method == "sketch"
        std, bar = joint.std[0].double(), joint.std_error[0].double()
        noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.stack([torch.relu(noise + s).std() for s in torch.linspace(-4, 3, 64)])
        z.append((std[:64] - expected).abs() / bar[:64].clamp(min=1e-30))
        assert (bar[:64] / expected.clamp(min=0.1)).median() <= 0.5
        never += int((bar[:64] == 0).sum())
        assert not std[64:].any()
        assert not bar[64:].any()
    found = torch.cat(z)
    assert (found <= 2).double().mean() >= 0.9
    assert found.max() <= 6
    assert not never


def test_sampled_dropout_is_looked_at_again() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 2)
    nn.init.constant_(layer.weight, 8**-0.5)
    layer.bias.data.copy_(torch.tensor([-3.0, 0.5]))
    model = nn.Sequential(layer, nn.ReLU(), nn.Dropout(0.5)).requires_grad_(False)
    joint = adfify(model.eval(), noise_variance=1.0, dropout="sampled").joint(torch.zeros(1, 8), outputs="all")
    noise = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n, bias in enumerate((-3.0, 0.5)):
        values = torch.relu(noise + bias) * 2 * torch.randint(0, 2, noise.shape)
        assert abs(float(joint.std[0, n] - values.std())) <= 3 * float(joint.std_error[0, n])
        assert 0 < joint.std_error[0, n] <= 0.3 * values.std()


def test_the_parts_of_what_is_seldom_on_are_those_of_its_inputs() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data.copy_(torch.tensor([[0.8, 0.6, 0.0, 0.0]]))
    nn.init.constant_(layer.bias, -4.2)
    model = nn.Sequential(layer, nn.ReLU()).requires_grad_(False)
    joint = adfify(model, noise_variance=1.0).joint(torch.zeros(1, 4), outputs="all", attribution=True, samples=32)
    assert joint.std > 0
    assert joint.attribution is not None
    parts = joint.attribution.inputs["input_1" if "input_1" in joint.attribution.inputs else "input"][0, 0]
    torch.testing.assert_close(parts.sum(), joint.variance[0, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(parts / parts.sum(), torch.tensor([0.64, 0.36, 0, 0]), rtol=1e-3, atol=1e-6)
