"""Elements by their order: moments of the values against what is known of them, and positions, which are refused."""

import math

import pytest
import torch
from torch import nn

import adfify
from adfify.errors import InputError, UnsupportedOpsError
from adfify.gaussian.order_statistics import order_statistics
from adfify.moments import Moments
from adfify.nn import order_statistics as rules

TOLERANCE = 0.01  # of the std, for up to 64 elements
DRAWS = 100_000


def drawn(mean, variance, seed=0):
    """Sorted draws of independent normal variables, ``[DRAWS, n]``, in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(DRAWS, len(mean), generator=generator, dtype=torch.float64)
    return (mean.double() + variance.double().sqrt() * noise).sort(-1).values


def assert_agrees(mean, variance, sample, tolerance=TOLERANCE):
    """Within the tolerance in units of the true std, and 5 standard errors of the draws."""
    truth = sample.mean(0)
    centred = sample - truth
    spread = centred.square().mean(0)
    std = spread.sqrt()
    error = std / math.sqrt(DRAWS)
    wide = (centred.pow(4).mean(0) - spread.square()).clamp(min=0).sqrt() / math.sqrt(DRAWS) / (2 * std)
    assert bool(((mean - truth).abs() <= tolerance * std + 5 * error).all())
    assert bool(((variance.double().sqrt() - std).abs() <= tolerance * std + 5 * wide).all())


@pytest.mark.parametrize(
    "size, means, variances",
    [  # Teichroew, Ann. Math. Statist. 27, 1956; Godwin, Ann. Math. Statist. 20, 1949
        (2, [0.5641895835], [1 - 1 / math.pi]),
        (3, [0.8462843753, 0.0], [0.5594672038, 0.4486711046]),
        (4, [1.0293753730, 0.2970113823], [0.4917152369, 0.3604553434]),
        (5, [1.1629644736, 0.4950189705, 0.0], [0.4475340691, 0.3115189521, 0.2868336616]),
        (10, [1.5387527308, 1.0013570446, 0.6560591057], [0.3443438233, 0.2145241430, 0.1750032834]),
    ],
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_normal_order_statistics_as_tabled(size, means, variances, scale):
    mean, variance = order_statistics(torch.full((size,), 7.0), torch.full((size,), scale**2), range(size))
    for place, (expected, spread) in enumerate(zip(means, variances, strict=True)):
        for index, sign in ((size - 1 - place, 1), (place, -1)):
            std = scale * math.sqrt(spread)
            # What float32 resolves at 7 is 1e-6.
            assert float(mean[index]) - 7 == pytest.approx(sign * expected * scale, abs=TOLERANCE * std + 1e-6)
            assert math.sqrt(float(variance[index])) == pytest.approx(std, rel=TOLERANCE)


def unlike(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(size, generator=generator), torch.exp(2 * torch.randn(size, generator=generator))


def test_of_unlike_elements():
    mean, variance = unlike(16, 1)
    assert_agrees(*order_statistics(mean, variance, range(16)), drawn(mean, variance))


def test_of_which_half_is_certain_and_some_lie_far_away():
    mean, variance = unlike(12, 2)
    variance[::2] = 0
    mean[:3] += 30
    found, spread = order_statistics(mean, variance, range(12))
    sample = drawn(mean, variance)
    random = sample.std(0) > 1e-3
    assert_agrees(found[random], spread[random], sample[:, random])


@pytest.mark.parametrize("size", [65, 100])
def test_of_many_in_the_middle_and_at_the_ends(size):
    mean, variance = unlike(size, 3)
    ranks = [0, 3, 12, size // 4, size // 2, size - 20, size - 1]
    found, spread = order_statistics(mean, variance, ranks)
    assert_agrees(found, spread, drawn(mean, variance)[:, ranks], 0.03)


def test_sum_is_that_of_the_elements():
    """Whatever their order, they add up to the same."""
    mean, variance = unlike(40, 4)
    assert float(order_statistics(mean, variance, range(40))[0].sum()) == pytest.approx(float(mean.sum()), abs=0.02)


def test_what_is_sorted_alike_from_both_sides():
    mean, variance = unlike(9, 5)
    up, spread = order_statistics(mean, variance, range(9))
    down, mirrored = order_statistics(-mean, variance, range(9))
    torch.testing.assert_close(up, -down.flip(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(spread, mirrored.flip(0), rtol=1e-3, atol=1e-6)


CERTAIN = torch.tensor([[3.0, 1.0, 3.0, -2.0, 1.0, 1e4], [0.0, -0.0, 5.0, 5.0, 5.0, 5.0]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, of: of.sort(x)[0],
        lambda x, of: of.sort(x, 0, True)[0],
        lambda x, of: of.msort(x),
        lambda x, of: of.topk(x, 4)[0],
        lambda x, of: of.topk(x, 2, 0, False)[0],
        lambda x, of: of.kthvalue(x, 3)[0],
        lambda x, of: of.median(x, 1, True)[0],
        lambda x, of: of.median(x),
        lambda x, of: of.cummax(x, 1)[0],
        lambda x, of: of.cummin(x, 0)[0],
        lambda x, of: of.aminmax(x, dim=1).max,
        lambda x, of: of.aminmax(x).min,
    ],
)
def test_at_variance_zero_it_is_the_original_with_ties(function):
    result = function(Moments(CERTAIN, torch.zeros_like(CERTAIN)), rules)
    assert torch.equal(result.mean, function(CERTAIN, torch))
    assert not bool(result.variance.any())


def test_a_variance_that_vanishes_leaves_one_that_is_certain():
    mean, variance = order_statistics(torch.tensor([0.0, 10.0, 20.0]), torch.tensor([1.0, 0.0, 1.0]), [0, 1, 2])
    torch.testing.assert_close(mean, torch.tensor([0.0, 10.0, 20.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(variance, torch.tensor([1.0, 0.0, 1.0]), rtol=0.01, atol=1e-6)


def test_running_maximum():
    mean, variance = unlike(6, 6)
    found = rules.cummax(Moments(mean, variance), 0).values
    for end in range(1, 7):
        sample = drawn(mean[:end], variance[:end])[:, -1:]
        assert_agrees(found.mean[end - 1 : end], found.variance[end - 1 : end], sample, 0.03)


def test_what_is_no_rank_is_refused():
    x = Moments(torch.zeros(3), torch.ones(3))
    with pytest.raises(InputError, match="k=4 of 3 elements"):
        rules.topk(x, 4)
    with pytest.raises(InputError, match="k=0 of 3 elements"):
        rules.kthvalue(x, 0)


class Written(nn.Module):
    """A network of one function; ``branching`` on a size, which only torch.export can trace."""

    def __init__(self, function, branching):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.function, self.branching = function, branching

    def forward(self, x):
        if self.branching and x.shape[0] > 100:
            return x
        return self.function(self.linear(x))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))


def converted(function, engine):
    torch.manual_seed(8)
    model = Written(function, engine == "export").eval()
    return model, adfify.adfify(model, example_inputs=(X,))


ENGINES = pytest.mark.parametrize("engine", ["fx", "export"])


def scaled_by_positions(x):
    values, places = x.sort(-1)
    return values + 0.1 * places


@ENGINES
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.gather(1, x.topk(2).indices),
        lambda x: x[x.sort(0)[1][0]],
        lambda x: torch.take_along_dim(x, torch.sort(x, descending=True).indices, 1),
        lambda x: x.index_select(1, torch.median(x.flatten(), 0).indices.reshape(1)),
        lambda x: x.max(1).indices,
        lambda x: torch.kthvalue(x, 2)[1],
        lambda x: x.cummax(1).indices * 1.0,
        lambda x: torch.topk(x, 2),
        lambda x: x.sort(),
        lambda x: (x.cummin(1),),
        lambda x: {"sorted": torch.sort(x)},
        lambda x: torch.nn.functional.max_pool1d(x.unsqueeze(1), 2, return_indices=True),
        scaled_by_positions,
    ],
)
def test_positions_that_are_used_are_refused_at_conversion(function, engine):
    with pytest.raises(UnsupportedOpsError, match="no mean and variance; use its values only") as caught:
        converted(function, engine)
    assert "test_order_statistics.py:" in str(caught.value)


@ENGINES
@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: torch.mode(x, 1).values, "most frequent"),
        (lambda x: torch.nanmedian(x, 1).values, "which elements it skips"),
        (lambda x: x.argsort(1) + x, "position has no mean and variance"),
        (lambda x: torch.histc(x, 4), "counts random values"),
    ],
)
def test_what_has_no_moments_says_why(function, reason, engine):
    with pytest.raises(UnsupportedOpsError, match=reason):
        converted(function, engine)


def unpacked(x):
    values, _ = torch.topk(x, 3, dim=1)
    return values


def read_by_nothing(x):
    values, places = x.sort(1, descending=True)
    x.gather(1, places)
    return values[:, :2].mean(1)


@ENGINES
@pytest.mark.parametrize(
    "function",
    [
        unpacked,
        read_by_nothing,
        lambda x: x.sort().values,
        lambda x: x.sort()[0],
        lambda x: torch.msort(x),
        lambda x: x.median(),
        lambda x: x.median(dim=0).values,
        lambda x: torch.kthvalue(x, 2, 1).values,
        lambda x: x.cummax(1)[0],
        lambda x: x.max(1).values,
        lambda x: torch.aminmax(x, dim=1).max - torch.aminmax(x, dim=1).min,
        lambda x: torch.aminmax(x, dim=1)[0],
    ],
)
def test_positions_that_are_not_used_do_no_harm(function, engine):
    model, adf = converted(function, engine)
    expected = model(X)
    certain = adf(Moments(X, torch.zeros_like(X)))
    torch.testing.assert_close(certain.mean, expected)
    assert not bool(certain.variance.any())
    uncertain = adf(Moments(X, torch.full_like(X, 0.25)))
    assert uncertain.mean.shape == uncertain.variance.shape == expected.shape
    assert bool((uncertain.variance > 0).all())


@ENGINES
def test_positions_of_what_is_certain_may_be_used(engine):
    def function(x):
        return x.gather(1, torch.arange(20.0).reshape(4, 5).sort(1, descending=True).indices)

    model, adf = converted(function, engine)
    certain = adf(Moments(X, torch.zeros_like(X)))
    torch.testing.assert_close(certain.mean, model(X))


def test_a_network_agrees_with_draws():
    _, adf = converted(lambda x: x.sort(1).values, "fx")
    after = converted(lambda x: x, "fx")[1](Moments(X, torch.full_like(X, 0.25)))
    result = adf(Moments(X, torch.full_like(X, 0.25)))
    for row in range(len(X)):
        assert_agrees(result.mean[row], result.variance[row], drawn(after.mean[row], after.variance[row], row))
