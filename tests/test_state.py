"""State: what a later call would read is refused by name; what nobody reads is harmless; the model stays as it was."""

import collections
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from adfify import Moments, adfify, graph, tracing
from adfify.errors import AdfifyError, ModelError
from adfify.registry import RULES


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        self.cell = nn.Linear(4, 4)


def model_of(setup, step, name):
    """A module with what ``setup`` gives it, whose forward is ``step``."""

    def __init__(self):
        Net.__init__(self)
        setup(self)

    kind = type(name, (Net,), {"__init__": __init__, "forward": step})
    return kind().eval()


@dataclass
class Memory:
    last: object = None
    items: list = field(default_factory=list)


def attribute(self):
    self.last = torch.zeros(3, 4)


def attribute_step(self, x):
    y = self.net(x) + self.last
    self.last = y
    return y


def recurrent(self):
    self.inner = nn.Module()
    self.inner.hidden = None


def recurrent_step(self, x):
    h = self.net(x)
    if self.inner.hidden is not None:
        h = h + self.cell(self.inner.hidden)
    self.inner.hidden = torch.tanh(h)
    return self.inner.hidden


def a_list(self):
    self.frames = []


def list_step(self, x):
    self.frames.append(self.net(x))
    return torch.stack(self.frames[-2:]).mean(0)


def nested(self):
    self.cache = {"layers": [{}, {}]}


def nested_step(self, x):
    k = self.net(x)
    old = self.cache["layers"][1].get("k")
    k = k if old is None else torch.cat([old, k])
    self.cache["layers"][1]["k"] = k
    return k.sum(0)


def a_deque(self):
    self.window = collections.deque(maxlen=2)


def deque_step(self, x):
    self.window.append(self.net(x))
    return sum(self.window)


def an_object(self):
    self.memory = Memory()


def object_step(self, x):
    y = self.net(x)
    out = y if self.memory.last is None else y - self.memory.last
    self.memory.last = y
    return out


def namespace(self):
    self.ns = SimpleNamespace(scale=1.0)


def namespace_step(self, x):
    self.ns.scale *= 0.9
    return self.net(x) * self.ns.scale


def counter(self):
    self.calls = 0


def counter_step(self, x):
    self.calls += 1
    return self.net(x) / self.calls


def buffer(self):
    self.register_buffer("average", torch.zeros(4))


def buffer_in_place(self, x):
    y = self.net(x)
    self.average.mul_(0.9).add_(0.1 * y.mean(0))
    return y - self.average


def buffer_assigned(self, x):
    y = self.net(x)
    self.average = 0.9 * self.average + 0.1 * y.mean(0)
    return y - self.average


def buffer_part(self, x):
    y = self.net(x)
    self.average[:2] += y.mean(0)[:2]
    return y - self.average


def buffer_read_before(self, x):
    y = self.net(x) - self.average
    self.average.copy_(y.mean(0))
    return y


def weight_step(self, x):
    self.net.weight.data.mul_(0.99)
    return self.net(x)


def real_step(self, x):
    self.last += 1
    return self.net(x) + self.last


def closure(self):
    kept = []

    def step(y):
        kept.append(y)
        return sum(kept[-2:])

    self.step = step


def closure_step(self, x):
    return self.step(self.net(x))


READING = {
    "last": (attribute, attribute_step),
    "inner.hidden": (recurrent, recurrent_step),
    "frames": (a_list, list_step),
    "cache['layers'][1]['k']": (nested, nested_step),
    "window": (a_deque, deque_step),
    "memory.last": (an_object, object_step),
    "ns.scale": (namespace, namespace_step),
    "calls": (counter, counter_step),
    "average": (buffer, buffer_in_place),
    "average ": (buffer, buffer_assigned),
    "average  ": (buffer, buffer_part),
    "average   ": (buffer, buffer_read_before),
    "last ": (attribute, real_step),
    "kept": (closure, closure_step),
}


def by_engine(model, x, engine):
    if engine == "torch.fx":
        return adfify(model)
    traced = tracing.exported(model, (x,), {}, RULES)
    assert traced is not None
    return graph.apply(graph.plan(traced, RULES), 1e-3, 0.0, False)


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", READING)
def test_what_an_earlier_call_left_is_refused_by_name(name, engine):
    model = model_of(*READING[name], "Stateful")
    with torch.no_grad():
        model(torch.randn(3, 4))
    with pytest.raises(ModelError) as refused:
        by_engine(model, torch.randn(3, 4), engine)
    assert f"'{name.strip()}'" in str(refused.value), refused.value


@pytest.mark.parametrize("name", READING)
def test_a_refused_model_is_left_as_it_was(name):
    twins = [model_of(*READING[name], "Stateful") for _ in range(2)]
    x = [torch.randn(3, 4) for _ in range(3)]
    with torch.no_grad():
        for model in twins:
            model(x[0])
        containers = {key: id(value) for key, value in vars(twins[0]).items()}
        with pytest.raises(AdfifyError):
            adfify(twins[0], x[1])
        assert {key: id(value) for key, value in vars(twins[0]).items()} == containers
        for inputs in x:
            assert torch.equal(twins[0](inputs), twins[1](inputs))


def stored(self, x):
    h = self.net(x)
    self.last = h
    self.frames.append(h)
    self.calls = self.calls + 1
    self.memory["last"] = h.mean()
    self.average.mul_(0.9).add_(0.1 * h.mean(0))
    self.confident = (h > 0).float().mean()
    return self.cell(h).relu()


def everything(self):
    self.frames, self.calls, self.memory = [], 0, {}
    self.register_buffer("average", torch.zeros(4))


def lazy(self):
    self.table = {}


def lazily_built(self, x):
    if "cell" not in self.table:
        self.table["cell"] = self.cell.weight.softmax(-1)
    return self.net(x) @ self.table["cell"]


HARMLESS = {"stored": (everything, stored), "lazily_built": (lazy, lazily_built)}


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_nobody_reads_is_harmless_and_not_in_the_network(name, engine):
    model, x = model_of(*HARMLESS[name], "Storing"), torch.randn(3, 4)
    before = {key: value for key, value in vars(model).items()}
    adf = by_engine(model, x, engine)
    assert {key: value for key, value in vars(model).items()} == before
    assert not getattr(model, "frames", None) and not getattr(model, "table", None)
    state = {key: value.clone() for key, value in adf.state_dict().items()}
    for _ in range(2):
        out = adf(Moments(x, torch.zeros_like(x)))
        with torch.no_grad():
            torch.testing.assert_close(out.mean, model_of(*HARMLESS[name], "Storing")(x))
    assert all(torch.equal(value, state[key]) for key, value in adf.state_dict().items())


def test_flags_gradients_and_hooks_stay():
    class Odd(Net):
        def forward(self, x):
            self.cell.train()
            self.net.weight.requires_grad_(False)
            self.extra = SimpleNamespace(x=x)
            return self.net(x)

    model = Odd().eval()
    model(torch.randn(3, 4))
    del model.extra
    model.cell.eval()
    model.net.weight.requires_grad_(True)
    model.net.weight.grad = torch.ones(4, 4)
    gradient = model.net.weight.grad
    adfify(model)
    assert not model.cell.training and model.net.weight.requires_grad and model.net.weight.grad is gradient
    assert not hasattr(model, "extra")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("example", [False, True])
def test_random_state_is_left_alone_also_when_a_trace_fails(fails, example):
    class Draws(Net):
        def forward(self, x):
            noise = torch.randn(4) + random.random() + float(numpy.random.rand())
            if fails and x.sum() > 0:
                return x
            return self.net(x) + noise

    model = Draws().eval()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    with pytest.raises(AdfifyError):
        adfify(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) if example else None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
