"""Real architectures, random weights: at zero variance the original to 1e-10, else finite and non-negative."""

import pytest
import timm
import torch
import torchvision

import adfify

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "mobilenet_v2",
    "vgg11_bn",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
]
TIMM = [
    "resnet18",
    "resnet50",
    "resnet26d",
    "resnetv2_50",
    "seresnet50",
    "regnety_002",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_lite0",
    "efficientnet_b0",
]
SPECS = [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM]


def build(spec: str) -> torch.nn.Module:
    library, name = spec.split(":")
    if library == "timm":
        model = timm.create_model(name)
    else:
        extra = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    return scramble(model)


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Untrained normalisations are the identity and hide errors: give them statistics and weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.double().eval()


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_architecture(spec):
    torch.manual_seed(0)
    model, x = build(spec), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    adf = adfify.adfify(model, noise_variance=0.0)
    assert list(adf.state_dict()) == list(model.state_dict())
    expected, still = model(x), adf(x)
    assert (still.mean - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert torch.equal(still.variance, torch.zeros_like(expected))
    adf.noise_variance = 1e-3
    noisy = adf(x)
    assert noisy.mean.isfinite().all()
    assert noisy.variance.isfinite().all()
    assert (noisy.variance >= 0).all()
    assert (noisy.variance > 0).any()
