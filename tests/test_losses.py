"""Models that return their loss, under both engines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import ByExport
from torch import Tensor, nn

import adfify
from adfify import Moments

SCALE = 0.3


class Trained(nn.Module):
    """A network and its loss, of 4 numbers for each example."""

    def __init__(self, loss: nn.Module, target: Tensor) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(5, 4), loss
        self.register_buffer("target", target)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.body(x), self.target)


class Weighted(nn.Module):
    """A loss called as a function, by keyword."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(input=x, target=target, weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), reduction="sum")


CLASSES = torch.tensor([1, 0, 3])
VALUES = torch.linspace(0.1, 0.9, 12).reshape(3, 4)
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0]) * torch.ones(3, 1)
LOSSES = [
    (nn.MSELoss(), VALUES),
    (nn.L1Loss(), VALUES),
    (nn.HuberLoss(delta=0.5), VALUES),
    (nn.SmoothL1Loss(reduction="sum"), VALUES),
    (nn.BCEWithLogitsLoss(), VALUES),
    (nn.CrossEntropyLoss(), CLASSES),
    (nn.CrossEntropyLoss(ignore_index=3), CLASSES),
    (Weighted(), CLASSES),
    (nn.CrossEntropyLoss(), VALUES),
    (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
    (nn.CrossEntropyLoss(label_smoothing=0.3, weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), reduction="sum"), VALUES),
    (nn.CrossEntropyLoss(label_smoothing=0.3, ignore_index=3), CLASSES),
    (nn.SoftMarginLoss(), SIGNS),
    (nn.HingeEmbeddingLoss(margin=0.5), SIGNS),
    (nn.MultiLabelSoftMarginLoss(), 0.5 * SIGNS + 0.5),
    (nn.MultiMarginLoss(), CLASSES),
    (nn.MultiMarginLoss(p=2, margin=0.5, reduction="sum"), CLASSES),
    (nn.MultiLabelMarginLoss(), torch.tensor([[0, 2, -1, 1], [3, -1, 0, 0], [1, 0, 2, -1]])),
]


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("loss, target", LOSSES, ids=[type(loss).__name__ for loss, _ in LOSSES])
def test_a_model_that_returns_its_loss(loss: nn.Module, target: Tensor, engine: str) -> None:
    torch.manual_seed(0)
    model = Trained(loss, target).eval()
    x = torch.randn(3, 5)
    adf = adfify.adfify(ByExport(model) if engine == "torch.export" else model, x)
    certain = adf(Moments(x, torch.zeros_like(x)))
    assert torch.equal(certain.mean, model(x))
    assert float(certain.variance) == 0
    # Rows of the weight that are far apart make the predictions nearly independent, as the one pass takes them.
    with torch.no_grad():
        for network in (model, adf.inner if engine == "torch.export" else adf):
            network.body.weight.copy_(torch.eye(4, 5))
    got = adf(Moments(x, torch.full_like(x, SCALE**2)))
    with torch.no_grad():
        drawn = torch.func.vmap(model)(x + SCALE * torch.randn(20_000, 3, 5))
    # 20000 draws tell a mean to 0.7 % of a std, and a std to 0.5 %: six of these, and the softmax' own.
    assert abs(got.mean - drawn.mean()) < 0.06 * drawn.std()
    assert abs(got.std - drawn.std()) < 0.06 * drawn.std()


def test_nll_loss_of_class_probabilities_is_refused_as_torch_does() -> None:
    class Likely(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.nll_loss(x, target)

    x = torch.randn(3, 4)
    with pytest.raises(adfify.errors.AdfifyError, match="class probabilities"):
        adfify.adfify(Likely(), (x, CLASSES))(x, VALUES)


def test_ctc_loss_is_refused_by_name() -> None:
    class Aligned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.ctc_loss(x, torch.ones(3, 2, dtype=torch.long), (5, 5, 5), (2, 2, 2))

    with pytest.raises(adfify.UnsupportedOpsError, match="ctc_loss"):
        adfify.adfify(Aligned())
