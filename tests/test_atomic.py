"""What is written is written whole: processes that are killed, full disks, two writers to one name."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adfify import atomic
from adfify.atomic import write_whole

SIZE = 1 << 20
# The module alone, by its path: torch would take seconds to import, and is not needed.
WRITER = f"""
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("atomic", {str(Path(atomic.__file__))!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
path, letter, count, limit = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
for _ in range(count):
    atomic.write_whole(path, letter * {SIZE})
"""


def writer(path: Path, letter: str, count: int, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), letter, str(count), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_whole(path: Path, letters: str) -> bool:
    content = path.read_bytes()
    return len(content) == SIZE and content[:1].decode() in letters and content == content[:1] * SIZE


@pytest.mark.skipif(sys.platform == "win32", reason="kills and limits of POSIX")
class TestProcesses:
    def test_thirty_kills(self, tmp_path: Path) -> None:
        """After each, the old file or a new one is there, whole; what is left over goes with the next writer."""
        path = tmp_path / "file"
        write_whole(path, b"a" * SIZE)
        chance = random.Random(0)
        left = 0
        for _ in range(30):
            process = writer(path, "b", 10**6)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
            process.communicate()
            assert is_whole(path, "ab")
            left += len(list(tmp_path.iterdir())) > 1
        assert left > 0, "no kill came in the middle of a write: the test shows nothing"
        write_whole(path, b"c" * SIZE)
        assert list(tmp_path.iterdir()) == [path]
        assert is_whole(path, "c")

    @pytest.mark.parametrize("limit", [1, 4096, SIZE // 3, SIZE // 2, SIZE - 4096, SIZE - 1])
    def test_full_disks(self, tmp_path: Path, limit: int) -> None:
        path = tmp_path / "file"
        write_whole(path, b"a" * SIZE)
        process = writer(path, "b", 1, limit)
        _, error = process.communicate()
        assert process.returncode == 1
        assert "OSError" in error
        assert list(tmp_path.iterdir()) == [path]
        assert is_whole(path, "a")

    def test_two_writers(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        both = [writer(path, letter, 30) for letter in "ab"]
        assert [process.communicate()[1] for process in both] == ["", ""]
        assert [process.returncode for process in both] == [0, 0]
        assert list(tmp_path.iterdir()) == [path]
        assert is_whole(path, "ab")

    def test_the_unfinished_file_of_a_living_writer_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        descriptor, unfinished = atomic._locked(path)
        write_whole(path, b"mine")
        assert unfinished.exists()
        os.close(descriptor)  # as its process would, at its end
        write_whole(path, b"mine")
        assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed_and_modes_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_any_has(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")
    write_whole(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_dangling_link_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    write_whole(link, b"new")
    assert (tmp_path / "target").read_bytes() == b"new"


def test_long_names_and_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError, match="no regular file"):
        write_whole(tmp_path, b"new")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file", b"new")
    assert list(tmp_path.iterdir()) == [path]
