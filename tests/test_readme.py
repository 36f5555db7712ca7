"""The README's Python snippets run, in their order, and its promises are about commands that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_snippets_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "readme"}
    module = type(sys)("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    namespace = module.__dict__
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README.md snippet {number}", "exec"), namespace)
    assert len(SNIPPETS) >= 4
    assert namespace["variance"].shape == namespace["mean"].shape
    assert namespace["ratio"] > 0


def test_there_are_exactly_two_set_up_lines():
    lines = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(lines) == 2
    assert all(line.count("\n") == 1 and line.startswith("python3 -m venv") for line in lines)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^adfify (\w+)", README, re.MULTILINE))))
def test_commands_exist(command):
    result = subprocess.run([sys.executable, "-m", "adfify", command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path
