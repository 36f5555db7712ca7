"""Joint moments: held against Monte Carlo on the original network, and against what is known exactly."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adfify
from adfify import Moments
from adfify.adjoint import PROBES
from adfify.errors import InputError
from adfify.noisy import Draws, Original

DRAWS = 20_000


class Residual(nn.Module):
    """Convolutions, batch norm, in-place operations, overlapping maxima, a skip connection and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = F.relu(self.body(x), inplace=True)
        y += x
        return self.head(self.drop(F.silu(y).mean((2, 3))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.unflatten(1, (4, 4)))).mean(1))


def scrambled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5) if tensor.dim() > 1 else nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


NETWORKS = {
    "residual": (Residual, (2, 1, 8, 8), 0.05),
    "attention": (Attention, (2, 16), 0.05),
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6), nn.Sigmoid()), (2, 16), 0.3),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    make, shape, variance = NETWORKS[request.param]
    model = scrambled(make())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model, adfify.adfify(model, noise_variance=variance), x, variance


@pytest.fixture(scope="module")
def residual():
    model = scrambled(Residual())
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, adfify.adfify(model, noise_variance=0.05), x


def drawn(model: nn.Module, x: Tensor, variance: float | Tensor, draws: int = DRAWS) -> Tensor:
    """``[draws, N, M]``: outputs at noisy inputs."""
    noise = torch.randn((draws, *x.shape), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return model((x + torch.as_tensor(variance).sqrt() * noise).flatten(0, 1)).unflatten(0, (draws, -1)).double()


def test_moments_agree_with_monte_carlo(case):
    model, adf, x, variance = case
    joint, truth = adf.joint(x, outputs="all"), drawn(model, x, variance)
    std = truth.std(0)
    # Monte Carlo's own error, and what the joint moments say of theirs.
    assert ((joint.std - std).abs() <= 4 * (2 * std / math.sqrt(2 * DRAWS) + joint.std_error)).all()
    assert (joint.std / std - 1).abs().median() <= 0.03
    assert ((joint.mean - truth.mean(0)).abs() <= 4 * (joint.mean_error + std / math.sqrt(DRAWS))).all()
    centred = truth - truth.mean(0)
    covariance = torch.einsum("dni,dnj->nij", centred, centred) / (DRAWS - 1)
    assert ((joint.covariance - covariance).norm(dim=(1, 2)) <= 0.1 * covariance.norm(dim=(1, 2))).all()
    assert (torch.linalg.eigvalsh(joint.covariance.double()) > -1e-9).all()


def test_the_one_pass_is_far_off_where_joint_is_not(residual):
    model, adf, x = residual
    truth = drawn(model, x, 0.05).std(0)
    assert (adf(x).std / truth - 1).abs().median() > 0.1
    assert (adf.joint(x, outputs="all").std / truth - 1).abs().median() <= 0.03


def test_noise_that_varies_over_the_input(residual):
    model, adf, x = residual
    variance = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    variance[..., :4] = 0
    joint, truth = adf.joint(Moments(x, variance), outputs="all"), drawn(model, x, variance)
    assert (joint.std / truth.std(0) - 1).abs().median() <= 0.03


class TwoBranches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(x), torch.relu(x)
        return torch.cat((a - b, x + x, x), 1)


def test_the_same_operation_on_the_same_tensor_is_one_variable():
    joint = adfify.adfify(TwoBranches(), noise_variance=1.0).joint(torch.zeros(1, 1), outputs="all")
    assert joint.std[0, 0] == 0
    assert joint.std[0, 1] == pytest.approx(2 * float(joint.std[0, 2]), rel=1e-6)
    assert joint.correlation[0, 1, 2] == pytest.approx(1, abs=1e-6)


class Pair(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2, bias=False)
        nn.init.constant_(self.linear.weight, inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.mark.parametrize("inputs", [1, 16, 64])
def test_relus_of_perfectly_correlated_inputs(inputs):
    joint = adfify.adfify(Pair(inputs), noise_variance=1.0).joint(torch.zeros(1, inputs))
    assert joint.covariance[0, 0, 1] == pytest.approx(0.5 - 0.5 / math.pi, rel=0.015)  # 0.34085
    assert joint.mean[0, 0] == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.02)


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.2 * torch.relu(layer(x))
        return x


@pytest.mark.parametrize("depth", [2, 50])
def test_residual_blocks_keep_their_ratio_at_any_depth(depth):
    torch.manual_seed(0)
    model, x = Deep(depth).eval(), torch.randn(2, 16)
    joint = adfify.adfify(model, noise_variance=0.1).joint(x, outputs="all")
    assert (joint.std / drawn(model, x, 0.1).std(0)).median() == pytest.approx(1, abs=0.03)


def test_it_is_the_same_every_time_alone_in_a_batch_and_in_chunks(residual):
    _, adf, x = residual
    whole = adf.joint(x, outputs=2, samples=4)
    again, chunks = adf.joint(x, outputs=2, samples=4), adf.joint(x, outputs=2, samples=4, chunk_size=2)
    alone = adf.joint(x[1:2], outputs=2, samples=4)
    assert torch.equal(whole.covariance, again.covariance)
    torch.testing.assert_close(whole.covariance, chunks.covariance, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole.covariance[1:2], alone.covariance, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole.mean[1:2], alone.mean)
    assert not torch.allclose(whole.covariance, adf.joint(x, outputs=2, samples=4, seed=1).covariance)


def test_each_picture_gets_as_many_samples_as_it_needs_whatever_is_beside_it(residual):
    _, adf, x = residual
    variance = torch.full_like(x, 1e-8)
    variance[1] = 0.5
    together = adf.joint(Moments(x, variance), outputs=2)
    alone = adf.joint(Moments(x[:1], variance[:1]), outputs=2)
    assert together.samples[1] > together.samples[0] == alone.samples[0]
    torch.testing.assert_close(together.covariance[:1], alone.covariance, rtol=1e-4, atol=0)


def test_the_outputs_that_are_asked_for(residual):
    model, adf, x = residual
    top = adf.joint(x)
    assert top.indices.shape == (3, 5)
    assert (top.mean.diff(dim=1) <= 4 * top.mean_error[:, 1:]).all()
    everything = adf.joint(x, outputs="all")
    assert everything.indices.tolist() == [list(range(6))] * 3
    assert adf.joint(x, outputs=100).indices.shape == (3, 6)
    assert adf.joint(x, outputs=[4, 1]).indices.tolist() == [[4, 1]] * 3
    with torch.no_grad():
        torch.testing.assert_close(everything.as_output(everything.mean).shape, model(x).shape)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"outputs": [6]}, r"outputs=\[6\].*0 to 5"),
        ({"outputs": 0}, "outputs=0"),
        ({"outputs": "some"}, "outputs='some'"),
        ({"method": "exact"}, "method='exact'.*'adjoint'"),
        ({"samples": -1}, "samples=-1"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"output": "aux"}, "output='aux'"),
        ({"method": "sketch", "attribution": True}, "attribution"),
    ],
)
def test_what_can_t_be_asked_for_is_said(residual, arguments, said):
    with pytest.raises(InputError, match=said):
        residual[1].joint(residual[2], **arguments)


def test_inputs_that_the_network_can_t_take(residual):
    with pytest.raises(InputError, match="can't be evaluated"):
        residual[1].joint(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="NaN"):
        residual[1].joint(torch.full((1, 1, 8, 8), torch.nan))
    with pytest.raises(InputError, match="takes 1"):
        residual[1].joint(residual[2], residual[2])
    with pytest.raises(InputError, match="batch"):
        residual[1].joint(torch.tensor(1.0))


def test_statistics_of_the_batch_are_refused():
    adf = adfify.adfify(Residual().train())
    with pytest.raises(InputError, match=r"stem\.1.*eval"):
        adf.joint(torch.zeros(2, 1, 8, 8))


def test_certain_inputs_have_certain_outputs(residual):
    model, adf, x = residual
    joint = adf.joint(Moments(x, torch.zeros_like(x)), outputs="all")
    with torch.no_grad():
        torch.testing.assert_close(joint.mean, model(x), rtol=1e-5, atol=1e-5)
    assert not joint.covariance.any()
    assert not joint.correlation.any()


@pytest.mark.parametrize("scale", [1e-13, 1e13])
def test_outputs_that_vary_by_next_to_nothing_or_by_very_much(scale):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 4)
    adf = adfify.adfify(model, noise_variance=0.1)
    expected = adf.joint(x, samples=4)
    nn.init.constant_(adf.get_parameter("2.bias"), 0.0)
    with torch.no_grad():
        adf.get_parameter("2.weight").mul_(scale)
    scaled = adf.joint(x, samples=4, outputs=expected.indices)
    torch.testing.assert_close(scaled.std / scale, expected.std, rtol=1e-2, atol=0)
    assert scaled.std_error.isfinite().all()


class Several(nn.Module):
    def forward(self, x: Tensor, index: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": torch.tanh(x) + y, "product": x[:, index[0]] * y}


def test_several_inputs_and_outputs():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    index = torch.tensor([[2, 0, 1], [2, 0, 1]])
    adf = adfify.adfify(Several(), (x, index, y), noise_variance=0.01)
    joint = adf.joint(x, index, y, output="product", outputs="all", attribution=True)
    expected = 0.01 * (y.square() + x[:, [2, 0, 1]].square()) + 1e-4
    torch.testing.assert_close(joint.variance, expected, rtol=0.05, atol=0)
    assert set(joint.attribution.inputs) == {"x", "y"}
    with pytest.raises(InputError, match=r"'product', 'sum'|'sum', 'product'"):
        adf.joint(x, index, y)


class Branch(nn.Module):
    """What torch.fx can't trace and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x if x.shape[1] > 4 else x.flip(1))
        y = y.relu_()
        y[:, 0] = y[:, 1] * 2
        return y.sigmoid()


def test_networks_traced_by_torch_export():
    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(3, 8)
    plan = adfify.inspect(model, x)
    assert plan.traced.engine == "torch.export"
    joint = adfify.adfify(model, x, noise_variance=0.1).joint(x, outputs="all")
    assert (joint.std / drawn(model, x, 0.1).std(0) - 1).abs().nanmedian() <= 0.03  # one unit is never on


def test_copies_pickles_and_loaded_weights(residual):
    model, adf, x = residual
    expected = adf.joint(x, outputs=2, samples=2)
    for other in (copy.deepcopy(adf), pickle.loads(pickle.dumps(adf)), adfify.adfify(model, noise_variance=0.05)):
        torch.testing.assert_close(other.joint(x, outputs=2, samples=2).covariance, expected.covariance)
    other = adfify.adfify(scrambled(Residual()), noise_variance=0.05)
    other.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert not torch.allclose(other.joint(x, outputs=2, samples=2).covariance, expected.covariance)


def test_the_original_that_it_runs_is_the_original(case):
    model, adf, x, _ = case
    with torch.no_grad():
        torch.testing.assert_close(Original(adf).run(x), model(x), rtol=0, atol=0)


def test_precision_layout_autocast_compile_and_frozen_weights(residual):
    _, adf, x = residual
    expected = adf.joint(x, outputs=2, samples=2)
    last = adf.joint(x.contiguous(memory_format=torch.channels_last), outputs=2, samples=2)
    torch.testing.assert_close(last.covariance, expected.covariance, rtol=1e-4, atol=1e-6)
    double = copy.deepcopy(adf).double().joint(x.double(), outputs=2, samples=2)
    assert double.covariance.dtype == torch.float64
    torch.testing.assert_close(double.covariance.float(), expected.covariance, rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rough = adf.joint(x, outputs=2, samples=2)
    torch.testing.assert_close(rough.std.float(), expected.std, rtol=0.15, atol=0)  # bfloat16 has 8 bits
    with torch.inference_mode():
        torch.testing.assert_close(adf.joint(x, outputs=2, samples=2).covariance, expected.covariance)
    frozen = copy.deepcopy(adf).requires_grad_(False)
    torch.testing.assert_close(frozen.joint(x, outputs=2, samples=2).covariance, expected.covariance)
    compiled = torch.compile(adf, backend="eager")
    torch.testing.assert_close(compiled.joint(x, outputs=2, samples=2).covariance, expected.covariance)
    assert all(parameter.grad is None for parameter in adf.parameters())


# Attribution


@pytest.mark.parametrize("samples", [None, 4, 0])
def test_the_parts_of_an_attribution_sum_to_the_whole(residual, samples):
    _, adf, x = residual
    joint = adf.joint(x, attribution=True, samples=samples, outputs=3)
    parts = joint.attribution
    assert parts.inputs["x"].shape == (3, 3, 1, 8, 8)
    total = parts.inputs["x"].flatten(2).sum(2) + sum(parts.layers.values(), torch.zeros(3, 3))
    torch.testing.assert_close(total, joint.variance, rtol=1e-4, atol=1e-7)
    assert bool(parts.layers) == (samples == 0)


def test_pixels_that_are_certain_have_no_part(residual):
    _, adf, x = residual
    variance = torch.full_like(x, 0.05)
    variance[..., :4] = 0
    parts = adf.joint(Moments(x, variance), attribution=True).attribution.inputs["x"]
    assert not parts[..., :4].any()
    assert parts[..., 4:].any()


# Dropout


def test_dropout_of_the_model_and_noise_of_the_data_come_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(2, 16)
    adf = adfify.adfify(model, noise_variance=0.2, dropout="analytic")
    joint = adf.joint(x, outputs="all", attribution=True)
    torch.manual_seed(1)
    with torch.no_grad():
        truth = torch.stack([model.train()(x + 0.2**0.5 * torch.randn_like(x)) for _ in range(DRAWS)])
    assert (joint.std / truth.std(0) - 1).abs().max() <= 0.06
    data = adfify.adfify(model.eval(), noise_variance=0.2).joint(x, outputs="all")
    model_alone = adf.joint(Moments(x, torch.zeros_like(x)), outputs="all")
    torch.testing.assert_close(joint.data_covariance + joint.model_covariance, joint.covariance)
    # Each alone is smaller than its part of the whole: a mask also passes or stops the noise.
    assert (joint.data_covariance.diagonal(dim1=1, dim2=2) >= 0.95 * data.variance).all()
    assert (joint.model_covariance.diagonal(dim1=1, dim2=2) >= 0.95 * model_alone.variance).all()
    assert not model_alone.data_covariance.any()
    (mask,) = joint.attribution.masks.values()
    assert mask.shape == (2, 4, 64)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout2d(0.3), (8,)), (nn.AlphaDropout(0.3), (8, 4, 4)), (nn.Dropout(0.3), (8, 4, 4))]
)
def test_every_kind_of_dropout_has_its_masks(layer, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), layer, nn.Flatten(), nn.Linear(128, 3))
    x = torch.randn(2, 1, 4, 4)
    joint = adfify.adfify(model, noise_variance=0.0, dropout="analytic").joint(x, outputs="all", attribution=True)
    (mask,) = joint.attribution.masks.values()
    assert mask.shape[2:].numel() == torch.Size(shape).numel()
    torch.manual_seed(1)
    with torch.no_grad():
        truth = torch.stack([model.train()(x) for _ in range(DRAWS)])
    assert (joint.std / truth.std(0) - 1).abs().max() <= 0.05  # the output is linear in the masks


def test_dropout_that_is_off_stays_off_whatever_the_flag():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    adf = adfify.adfify(model.train(), noise_variance=0.1)
    joint = adf.joint(torch.zeros(1, 4), outputs="all")
    torch.testing.assert_close(joint.variance, 0.1 * model[0].weight.square().sum(1)[None], rtol=1e-4, atol=0)
    assert not joint.model_covariance.any()


# Statistical linearisation, sketch, and Monte Carlo with a control


def test_linearisation_is_exact_for_a_linear_network_and_good_for_a_smooth_one():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval(), torch.randn(2, 16)
    joint = adfify.adfify(model, noise_variance=0.1).joint(x, outputs="all", samples=0)
    weight = (model[1].weight @ model[0].weight).detach()
    torch.testing.assert_close(joint.covariance[1], 0.1 * weight @ weight.T)
    wide = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 4)).eval()
    joint = adfify.adfify(wide, noise_variance=0.3).joint(x, outputs="all", samples=0)
    assert (joint.std / drawn(wide, x, 0.3).std(0) - 1).abs().max() <= 0.1


def test_residuals_of_operations_that_are_not_elementwise(case):
    model, adf, x, variance = case
    joint = adf.joint(x, outputs="all", samples=0, attribution=True)
    ratio = joint.std / drawn(model, x, variance).std(0)
    assert 0.6 < ratio.median() < 1.6  # the diagonal's widths: what samples are for
    assert all((part >= 0).all() for part in joint.attribution.layers.values())
    assert PROBES > 1


class Jump(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.hardshrink(x, 0.5))


def test_gradients_are_not_asked_about_jumps():
    torch.manual_seed(0)
    model, x = Jump().eval(), torch.randn(2, 8)
    adf = adfify.adfify(model, noise_variance=0.2)
    joint = adf.joint(x, outputs="all", samples=400)
    assert joint.method == "sketch"
    assert (joint.std / drawn(model, x, 0.2).std(0) - 1).abs().max() <= 0.15
    with pytest.raises(InputError, match="jumps"):
        adf.joint(x, method="adjoint")


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x * y, torch.relu(x + y)), 1)


def test_several_sources_of_noise_are_independent():
    adf = adfify.adfify(Product(), noise_variance=1.0)
    joint = adf.joint(torch.zeros(1, 4), torch.zeros(1, 4), outputs="all")
    assert joint.mean[0, :4].abs().max() <= 0.05
    assert (joint.std[0, :4] - 1).abs().max() <= 0.05
    assert (joint.mean[0, 4:] - math.sqrt(1 / math.pi)).abs().max() <= 0.05


class Square(nn.Module):
    """Wide, so that it passes for a large network, and with a gradient of mean 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40_000, 1, bias=False)
        nn.init.constant_(self.linear.weight, 40_000**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square()


def test_where_gradients_say_nothing_the_values_do_and_the_error_says_so():
    adf = adfify.adfify(Square(), noise_variance=1.0)
    for seed in range(6):
        joint = adf.joint(torch.zeros(1, 40_000), seed=seed)
        assert joint.std_error > 0.02
        assert 0.4 * 2**0.5 <= joint.std <= 2.5 * 2**0.5


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)  # not batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_inputs_that_depend_on_each_other_are_refused():
    x = torch.randn(5, 2, 3)
    with pytest.raises(InputError, match=r"depends on the other inputs.*several other ways, batched=\{'x': 1\} or"):
        adfify.adfify(Mixing().eval(), noise_variance=0.1).joint(x)
    with pytest.raises(InputError, match="depends on the other inputs"):
        adfify.adfify(Recurrent().eval(), noise_variance=0.1).joint(x, batched={"x": 0})


def test_the_axis_that_alone_keeps_inputs_apart_is_taken():
    x = torch.randn(5, 2, 3)
    joint = adfify.adfify(Recurrent().eval(), noise_variance=0.1).joint(x, outputs="all")
    assert joint.as_output(joint.std).shape == (5, 2, 4)


def test_dropout_inside_a_module_that_is_run_as_a_whole_is_off_or_refused():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    x = torch.randn(2, 3, 8)
    adf = adfify.adfify(nn.Sequential(layer).train(), noise_variance=0.1)
    assert torch.equal(adf.joint(x, samples=2).std, adf.joint(x, samples=2).std)
    with pytest.raises(InputError, match="dropout inside"):
        adfify.adfify(nn.Sequential(layer), noise_variance=0.1, dropout="analytic").joint(x)


def test_sampled_masks_leave_torch_s_random_state_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    adf, x = adfify.adfify(model, noise_variance=0.1, dropout="sampled"), torch.randn(1, 1, 8, 8)
    before = torch.get_rng_state()
    first, again = adf.joint(x, outputs="all"), adf.joint(x, outputs="all")
    assert first.method == "sketch"
    assert torch.equal(first.std, again.std)
    assert torch.equal(adf.joint(x, outputs=3).std, adf.joint(x, outputs=3).std)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    with torch.no_grad():
        truth = torch.stack([model.train()(x + 0.1**0.5 * torch.randn_like(x)) for _ in range(4000)]).std(0)
    assert (first.std / truth - 1).abs().median() <= 0.15
    assert ((first.model_variance > 0) & (first.model_variance <= first.variance)).all()
    with pytest.raises(InputError, match="samples=0"):
        adf.joint(x, outputs=3, samples=0)


def test_half_precision_and_controls_in_inference_mode(residual):
    model, adf, x = residual
    half = copy.deepcopy(adf).bfloat16().joint(x.bfloat16(), outputs=2, samples=4)
    torch.testing.assert_close(half.std.float(), adf.joint(x, outputs=half.indices, samples=4).std, rtol=0.2, atol=0)
    expected = adfify.monte_carlo(model, x, 0.05, 10, control=adf)
    with torch.inference_mode():
        torch.testing.assert_close(adfify.monte_carlo(model, x, 0.05, 10, control=adf).variance, expected.variance)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2 + torch.detach(x)


def test_a_value_that_is_detached_varies_all_the_same():
    joint = adfify.adfify(Detached(), noise_variance=1.0).joint(torch.zeros(1, 2))
    torch.testing.assert_close(joint.variance, torch.full((1, 2), 9.0))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear")}


def test_a_map_of_every_pixel_by_sketch():
    model = scrambled(Segmenter())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    joint = adfify.adfify(model, noise_variance=0.1).joint(x, outputs="all")
    assert joint.method == "sketch"
    assert joint.covariance is None
    std = joint.as_output(joint.std)
    assert std.shape == (2, 3, 32, 32)
    truth = drawn(lambda noisy: model(noisy)["out"], x, 0.1, 2000).std(0)
    assert (std / truth - 1).abs().median() <= 0.1
    assert joint.samples.tolist() == [32, 32]
    few = adfify.adfify(model, noise_variance=0.1).joint(x, outputs=list(range(40)))
    assert few.covariance.shape == (2, 40, 40)
    torch.testing.assert_close(few.covariance.diagonal(dim1=1, dim2=2), few.variance)


def test_moderated_variances_are_nearer_than_those_of_the_draws():
    model = scrambled(Segmenter())
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    truth = drawn(lambda noisy: model(noisy)["out"], x, 0.1, 2000).std(0)
    adf, off, alone = adfify.adfify(model, noise_variance=0.1), [], []
    for seed in range(5):
        noise = Draws(seed, range(16)).noise("x", x.shape[1:])
        with torch.no_grad():
            plain = model(x + 0.1**0.5 * noise)["out"].std(0, keepdim=True)
        joint = adf.joint(x, outputs="all", samples=16, seed=seed)
        off.append((joint.as_output(joint.std) / truth - 1).abs().median())
        alone.append((plain / truth - 1).abs().median())
    assert sum(off) < sum(alone)


def test_control_leaves_monte_carlo_unbiased_and_makes_ten_draws_worth_a_hundred(residual):
    model, adf, x = residual
    truth = adfify.monte_carlo(model, x, 0.01, 100_000, batch_size=3000)
    found = [adfify.monte_carlo(model, x, 0.01, 10, control=adf, outputs=list(range(6)), seed=s) for s in range(100)]
    plain = [adfify.monte_carlo(model, x, 0.01, 100, seed=s) for s in range(20)]
    for name in ("mean", "variance"):
        values = torch.stack([getattr(one, name) for one in found]).double()
        expected = getattr(truth, name)
        own_error = truth.mean_error if name == "mean" else 2 * truth.std * truth.std_error
        z = (values.mean(0) - expected) / (values.var(0) / len(found) + own_error.double().square()).sqrt()
        assert z.abs().max() <= 4.5
        spread = torch.stack([getattr(one, name) for one in plain]).double().std(0)
        assert (values.std(0) / spread).median() <= 1
    again = adfify.monte_carlo(model, x, 0.01, 10, control=adf, outputs=list(range(6)), seed=0)
    assert torch.equal(again.covariance, found[0].covariance)


def test_a_control_has_to_be_of_the_same_network(residual):
    model, adf, x = residual
    other = scrambled(Residual())
    nn.init.zeros_(other.head.weight)
    with pytest.raises(InputError, match="another network"):
        adfify.monte_carlo(other, x, 0.05, 10, control=adf)
    with pytest.raises(InputError, match="draws=4"):
        adfify.monte_carlo(model, x, 0.05, 4, control=adf)
