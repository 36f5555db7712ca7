"""Pictures in, labels with an uncertainty out: finding and reading the files, converting the network, the pass."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfify import metrics, pixels, ranking
from adfify.checkpoint import LoadedProgram, Source, demo_source, open_source
from adfify.conversion import adfify
from adfify.errors import DataError, InputError
from adfify.moments import JointMoments, Moments
from adfify.network import ADFNetwork
from adfify.preprocessing import Preprocessing
from adfify.printable import printable

ONE_PASS = (
    "± is the one-pass standard deviation: units are taken as independent, which on deep networks makes it too small. "
    "At best it ranks, and roughly; it is not a calibrated error bar."
)
"""What has to stand beside every ± of the one pass that is shown to anybody."""

JOINT = (
    "± is the standard deviation that the pixels' noise gives the logit, correlations of units included; "
    "docs/accuracy.md has how far off it may be. It says nothing of how sure the network is without noise. Order and "
    "probability, E[softmax], are by the same moments."
)
"""What stands beside the ± of joint moments."""


@dataclass(frozen=True)
class Classifier:
    """A converted network that takes pictures.

    Attributes:
        name: the architecture, or the file's name.
        weights: where they come from.
        adf: (Tensor | Moments) -> Moments.
        preprocessing: how a picture becomes its input.
        labels: names of its outputs, where known.
    """

    name: str
    weights: str
    adf: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None

    def label(self, index: int) -> str:
        """The name of an output, or its number."""
        known = self.labels is not None and index < len(self.labels)
        return self.labels[index] if known and self.labels else f"class {index}"

    def logits(self, pictures: Tensor, noise_variance: float) -> Moments:
        """Moments of the logits, ``[N, classes]``.

        Args:
            pictures: ``[N, C, H, W]``, normalised.
            noise_variance: of every pixel, pixels in [0, 1].

        Raises:
            InputError: the network is no classifier, or the variance is negative or not finite.
        """
        variance = self.preprocessing.variance(checked_variance(noise_variance)).to(pictures)
        with torch.inference_mode():
            return _classified(self._run(pictures, variance.expand_as(pictures)), self.name)

    @property
    def one_pass_only(self) -> bool:
        """Whether it is a .pt2 program, which holds the one pass, and not the original that joint moments run."""
        return isinstance(self.adf, LoadedProgram)

    def joint(
        self,
        pictures: Tensor,
        noise_variance: float,
        indices: Tensor | str,
        *,
        samples: int | None = None,
        attribution: bool = False,
        method: str = "auto",
    ) -> JointMoments:
        """Joint moments of some logits ``[N, k]`` of each picture, or of ``"all"``; the rest as of :meth:`logits`.

        Raises:
            InputError: it is a .pt2 program.
        """  # fmt: skip
        if not isinstance(self.adf, ADFNetwork):
            raise InputError(
                f"{self.name} is a .pt2 program, which holds the one pass alone; for joint moments, and for an "
                "explanation, give the network that it was made from."
            )
        variance = self.preprocessing.variance(checked_variance(noise_variance)).to(pictures).expand_as(pictures)
        return self.adf.joint(
            Moments(pictures, variance), outputs=indices, samples=samples, attribution=attribution, method=method
        )

    def _run(self, mean: Tensor, variance: Tensor) -> Any:
        size = self.adf.batch_size if isinstance(self.adf, LoadedProgram) else None
        if size is None:
            return self.adf(Moments(mean, variance))
        # A program that was exported for one batch size: the last batch is filled up with its last picture.
        batches = [torch.arange(at, at + size).clamp(max=len(mean) - 1) for at in range(0, len(mean), size)]
        outputs = [_classified(self.adf(Moments(mean[rows], variance[rows])), self.name) for rows in batches]
        means, variances = (torch.cat(part)[: len(mean)] for part in zip(*outputs, strict=True))
        return Moments(means, variances)


@dataclass(frozen=True)
class Score:
    """One class of a picture.

    Attributes:
        index: which output.
        label: its name.
        probability: expected softmax probability under the moments beside it, see :mod:`adfify.ranking`.
        mean: of the logit.
        std: standard deviation of the logit, see :data:`JOINT`, or :data:`ONE_PASS`.
    """

    index: int
    label: str
    probability: float
    mean: float
    std: float


@dataclass(frozen=True)
class Prediction:
    """The leading classes of one picture, the largest mean first."""

    path: Path
    top: tuple[Score, ...]


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be read, and why."""

    path: Path
    error: str


def open_model(
    spec: str,
    *,
    weights: Path | None = None,
    arch: str | None = None,
    num_classes: int | None = None,
    sha256: str | None = None,
    trust: bool = False,
) -> Source:
    """The network of a SPEC of the command line: :func:`open_source`'s, or ``demo`` for the one of adfify[demo]."""
    if spec == "demo" and not Path(spec).exists():
        given = {
            "--weights": weights, "--arch": arch, "--num-classes": num_classes, "--sha256": sha256,
            "--trust": trust or None,
        }  # fmt: skip
        named = [option for option, value in given.items() if value is not None]
        if named:
            raise InputError(f"{', '.join(named)} does not go with demo, which has its own weights and outputs.")
        return demo_source()
    return open_source(spec, weights=weights, arch=arch, num_classes=num_classes, sha256=sha256, trust=trust)


def example_input(source: Source) -> Tensor:
    """A picture of zeros, ``[1, C, H, W]``, of the size that the network takes."""
    return torch.zeros(1, *source.preprocessing.input_size)


def classifier(source: Source) -> Classifier:
    """The converted network of a source; what is converted already stays as it is. Errors of :func:`adfify`."""
    adf = source.model if source.converted else adfify(source.model, example_input(source), share_weights=True)
    return Classifier(source.name, source.weights, adf, source.preprocessing, source.labels)


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The picture files among paths, folders searched recursively, each folder in the order of its names.

    A file that is named itself is taken whatever its suffix, and whether it exists or not: reading it will tell.

    Raises:
        DataError: a folder without pictures, or no paths at all.
    """
    if not paths:
        raise DataError("no pictures were given; name picture files or folders.")
    found: list[Path] = []
    for path in paths:
        inside = sorted(_pictures_below(path)) if path.is_dir() else [path]
        if not inside:
            raise DataError(
                f"the folder {printable(path)} has no pictures in it (files such as .jpg, .png, .webp, .tif)."
            )
        found += inside
    return found


def _pictures_below(folder: Path) -> Iterator[Path]:
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # Links are followed, as torchvision's ImageFolder does; each folder is visited once.
    visited: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        # Hidden files are no pictures: macOS leaves a '._cat.jpg' beside every cat.jpg on foreign disks.
        folders[:] = [name for name in folders if not name.startswith(".") and real not in visited]
        for name in files if real not in visited else ():
            path = Path(here, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and (path.is_file() or path.is_symlink()):
                yield path
        visited.add(real)


def read_picture(path: Path, preprocessing: Preprocessing) -> Tensor:
    """A picture as the network takes it, ``[C, H, W]``, turned upright where its camera says so.

    Raises:
        DataError: it does not exist, is no picture, is cut short or too large; the path is named.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError("it is a folder" if path.is_dir() else "it is a pipe, a socket or a device")
        with Image.open(path) as picture:
            pixels.refuse_huge(picture)
            range_ = pixels.range_of(picture)
            upright = pixels.in_unit_range(ImageOps.exif_transpose(picture), range_)
            upright.load()
    except Exception as error:  # a broken file raises whatever its decoder happens to stumble on
        if isinstance(error, FileNotFoundError):
            why = "there is no such file"
        elif isinstance(error, UnidentifiedImageError):
            why = "it is not a picture that PIL can read"
        else:
            why = str(error) or type(error).__name__
        raise DataError(f"{printable(path)} can't be read: {why}") from error
    try:
        return preprocessing.tensor(upright)
    except (DataError, MemoryError) as error:
        why = str(error) or "there is not enough memory for it"
        raise DataError(f"{printable(path)} can't be read: {why}") from error


def read_batches(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[list[Path], Tensor, list[Unreadable]]]:
    """Pictures in batches: the paths that could be read, their tensor ``[N, C, H, W]``, and the ones that could not."""
    remaining = iter(paths)
    while batch := list(islice(remaining, batch_size)):
        good, tensors, bad = [], [], []
        for path in batch:
            try:
                tensors.append(read_picture(path, preprocessing))
                good.append(path)
            except DataError as error:
                bad.append(Unreadable(path, str(error)))
        yield good, torch.stack(tensors) if tensors else torch.empty(0, *preprocessing.input_size), bad


def predict(
    network: Classifier,
    paths: Sequence[Path],
    noise_variance: float,
    *,
    top: int = 1,
    batch_size: int = 8,
    one_pass: bool = False,
) -> Iterator[Prediction | Unreadable]:
    """Predictions one by one, as their batches are done; what can't be read comes back as :class:`Unreadable`.

    Args:
        network: see :func:`classifier`.
        paths: picture files.
        noise_variance: of every pixel, pixels in [0, 1]; carried through the normalisation.
        top: classes per picture.
        batch_size: pictures in one pass.
        one_pass: fast, and with a std that ranks at best; else joint moments, where the network is no .pt2 program.
    """
    for good, pictures, bad in read_batches(paths, network.preprocessing, batch_size):
        ranking_of_each = _ranked(network, pictures, noise_variance, top, one_pass)
        for path, ranked in zip(good, ranking_of_each, strict=True):
            columns = (ranked.indices, ranked.probability, ranked.mean, ranked.std)
            scores = zip(*(column.tolist() for column in columns), strict=True)
            yield Prediction(path, tuple(Score(i, network.label(i), p, mean, std) for i, p, mean, std in scores))
        yield from bad


def _ranked(
    network: Classifier, pictures: Tensor, noise_variance: float, top: int, one_pass: bool
) -> Iterator[ranking.Ranked]:
    """Of each picture, one by one, as they are done."""
    if not len(pictures):
        return
    logits = network.logits(pictures, noise_variance)
    for row in range(len(pictures)):
        own = Moments(logits.mean[row : row + 1], logits.variance[row : row + 1])
        if one_pass or network.one_pass_only:
            yield ranking.by_one_pass(own, top)
        else:
            yield jointly_ranked(network, pictures[row : row + 1], noise_variance, top, own)


def jointly_ranked(
    network: Classifier, picture: Tensor, noise_variance: float, top: int, one_pass: Moments
) -> ranking.Ranked:
    """The leading classes of one picture ``[1, C, H, W]`` by joint moments.

    See Note [What is shown belongs together].

    Args:
        network: no .pt2 program.
        picture: normalised.
        noise_variance: of every pixel, pixels in [0, 1].
        top: how many.
        one_pass: moments of its logits, ``[1, classes]``, which say how many there are, and of what kind.
    """
    classes = one_pass.mean.shape[-1]
    softmaxed = metrics.are_probabilities(one_pass.mean.double())
    if classes <= max(ranking.FEW, top):
        every = network.joint(picture, noise_variance, torch.arange(classes).unsqueeze(0))
        return ranking.by_joint(every, Moments(torch.empty(0), torch.empty(0)), top, softmaxed=softmaxed)
    rough = network.joint(picture, noise_variance, "all", method="sketch")
    leading = rough.mean.topk(min(top + ranking.SPARE, classes)).indices
    others = torch.ones(classes, dtype=torch.bool).index_fill(0, leading[0], False)
    rest = Moments(rough.mean[0, others], rough.variance[0, others])
    return ranking.by_joint(network.joint(picture, noise_variance, leading), rest, top, softmaxed=softmaxed)


def checked_variance(value: float, name: str = "--noise-variance") -> float:
    """The value of an option, if it can be a variance. Raises InputError."""
    if not 0 <= value < math.inf:
        raise InputError(f"{name} {value}: a variance is finite and >= 0.")
    return value


def _classified(output: Any, name: str) -> Moments:
    if isinstance(output, Moments) and output.mean.dim() == 2:
        return output
    raise no_classifier(output, name)


def no_classifier(output: Any, name: str) -> InputError:
    """What to raise about a network that returns something else than ``[pictures, classes]``."""
    shaped = isinstance(output, (Moments, Tensor))
    given = f"an output of shape {tuple(output.shape)}" if shaped else type(output).__name__
    return InputError(
        f"{name} returned {given}, and this command shows classifiers: one output of shape [pictures, classes]. "
        "From Python, adfify.adfify(model) gives the moments of any output."
    )
