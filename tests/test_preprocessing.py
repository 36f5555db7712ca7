"""Preprocessing is the libraries' own, and the noise goes through it."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from PIL import Image

from adfify.errors import CheckpointError, InputError
from adfify.preprocessing import Preprocessing, needs, torchvision_weights


@pytest.fixture(scope="module")
def picture():
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(60, 90, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(pixels).resize((360, 240))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tf_efficientnet_lite0", "mobilenetv3_small_100"])
def test_timm_is_timms_own(picture, name):
    model = timm.create_model(name)
    preprocessing = Preprocessing.of(model, f"timm:{name}")
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert torch.equal(preprocessing.tensor(picture), own(picture))


def test_timm_tag_decides():
    sizes = {tag: timm.create_model(f"resnet18.{tag}").pretrained_cfg["crop_pct"] for tag in ("a1_in1k", "tv_in1k")}
    for tag, crop_pct in sizes.items():
        model = timm.create_model(f"resnet18.{tag}")
        assert Preprocessing.of(model, f"timm:resnet18.{tag}").crop_pct == crop_pct


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "inception_v3", "vit_b_16"])
def test_torchvision_is_torchvisions_own(picture, name):
    preprocessing = Preprocessing.of(torch.nn.Identity(), f"torchvision:{name}")
    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert torch.equal(preprocessing.tensor(picture), own(picture))
    assert preprocessing.tensor(picture).shape == preprocessing.input_size


def test_torchvision_segmentation_is_not_cropped():
    preprocessing = Preprocessing.of(torch.nn.Identity(), "torchvision:lraspp_mobilenet_v3_large")
    assert preprocessing.input_size == (3, 520, 520)
    assert preprocessing.crop_pct == 1


def test_without_a_model_it_is_imagenets():
    assert Preprocessing.of(torch.nn.Identity(), "mine.pth") == Preprocessing()
    assert torchvision_weights("no_such_net") is None


def test_any_mode_of_picture(picture):
    preprocessing = Preprocessing()
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert preprocessing.tensor(picture.convert(mode)).shape == (3, 224, 224)
    grey = Preprocessing(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,))
    assert grey.tensor(picture).shape == (1, 28, 28)
    with pytest.raises(InputError, match="12 channels"):
        Preprocessing(input_size=(12, 8, 8)).tensor(picture)


def test_noise_goes_through_the_normalisation():
    """The variance of a normalised noisy picture is the variance of its pixels over std squared."""
    preprocessing = Preprocessing(input_size=(3, 64, 64))
    variance = preprocessing.variance(4e-4)
    assert variance.shape == (3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 200, 200, generator=generator) * 4e-4**0.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    noisy = (0.5 + noise - mean) / std
    torch.testing.assert_close(noisy.var((1, 2)), variance.flatten(), rtol=0.02, atol=0)


def test_pixels_come_back():
    preprocessing = Preprocessing(input_size=(3, 8, 8))
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    torch.testing.assert_close(preprocessing.pixels((pixels - mean) / std), pixels)
    assert preprocessing.pixels(torch.full((3, 8, 8), 99.0)).max() == 1


def test_json_there_and_back():
    preprocessing = Preprocessing.of(torch.nn.Identity(), "torchvision:resnet50")
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    with pytest.raises(CheckpointError, match="gamma"):
        Preprocessing.from_json({"gamma": 2.2})


def test_a_missing_extra_is_named():
    with pytest.raises(CheckpointError, match=r"no_such_library.*pip install 'adfify\[models\]'"):
        needs("no_such_library")
