"""Random numbers drawn in forward are never certain: refused with the line, unless there is a rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adfify import Moments, adfify, inspect
from adfify.errors import AdfifyError, UnsupportedOpsError
from adfify.registry import RULES, Rules


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.net(x))


DRAWS = {
    "randn": lambda h: h + torch.randn(h.shape),
    "randn, of a size": lambda h: h + 0.5 * torch.randn(4),
    "rand": lambda h: h * torch.rand(4, device=h.device),
    "randn_like": lambda h: h + torch.randn_like(h),
    "rand_like": lambda h: h + torch.rand_like(h),
    "randint": lambda h: h + torch.randint(0, 5, (4,)),
    "randint_like": lambda h: h + torch.randint_like(h, 5),
    "randperm": lambda h: h[:, torch.randperm(h.shape[1])],
    "randperm, of a size": lambda h: h[:, torch.randperm(4)],
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((4,), 0.5)),
    "bernoulli of what is uncertain": lambda h: h * torch.bernoulli(torch.sigmoid(h)),
    "multinomial": lambda h: h[:, torch.multinomial(torch.ones(4), 2)],
    "normal": lambda h: h + torch.normal(torch.zeros(4), torch.ones(4)),
    "normal, uncertain": lambda h: torch.normal(h, torch.ones_like(h)),
    "poisson": lambda h: h + torch.poisson(torch.ones(4)),
    "uniform_": lambda h: h + torch.empty(4).uniform_(),
    "uniform_ of its size": lambda h: h + torch.empty_like(h).uniform_(-1, 1),
    "normal_": lambda h: h + h.new_empty(h.shape).normal_(),
    "exponential_": lambda h: h + torch.zeros_like(h).exponential_(),
    "bernoulli_": lambda h: h * torch.ones_like(h).bernoulli_(0.3),
    "random_": lambda h: h + torch.zeros_like(h).random_(3),
    "a part": lambda h: _part(h),
    "kept in a name": lambda h: _named(h),
    "distribution": lambda h: h + torch.distributions.Normal(0.0, 1.0).sample((4,)),
    "rsample": lambda h: torch.distributions.Normal(h, torch.ones_like(h), validate_args=False).rsample(),
    "gumbel": lambda h: h * F.gumbel_softmax(torch.zeros(4), dim=-1),
    "gumbel of its size": lambda h: h * F.gumbel_softmax(torch.zeros_like(h), dim=-1),
    "gumbel, uncertain": lambda h: F.gumbel_softmax(h),
    "rrelu": lambda h: h + F.rrelu(torch.ones_like(h).neg(), training=True),
}


def _part(h):
    z = torch.zeros_like(h)
    z[:, :2].normal_()
    return h + z


def _named(h):
    z = torch.empty_like(h)
    z.uniform_(0, 1)
    return h + z


@pytest.mark.parametrize("example", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_refused_with_their_line(name, example):
    state = torch.get_rng_state()
    model = Net(DRAWS[name]).eval()
    torch.set_rng_state(state)
    with pytest.raises(AdfifyError) as refused:
        adfify(model, torch.ones(3, 4) if example else None)
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(refused.value, UnsupportedOpsError):
        assert "test_random_draws.py:" in str(refused.value) or "gumbel" in name, refused.value
        assert "random" in str(refused.value) or "no rule" in str(refused.value)
    else:
        assert "random" in str(refused.value) or "traced" in str(refused.value)


def test_what_to_do_is_said_and_works():
    with pytest.raises(UnsupportedOpsError, match=r"make the noise an input of forward"):
        adfify(Net(DRAWS["randn"]).eval())

    class Given(nn.Module):
        def forward(self, x, noise):
            return x + 0.5 * noise

    x = torch.randn(3, 4)
    mean, variance = adfify(Given(), noise_variance=0.0)(x, Moments(torch.zeros(3, 4), torch.ones(3, 4)))
    torch.testing.assert_close(mean, x)
    torch.testing.assert_close(variance, torch.full((3, 4), 0.25))


def test_a_draw_with_a_rule_follows_it():
    rules = Rules(RULES)

    @rules.register(torch.randn)
    def standard_normal(*size, **kwargs) -> Moments:
        return Moments(torch.zeros(*size), torch.ones(*size))

    adf, x = adfify(Net(DRAWS["randn"]).eval(), rules=rules, noise_variance=0.0), torch.randn(3, 4)
    mean, variance = adf(x)
    torch.testing.assert_close(variance, torch.ones(3, 4))
    torch.testing.assert_close(mean, adf.get_submodule("net")(Moments(x, torch.zeros(3, 4))).mean)


@pytest.mark.parametrize("example", [None, torch.ones(3, 4)], ids=["torch.fx", "inputs"])
def test_a_draw_that_no_output_depends_on_is_left_out(example):
    def unused(h):
        noise = torch.randn(4) + torch.randn_like(h)
        noise.mean()
        return h * 2

    plan = inspect(Net(unused).eval(), example)
    assert not plan.missing
    assert any(record["action"] == "unused" for record in plan.records())
    adf, x = adfify(Net(unused).eval(), example), torch.randn(3, 4)
    assert torch.equal(adf(x).mean, adf(x).mean)


def test_the_policy_decides_on_the_dropout_of_what_is_certain():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.ones(1, 2000))
            self.drop = nn.Dropout(0.25)

        def forward(self, x):
            return x + self.drop(self.position) + F.dropout(self.position, 0.25, self.training)

    for model in (Embedded().eval(), Embedded().train()):
        x = torch.zeros(1, 2000)
        off = adfify(model, noise_variance=0.0)(x)
        torch.testing.assert_close(off.mean, torch.full_like(x, 2.0))
        assert off.variance.abs().max() == 0
        analytic = adfify(model, noise_variance=0.0, dropout="analytic")(x)
        torch.testing.assert_close(analytic.variance, torch.full_like(x, 2 * 0.25 / 0.75))
        torch.manual_seed(0)
        sampled = adfify(model, noise_variance=0.0, dropout="sampled")(x).mean
        kept = (sampled > 2).double().mean()  # both kept: 2 / .75
        assert abs(kept - 0.75**2) < 4.5 * (0.75**2 * (1 - 0.75**2) / 2000) ** 0.5
