"""Pickles of a few bytes that make gigabytes, or take for ever: refused before they are read; honest ones are not."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adfify.errors import CheckpointError, DataError
from adfify.labels import read_labels
from adfify.weights import classes_in, read_state


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def called(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def shared(depth: int, *, tuples: bool = False) -> bytes:
    """Twice the same of twice the same and so on, every level in one tuple."""
    made = b"K\x01q\x00" if tuples else b"]K\x01aq\x00"
    for level in range(depth):
        inside = b"h" + bytes([level])
        made += (inside + inside + b"\x86q" if tuples else b"](" + inside + inside + b"eq") + bytes([level + 1])
    return b"(" + made + b"t"


def zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (
            ("DATA.pkl", b"\x80\x02" + pickled + b"."),
            ("version", b"3\n"),
            ("byteorder", b"little"),
        ):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def fooled(start: bytes) -> bytes:
    """By its end a zip, whose directory is nowhere."""
    return start + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 5, 5, 99999, 1, 0)


GROWING = {
    "a fraction of a power": called("fractions Fraction", text("1e99999999")),
    "a whole number of a power": called("builtins int", called("decimal Decimal", text("1e99999999"))),
    "bytes of numpy": called("numpy bytes_", number(3 << 30)),
    "an empty number of 2 GB": called("numpy.core.multiarray scalar", called("numpy dtype", text("S2000000000"))),
    "text of shared lists": called("builtins str", shared(34)),
    "a number of shared lists": called("numpy float64", shared(34)),
    "a tensor of shared lists": called("torch Tensor", shared(34)),
    "a key of shared tuples": b"}" + shared(60, tuples=True) + b"K\x01s",
    "a tensor of a number": called("torch Tensor", number(5 << 30)),
    "storage of a number": called("torch.storage UntypedStorage", number(5 << 30)),
    "a tensor by a detour": called(
        "torch._tensor _rebuild_from_type_v2", 2 * b"ctorch\nTensor\n", b"(" + number(5 << 30) + b"t", b"}"
    ),
    "an array of a number": called("numpy ndarray", b"(" + number(3 << 30) + b"t"),
}  # fmt: skip


def bare(pickled: bytes) -> bytes:
    return b"\x80\x02" + pickled + b"."


@pytest.mark.parametrize("form", [zipped, bare])
@pytest.mark.parametrize("name", GROWING)
def test_a_small_pickle_does_not_grow(name: str, form: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(form(GROWING[name]))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        read_state(file)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("start", [b"PK\x03\x04" + bytes(40), b"\x80\x02}."])
def test_what_ends_like_a_zip_is_refused(start: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(fooled(start))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_state(file)


@pytest.mark.parametrize("zipped_format", [True, False])
def test_honest_checkpoints_are_read_in_both_formats(zipped_format: bool, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "losses": [0.5] * 10_000}
    torch.save(content, tmp_path / "run.pth", _use_new_zipfile_serialization=zipped_format)
    state, _ = read_state(tmp_path / "run.pth")
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_a_bias_alone_makes_no_network_of_its_size() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    own = dict(network.state_dict())
    assert classes_in({**own, "1.bias": torch.zeros(10**6, dtype=torch.int8)}, network) is None
    assert classes_in({**own, "1.bias": torch.zeros(7), "1.weight": torch.zeros(7, 3)}, network) == 7


def test_lists_of_labels_end(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(DataError, match="no list of names"):
        read_labels(deep)
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe"):
        read_labels(pipe)
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(DataError, match="10,737,418,240 bytes"):
        read_labels(huge)
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["a", "b"]))
    assert read_labels(names) == ("a", "b")


def test_the_bombs_are_pickles() -> None:
    """Python's own reader takes them, at a depth that it survives."""
    assert pickle.loads(bare(shared(3)))[-1] == [[[[1]] * 2] * 2] * 2
    assert pickle.loads(bare(called("fractions Fraction", text("1e3")))) == 1000
