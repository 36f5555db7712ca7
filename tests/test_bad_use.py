"""Bad use of the command line ends before the work, with exit code 2 and one line; nothing is overwritten unasked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import Shell
from typer.testing import CliRunner

from adfify import checkpoint, demo, prediction
from adfify.cli import app
from adfify.errors import InputError
from adfify.paths import check_folder, check_output


@pytest.fixture
def adfify() -> Shell:
    return Shell()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The specs that were opened, which is where the work starts; ``tiny`` opens a small network."""
    specs: list[str] = []

    def open_model(spec: str, **rest: object) -> checkpoint.Source:
        specs.append(spec)
        return tiny.source()

    monkeypatch.setattr(prediction, "open_model", open_model)
    return specs


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with one of everything, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    tiny.picture(tmp_path / "pictures" / "a.png")
    (tmp_path / "there.pt2").write_text("mine")
    (tmp_path / "half.pt2.json").write_text("mine")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "benchmark.json").write_text("mine")
    (tmp_path / "report" / "demo.png").write_text("mine")
    (tmp_path / "loop.pt2").symlink_to("nowhere.pt2")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


BAD = [
    ["convert", "tiny", "-o", "there.pt2"],
    ["convert", "tiny", "-o", "half.pt2"],
    ["convert", "tiny", "-o", "loop.pt2"],
    ["convert", "tiny", "-o", "folder.pt2"],
    ["convert", "tiny", "-o", "folder.pt2", "--force"],
    ["convert", "tiny", "-o", "x.pth"],
    ["convert", "tiny", "-o", "x"],
    ["convert", "tiny", "-o", ""],
    ["convert", "tiny", "-o", "file/x.pt2"],
    ["convert", "tiny", "-o", "x" * 300 + ".pt2"],
    ["convert", "tiny", "-o", "new.pt2", "--noise-variance", "-1"],
    ["convert", "tiny", "-o", "new.pt2", "--min-variance", "nan"],
    ["convert", "tiny", "-o", "new.pt2", "--labels", "nowhere.txt"],
    ["convert", "there.pt2", "-o", "new.pt2"],
    ["convert", "tiny"],
    ["predict", "tiny", "pictures", "--explain", "file"],
    ["predict", "tiny", "pictures", "--explain", "figures", "--one-pass"],
    ["predict", "there.pt2", "pictures", "--explain", "figures"],
    ["predict", "tiny", "pictures", "--noise-variance", "inf"],
    ["predict", "tiny", "pictures", "--noise-variance", "much"],
    ["predict", "tiny", "pictures", "--top", "0"],
    ["predict", "tiny", "pictures", "--batch-size", "0"],
    ["predict", "tiny", "pictures", "--labels", "bytes.txt"],
    ["predict", "tiny", "pictures", "--labels", "empty.txt"],
    ["predict", "tiny", "pictures", "--labels", "report"],
    ["predict", "tiny", "pictures", "--no-such-option"],
    ["predict", "tiny", "folder.pt2"],
    ["predict", "tiny", "nowhere.png", "nor here.png"],
    ["predict", "tiny"],
    ["demo", "-o", "report"],
    ["demo", "-o", "file"],
    ["demo", "--draws", "1", "-o", "new"],
    ["benchmark", "tiny", "--data", "pictures", "-o", "report"],
    ["benchmark", "tiny", "--data", "pictures", "-o", "file"],
    ["benchmark", "tiny", "--data", "nowhere", "-o", "new"],
    ["benchmark", "tiny", "--data", "pictures", "-o", "new", "--noise-variance", "-1"],
    ["benchmark", "tiny", "tiny", "--data", "pictures", "-o", "new", "--weights", "w.pth"],
    ["nonsense"],
]
if sys.platform == "linux":
    BAD += [
        ["convert", "tiny", "-o", "/proc/x.pt2"],
        ["convert", "tiny", "-o", "/proc/new/x.pt2"],
        ["predict", "tiny", "pictures", "--explain", "/proc/figures"],
        ["demo", "-o", "/proc"],
        ["benchmark", "tiny", "--data", "pictures", "-o", "/proc/report"],
    ]


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_bad_use_is_one_line_before_the_work(adfify, opened, here, args):
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    assert adfify(*args, code=2) == ""
    assert adfify.stderr.startswith("error: ")
    assert adfify.stderr.count("\n") == 1
    assert opened == []
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before


def test_the_help_is_named_with_the_option(adfify):
    adfify("predict", "tiny", "x", "--top", "0", code=2)
    assert "--top" in adfify.stderr
    assert "See adfify predict --help." in adfify.stderr.replace("root", "adfify")


def test_force_replaces_what_is_there(adfify, opened, here):
    adfify("convert", "tiny", "-o", "there.pt2", "--force")
    assert json.loads((here / "there.pt2.json").read_text())["model"] == "Classifier"
    assert checkpoint.load(here / "there.pt2").model_name == "Classifier"
    adfify("benchmark", "tiny", "--data", "pictures", "-o", "report", "--force")
    assert "reports" in json.loads((here / "report" / "benchmark.json").read_text())


def test_a_program_whose_json_has_the_older_name_is_read(adfify, opened, here, monkeypatch):
    """It was NAME.json once; the program has everything in itself."""
    adfify("convert", "tiny", "-o", "new.pt2")
    (here / "new.pt2.json").rename(here / "new.json")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert adfify.json("predict", "new.pt2", "pictures")["predictions"][0]["top"][0]["label"] in tiny.LABELS


def test_what_is_checked_is_left_as_it_was(tmp_path):
    check_output(tmp_path / "a" / "b" / "c.pt2", force=False)
    check_folder(tmp_path / "d" / "e")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").write_text("mine")
    check_output(tmp_path / "there", force=True)
    assert (tmp_path / "there").read_text() == "mine"


def test_a_write_protected_output_is_refused(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="write-protected"):
        check_output(tmp_path / "there", force=True)


def test_the_demo_has_its_own_weights(adfify):
    for option in (["--weights", "w.pth"], ["--arch", "timm:resnet18"], ["--num-classes", "3"]):
        adfify("inspect", "demo", *option, code=2)
        assert f"error: {option[0]} does not go with demo" in adfify.stderr


def test_a_level_given_twice_is_one(adfify, opened, here):
    levels = ("--noise-variance", 0.001, "--noise-variance", 1e-3)
    report = adfify.json("benchmark", "tiny", "--data", "pictures", "-o", "new", *levels)["reports"][0]
    assert [row["noise_variance"] for row in report["rows"]] == [None, 0.001]


def test_nothing_read_shows_no_table(adfify, opened, here):
    (here / "broken.png").write_text("broken")
    assert adfify("predict", "tiny", "broken.png", code=2) == ""
    assert "broken.png can't be read" in adfify.stderr


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_linked_folders_are_searched_once(tmp_path):
    tiny.picture(tmp_path / "elsewhere" / "a.png")
    tiny.picture(tmp_path / "data" / "cat" / "b.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    found = prediction.find_pictures([tmp_path / "data"])
    assert found == [tmp_path / "data" / "cat" / "b.png", tmp_path / "data" / "dog" / "a.png"]


# Labels


def numbered(tmp_path: Path, *names: str) -> Path:
    """Class folders, each with a picture."""
    for seed, name in enumerate(names):
        tiny.picture(tmp_path / "data" / name / "a.png", seed)
    return tmp_path / "data"


@pytest.fixture
def nameless(monkeypatch) -> None:
    monkeypatch.setattr(prediction, "open_model", lambda spec, **rest: tiny.source(labels=None))


def test_class_folders_are_classes_in_sorted_order(adfify, nameless, tmp_path):
    data = numbered(tmp_path, "dog", "cat", "ant", "Bee")
    report = adfify.json("benchmark", "tiny", "--data", data, "-o", tmp_path / "out")["reports"][0]
    x = torch.stack(
        [prediction.read_picture(data / name / "a.png", tiny.PREPROCESSING) for name in ("Bee", "ant", "cat", "dog")]
    )
    with torch.inference_mode():
        right = (tiny.source().model(x).argmax(1) == torch.arange(4)).double().mean()
    assert report["labelled"]
    assert report["rows"][0]["quality"]["accuracy"] == float(right)


def test_predict_names_outputs_by_class_folders_and_says_so(adfify, nameless, tmp_path):
    data = numbered(tmp_path, "dog", "cat", "ant", "Bee")
    found = adfify.json("predict", "tiny", data, "--one-pass", "--top", 4)["predictions"]
    named = {score["index"]: score["label"] for score in found[0]["top"]}
    assert named == {0: "Bee", 1: "ant", 2: "cat", 3: "dog"}
    assert "sorted (torchvision's ImageFolder)" in adfify.stderr
    found = adfify.json("predict", "tiny", data / "dog", "--one-pass")["predictions"]
    assert found[0]["top"][0]["label"].startswith("class ")
    assert "their numbers are shown" in adfify.stderr
    assert "--labels FILE" in adfify.stderr


@pytest.mark.parametrize(
    "text",
    [
        "w\nx\ny\nz\n", '["w", "x", "y", "z"]', '{"1": "x", "0": "w", "2": "y", "3": "z"}',
        '{"x": 1, "w": 0, "y": 2, "z": 3}',
    ],
    ids=["lines", "list", "by index", "class_to_idx"],
)  # fmt: skip
def test_labels_from_a_file(adfify, nameless, tmp_path, text):
    (tmp_path / "names").write_text(text)
    picture = tiny.picture(tmp_path / "a.png")
    args = ("predict", "tiny", picture, "--top", 4, "--one-pass", "--labels", tmp_path / "names")
    top = adfify.json(*args)["predictions"][0]["top"]
    assert {score["index"]: score["label"] for score in top} == dict(enumerate("wxyz"))
    assert adfify.stderr == ""
    adfify("convert", "tiny", "-o", tmp_path / "x.pt2", "--labels", tmp_path / "names")
    assert checkpoint.load(tmp_path / "x.pt2").labels == tuple("wxyz")


def test_labels_decide_over_folders(adfify, nameless, tmp_path):
    data = numbered(tmp_path, "w", "x", "y", "z")
    (tmp_path / "names.txt").write_text("z\ny\nx\nw")
    args = ("benchmark", "tiny", "--data", data)
    sorted_ = adfify.json(*args, "-o", tmp_path / "a")["reports"][0]["rows"][0]["quality"]
    named = adfify.json(*args, "-o", tmp_path / "b", "--labels", tmp_path / "names.txt")["reports"][0]["rows"][0]
    assert named["quality"]["nll"] != pytest.approx(sorted_["nll"], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\nc", ["names 3 classes", "4 outputs"]),
        ("a\n\nb\nc", ["output 1", "empty"]),
        ('{"a": 0, "b": 2}', ["no list of names"]),
        ("[1, 2, 3, 4]", ["no list of names"]),
        ("{", ["no list of names"]),
    ],
)
def test_labels_that_do_not_fit(adfify, nameless, tmp_path, text, words):
    (tmp_path / "names").write_text(text)
    adfify("predict", "tiny", tiny.picture(tmp_path / "a.png"), "--labels", tmp_path / "names", code=2)
    assert all(word in adfify.stderr for word in ["--labels", *words])


def test_folders_that_can_not_be_told_are_refused(adfify, nameless, tmp_path):
    data = numbered(tmp_path, "dog", "cat", "ant")
    adfify("benchmark", "tiny", "--data", data, "-o", tmp_path / "out", code=2)
    assert "4 outputs have no names, and there are 3 class folders" in adfify.stderr
    assert "--labels FILE" in adfify.stderr


def test_numbers_whose_two_orders_differ_are_refused():
    from adfify.errors import DataError
    from adfify.labels import class_indices

    numbers = [str(index) for index in range(11)]
    with pytest.raises(DataError, match="--labels FILE"):
        class_indices(numbers, None, 11)
    assert class_indices(numbers, sorted(numbers), 11)["10"] == 2  # a file has decided
    assert class_indices(numbers[:10], None, 10)["9"] == 9  # both agree
    assert class_indices(["3", "7"], None, 11) == {"3": 3, "7": 7}
    assert class_indices([f"{index:02}" for index in range(11)], None, 11)["10"] == 10


def test_a_limit_does_not_shift_the_classes(adfify, nameless, tmp_path):
    data = numbered(tmp_path, "dog", "cat", "ant", "Bee")
    report = adfify.json("benchmark", "tiny", "--data", data, "-o", tmp_path / "out", "--limit", 2)["reports"][0]
    assert (report["pictures"], report["labelled"]) == (2, True)


def test_never_silently_unlabelled(adfify, opened, tmp_path):
    data = numbered(tmp_path, "holiday", "2024")
    report = adfify.json("benchmark", "tiny", "--data", data, "-o", tmp_path / "a")["reports"][0]
    assert not report["labelled"]
    assert "the network knows none of the 2 class folders (2024, holiday)" in adfify.stderr
    assert report["unlabelled"] in adfify.stderr
    data = numbered(tmp_path, *"0123")
    tiny.picture(data / "cover.png")
    adfify.json("benchmark", "tiny", "--data", data, "-o", tmp_path / "b")
    assert "1 pictures stand beside the class folders, such as" in adfify.stderr
    assert "cover.png" in adfify.stderr


# The demo


def test_the_demo_says_which_deviation_is_which(adfify, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "demo_source", tiny.source)
    monkeypatch.setattr(checkpoint, "demo_pictures", lambda: [tiny.picture(tmp_path / "a.png")])
    text = adfify("demo", "--draws", 20, "-o", tmp_path / "out")
    note = next(line for line in text.splitlines() if line.startswith("± is"))
    assert all(word in note for word in ("One pass:", "Joint:", "Monte Carlo: 20", f"{demo.LEVELS[1]:g}"))
    adfify("demo", "-o", tmp_path / "out", code=2)
    assert "--force" in adfify.stderr


def test_no_arguments_show_the_help():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Usage" in result.output
    assert "error" not in result.output
