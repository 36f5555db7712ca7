"""Operands that are functions of one variable: the moments of the one function that they make together."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adfify
from adfify import Moments, composition, published


class Written(nn.Module):
    """A network whose activation is written out by hand."""

    def __init__(self, activation):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.relu6 = nn.ReLU6(inplace=True)
        self.activation = activation

    def forward(self, x):
        return self.activation(self, self.linear(x))


def swish(net, x):
    return x * torch.sigmoid(x)


def swish_in_place(net, x):
    gate = x.sigmoid()
    x *= gate
    return x


def hard_swish(net, x):
    return x * net.relu6(x + 3) / 6


def mish(net, x):
    return torch.mul(x, F.softplus(x).tanh())


def gelu_tanh(net, x):
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def negative_part(net, x):
    return x - torch.relu(x)


KNOWN = {
    swish: F.silu,
    swish_in_place: F.silu,
    hard_swish: F.hardswish,
    mish: F.mish,
    gelu_tanh: lambda x: F.gelu(x, approximate="tanh"),
    negative_part: lambda x: -torch.relu(-x),
}


def built(activation):
    torch.manual_seed(0)
    return Written(activation).double().eval()


@pytest.mark.parametrize("written", KNOWN, ids=lambda f: f.__name__)
def test_it_has_the_moments_of_the_activation_that_torch_knows(written):
    x = torch.randn(6, 5, dtype=torch.float64)
    for noise_variance in (1e-4, 1e-1, 1.0):
        got = adfify.adfify(built(written), noise_variance=noise_variance)(x)
        want = adfify.adfify(built(lambda net, x: KNOWN[written](x)), noise_variance=noise_variance)(x)
        torch.testing.assert_close(got.mean, want.mean, rtol=0, atol=3e-4 * float(want.std.max()))
        torch.testing.assert_close(got.std, want.std, rtol=0, atol=1e-3 * float(want.std.max()))


@pytest.mark.parametrize("written", KNOWN, ids=lambda f: f.__name__)
def test_at_variance_zero_it_is_the_original(written):
    net, x = built(written), torch.randn(6, 5, dtype=torch.float64)
    mean, variance = adfify.adfify(net, noise_variance=0.0)(x)
    assert torch.equal(mean, net(x))
    assert (variance == 0).all()


def difference(net, x):
    return torch.relu(x) - torch.relu(x)


def difference_of_branches(net, x):
    return torch.sigmoid(torch.relu(x)) - F.relu(x).sigmoid()


@pytest.mark.parametrize("written", [difference, difference_of_branches])
def test_a_variable_less_itself_is_certain(written):
    mean, variance = adfify.adfify(built(written), noise_variance=0.5)(torch.randn(6, 5, dtype=torch.float64))
    assert (mean == 0).all()
    assert (variance == 0).all()


def with_another_tensor(net, x):
    return x * torch.sigmoid(net.linear(x[:, :5]))


def with_parameters(net, x):
    return x * torch.sigmoid(x * net.linear.bias)


def entropy(net, x):
    y = x.sigmoid()
    return -y * y.log()


def divided_by_a_root(net, x):
    y = x.sigmoid() + 1
    return y * y.sqrt() * x.exp()


@pytest.mark.parametrize("written", [entropy, divided_by_a_root])
def test_functions_that_end_or_overflow_are_not_followed(written):
    result = adfify.adfify(built(written), noise_variance=0.1)(10 * torch.randn(6, 5, dtype=torch.float64))
    assert result.mean.isfinite().all()
    assert (result.variance >= 0).all()


def kinks_elsewhere(net, x):
    return torch.relu(1 - x) * x


def test_kinks_elsewhere_are_within_the_stated_tolerance():
    draw = torch.Generator().manual_seed(0)
    net = built(kinks_elsewhere)
    x = torch.randn(6, 5, generator=draw, dtype=torch.float64)
    got = adfify.adfify(net, noise_variance=0.1)(x)
    noisy = x[:, None] + 0.1**0.5 * torch.randn(6, 100_000, 5, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        truth = net(noisy)
    mean, std = truth.mean(1), truth.std(1)
    seen = std > 0.1 * std.max()
    allowed = composition.TOLERANCE + 6 / 100_000**0.5
    assert ((got.mean - mean).abs() / std)[seen].max() <= allowed
    assert (got.std / std - 1).abs()[seen].max() <= allowed


@pytest.mark.parametrize("written", [with_another_tensor, with_parameters])
def test_other_products_keep_the_rule_of_the_product(written):
    plan = adfify.inspect(built(written))
    assert "adfify.nn.arithmetic.mul" in {record["rule"] for record in plan.records()}
    assert "composition" not in str(plan)


def test_an_overlay_keeps_its_own_numerics():
    plan = adfify.inspect(built(negative_part), rules=published.RULES)
    assert "composition" not in str(plan)


def test_what_it_takes_the_place_of_is_gone_and_what_else_needs_it_stays():
    def both(net, x):
        gate = torch.sigmoid(x)
        return x * gate, gate + 1

    once, twice = adfify.adfify(built(swish)), adfify.adfify(built(both), min_variance=1e-9)
    assert "sigmoid" not in once.code
    assert "sigmoid" in twice.code
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(twice(x)[0].mean, once(x).mean)


def test_it_copies_and_pickles_from_either_engine():
    def branching(net, x):
        return x * torch.sigmoid(x) if x.shape[0] > 1 else x

    x = torch.randn(6, 5, dtype=torch.float64)
    exported = adfify.adfify(built(branching), x)
    assert "composition" in str(adfify.inspect(built(branching), x))
    expected = adfify.adfify(built(swish))(x)
    for adf in (adfify.adfify(built(swish)), exported):
        for twin in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
            assert torch.equal(twin(Moments(x, torch.full_like(x, 1e-3))).variance, expected.variance)
