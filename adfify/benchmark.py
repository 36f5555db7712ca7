"""Is the uncertainty worth its price? Quality against the plain softmax on a folder of pictures, and the cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from adfify import metrics
from adfify.checkpoint import Source
from adfify.errors import DataError, InputError
from adfify.labels import class_folders, class_indices
from adfify.moments import Moments
from adfify.naming import classes_of
from adfify.prediction import Classifier, Unreadable, classifier, find_pictures, read_batches
from adfify.preprocessing import needs
from adfify.printable import printable

COST_PICTURES, COST_ROUNDS = 4, 7


@dataclass(frozen=True)
class Quality:
    """How good some predictions are; lower is better but for accuracy and the AUROCs.

    Attributes:
        accuracy: share of pictures whose most probable class is the label.
        nll: mean negative log-likelihood, nats.
        brier: mean Brier score, 0 to 2.
        ece: expected calibration error, 15 bins, 0 to 1.
        auroc_confidence: of telling wrong predictions by 1 - largest probability; None if all are right, or wrong.
        auroc_entropy: the same by predictive entropy.
        auroc_std: the same by the one-pass std of the predicted class' logit; None for the plain softmax.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    auroc_confidence: float | None
    auroc_entropy: float | None
    auroc_std: float | None


@dataclass(frozen=True)
class Row:
    """One way to predict the same pictures.

    Attributes:
        method: ``"plain softmax"`` or ``"ADF"``.
        noise_variance: of the pixels, as ADF was told; None for the plain softmax.
        quality: None without labels.
        mean_confidence: mean of the largest probability.
        mean_entropy: mean predictive entropy, nats.
        mean_std: mean one-pass std of the predicted class' logit; None for the plain softmax.
        agreement: share of pictures whose most probable class is the plain network's.
    """

    method: str
    noise_variance: float | None
    quality: Quality | None
    mean_confidence: float
    mean_entropy: float
    mean_std: float | None
    agreement: float


@dataclass(frozen=True)
class Cost:
    """Time of one pass in units of another's, both taken in turn in one process.

    Attributes:
        median: ratio of the median times.
        minimum: ratio of the shortest times.
        rounds: how often each was run.
    """

    median: float
    minimum: float
    rounds: int


@dataclass(frozen=True)
class Report:
    """What one network did on the pictures.

    Attributes:
        model: its name.
        weights: where they come from.
        pictures: how many were read.
        labelled: whether the folder's class folders gave labels.
        unlabelled: if not, why.
        unreadable: what could not be read.
        rows: the plain softmax, then ADF at each noise variance.
        cost: of the ADF pass in plain forwards.
    """

    model: str
    weights: str
    pictures: int
    labelled: bool
    unlabelled: str
    unreadable: tuple[Unreadable, ...]
    rows: tuple[Row, ...]
    cost: Cost


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder.

    Attributes:
        paths: the files.
        folders: the class folder that each stands in, or None where not all stand in one.
        every: all class folders, sorted, also those that no picture is taken of.
        loose: pictures that stand in no class folder.
    """

    paths: tuple[Path, ...]
    folders: tuple[str, ...] | None
    every: tuple[str, ...] = ()
    loose: tuple[Path, ...] = ()


def open_folder(folder: Path, limit: int | None = None) -> Pictures:
    """The pictures of a folder, and its class folders if all pictures stand in folders of their own.

    Args:
        folder: with pictures, or with one folder of pictures for each class.
        limit: at most so many, evenly spread over the classes.

    Raises:
        DataError: it does not exist, or has no pictures.
    """
    if not folder.is_dir():
        raise DataError(
            f"{printable(folder)} is not a folder; --data takes a folder of pictures, best with one folder a class."
        )
    paths = find_pictures([folder])
    loose = tuple(path for path in paths if path.parent == folder)
    if limit is not None and limit < len(paths):
        paths = [paths[index * len(paths) // limit] for index in range(limit)]
    # Decided by all pictures, not by those that a limit leaves.
    names = None if loose else tuple(path.relative_to(folder).parts[0] for path in paths)
    return Pictures(tuple(paths), names, class_folders(folder), loose)


@dataclass
class _Scores:
    """What has to be kept of each picture, batch by batch; ``correct`` and the losses only with labels."""

    confidence: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    std: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    log_loss: list[Tensor] = field(default_factory=list)
    brier: list[Tensor] = field(default_factory=list)

    def add(self, logits: Moments, labels: Tensor | None) -> None:
        probabilities = metrics.expected_probabilities(logits)
        confidence, predicted = probabilities.max(-1)
        self.confidence.append(confidence)
        self.predicted.append(predicted)
        self.entropy.append(metrics.entropy(probabilities))
        self.std.append(logits.std.gather(-1, predicted.unsqueeze(-1)).squeeze(-1))
        if labels is not None:
            self.correct.append(predicted == labels)
            self.log_loss.append(metrics.log_loss(probabilities, labels))
            self.brier.append(metrics.brier(probabilities, labels))

    def row(self, noise_variance: float | None, plain_predicted: Tensor) -> Row:
        agreement = torch.cat(self.predicted) == plain_predicted
        return Row(
            method="plain softmax" if noise_variance is None else "ADF",
            noise_variance=noise_variance,
            quality=self._quality(noise_variance is None) if self.correct else None,
            mean_confidence=float(torch.cat(self.confidence).mean()),
            mean_entropy=float(torch.cat(self.entropy).mean()),
            mean_std=None if noise_variance is None else float(torch.cat(self.std).mean()),
            agreement=float(agreement.double().mean()),
        )

    def _quality(self, plain: bool) -> Quality:
        correct, confidence = torch.cat(self.correct), torch.cat(self.confidence)
        return Quality(
            accuracy=float(correct.double().mean()),
            nll=float(torch.cat(self.log_loss).mean()),
            brier=float(torch.cat(self.brier).mean()),
            ece=metrics.calibration_error(confidence, correct),
            auroc_confidence=metrics.error_auroc(-confidence, correct),
            auroc_entropy=metrics.error_auroc(torch.cat(self.entropy), correct),
            auroc_std=None if plain else metrics.error_auroc(torch.cat(self.std), correct),
        )


def evaluate(
    source: Source,
    data: Pictures,
    noise_variances: Sequence[float],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Predict all pictures by the plain network and by ADF, the pictures as they are: no noise is added to them.

    Args:
        source: the original network.
        data: see :func:`open_folder`.
        noise_variances: of the pixels (in [0, 1]), which ADF is told.
        batch_size: pictures in one pass.
        progress: called with the number of pictures just done.

    Raises:
        InputError: a converted program (there is nothing to compare it with), or no classifier.
        DataError: not one picture could be read, or class folders that the network does not know.
    """
    if source.converted:
        raise InputError(f"{source.name} is converted already; give the original network, to be compared with.")
    network = classifier(source)
    label_of, unlabelled = _labels(data, source.labels, classes_of(source))
    if label_of is not None:
        needs("torchmetrics.functional.classification", "benchmark")  # not found out at the end
    done = progress or (lambda count: None)
    scores = {noise: _Scores() for noise in (None, *noise_variances)}
    unreadable: list[Unreadable] = []
    first = torch.empty(0)
    for good, pictures, bad in read_batches(data.paths, network.preprocessing, batch_size):
        unreadable += bad
        if good:
            first = first if len(first) else pictures[:COST_PICTURES]
            labels = None if label_of is None else torch.tensor([label_of[path] for path in good])
            scores[None].add(_plain_logits(source, pictures), labels)
            for noise in noise_variances:
                scores[noise].add(network.logits(pictures, noise), labels)
        for _ in (*good, *bad):
            done(1)
    if not len(first):
        raise DataError(f"not one of the {len(data.paths)} pictures can be read; the first: {unreadable[0].error}")
    predicted = torch.cat(scores[None].predicted)
    rows = tuple(kept.row(noise, predicted) for noise, kept in scores.items())
    cost = _pass_cost(source, network, first, noise_variances[0])
    labelled, names = label_of is not None, (source.name, source.weights)
    return Report(*names, len(predicted), labelled, unlabelled, tuple(unreadable), rows, cost)


def _labels(data: Pictures, names: Sequence[str] | None, classes: int) -> tuple[dict[Path, int] | None, str]:
    """The label of each picture, where its folder says, or why there are none."""
    if data.folders is None:
        beside = f"{len(data.loose)} pictures stand beside the class folders, such as {printable(data.loose[0])}"
        return None, beside if data.every else "there are no class folders"
    indices = class_indices(data.folders, names, classes, data.every)
    if indices is None:
        first = ", ".join(printable(folder) for folder in data.every[:5])
        return None, f"the network knows none of the {len(data.every)} class folders ({first})"
    return {path: indices[folder] for path, folder in zip(data.paths, data.folders, strict=True)}, ""


def _plain_logits(source: Source, pictures: Tensor) -> Moments:
    """The plain network's logits, ``[N, classes]``, at variance 0."""
    with torch.inference_mode():
        logits = source.model(pictures)
    return Moments(logits, torch.zeros_like(logits))


def _pass_cost(source: Source, network: Classifier, pictures: Tensor, noise_variance: float) -> Cost:
    def plain() -> None:
        with torch.inference_mode():
            source.model(pictures)

    return interleaved(plain, lambda: network.logits(pictures, noise_variance), COST_ROUNDS)


def interleaved(base: Callable[[], object], other: Callable[[], object], rounds: int) -> Cost:
    """What ``other`` costs in units of ``base``: run in turn, so that a busy machine slows both; one warm-up each."""
    base()
    other()
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds):
        # Who goes first alternates: a clock that speeds up or slows down favours neither.
        for which in (0, 1) if round_ % 2 else (1, 0):
            start = time.perf_counter()
            (base, other)[which]()
            times[which].append(time.perf_counter() - start)
    return Cost(median(times[1]) / median(times[0]), min(times[1]) / min(times[0]), rounds)
