"""Unpooling by places that depend on uncertain values is refused, by known places it converts."""

import pytest
import torch
from torch import Tensor, nn

import adfify


class Unpooled(nn.Module):
    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known, self.unpool = known, nn.MaxUnpool2d(2)
        self.register_buffer("places", torch.tensor([[[[0, 3], [8, 15]]]]))

    def forward(self, x: Tensor) -> Tensor:
        y, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        return self.unpool(y, self.places if self.known else places)


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unpool = nn.MaxUnpool2d(2)
        self.register_buffer("places", torch.tensor([[[[0, 3], [8, 15]]]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(x, self.places)


def test_places_that_depend_on_the_values_are_refused_at_conversion() -> None:
    with pytest.raises(adfify.UnsupportedOpsError):
        adfify.adfify(Unpooled(False), torch.randn(1, 1, 4, 4))


def test_known_places_convert() -> None:
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    adf = adfify.adfify(Given(), x, noise_variance=0.04)
    mean, variance = adf(x)
    assert torch.equal(mean, Given()(x))
    assert torch.equal(variance, Given()(torch.full_like(x, 0.04)))
