"""The published networks: two routes to the same golden numbers, checkpoints, dropout, and the published style."""

import functools
import inspect
import pickle

import pytest
import torch
from cifar_resnet import CifarResNet, fill, golden, images, u
from torch import fx, nn

from adfify import Moments, adfify, models, published
from adfify.nn import Conv2d

CASES = golden("loquercio_resnet18.json")
DEPTHS = (18, 34, 50, 101, 152)
# In the graph of the plain ResNet18: the node whose value is the stage's.
NODES = {
    "conv1": "conv1", "bn1": "bn1", "layer1": "relu_4", "layer2": "relu_8", "layer3": "relu_12", "layer4": "relu_16",
    "AvgPool2d": "avg_pool2d", "linear": "linear",
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def weights(depth: int, salt: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        plain = CifarResNet(depth)
    return fill(plain, salt).state_dict()


def same_weights(depth: int, salt: int, **options) -> tuple[nn.Module, nn.Module]:
    """A plain network and the published one of the same depth with its weights."""
    make = getattr(models, f"ResNet{depth}ADF" + ("Dropout" if "p" in options else ""))
    with torch.device("meta"):  # random weights that are never used take seconds
        plain, ours = CifarResNet(depth, p=options.get("p", 0.0)), make(**options)
    for network in (plain, ours):
        state = {key: value.clone() for key, value in weights(depth, salt).items()}
        network.double().eval().load_state_dict(state, assign=True)
    return plain, ours


def stages_of(net: nn.Module, x: Moments) -> dict[str, Moments]:
    """The published network, step by step, in the style in which its code is written."""
    stages = {"conv1": net.conv1(*x)}
    stages["bn1"] = net.bn1(*stages["conv1"])
    out = net.ReLU(*net.bn1(*net.conv1(*x)))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        out = stages[name] = getattr(net, name)(*out)
    mean, variance = stages["AvgPool2d"] = net.AvgPool2d(*out)
    stages["linear"] = net.linear(mean.flatten(1), variance.flatten(1))
    return stages


class Recorder(fx.Interpreter):
    """Runs a rewritten network and keeps every node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def summary(x: torch.Tensor) -> dict[str, float]:
    return {"mean": x.mean().item(), "std": x.std().item(), "min": x.min().item(), "max": x.max().item()}


def assert_golden(case: dict, logits: Moments, stages: dict[str, Moments]) -> None:
    """To 1e-9 relative, also the smallest elements of a stage, 1e-17, which are pure rounding error.

    Those differ by up to 9e-23 from one processor to the next, whose convolutions add up in another order.
    """
    probabilities = published.add(published.softmax(logits, 1), case["min_variance"])
    for out, prefix in ((logits, ""), (probabilities, "softmax_")):
        for part in ("mean", "variance"):
            expected = torch.tensor(case[prefix + part], dtype=torch.float64)
            torch.testing.assert_close(getattr(out, part), expected, rtol=1e-9, atol=0.0)
    assert set(stages) == set(case["stages"])
    for name, parts in case["stages"].items():
        for part, golden_summary in parts.items():
            expected = dict(golden_summary)
            value = getattr(stages[name], part)
            assert list(value.shape) == expected.pop("shape")
            assert summary(value) == pytest.approx(expected, rel=1e-9, abs=1e-21), (name, part)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['noise_variance']}-{c['min_variance']}-{c['salt']}")
@torch.no_grad()
def test_both_routes_reproduce_the_published_resnet18(case):
    variances = {name: case[name] for name in ("noise_variance", "min_variance")}
    plain, ours = same_weights(18, case["salt"], **variances)
    x = images(case["salt"], case["images"])
    assert_golden(case, ours(x), stages_of(ours, Moments(x, torch.full_like(x, case["noise_variance"]))))

    rewritten = adfify(plain, rules=published.RULES, **variances)
    recorder = Recorder(rewritten)
    recorder.run(x)
    suffix = "_kept" if case["min_variance"] else ""
    assert_golden(case, rewritten(x), {name: recorder.seen[node + suffix] for name, node in NODES.items()})


@pytest.mark.parametrize(
    ("depth", "salt", "noise_variance", "min_variance"),
    [(18, 3, 1e-2, 1e-3), (18, 41, 1e-4, 0.0), (34, 5, 1e-3, 1e-4), (50, 11, 1e-3, 1e-3)],
)
@torch.no_grad()
def test_both_routes_agree(depth, salt, noise_variance, min_variance):
    variances = {"noise_variance": noise_variance, "min_variance": min_variance}
    plain, ours = same_weights(depth, salt, **variances)
    x = images(salt, 1)
    rewritten = adfify(plain, rules=published.RULES, **variances)
    for out, other in ((ours(x), rewritten(x)), (ours(Moments(x, x**2)), rewritten(Moments(x, x**2)))):
        assert out.mean.isfinite().all()
        assert out.variance.isfinite().all()
        torch.testing.assert_close(out.mean, other.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.variance, other.variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("p", [None, 0.2])
def test_checkpoints_of_the_plain_networks_load(depth, p):
    with torch.device("meta"):
        plain = CifarResNet(depth)
        ours = getattr(models, f"ResNet{depth}ADF")() if p is None else getattr(models, f"ResNet{depth}ADFDropout")(p)
    expected = [(key, value.shape) for key, value in plain.state_dict().items()]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == expected


def test_state_dict_round_trip():
    plain, ours = same_weights(18, 0)
    back = CifarResNet(18).double()
    back.load_state_dict(ours.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert list(ours.state_dict())[:7] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]  # fmt: skip
    assert "layer2.0.shortcut.1.running_var" in ours.state_dict()


@torch.no_grad()
def test_means_without_noise_are_those_of_the_plain_network():
    plain, ours = same_weights(50, 11, noise_variance=0.0, min_variance=0.0)
    x = images(11, 1)
    mean, variance = ours(x)
    torch.testing.assert_close(mean, plain(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(variance, torch.zeros_like(variance))


@torch.no_grad()
def test_constructor_arguments_are_used():
    _, ours = same_weights(18, 0, noise_variance=0.5, min_variance=0.25)
    x = images(0, 1)
    stem = ours.conv1(Moments(x, torch.full_like(x, 0.5)))
    weight = ours.conv1.weight
    expected = nn.functional.conv2d(torch.full_like(x, 0.5), weight**2, padding=1) + 0.25
    torch.testing.assert_close(stem.variance, expected)
    torch.testing.assert_close(ours(x).variance, ours(Moments(x, torch.full_like(x, 0.5))).variance)
    assert ours(x).variance.min() > 0.25
    assert models.ResNet18ADFDropout(p=0.7, num_classes=3).layer1[0].dropout.p == 0.7
    assert models.ResNet18ADF(num_classes=3)(x.float()).mean.shape == (1, 3)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_published_signatures_hold(depth):
    plain = inspect.signature(getattr(models, f"ResNet{depth}ADF")).parameters
    dropped = inspect.signature(getattr(models, f"ResNet{depth}ADFDropout")).parameters
    assert {n: p.default for n, p in plain.items()} == {"noise_variance": 1e-3, "min_variance": 1e-3, "num_classes": 10}
    assert list(dropped)[:3] == ["p", "noise_variance", "min_variance"]
    assert dropped["p"].default == 0.2


@pytest.mark.parametrize("name", ["noise_variance", "min_variance"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_impossible_variances_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        models.ResNet18ADF(**{name: value})


@torch.no_grad()
def test_dropout_is_off_in_evaluation_but_its_variance_is_kept():
    x = images(0, 1)
    (_, ours), (_, without) = same_weights(18, 0, p=0.2, min_variance=0.0), same_weights(18, 0, min_variance=0.0)
    assert torch.equal(ours(x).mean, without(x).mean)
    assert torch.equal(ours(x).variance, without(x).variance)
    (_, kept), (_, without) = same_weights(18, 0, p=0.2), same_weights(18, 0)  # as published: added after Dropout too
    assert (kept(x).variance > without(x).variance).all()


@pytest.mark.parametrize(("depth", "training"), [(18, False), (18, True), (50, True)])
@torch.no_grad()
def test_dropout_networks_agree_with_the_rewritten_plain_ones(depth, training):
    plain, ours = same_weights(depth, 11, p=0.3)
    rewritten = adfify(plain, rules=published.RULES, min_variance=1e-3)
    x = images(11, 2)
    results = []
    for network in (ours, rewritten):
        torch.manual_seed(1)
        results.append(network.train(training)(x))
    torch.testing.assert_close(results[0].mean, results[1].mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0].variance, results[1].variance, rtol=1e-12, atol=0)


@torch.no_grad()
def test_monte_carlo_dropout_as_published():
    _, ours = same_weights(18, 0, p=0.2)
    x = images(0, 1)
    for module in ours.modules():
        if type(module).__name__.startswith("Dropout"):
            module.train()
    torch.manual_seed(0)
    first, second = ours(x), ours(x)
    assert not torch.equal(first.mean, second.mean)
    torch.manual_seed(0)
    assert torch.equal(ours(x).mean, first.mean)
    assert first.variance.isfinite().all()


def test_networks_train():
    torch.manual_seed(0)
    network = models.ResNet18ADFDropout().train()
    mean, variance = network(images(0, 2).float())
    (mean.square().sum() + variance.log().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.bn1.num_batches_tracked == 1


def test_keep_variance_is_exported():
    assert models.keep_variance is published.keep_variance
    assert "keep_variance" in models.__all__


def test_networks_can_be_pickled():
    with torch.no_grad():
        network = models.ResNet18ADF(min_variance=0.1).eval()
        copy = pickle.loads(pickle.dumps(network))
        x = images(0, 1).float()
        assert torch.equal(copy(x).variance, network(x).variance)


def test_code_in_the_published_style_runs():
    class Net(nn.Module):
        def __init__(self, min_variance: float) -> None:
            super().__init__()
            self.keep_variance_fn = lambda x: models.keep_variance(x, min_variance=min_variance)
            self.conv1 = Conv2d(3, 4, kernel_size=3, padding=1, bias=False, keep_variance_fn=self.keep_variance_fn)
            self.bn1 = published.BatchNorm2d(4, keep_variance_fn=self.keep_variance_fn)
            self.ReLU = published.ReLU(keep_variance_fn=self.keep_variance_fn)
            self.AvgPool2d = published.AvgPool2d(keep_variance_fn=self.keep_variance_fn)
            self.dropout = published.Dropout(p=0.2, keep_variance_fn=self.keep_variance_fn)
            self.shortcut = models.Sequential()

        def forward(self, mean, variance):
            out = self.dropout(*self.ReLU(*self.bn1(*self.conv1(mean, variance))))
            out = self.AvgPool2d(*self.shortcut(*out), 4)
            return out.mean, out.variance

    network = Net(0.125).double().eval()
    mean, variance = network(u(0, (2, 3, 8, 8)) - 0.5, u(1, (2, 3, 8, 8)))
    assert mean.shape == variance.shape == (2, 4, 2, 2)
    assert variance.min() > 0.125


def test_two_tensors_are_a_mean_and_a_variance():
    network, x = models.ResNet18ADF().eval(), torch.randn(1, 3, 32, 32)
    variance = torch.full_like(x, 0.02)
    assert torch.equal(network(x, variance).variance, network(Moments(x, variance)).variance)
