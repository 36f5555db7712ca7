"""What `adfify` keeps of a model, what it refuses, and what it says."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adfify
from adfify import Moments
from adfify.errors import InputError, ModelError, UnsupportedOpsError


class Small(nn.Module):
    """A little of everything that a residual network has."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.pool = nn.MaxPool2d(2)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((8, 1, 1), 0.5))

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.conv(x)) + x * self.scale
        x = self.relu(self.conv(x))
        x = self.pool(x).mean((2, 3))
        return self.head(F.dropout(x, 0.2, self.training))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Small().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_zero_variance_is_the_original(model, x):
    adf = adfify.adfify(model, noise_variance=0.0)
    mean, variance = adf(x)
    assert torch.equal(mean, model(x))
    assert torch.equal(variance, torch.zeros_like(mean))


def test_variance_against_monte_carlo_on_one_linear_layer(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4).double())
    out = adfify.adfify(model, noise_variance=0.04)(x)
    truth = adfify.monte_carlo(model, x, 0.04, 20000)
    assert ((out.std - truth.std) / truth.std_error).abs().max() < 4.5
    assert ((out.mean - truth.mean) / truth.mean_error).abs().max() < 4.5


def test_the_model_is_untouched(model, x):
    before = copy.deepcopy(model)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    adf = adfify.adfify(model)
    adf.head.weight.data.zero_()
    adf.train()
    assert all(type(a) is type(b) for a, b in zip(model.modules(), before.modules(), strict=True))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert not any(module.training for module in model.modules())
    for (key, value), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, old), key


def test_state_dict_goes_both_ways(model, x):
    adf = adfify.adfify(model)
    assert list(adf.state_dict()) == list(model.state_dict())
    other = Small().double().eval()
    adf.load_state_dict(other.state_dict())
    adf.noise_variance = 0.0
    assert torch.equal(adf(x).mean, other(x))
    model.load_state_dict(adf.state_dict())
    assert torch.equal(model(x), other(x))


def test_weights_are_copied_or_shared(model):
    assert adfify.adfify(model).head.weight is not model.head.weight
    shared = adfify.adfify(model, share_weights=True)
    assert shared.head.weight is model.head.weight
    assert shared.stem[1].running_var is model.stem[1].running_var


def test_kept_dtype_flags_frozen_parameters_and_layout():
    model = Small().to(memory_format=torch.channels_last)
    model.stem[1].eval()
    model.conv.weight.requires_grad_(False)
    adf = adfify.adfify(model)
    assert adf.training
    assert adf.head.training
    assert not adf.stem[1].training
    assert not adf.conv.weight.requires_grad
    assert adf.head.weight.requires_grad
    assert adf.conv.weight.is_contiguous(memory_format=torch.channels_last)
    out = adf.eval()(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert out.mean.dtype == out.variance.dtype == torch.float32


def test_convolutional_output_keeps_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last)
    out = adfify.adfify(model.eval())(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert out.mean.is_contiguous(memory_format=torch.channels_last)
    assert out.variance.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda adf: pickle.loads(pickle.dumps(adf))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_keep_every_key(model, x, copied):
    adf = adfify.adfify(model, noise_variance=0.02, min_variance=1e-6)
    twin = copied(adf)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert twin.head.weight is not adf.head.weight
    assert torch.equal(twin(x).variance, adf(x).variance)
    assert twin.noise_variance == 0.02
    assert twin.training == adf.training
    twin.noise_variance = 0.5
    assert adf.noise_variance == 0.02


def test_torch_save_of_the_module(model, x):
    adf = adfify.adfify(model)
    file = io.BytesIO()
    torch.save(adf, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x).variance, adf(x).variance)


def test_print_shows_modules_and_code(model):
    text = str(adfify.adfify(model))
    assert "ADFSmall" in text
    assert "(conv): Conv2d(8, 8, kernel_size=(3, 3)" in text
    assert "self.head(" in text


def test_wrappers_are_taken_off(model, x):
    expected = adfify.adfify(model)(x)
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        adf = adfify.adfify(wrapped)
        assert list(adf.state_dict()) == list(model.state_dict())
        assert torch.equal(adf(x).variance, expected.variance)


def test_distributed_data_parallel_is_taken_off(model, x):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        adf = adfify.adfify(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(adf(x).variance, adfify.adfify(model)(x).variance)


def test_tied_weights_stay_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    for adf in (adfify.adfify(nn.Sequential(first, nn.ReLU(), second)),):
        for net in (adf, copy.deepcopy(adf), pickle.loads(pickle.dumps(adf))):
            modules = dict(net.named_modules())
            assert modules["0"].weight is modules["2"].weight


def test_one_module_under_two_names_stays_one():
    shared = nn.Linear(4, 4)
    adf = adfify.adfify(nn.Sequential(shared, nn.Tanh(), shared))
    assert dict(adf.named_modules(remove_duplicate=False))["0"] is dict(adf.named_modules(remove_duplicate=False))["2"]
    x = torch.randn(3, 4)
    adf.noise_variance = 0.0
    assert torch.allclose(adf(x).mean, shared(torch.tanh(shared(x))), atol=0)


def test_in_place_writes_are_seen_by_later_readers():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = x * 2
            z = self.relu(y)
            w = F.leaky_relu(z - 1, 0.1, inplace=True)
            w.mul_(3)
            return y + z * 10 + w, y

    x = torch.randn(4, 5, dtype=torch.float64)
    adf = adfify.adfify(Skip(), noise_variance=0.0)
    for got, expected in zip(adf(x), Skip()(x), strict=True):
        assert torch.equal(got.mean, expected)


def test_in_place_write_through_what_may_be_a_view_is_refused():
    class View(nn.Module):
        def forward(self, x):
            y = x * 2
            head = y.transpose(0, 1).reshape(2, -1)
            head.relu_()
            return y

    with pytest.raises(UnsupportedOpsError, match=r"relu_.*writes in place.*share"):
        adfify.adfify(View())


def test_functional_dropout_under_each_policy():
    class Drop(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.25, self.training)

    x, model = torch.ones(1000, 100), Drop().eval()
    off = adfify.adfify(model, noise_variance=0.1)(x)
    assert torch.equal(off.variance, torch.full_like(x, 0.1))
    analytic = adfify.adfify(model, noise_variance=0.1, dropout="analytic")(x)
    assert torch.allclose(analytic.variance, torch.full_like(x, (0.1 + 1) / 0.75 - 1))
    torch.manual_seed(0)
    sampled = adfify.adfify(model, noise_variance=0.1, dropout="sampled")(x)
    assert abs((sampled.mean == 0).double().mean() - 0.25) < 4.5 * (0.25 * 0.75 / 1e5) ** 0.5
    with pytest.raises(ValueError, match="dropout='on' is unknown"):
        adfify.adfify(model, dropout="on")


def test_hooks_and_parametrizations_are_named():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(double_output)
    with pytest.raises(ModelError, match=r"'1' \(Linear\): forward hook double_output"):
        adfify.adfify(nn.Sequential(nn.ReLU(), hooked))
    early = nn.Linear(4, 4)
    early.register_forward_pre_hook(double_output)
    with pytest.raises(ModelError, match="forward pre-hook double_output"):
        adfify.adfify(nn.Sequential(early))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="parametrization of weight"):
        adfify.adfify(nn.Sequential(normed))


def double_output(module, args, *output):
    return None


class Exotic(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.CrossMapLRN2d(2))

    def forward(self, x):
        x = x + torch.linalg.svdvals(x)
        return self.inner(torch.renorm(x, 2, 0, 1.0))


def test_every_missing_operation_is_listed_once_with_its_place():
    with pytest.raises(UnsupportedOpsError) as caught:
        adfify.adfify(Exotic())
    text = str(caught.value)
    for op in ("torch.linalg.svdvals", "torch.renorm", "torch.nn.CrossMapLRN2d in 'inner.1'"):
        assert text.count(op) == 1, text
    assert f"{__file__}:" in text
    assert "adfify.register" in text
    assert all(op.location.startswith(__file__) for op in caught.value.missing)
    assert pickle.loads(pickle.dumps(caught.value)).missing == caught.value.missing


def test_a_subclass_is_not_taken_for_its_parent():
    class Scaled(nn.ReLU):
        def forward(self, x):
            return 3 * super().forward(x)

    adf = adfify.adfify(nn.Sequential(nn.Linear(2, 2), Scaled()), noise_variance=0.0)
    x = torch.randn(5, 2)
    assert torch.equal(adf(x).mean, 3 * torch.relu(F.linear(x, *adf.get_submodule("0").parameters())))


def test_control_flow_on_values_is_explained():
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(ModelError, match=rf"{__file__}:\d+.*control flow"):
        adfify.adfify(Branch())


def test_not_a_module():
    with pytest.raises(ModelError, match="was given 'resnet18' of type str"):
        adfify.adfify("resnet18")
    with pytest.raises(ValueError, match=r"noise_variance=-1\.0"):
        adfify.adfify(nn.ReLU(), noise_variance=-1.0)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, x, index, scale=2.0, mask=None):
        y = x * scale + self.embed(index)
        if mask is not None:
            y = y * mask
        return {"sum": y, "parts": (x + 1, [y - x])}


def test_several_inputs_some_certain_and_structured_output():
    model, x, index = TwoInputs(), torch.randn(3, 4), torch.tensor([1, 2, 3])
    adf = adfify.adfify(model, (x, index), noise_variance=0.1)
    out, expected = adf(x, index), model(x, index)
    assert torch.equal(out["sum"].mean, expected["sum"])
    assert torch.allclose(out["sum"].variance, torch.full((3, 4), 0.4))
    assert torch.equal(out["parts"][0].mean, expected["parts"][0])
    assert torch.equal(out["parts"][1][0].mean, expected["parts"][1][0])


def test_uncertain_inputs_given_as_moments_broadcast():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    adf = adfify.adfify(model)
    wide = adf(Moments(x, torch.tensor(0.3)))
    assert torch.allclose(wide.variance, adf(Moments(x, torch.full((5, 3), 0.3))).variance)


def test_the_same_tensor_twice_is_one_random_variable():
    class Twice(nn.Module):
        def forward(self, x):
            return x + x, x - x, x * x

    x = torch.tensor([[1.5]])
    plus, minus, times = adfify.adfify(Twice(), noise_variance=0.1)(x)
    assert torch.allclose(plus.variance, torch.tensor(0.4))
    assert torch.equal(minus.variance, torch.zeros(1, 1))
    assert torch.allclose(times.mean, x * x + 0.1)
    assert torch.allclose(times.variance, 4 * x * x * 0.1 + 2 * torch.tensor(0.01))


def test_min_variance_is_a_floor_and_not_an_addition():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)
    plain, floored = (
        adfify.adfify(model, noise_variance=1e-2)(x),
        adfify.adfify(model, noise_variance=1e-2, min_variance=1e-9)(x),
    )
    assert torch.equal(floored.variance, plain.variance.clamp(min=1e-9))
    quiet = adfify.adfify(model, noise_variance=0.0, min_variance=0.5)(x)
    assert quiet.variance.min() >= 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 4), r"\(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64"),
        (torch.full((2, 3), float("nan")), "6 NaN"),
        (Moments(torch.zeros(2, 3), torch.full((2, 3), -1e-3)), "negative variance: -0.001"),
        (Moments(torch.zeros(2, 3), torch.zeros(2)), r"\(2, 3\).*\(2,\).*broadcastable"),
        (Moments(torch.zeros(2, 3), torch.full((2, 3), float("nan"))), "NaN among its variances"),
        ([1.0, 2.0, 3.0], r"\[1.0, 2.0, 3.0\] of type list"),
    ],
)
def test_bad_input_is_repeated_in_the_error(value, message):
    with pytest.raises(InputError, match=message):
        adfify.adfify(nn.Linear(3, 2))(value)


def test_training_updates_running_statistics_as_the_original_does(model, x):
    adf = adfify.adfify(model.train(), noise_variance=0.0)
    torch.manual_seed(0)
    model.head = nn.Identity()
    model(x)
    adf(x)
    assert torch.allclose(adf.stem[1].running_mean, model.stem[1].running_mean, rtol=1e-12)
    assert torch.allclose(adf.stem[1].running_var, model.stem[1].running_var, rtol=1e-12)
    assert adf.stem[1].num_batches_tracked == 1


def test_a_training_step_through_mean_and_variance(model, x):
    adf = adfify.adfify(model.train(), noise_variance=1e-2)
    mean, variance = adf(x)
    F.gaussian_nll_loss(mean, torch.zeros_like(mean), variance).backward()
    gradients = {name: parameter.grad for name, parameter in adf.named_parameters() if "unused" not in name}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_inspect_reports_the_plan_without_raising():
    plan = adfify.inspect(Exotic())
    assert {op.op for op in plan.missing} == {"torch.linalg.svdvals", "torch.renorm", "torch.nn.CrossMapLRN2d"}
    assert plan.traced.engine == "torch.fx"
    assert "torch.renorm" in str(plan)
    assert "there is no rule for it" in str(plan)
    records = adfify.inspect(Small()).records()
    assert {record["action"] for record in records} == {"input", "convert", "keep", "output"}
    assert next(record for record in records if record["node"] == "head")["rule"] == "adfify.nn.affine.Linear"


def home_made(x, power):
    return x.abs() ** power


class HomeMade(nn.Module):
    def forward(self, x):
        return home_made(x, 2)


class Root(nn.Module):
    def forward(self, x):
        return HomeMade().forward(x) + 1


def test_a_registered_function_and_module_of_the_users_own(x):
    rules = adfify.registry.Rules(adfify.registry.RULES)

    @rules.register(home_made)
    def my_rule(x: Moments, power: int) -> Moments:
        assert power == 2
        return adfify.nn.mul(x, x)

    adf = adfify.adfify(Root(), rules=rules, noise_variance=0.0)
    assert torch.equal(adf(x).mean, x * x + 1)

    @rules.register(HomeMade)
    class ADFHomeMade(adfify.nn.ADFModule, HomeMade):
        def forward(self, x: Moments) -> Moments:
            return Moments(x.mean * 7, x.variance)

    assert torch.equal(adfify.adfify(nn.Sequential(HomeMade()), rules=rules, noise_variance=0.0)(x).mean, x * 7)
    assert adfify.registry.RULES.find(HomeMade) is None


def test_published_style_calls_unpack():
    conv, bn, relu = adfify.nn.Conv2d(3, 4, 3), adfify.nn.BatchNorm2d(4).eval(), adfify.nn.ReLU()
    x, v = torch.randn(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    mean, variance = relu(*bn(*conv(x, v)))
    chained = adfify.nn.Sequential(conv, bn, relu)(x, v)
    assert torch.equal(chained.mean, mean)
    assert mean.shape == variance.shape == (2, 4, 4, 4)


def test_sequential_has_all_of_torchs_ways():
    from collections import OrderedDict

    chain = adfify.nn.Sequential(OrderedDict(a=adfify.nn.ReLU(), b=adfify.nn.Tanh(), c=adfify.nn.Identity()))
    assert type(chain[0:2]) is adfify.nn.Sequential
    chain[1] = adfify.nn.Sigmoid()
    del chain[2]
    chain.append(adfify.nn.LeakyReLU(0.3))
    assert [type(module).__name__ for module in chain] == ["ReLU", "Sigmoid", "LeakyReLU"]
    x, v = torch.randn(4, 3), torch.rand(4, 3)
    assert torch.equal(chain(x, v).variance, chain(Moments(x, v)).variance)


class Holds(nn.Module):
    """A child that keeps a plain tensor and stores what it computes."""

    def __init__(self):
        super().__init__()
        self.constant = torch.full((4, 1), 3.0)
        self.seen = None

    def forward(self, x):
        self.seen = x * 2
        return self.seen + self.constant


def test_a_plain_tensor_attribute_is_found_and_stored_results_leave_no_trace():
    model, x = nn.Sequential(nn.Linear(4, 4), Holds()), torch.randn(4, 4)
    adf = adfify.adfify(model, noise_variance=0.0)
    assert model[1].seen is None
    pickle.dumps(model)
    assert torch.equal(adf(x).mean, model(x))
    assert torch.equal(copy.deepcopy(adf)(x).mean, model(x))
    assert list(adf.state_dict()) == list(model.state_dict())


def test_augmented_assignment_is_seen_through_every_name():
    class Both(nn.Module):
        def forward(self, x, offset=(1, 2), **unused):
            h = x * 2
            outs = [h]
            h += x
            outs.append(h)
            n = x.size(0)
            m = n
            n += offset[1]
            return [*outs, x * m, x * n]

    x = torch.randn(3, 4)
    for got, expected in zip(adfify.adfify(Both(), noise_variance=0.0)(x), Both()(x), strict=True):
        assert torch.equal(got.mean, expected)


def test_an_uncertain_write_into_a_tensor_of_forward_is_made_anew_and_into_a_buffer_that_is_read_is_refused():
    class Writes(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.register_buffer("total", torch.zeros(3))
            self.kind = kind

        def forward(self, x):
            into = self.total if self.kind == "buffer" else torch.zeros(3)
            into.add_(x)
            return into * 2

    with pytest.raises(ModelError, match=r"reads what an earlier call left in 'total'"):
        adfify.adfify(Writes("buffer"))
    adf, x = adfify.adfify(Writes("constant"), noise_variance=0.5), torch.randn(3)
    for _ in range(2):
        mean, variance = adf(x)
        torch.testing.assert_close(mean, 2 * x)
        torch.testing.assert_close(variance, torch.full((3,), 2.0))


def test_a_module_on_certain_and_on_uncertain_tensors_takes_the_certain_one_with_variance_0():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.query = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.linear(x) + self.linear(self.query)

    model, x = Mixed().eval(), torch.randn(2, 3)
    mean, variance = adfify.adfify(model, noise_variance=0.1)(x)
    torch.testing.assert_close(mean, model(x))
    torch.testing.assert_close(variance, 0.1 * model.linear.weight.square().sum(1).expand(2, 3))


def test_random_numbers_star_arguments_and_extra_state_are_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(3)

    class Star(nn.Module):
        def forward(self, *xs):
            return xs[0]

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

    with pytest.raises(UnsupportedOpsError, match=r"torch.rand .*test_conversion.py:\d+\): it draws random numbers"):
        adfify.adfify(Noisy())
    with pytest.raises(ModelError, match=r"uses \*xs"):
        adfify.adfify(Star())
    with pytest.raises(ModelError, match=r"'0' .*extra state"):
        adfify.adfify(nn.Sequential(Extra(2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": adfify.published}, "rules=<module"),
        ({"noise_variance": "a"}, "noise_variance='a'"),
        ({"noise_variance": torch.rand(3)}, "noise_variance=tensor"),
        ({"example_inputs": 3}, "example_inputs=3"),
    ],
)
def test_wrong_options_are_repeated(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        adfify.adfify(nn.Linear(2, 2), **options)


def test_converting_twice_and_a_negative_variance_later_are_refused():
    adf = adfify.adfify(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="ADF network already"):
        adfify.adfify(adf)
    with pytest.raises(ValueError, match=r"noise_variance=-1\.0"):
        adf.noise_variance = -1.0


def test_min_variance_is_a_floor_after_arithmetic_too():
    class Shrink(nn.Module):
        def forward(self, x):
            return x * 0.001

    assert adfify.adfify(Shrink(), min_variance=0.1)(torch.randn(3)).variance.min() == 0.1
