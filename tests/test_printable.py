"""Whatever a file name, a label or a key holds, a terminal shows it and obeys none of it."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import Shell

from adfify import checkpoint, cli, prediction, terminal
from adfify.printable import printable, printable_lines

EVIL = "a\x1b[31m\n[red]\u202e\x9b2J$x_$.png"
SHOWN = r"a\x1b[31m\n[red]\u202e\x9b2J$x_$.png"
FORBIDDEN = "\x1b\x9b\u202e\r\x07\x00"


@pytest.fixture
def adfify() -> Shell:
    return Shell()


@pytest.fixture
def labels(monkeypatch) -> tuple[str, ...]:
    evil = ("[bold]x[/bold]", "b\x1b]0;title\x07", "c\nforged: line", "$d_")
    monkeypatch.setattr(prediction, "open_model", lambda spec, **rest: tiny.source(labels=evil))
    return evil


def assert_harmless(text: str) -> None:
    assert not any(sign in text for sign in FORBIDDEN)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (EVIL, SHOWN),
        ("naïve Straße 猫 \u200d🐈.png", "naïve Straße 猫 \u200d🐈.png"),
        ("a\u2028b\x85c\x7f", r"a\u2028b\x85c\x7f"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        (Path("a\tb"), r"a\tb"),
    ],
)
def test_what_is_no_visible_text_is_escaped(given, shown):
    assert printable(given) == shown
    printable(given).encode()


def test_lines_of_a_message_stay_lines():
    assert printable_lines("one\n  two\x1b") == "one\n  two\\x1b"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_file_names_are_escaped_everywhere(adfify, labels, tmp_path):
    good = tiny.picture(tmp_path / "data" / EVIL)
    (tmp_path / "data" / f"bad{EVIL}").write_text("broken")
    text = adfify("predict", "tiny", tmp_path / "data", tmp_path / f"none{EVIL}", "--top", 4, "--one-pass", code=2)
    assert str(tmp_path / "data" / SHOWN) in text.replace("\n", "")
    assert f"bad{SHOWN} can't be read" in adfify.stderr
    assert f"none{SHOWN} can't be read" in adfify.stderr
    for shown in (text, adfify.stderr):
        assert_harmless(shown)
    assert adfify.stderr.count("\n") == 3  # no line more than were printed
    figures = tmp_path / f"why{EVIL}"
    assert_harmless(adfify("predict", "tiny", good, "--explain", figures))
    assert [path.suffix for path in figures.iterdir()] == [".png"]
    program = tmp_path / f"{EVIL}.pt2"
    assert_harmless(adfify("convert", "tiny", "-o", program))
    adfify("convert", "tiny", "-o", program, code=2)
    assert_harmless(adfify.stderr)
    assert adfify.stderr.count("\n") == 1
    for args in (
        ["predict", "tiny", tmp_path / f"no{EVIL}", "--labels", tmp_path / EVIL],
        ["benchmark", "tiny", "--data", tmp_path / EVIL],
        ["convert", "tiny", "-o", tmp_path / EVIL],
        ["inspect", "tiny", "--no-such" + EVIL],
        [f"command{EVIL}"],
    ):
        adfify(*args, code=2)
        assert_harmless(adfify.stderr)
        assert adfify.stderr.count("\n") == 1


def test_specs_are_escaped(adfify, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in (f"x{EVIL}.pth", f"x{EVIL}.pt2", f"timm:{EVIL}", f"torchvision:{EVIL}", f"{EVIL}:resnet18", EVIL):
        adfify("inspect", spec, *(["--arch", "timm:resnet18"] if ".pth" in spec else []), code=2)
        assert_harmless(adfify.stderr)
        assert adfify.stderr.count("\n") == 1


def test_bytes_that_are_no_text(adfify, labels, tmp_path):
    picture = tmp_path / os.fsdecode(b"\xff\xfe.png")
    tiny.picture(tmp_path / "a.png").rename(picture)
    report = adfify("predict", "tiny", picture, "--one-pass")
    assert r"\udcff\udcfe.png" in report
    assert json.loads(adfify("predict", "tiny", picture, "--one-pass", "--json"))["predictions"][0]["path"] == str(
        picture
    )


def test_labels_are_escaped_and_no_markup(adfify, labels, tmp_path):
    text = adfify("predict", "tiny", tiny.picture(tmp_path / "a.png"), "--top", 4, "--one-pass")
    assert_harmless(text)
    for shown in ("[bold]x[/bold]", r"b\x1b]0;title\x07", r"c\nforged: line", "$d_"):
        assert shown in text
    # JSON has them as they are.
    top = adfify.json("predict", "tiny", tmp_path / "a.png", "--top", 4, "--one-pass")["predictions"][0]["top"]
    assert {score["label"] for score in top} == set(labels)


def test_class_folders_are_escaped(adfify, labels, tmp_path):
    tiny.picture(tmp_path / "data" / "a\x1b[2J\nb" / "a.png")
    adfify("benchmark", "tiny", "--data", tmp_path / "data", "-o", tmp_path / "out")
    assert_harmless(adfify.stderr)
    assert r"a\x1b[2J\nb" in adfify.stderr


def test_keys_are_escaped(adfify, tmp_path):
    torch.save({f"features.{EVIL}": torch.zeros(2)}, tmp_path / "w.pth")
    adfify("inspect", tmp_path / "w.pth", "--arch", "torchvision:squeezenet1_1", code=2)
    assert_harmless(adfify.stderr)
    assert SHOWN in adfify.stderr
    torch.save({EVIL: 3}, tmp_path / "w.pth")
    adfify("inspect", tmp_path / "w.pth", "--arch", "torchvision:squeezenet1_1", code=2)
    assert_harmless(adfify.stderr)


def test_a_figure_takes_labels_as_they_are(tmp_path, labels, monkeypatch):
    from adfify import demo

    paths = [tiny.picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    result = demo.run(tiny.source(labels=("$x_$", "$\\nonsense$", "$a\x1b$", "$_^$")), paths, draws=2)
    assert demo.draw(result, tmp_path / "demo.png").stat().st_size > 10_000


def test_a_terminal_without_the_sign_is_no_traceback(monkeypatch, tmp_path, labels):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with pytest.raises(SystemExit) as ended:
        cli.app(["predict", "tiny", str(tiny.picture(tmp_path / "a.png")), "--one-pass"])
    narrow.flush()
    assert ended.value.code == 0
    assert b"\\xb1" in narrow.buffer.getvalue()


# Progress


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, list[float]]]:
    """The totals of progress bars, and the steps that they were moved."""
    bars: list[tuple[int, list[float]]] = []

    @contextmanager
    def progress(what: str, total: int):
        bars.append((total, []))
        yield bars[-1][1].append

    monkeypatch.setattr(cli, "progress", progress)
    return bars


def test_progress_counts_pictures(adfify, labels, steps, tmp_path, monkeypatch):
    paths = [tiny.picture(tmp_path / "data" / f"{seed}.png", seed) for seed in range(3)]
    (tmp_path / "data" / "9.png").write_text("broken")
    adfify("predict", "tiny", tmp_path / "data", code=2)
    adfify("benchmark", "tiny", "--data", tmp_path / "data", "-o", tmp_path / "out", code=2)
    assert steps == [(4, [1] * 4), (4, [1] * 4)]
    monkeypatch.setattr(checkpoint, "demo_source", tiny.source)
    monkeypatch.setattr(checkpoint, "demo_pictures", lambda: paths)
    adfify("demo", "--draws", 16, "-o", tmp_path / "demo")
    total, moved = steps[-1]
    assert total == 3
    assert sum(moved) == pytest.approx(3)
    assert max(moved) < 0.5  # within a picture, too


def test_a_bar_shows_its_name_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.progress("[red]a\x1b", 1) as advance:
        advance(1)
    with terminal.busy("[red]\x1b[/nonsense]"):
        pass
    shown = capsys.readouterr().err
    assert "[red]" in shown
