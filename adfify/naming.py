"""The names of a network's outputs: its own, those of a file, or those of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adfify.checkpoint import Source
from adfify.errors import DataError
from adfify.labels import class_folders
from adfify.prediction import classifier, example_input, no_classifier
from adfify.printable import printable


def classes_of(source: Source) -> int:
    """How many outputs a classifier has, by one pass on a picture of zeros. Raises InputError if it is none."""
    if source.converted:
        return classifier(source).logits(example_input(source), 0.0).mean.shape[-1]
    with torch.inference_mode():
        output = source.model(example_input(source))
    if not (isinstance(output, Tensor) and output.dim() == 2):
        raise no_classifier(output, source.name)
    return output.shape[-1]


def labelled(source: Source, file: Path, names: tuple[str, ...]) -> Source:
    """The same with the names of its outputs, from a file (see :func:`adfify.labels.read_labels`).

    Raises:
        DataError: another number of names than outputs.
    """
    classes = classes_of(source)
    if len(names) != classes:
        raise DataError(
            f"--labels {printable(file)} names {len(names)} classes, and {source.name} has {classes} outputs."
        )
    return replace(source, labels=names)


def named_by_folders(source: Source, pictures: Sequence[Path]) -> tuple[Source, str]:
    """A network without names with those of class folders, by torchvision's ImageFolder's convention; what was done.

    Note [Which output a class folder is] of :mod:`adfify.labels`. Where there are none, the outputs are numbered.
    """
    every = class_folders(pictures[0]) if len(pictures) == 1 and pictures[0].is_dir() else ()
    classes = classes_of(source)
    start = f"the {classes} outputs of {source.name} have no names"
    if len(every) != classes:
        return source, f"{start}, so their numbers are shown; --labels FILE names them."
    taken = f"they are taken to be the class folders of {printable(pictures[0])}, sorted"
    return replace(source, labels=every), f"{start}: {taken} (torchvision's ImageFolder); --labels FILE names others."
