"""Where the uncertainty of a picture's prediction comes from: a map over its pixels, and a bar for each layer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adfify.moments import Attribution
from adfify.network import ADFNetwork
from adfify.paths import write_file
from adfify.prediction import Classifier, Prediction, read_picture
from adfify.preprocessing import needs
from adfify.printable import printable

INPUT, OTHERS, BARS = "pixels, through every layer linearly", "all other layers", 12


@dataclass(frozen=True)
class Explanation:
    """Of the leading class of one picture.

    Attributes:
        prediction: what is explained.
        pixels: ``[C, H, W]`` in [0, 1], as the network sees the picture.
        share: ``[H, W]``, of the logit's variance, what the noise of each pixel adds to it; they sum to 1. By joint
            moments.
        layers: of the logit's variance, what passes linearly, and what every layer's non-linearity adds, largest
            first; they sum to 1. By statistical linearisation at the widths of the one pass.
    """

    prediction: Prediction
    pixels: Tensor
    share: Tensor
    layers: tuple[tuple[str, float], ...]


def explain(network: Classifier, prediction: Prediction, noise_variance: float) -> Explanation:
    """Attribute the variance of the leading class' logit.

    Args:
        network: not a .pt2 program.
        prediction: of a picture that can still be read.
        noise_variance: of every pixel, pixels in [0, 1].

    Raises:
        InputError: a .pt2 program.
        DataError: the picture can't be read.
    """
    picture = read_picture(prediction.path, network.preprocessing).unsqueeze(0)
    index = torch.tensor([[prediction.top[0].index]])
    sampled, linear = (
        network.joint(picture, noise_variance, index, samples=samples, attribution=True).attribution
        for samples in (None, 0)
    )
    assert sampled is not None and linear is not None
    (of_pixels,) = sampled.inputs.values()
    share = of_pixels[0, 0].sum(0)
    pixels = network.preprocessing.pixels(picture)[0]
    return Explanation(prediction, pixels, share / share.sum().clamp(min=1e-30), by_layer(network.adf, linear))


def by_layer(network: Any, attribution: Attribution) -> tuple[tuple[str, float], ...]:
    """Shares of the first output of the first picture, by the module in whose forward the non-linearity stands."""
    assert isinstance(network, ADFNetwork)
    paths = {record["node"]: record["path"] or record["node"] for record in network.plan}
    shares: dict[str, float] = {}
    for name, part in attribution.layers.items():
        path = paths.get(name.split(".")[0], name)
        shares[path] = shares.get(path, 0.0) + float(part[0, 0])
    passed = sum(float(part[0, 0].sum()) for part in attribution.inputs.values())
    total = (passed + sum(shares.values())) or 1.0
    largest = sorted(shares.items(), key=lambda item: -item[1])[:BARS]
    rest = sum(shares.values()) - sum(part for _, part in largest)
    bars = [(INPUT, passed), *largest, *([(OTHERS, rest)] if len(shares) > BARS else [])]
    return tuple((name, part / total) for name, part in bars)


def free_name(folder: Path, picture: Path) -> Path:
    """A name for a picture's figure in a folder, which is made; pictures of the same name get a number."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (folder / f"{picture.stem}{number}.png" for number in chain([""], (f"-{n}" for n in count(2))))
    return next(name for name in names if not name.exists())


def draw(explanation: Explanation, path: Path) -> Path:
    """Write the figure, a PNG: the picture, the same with its map over it, and the bars.

    Raises:
        CheckpointError: matplotlib is not installed.
    """
    figure = needs("matplotlib.figure", "demo").Figure(figsize=(12, 4.2), dpi=130, layout="constrained")
    plain, heat, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    score = explanation.prediction.top[0]
    pixels = explanation.pixels.permute(1, 2, 0).clamp(0, 1).numpy()
    plain.imshow(pixels)
    label = printable(score.label.split(",")[0])  # a $ in it is no formula
    plain.set_title(f"{label}  {score.mean:.2f} ± {score.std:.2g}", fontsize=11, parse_math=False)
    heat.imshow(pixels.mean(2), cmap="gray", alpha=0.45)
    smooth = _smoothed(explanation.share)
    heat.imshow(smooth.numpy(), cmap="inferno", alpha=0.75, vmin=0, vmax=float(smooth.quantile(0.995)))
    heat.set_title("which pixels the uncertainty comes from", fontsize=11)
    for axes in (plain, heat):
        axes.set_axis_off()
    names, shares = zip(*reversed(explanation.layers), strict=True)
    bars.barh(range(len(names)), [100 * share for share in shares], color="#c8373f")
    bars.set_yticks(range(len(names)), map(printable, names), fontsize=8, parse_math=False)
    bars.set_xlabel("% of the variance (statistical linearisation)", fontsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title("which layers it is made in", fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".") or "png")
    write_file(path, drawn.getvalue())
    return path


def _smoothed(share: Tensor) -> Tensor:
    """Averages over 7 x 7 pixels: single ones are noise."""
    padded = torch.nn.functional.avg_pool2d(share[None, None], 7, 1, 3, count_include_pad=False)
    return padded[0, 0].clamp(min=0)
