"""Comparisons, choices and steps of uncertain values: alone, and where mask and value are functions of one variable.

The truth is fine quadrature of the original over the one variable, or the law of the two that are compared.
"""

import copy
import pickle
from statistics import NormalDist

import pytest
import torch
from torch import nn

import adfify
from adfify import Moments

PHI = NormalDist().cdf


class Written(nn.Module):
    """A network of one function; ``branching`` on a size, which only torch.export can trace."""

    def __init__(self, function, branching=False):
        super().__init__()
        self.function, self.branching = function, branching
        self.register_buffer("levels", torch.tensor([0.1, -0.3, 0.5, 0.0, 1.0], dtype=torch.float64))

    def forward(self, *inputs):
        if self.branching and inputs[0].shape[0] > 10_000_000:
            return inputs[0]
        return self.function(self, *inputs)


def converted(function, engine, *examples, **options):
    branching = engine == "export"
    net = Written(function, branching).to(examples[0].dtype)
    adf = adfify.adfify(net, example_inputs=examples, **options)
    assert ("check" in str(adf.plan)) or not branching
    return net, adf


def truth(net, x):
    """Moments of an elementwise function by 200,000 midpoints."""
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    z = ((z[1:] + z[:-1]) / 2).reshape(-1, *[1] * x.mean.dim())
    weight = torch.exp(-z * z / 2)
    weight = weight / weight.sum()
    with torch.no_grad():
        values = net.double()((x.mean.double() + x.variance.double().sqrt() * z).flatten(0, -2)).double()
    values = values.reshape(len(z), *x.shape)
    mean = (weight * values).sum(0)
    return mean, (weight * (values - mean).square()).sum(0).sqrt()


MEAN = torch.tensor([[0.3, -0.2, 0.5, 0.0, 2.0], [1.0, -0.5, 0.4, 30.0, -1e-3]], dtype=torch.float64)
STD = torch.tensor([[0.3, 0.1, 1.0, 0.7, 0.01], [0.5, 0.2, 3.0, 20.0, 1e-3]], dtype=torch.float64)


def indicator(net, x):
    return (x > net.levels).float()


def counted(net, x):
    return x.le(0.3) * 2 - 1


def reflected(net, x):
    return (0 < x) * x  # noqa: SIM300  it is this form that is meant


def relu_by_a_mask(net, x):
    return x * (x > 0)


def mask_in_the_dtype_of_x(net, x):
    return (x >= 0).to(x.dtype) * x + (x < 0).type_as(x) * 0.5


def mask_as_whole_number(net, x):
    return (x > 0.1).long() * x


def relu_by_where(net, x):
    return torch.where(x.gt(0), x, 0.1 * x)


def where_method(net, x):
    return x.where(x > 0, torch.zeros_like(x))


def with_certain_tensors(net, x):
    return torch.where(x > net.levels, x, 2 * net.levels)


def filled(net, x):
    return x.masked_fill(torch.lt(x, 0), -1.0)


def written_into(net, x):
    y = x.clone()
    y[y < net.levels] = 0
    return y


def band(net, x):
    return ((x > -0.5) & (x < 0.7)) * x


def outside(net, x):
    return torch.where((x < -0.5) | ~(x < 0.7), x, 0.0)


def soft_threshold(net, x):
    return torch.where(x > 0.5, x - 0.5, torch.where(x < -0.5, x + 0.5, 0.0))


def huber(net, x):
    return torch.where(x.abs() < 1, 0.5 * x * x, x.abs() - 0.5)


def at_a_root(net, x):
    return torch.sigmoid(x) * (x * x > 1)


def straight_through(net, x):
    return x + ((x > 0).to(x.dtype) - x).detach()


def one_where_zero(net, x):
    return torch.where(x == 0, torch.ones_like(x), x) * x


def scaled_first(net, x):
    y = x * 3 - 1
    return torch.where(y / 2 > net.levels, y, -y)


WRITTEN = [
    indicator, counted, reflected, relu_by_a_mask, mask_in_the_dtype_of_x, mask_as_whole_number, relu_by_where,
    where_method, with_certain_tensors, filled, written_into, band, outside, soft_threshold, huber, at_a_root,
    straight_through, one_where_zero, scaled_first,
]  # fmt: skip
each = pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
engines = pytest.mark.parametrize("engine", ["fx", "export"])


@engines
@each
def test_moments_of_one_variable_are_those_of_the_function(function, engine):
    net, adf = converted(function, engine, MEAN)
    x = Moments(MEAN, STD.square())
    got, (mean, std) = adf(x), truth(net, x)
    unit = std.clamp(min=1e-3 * STD)
    assert ((got.mean.double() - mean).abs() / unit).max() < 2e-3
    assert ((got.std.double() - std).abs() / unit).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@each
def test_at_variance_zero_it_is_the_original(function, dtype):
    mean = torch.cat([MEAN, torch.tensor([[0.1, -0.3, 0.5, 0.0, 1.0]])]).to(dtype)  # at the jumps, too
    net, adf = converted(function, "fx", mean)
    got, want = adf(Moments(mean, torch.zeros_like(mean))), net(mean)
    assert torch.equal(got.mean, want.to(got.mean.dtype))
    assert (got.variance == 0).all()


@each
def test_no_scale_is_too_small_or_large(function):
    """At the jump, and elsewhere; in float32 what float64 says."""
    std = torch.tensor([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e2, 1e4], dtype=torch.float64)[:, None]
    for mean in (torch.zeros(5), torch.tensor([0.1, -0.3, 0.5, 1.0, -1.0]), torch.tensor([1e4, -1e4, 3.0, -7.0, 0.25])):
        mean = mean.double().expand(8, 5).contiguous()
        narrow = Moments(mean.float(), (std * std).expand(8, 5).float())
        wide = Moments(narrow.mean.double(), narrow.variance.double())
        results = [converted(function, "fx", x.mean)[1](x) for x in (narrow, wide)]
        for x in results:
            assert x.mean.isfinite().all()
            assert x.variance.isfinite().all()
            assert (x.variance >= 0).all()
        a, b = results
        unit = b.std.clamp(min=1e-3) + 1e-6 * b.mean.abs()
        # A level that float32 has not is another level.
        seen = torch.ones(8, 5, dtype=torch.bool) if "levels" not in function.__code__.co_names else std > 1e-3
        assert (((a.mean - b.mean).abs() / unit) * seen).max() < 1e-3
        assert (((a.std - b.std).abs() / unit) * seen).max() < 1e-3


def test_at_the_jump_a_half_is_on_either_side_at_any_scale():
    for at in (0.0, 1.0, -1e4, 0.1):
        for std in (1e-15, 1e-8, 1e-3, 1.0, 1e4):
            for dtype in (torch.float32, torch.float64):
                x = torch.full((1, 1), at, dtype=dtype)
                level = float(x)
                for function in (
                    lambda net, x, level=level: (x > level) * 2.0,
                    lambda net, x, level=level: torch.where(x < level, x - level, 2 + 0 * x),
                ):
                    got = converted(function, "fx", x)[1](Moments(x, torch.full_like(x, std * std)))
                    if std <= 1e-3:
                        torch.testing.assert_close(got.mean.double(), torch.ones(1, 1).double(), rtol=2e-3, atol=0)
                        torch.testing.assert_close(got.std.double(), torch.ones(1, 1).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("function", [relu_by_where, band, with_certain_tensors, huber], ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_values(function):
    x = Moments(MEAN[:1].clone().requires_grad_(), STD[:1].square().requires_grad_())
    _, adf = converted(function, "fx", MEAN)
    assert torch.autograd.gradcheck(lambda m, v: tuple(adf(Moments(m, v))), (x.mean, x.variance), atol=1e-5, rtol=1e-3)
    zero = torch.zeros_like(MEAN).requires_grad_()
    mean = MEAN.clone().requires_grad_()
    for part in adf(Moments(mean, zero)):
        for gradient in torch.autograd.grad(part.sum(), (mean, zero), retain_graph=True, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


# Two variables

A = Moments(torch.tensor([[0.3, -1.0, 2.0, 0.0]]).double(), torch.tensor([[0.2, 1.0, 0.5, 0.3]]).double())
B = Moments(torch.tensor([[0.1, -0.5, 0.0, 0.0]]).double(), torch.tensor([[0.1, 2.0, 3.0, 0.0]]).double())
C = Moments(torch.tensor([[3.0, -1.0, 1.0, 2.0]]).double(), torch.tensor([[0.5, 0.3, 0.0, 0.2]]).double())


def drawn(net, *inputs, draws=100_000):
    generator = torch.Generator().manual_seed(0)
    noisy = [x.mean + x.std * torch.randn(draws, *x.shape[1:], generator=generator).double() for x in inputs]
    with torch.no_grad():
        values = net(*noisy).double()
    mean, variance = values.mean(0), values.var(0)
    fourth = (values - mean).pow(4).mean(0)
    return mean, (variance / draws).sqrt(), variance, ((fourth - variance.square()).clamp(min=0) / draws).sqrt()


def compared(net, a, b):
    return (a > b).float()


def gated(net, a, b, c):
    return torch.where(a > 0.5, b, c)


def gated_by_a_difference(net, a, b, c):
    return c * (a < b)


def masked_sum(net, a, b):
    return ((a > 0) & (b > 0)).sum(-1, keepdim=True)


def filled_by_another(net, a, b):
    return a.masked_fill(b > 0, 3.0)


def any_and_all(net, a, b):
    return (a > 1.5).any(-1, keepdim=True).float() + 2 * (b > -1).all(-1, keepdim=True)


def either(net, a, b):
    return ((a > 0) ^ (b > 0)).double() + (a > 0).double().mean(-1, keepdim=True) * 0


INDEPENDENT = [compared, gated, gated_by_a_difference, masked_sum, filled_by_another, any_and_all]


@engines
@pytest.mark.parametrize("function", INDEPENDENT, ids=lambda f: f.__name__)
def test_a_mask_and_values_that_are_independent_of_it(function, engine):
    inputs = (A, B, C)[: function.__code__.co_argcount - 1]
    net, adf = converted(function, engine, *[x.mean for x in inputs])
    got = adf(*inputs)
    mean, mean_error, variance, variance_error = drawn(net, *inputs)
    assert ((got.mean[0] - mean).abs() <= 4.5 * mean_error + 1e-9).all()
    assert ((got.variance[0] - variance).abs() <= 4.5 * variance_error + 1e-5).all()


def safe(net, a, d):
    return torch.where(d == 0, 0.0, a / d)


def safe_by_a_fill(net, a, d):
    return (a / d).masked_fill(d == 0, 0.0)


def safe_divisor(net, a, d):
    return a / torch.where(d == 0, torch.ones_like(d), d)


@engines
@pytest.mark.parametrize("function", [safe, safe_by_a_fill, safe_divisor], ids=lambda f: f.__name__)
def test_safe_division_is_division_where_the_divisor_varies(function, engine):
    net, adf = converted(function, engine, A.mean, B.mean)
    d = Moments(torch.tensor([[3.0, -4.0, 0.0, 2.0]]).double(), torch.tensor([[0.01, 0.02, 0.0, 0.0]]).double())
    got, plain = adf(A, d), converted(lambda net, a, d: a / d, "fx", A.mean, B.mean)[1](A, d)
    divided = torch.tensor([True, True, False, True])
    assert torch.equal(got.mean[:, divided], plain.mean[:, divided])
    assert torch.equal(got.variance[:, divided], plain.variance[:, divided])
    zero = [Moments(x.mean, torch.zeros_like(x.variance)) for x in (A, d)]
    assert torch.equal(adf(*zero).mean, net(A.mean, d.mean))
    assert (adf(*zero).variance == 0).all()
    if function is not safe_divisor:
        assert got.mean[0, 2] == 0
        assert got.variance[0, 2] == 0


@engines
def test_a_layer_between_makes_mask_and_value_independent(engine):
    """Layers mix elements: one pass takes what is behind them as independent, here as everywhere."""
    torch.manual_seed(0)
    one, other = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

    def function(net, x):
        return torch.where(one(x) > 0, other(x), 0.0)

    _, adf = converted(function, engine, MEAN)
    assert "adfify.nn.choosing.where" in str(adf.plan)


def test_the_same_layer_called_twice_is_one_variable():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x):
            return torch.where(self.linear(x) > 0, self.linear(x), 0.0)

    net = Twice().double()
    x = Moments(MEAN, STD.square())
    linear = adfify.adfify(nn.Sequential(copy.deepcopy(net.linear), nn.ReLU()))(x)
    got = adfify.adfify(net)(x)
    torch.testing.assert_close(got.mean, linear.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.variance, linear.variance, rtol=1e-3, atol=1e-4)


# Joint, Monte Carlo, copies


@pytest.mark.parametrize("function", [relu_by_a_mask, indicator, straight_through, band], ids=lambda f: f.__name__)
def test_joint_and_monte_carlo_see_the_jump(function):
    net, adf = converted(function, "fx", MEAN)
    x = Moments(MEAN[:1], STD[:1].square())
    std = truth(net, x)[1]
    joint = adf.joint(x, outputs="all")
    assert joint.method == "sketch"
    assert ((joint.std - std).abs() <= 5 * joint.std_error + 0.02 * std).all()
    assert (joint.std_error[std > 1e-2] > 0).all()
    sampled = adfify.monte_carlo(net, x, draws=4000)
    assert ((sampled.std.double() - std).abs() <= 5 * sampled.std_error + 1e-3).all()


def test_it_copies_pickles_and_saves(tmp_path):
    _, adf = converted(with_certain_tensors, "fx", MEAN)
    x = Moments(MEAN, STD.square())
    expected = adf(x)
    for twin in (copy.deepcopy(adf), pickle.loads(pickle.dumps(adfify.adfify(Plain())))):
        assert torch.equal(twin(x).variance, expected.variance)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("levels", torch.tensor([0.1, -0.3, 0.5, 0.0, 1.0], dtype=torch.float64))

    def forward(self, x):
        return with_certain_tensors(self, x)


def test_exact_probabilities():
    x = Moments(torch.tensor([0.5, -2.0, 5.0]).double(), torch.tensor([1.0, 4.0, 0.25]).double())
    got = converted(lambda net, x: x >= 1, "fx", x.mean)[1](x)
    want = torch.tensor([PHI(-0.5), PHI(-1.5), PHI(8.0)]).double()
    torch.testing.assert_close(got.mean, want)
    torch.testing.assert_close(
        got.variance, torch.tensor([PHI(-0.5) * PHI(0.5), PHI(-1.5) * PHI(1.5), PHI(-8)]).double()
    )


# Steps


def fraction(net, x):
    return x - torch.floor(x)


def signed(net, x):
    return x * torch.sign(x - 1)


def rounded_straight_through(net, x):
    return x + (torch.round(x) - x).detach()


def shrunk(net, x):
    return torch.nn.functional.hardshrink(x) * x


def remainder(net, x):
    return x - x % 0.7


def quotient(net, x):
    return torch.div(x, 0.3, rounding_mode="trunc") * 0.3 - x


STEPS = [fraction, signed, rounded_straight_through, shrunk, remainder, quotient]


@engines
@pytest.mark.parametrize("function", STEPS, ids=lambda f: f.__name__)
def test_steps_of_one_variable(function, engine):
    mean = torch.tensor([[0.3, -0.2, 0.5, 0.0, 2.0]], dtype=torch.float64).expand(4, 5).contiguous()
    std = torch.tensor([1e-2, 0.1, 0.7, 8.0], dtype=torch.float64)[:, None].expand(4, 5)
    net, adf = converted(function, engine, mean)
    x = Moments(mean, std.square())
    got, (want, spread) = adf(x), truth(net, x)
    unit = spread.clamp(min=1e-2)
    assert ((got.mean - want).abs() / unit).max() < 1e-2
    assert ((got.std - spread).abs() / unit).max() < 1e-2
    certain = adf(Moments(mean, torch.zeros_like(mean)))
    assert torch.equal(certain.mean, net(mean))
    assert (certain.variance == 0).all()
    joint = adf.joint(Moments(mean[:1], torch.full_like(mean[:1], 0.49)), outputs="all")
    assert joint.method == "sketch"
    assert ((joint.std[0] - spread[2]).abs() <= 5 * joint.std_error[0] + 0.02 * spread[2]).all()


def after_an_activation(net, x):
    y = torch.relu(x)
    return y + (torch.clamp(torch.round(y * 8), 0, 15) / 8 - y).detach()


def after_a_choice(net, x):
    y = torch.where(x > 0.5, x, 0.1 * x)
    return y + (torch.round(y * 8) / 8 - y).detach()


@engines
@pytest.mark.parametrize("function", [after_an_activation, after_a_choice], ids=lambda f: f.__name__)
def test_rounding_of_what_bends_is_one_function_of_that(function, engine):
    net, adf = converted(function, engine, MEAN)
    x = Moments(MEAN, torch.full_like(MEAN, 0.01))
    got, (mean, std) = adf(x), truth(net, x)
    # As if relu(x) were Gaussian, as it is for the next layer.
    far = (MEAN - 0.5).abs().minimum(MEAN.abs()) > 0.5
    assert far.any()
    assert ((got.mean - mean).abs() / std.clamp(min=1e-2))[far].max() < 2e-2
    assert ((got.std - std).abs() / std.clamp(min=1e-2))[far].max() < 2e-2
