"""Names of a network's outputs, from a file or from class folders, and which output a class folder is."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from adfify.errors import DataError
from adfify.preprocessing import needs
from adfify.printable import printable

_IMAGENET_CLASSES = 1000
_SHOWN = 10
_LARGEST = 64 << 20  # bytes


def read_labels(file: Path) -> tuple[str, ...]:
    """The names of a network's outputs in a file, in their order.

    Args:
        file: text, one name a line, or a JSON list of names, ``{"0": name}``, or ``{name: 0}`` (torchvision's
            ``class_to_idx``).

    Raises:
        DataError: no such file, no text, no names, or an empty one.
    """
    name = printable(file)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DataError(f"--labels {name} is a pipe or a device; give a regular file.")
        if status.st_size > _LARGEST:
            raise DataError(f"--labels {name} has {status.st_size:,} bytes, and at most {_LARGEST:,} are read.")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise DataError(f"--labels {name} can't be read: {why}.") from error
    names = _of_json(text, name) if text.lstrip()[:1] in ("[", "{") else text.rstrip().splitlines()
    stripped = tuple(label.strip() for label in names)
    if not stripped or "" in stripped:
        which = f"the name of output {stripped.index('')}" if stripped else "the file"
        raise DataError(f"--labels {name}: {which} is empty. It takes one name a line, or JSON.")
    return stripped


def _of_json(text: str, name: str) -> Sequence[str]:
    wanted = DataError(
        f"--labels {name} is no list of names: it takes one name a line, or JSON: a list of names, "
        '{"0": name, "1": name ...}, or {name: 0, name: 1 ...}.'
    )
    try:
        given: Any = json.loads(text)
    except ValueError:
        if not text.lstrip().startswith("{"):  # a line of plain text may start with a bracket
            return text.rstrip().splitlines()
        raise wanted from None
    except RecursionError:
        raise wanted from None
    if isinstance(given, Mapping):
        by_index = _by_index(given)
        if by_index is None or sorted(by_index) != list(range(len(by_index))):
            raise wanted
        given = [by_index[index] for index in range(len(by_index))]
    if not all(isinstance(label, str) for label in given):
        raise wanted
    return list(given)


def _by_index(given: Mapping[str, Any]) -> dict[int, Any] | None:
    if all(isinstance(value, int) and not isinstance(value, bool) for value in given.values()):
        return {index: label for label, index in given.items()}
    try:
        return {int(index): label for index, label in given.items()}
    except ValueError:
        return None


def class_folders(folder: Path) -> tuple[str, ...]:
    """The class folders below one, sorted: torchvision's ImageFolder takes them for outputs 0, 1, 2 ..."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


# Note [Which output a class folder is]
# By the network's own names, where it has some: label, WordNet id or index. A network without names was trained by
# somebody on folders, most likely by torchvision's ImageFolder, to which output i is folder i in sorted order: that is
# taken where there are as many folders as outputs. Sorted, "10" comes before "2": where the two ways disagree, neither
# is right without a word from the user.


def class_indices(
    folders: Collection[str],
    labels: Sequence[str] | None,
    classes: int,
    every: Sequence[str] | None = None,
) -> dict[str, int] | None:
    """Which output of a network each class folder is; None if it has names and no folder is known to it.

    A folder is named by the index of the output, by its label ("tabby_cat" is "tabby cat", and one of several
    synonyms will do), or, for networks with ImageNet's 1000 classes, by WordNet id ("n02123045"). Where the outputs
    have no names and there are as many class folders, they are the outputs in sorted order.

    Args:
        folders: those that hold the pictures.
        labels: names of the outputs, where known.
        classes: how many outputs.
        every: all class folders, if they are more than ``folders``.

    Raises:
        DataError: some folders are known and others are not; the latter are named. Or the outputs have no names, and
            the folders are another number, or numbers themselves in an order that is not theirs.
    """
    names = _names(labels or (), classes)
    found = {folder: names.get(_plain(folder)) for folder in set(folders)}
    unknown = sorted(folder for folder, index in found.items() if index is None)
    named = {folder: index for folder, index in found.items() if index is not None}
    if labels is None:
        ordered = _in_order(every or sorted(set(folders)), set(folders), classes)
        if not unknown and ordered is not None and ordered != named:
            raise DataError(
                f"the class folders are numbers ({_listed(sorted(named))}), and their sorted order, by which "
                "torchvision's ImageFolder numbers classes, is not the order of the numbers. Say which output each is: "
                "--labels FILE, with one folder's name a line, in the order of the outputs."
            )
        if unknown and ordered is not None:
            return ordered
        if len(unknown) == len(found):
            raise DataError(
                f"the network's {classes} outputs have no names, and there are {len(every or found)} class folders "
                f"({_listed(unknown)}), so which is which can't be told. Name the outputs: --labels FILE."
            )
    if len(unknown) == len(found):
        return None
    if unknown:
        raise DataError(
            f"{len(named)} class folders are known to the network, and {len(unknown)} are not: "
            f"{_listed(unknown)}. Name them by the network's labels, "
            "WordNet ids or output indices, or take them out."
        )
    return named


def _in_order(every: Sequence[str], folders: set[str], classes: int) -> dict[str, int] | None:
    if len(every) != classes:
        return None
    return {folder: index for index, folder in enumerate(sorted(every)) if folder in folders}


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(map(printable, names[:_SHOWN]))}{' ...' if len(names) > _SHOWN else ''}"


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _names(labels: Sequence[str], classes: int) -> dict[str, int]:
    """Every unambiguous name of an output."""
    named: dict[str, set[int]] = {}
    for index, label in enumerate(labels):
        for name in {_plain(label), *(_plain(synonym) for synonym in label.split(","))}:
            named.setdefault(name, set()).add(index)
    if classes == _IMAGENET_CLASSES:
        imagenet = needs("timm.data.imagenet_info").ImageNetInfo()
        for index, synset in enumerate(imagenet.label_names()):
            named.setdefault(synset, set()).add(index)
    known = {str(index): index for index in range(classes)}
    return known | {name: next(iter(indices)) for name, indices in named.items() if len(indices) == 1}
