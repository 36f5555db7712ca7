"""save and load: the .pt2 gives what the network gives, also where adfify is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import CheckpointError, ExportError, InputError, ModelError
from adfify.preprocessing import Preprocessing
from adfify.program import LoadedProgram, load, save
from adfify.registry import RULES, Rules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(torch.relu(self.bn(self.conv(x)))).flatten(1))


class Detector(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        features = torch.relu(self.conv(x))
        return {"features": features, "scores": [self.fc(self.pool(features).flatten(1)), features.mean((2, 3))]}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)
        self.names = nn.Embedding(7, 3)

    def forward(self, x: Tensor, name: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.names(name) + torch.relu(self.right(y))


class OneByOne(nn.Module):
    """Its Python loop runs over the batch, so torch.export can't leave the batch open."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x).view(2, 3))


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x))


def moments(*shape: int, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    return Moments(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 0.1)


def assert_close(got: Moments, expected: Moments) -> None:
    assert isinstance(got, Moments)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.detach().abs().max()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    torch.manual_seed(0)
    adf = adfify(Net().eval(), noise_variance=2e-3)
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    preprocessing = Preprocessing(input_size=(3, 8, 8), interpolation="bilinear")
    assert save(adf, path, preprocessing=preprocessing, labels=list("abcde")) == path
    return adf, path


@pytest.fixture(scope="module")
def program(saved: tuple[object, Path]) -> LoadedProgram:
    return load(saved[1])


# What runs where adfify can't be imported, not even through a .pth file of the environment.
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adfify", "timm", "torchvision"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
try:
    import adfify
    raise SystemExit("adfify was imported")
except ImportError:
    pass
import torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([program(*tensors) for tensors in inputs], sys.argv[3])
assert not any(name.partition(".")[0] == "adfify" for name in sys.modules)
"""


def run_alone(program: Path, inputs: list[tuple[Tensor, ...]]) -> list[object]:
    given, made = program.with_suffix(".in"), program.with_suffix(".out")
    torch.save(inputs, given)
    command = [sys.executable, "-I", "-c", ALONE, str(program), str(given), str(made)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(made, weights_only=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_loaded_gives_what_the_network_gives(saved, program, batch):
    adf, _ = saved
    x = moments(batch, 3, 8, 8)
    assert_close(program(x), adf(x))
    assert_close(program(x.mean), adf(x.mean))  # the noise variance travels with it


def test_loaded_knows_what_it_is(saved, program):
    adf, _ = saved
    assert program.plan == json.loads(json.dumps(adf.plan))
    assert program.labels == tuple("abcde")
    assert program.preprocessing == Preprocessing(input_size=(3, 8, 8), interpolation="bilinear")
    assert program.noise_variance == 2e-3
    assert program.model_name == "Net"
    assert program.dynamic_batch
    assert not program.random
    assert "not a calibrated error bar" in program.note
    assert program.versions["torch"] == str(torch.__version__)
    assert "x [batch, 3, 8, 8] float32" in repr(program)


def test_loaded_is_in_eval_mode_for_good(program):
    assert program.eval() is program
    assert not program.training
    with pytest.raises(ModelError, match="eval mode"):
        program.train()


def test_saving_leaves_the_network_as_it_was(tmp_path):
    adf = adfify(Net().train())
    before = {key: value.clone() for key, value in adf.state_dict().items()}
    save(adf, tmp_path / "net.pt2", example_inputs=torch.randn(2, 3, 8, 8))
    assert all(module.training for module in adf.modules())
    assert all(parameter.requires_grad for parameter in adf.parameters())
    assert all(torch.equal(value, before[key]) for key, value in adf.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


def test_runs_without_adfify(saved):
    adf, path = saved
    inputs = [moments(batch, 3, 8, 8, seed=batch) for batch in (1, 3)]
    for got, x in zip(run_alone(path, [(x.mean, x.variance) for x in inputs]), inputs, strict=True):
        assert_close(Moments(*got), adf(x))


def test_dict_output_and_its_plain_form(tmp_path):
    torch.manual_seed(0)
    adf = adfify(Detector().eval())
    x = moments(2, 3, 8, 8)
    path = save(adf, tmp_path / "detector.pt2", example_inputs=x)
    expected, got = adf(x), load(path)(x)
    assert list(got) == ["features", "scores"]
    assert isinstance(got["scores"], list)
    assert_close(got["features"], expected["features"])
    assert_close(got["scores"][1], expected["scores"][1])
    plain = torch.export.load(path).module()(x.mean, x.variance)
    assert isinstance(plain["scores"][0], tuple)
    assert_close(Moments(*plain["scores"][0]), expected["scores"][0])


def test_two_uncertain_inputs_and_a_certain_one(tmp_path):
    torch.manual_seed(0)
    example = (torch.randn(1, 4), torch.tensor([3]), torch.randn(1, 2))
    adf = adfify(TwoInputs().eval(), example)
    path = save(adf, tmp_path / "two.pt2", example_inputs=example)
    program = load(path)
    x, names, y = moments(3, 4), torch.tensor([0, 6, 2]), moments(3, 2, seed=1)
    assert_close(program(x, names, y), adf(x, names, y))
    plain = torch.export.load(path).module()(*x, names, *y)
    assert_close(Moments(*plain), adf(x, names, y))
    assert [entry.uncertain for entry in program.inputs] == [True, False, True]
    with pytest.raises(InputError, match=r"takes 3 inputs \(x, name, y\), and was given 1"):
        program(x)
    with pytest.raises(InputError, match=r"name \[batch\] int64 \(certain\)"):
        program(x, names.float(), y)


def test_torchvision_resnet18(tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    adf = adfify(models.resnet18(num_classes=10).eval())
    path = save(adf, tmp_path / "resnet18.pt2", example_inputs=torch.randn(1, 3, 32, 32))
    x = moments(3, 3, 32, 32)
    (got,) = run_alone(path, [(x.mean, x.variance)])
    assert_close(Moments(*got), adf(x))


@pytest.mark.slow
def test_timm_efficientnet_lite0(tmp_path):
    import timm

    torch.manual_seed(0)
    adf = adfify(timm.create_model("efficientnet_lite0").eval())
    path = save(adf, tmp_path / "lite0.pt2", preprocessing=Preprocessing(input_size=(3, 64, 64)))
    inputs = [moments(batch, 3, 64, 64) for batch in (1, 3)]
    for got, x in zip(run_alone(path, [(x.mean, x.variance) for x in inputs]), inputs, strict=True):
        assert_close(Moments(*got), adf(x))


def test_double_precision(tmp_path):
    torch.manual_seed(0)
    adf = adfify(Net().eval().double())
    x = moments(2, 3, 8, 8).to(torch.float64)
    program = load(save(adf, tmp_path / "double.pt2", example_inputs=x))
    assert_close(program(x), adf(x))
    with pytest.raises(InputError, match=r"float64, and was given shape .*float32"):
        program(x.to(torch.float32))


def test_a_batch_that_cannot_be_left_open_is_said(tmp_path):
    torch.manual_seed(0)
    adf = adfify(OneByOne().eval())
    program = load(save(adf, tmp_path / "fixed.pt2", example_inputs=torch.randn(2, 4)))
    assert program.batch_size == 2
    assert not program.dynamic_batch
    assert "could not leave the batch size open" in program.batch_note
    x = moments(2, 4)
    assert_close(program(x), adf(x))
    with pytest.raises(InputError, match=r"x \[2, 4\] float32, and was given shape \(3, 4\)"):
        program(moments(3, 4))


def test_sampled_dropout_stays_random(tmp_path):
    torch.manual_seed(0)
    adf = adfify(Sampled().eval(), dropout="sampled")
    program = load(save(adf, tmp_path / "sampled.pt2", example_inputs=torch.randn(2, 8)))
    assert program.random
    x = moments(4, 8)
    assert not torch.equal(program(x).mean, program(x).mean)
    torch.manual_seed(1)
    first = program(x)
    torch.manual_seed(1)
    assert torch.equal(program(x).mean, first.mean)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(2, 3, 9, 8), r"x \[batch, 3, 8, 8\] float32, and was given shape \(2, 3, 9, 8\)"),
        (torch.randn(3, 8, 8), r"given shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
        (Moments(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), -1.0)), "negative variance"),
        ("cat.png", "cat.png"),
    ],
)
def test_bad_inputs_are_named(program, bad, message):
    with pytest.raises(InputError, match=message):
        program(bad)


def test_saving_needs_something_to_export_with(tmp_path):
    with pytest.raises(ExportError, match="example_inputs"):
        save(adfify(Net().eval()), tmp_path / "net.pt2")
    with pytest.raises(ExportError, match="was given a Net"):
        save(Net(), tmp_path / "net.pt2")
    with pytest.raises(ExportError, match="can't be written"):
        save(adfify(Net().eval()), tmp_path / "none" / "net.pt2", example_inputs=torch.randn(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def branching(x: Tensor) -> Tensor:
    return x


OVERLAY = Rules(RULES)


@OVERLAY.register(branching)
def branching_rule(x: Moments) -> Moments:
    return x if x.mean.sum() > 0 else Moments(-x.mean, x.variance)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return branching(x)


def test_what_torch_export_says_is_passed_on(tmp_path):
    adf = adfify(Branching(), rules=OVERLAY)
    with pytest.raises(ExportError, match=r"torch\.export can't export Branching: .*data-dependent"):
        save(adf, tmp_path / "net.pt2", example_inputs=torch.randn(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_example_inputs_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"Net can't be evaluated on Moments of shape \(1, 3, 7, 7\)"):
        save(adfify(Net().eval()), tmp_path / "net.pt2", example_inputs=torch.randn(1, 3, 7, 7))


def test_other_files_are_told_apart(tmp_path):
    plain = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)), plain)
    with pytest.raises(CheckpointError, match="exported program of a plain model, which adfify can't convert yet"):
        load(plain)
    weights = tmp_path / "weights.pt2"
    torch.save(Net().state_dict(), weights)
    with pytest.raises(CheckpointError, match=r"a checkpoint that torch\.save wrote"):
        load(weights)
    noise = tmp_path / "noise.pt2"
    noise.write_bytes(bytes(range(256)))
    with pytest.raises(CheckpointError, match="not an exported program"):
        load(noise)
    archive = tmp_path / "archive.pt2"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not an exported program"):
        load(archive)


def test_newer_and_damaged_files_are_named(saved, tmp_path):
    def rewritten(name: str, change) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(saved[1]) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.namelist():
                target.writestr(entry, change(entry, source.read(entry)))
        return path

    def newer(entry: str, content: bytes) -> bytes:
        if not entry.endswith("adfify.json"):
            return content
        return json.dumps({**json.loads(content), "format": 99}).encode()

    with pytest.raises(CheckpointError, match="newer adfify"):
        load(rewritten("newer.pt2", newer))
    with pytest.raises(CheckpointError, match=r"damaged.pt2 is damaged, or was changed .*models/model.json"):
        load(rewritten("damaged.pt2", lambda entry, content: b"{}" if entry.endswith("model.json") else content))


def test_no_file_a_folder_and_an_empty_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "none.pt2")
    with pytest.raises(CheckpointError, match="is a directory"):
        load(tmp_path)
    (tmp_path / "empty.pt2").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        load(tmp_path / "empty.pt2")


class Called(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@pytest.mark.parametrize("f", [nn.functional.elu, nn.functional.softsign, lambda x: x.logsumexp(1), torch.asinh])
def test_a_quadrature_of_what_closes_over_tensors_is_saved(f, tmp_path):
    """The loop of an exported quadrature may use only what is handed to it."""
    adf = adfify(Called(f).eval())
    program = load(save(adf, tmp_path / "net.pt2", example_inputs=torch.randn(3, 4)))
    assert program.dynamic_batch
    x = moments(5, 4)
    assert_close(program(x), adf(x))
