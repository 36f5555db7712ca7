"""The command line as its users meet it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from adfify import checkpoint, demo, prediction
from adfify.cli import app

COMMANDS = ("inspect", "convert", "predict", "demo", "benchmark")


class Shell:
    """Runs `adfify` in this process."""

    def __call__(self, *args: object, code: int = 0) -> str:
        """Standard output of a run that must end with ``code``; what else it said is in ``stderr``."""
        result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
        self.stderr = result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.stdout

    def json(self, *args: object, code: int = 0) -> Any:
        """What a run with --json printed, which must be JSON and nothing else."""
        return json.loads(self(*args, "--json", code=code))


@pytest.fixture
def adfify() -> Shell:
    return Shell()


@pytest.fixture
def sources(monkeypatch) -> dict[str, checkpoint.Source]:
    """Specs that open small networks; others are opened as always."""
    known = {
        "tiny": tiny.source(),
        "random": tiny.source(weights=checkpoint.RANDOM),
        "spectral": tiny.source(tiny.Spectral()),
        "segmenter": tiny.source(tiny.Segmenter()),
    }
    opened = prediction.open_source
    monkeypatch.setattr(
        prediction, "open_source", lambda spec, **rest: known[spec] if spec in known else opened(spec, **rest)
    )
    return known


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two pictures, and one that is broken."""
    for seed, name in enumerate(("a.png", "c.png")):
        tiny.picture(tmp_path / "pictures" / name, seed)
    (tmp_path / "pictures" / "b.png").write_text("broken")
    return tmp_path / "pictures"


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(adfify, command):
    text = adfify(command, "--help")
    assert f"adfify {command}" in text.split("Usage:")[1]
    assert "--json" in text


def test_help_lists_the_commands_and_the_exit_codes(adfify):
    text = adfify("--help")
    assert all(command in text for command in COMMANDS)
    assert "Exit codes" in text
    assert "adfify[demo]" in adfify("demo", "--help")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["predict", "demo"],
        ["convert", "tiny"],
        ["predict", "tiny", ".", "--noise-variance", "-1"],
        ["predict", "tiny", ".", "--top", "0"],
        ["convert", "tiny", "-o", "x.pt2", "--dropout", "perhaps"],
        ["demo", "--draws", "1"],
    ],
)
def test_wrong_usage_is_exit_code_2(adfify, args):
    assert adfify(*args, code=2) == ""
    assert adfify.stderr


# inspect


def test_inspect_shows_operations_by_rule(adfify, sources):
    text = adfify("inspect", "tiny")
    rows = [line.split() for line in text.splitlines()]
    assert ["torch.nn.Conv2d", "1", "nn.affine.Conv2d", "exact"] in rows
    assert "torch.fx" in text
    assert "can be converted" in text
    report = adfify.json("inspect", "tiny")
    assert (report["convertible"], report["engine"], report["missing"]) == (True, "torch.fx", [])
    relu = next(kind for kind in report["operations"] if kind["op"] == "torch.nn.ReLU")
    assert (relu["count"], relu["action"], relu["rule"]) == (1, "convert", "adfify.nn.activation.ReLU")


def test_inspect_names_what_is_missing_and_where(adfify, sources):
    text = adfify("inspect", "spectral", code=1)
    assert "torch.linalg.svdvals" in text
    assert "tiny.py:" in text
    report = adfify.json("inspect", "spectral", code=1)
    assert not report["convertible"]
    assert report["missing"][0]["op"] == "torch.linalg.svdvals"
    assert report["missing"][0]["location"].partition("tiny.py:")[2].isdigit()


def test_inspect_a_program(adfify, sources, tmp_path):
    adfify("convert", "tiny", "-o", tmp_path / "tiny.pt2")
    assert adfify.json("inspect", tmp_path / "tiny.pt2")["operations"] == adfify.json("inspect", "tiny")["operations"]


# convert


def test_convert_writes_a_program_and_its_plan(adfify, sources, tmp_path, folder):
    out = tmp_path / "new" / "tiny.pt2"
    text = adfify("convert", "tiny", "-o", out)
    assert f"adfify predict {out}" in text
    plan = json.loads((tmp_path / "new" / "tiny.pt2.json").read_text())
    assert {record["op"] for record in plan["plan"]} >= {"torch.nn.Conv2d", "torch.nn.ReLU", "torch.nn.Linear"}
    (folder / "b.png").unlink()
    before, after = (adfify.json("predict", spec, folder, "--one-pass")["predictions"] for spec in ("tiny", out))
    for one, other in zip(before, after, strict=True):
        assert one["path"] == other["path"]
        best, again = one["top"][0], other["top"][0]
        assert best.pop("label") == again.pop("label")
        assert best == pytest.approx(again, rel=1e-5)


def test_the_printed_lines_run_the_program_without_adfify(adfify, sources, tmp_path):
    report = adfify.json("convert", "tiny", "-o", tmp_path / "tiny.pt2")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    script = (
        f"import sys, torch\nsys.modules['adfify'] = None\nx = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"x_variance = torch.full_like(x, 0.01)\n{report['run']}\n"
        f"torch.save((mean, variance), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=100)
    mean, variance = torch.load(tmp_path / "y.pt")
    adf = prediction.classifier(sources["tiny"]).adf
    with torch.inference_mode():
        expected = adf(prediction.Moments(x, torch.full_like(x, 0.01)))
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(variance, expected.variance)


def test_convert_takes_the_published_numerics(adfify, sources, tmp_path):
    plans = []
    for options in ([], ["--published", "--min-variance", "1e-3", "--noise-variance", "0.5"]):
        adfify("convert", "tiny", "-o", tmp_path / "tiny.pt2", "--force", *options)
        plans.append(json.loads((tmp_path / "tiny.pt2.json").read_text()))
    rules = [{record["op"]: record["rule"] for record in plan["plan"]} for plan in plans]
    assert rules[0]["torch.nn.BatchNorm2d"].startswith("adfify.nn.")
    assert rules[1]["torch.nn.BatchNorm2d"].startswith("adfify.published.")
    assert [plan["noise_variance"] for plan in plans] == [1e-3, 0.5]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["convert", "spectral", "-o", "x.pt2"], 1, ["torch.linalg.svdvals", "register"]),
        (["convert", "tiny", "-o", "x.pth"], 2, ["x.pth", ".pt2"]),
        (["convert", "tiny", "-o", "x.pt2", "--min-variance", "inf"], 2, ["--min-variance inf"]),
        (["convert", "tiny", "-o", "x.pt2", "--noise-variance", "nan"], 2, ["--noise-variance nan"]),
        (["predict", "tiny", "pictures", "--noise-variance", "-1"], 2, ["--noise-variance -1"]),
        (["predict", "tiny", "empty"], 2, ["empty", "no pictures"]),
        (["predict", "segmenter", "pictures"], 2, ["dict", "classifiers"]),
        (["benchmark", "tiny", "--data", "nowhere"], 2, ["nowhere"]),
        (["benchmark", "tiny", "tiny", "--data", "pictures", "--weights", "w.pth"], 2, ["w.pth"]),
        (["inspect", "resnet"], 2, ["resnet", "timm:resnet"]),
        (["inspect", "none.pth", "--arch", "timm:resnet18"], 2, ["none.pth"]),
        (["inspect", "notes.pth", "--arch", "torchvision:resnet18"], 2, ["notes.pth", "not a checkpoint"]),
        (["inspect", "other.pth", "--arch", "torchvision:squeezenet1_1"], 2, ["other.pth", "nobody", "features.0"]),
        (["predict", "notes.pt2", "pictures"], 2, ["notes.pt2"]),
    ],
)
def test_errors_are_messages(adfify, sources, folder, tmp_path, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.pth").write_text("these are notes")
    Path("notes.pt2").write_text("these are notes")
    torch.save({"nobody.weight": torch.zeros(2)}, "other.pth")
    assert adfify(*args, code=code) == ""
    assert adfify.stderr.startswith("error: ")
    assert all(word in adfify.stderr for word in words)
    error = adfify.json(*args, code=code)["error"]
    assert error["type"].endswith("Error")
    assert all(word in error["message"] for word in words)


def test_a_models_hook_is_exit_code_1(adfify, sources, tmp_path):
    sources["tiny"].model.register_forward_hook(print)
    assert adfify.json("convert", "tiny", "-o", tmp_path / "x.pt2", code=1)["error"]["type"] == "ModelError"
    assert not list(tmp_path.iterdir())


def test_what_cant_be_written_is_a_message(adfify, sources, tmp_path):
    (tmp_path / "file").write_text("in the way")
    adfify("convert", "tiny", "-o", tmp_path / "file" / "x.pt2", code=2)
    assert str(tmp_path / "file") in adfify.stderr


def test_a_bug_keeps_its_traceback(adfify, monkeypatch):
    def bug(*args: object, **rest: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(prediction, "open_model", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        adfify("inspect", "tiny")


# predict


def test_predict_names_the_unreadable_and_does_the_rest(adfify, sources, folder):
    text = adfify("predict", "tiny", folder, "nowhere.jpg", code=2)
    assert text.count(" ± ") == 3  # both pictures, and the title
    assert "correlations of units included" in text
    assert str(folder / "b.png") in adfify.stderr
    assert "nowhere.jpg can't be read: there is no such file" in adfify.stderr
    assert "2 of 4" in adfify.stderr


def test_predict_as_json(adfify, sources, folder):
    report = adfify.json("predict", "tiny", folder, "--top", 2, "--noise-variance", 0.01, code=2)
    assert [Path(entry["path"]).name for entry in report["predictions"]] == ["a.png", "c.png"]
    assert [Path(entry["path"]).name for entry in report["unreadable"]] == ["b.png"]
    assert (report["noise_variance"], len(report["predictions"][0]["top"])) == (0.01, 2)
    assert "correlations" in report["note"]
    x = prediction.read_picture(folder / "a.png", tiny.PREPROCESSING).unsqueeze(0)
    network = prediction.classifier(sources["tiny"])
    shown = report["predictions"][0]["top"]
    joint, indices = network.joint(x, 0.01, "all"), [score["index"] for score in shown]
    assert indices == joint.mean[0].topk(2).indices.tolist()
    assert [score["mean"] for score in shown] == pytest.approx(joint.mean[0, indices].tolist(), rel=1e-5)
    assert [score["std"] for score in shown] == pytest.approx(joint.std[0, indices].tolist(), rel=1e-5)


def test_predict_by_one_pass(adfify, sources, folder, tmp_path):
    report = adfify.json("predict", "tiny", folder / "a.png", "--one-pass")
    assert "not a calibrated error bar" in report["note"]
    assert adfify.stderr == ""  # asked for, it is no reason to warn
    x = prediction.read_picture(folder / "a.png", tiny.PREPROCESSING).unsqueeze(0)
    logits = prediction.classifier(sources["tiny"]).logits(x, 1e-3)
    best = report["predictions"][0]["top"][0]
    assert best["std"] == pytest.approx(logits.std[0, best["index"]].item(), rel=1e-5)
    adfify("convert", "tiny", "-o", tmp_path / "tiny.pt2")
    assert "not a calibrated error bar" in adfify("predict", tmp_path / "tiny.pt2", folder / "a.png")


def test_predict_explains(adfify, sources, folder, tmp_path):
    (folder / "more").mkdir()
    tiny.picture(folder / "more" / "a.png", 7)
    (folder / "b.png").unlink()
    text = adfify("predict", "tiny", folder, "--explain", tmp_path / "why")
    assert sorted(file.name for file in (tmp_path / "why").iterdir()) == ["a-2.png", "a.png", "c.png"]
    assert str(tmp_path / "why" / "a-2.png") in text
    again = adfify.json("predict", "tiny", folder / "c.png", "--explain", tmp_path / "why")
    assert again["figures"] == [str(tmp_path / "why" / "c-2.png")]
    adfify("predict", "tiny", folder, "--explain", tmp_path, "--one-pass", code=2)
    assert "--one-pass" in adfify.stderr
    adfify("convert", "tiny", "-o", tmp_path / "tiny.pt2")
    adfify("predict", tmp_path / "tiny.pt2", folder, "--explain", tmp_path, code=2)
    assert ".pt2" in adfify.stderr


def test_predict_done_is_exit_code_0(adfify, sources, folder):
    (folder / "b.png").unlink()
    assert len(adfify.json("predict", "tiny", folder / "a.png", folder)["predictions"]) == 3
    assert adfify.stderr == ""


def test_random_weights_are_pointed_out(adfify, sources, folder):
    assert len(adfify.json("predict", "random", folder / "a.png")["predictions"]) == 1
    assert "random weights" in adfify.stderr


def test_numbers_that_json_lacks_become_null(adfify, sources, folder):
    for parameter in (sources["tiny"].model.head.bias, sources["tiny"].model.head.weight):
        torch.nn.init.constant_(parameter, 3e38)  # finite, as weights have to be, and their sum is not
    report = adfify.json("predict", "tiny", folder / "a.png", "--one-pass")
    assert report["predictions"][0]["top"][0]["mean"] is None


def test_ctrl_c_is_exit_code_130(adfify, sources, folder, monkeypatch):
    def interrupted(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "predict", interrupted)
    adfify("predict", "tiny", folder, code=130)


# benchmark


def test_benchmark_with_class_folders(adfify, sources, tmp_path):
    for label in range(4):
        tiny.picture(tmp_path / "data" / str(label) / "a.png", label)
    args = ("benchmark", "tiny", "--data", tmp_path / "data", "-o", tmp_path / "report")
    text = adfify(*args, "--noise-variance", 0.001, "--noise-variance", 0.01)
    assert [word in text for word in ("plain softmax", "ADF at 0.001", "ADF at 0.01", "AUROC")] == [True] * 4
    assert "not a calibrated error bar" in text
    report = adfify.json(*args, "--limit", 2, "--force")
    assert json.loads((tmp_path / "report" / "benchmark.json").read_text()) == report
    (only,) = report["reports"]
    assert (only["pictures"], only["labelled"], len(only["rows"])) == (2, True, 2)
    assert 0 <= only["rows"][1]["quality"]["ece"] <= 1
    assert only["cost"]["median"] > 0


def test_benchmark_without_class_folders(adfify, sources, folder, tmp_path):
    args = ("benchmark", "tiny", "random", "--data", folder, "-o", tmp_path / "report")
    report = adfify.json(*args, code=2)
    assert "b.png" in adfify.stderr
    assert [entry["labelled"] for entry in report["reports"]] == [False, False]
    assert report["reports"][0]["rows"][0]["quality"] is None
    text = adfify(*args, "--force", code=2)
    assert "No labels" in text
    assert "AUROC conf." not in text


# demo


def test_demo_on_a_small_network(adfify, tmp_path, monkeypatch):
    paths = [tiny.picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    monkeypatch.setattr(checkpoint, "demo_source", tiny.source)
    monkeypatch.setattr(checkpoint, "demo_pictures", lambda: paths)
    args = ("demo", "--draws", 50, "-o", tmp_path / "out")
    text = adfify(*args)
    assert text.count("true std; ") == len(demo.LEVELS)
    assert "not a calibrated error bar" in text
    assert "adfify convert demo" in text
    figure = tmp_path / "out" / "demo.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = adfify.json(*args, "--pictures", 2, "--force")
    assert report["figure"] == str(figure)
    assert [len(level["pictures"]) for level in report["levels"]] == [2] * len(demo.LEVELS)
    # What is said in words is what was measured.
    ratio = adfify.json(*args, "--force")["levels"][0]["true_std_over_one_pass_std"]
    assert f"{ratio:.1f}x too small" in text if ratio > 1 else f"{1 / ratio:.1f}x too large" in text


def test_demo_on_the_real_network(adfify, tmp_path):
    report = adfify.json("demo", "--draws", 12, "--pictures", 1, "-o", tmp_path)
    (picture,) = report["pictures"]
    assert "cat" in picture["label"]
    assert picture["probability"] > 0.2
    level = report["levels"][1]
    (moments,) = level["pictures"]
    assert moments["monte_carlo"]["mean"] == pytest.approx(moments["one_pass"]["mean"], abs=2)
    assert level["true_std_over_one_pass_std"] > 2  # known to be too small, and said so


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    result = _run("demo", "-o", str(tmp_path), timeout=1200)
    assert result.returncode == 0
    assert "x too small" in result.stdout
    assert (tmp_path / "demo.png").stat().st_size > 100_000


# As a program of its own


def _run(*args: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adfify", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "COLUMNS": "80"})


def test_version():
    from adfify import __version__

    result = _run("--version")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, f"adfify {__version__}", "")


def test_an_unknown_model_has_suggestions():
    result = _run("inspect", "timm:resnet81", "--json")
    assert result.returncode == 2
    assert "timm:resnet18" in json.loads(result.stdout)["error"]["message"]
    assert "Traceback" not in result.stderr


def test_importing_the_command_line_is_light():
    heavy = ("timm", "torchvision", "matplotlib", "torchmetrics", "skimage", "PIL", "rich.progress")
    script = f"import sys, adfify.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_the_middle(tmp_path):
    command = [sys.executable, "-m", "adfify", "demo", "-o", str(tmp_path)]

    def heed_interrupts() -> None:  # a shell's background jobs are started without
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "error" not in errors
