"""Pictures that are meant to hang or to fill the memory: each is named, and the others are done."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from adfify.errors import DataError
from adfify.prediction import read_batches, read_picture
from adfify.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_size=(3, 96, 96))


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it has these sizes, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def narrow(folder: Path) -> Path:
    Image.new("L", (1, 60000)).save(folder / "narrow.png")
    return folder / "narrow.png"


def wide(folder: Path) -> Path:
    Image.new("RGB", (60000, 2)).save(folder / "wide.png")
    return folder / "wide.png"


def written(name: str, content: bytes):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def device(folder: Path) -> Path:
    (folder / "device.png").symlink_to("/dev/zero")
    return folder / "device.png"


HOSTILE = {
    "narrow": (narrow, "1 x 60000 pixels"),
    "wide": (wide, "60000 x 2 pixels"),
    "a bomb": (written("bomb.png", png(100_000, 100_000)), "bomb|exceeds limit"),
    "a bomb below PIL's limit": (written("deep.png", png(13_000, 13_000, bits=16, colour=0)), "13000 x 13000 pixels"),
    "sizes of 0": (written("none.png", png(0, 0)), "can't be read"),
    "cut short": (written("cut.png", png(64, 64)), "can't be read"),
    "no picture": (written("text.png", b"import os\n" * 100), "not a picture"),
    "empty": (written("empty.png", b""), "not a picture"),
    "a pipe": (pipe, "a pipe, a socket or a device"),
    "a device": (device, "a pipe, a socket or a device"),
    "a folder": (lambda folder: folder, "a folder"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_is_named_and_the_rest_is_done(kind: str, tmp_path: Path) -> None:
    make, named = HOSTILE[kind]
    bad, good = make(tmp_path), tmp_path / "good.png"
    Image.new("RGB", (40, 50), (10, 20, 30)).save(good)
    with pytest.raises(DataError, match=named):
        read_picture(bad, PREPROCESSING)
    ((paths, tensors, unreadable),) = read_batches([bad, good], PREPROCESSING, 8)
    assert paths == [good]
    assert tensors.shape == (1, 3, 96, 96)
    assert [entry.path for entry in unreadable] == [bad]


def test_long_pictures_of_usual_proportions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "panorama.png"
    Image.new("RGB", (4000, 100)).save(file)
    assert read_picture(file, PREPROCESSING).shape == (3, 96, 96)


SQUASHED = Preprocessing(input_size=(3, 96, 96), crop_mode="squash")


def test_what_keeps_no_proportions_takes_narrow_ones(tmp_path: Path) -> None:
    assert read_picture(narrow(tmp_path), SQUASHED).shape == (3, 96, 96)


def test_memory_that_runs_out_is_the_pictures_fault_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 50)).save(tmp_path / "a.png")

    def full(*_: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(Preprocessing, "tensor", full)
    with pytest.raises(DataError, match=r"a\.png can't be read: there is not enough memory"):
        read_picture(tmp_path / "a.png", PREPROCESSING)


READ = """
import resource, sys
from pathlib import Path
from adfify.prediction import read_picture
from adfify.preprocessing import Preprocessing
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_picture(Path(path), Preprocessing())
    except Exception as error:
        assert type(error).__name__ == "DataError", error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_none_takes_two_gigabytes(tmp_path: Path) -> None:
    paths = [make(tmp_path) for kind, (make, _) in HOSTILE.items() if kind not in ("a folder",)]
    command = [sys.executable, "-W", "ignore", "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000
