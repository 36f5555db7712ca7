"""A rule that fails is named, and not the input; what can't be converted is said in short, and nothing is printed."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify, monte_carlo, register
from adfify.errors import AdfifyError, InputError, InternalError, ModelError, RuleError, UnsupportedOpsError
from adfify.nn import ADFModule
from adfify.registry import RULES, Rules

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(swish(self.a(x)))


def _raises(x: Moments) -> Moments:
    raise KeyError("nothing there")


def _says_input(x: Moments) -> Moments:
    raise InputError("mine")


def _wrong_sizes(x: Moments) -> Moments:
    return Moments(x.mean @ x.mean, x.variance)


def _without_gradients(x: Moments) -> Moments:
    return Moments(torch.from_numpy(x.mean.numpy()), x.variance)


def _a_tensor(x: Moments) -> Moments:
    return x.mean  # type: ignore[return-value]


def _a_pair(x: Moments) -> Moments:
    return x.mean, x.variance  # type: ignore[return-value]


def _other_shape(x: Moments) -> Moments:
    return Moments(x.mean[:, :3], x.variance[:, :3])


SAID = {
    _raises: "KeyError: 'nothing there'",
    _says_input: "InputError: mine",
    _wrong_sizes: "mat1 and mat2 shapes",
    _without_gradients: r"numpy\(\)",
    _a_tensor: "a Tensor of shape",
    _a_pair: "a tuple of a Tensor",
    _other_shape: r"Moments of shape \(2, 3\), float32, on cpu, and not Moments of shape \(2, 4\)",
}


def _network(rule: Callable[..., Any]) -> Any:
    rules = Rules(RULES)
    rules.register(swish)(rule)
    return adfify(Net().eval(), rules=rules)


@pytest.mark.parametrize("rule", SAID)
def test_the_rule_at_fault_is_named(rule: Callable[..., Any]) -> None:
    adf = _network(rule)
    for network in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        with pytest.raises(RuleError, match=SAID[rule]) as caught:
            network(X)
        error = caught.value
        assert error.rule.endswith(rule.__name__)
        assert error.op.endswith("swish")
        assert error.location.startswith(f"{__file__}:")
        assert not isinstance(error, InputError)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_joint_names_it_too() -> None:
    with pytest.raises(RuleError, match="nothing there"):
        _network(_raises).joint(X)


@pytest.mark.parametrize("x", [torch.zeros(2, 5), X.double()], ids=["shape", "dtype"])
def test_what_the_original_does_not_take_is_the_inputs_fault(x: Tensor) -> None:
    for network in (adfify(Net().eval()), _network(_raises)):
        with pytest.raises(InputError, match="Give inputs of the shape, dtype"):
            network(x)


class _NoADFModule(nn.Module):
    def forward(self, x: Moments) -> Moments:
        return x


class _Fails(ADFModule, Net):
    def forward(self, x: Moments) -> Moments:
        return x.nothing  # type: ignore[attr-defined, no-any-return]


def test_a_module_rule_is_named() -> None:
    rules = Rules(RULES)
    rules.register(Net)(_Fails)
    with pytest.raises(RuleError, match=r"_Fails for .*Net.*at .*'nothing'"):
        adfify(nn.Sequential(Net()).eval(), rules=rules)(X)


@pytest.mark.parametrize("rule", [functools.partial(_raises), torch.relu, _Fails, _NoADFModule])
def test_what_is_no_function_is_no_rule_for_one(rule: Any) -> None:
    with pytest.raises(TypeError, match="is no rule for"):
        register(swish)(rule)


@pytest.mark.parametrize("rule", [_raises, _NoADFModule, functools.partial(_raises)])
def test_what_is_no_adf_module_is_no_rule_for_a_module(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"derived from adfify\.nn\.ADFModule and Net"):
        register(Net)(rule)


class Branching(nn.Module):
    """torch.export prints its whole graph where it has to know how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        for _ in range(60):
            y = torch.sin(y) + 1
        kept = torch.nonzero(y[:, 0] > 0)
        if len(kept) * 4 > 4000:
            return y * 2
        return y


def test_a_failed_export_is_silent_short_and_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=rf"torch.export gave up too, stopped at {__file__}:\d+") as caught:
        adfify(Branching().eval(), X)
    assert capfd.readouterr() == ("", "")
    assert len(str(caught.value)) < 2000


def test_many_hooks_make_no_long_message() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(200)])
    for child in model:
        child.register_forward_hook(lambda *args: None)
    with pytest.raises(ModelError, match="and 190 more") as caught:
        adfify(model)
    assert len(str(caught.value)) < 2000


def test_no_message_of_a_model_is_long() -> None:
    error = ModelError("begin " + "x" * 10_000 + " end")
    assert len(str(error)) < 2000
    assert str(error).startswith("begin")
    assert str(error).endswith("end")
    assert isinstance(error, AdfifyError)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2], batch_first=True)
        result: Tensor = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return result


@pytest.mark.parametrize("example", [None, torch.zeros(2, 3, 3)])
def test_packed_sequences_are_refused_by_name(example: Tensor | None) -> None:
    with pytest.raises(UnsupportedOpsError, match=r"pack_padded_sequence \(.*test_rule_errors.*packed sequences"):
        adfify(Packed().eval(), example)


def test_a_fault_of_joint_s_own_is_not_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from adfify import interpolated

    def broken(*_: Any) -> None:
        raise KeyError("not there")

    adf = adfify(nn.Sequential(nn.Linear(3, 2)), noise_variance=0.1)
    monkeypatch.setattr(interpolated.interpolation, "correlations", broken)
    with pytest.raises(InternalError, match=r"KeyError: 'not there'\nin _correlations, interpolated.py:\d+.*report it"):
        adf.joint(torch.zeros(2, 3))
    with pytest.raises(InputError, match="can't be evaluated on"):
        adf.joint(torch.zeros(2, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("examples", [1, 2, 5])
def test_a_recurrent_state_of_other_sizes_is_refused_before_the_kernel(kind: type, examples: int) -> None:
    """torch's kernels write where they should not: the process ended."""
    sizes = (2, 2, 4)
    state = (torch.zeros(sizes), torch.zeros(sizes)) if kind is nn.LSTM else torch.zeros(sizes)
    adf = adfify(kind(3, 4, 2, batch_first=True).eval(), example_inputs=(torch.randn(2, 6, 3), state))
    if examples == 2:
        adf(torch.randn(2, 6, 3), state)
        return
    with pytest.raises(InputError, match=r"state .* has shape \(2, 2, 4\)|[Ee]xpected hidden"):
        adf(torch.randn(examples, 6, 3), state)


def test_monte_carlo_is_not_given_the_converted_network() -> None:
    with pytest.raises(InputError, match="was given the converted one"):
        monte_carlo(adfify(nn.Linear(2, 2)), torch.zeros(1, 2), 1e-3)
