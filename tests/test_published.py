"""The published rules against the published numbers, one layer at a time, as modules and through `adfify`.

Every number is held to 1e-9 relative, element by element, with no absolute floor: also where it is only what
cancellation left. Measured: 7e-14, and 2e-11 for the smallest elements of a stage, with and without AVX2.
"""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cifar_resnet import golden, u
from torch import Tensor, nn

from adfify import Moments, adfify, published, registry
from adfify.errors import InputError
from adfify.nn import Conv2d, Linear

CASE = golden("loquercio_layers.json")[0]
SALT, MIN_VARIANCE = CASE["salt"], CASE["min_variance"]
KEEP = partial(published.keep_variance, min_variance=MIN_VARIANCE)
SHAPE = (2, 4, 6, 6)

WEIGHTS = {
    "Conv2d_4_3_k3_s2_p1": {"weight": u(SALT + 2, (3, 4, 3, 3)) - 0.5, "bias": u(SALT + 3, (3,)) - 0.5},
    "BatchNorm2d_4_as_published": {
        "weight": u(SALT + 6, (4,)) + 0.5, "bias": u(SALT + 7, (4,)) - 0.5,
        "running_mean": u(SALT + 8, (4,)) - 0.5, "running_var": u(SALT + 9, (4,)) + 0.5,
    },
    "Linear_6_5": {"weight": u(SALT + 10, (5, 6)) - 0.5, "bias": u(SALT + 11, (5,)) - 0.5},
}  # fmt: skip
MODULES = {
    "ReLU": published.ReLU,
    "LeakyReLU_0.1": partial(published.LeakyReLU, 0.1),
    "MaxPool2d_2": partial(published.MaxPool2d, 2),
    "AvgPool2d_6": partial(published.AvgPool2d, 6),
    "AvgPool2d_2_as_published": partial(published.AvgPool2d, 2),
    "Softmax_dim1": partial(published.Softmax, 1),
    "Dropout_eval": published.Dropout,
    "Conv2d_4_3_k3_s2_p1": partial(Conv2d, 4, 3, 3, stride=2, padding=1),
    "BatchNorm2d_4_as_published": partial(published.BatchNorm2d, 4),
    "Linear_6_5": partial(Linear, 6, 5),
}
ORIGINALS = {
    "ReLU": nn.ReLU,
    "LeakyReLU_0.1": partial(nn.LeakyReLU, 0.1),
    "MaxPool2d_2": partial(nn.MaxPool2d, 2),
    "AvgPool2d_6": partial(nn.AvgPool2d, 6),
    "AvgPool2d_2_as_published": partial(nn.AvgPool2d, 2),
    "Softmax_dim1": partial(nn.Softmax, 1),
    "Dropout_eval": nn.Dropout2d,
    "Conv2d_4_3_k3_s2_p1": partial(nn.Conv2d, 4, 3, 3, stride=2, padding=1),
    "BatchNorm2d_4_as_published": partial(nn.BatchNorm2d, 4),
    "Linear_6_5": partial(nn.Linear, 6, 5),
}
_CONV, _BN, _LINEAR = WEIGHTS["Conv2d_4_3_k3_s2_p1"], WEIGHTS["BatchNorm2d_4_as_published"], WEIGHTS["Linear_6_5"]
FUNCTIONS = [
    ("ReLU", lambda x: F.relu(x)),
    ("ReLU", lambda x: F.relu(x, inplace=True)),
    ("ReLU", lambda x: torch.relu(x)),
    ("ReLU", lambda x: x.relu()),
    ("ReLU", lambda x: x.relu_()),
    ("ReLU", lambda x: torch.relu_(x)),
    ("LeakyReLU_0.1", lambda x: F.leaky_relu(x, 0.1)),
    ("LeakyReLU_0.1", lambda x: F.leaky_relu_(x, negative_slope=0.1)),
    ("AvgPool2d_6", lambda x: F.avg_pool2d(x, 6)),
    ("AvgPool2d_2_as_published", lambda x: F.avg_pool2d(x, (2, 2), stride=2)),
    ("MaxPool2d_2", lambda x: F.max_pool2d(x, 2)),
    ("MaxPool2d_2", lambda x: torch.max_pool2d(x, (2, 2), stride=(2, 2))),
    ("Softmax_dim1", lambda x: F.softmax(x, dim=1)),
    ("Softmax_dim1", lambda x: torch.softmax(x, 1)),
    ("Softmax_dim1", lambda x: x.softmax(-3)),
    ("Dropout_eval", lambda x: F.dropout(x, 0.3, training=False)),
    ("Dropout_eval", lambda x: F.dropout2d(x, 0.3, False)),
    ("Conv2d_4_3_k3_s2_p1", lambda x: F.conv2d(x, _CONV["weight"], _CONV["bias"], 2, 1)),
    (
        "BatchNorm2d_4_as_published",
        lambda x: F.batch_norm(x, _BN["running_mean"], _BN["running_var"], _BN["weight"], _BN["bias"]),
    ),
    (
        "BatchNorm2d_4_as_published",
        lambda x: torch.batch_norm(
            x, _BN["weight"], _BN["bias"], _BN["running_mean"], _BN["running_var"], False, 0.1, 1e-5, True
        ),
    ),
    ("Linear_6_5", lambda x: F.linear(x, _LINEAR["weight"], _LINEAR["bias"])),
]


class Calls(nn.Module):
    """A network of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1)  # times one: some functions write into their input


def given() -> Moments:
    return Moments((u(SALT, SHAPE) - 0.5) * 4, u(SALT + 1, SHAPE) * 0.5 + 0.01)


def ready(module: nn.Module, name: str) -> nn.Module:
    module.double().eval()
    module.load_state_dict({**module.state_dict(), **WEIGHTS.get(name, {})})
    return module


def assert_golden(out: Moments, name: str) -> None:
    for part in ("mean", "variance"):
        expected = torch.tensor(CASE[name][part], dtype=torch.float64)
        torch.testing.assert_close(getattr(out, part), expected, rtol=1e-9, atol=0.0)


def test_the_golden_file_has_no_other_layers():
    assert set(CASE) - {"salt", "min_variance"} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module_reproduces_the_published_layer(name):
    module = ready(MODULES[name](keep_variance_fn=KEEP), name)
    assert_golden(module(given()), name)
    assert_golden(module(*given()), name)


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_rewritten_module_reproduces_the_published_layer(name):
    original = nn.Sequential(ready(ORIGINALS[name](), name))
    assert_golden(adfify(original, rules=published.RULES, min_variance=MIN_VARIANCE)(given()), name)


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_rewritten_function_reproduces_the_published_layer(name, function):
    network = adfify(Calls(function), rules=published.RULES, min_variance=MIN_VARIANCE)
    assert_golden(network(given()), name)


def test_no_target_of_a_published_operation_falls_back_to_the_default_rules():
    own = {id(rule) for rule in published.RULES} - {id(rule) for rule in registry.RULES}
    operations = (F.relu, F.leaky_relu, F.batch_norm, F.avg_pool2d, F.max_pool2d, F.softmax)
    modules = (
        nn.ReLU, nn.LeakyReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AvgPool2d, nn.MaxPool2d, nn.Softmax,
        nn.Softmax2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    )  # fmt: skip
    for operation in operations + modules:
        for target in registry.RULES.find(operation).targets:
            assert id(published.RULES.find(target)) in own, target


@pytest.mark.parametrize(
    ("inside", "outside"),
    [(nn.AdaptiveAvgPool2d(1), "pooling"), (nn.Flatten(), "structural"), (nn.Sigmoid(), "elementwise")],
)
def test_operations_without_a_published_counterpart_keep_their_default_rule(inside, outside):
    x, network = given(), nn.Sequential(inside)
    default = adfify(network)(x)
    ours = adfify(network, rules=published.RULES, min_variance=0.25)(x)
    assert published.RULES.find(type(inside)) is registry.RULES.find(type(inside))
    torch.testing.assert_close(ours.mean, default.mean, rtol=0, atol=0)
    added = 0.0 if outside == "structural" else 0.25
    torch.testing.assert_close(ours.variance, default.variance + added, rtol=0, atol=0)


def test_min_variance_is_added_and_not_after_a_sum():
    class Doubled(nn.Module):
        def forward(self, x):
            return (x + F.relu(x)).flatten(1)

    x = given()
    network = adfify(Doubled(), rules=published.RULES, min_variance=0.5)
    expected = x.variance + published.relu(x).variance + 0.5
    torch.testing.assert_close(network(x).variance, expected.flatten(1), rtol=1e-15, atol=0)


def test_keep_variance_adds():
    variance = torch.tensor([0.0, 1.0, 2.5])
    torch.testing.assert_close(published.keep_variance(variance, 0.5), torch.tensor([0.5, 1.5, 3.0]))
    kept = published.add(Moments(variance, variance), 0.5)
    assert kept.mean is variance
    torch.testing.assert_close(kept.variance, variance + 0.5)


def test_dropout_policies_lie_over_the_published_rules():
    source = nn.Sequential(nn.Dropout2d(0.5)).eval()
    network = adfify(source, rules=published.RULES, dropout="sampled", min_variance=0.5)
    torch.manual_seed(0)
    mean, variance = network(given())
    mask = mean / given().mean
    assert set(mask.round(decimals=9).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(variance, given().variance * mask**2 + 0.5)


@pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_follows_the_training_flag_with_the_squared_mask_on_the_variance(drop):
    shape = {nn.Dropout1d: (8, 4, 6), nn.Dropout3d: (8, 4, 2, 3, 2)}.get(drop, (8, 4, 6, 6))
    x = Moments(1 + u(0, shape), 1 + u(1, shape))
    network = adfify(nn.Sequential(drop(0.25)), rules=published.RULES)
    torch.manual_seed(3)
    mean, variance = network(x)
    torch.manual_seed(3)
    mask = drop(0.25)(torch.ones(shape, dtype=torch.float64))  # the same draws as torch's own
    torch.testing.assert_close(mean, x.mean * mask, rtol=1e-15, atol=0)
    torch.testing.assert_close(variance, x.variance * mask**2, rtol=1e-15, atol=0)
    evaluated = network.eval()(x)
    assert torch.equal(evaluated.mean, x.mean)
    assert torch.equal(evaluated.variance, x.variance)


def test_functional_dropout_follows_its_argument():
    network = adfify(Calls(lambda x: F.dropout2d(F.dropout(x, 0.5, True), 0.5, True)), rules=published.RULES)
    torch.manual_seed(3)
    mean, variance = network(given())
    torch.manual_seed(3)
    mask = F.dropout2d(F.dropout(torch.ones(SHAPE, dtype=torch.float64), 0.5), 0.5)
    torch.testing.assert_close(mean, given().mean * mask)
    torch.testing.assert_close(variance, given().variance * mask**2)


def test_batch_norm_in_training_uses_the_statistics_of_the_means():
    torch.manual_seed(0)
    original = nn.BatchNorm2d(4).double()
    nn.init.uniform_(original.weight)
    ours = published.BatchNorm2d(4).double()
    ours.load_state_dict(original.state_dict())
    mean, variance = ours(given())
    torch.testing.assert_close(mean, original(given().mean), rtol=0, atol=0)
    torch.testing.assert_close(variance, given().variance * ours.weight.reshape(1, 4, 1, 1) ** 2)
    for key, value in original.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_batch_norm_without_weights_leaves_the_variance():
    out = published.BatchNorm2d(4, affine=False).double().eval()(given())
    assert torch.equal(out.variance, given().variance)


def test_average_pooling_takes_the_window_in_the_call_as_published():
    mean, variance = given()
    pool = published.AvgPool2d(keep_variance_fn=KEEP)
    assert_golden(pool(mean, variance, 6), "AvgPool2d_6")
    assert_golden(pool(mean, variance, kernel_size=2), "AvgPool2d_2_as_published")
    with pytest.raises(InputError, match="window"):
        pool(mean, variance)


def test_average_pooling_divides_by_the_image_whatever_the_window():
    x = given()
    out = published.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    expected = F.avg_pool2d(x.variance, 3, 1, 1, count_include_pad=False) / 36
    torch.testing.assert_close(out.variance, expected, rtol=1e-15, atol=0)


def test_max_pooling_of_odd_sizes_leaves_the_last_row_and_column_out():
    mean, variance = given()
    odd = published.max_pool2d(Moments(mean[..., :5, :5], variance[..., :5, :5]), 2)
    even = published.max_pool2d(Moments(mean[..., :4, :4], variance[..., :4, :4]), 2)
    assert torch.equal(odd.mean, even.mean)
    assert odd.mean.shape == F.max_pool2d(mean[..., :5, :5], 2).shape


@pytest.mark.parametrize("options", [(3, 2, 1), (2, 1), (2, 2, 1), (2, 2, 0, 2)])
def test_other_max_pooling_keeps_the_default_rule(options):
    network = nn.Sequential(nn.MaxPool2d(*options))
    ours, default = adfify(network, rules=published.RULES)(given()), adfify(network)(given())
    assert torch.equal(ours.mean, default.mean)
    assert torch.equal(ours.variance, default.variance)


def test_max_pooling_keeps_the_variance_inside_when_asked_to():
    kept = published.add(published.max_pool2d(given(), 2, min_variance=MIN_VARIANCE), MIN_VARIANCE)
    assert_golden(kept, "MaxPool2d_2")
    module = published.MaxPool2d()
    assert_golden(published.add(module(given(), min_variance=MIN_VARIANCE), MIN_VARIANCE), "MaxPool2d_2")


def test_max_pooling_refuses_to_return_indices():
    with pytest.raises(InputError, match="return_indices"):
        published.MaxPool2d(2, return_indices=True)(given())
    with pytest.raises(InputError, match="return_indices"):
        published.max_pool2d(given(), 2, return_indices=True)


def test_functional_max_pooling_is_rewritten():
    network = adfify(Calls(lambda x: F.max_pool2d(x, 2)), rules=published.RULES)
    assert torch.equal(network(given()).mean, published.max_pool2d(given(), 2).mean)


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU_0.1", "MaxPool2d_2", "Softmax_dim1", "AvgPool2d_2_as_published"])
def test_without_variance_it_is_the_original_with_finite_gradients(name):
    mean = (u(5, SHAPE) - 0.5).requires_grad_()
    variance = torch.zeros_like(mean).requires_grad_()
    with torch.no_grad():
        mean[0] = 0.0
    out = MODULES[name]()(mean, variance)
    slack = 1e-4 if name == "Softmax_dim1" else 1e-15  # its denominator has 1e-5 added
    torch.testing.assert_close(out.mean, ORIGINALS[name]()(mean), rtol=slack, atol=slack)
    assert torch.equal(out.variance, torch.zeros_like(out.variance))
    (out.mean.sum() + out.variance.sum()).backward()
    assert mean.grad.isfinite().all()
    assert variance.grad.isfinite().all()


def test_softmax_does_not_overflow():
    mean, variance = torch.tensor([[300.0, 299.0, -300.0]]), torch.full((1, 3), 0.1)
    large = published.Softmax()(mean, variance)
    small = published.Softmax()(mean - 290, variance)  # exp(10): the 1e-5 in the denominator is out of sight
    torch.testing.assert_close(large.mean, small.mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(large.variance, small.variance, rtol=1e-4, atol=0)


def test_softmax_finds_torchs_implicit_dimension():
    x = given()
    implicit = adfify(nn.Sequential(nn.Softmax()), rules=published.RULES)(x)
    assert torch.equal(implicit.mean, published.softmax(x, 1).mean)
    over_channels = adfify(nn.Sequential(nn.Softmax2d()), rules=published.RULES)(x)
    assert torch.equal(over_channels.variance, published.softmax(x, 1).variance)


def test_the_rewritten_network_can_be_pickled():
    network = adfify(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU()), rules=published.RULES, min_variance=0.1).double()
    copy = pickle.loads(pickle.dumps(network))
    assert torch.equal(copy(given()).variance, network(given()).variance)
