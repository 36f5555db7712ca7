"""Small classifiers as sources, and pictures for them, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from adfify.checkpoint import Source
from adfify.preprocessing import Preprocessing

LABELS = ("red fox, Vulpes vulpes", "crane", "crane", "tabby, tabby cat")
PREPROCESSING = Preprocessing(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=1.0)


class Classifier(nn.Module):
    """A convolution, a ReLU and a linear layer: ``[N, 3, 16, 16]`` to four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Spectral(nn.Module):
    """What can't be converted: there is no rule for singular values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x).mean(2)


class Segmenter(nn.Module):
    """What can be converted and is no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x)}


def source(model: nn.Module | None = None, labels: tuple[str, ...] | None = LABELS, weights: str = "trained") -> Source:
    """A source of a model with fixed weights; by default of :class:`Classifier`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier() if model is None else model
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1.0)
    return Source("tiny", model.eval(), PREPROCESSING, labels, weights)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """Write a picture of coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(values.to(torch.uint8).numpy()).save(path)
    return path


class ByExport(nn.Module):
    """What torch.fx can't trace: a question about a value."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.shape[1] > 0 else x
