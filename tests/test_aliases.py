"""Writes in place: whatever shares the written memory shows the result, in every call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adfify import Moments, adfify


class Net(nn.Module):
    """A layer, then the function of one test."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 6).requires_grad_(False)  # a part of several can only be written without gradients
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        self.function = function

    def forward(self, x):
        return self.function(self, self.layer(x))


def certain(x):
    return Moments(x, torch.zeros_like(x))


def assert_the_same(model, x, **options):
    """At zero variance the network gives the original's outputs, in three calls, and leaves everything as it was."""
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adf = adfify(model, **options)
    kept, given = {name: value.clone() for name, value in adf.state_dict().items()}, x.clone()
    for _ in range(3):
        with torch.no_grad():
            expected, out = model(x.clone()), adf(certain(given))
        assert isinstance(out, Moments)
        torch.testing.assert_close(out.mean, expected)
        assert out.variance.abs().max() == 0
    uncertain = adf(Moments(given, torch.ones_like(given)))
    assert uncertain.mean.shape == expected.shape and uncertain.variance.max() > 0
    assert torch.equal(given, x)
    for name, value in adf.state_dict().items():
        assert torch.equal(value, kept[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return adf


def chain(self, h):
    z = h.new_zeros(h.shape)
    z.fill_(1).add_(h)
    return z


def named_result(self, h):
    z = torch.zeros_like(h)
    y = z.fill_(1)
    y.add_(h)
    return z


def name_of_name(self, h):
    y = h
    z = y.mul_(2)
    z += 1
    y.relu_()
    return h + z


def by_keyword(self, h):
    torch.relu_(input=h)
    return h


def inplace_keyword(self, h):
    F.relu(input=h, inplace=True)
    return h * 1.5


def columns(self, h):
    z = h.new_zeros(h.shape)
    z[:, :3] = h[:, 3:]
    z[:, 3:] += h[:, :3]
    return z


def out(self, h):
    z = torch.empty_like(h)
    torch.add(h, self.scale, out=z)
    return z.mul(2)


def out_of_a_part(self, h):
    z = h.new_zeros(h.shape)
    torch.mul(h[:, :2], 2, out=z[:, 1:3])
    return z + h


def copied(self, h):
    z = h.new_empty(h.shape)
    z.copy_(h)
    h.add_(1)
    return z * 2 + h


def part_added(self, h):
    h[:, 0] += h[:, 1]
    return h


def through_view(self, h):
    h.view(-1).mul_(2)
    return h + 1


def through_transposed(self, h):
    h.t().add_(torch.arange(h.shape[0]))
    return h


def earlier_view(self, h):
    first = h[:, :2]
    h.mul_(3)
    return first


def earlier_view_of_view(self, h):
    first = h.view(-1, 2, 3).transpose(1, 2)
    part = first[:, 1]
    h.add_(2)
    return part.relu() + first[:, 0]


def pieces(self, h):
    a, b = h.chunk(2, 1)
    a.mul_(2)
    b.add_(a)
    return h


def unbound(self, h):
    parts = torch.unbind(h, 1)
    parts[1].neg_()
    return h * 2


def narrowed(self, h):
    h.narrow(1, 1, 3).zero_()
    return h


def selected(self, h):
    h.select(1, 2).fill_(3.0)
    return h


def masked(self, h):
    mask = torch.tensor([True, False, True, False, False, True])
    h[:, mask] = h[:, mask] * 2
    return h


def detached(self, h):
    d = h.detach()
    h.add_(1)
    return d * 2


def read_before(self, h):
    before = h * 1
    h.add_(1)
    return before - h.relu_()


def buffer_copied(self, h):
    z = self.scale.clone().expand(h.shape).clone()
    z.mul_(2).add_(h)
    return z


def certain_path(self, h):
    z = torch.ones(6, dtype=h.dtype, device=h.device)
    z.mul_(2)
    z += 1
    return z * h


def written_twice(self, h):
    z = h.new_zeros(h.shape[0], 6)
    z += 1
    z[:, 0] = 5
    z += 1
    return h + z


def constant(self, h):
    z = torch.zeros(6)
    z += 1
    y = h + z
    z += 1
    return y + z


def constant_accumulates(self, h):
    z = torch.zeros(1, 6)
    for _ in range(3):
        z = z.add_(1)
    return h * z


def constant_written(self, h):
    z = torch.zeros(2, 3, 6)
    z.add_(h)
    w = z * 2
    return w[0] + z[1]


def constant_parts(self, h):
    z = torch.zeros(3, 6)
    z[:, 2:4] = h[:, :2]
    return z


def numbers(self, h):
    n = h.shape[1]
    m = n
    n += 1
    return h * m + n


def operators(self, h):
    z = h * 1
    z -= 1
    z *= 2
    z /= 4
    return h - z


def set_diagonal(self, h):
    z = h.new_zeros(6, 6)
    z.fill_diagonal_(2)
    return h @ z


def activations(self, h):
    y = F.leaky_relu(h - 1, 0.1, True)
    z = F.elu_(y)
    return y + torch.tanh_(z)


def loop(self, h):
    out = h.new_zeros(h.shape[0], 6)
    for i in range(6):
        out[:, i] = h[:, i] * i
    return out


def index_written(self, h):
    out = h.new_zeros(h.shape)
    out.index_add_(1, torch.tensor([0, 2, 4, 1, 1, 5]), h)
    return out


def clamped_part(self, h):
    h[:, 1:4].clamp_(-0.1, 0.1)
    return h.squeeze()


FOLLOWED = [
    chain, named_result, name_of_name, by_keyword, inplace_keyword, columns, out, out_of_a_part, copied, part_added,
    through_view, through_transposed, earlier_view, earlier_view_of_view, pieces, unbound, narrowed, selected, masked,
    detached, read_before, buffer_copied, certain_path, written_twice, constant, constant_accumulates,
    constant_written, constant_parts, numbers, operators, set_diagonal, activations, loop, index_written, clamped_part,
]  # fmt: skip


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_a_write_is_seen_under_every_name(function):
    assert_the_same(Net(function), torch.randn(3, 4))


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_a_write_is_seen_under_every_name_by_export(function):
    from adfify import graph, tracing
    from adfify.registry import RULES

    model, x = Net(function).eval(), torch.randn(3, 4)
    traced = tracing.exported(model, (x,), {}, RULES)
    assert traced is not None
    adf = graph.apply(graph.plan(traced, RULES), 1e-3, 0.0, False)
    for _ in range(2):
        with torch.no_grad():
            out = adf(certain(x))
            torch.testing.assert_close(out.mean, model(x))
        assert out.variance.abs().max() == 0
