"""The main job on an embedded default: a real network, real pictures, one pass and joint moments beside the truth."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adfify import metrics
from adfify.checkpoint import Source
from adfify.errors import DataError
from adfify.moments import Moments
from adfify.paths import write_file
from adfify.prediction import classifier, jointly_ranked, read_picture
from adfify.preprocessing import needs
from adfify.printable import printable
from adfify.sampling import MonteCarlo, monte_carlo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (1e-4, 1e-3, 1e-2)
"""Noise variances of the pixels in [0, 1]: standard deviations of 2.5 to 25 of 255 grey levels."""

BATCH = 8  # larger ones leave a CPU's cache and are slower


@dataclass(frozen=True)
class Level:
    """One noise level: the pass beside the truth.

    Attributes:
        noise_variance: of every pixel, pixels in [0, 1].
        one_pass: moments of the logits by ADF, ``[pictures, classes]``.
        joint_mean: ``[pictures]``, of the top logit, by joint moments.
        joint_std: ``[pictures]``, likewise.
        truth: the same by Monte Carlo on the original network.
        top: ``[pictures]``, the class that is looked at, see :class:`Demo`.
    """

    noise_variance: float
    one_pass: Moments
    joint_mean: Tensor
    joint_std: Tensor
    truth: MonteCarlo
    top: Tensor

    def of_top(self, values: Tensor) -> Tensor:
        """``[pictures]``: what belongs to the top logits, of ``[pictures, classes]``."""
        return values.gather(1, self.top.unsqueeze(1)).squeeze(1)

    @property
    def one_pass_mean(self) -> Tensor:
        """``[pictures]``, of the top logit."""
        return self.of_top(self.one_pass.mean)

    @property
    def one_pass_std(self) -> Tensor:
        """``[pictures]``, of the top logit."""
        return self.of_top(self.one_pass.std)

    @property
    def true_mean(self) -> Tensor:
        """``[pictures]``, of the top logit, by Monte Carlo."""
        return self.of_top(self.truth.mean)

    @property
    def true_std(self) -> Tensor:
        """``[pictures]``, of the top logit, by Monte Carlo."""
        return self.of_top(self.truth.std)

    @property
    def std_ratio(self) -> float:
        """True std over one-pass std of the top logit, median over pictures: 8 says that it is 8 times too small."""
        return _median(self.true_std / self.one_pass_std)

    @property
    def mean_error(self) -> float:
        """Distance of the means of the top logit in true stds, median over pictures."""
        return _median((self.one_pass_mean - self.true_mean).abs() / self.true_std)

    @property
    def joint_ratio(self) -> float:
        """True std over that of joint moments, median over pictures."""
        return _median(self.true_std / self.joint_std)

    @property
    def joint_mean_error(self) -> float:
        """Distance of the means by joint moments in true stds, median over pictures."""
        return _median((self.joint_mean - self.true_mean).abs() / self.true_std)

    @property
    def rank_pictures(self) -> float:
        """Rank correlation over the pictures of one-pass and true std of the top logit; NaN for one picture."""
        return metrics.rank_correlation(self.one_pass_std, self.true_std)

    @property
    def rank_logits(self) -> float:
        """Rank correlation over the logits of a picture of one-pass and true std, median over pictures."""
        pairs = zip(self.one_pass.std, self.truth.std, strict=True)
        return _median(torch.tensor([metrics.rank_correlation(one_pass, true) for one_pass, true in pairs]))


@dataclass(frozen=True)
class Demo:
    """Everything that the demo found out.

    Attributes:
        name: the network.
        weights: where they come from.
        draws: of Monte Carlo, for each picture and level.
        paths: the pictures.
        pixels: ``[pictures, channels, height, width]`` in [0, 1], as the network sees them.
        labels: of each, the class of the largest joint mean at the middle noise level.
        probabilities: ``[pictures]``, of that class by the same joint moments; see :mod:`adfify.ranking`.
        levels: one for each noise variance.
    """

    name: str
    weights: str
    draws: int
    paths: tuple[Path, ...]
    pixels: Tensor
    labels: tuple[str, ...]
    probabilities: Tensor
    levels: tuple[Level, ...]

    @property
    def middle(self) -> Level:
        """The level that is shown where there is room for one."""
        return self.levels[len(self.levels) // 2]

    @property
    def std_error(self) -> float:
        """Relative standard error of a Monte Carlo std, 1 / sqrt(2 (draws - 1)) for Gaussian logits."""
        return 1 / math.sqrt(2 * (self.draws - 1))


def steps(pictures: int, draws: int, levels: int = len(LEVELS)) -> int:
    """How many times :func:`run` calls ``progress`` with 1, or in sum."""
    return levels * pictures * (1 + draws)


def run(
    source: Source,
    paths: Sequence[Path],
    *,
    draws: int = 100,
    noise_variances: Sequence[float] = LEVELS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Demo:
    """Convert a network, predict pictures at several noise levels, and hold it against Monte Carlo on the original.

    The noise of both is Gaussian, independent for every pixel, and added to the normalised picture.

    Args:
        source: the original network.
        paths: at least one picture.
        draws: noisy passes of the original for each picture and level, at least 2.
        noise_variances: of the pixels, pixels in [0, 1].
        seed: of the noise.
        progress: called with the number of :func:`steps` just done.

    Raises:
        DataError: no picture, or one that can't be read.
        InputError: fewer than 2 draws.
    """
    if not paths:
        raise DataError("the demo needs at least one picture.")
    done = progress or (lambda count: None)
    source.model.to(memory_format=torch.channels_last)  # the same numbers, on a CPU in half the time
    network = classifier(source)
    pictures = torch.stack([read_picture(path, source.preprocessing) for path in paths])
    middle = noise_variances[len(noise_variances) // 2]
    by_level: dict[float, list[Level]] = {noise_variance: [] for noise_variance in noise_variances}
    leading = []
    for row in range(len(paths)):  # picture by picture, as the progress goes
        picture = pictures[row : row + 1]
        leading.append(jointly_ranked(network, picture, middle, 1, network.logits(picture, middle)))
        for noise_variance, levels in by_level.items():
            variance = source.preprocessing.variance(noise_variance)
            truth = monte_carlo(
                source.model, picture, variance, draws, seed=seed + row, batch_size=BATCH, progress=done
            )
            one_pass = network.logits(picture, noise_variance)
            index = leading[-1].indices
            joint_mean, joint_std = leading[-1].mean, leading[-1].std
            if noise_variance != middle:  # where the label and its probability do not come from
                joint = network.joint(picture, noise_variance, index.unsqueeze(0))
                joint_mean, joint_std = joint.mean[0], joint.std[0]
            levels.append(Level(noise_variance, one_pass, joint_mean, joint_std, truth, index))
            done(1)
    labels = tuple(network.label(int(ranked.indices)) for ranked in leading)
    probability = torch.cat([ranked.probability for ranked in leading])
    pixels, together = source.preprocessing.pixels(pictures), tuple(map(_together, by_level.values()))
    return Demo(source.name, source.weights, draws, tuple(paths), pixels, labels, probability, together)


def _together(levels: Sequence[Level]) -> Level:
    """One level of several pictures, of which each was alone."""
    one_pass, truth = [level.one_pass for level in levels], [level.truth for level in levels]
    return Level(
        levels[0].noise_variance,
        Moments(torch.cat([x.mean for x in one_pass]), torch.cat([x.variance for x in one_pass])),
        torch.cat([level.joint_mean for level in levels]),
        torch.cat([level.joint_std for level in levels]),
        MonteCarlo(
            torch.cat([x.mean for x in truth]),
            torch.cat([x.variance for x in truth]),
            truth[0].draws,
            torch.cat([x.mean_error for x in truth]),
            torch.cat([x.std_error for x in truth]),
        ),
        torch.cat([level.top for level in levels]),
    )


def _median(values: Tensor) -> float:
    return float(values.quantile(0.5))  # torch's own median takes the lower of two middle values


def record(demo: Demo) -> dict[str, Any]:
    """The results as plain data, for JSON: each level with its medians, and each picture in it."""
    levels = [
        {
            "noise_variance": level.noise_variance,
            "true_std_over_one_pass_std": level.std_ratio,
            "mean_error_in_true_std": level.mean_error,
            "true_std_over_joint_std": level.joint_ratio,
            "joint_mean_error_in_true_std": level.joint_mean_error,
            "rank_correlation_over_pictures": level.rank_pictures,
            "rank_correlation_over_logits": level.rank_logits,
            "pictures": [
                {
                    "path": str(path),
                    "one_pass": {"mean": float(level.one_pass_mean[row]), "std": float(level.one_pass_std[row])},
                    "joint": {"mean": float(level.joint_mean[row]), "std": float(level.joint_std[row])},
                    "monte_carlo": {"mean": float(level.true_mean[row]), "std": float(level.true_std[row])},
                }
                for row, path in enumerate(demo.paths)
            ],
        }
        for level in demo.levels
    ]
    named = zip(demo.paths, demo.labels, demo.probabilities.tolist(), strict=True)
    return {
        "model": demo.name,
        "weights": demo.weights,
        "draws": demo.draws,
        "monte_carlo_std_error": demo.std_error,
        "pictures": [{"path": str(path), "label": label, "probability": share} for path, label, share in named],
        "levels": levels,
    }


_ONE_PASS, _JOINT, _TRUTH, _MUTED = "#c8373f", "#d98a00", "#00708a", "#666666"


def draw(demo: Demo, path: Path) -> Path:
    """Write the figure, a PNG: pictures with their logits, stds against the noise level, and how they rank.

    Raises:
        CheckpointError: matplotlib is not installed.
    """
    # A figure without pyplot needs no display, and leaves the user's backend alone.
    figure = needs("matplotlib.figure", "demo").Figure(figsize=(10, 6.6), dpi=160)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    name, noise = demo.name.partition(":")[2] or demo.name, demo.middle.noise_variance
    title = f"{printable(name)}: a mean and a std for every logit"
    above.text(0.5, 0.92, title, size=15, weight="bold", ha="center", parse_math=False)
    above.text(0.52, 0.02, f"top logit ± std under pixel noise of variance {noise:g}:", size=11, ha="right")
    for place, what, colour in ((0.53, "one pass", _ONE_PASS), (0.62, "joint", _JOINT), (0.68, "Monte Carlo", _TRUTH)):
        above.text(place, 0.02, what, size=11, weight="bold", color=colour)
    grid = {"left": 0.01, "right": 0.99, "bottom": 0.35, "top": 0.8, "wspace": 0.05}
    for row, axes in enumerate(above.subplots(1, len(demo.paths), squeeze=False, gridspec_kw=grid)[0]):
        _picture(axes, demo, row)
    grid = {"left": 0.065, "right": 0.99, "bottom": 0.13, "top": 0.9, "wspace": 0.16}
    against_noise, ranking = below.subplots(1, 2, width_ratios=(1.35, 1), gridspec_kw=grid)
    _against_noise(against_noise, demo)
    _ranking(ranking, demo.middle)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".") or "png")
    write_file(path, drawn.getvalue())
    return path


def _picture(axes: Axes, demo: Demo, row: int) -> None:
    level = demo.middle
    axes.imshow(demo.pixels[row].permute(1, 2, 0).numpy())
    axes.set_axis_off()
    label = printable(demo.labels[row].split(",")[0])  # a $ in it is no formula
    axes.set_title(f"{label}  {float(demo.probabilities[row]):.0%}", fontsize=11, parse_math=False)
    for line, (mean, std, colour) in enumerate(
        (
            (level.one_pass_mean[row], level.one_pass_std[row], _ONE_PASS),
            (level.joint_mean[row], level.joint_std[row], _JOINT),
            (level.true_mean[row], level.true_std[row], _TRUTH),
        )
    ):
        axes.text(
            0.5, -0.05 - 0.14 * line, f"{float(mean):.2f} ± {float(std):.2f}", color=colour, fontsize=12,
            weight="bold", ha="center", va="top", transform=axes.transAxes,
        )  # fmt: skip


def _against_noise(axes: Axes, demo: Demo) -> None:
    noise = [level.noise_variance for level in demo.levels]
    curves = (
        ("Monte Carlo on the original network", _TRUTH, [level.true_std for level in demo.levels]),
        ("joint moments", _JOINT, [level.joint_std for level in demo.levels]),
        ("one pass, units taken as independent", _ONE_PASS, [level.one_pass_std for level in demo.levels]),
    )
    for name, colour, stds in curves:
        axes.plot(noise, torch.stack(stds).numpy(), color=colour, alpha=0.25, linewidth=1)
        axes.plot(noise, [_median(std) for std in stds], color=colour, linewidth=2.5, marker="o", label=name)
    for level in demo.levels:
        ends = [_median(level.one_pass_std), _median(level.true_std)]
        axes.plot([level.noise_variance] * 2, ends, color=_MUTED, linewidth=1, linestyle=":", zorder=0)
        place = (level.noise_variance, math.sqrt(ends[0] * ends[1]))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.annotate(f"{level.std_ratio:.1f}×", place, ha="center", va="center", weight="bold", bbox=box)
    _logarithmic(axes)
    axes.set_xticks(noise)
    axes.set_title(f"Size: the one-pass std is {_off(demo)}", loc="left", fontsize=11)
    axes.set(
        xlabel="noise variance of the pixels, in [0, 1]",
        ylabel="std of the top logit (bold: median)",
    )
    axes.margins(x=0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.22)  # room for the legend
    axes.legend(frameon=False, loc="upper left")


def _ranking(axes: Axes, level: Level) -> None:
    one_pass, true = level.one_pass.std.flatten().numpy(), level.truth.std.flatten().numpy()
    top = "top logits" if math.isnan(level.rank_pictures) else f"top logits: {level.rank_pictures:.2f}"
    axes.scatter(one_pass, true, s=3, color=_MUTED, alpha=0.25, linewidths=0, rasterized=True)
    axes.scatter(level.one_pass_std.numpy(), level.true_std.numpy(), s=35, color="black", label=top)
    _logarithmic(axes)
    axes.set_title(f"Order: rank correlation {level.rank_logits:.2f} of a picture's logits", loc="left", fontsize=11)
    axes.set(xlabel="std of a logit in one pass", ylabel="std by Monte Carlo")
    axes.legend(frameon=False, loc="lower right", handletextpad=0.2)


def _off(demo: Demo) -> str:
    ratios = [level.std_ratio for level in demo.levels]
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    if min(ratios) > 1:
        return f"{low if low == high else f'{low} to {high}'} times too small"
    return f"the true one divided by {low} to {high}"


def _logarithmic(axes: Axes) -> None:
    """Both axes, ticks at 1, 2, 3 and 5 as plain numbers."""
    ticker = needs("matplotlib.ticker", "demo")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
