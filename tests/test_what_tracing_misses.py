"""What a symbolic trace would miss, and go on without a word: it is followed by torch.export, or refused."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adfify import Moments, adfify
from adfify.errors import AdfifyError, InputError, ModelError, UnsupportedOpsError
from adfify.gaussian import elementary
from adfify.registry import RULES, Rules

X = torch.linspace(-1.3, 1.7, 24, dtype=torch.float64).reshape(4, 6)
GENERATOR = torch.Generator()


class Net(nn.Module):
    """A layer and a block around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        self.block = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64))
        self.draws = np.random.default_rng(0)

    def forward(self, x):
        return self.layer(x)


class LengthInTry(Net):
    def forward(self, x):
        try:
            factor = len(x)
        except RuntimeError:
            factor = 100
        return self.layer(x) * factor


class NumberInTry(Net):
    def forward(self, x):
        try:
            half = range(x.sum(0).shape[0] // 2)
        except Exception:
            half = range(1)
        return self.layer(x)[:, : len(half)]


class AsksForAttribute(Net):
    def forward(self, x):
        return self.layer(x) * (5 if hasattr(x, "tensors") else 1) * getattr(x, "scale_factor", 2.0)


class FunctionalCall(Net):
    def forward(self, x):
        doubled = {name: 2 * weight for name, weight in self.block.named_parameters()}
        return torch.func.functional_call(self.block, doubled, (x,))


class ForAWhile(Net):
    def forward(self, x):
        own = self.layer.weight
        self.layer.weight = nn.Parameter(torch.eye(6, dtype=torch.float64))
        y = self.layer(x)
        self.layer.weight = own
        return y


class OwnCall(Net):
    def __call__(self, x):
        return 3 * super().__call__(x)


class SwapsTwice(Net):
    def forward(self, x):
        h = self.layer(x)
        first, second = h.chunk(2, 1)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        return h


class WritesOut(Net):
    def forward(self, x):
        h = self.layer(x)
        torch.mul(h, 2.0, out=h)
        torch.add(h, 1.0, out=h)
        return h if x.shape[0] > 1 else x  # so that torch.export traces it


def patched_layer():
    model = Net()
    model.layer.forward = lambda x: F.linear(x, model.layer.weight) * 3
    return model


def patched_model():
    model = Net()
    model.forward = types.MethodType(lambda self, x: 3 * self.layer(x), model)
    return model


FOLLOWED = [
    LengthInTry, NumberInTry, AsksForAttribute, FunctionalCall, ForAWhile, OwnCall, SwapsTwice, WritesOut,
    patched_layer, patched_model,
]  # fmt: skip


@pytest.mark.parametrize("build", FOLLOWED)
def test_what_a_trace_misses_is_followed(build):
    model = build().eval().requires_grad_(False)
    adf = adfify(model, X)
    for x in (X, 0.3 - X):
        out = adf(Moments(x, torch.zeros_like(x)))
        torch.testing.assert_close(out.mean, model(x))
        assert out.variance.abs().max() == 0
    noisy = Moments(X, torch.full_like(X, 1e-6))
    noise = 1e-3 * torch.randn(3000, *X.shape, generator=torch.Generator().manual_seed(0), dtype=X.dtype)
    with torch.no_grad():
        draws = torch.stack([model(X + one) for one in noise])
    np.testing.assert_allclose(adf(noisy).std.detach(), draws.std(0), rtol=0.1)
    if build is not LengthInTry:  # whose output depends on how many there are
        np.testing.assert_allclose(adf.joint(noisy, outputs="all").std, draws.std(0), rtol=0.1)


@pytest.mark.parametrize("build", [LengthInTry, FunctionalCall, ForAWhile, OwnCall, patched_model])
def test_without_example_inputs_it_is_refused(build):
    with pytest.raises(ModelError) as error:
        adfify(build().eval())
    assert "example_inputs" in str(error.value) and len(str(error.value)) < 2000


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.block(x)


class GeneratorDraw(Net):
    def forward(self, x):
        return self.layer(x) + torch.randn(6, generator=GENERATOR)


class FreshEntropy(Net):
    def forward(self, x):
        return self.layer(x) + torch.from_numpy(np.random.default_rng().standard_normal(6))


class Alternates(Net):
    def forward(self, x):
        if x.shape[0] > 1:  # so that torch.export traces it
            return self.layer(x) + np.random.default_rng().standard_normal()
        return x


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("build", [Autocast, GeneratorDraw, FreshEntropy])
def test_what_changes_from_call_to_call_is_refused(build, example):
    state = GENERATOR.get_state()
    with pytest.raises(AdfifyError) as error:
        adfify(build().eval(), None if example is None else example.to(X.dtype))
    assert "test_what_tracing_misses.py:" in str(error.value) or "'GENERATOR'" in str(error.value)
    assert torch.equal(state, GENERATOR.get_state())


def test_torch_export_is_asked_twice():
    with pytest.raises(ModelError, match="other values in every call"):
        adfify(Alternates().eval(), X)


class Reseeded(Net):
    def forward(self, x):
        return self.layer(x) @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_draw_that_is_the_same_in_every_call_is_a_constant():
    model = Reseeded().eval()
    torch.testing.assert_close(adfify(model, X)(Moments(X, torch.zeros_like(X))).mean, model(X))


class Two(Net):
    def forward(self, x, from_, self_=None):
        y = self.layer(x) - from_
        return y if y.shape[0] > 1 and self_ is None else y * self_  # torch.export traces it


def test_one_tensor_given_for_two_inputs_is_two_inputs():
    model = Two().eval()
    adf = adfify(model, (X, X))
    a, b = X.flip(0), 0.5 * X
    out = adf(Moments(a, torch.zeros_like(a)), Moments(b, torch.zeros_like(b)))
    torch.testing.assert_close(out.mean, model(a, b))


def test_any_name_of_an_input_will_do():
    model = Two().eval()
    out = adfify(model, (X, X, X))(X, 2 * X, 3 * X)
    assert out.mean.shape == X.shape


def test_a_complex_input_is_refused_when_the_model_is_converted():
    with pytest.raises(ModelError, match=r"input 'x' is complex.*torch\.complex"):
        adfify(Net(), X.to(torch.complex128))


class Power(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.register_buffer("exponent", exponent)

    def forward(self, x):
        return x**self.exponent


@pytest.mark.parametrize("exponent", [torch.tensor(2), torch.tensor(3.0), torch.tensor([0, 1, 2, 3, 4, 5])])
@pytest.mark.parametrize("std", [1e-6, 0.3])
def test_a_power_in_a_tensor_is_that_power_of_negative_values_too(exponent, std):
    x = Moments(X, torch.full_like(X, std**2))
    out = adfify(Power(exponent))(x)
    for n, power in enumerate(exponent.expand(6).tolist()):
        one = adfify(_Fixed(int(power)))(x)
        torch.testing.assert_close(out.mean[:, n], one.mean[:, n], rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(out.variance[:, n], one.variance[:, n], rtol=1e-3, atol=1e-30)


class _Fixed(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.exponent = exponent

    def forward(self, x):
        return x**self.exponent


def test_a_trained_power_has_finite_gradients():
    exponent = torch.tensor(3.0, requires_grad=True)
    mean = torch.tensor([-1.0, 0.0, 0.2, 4.0], requires_grad=True)
    value, variance = elementary.elementwise_power(mean, torch.full((4,), 0.04), exponent)
    gradients = torch.autograd.grad(value.sum() + variance.sum(), (mean, exponent))
    assert all(bool(g.isfinite().all()) for g in gradients)
    of_whole = elementary.whole_power(mean, torch.full((4,), 0.04), 3)
    (expected,) = torch.autograd.grad(of_whole[0].sum() + of_whole[1].sum(), mean)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-3)


class ByScalar(nn.Module):
    def forward(self, x):
        return torch.scatter(x, 1, torch.zeros(4, 1, dtype=torch.long), 2.0)


class LargestSize(nn.Module):
    def forward(self, x):
        return x * max(x.shape)  # 6 for few examples, and as many as there are for many


def test_a_number_that_is_scattered_is_certain():
    out = adfify(ByScalar(), X)(X)
    assert (out.mean[:, 0] == 2).all() and (out.variance[:, 0] == 0).all() and (out.variance[:, 1:] > 0).all()


def test_joint_tries_as_many_examples_as_it_has_noisy_inputs():
    adf = adfify(LargestSize(), X)
    noisy = Moments(X, torch.full_like(X, 1e-4))
    with pytest.raises(InputError, match=r"among \d+ noisy inputs in one pass"):
        adf.joint(noisy)
    whole = adf.joint(noisy, batched=(), outputs="all")
    np.testing.assert_allclose(whole.std, 0.06, rtol=0.1)


class OfTensors(nn.Module):
    def forward(self, x):
        return both_halves(x, 0.5)


def both_halves(x, y):
    return x + y


def test_a_number_where_a_rule_says_tensors_is_a_gap_in_the_plan():
    rules = Rules(RULES)

    @rules.register(both_halves)
    def of_moments(x: Moments, y: Moments | torch.Tensor) -> Moments:
        return Moments(x.mean + y.mean, x.variance)

    with pytest.raises(UnsupportedOpsError, match=r"its argument 'y' is 0\.5 here"):
        adfify(OfTensors(), rules=rules)  # with an example, torch.export would look into it


@pytest.mark.parametrize("attribute", ["T", "mT", "H"])
def test_torch_export_reads_attributes_as_torch_fx_does(attribute):
    class Net(nn.Module):
        def forward(self, x):
            return getattr(x, attribute) if x.shape[0] > 1 else x

    torch.testing.assert_close(adfify(Net(), X)(X).mean, X.T)


class Renormalised(nn.Module):
    """A table whose rows are shortened, in place, whenever they are looked up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(4, 6, max_norm=1.0, dtype=torch.float64)

    def forward(self, x):
        return x + self.table(torch.arange(4)) if x.shape[0] > 1 else x


class Shrinks(Net):
    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        return self.layer(x) if x.shape[0] > 1 else x


@pytest.mark.parametrize("build", [Renormalised, Shrinks])
def test_a_model_that_writes_into_its_weights_keeps_them_when_it_is_converted(build):
    model = build().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if build is Shrinks:
        with pytest.raises(ModelError, match=r"'layer\.weight'"):
            adfify(model, X)
    else:
        out = adfify(model, X)(Moments(X, torch.zeros_like(X)))
        torch.testing.assert_close(out.mean, build()(X))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["nested", "sparse"])
def test_inputs_that_are_not_dense_are_refused_by_name(kind):
    adf = adfify(Net())
    given = torch.nested.nested_tensor([X[0], X[1]]) if kind == "nested" else X.to_sparse()
    with pytest.raises(InputError, match=f"input 'x' is a {kind}"):
        adf(given)


class LengthOfShape(Net):
    def forward(self, x):
        try:
            return self.layer(x) * len(x.shape)
        except RuntimeError:
            return x


def test_attributes_are_asked_as_values_are():
    with pytest.raises(ModelError, match="len"):
        adfify(LengthOfShape().eval())
    out = adfify(LengthOfShape().eval(), X)(Moments(X, torch.zeros_like(X)))
    torch.testing.assert_close(out.mean, LengthOfShape()(X))
