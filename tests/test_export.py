"""torch.export as the second engine: chosen without being asked for, and the same network at the end."""

import copy
import dataclasses
import pickle
import typing

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adfify
from adfify import Moments, UnsupportedOpsError
from adfify.errors import InputError, ModelError


class Net(nn.Module):
    """A convolutional network whose forward each test fills in: ``rest`` is called on itself and the features."""

    def __init__(self, rest):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.rest = rest

    def forward(self, x):
        return self.rest(self, self.norm(self.conv(x)))


def branch_on_size(net, y):
    y = torch.relu(y) if y.shape[0] > 1 else torch.sigmoid(y)
    return net.head(y.mean((2, 3)))


def write_through_a_view(net, y):
    y = torch.relu(y)
    y[:, 0] *= 2
    y[:, :, 0] = 0.5
    return net.head(y.mean((2, 3)))


def without_gradients(net, y):
    with torch.no_grad():
        y = torch.relu(y) + 1
    return net.head(y.mean((2, 3)))


def without_autocast(net, y):
    if y.shape[0] > 1:
        with torch.autocast("cpu", enabled=False):
            y = torch.relu(y) * 2
    return net.head(y.mean((2, 3)))


RESTS = [branch_on_size, write_through_a_view, without_gradients, without_autocast]


def built(rest):
    torch.manual_seed(0)
    net = Net(rest).double()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("rest", RESTS, ids=lambda rest: rest.__name__)
def test_the_exported_network_is_the_original_with_a_variance(rest):
    net, x = built(rest), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    adf = adfify.adfify(net, x, noise_variance=1e-2)
    assert list(adf.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for other in (x, torch.randn(5, 3, 9, 12, dtype=torch.float64)):
        mean, variance = adf(Moments(other, torch.zeros_like(other)))
        torch.testing.assert_close(mean, net(other), rtol=1e-12, atol=1e-12)
        assert (variance == 0).all()
        assert (adf(other).variance > 0).all()


@pytest.mark.parametrize("rest", RESTS, ids=lambda rest: rest.__name__)
def test_variance_agrees_with_the_plainly_written_network(rest):
    """Each of them is one of these when the batch is 2, written so that torch.fx can trace it."""

    def plain(net, y):
        y = torch.relu(y)
        if rest is without_gradients:
            y = y + 1
        if rest is without_autocast:
            y = y * 2
        if rest is write_through_a_view:
            y = torch.cat([2 * y[:, :1], y[:, 1:]], 1)
            y = torch.cat([torch.full((2, 4, 1, 5), 0.5, dtype=torch.float64), y[:, :, 1:]], 2)
        return net.head(y.mean((2, 3)))

    net, x = built(rest), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = adfify.inspect(built(plain))
    assert expected.traced.engine == "torch.fx"
    expected, got = adfify.adfify(built(plain))(x), adfify.adfify(net, x)(x)
    torch.testing.assert_close(got.mean, expected.mean)
    torch.testing.assert_close(got.variance, expected.variance)


def test_the_exported_network_copies_pickles_and_learns():
    net, x = built(branch_on_size), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert adfify.inspect(net, x).traced.engine == "torch.export"
    adf = adfify.adfify(net, x)
    for twin in (copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        assert torch.equal(twin(x).variance, adf(x).variance)
    adf(x).variance.sum().backward()
    assert adf.conv.weight.grad.abs().sum() > 0
    assert adf.float()(x.float()).variance.dtype == torch.float32


def follows_the_dtype(net, y):
    y = torch.relu(y).to(net.conv.weight.dtype) if y.shape[0] > 1 else y
    return net.head(y.mean((2, 3)))


def test_the_exported_network_is_not_held_to_the_dtype_it_was_traced_in():
    net, x = built(follows_the_dtype), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    adf = adfify.adfify(net, x, noise_variance=0.0).float()
    mean, variance = adf(x.float())
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, net.float()(x.float()))


def test_inputs_are_derived_from_the_model_s_own_configuration():
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    plan = adfify.inspect(model)
    assert plan.traced.engine == "torch.export"
    assert not plan.missing
    x = torch.randn(3, *model.pretrained_cfg["input_size"])
    mean, variance = adfify.adfify(model)(Moments(x, torch.zeros_like(x)))
    torch.testing.assert_close(mean, model(x), rtol=1e-5, atol=1e-5)
    assert (variance == 0).all()


def branch_on_height(net, y):
    if y.shape[2] > 16:
        y = 10 * F.avg_pool2d(y, 2)
    return net.head(y.mean((2, 3)))


def never_of_no_batch(net, y):
    return y if y.shape[0] == 0 else net.head(y.mean((2, 3)))


def test_the_other_side_of_a_branch_on_a_size_is_refused():
    net = built(branch_on_height)
    adf = adfify.adfify(net, torch.zeros(2, 3, 8, 8, dtype=torch.float64), noise_variance=0.0)
    x = torch.randn(3, 3, 12, 9, dtype=torch.float64)
    torch.testing.assert_close(adf(x).mean, net(x))
    for twin in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
        with pytest.raises(InputError, match=r"size 2 of input 0 <= 16.*\(3, 3, 32, 9\).*example_inputs"):
            twin(torch.randn(3, 3, 32, 9, dtype=torch.float64))
    with pytest.raises(InputError):
        adf(torch.randn(3, 4, 8, 8, dtype=torch.float64))


def test_an_example_of_one_item_leaves_the_batch_free():
    net, x = built(never_of_no_batch), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    adf = adfify.adfify(net, x[:1], noise_variance=0.0)
    for part in (x, x[:1]):
        torch.testing.assert_close(adf(part).mean, net(part))


def test_a_model_in_training_mode_is_not_exported():
    net = built(branch_on_size).train()
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        adfify.adfify(net, torch.randn(2, 3, 6, 5, dtype=torch.float64))


class Submodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.arange(4.0).double()

    def forward(self, y):
        return y * self.table


def test_a_tensor_of_a_submodule_comes_along():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Submodule()

        def forward(self, x):
            return self.inner(torch.relu(x)) if x.shape[0] > 0 else x

    net, x = Holding().eval(), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(adfify.adfify(net, x, noise_variance=0.0)(x).mean, net(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        self.count = self.count + 1
        return x * self.count


def test_a_buffer_that_is_assigned_is_not_lost():
    with pytest.raises(ModelError, match="reads what an earlier call left in 'count'"):
        adfify.adfify(Counting())


def windows(net, y):
    return y.unfold(2, 2, 2).mean((1, 4)) if y.shape[0] > 1 else y


def test_unfold_of_a_tensor_is_not_that_of_a_picture():
    net, x = built(windows), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(adfify.adfify(net, x, noise_variance=0.0)(x).mean, net(x))


def in_place_power(net, y):
    z = y
    y **= 2
    return net.head(z.mean((2, 3)))


def test_other_in_place_operators_are_followed_by_torch_export():
    net, x = built(in_place_power), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(adfify.adfify(net, x, noise_variance=0.0)(x).mean, net(x))


def test_without_inputs_the_error_names_the_line_and_asks_for_them():
    with pytest.raises(ModelError, match=r"test_export.py:\d+(.|\n)*example_inputs=\(x,\)"):
        adfify.adfify(built(branch_on_size))


def depends_on_data(net, y):
    return y if y.sum() > 0 else -y


def returns_a_number(net, y):
    return y.sum().item()


def test_a_branch_on_values_is_refused_with_its_line():
    with pytest.raises(ModelError, match=r"test_export.py:\d+(.|\n)*torch.export gave up too"):
        adfify.adfify(built(depends_on_data), torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_a_python_number_is_refused_with_its_line():
    with pytest.raises(UnsupportedOpsError, match=r"Tensor.item.*test_export.py:\d+.*no variance"):
        adfify.adfify(built(returns_a_number))


def test_whole_numbers_taken_as_uncertain_are_refused_with_what_to_do():
    with pytest.raises(UnsupportedOpsError, match=r"torch.nn.Embedding in '0'.*give example_inputs"):
        adfify.adfify(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))


def library_function(y):
    return torch.relu(y) * (2 if y.shape[1] > 2 else 1)


torch.fx.wrap("library_function")


def calls_a_library(net, y):
    return net.head(library_function(y).mean((2, 3)))


def test_a_function_that_torch_fx_does_not_look_into_is_taken_apart_by_torch_export():
    net, x = built(calls_a_library), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert [op.op for op in adfify.inspect(net).missing] == [f"{__name__}.library_function"]
    plan = adfify.inspect(net, x)
    assert plan.traced.engine == "torch.export"
    assert not plan.missing
    torch.testing.assert_close(adfify.adfify(net, x, noise_variance=0.0)(x).mean, net(x))


@dataclasses.dataclass
class Detection:
    boxes: Tensor
    count: int


class Pair(typing.NamedTuple):
    first: Tensor
    second: Tensor


def returns_a_dataclass(net, y):
    return Detection(net.head(y.mean((2, 3))), 3)


def returns_a_named_tuple(net, y):
    return Pair(net.head(y.mean((2, 3))), y)


def returns_nested(net, y):
    return {"out": y, "aux": [y.amax((2, 3)), (None, 3)]}


def test_outputs_come_in_the_structure_of_the_original():
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    detection = adfify.adfify(built(returns_a_dataclass))(x)
    assert type(detection) is Detection
    assert isinstance(detection.boxes, Moments)
    assert detection.count == 3
    pair = adfify.adfify(built(returns_a_named_tuple))(x)
    assert type(pair) is Pair
    assert isinstance(pair.second, Moments)
    nested = adfify.adfify(built(returns_nested))(x)
    assert isinstance(nested["aux"][0], Moments)
    assert nested["aux"][1] == (None, 3)
