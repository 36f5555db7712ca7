"""Joint moments of a batch: each example's own numbers, wherever the batch is, whatever is beside it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify, monte_carlo
from adfify.errors import InputError


def net(*layers: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(*layers).to(dtype).eval()


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return net(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3), dtype=dtype)


def batch(count: int, width: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["adjoint", "sketch"])
def test_each_example_has_its_own_numbers_in_every_batch(dtype: torch.dtype, method: str) -> None:
    adf, x = adfify(small(dtype), noise_variance=0.1), batch(16, dtype=dtype)
    alone = [adf.joint(x[n : n + 1], outputs="all", method=method, samples=16) for n in range(16)]
    for count in (2, 3, 5, 11, 16):
        there = adf.joint(x[:count], outputs="all", method=method, samples=16)
        for field in fields(there):
            value = getattr(there, field.name)
            if isinstance(value, Tensor):
                assert len(value) == count, field.name
                for n in range(count):
                    assert torch.equal(value[n : n + 1], getattr(alone[n], field.name)), (count, n, field.name)


class Readout(nn.Module):
    """The mean of some channels, the same ones for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 20), nn.ReLU())

    def forward(self, x: Tensor, channels: Tensor) -> Tensor:
        there: Tensor = self.net(x)[:, channels].mean(1, keepdim=True)
        return there


@pytest.mark.parametrize("count", [11, 12, 1])
def test_a_list_of_channels_is_no_batch(count: int) -> None:
    torch.manual_seed(0)
    model, channels, x = Readout().eval(), torch.arange(0, 12), 2 * batch(count, 20)
    adf = adfify(model, example_inputs=(x, channels), noise_variance=0.3)
    got, draws = adf.joint(x, channels, outputs="all"), 4000
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(draws, count, 20, generator=generator) * 0.3**0.5
    with torch.no_grad():
        values = torch.stack([model(x + one, channels) for one in noise])
    z = (got.std / values.std(0)).log() / (1 / (2 * draws)) ** 0.5
    assert float(z.abs().max()) < 5
    assert torch.equal(got.std[:1], adf.joint(x[:1], channels, outputs="all").std)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        scaled: Tensor = self.net(x) * (1 + kind).unsqueeze(1).to(x.dtype)
        return scaled


def test_a_certain_input_of_each_example_goes_with_its_example() -> None:
    torch.manual_seed(0)
    x, kind = batch(4), torch.tensor([0, 3, 1, 7])
    adf = adfify(Conditioned().eval(), example_inputs=(x, kind), noise_variance=0.1)
    scaled, plain = adf.joint(x, kind, outputs="all"), adf.joint(x, torch.zeros_like(kind), outputs="all")
    torch.testing.assert_close(scaled.std, plain.std * (1 + kind).unsqueeze(1), rtol=1e-4, atol=0)


class Regression(nn.Module):
    def __init__(self, squeezed: bool) -> None:
        super().__init__()
        self.squeezed = squeezed
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        there: Tensor = self.net(x)
        return there.squeeze() if self.squeezed else there


@pytest.mark.parametrize("count", [1, 3])
def test_a_squeezed_output_is_found(count: int) -> None:
    torch.manual_seed(0)
    model, plain, x = Regression(True).eval(), Regression(False).eval(), batch(count)
    plain.load_state_dict(model.state_dict())
    got = adfify(model, noise_variance=0.1).joint(x, outputs="all", samples=64)
    same = adfify(plain, noise_variance=0.1).joint(x, outputs="all", samples=64)
    torch.testing.assert_close(got.std, same.std, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.mean, same.mean, rtol=1e-5, atol=1e-6)


class TimeFirst(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm, self.batch_first = nn.LSTM(3, 5, batch_first=batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return states[:, -1] if self.batch_first else states[-1]


@pytest.mark.parametrize("how", [{}, {"batched": {"x": 1}}])
@pytest.mark.parametrize("shape", [(4, 3, 3), (1, 3, 3), (4, 1, 3), (3, 3, 3)])
def test_time_first_is_found(how: dict[str, object], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second = TimeFirst(False).eval(), TimeFirst(True).eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # steps of examples
    adf = adfify(first, noise_variance=0.1)
    got = adf.joint(x, outputs="all", method="adjoint", samples=64, **how)
    same = adfify(second, noise_variance=0.1).joint(x.transpose(0, 1), outputs="all", method="adjoint", samples=64)
    assert len(got.std) == shape[1]
    torch.testing.assert_close(got.std, same.std, rtol=0.1, atol=0)  # other noise: 32 pairs each
    torch.testing.assert_close(got.mean, same.mean, rtol=0, atol=0.05)


class WithState(nn.Module):
    """The batch is first in x, second in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        states: Tensor = self.gru(x, state)[0]
        return states[:, -1]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("certain", [True, False])
def test_a_state_holds_the_batch_second(count: int, certain: bool) -> None:
    torch.manual_seed(0)
    model, x, state = WithState().eval(), torch.randn(count, 5, 3), torch.randn(1, count, 4)
    own = torch.full_like(state, 0.0 if certain else 0.1)
    adf = adfify(model, example_inputs=(x, state), noise_variance=0.1)
    got = adf.joint(x, Moments(state, own), outputs="all")
    alone = adf.joint(x[-1:], Moments(state[:, -1:], own[:, -1:]), outputs="all")
    assert len(got.std) == count
    assert torch.equal(got.std[-1:], alone.std)
    plain = monte_carlo(model, (Moments(x, torch.full_like(x, 0.1)), Moments(state, own)), draws=4000, seed=3)
    z = (got.std - plain.std) / (got.std_error.square() + plain.std_error.square()).sqrt()
    assert float(z.abs().max()) < 4.5


class Mixing(nn.Module):
    """What an example gets from the others beside it is a weight."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor([1.0, share]))
        self.net = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        mixed: Tensor = self.share[0] * y + self.share[1] * y.mean(0, keepdim=True)
        return mixed


def test_a_model_that_mixes_examples_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="what is beside it"):
        adfify(Mixing(0.5).eval(), noise_variance=0.1).joint(batch(3))


def test_other_weights_are_decided_anew() -> None:
    torch.manual_seed(0)
    adf, x = adfify(Mixing(0.0).eval(), noise_variance=0.1), batch(3)
    adf.joint(x)
    adf.load_state_dict({**adf.state_dict(), "share": torch.tensor([0.0, 1.0])})  # a permutation of what was there
    with pytest.raises(InputError, match="what is beside it"):
        adf.joint(x)
    adf.share.data.copy_(torch.tensor([1.0, 0.0]))
    adf.joint(x)


class Two(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"same": 2 * x, "mixed": x + x.mean(0, keepdim=True)}


def test_another_output_is_decided_anew() -> None:
    adf, x = adfify(Two(), noise_variance=0.1), batch(3)
    got = adf.joint(x, output="same", outputs="all")
    torch.testing.assert_close(got.std, torch.full((3, 6), 2 * 0.1**0.5), rtol=1e-4, atol=0)
    with pytest.raises(InputError, match="what is beside it"):
        adf.joint(x, output="mixed")


@pytest.mark.parametrize("batched", ["first", {"y": 0}, {"x": 2}, 3])
def test_what_is_said_of_the_batch_is_repeated_where_it_can_not_be(batched: object) -> None:
    with pytest.raises(InputError, match="batched="):
        adfify(small()).joint(batch(3), batched=batched)


def test_a_control_is_unbiased_for_a_batch_that_is_not_first() -> None:
    torch.manual_seed(0)
    model = TimeFirst(False).eval()
    x = Moments(torch.randn(4, 3, 3), torch.full((4, 3, 3), 0.1))
    found = monte_carlo(model, x, draws=200, control=adfify(model), outputs="all", batched={"x": 1})
    plain = monte_carlo(model, x, draws=4000)
    z = (found.std - plain.std) / (found.std_error.square() + plain.std_error.square()).sqrt()
    assert float(z.abs().max()) < 4.5
