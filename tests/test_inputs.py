"""Inputs in the structure of the model's own call: by position, by keyword, in lists, tuples, dictionaries."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify, monte_carlo, predict
from adfify.call_signature import mapped
from adfify.errors import InputError, ModelError


@dataclasses.dataclass
class Frame:
    image: Tensor
    imu: Tensor


class Pair(NamedTuple):
    image: Tensor
    imu: Tensor


class Net(nn.Module):
    """Two linear layers, for what a test's own forward makes of its inputs."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run, self.a, self.b = run, nn.Linear(4, 4), nn.Linear(3, 4)
        self.lstm, self.table = nn.LSTM(4, 4, batch_first=True), nn.Embedding(9, 4)
        self.register_buffer("depth", torch.tensor(2))

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


class Two(Net):
    def forward(self, x: Any, y: Any = None) -> Any:
        return self.run(self, x, y)


class Several(Net):
    def forward(self, *xs: Tensor, scale: Any = 1.0, **others: Tensor) -> Any:
        return self.run(self, xs, scale, others)


def _fused(net: Net, x: Any) -> Tensor:
    image, imu = (x["image"], x["imu"]) if isinstance(x, dict) else (x.image, x.imu)
    return net.a(image) + net.b(imu)


def _of_list(net: Net, x: Any) -> Tensor:
    return net.a(torch.stack(list(x)).mean(0)) * len(x)


def _with_state(net: Net, x: Tensor, state: Any) -> Tensor:
    return net.lstm(x, state)[0][:, -1]


def _nested(net: Net, x: Any) -> Tensor:
    return net.a(x["a"][0]) + net.table(x["ids"]) + (0 if x["a"][1] is None else x["a"][1])


def _masked(net: Net, x: Tensor, mask: Tensor | None) -> Tensor:
    h = net.a(x)
    return h if mask is None else h.masked_fill(mask, 0.0)


def _added(net: Net, xs: tuple[Tensor, ...], scale: Any, others: dict[str, Tensor]) -> Tensor:
    return net.a(xs[0] + xs[1]) * scale + others.get("bias", 0)


def _seeded(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


A, B, C, S, H0, C0 = _seeded((2, 4), (2, 3), (2, 4), (2, 5, 4), (1, 2, 4), (1, 2, 4))
MASK, IDS = torch.tensor([[True, False, False, True]] * 2), torch.tensor([3, 5])

CALLS = {
    "dictionary": (Net, _fused, ({"image": A, "imu": B},), {}),
    "dataclass": (Net, _fused, (Frame(A, B),), {}),
    "named tuple": (Net, _fused, (Pair(A, B),), {}),
    "list": (Net, _of_list, ([A, C, A],), {}),
    "tuple": (Net, _of_list, ((A, C),), {}),
    "state": (Two, _with_state, (S, (H0, C0)), {}),
    "nested": (Net, _nested, ({"a": [A, None], "ids": IDS},), {}),
    "mask by position": (Two, _masked, (A, MASK), {}),
    "mask by keyword": (Two, _masked, (A,), {"y": MASK}),
    "mask left away": (Two, _masked, (A,), {}),
    "mask None": (Two, _masked, (A, None), {}),
    "all of the rest": (Several, _added, (A, C), {"scale": 0.5, "bias": C}),
}


def _made(name: str) -> tuple[nn.Module, Any, tuple[Any, ...], dict[str, Any]]:
    kind, run, args, kwargs = CALLS[name]
    torch.manual_seed(0)
    model = kind(run).eval()
    return model, adfify(model, args, example_kwargs=kwargs, noise_variance=1e-4), args, kwargs


def _other(value: Any) -> Any:
    """Other values of the same structure."""
    return mapped(value, lambda x, _: x + 0.7 if x.is_floating_point() else x, "")


def _certain(value: Any) -> Any:
    return mapped(value, lambda x, _: Moments(x, torch.zeros_like(x)) if x.is_floating_point() else x, "")


@pytest.mark.parametrize("name", CALLS)
def test_the_network_is_called_as_the_model_is(name: str) -> None:
    model, adf, args, kwargs = _made(name)
    args, kwargs = _other(args), _other(kwargs)
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        found = network(*_certain(args), **_certain(kwargs))
        assert torch.allclose(found.mean, model(*args, **kwargs), atol=1e-6)
        assert not found.variance.any()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "state"])  # which has its batch second
def test_joint_sees_every_tensor(name: str) -> None:
    model, adf, args, kwargs = _made(name)
    joint = adf.joint(*args, outputs="all", **kwargs)
    draws = []
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, _: str) -> Tensor:
        return x + 1e-2 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x

    with torch.no_grad():
        for _ in range(2000):
            draws.append(model(*mapped(args, noisy, ""), **mapped(kwargs, noisy, "")))
    ratio = joint.std / torch.stack(draws).std(0)
    assert (
        (ratio - 1).abs()[torch.stack(draws).std(0) > 0] < 0.08
    ).all()  # 4 standard errors of 2,000 draws and joint's


REFUSALS = {
    "dictionary": [
        (({"image": A},), {}),
        (({"image": A, "imu": None},), {}),
        ((A,), {}),
        (({"image": A, "imu": B, "more": A},), {}),
    ],
    "list": [(([A, C],), {}), (([A, C, None],), {})],
    "dataclass": [((Pair(A, B),), {})],
    "state": [((S, None), {}), ((S,), {}), ((S, (H0,)), {})],
    "mask None": [((A, MASK), {})],
    "mask left away": [((A, MASK), {}), ((A,), {"mask": MASK}), ((A, None, 3), {})],
    "mask by keyword": [((A,), {}), ((A, MASK), {"y": MASK})],
    "all of the rest": [((A, C), {"scale": 2.0, "bias": C}), ((A,), {"scale": 0.5, "bias": C})],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, calls in REFUSALS.items() for n in range(len(calls))])
def test_another_structure_or_value_is_refused_by_name(name: str, number: int) -> None:
    _, adf, _, _ = _made(name)
    args, kwargs = REFUSALS[name][number]
    with pytest.raises(InputError, match=r"input|takes"):
        adf(*args, **kwargs)


def test_moments_may_stand_anywhere() -> None:
    model, adf, _, _ = _made("dictionary")
    found = adf({"image": Moments(A, torch.full_like(A, 0.01)), "imu": Moments(B, torch.zeros_like(B))})
    assert torch.allclose(found.variance, torch.full_like(A, 0.01) @ model.a.weight.square().T)


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
def test_both_engines_take_structures(engine: str) -> None:
    def branching(net: Net, x: Any) -> Tensor:
        h = _fused(net, x)
        return h if x["image"].shape[0] > 1 or engine == "torch.fx" else h * 2

    model = Net(branching if engine == "torch.export" else _fused).eval()
    adf = adfify(model, ({"image": A, "imu": B},))
    other = {"image": A[:1] + 1, "imu": B[:1]} if engine == "torch.fx" else {"image": A + 1, "imu": B}
    assert torch.allclose(adf(_certain(other)).mean, model(other), atol=1e-6)


def test_predict_and_monte_carlo_take_structures() -> None:
    model, adf, args, _ = _made("dictionary")
    truth = monte_carlo(model, args, noise_variance=1e-4, draws=3000)
    assert torch.allclose(predict(adf, args).std, truth.std, rtol=0.1)
    assert torch.allclose(predict(adf, args[0]).std, truth.std, rtol=0.1)
    model, adf, args, _ = _made("nested")
    truth = monte_carlo(model, args, noise_variance=1e-4, draws=3000)
    assert torch.allclose(predict(adf, args).std, truth.std, rtol=0.1)


def test_what_holds_tensors_out_of_sight_is_refused() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x = A

    with pytest.raises(ModelError, match=r"'x' is a Graph.*dataclass"):
        adfify(Net(lambda net, g: net.a(g.x)), (Graph(),))
    packed = nn.utils.rnn.pack_padded_sequence(S, torch.tensor([5, 3]), batch_first=True)
    with pytest.raises(ModelError, match="PackedSequence"):
        adfify(Net(lambda net, p: net.lstm(p)[1][0]), (packed,))


BARE = {
    "LSTM": (lambda: nn.LSTM(4, 3), (S,)),
    "LSTM with state": (lambda: nn.LSTM(4, 4, batch_first=True), (S, (H0, C0))),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True, bidirectional=True), (S,)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (S, S + 1, S)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (S,)),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), (S,)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (A,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (S.reshape(2, 2, 5, 2),)),
    "Linear": (lambda: nn.Linear(4, 2), (A,)),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 3), (A, C)),
    "ReLU": (lambda: nn.ReLU(inplace=True), (A,)),
    "GRUCell": (lambda: nn.GRUCell(4, 4), (A, C)),
}


@pytest.mark.parametrize("name", BARE)
def test_a_bare_module_is_a_model(name: str) -> None:
    torch.manual_seed(0)
    make, args = BARE[name]
    model = make().eval()
    adf = adfify(model, args)
    assert list(adf.state_dict()) == list(model.state_dict())
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        network.load_state_dict(model.state_dict())
        found = network(*_certain(copy.deepcopy(args)))
        for got, want in zip(_leaves(found), _leaves(model(*copy.deepcopy(args))), strict=True):
            assert torch.allclose(got.mean, want, atol=1e-6)
            assert not got.variance.any()
    inside = adfify(_Inside(model), args)
    for got, want in zip(_leaves(adf(*copy.deepcopy(args))), _leaves(inside(*copy.deepcopy(args))), strict=True):
        assert torch.equal(got.variance, want.variance)
        assert got.variance.any()


class _Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a: Any, b: Any = None, c: Any = None) -> Any:
        return self.inner(*[x for x in (a, b, c) if x is not None])


def _leaves(value: Any) -> list[Any]:
    found = torch.utils._pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, Moments))
    return [leaf for leaf in found if leaf is not None]


def test_a_bare_module_follows_its_network() -> None:
    adf = adfify(nn.BatchNorm1d(4))
    assert adf.train()._whole.training
    assert not adf.eval()._whole.training
    assert adf.double()(A.double()).mean.dtype == torch.float64


def test_scripted_modules_are_refused_with_their_path() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
    with pytest.raises(ModelError, match=r"'1\.0' in Sequential is a scripted model"):
        adfify(model)
    with pytest.raises(ModelError, match="scripted model"):
        adfify(torch.jit.trace(nn.Linear(4, 4), A))
