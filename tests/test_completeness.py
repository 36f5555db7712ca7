"""All of torch.nn has a rule, or a reason for having none."""

import pytest
import torch
from torch import nn

import adfify

CONTAINER = "holds other modules, and is traced through"
LOSS = "a training criterion that few networks return: no rule yet"
CERTAIN = "takes whole numbers, which are certain, and stays as it is"
LAZY = "becomes the module it stands for when it is first called; convert the model after that"
RANDOM = "draws its own regions at random, also in eval mode"
BASE = "an abstract base"

WITHOUT = {
    "Module": BASE,
    "Container": BASE,
    "RNNBase": BASE,
    "RNNCellBase": BASE,
    "Sequential": CONTAINER,
    "ModuleList": CONTAINER,
    "ModuleDict": CONTAINER,
    "ParameterList": CONTAINER,
    "ParameterDict": CONTAINER,
    "DataParallel": "a wrapper, taken off",
    "Embedding": CERTAIN,
    "EmbeddingBag": CERTAIN,
    "FractionalMaxPool2d": RANDOM,
    "FractionalMaxPool3d": RANDOM,
    "CrossMapLRN2d": "Torch7's LocalResponseNorm, kept for old files; use that",
    "AdaptiveLogSoftmaxWithLoss": LOSS,
}

CRITERIA = {
    "CTCLoss", "CosineEmbeddingLoss", "NLLLoss2d", "TripletMarginLoss",
    "TripletMarginWithDistanceLoss", "LinearCrossEntropyLoss",
}  # fmt: skip

MODULES = {name: kind for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}


def reason(name: str) -> str | None:
    if name in CRITERIA:
        return LOSS
    return LAZY if name.startswith("Lazy") else WITHOUT.get(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_of_torch_nn_has_a_rule_or_a_reason(name: str) -> None:
    targets = {target for rule in adfify.supported() for target in rule.targets}
    assert (MODULES[name] in targets) != (reason(name) is not None)


def test_the_list_of_reasons_is_short_and_of_real_modules() -> None:
    assert set(WITHOUT) <= set(MODULES)
    assert len(MODULES) > 150
    assert len(WITHOUT) < 25


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_what_takes_whole_numbers_stays_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[name](10, 4), nn.Linear(4, 2)).eval()
    tokens = torch.tensor([[1, 2], [3, 9]])
    adf = adfify.adfify(model, tokens)
    result = adf(tokens)
    expected = model(tokens)
    got = result.mean if isinstance(result, adfify.Moments) else result
    assert torch.equal(got, expected)
