"""Outputs that are seldom active, or seldom inactive: error bars hold what was not sampled."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adfify import adfify

T = np.linspace(-12, 12, 200_001)
DENSITY = np.exp(-0.5 * T * T) / math.sqrt(2 * math.pi)


def truth(function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Mean and std of a function of a standard normal variable, by quadrature."""
    step, values = T[1] - T[0], function(T)
    mean = float((values * DENSITY).sum() * step)
    return mean, float(((values - mean) ** 2 * DENSITY).sum() * step) ** 0.5


def unit(shifts: list[float], inputs: int = 8) -> nn.Linear:
    """Outputs N(shift, 1) of standard normal inputs, all of one and the same combination of them."""
    linear = nn.Linear(inputs, len(shifts))
    nn.init.constant_(linear.weight, inputs**-0.5)
    linear.bias.data.copy_(torch.tensor(shifts))
    return linear.requires_grad_(False)


def held(model: nn.Module, expected: list[tuple[float, float]], inputs: int = 8, **how: object) -> None:
    joint = adfify(model.eval(), noise_variance=1.0, **how).joint(torch.zeros(1, inputs), outputs="all")
    for n, (mean, std) in enumerate(expected):
        found, error = float(joint.std[0, n]), float(joint.std_error[0, n])
        assert abs(found - std) <= max(3 * error, 0.1 * std), (n, found, error, std)
        assert abs(float(joint.mean[0, n]) - mean) <= 4 * float(joint.mean_error[0, n]) + 1e-6
        assert 0 < error <= 0.5 * std
        assert joint.mean_error[0, n] > 0
    assert torch.linalg.eigvalsh(joint.covariance.double()).min() > -1e-6
    torch.testing.assert_close(joint.covariance.diagonal(dim1=1, dim2=2), joint.variance)


@pytest.mark.parametrize("z", [1.0, 2.0, 2.5, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("inputs", [1, 8, 300])
def test_a_relu_that_is_seldom_on(z, inputs):
    held(nn.Sequential(unit([-z], inputs), nn.ReLU()), [truth(lambda t: np.maximum(t - z, 0))], inputs)


@pytest.mark.parametrize("z", [2.0, 3.0])
def test_a_relu_that_is_seldom_off(z):
    model = nn.Sequential(unit([z]), nn.ReLU())
    held(model, [truth(lambda t: np.maximum(t + z, 0))])


def test_one_that_is_rare_beside_others():
    shifts = [0.0, -3.0, 1.0, -3.5]
    held(nn.Sequential(unit(shifts), nn.ReLU()), [truth(lambda t, s=s: np.maximum(t + s, 0)) for s in shifts])


def test_a_sigmoid_that_is_seldom_not_saturated():
    steep = unit([-3.0])
    steep.weight.mul_(10), steep.bias.mul_(10)
    held(nn.Sequential(steep, nn.Sigmoid()), [truth(lambda t: 1 / (1 + np.exp(-10 * (t - 3))))])


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.data.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x) - 3.5).amax(1, keepdim=True)


def test_the_largest_of_several_that_are_seldom_on():
    single = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))
    grid = np.linspace(0, 8, 8001)
    above = 1 - single(grid + 3.5) ** 4  # P(the largest > t)
    step = grid[1] - grid[0]
    mean, square = above.sum() * step - above[0] * step / 2, (2 * grid * above).sum() * step
    held(Largest(), [(float(mean), float(square - mean**2) ** 0.5)], 4)


def test_two_layers_and_both_sides():
    both = nn.Linear(8, 2)
    nn.init.constant_(both.weight, 8**-0.5)
    both.weight.data[1] *= -1
    nn.init.constant_(both.bias, -3.0)
    last = nn.Linear(2, 1)
    nn.init.ones_(last.weight), nn.init.zeros_(last.bias)
    model = nn.Sequential(both, nn.ReLU(), last).requires_grad_(False)
    held(model, [truth(lambda t: np.maximum(t - 3, 0) + np.maximum(-t - 3, 0))])


def test_analytic_masks_leave_errors_finite_and_not_0():
    model = nn.Sequential(unit([-3.0, 0.0]), nn.ReLU(), nn.Dropout(0.5))
    joint = adfify(model.eval(), noise_variance=1.0, dropout="analytic").joint(torch.zeros(1, 8), outputs="all")
    for n, z in enumerate((3.0, 0.0)):
        mean, std = truth(lambda t, z=z: np.maximum(t - z, 0))
        std = (2 * (std**2 + mean**2) - mean**2) ** 0.5  # E[mask^2] = 2
        assert abs(float(joint.std[0, n]) - std) <= max(3 * float(joint.std_error[0, n]), 0.1 * std)
        assert 0 < joint.std_error[0, n] < std
    assert joint.mean_error.isfinite().all()
    assert (joint.model_variance <= joint.variance * 1.001).all()


class Difference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) - torch.relu(x)


def test_what_is_certain_has_no_error():
    joint = adfify(Difference(), noise_variance=1.0).joint(torch.zeros(1, 3), outputs="all")
    assert not joint.std.any()
    assert not joint.std_error.any()
