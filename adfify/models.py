"""The CIFAR ResNets of the published code, in its style and with its numerics.

Loquercio, Segu & Scaramuzza, "A General Framework for Uncertainty Estimation in Deep Learning", RA-L 2020; the networks
are those of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with a 3 x 3 stem for images of
32 x 32 pixels. The ``state_dict`` keys are those of the plain networks, so their checkpoints load as they are.

Any other network: ``adfify(model, rules=published.RULES, min_variance=1e-3)``, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from adfify.moments import Moments, as_moments
from adfify.nn import ADFModule, Conv2d, Identity, Linear, Sequential, arithmetic, structural
from adfify.published import AvgPool2d, BatchNorm2d, Dropout, ReLU, keep_variance

__all__ = [
    "BasicBlock", "Bottleneck", "ResNet18ADF", "ResNet18ADFDropout", "ResNet34ADF", "ResNet34ADFDropout", "ResNet50ADF",
    "ResNet50ADFDropout", "ResNet101ADF", "ResNet101ADFDropout", "ResNet152ADF", "ResNet152ADFDropout", "ResNetADF",
    "keep_variance",
]  # fmt: skip

Keep = Callable[[Tensor], Tensor]


def _conv(in_planes: int, planes: int, size: int, keep: Keep, stride: int = 1) -> Conv2d:
    return Conv2d(
        in_planes, planes, kernel_size=size, stride=stride, padding=size // 2, bias=False, keep_variance_fn=keep
    )


def _dropout(p: float | None, keep: Keep) -> nn.Module:
    return Identity() if p is None else Dropout(p, keep_variance_fn=keep)


class _Block(ADFModule):
    """What both residual blocks share: the shortcut, and what follows the sum."""

    expansion: int

    def __init__(self, p: float | None, keep_variance_fn: Keep) -> None:
        # The function is not kept on the block: its layers apply it, and the residual sum is not to be changed.
        super().__init__()
        self.ReLU = ReLU(keep_variance_fn=keep_variance_fn)
        self.dropout = _dropout(p, keep_variance_fn)

    def _make_shortcut(self, in_planes: int, planes: int, stride: int, keep: Keep) -> Sequential:
        if stride == 1 and in_planes == planes:
            return Sequential()
        return Sequential(_conv(in_planes, planes, 1, keep, stride), BatchNorm2d(planes, keep_variance_fn=keep))

    def _joined(self, out: Moments, shortcut: Moments) -> Moments:
        # Variances add: branch and shortcut are taken as independent, and no min_variance is added here.
        return self.dropout(self.ReLU(arithmetic.add(out, shortcut)))  # type: ignore[no-any-return]


class BasicBlock(_Block):
    """Two 3 x 3 convolutions and a shortcut: ``[N, in_planes, H, W]`` to ``[N, planes, H / stride, W / stride]``."""

    expansion = 1

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, *, keep_variance_fn: Keep, p: float | None = None
    ) -> None:
        super().__init__(p, keep_variance_fn)
        self.conv1 = _conv(in_planes, planes, 3, keep_variance_fn, stride)
        self.bn1 = BatchNorm2d(planes, keep_variance_fn=keep_variance_fn)
        self.conv2 = _conv(planes, planes, 3, keep_variance_fn)
        self.bn2 = BatchNorm2d(planes, keep_variance_fn=keep_variance_fn)
        self.shortcut = self._make_shortcut(in_planes, planes, stride, keep_variance_fn)

    def forward(self, input: Moments) -> Moments:
        out = self.dropout(self.ReLU(self.bn1(self.conv1(input))))
        return self._joined(self.bn2(self.conv2(out)), self.shortcut(input))


class Bottleneck(_Block):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut: to ``[N, 4 * planes, H / stride, W / stride]``.

    The published block adds two tuples here, which makes one of four tensors; this one adds means and variances.
    """

    expansion = 4

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, *, keep_variance_fn: Keep, p: float | None = None
    ) -> None:
        super().__init__(p, keep_variance_fn)
        self.conv1 = _conv(in_planes, planes, 1, keep_variance_fn)
        self.bn1 = BatchNorm2d(planes, keep_variance_fn=keep_variance_fn)
        self.conv2 = _conv(planes, planes, 3, keep_variance_fn, stride)
        self.bn2 = BatchNorm2d(planes, keep_variance_fn=keep_variance_fn)
        self.conv3 = _conv(planes, 4 * planes, 1, keep_variance_fn)
        self.bn3 = BatchNorm2d(4 * planes, keep_variance_fn=keep_variance_fn)
        self.shortcut = self._make_shortcut(in_planes, 4 * planes, stride, keep_variance_fn)

    def forward(self, input: Moments) -> Moments:
        out = self.dropout(self.ReLU(self.bn1(self.conv1(input))))
        out = self.dropout(self.ReLU(self.bn2(self.conv2(out))))
        return self._joined(self.bn3(self.conv3(out)), self.shortcut(input))


def _stage(
    block: type[BasicBlock | Bottleneck], in_planes: int, planes: int, blocks: int, stride: int, keep: Keep,
    p: float | None,
) -> Sequential:  # fmt: skip
    first = block(in_planes, planes, stride, keep_variance_fn=keep, p=p)
    rest = (block(planes * block.expansion, planes, keep_variance_fn=keep, p=p) for _ in range(blocks - 1))
    return Sequential(first, *rest)


class ResNetADF(nn.Module):
    """A residual network on 32 x 32 images that carries a mean and a variance.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        num_blocks: blocks of each of the four stages.
        num_classes: outputs.
        noise_variance: variance of every element of an input given as a tensor, in squared units of that tensor.
        min_variance: added to the variance after every layer (not after residual sums and flatten).
        p: drop probability of a channel after every ReLU; None for a network without dropout. As published,
            dropout is sampled in training mode and off in evaluation mode. For Monte Carlo dropout put only the
            :class:`adfify.published.Dropout` modules into training mode.

    Raises:
        ValueError: a variance that is negative or not finite.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        noise_variance: float = 1e-3,
        min_variance: float = 1e-3,
        p: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("noise_variance", noise_variance), ("min_variance", min_variance)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}; a variance is finite and >= 0.")
        self.noise_variance = noise_variance
        keep = partial(keep_variance, min_variance=min_variance)
        self.conv1 = _conv(3, 64, 3, keep)
        self.bn1 = BatchNorm2d(64, keep_variance_fn=keep)
        self.ReLU = ReLU(keep_variance_fn=keep)
        self.dropout = _dropout(p, keep)
        widths = [64, *(planes * block.expansion for planes in (64, 128, 256))]
        stage = partial(_stage, block, keep=keep, p=p)
        self.layer1 = stage(widths[0], 64, num_blocks[0], 1)
        self.layer2 = stage(widths[1], 128, num_blocks[1], 2)
        self.layer3 = stage(widths[2], 256, num_blocks[2], 2)
        self.layer4 = stage(widths[3], 512, num_blocks[3], 2)
        self.AvgPool2d = AvgPool2d(4, keep_variance_fn=keep)
        self.linear = Linear(512 * block.expansion, num_classes, keep_variance_fn=keep)

    def forward(self, x: Tensor | Moments, variance: Tensor | None = None) -> Moments:
        """Logits ``[N, num_classes]`` of images ``[N, 3, 32, 32]``; the result unpacks into mean and variance.

        Args:
            x: images; a plain tensor has ``noise_variance`` everywhere, unless ``variance`` is given.
            variance: of the images, broadcastable to them.
        """
        images = Moments(x, variance) if isinstance(x, Tensor) and variance is not None else x
        out = self.bn1(self.conv1(as_moments(images, self.noise_variance)))
        out = self.dropout(self.ReLU(out))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(structural.flatten(self.AvgPool2d(out), 1))  # type: ignore[no-any-return]


def ResNet18ADF(noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10) -> ResNetADF:
    """18 layers; see :class:`ResNetADF`."""
    return ResNetADF(BasicBlock, (2, 2, 2, 2), num_classes, noise_variance, min_variance)


def ResNet34ADF(noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10) -> ResNetADF:
    """34 layers; see :class:`ResNetADF`."""
    return ResNetADF(BasicBlock, (3, 4, 6, 3), num_classes, noise_variance, min_variance)


def ResNet50ADF(noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10) -> ResNetADF:
    """50 layers; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 4, 6, 3), num_classes, noise_variance, min_variance)


def ResNet101ADF(noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10) -> ResNetADF:
    """101 layers; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 4, 23, 3), num_classes, noise_variance, min_variance)


def ResNet152ADF(noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10) -> ResNetADF:
    """152 layers; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 8, 36, 3), num_classes, noise_variance, min_variance)


def ResNet18ADFDropout(
    p: float = 0.2, noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10
) -> ResNetADF:
    """18 layers with dropout; see :class:`ResNetADF`."""
    return ResNetADF(BasicBlock, (2, 2, 2, 2), num_classes, noise_variance, min_variance, p)


def ResNet34ADFDropout(
    p: float = 0.2, noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10
) -> ResNetADF:
    """34 layers with dropout; see :class:`ResNetADF`."""
    return ResNetADF(BasicBlock, (3, 4, 6, 3), num_classes, noise_variance, min_variance, p)


def ResNet50ADFDropout(
    p: float = 0.2, noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10
) -> ResNetADF:
    """50 layers with dropout; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 4, 6, 3), num_classes, noise_variance, min_variance, p)


def ResNet101ADFDropout(
    p: float = 0.2, noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10
) -> ResNetADF:
    """101 layers with dropout; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 4, 23, 3), num_classes, noise_variance, min_variance, p)


def ResNet152ADFDropout(
    p: float = 0.2, noise_variance: float = 1e-3, min_variance: float = 1e-3, num_classes: int = 10
) -> ResNetADF:
    """152 layers with dropout; see :class:`ResNetADF`."""
    return ResNetADF(Bottleneck, (3, 8, 36, 3), num_classes, noise_variance, min_variance, p)
