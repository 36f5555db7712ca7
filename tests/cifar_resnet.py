"""Plain CIFAR ResNets (He et al. 2016) with the published networks' state_dict keys, and the golden files' formula."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text())["cases"]


def u(k: int, shape: tuple[int, ...]) -> Tensor:
    """The pseudo-random numbers of golden/README.md, in [0, 1)."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    z = torch.sin(12.9898 * (i + 1) + 78.233 * (k + 1)) * 43758.5453
    return (z - torch.floor(z)).reshape(shape)


def images(salt: int, count: int) -> Tensor:
    return (u(1000 + salt, (count, 3, 32, 32)) - 0.5) * 4


def _weights_of(key: str, k: int, shape: tuple[int, ...]) -> Tensor:
    if key.endswith("running_var"):
        return 0.5 + u(k, shape)
    if key.endswith(("running_mean", "bias")):
        return (u(k, shape) - 0.5) * 0.2
    if len(shape) == 4:
        return (u(k, shape) - 0.5) * 2 * math.sqrt(3) * math.sqrt(2 / math.prod(shape[1:]))
    if len(shape) == 2:
        return (u(k, shape) - 0.5) * 2 / math.sqrt(shape[1])
    return 0.5 + u(k, shape)


def fill(network: nn.Module, salt: int) -> nn.Module:
    """Weights and statistics by the formula; in float64 and evaluation mode. The network may be on the meta device."""
    network.double().eval()
    state = {}
    for k, (key, tensor) in enumerate(network.state_dict().items()):
        counter = key.endswith("num_batches_tracked")
        state[key] = torch.tensor(0) if counter else _weights_of(key, k + salt, tuple(tensor.shape))
    network.load_state_dict(state, assign=True)
    return network


class _Block(nn.Module):
    def __init__(self, sizes: tuple[int, ...], strides: tuple[int, ...], planes: tuple[int, ...], p: float) -> None:
        super().__init__()
        self.depth = len(sizes)
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            conv = nn.Conv2d(planes[i], planes[i + 1], size, stride, size // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(planes[i + 1]))
        self.shortcut = nn.Sequential()
        if max(strides) != 1 or planes[0] != planes[-1]:
            conv = nn.Conv2d(planes[0], planes[-1], 1, max(strides), bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes[-1]))
        self.dropout = nn.Dropout2d(p)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = self.dropout(F.relu(out)) if self.dropout.p else F.relu(out)
        out += self.shortcut(x)
        return self.dropout(F.relu(out)) if self.dropout.p else F.relu(out)


def _basic(in_planes: int, planes: int, stride: int, p: float) -> _Block:
    return _Block((3, 3), (stride, 1), (in_planes, planes, planes), p)


def _bottleneck(in_planes: int, planes: int, stride: int, p: float) -> _Block:
    return _Block((1, 3, 1), (1, stride, 1), (in_planes, planes, planes, 4 * planes), p)


DEPTHS = {
    18: (_basic, 1, (2, 2, 2, 2)),
    34: (_basic, 1, (3, 4, 6, 3)),
    50: (_bottleneck, 4, (3, 4, 6, 3)),
    101: (_bottleneck, 4, (3, 4, 23, 3)),
    152: (_bottleneck, 4, (3, 8, 36, 3)),
}


class CifarResNet(nn.Module):
    """``[N, 3, 32, 32]`` to ``[N, num_classes]``; with p > 0 channels are dropped after every ReLU."""

    def __init__(self, depth: int = 18, num_classes: int = 10, p: float = 0.0) -> None:
        super().__init__()
        block, expansion, counts = DEPTHS[depth]
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_planes = 64
        for stage, count in enumerate(counts):
            layers = []
            for i in range(count):
                layers.append(block(in_planes, 64 * 2**stage, 2 if stage and i == 0 else 1, p))
                in_planes = 64 * 2**stage * expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(in_planes, num_classes)
        self.dropout = nn.Dropout2d(p)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.dropout.p:
            out = self.dropout(out)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.avg_pool2d(out, 4)
        return self.linear(out.view(out.size(0), -1))
