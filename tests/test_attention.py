"""Products, attention and recurrent networks: what the walk over the registry can't see.

Chains of factors, one factor given twice, masks, memory, states that are uncertain, and Monte Carlo of recurrent
networks, which torch.func.vmap does not take: their draws go into the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_within
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify import nn as adf
from adfify.errors import InputError
from adfify.nn import attention, products, recurrent, recurrent_cells
from adfify.registry import RULES


def moments(*shape: int, seed: int = 0, std: float = 0.5) -> Moments:
    draw = torch.Generator().manual_seed(seed)
    mean, spread = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return Moments(mean, (std * (0.5 + spread.sigmoid())) ** 2)


def certain(x: Moments) -> Moments:
    return Moments(x.mean, torch.zeros_like(x.variance))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


# Products


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 2)]),
        ("ij,jk->i", [(2, 3), (3, 2)]),
        ("i,j->", [(3,), (2,)]),
        ("ij,jk,kl->il", [(2, 2), (2, 3), (3, 2)]),
        ("b i j, b j", [(2, 2, 2), (2, 2)]),
        ("...ij,...j->...i", [(2, 2, 3), (2, 3)]),
        ("ii,i->i", [(3, 3), (3,)]),
        ("ij,ij->i", [(2, 1), (2, 3)]),
        ("ij,ij->j", [(1, 3), (2, 3)]),
        ("i...,...->i...", [(2, 2), (2,)]),
    ],
)
@pytest.mark.parametrize("first_is_certain", [False, True])
def test_einsum_is_exact(equation: str, shapes: list[tuple[int, ...]], first_is_certain: bool) -> None:
    """Against every product of terms: E[y^2] summed over all pairs of terms, elements being independent."""
    factors = [moments(*shape, seed=k) for k, shape in enumerate(shapes)]
    if first_is_certain:
        factors[0] = certain(factors[0])
    given = [factors[0].mean, *factors[1:]] if first_is_certain else factors
    got = products.einsum(equation, *given)
    want = polynomial_moments(lambda *x: torch.einsum(equation, *x), factors)
    assert torch.equal(got.mean, torch.einsum(equation, *[x.mean for x in factors]))
    torch.testing.assert_close(got.variance, want.variance, rtol=1e-10, atol=1e-12)


def polynomial_moments(f: Callable[..., Tensor], factors: list[Moments]) -> Moments:
    """Of an f of degree 1 in every element: its mean and variance over two-point distributions, all of them."""
    flat = torch.cat([x.mean.flatten() for x in factors]), torch.cat([x.std.flatten() for x in factors])
    free = flat[1].nonzero().flatten().tolist()
    mean, std = flat
    sizes, shapes = [x.mean.numel() for x in factors], [x.shape for x in factors]
    coefficients: dict[tuple[int, ...], Tensor] = {}
    # Mixed differences in every set of elements, at most one of each factor: the coefficients of prod d.
    owner = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor(sizes)).tolist()
    total = torch.zeros_like(f(*[x.mean for x in factors]))
    for size in range(1, len(factors) + 1):
        for chosen in itertools.combinations(free, size):
            if len({owner[k] for k in chosen}) < size:
                continue
            coefficient = torch.zeros_like(total)
            for signs in itertools.product((0, 1), repeat=size):
                point = mean.clone()
                point[list(chosen)] += torch.tensor(signs, dtype=mean.dtype)
                value = f(*[part.reshape(shape) for part, shape in zip(point.split(sizes), shapes, strict=True)])
                coefficient = coefficient + (-1) ** (size - sum(signs)) * value
            coefficients[chosen] = coefficient
            total = total + coefficient.square() * std[list(chosen)].square().prod()
    return Moments(f(*[x.mean for x in factors]), total)


FORM = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

TWICE = {
    "matmul": (torch.matmul, products.matmul, (4, 4)),
    "batched matmul": (torch.matmul, products.matmul, (2, 3, 3)),
    "dot": (torch.dot, products.dot, (5,)),
    "outer": (torch.outer, products.outer, (4,)),
    "addmm": (
        lambda a, b: torch.addmm(torch.ones(3, 3, dtype=a.dtype), a, b, alpha=2.0),
        lambda a, b: products.addmm(torch.ones(3, 3, dtype=a.dtype), a, b, alpha=2.0),
        (3, 3),
    ),
    "bilinear": (lambda a, b: F.bilinear(a, b, FORM), lambda a, b: products.bilinear(a, b, FORM), (3, 4)),
    "addcmul": (
        lambda a, b: torch.addcmul(torch.ones(3, dtype=a.dtype), a, b, value=-2.0),
        lambda a, b: products.addcmul(torch.ones(3, dtype=a.dtype), a, b, value=-2.0),
        (3,),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_factor_that_is_given_twice_is_one_random_variable(name: str) -> None:
    original, rule, shape = TWICE[name]
    x = moments(*shape)
    got = rule(x, x)
    (truth,) = oracles.monte_carlo(lambda x: (original(x, x),), [x], [got], 40_000)
    limit = oracles.z_limit(2 * got.mean.numel())
    assert_within(truth.mean_error, limit * truth.mean_deviation, "mean")
    assert_within(got.variance - truth.variance, limit * truth.variance_deviation, "variance")
    assert torch.equal(rule(certain(x), certain(x)).mean, original(x.mean, x.mean))


# Attention


def masks(kind: str) -> dict[str, Any]:
    keep = torch.tensor([[True, False, True, True, False], [False, False, True, False, False], [False] * 5])
    if kind == "none":
        return {}
    if kind == "bool":
        return {"attn_mask": keep}
    if kind == "float":
        return {"attn_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(~keep, -torch.inf) + torch.arange(5.0)}
    return {"is_causal": True}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_masked_attention(kind: str) -> None:
    """What is masked counts for nothing; a row in which everything is masked is certainly zero."""
    q, k, v = moments(2, 3, 8), moments(2, 5, 8, seed=1), moments(2, 5, 4, seed=2)
    inputs = [part.requires_grad_() for x in (q, k, v) for part in x]
    options = masks(kind)
    got = attention.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad(got.mean.sum() + got.variance.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if kind in ("bool", "float"):
        assert (got.mean[:, 2] == 0).all()
        assert (got.variance[:, 2] == 0).all()
        torch.testing.assert_close(got.variance[:, 1], v.variance[:, 2])  # one key only: its value
    with torch.no_grad():
        exact = attention.scaled_dot_product_attention(certain(q), certain(k), certain(v), **options)
    assert torch.equal(exact.mean, F.scaled_dot_product_attention(q.mean, k.mean, v.mean, **options))
    assert (exact.variance == 0).all()


@pytest.mark.parametrize(("keys", "size"), [(5, 4), (16, 16), (64, 32)])
@pytest.mark.parametrize("std", [0.03, 0.3, 1.0])
def test_attention_is_as_near_to_monte_carlo_as_it_says(keys: int, size: int, std: float) -> None:
    shapes = [(4, size), (keys, size), (keys, size)]
    inputs = [moments(*shape, seed=k, std=std).to(torch.float32) for k, shape in enumerate(shapes)]
    got = attention.scaled_dot_product_attention(*inputs)
    (truth,) = oracles.monte_carlo(lambda *x: (F.scaled_dot_product_attention(*x),), inputs, [got], 20_000)
    unit = truth.variance.sqrt()
    mean, off = truth.mean_error / unit, got.std.double() / unit - 1
    assert mean.abs().max() < 0.45
    assert mean.square().mean().sqrt() < 0.25
    assert off.abs().max() < 0.25
    assert off.abs().mean() < 0.12


def test_an_uncertain_mask_adds_to_the_scores() -> None:
    q, k, v, bias = moments(3, 8), moments(5, 8, seed=1), moments(5, 4, seed=2), moments(3, 5, seed=3)
    got = attention.scaled_dot_product_attention(q.mean, k.mean, v.mean, bias)
    (truth,) = oracles.monte_carlo(
        lambda b: (F.scaled_dot_product_attention(q.mean, k.mean, v.mean, b),), [bias], [got], 20_000
    )
    assert_within(got.std - truth.variance.sqrt(), 0.3 * truth.variance.sqrt(), "std")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bool_mask", [True, False])
def test_multi_head_attention_takes_both_masks(need_weights: bool, batch_first: bool, bool_mask: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_zero_attn=True).double().eval()
    module = adf.MultiheadAttention(8, 2, batch_first=batch_first, add_zero_attn=True).double().eval()
    module.load_state_dict(original.state_dict())
    shape = (2, 4, 8) if batch_first else (4, 2, 8)
    x = moments(*shape)
    options: dict[str, Any] = {
        "key_padding_mask": torch.tensor([[False, False, False, True], [False] * 4]),
        "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
        "need_weights": need_weights,
        "average_attn_weights": False,
    }
    if not bool_mask:
        for name in ("key_padding_mask", "attn_mask"):
            zeros = torch.zeros(options[name].shape, dtype=torch.float64)
            options[name] = zeros.masked_fill(options[name], -torch.inf)
    want = leaves(original(x.mean, x.mean, x.mean, **options))
    zero = certain(x)
    for got, value in zip(leaves(module(zero, zero, zero, **options)), want, strict=True):
        assert torch.equal(got.mean, value)
        assert (got.variance == 0).all()
    out, weights = module(x, x, x, **options)
    assert (weights is None) is not need_weights
    assert (out.variance > 0).all()
    if weights is not None:
        assert (weights.variance[:, :, 0, 1:4] == 0).all()  # the first query sees the first key, and the zero
        assert (weights.variance[:, :, 0, [0, 4]] > 0).all()


def test_attention_makes_nothing_larger_than_its_scores() -> None:
    """Not even one tensor of [L, S, d]."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in leaves(result) if isinstance(x, Tensor))
            return result

    q, k, v = moments(2, 32, 16), moments(2, 40, 16), moments(2, 40, 16)
    with Watch():
        attention.scaled_dot_product_attention(q, k, v)
    assert max(sizes) <= 2 * 40 * 40


class Together(nn.Module):
    """A model of one module that takes one tensor as all of its inputs, or as many as are given."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Any:
        result = self.inner(*[x] * self.times)
        return result[0] if isinstance(self.inner, nn.MultiheadAttention) else result


LAYER: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "batch_first": True}

COMPOSED = {
    "attention of itself": lambda: Together(nn.MultiheadAttention(32, 4, batch_first=True), 3),
    "encoder layer": lambda: Together(nn.TransformerEncoderLayer(**LAYER)),
    "encoder layer, norm first, gelu": lambda: Together(
        nn.TransformerEncoderLayer(norm_first=True, activation=F.gelu, **LAYER)
    ),
    "encoder layer, module": lambda: Together(nn.TransformerEncoderLayer(activation=nn.SiLU(), **LAYER)),
    "decoder layer": lambda: Together(nn.TransformerDecoderLayer(**LAYER), 2),
    "encoder": lambda: Together(nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2, nn.LayerNorm(32))),
    "encoder and decoder": lambda: Together(
        nn.Transformer(32, 4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=48, batch_first=True), 2
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_composed_agrees_with_monte_carlo(name: str) -> None:
    """With the weights that torch starts from: weights of std 1 would saturate every softmax."""
    torch.manual_seed(0)
    model = COMPOSED[name]().double().eval()
    x = moments(2, 5, 32, std=0.1)
    converted = adfify(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert torch.equal(converted(certain(x)).mean, model(x.mean))
    assert (converted(certain(x)).variance == 0).all()
    with torch.no_grad():
        got, noisy = converted(x), x.mean + torch.randn(4_000, *x.shape, dtype=torch.float64) * x.std
        rows = model(noisy.flatten(0, 1)).unflatten(0, (4_000, 2))
    unit = rows.std(0)
    mean, off = (got.mean - rows.mean(0)) / unit, got.std / unit - 1
    assert mean.abs().max() < 0.4
    assert off.abs().max() < 0.6
    assert off.square().mean().sqrt() < 0.25


def test_an_activation_without_a_rule_is_named() -> None:
    def own(x: Tensor) -> Tensor:
        return x.relu()

    converted = adfify(Together(nn.TransformerEncoderLayer(activation=own, **LAYER)))
    with pytest.raises(InputError, match="own"):
        converted(torch.zeros(2, 3, 32))


# Recurrent networks

NETWORKS = {
    "LSTM": lambda: nn.LSTM(5, 6),
    "LSTM, two ways, two layers": lambda: nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True, dropout=0.5),
    "LSTM, projected": lambda: nn.LSTM(5, 6, proj_size=3),
    "GRU": lambda: nn.GRU(5, 6),
    "GRU, two ways, no bias": lambda: nn.GRU(5, 6, bidirectional=True, bias=False),
    "RNN": lambda: nn.RNN(5, 6),
    "RNN, relu, two layers": lambda: nn.RNN(5, 6, 2, nonlinearity="relu"),
    "LSTMCell": lambda: nn.LSTMCell(5, 6),
    "GRUCell": lambda: nn.GRUCell(5, 6),
    "RNNCell": lambda: nn.RNNCell(5, 6),
}


class Alone(nn.Module):
    """A model of one module, whose input alone is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def drawn(model: nn.Module, x: Moments, draws: int, batch: int) -> list[Tensor]:
    """Outputs for so many draws of the input, all in one batch: ``[draws, ...]``."""
    torch.manual_seed(1)
    noisy = x.mean + torch.randn(draws, *x.shape, dtype=x.dtype) * x.std
    outputs = leaves(model(noisy.movedim(0, batch).flatten(batch, batch + 1)))
    # Final states have the batch in second place, whatever batch_first is.
    places = [batch, *[1 if y.dim() == 3 else 0 for y in outputs[1:]]]
    return [y.unflatten(at, (draws, -1)).movedim(at, 0) for y, at in zip(outputs, places, strict=True)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("std", [0.1, 1.0])
@torch.no_grad()
def test_recurrent_network_agrees_with_monte_carlo(name: str, std: float) -> None:
    torch.manual_seed(0)
    module = NETWORKS[name]().double().eval()
    model = Alone(module)
    cell = isinstance(module, nn.RNNCellBase)
    batch = 0 if cell or module.batch_first else 1
    x = moments(*((2, 5) if cell else (4, 2, 5) if batch else (2, 4, 5)), std=std)
    converted = adfify(model)
    for got, want in zip(leaves(converted(certain(x))), leaves(model(x.mean)), strict=True):
        assert torch.equal(got.mean, want)
        assert (got.variance == 0).all()
    for got, rows in zip(leaves(converted(x)), drawn(model, x, 20_000, batch), strict=True):
        unit = rows.std(0)
        unit = unit.clamp(min=0.5 * float(unit.mean()))  # a unit that relu holds at 0 has no std to be measured by
        mean, off = (got.mean - rows.mean(0)) / unit, (got.std - rows.std(0)) / unit
        assert mean.abs().max() < 1
        assert mean.square().mean().sqrt() < 0.25
        assert off.abs().max() < 1.5
        assert off.square().mean().sqrt() < 0.4
    assert list(converted.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("module", [adf.LSTM(5, 6), adf.GRU(5, 6), adf.RNN(5, 6)], ids=lambda m: type(m).__name__)
def test_state_may_be_uncertain_or_known_and_an_input_known(module: nn.Module) -> None:
    module = module.double().eval()
    x, h, c = moments(4, 2, 5), moments(1, 2, 6, seed=1), moments(1, 2, 6, seed=2)
    state = (h, c) if isinstance(module, nn.LSTM) else h
    known = (h.mean, c.mean) if isinstance(module, nn.LSTM) else h.mean
    both, of_input, of_state = (leaves(module(*args))[0] for args in ((x, state), (x, known), (x.mean, state)))
    assert torch.equal(leaves(module(x, state))[0].mean, both.mean)
    assert (both.variance[0] > of_input.variance[0]).all()
    assert (of_state.variance[0] > of_state.variance[-1]).sum() > 6  # what is known of the past fades
    unbatched = leaves(module(Moments(x.mean[:, 0], x.variance[:, 0])))[0]
    torch.testing.assert_close(unbatched.variance, leaves(module(x))[0].variance[:, 0])


def test_packed_sequence_is_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 5), torch.zeros(2, 5)])
    with pytest.raises(InputError, match="PackedSequence"):
        adf.LSTM(5, 6)(packed)


def test_aten_overloads_have_rules() -> None:
    find, aten = RULES.find, torch.ops.aten
    assert find(aten.lstm.input).apply is recurrent.lstm
    assert find(aten.lstm.data) is None, "packed sequences have other arguments"
    assert find(aten.gru_cell.default).apply is recurrent_cells.gru_cell
    assert find(aten.matmul.default).apply is products.matmul
    assert find(aten.einsum.default).apply is products.einsum
    assert find(aten.scaled_dot_product_attention.default).apply is attention.scaled_dot_product_attention
    assert find(aten.baddbmm.default).apply is products.baddbmm
