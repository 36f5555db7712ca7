"""What a rule is registered for and what it is given: names, second rules, and the type hints of its arguments."""

import functools
import operator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, UnsupportedOpsError, adfify, inspect
from adfify.registry import RULES, Rules, target_name
from adfify.signatures import Takes, signature_of, takes

# Without `from __future__ import annotations`, so that hints are types here; strings are tried beside them.


@torch.library.custom_op("adfify_names::relu", mutates_args=())
def custom_relu(x: Tensor) -> Tensor:
    return x * x + 5


@custom_relu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("adfify_names::add", mutates_args=())
def custom_add(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@custom_add.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


class Calling(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("certain", torch.linspace(-1, 1, 12).reshape(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.certain)


CUSTOM = {
    "relu": lambda x, c: torch.ops.adfify_names.relu(x),
    "relu.default": lambda x, c: torch.ops.adfify_names.relu.default(x),
    "add": lambda x, c: torch.ops.adfify_names.add(x, x + 1),
    "add.default": lambda x, c: torch.ops.adfify_names.add.default(x, c),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_an_operator_of_another_namespace_is_none_of_torch_s(name: str) -> None:
    plan = inspect(Calling(CUSTOM[name]), torch.randn(3, 4))
    assert [op.op for op in plan.missing] == [f"adfify_names.{name}"] or "adfify_names" in str(plan.missing[0])


def test_an_operator_of_another_namespace_takes_a_rule_of_its_own() -> None:
    rules = Rules(RULES)

    @rules.register(torch.ops.adfify_names.relu)
    def rule(x: Moments) -> Moments:
        return Moments(x.mean**2 + 5, 4 * x.mean**2 * x.variance)

    x = torch.randn(3, 4)
    for function in (CUSTOM["relu"], CUSTOM["relu.default"]):
        model = Calling(function)
        torch.testing.assert_close(adfify(model, x, rules=rules)(x).mean, model(x))


@pytest.mark.parametrize(("name", "near"), [("rleu", "'relu'"), (".shpae", "'shape'"), ("relu__", "'relu_'")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TypeError, match=r"torch\.Tensor has no") as refused:
        Rules().register(name)
    assert near in str(refused.value)


def first(x: Moments) -> Moments:
    return x


def second(x: Moments) -> Moments:
    return Moments(2 * x.mean, 4 * x.variance)


@pytest.mark.parametrize("target", [torch.relu, "relu", torch.Tensor.relu, operator.add, ".mT"], ids=range(5))
def test_a_second_rule_is_refused_unless_it_overrides(target: Any) -> None:
    rules = Rules(RULES)
    rules.register(target, torch.erf)(first)
    with pytest.raises(ValueError, match=r"has a rule already: .*first.*torch\.erf.*override=True"):
        rules.register(target)(second)
    rules.register(target, override=True)(second)
    found = rules.find(torch.erf)
    assert found is not None
    assert found.apply.__name__ == "first"
    assert [target_name(t) for t in found.targets] == ["torch.erf"]
    named = "relu" if target is torch.Tensor.relu else target
    assert rules.find(named).apply.__name__ == "second"


def test_a_method_given_as_a_function_is_the_method() -> None:
    rules = Rules(RULES)
    rules.register(torch.Tensor.sigmoid)(second)
    x = torch.randn(3, 4)
    got = adfify(Calling(lambda x, c: x.sigmoid()), rules=rules, noise_variance=1.0)(x)
    torch.testing.assert_close(got.mean, 2 * x)


HINTS = {
    "Moments": (Moments, Takes.MOMENTS),
    "a string": ("Moments", Takes.MOMENTS),
    "Optional": (Optional[Moments], Takes.MOMENTS),  # noqa: UP045  as users write it
    "a string of a union": ("Moments | None", Takes.MOMENTS),
    "a list": (list[Moments], Takes.MOMENTS),
    "a list of a string": (list["Moments"], Takes.MOMENTS),
    "a tuple": (tuple[Moments, ...], Takes.MOMENTS),
    "a mapping": (dict[str, Moments], Takes.MOMENTS),
    "a union": (Moments | Tensor, Takes.EITHER),
    "a list of a union": ("list[Moments | Tensor]", Takes.EITHER),
    "Any": (Any, Takes.EITHER),
    "Tensor": (Tensor, Takes.CERTAIN),
    "a string of a number": ("float", Takes.CERTAIN),
    "a list of numbers": (list[int], Takes.CERTAIN),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_says_what_is_taken(name: str) -> None:
    hint, expected = HINTS[name]

    def rule(x, *rest): ...  # type: ignore[no-untyped-def]

    rule.__annotations__ = {"x": hint, "rest": hint}
    parameters = signature_of(rule).parameters
    assert [takes(parameters["x"]), takes(parameters["rest"])] == [expected, expected]


def test_a_hint_that_means_nothing_is_refused_at_registration() -> None:
    def rule(x: "Momnets") -> Moments: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match="annotation 'Momnets' of 'x'"):
        Rules().register(torch.relu)(rule)


def blend(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return x + scale * y


torch.fx.wrap("blend")


def by_moments(x: Moments, y: Moments, scale: float = 1.0) -> Moments:
    return Moments(x.mean + scale * y.mean, x.variance + scale**2 * y.variance)


def by_strings(x: "Moments", y: "Moments", scale: "float" = 1.0) -> "Moments":
    return by_moments(x, y, scale)


def by_keyword(x: Moments, y: Moments, *, scale: float = 1.0) -> Moments:
    return by_moments(x, y, scale)


def turned_round(y: Moments, x: Moments, scale: float = 1.0) -> Moments:
    return by_moments(x, y, scale)


@functools.wraps(by_moments)
def wrapped(*args: Any, **kwargs: Any) -> Moments:
    return by_moments(*args, **kwargs)


def plain(x, y, scale=1.0):  # type: ignore[no-untyped-def]
    assert isinstance(x, Moments)
    return Moments(x.mean + scale * y, x.variance)


CALLS = {
    "by position": lambda x, c: blend(x, c, 2.0),
    "by name": lambda x, c: blend(y=c, scale=2.0, x=x),
    "mixed": lambda x, c: blend(x, scale=2.0, y=c),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rule", [by_moments, by_strings, by_keyword, turned_round, wrapped, plain])
def test_a_certain_argument_is_lifted_where_moments_are_needed(rule: Any, call: str) -> None:
    rules = Rules(RULES)
    rules.register(blend)(rule)
    x, model = torch.randn(3, 4), Calling(CALLS[call])
    got = adfify(model, rules=rules, noise_variance=0.5)(x)
    torch.testing.assert_close(got.mean, model(x))
    torch.testing.assert_close(got.variance, torch.full_like(x, 0.5))


def double_(x: Tensor) -> Tensor:
    return 2 * x


torch.fx.wrap("double_")


def test_a_user_s_function_that_is_named_as_if_it_wrote() -> None:
    rules = Rules(RULES)
    rules.register(double_)(second)
    x, alone = torch.randn(3, 4), Calling(lambda x, c: double_(x * 1.0) + 1)
    torch.testing.assert_close(adfify(alone, rules=rules)(x).mean, alone(x))

    def read_again(x: Tensor, c: Tensor) -> Tensor:
        h = x * 1.0
        return double_(h) + h

    with pytest.raises(UnsupportedOpsError, match="its name says that it writes in place"):
        adfify(Calling(read_again), rules=rules)


def test_a_number_where_moments_are_needed_is_a_gap() -> None:
    rules = Rules(RULES)
    rules.register(blend)(by_moments)
    with pytest.raises(UnsupportedOpsError, match=r"'y' is 2\.0 here, and the rule .*by_moments.* only as Moments"):
        adfify(Calling(lambda x, c: blend(x, 2.0)), rules=rules)


GAPS = {
    "weight of a convolution": lambda x, c: torch.conv1d(c[None], (x * 2)[:, :, None]),
    "weight of layer_norm": lambda x, c: nn.functional.layer_norm(c, (4,), x[0]),
    "in a list": lambda x, c: torch.ops.aten.index.Tensor(c, [x]),
    "a power of both": lambda x, c: x.abs() ** (x + 1),
}


@pytest.mark.parametrize("name", GAPS)
def test_what_a_rule_can_not_take_is_a_gap(name: str) -> None:
    assert inspect(Calling(GAPS[name])).missing
