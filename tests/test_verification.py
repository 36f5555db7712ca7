"""A trace that is not the model is found on the example inputs: traced otherwise, or refused with where it differs."""

from __future__ import annotations

import copy
import os
import random
import re
import time
import uuid
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import InputError, ModelError


class Asking(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.a = forward, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def _type_is(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if type(x) is Tensor else x


def _class_is(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if x.__class__ is Tensor else x


def _class_name(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if type(x).__name__ == "Tensor" else x


def _has_no_attribute(net: Asking, x: Tensor) -> Tensor:
    return x if hasattr(x, "tensors") else net.a(x)


def _getattr_default(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) * getattr(x, "scale", 2.0)


def _callable(net: Asking, x: Tensor) -> Tensor:
    return x if callable(x) else net.a(x)


def _tries(net: Asking, x: Tensor) -> Tensor:
    try:
        return net.a(x) if float(x.sum()) < 1e9 else x
    except Exception:
        return x


def _tries_length(net: Asking, x: Tensor) -> Tensor:
    try:
        return net.a(x) / len(x)
    except Exception:
        return x


def _deep_copy(net: Asking, x: Tensor) -> Tensor:
    h = net.a(x)
    kept = copy.deepcopy(h)
    kept += 1
    return h + kept


def _shallow_copy(net: Asking, x: Tensor) -> Tensor:
    h = net.a(x) + 0
    kept = copy.copy(h)
    kept += 1
    return h + kept


def _int_size(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if isinstance(x.shape[1], int) else x


def _int_batch(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) if type(x.shape[0]) is int else x


def _is_none(net: Asking, x: Tensor) -> Tensor:
    return x if x is None else net.a(x)


def _equals_none(net: Asking, x: Tensor) -> Tensor:
    return x if x == None else net.a(x)  # noqa: E711


def _dict_of_ids(net: Asking, x: Tensor) -> Tensor:
    known = {id(x): 2.0}
    return net.a(x) * known.get(id(x), 1.0)


def _dict_of_tensors(net: Asking, x: Tensor) -> Tensor:
    known = {x: 2.0}
    return net.a(x) * known.get(x, 1.0)


def _fx_is_tracing(net: Asking, x: Tensor) -> Tensor:
    return x if torch.fx._symbolic_trace.is_fx_tracing() else net.a(x)


def _is_compiling(net: Asking, x: Tensor) -> Tensor:
    return x if torch.compiler.is_compiling() else net.a(x)


def _is_exporting(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) * (x if torch.compiler.is_exporting() or type(x) is not Tensor else 2)


def _jit_is_tracing(net: Asking, x: Tensor) -> Tensor:
    return x if torch.jit.is_tracing() else net.a(x)


WAYS = [
    _type_is, _class_is, _class_name, _has_no_attribute, _getattr_default, _callable, _tries, _tries_length, _deep_copy,
    _shallow_copy, _int_size, _int_batch, _is_none, _equals_none, _dict_of_ids, _dict_of_tensors, _fx_is_tracing,
    _is_compiling, _is_exporting, _jit_is_tracing,
]  # fmt: skip
FOLLOWED = [
    _has_no_attribute, _getattr_default, _deep_copy, _shallow_copy, _is_none, _equals_none, _dict_of_ids,
    _dict_of_tensors, _is_compiling, _jit_is_tracing,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_what_the_model_asks_is_answered_rightly_or_refused(way: Callable[..., Tensor], batch: int) -> None:
    torch.manual_seed(0)
    model, x = Asking(way).eval(), torch.randn(batch, 4)
    try:
        adf = adfify(model, x)
    except ModelError as error:
        assert way not in FOLLOWED
        assert re.search(r"does not compute what Asking does on example_inputs: output 0 is off by \d", str(error))
        assert f"{__file__}:" in str(error)
        return
    assert torch.allclose(adf(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)
    other = torch.randn(5, 4)
    try:
        found = adf(Moments(other, torch.zeros_like(other))).mean
    except InputError as error:
        assert way not in FOLLOWED
        assert "traced by torch.export for inputs of which size 0 of input 0 ==" in str(error)
    else:
        assert torch.allclose(found, model(other), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("way", [_has_no_attribute, _getattr_default, _deep_copy, _shallow_copy, _is_none])
def test_what_a_symbolic_value_knows_needs_no_example(way: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Asking(way).eval(), torch.randn(3, 4)
    assert torch.allclose(adfify(model)(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)


def _one_example(net: Asking, x: Tensor) -> Tensor:
    return torch.sigmoid(net.a(x)) if x.shape[0] == 1 else torch.relu(net.a(x))


def _one_column(net: Asking, x: Tensor) -> Tensor:
    return x.exp() if x.shape[1] == 1 else torch.relu(x)


@torch.no_grad()
@pytest.mark.parametrize(("way", "one"), [(_one_example, (1, 4)), (_one_column, (3, 1))])
def test_a_size_of_one_is_no_size_like_any_other(way: Callable[..., Tensor], one: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x, single = Asking(way).eval(), torch.randn(3, 4), torch.randn(one)
    of_three, of_one = adfify(model, x), adfify(model, single)
    assert torch.allclose(of_three(Moments(x, torch.zeros_like(x))).mean, model(x), atol=1e-6)
    assert torch.allclose(of_one(Moments(single, torch.zeros_like(single))).mean, model(single), atol=1e-6)
    with pytest.raises(InputError, match=r"of which size . of input 0 >= 2"):
        of_three(single)
    with pytest.raises(InputError, match=r"of which size . of input 0 == 1"):
        of_one(x)


def test_joint_moments_of_what_refuses_a_batch_of_one() -> None:
    torch.manual_seed(0)
    model = Asking(_one_example).eval()
    x = Moments(torch.randn(3, 4), torch.full((3, 4), 0.3))
    adf = adfify(model, x.mean)
    every = adf.joint(x, outputs="all")
    draws = torch.relu(model.a(x.mean + 0.3**0.5 * torch.randn(20_000, 3, 4)))
    assert torch.allclose(every.std, draws.std(0), rtol=0.05, atol=0.01)
    pair = adf.joint(Moments(x.mean[1:], x.variance[1:]), outputs="all")
    assert torch.allclose(pair.std, every.std[1:], rtol=1e-6)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 4), Asking(_type_is), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.inner(self.before(x)))
        return y


def test_the_first_module_that_differs_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ModelError, match=r"'inner\.a' \(Linear\), called by Asking, in its forward at .*test_verif.*:\d"
    ):
        adfify(Deep().eval(), torch.randn(2, 4))


def _default_rng(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) + float(numpy.random.default_rng().normal())


def _clock(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) * (time.perf_counter() % 1)


def _system_random(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) + int.from_bytes(os.urandom(2), "big") / 65536


def _own_generator(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) + random.Random().random()


def _uuid(net: Asking, x: Tensor) -> Tensor:
    return net.a(x) * (uuid.uuid4().int % 1000)


@pytest.mark.parametrize("asks_for_type", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("way", [_default_rng, _clock, _system_random, _own_generator, _uuid])
def test_what_changes_by_itself_is_refused(way: Callable[..., Tensor], asks_for_type: bool) -> None:
    def asking(net: Asking, x: Tensor) -> Tensor:
        return way(net, x) if isinstance(x, Tensor) else x

    model = Asking(asking if asks_for_type else way).eval()
    with pytest.raises(ModelError, match=r"test_verif.*:\d+ computes with other values in every call"):
        adfify(model, torch.randn(2, 4))


def test_the_model_and_the_process_stay_as_they_were() -> None:
    def counting(net: Asking, x: Tensor) -> Tensor:
        net.calls.append(1)
        net.count += 1
        return net.a(x)

    model = Asking(counting).eval()
    model.calls, model.count = [], 0
    torch.manual_seed(5)
    before = torch.get_rng_state()
    adfify(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert (model.calls, model.count) == ([], 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.a(x) * mask


def test_an_example_of_some_of_the_inputs_is_no_example_to_run() -> None:
    mask = torch.tensor([1, 0, 1, 1])
    adf = adfify(Masked().eval(), example_kwargs={"mask": mask})
    assert float(adf(torch.ones(2, 4), mask).mean.abs()[:, 1].max()) == 0
