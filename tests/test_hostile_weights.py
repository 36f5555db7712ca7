"""Files of weights that are none: each is refused by one typed error that names what is wrong, and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from adfify.errors import CheckpointError
from adfify.weights import fill, read_state

State = dict[Any, Any]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(16, 5))
    )


def changed(**values: Any) -> State:
    state: State = dict(network().state_dict())
    for key, value in values.items():
        state[key.replace("__", ".")] = value(state[key.replace("__", ".")]) if callable(value) else value
    return state


def with_element(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return change


def twice() -> State:
    state = changed()
    state["fc._orig_mod.weight"] = state["fc.weight"]
    return state


def endless() -> State:
    state: State = {}
    state["model"] = state
    return state


def nested(depth: int) -> State:
    state: State = changed()
    for _ in range(depth):
        state = {"model": state}
    return state


def of(**values: Any) -> Callable[[], State]:
    return lambda: changed(**values)


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


HUGE = {"fc__weight": torch.zeros(1, 1).expand(10**10, 16), "fc__bias": torch.zeros(1).expand(10**10)}
INFINITE, MINUS_INFINITE, LARGE = map(with_element, (float("inf"), -float("inf"), 1e300))

BAD_STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "int8": (of(fc__weight=lambda t: (t * 100).to(torch.int8)), r"fc\.weight is int8"),
    "uint8": (of(conv__weight=lambda t: (t * 100).to(torch.uint8)), r"conv\.weight is uint8"),
    "int32": (of(fc__bias=lambda t: t.to(torch.int32)), r"fc\.bias is int32"),
    "bool": (of(fc__weight=lambda t: t > 0), r"fc\.weight is bool"),
    "complex": (of(fc__weight=lambda t: t.to(torch.complex64)), r"fc\.weight is complex64"),
    "float8": (of(fc__weight=lambda t: t.to(torch.float8_e4m3fn)), r"fc\.weight is float8_e4m3fn"),
    "a counter of floats": (of(bn__num_batches_tracked=torch.tensor(1.5)), r"num_batches_tracked is float32"),
    "NaN": (of(fc__weight=with_element(float("nan"))), r"fc\.weight has NaN or infinite"),
    "infinity": (of(conv__bias=INFINITE), r"conv\.bias has NaN or infinite"),
    "a half-precision infinity": (of(conv__bias=lambda t: MINUS_INFINITE(t).half()), r"conv\.bias has NaN"),
    "too large for float32": (of(fc__bias=lambda t: LARGE(t.double())), r"fc\.bias has NaN or infinite"),
    "a negative variance": (of(bn__running_var=with_element(-1e-3)), r"bn\.running_var has variances below 0"),
    "a meta tensor": (of(fc__weight=lambda t: t.to("meta")), r"fc\.weight is a meta tensor"),
    "a sparse tensor": (of(fc__weight=lambda t: t.to_sparse()), r"fc\.weight is sparse"),
    "a quantised tensor": (of(fc__weight=quantised), r"fc\.weight is sparse, quantised"),
    "a view of one element": (of(fc__weight=torch.zeros(1).expand(5, 16)), r"repeats its elements"),
    "a head of 1e10 classes": (of(**HUGE), r"repeats its elements"),
    "two keys": (twice, r"two keys for one parameter, .*fc"),
    "a key that is a number": (lambda: {1: torch.zeros(1)}, "key 1, of type int"),
    "a key that is a tuple": (lambda: {(1, 2): torch.zeros(1)}, "of type tuple"),
    "a dictionary that holds itself": (endless, "holds no state_dict"),
    "nested deep": (lambda: nested(100), "holds no state_dict"),
    "nothing": (dict, "holds no state_dict"),
    "a list": (lambda: [1, 2, 3], "of type list"),
    "a number": (lambda: 7, "of type int"),
    "numbers": (lambda: {"fc.weight": 1.0}, "holds no state_dict"),
    "another network": (lambda: {"a": torch.zeros(1)}, "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_STATES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_bad_states_are_named(fault: str, zipped: bool, tmp_path: Path) -> None:
    make, named = BAD_STATES[fault]
    if fault == "float8" and not zipped:
        named = "not a checkpoint"  # the old format has no such numbers
    file = tmp_path / "weights.pth"
    torch.save(make(), file, _use_new_zipfile_serialization=zipped)
    refused(file, named)


def refused(file: Path, named: str) -> None:
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=named) as error:
        state, origin = read_state(file)
        fill(network(), state, "the network", origin)
    assert len(str(error.value)) < 2000
    assert time.monotonic() - begun < 60, "it hangs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_is_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network().state_dict().items()}
    torch.save(state, file)
    model = network()
    fill(model, read_state(file)[0], "the network", str(file))
    assert torch.equal(model.fc.weight, state["fc.weight"].float())


class Mark:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


def torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def deep_list(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def safetensors_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def one_tensor(dtype: bytes, shape: bytes, offsets: bytes, length: int) -> bytes:
    header = b'{"fc.weight": {"dtype": "%s", "shape": %s, "data_offsets": %s}}' % (dtype, shape, offsets)
    return safetensors_header(header) + bytes(length)


BAD_BYTES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a call": (".pth", lambda mark: torch_file({"a": Mark(os.mkdir, str(mark))})),
    "a call in a bare pickle": (".pth", lambda mark: pickle.dumps({"a": Mark(os.mkdir, str(mark))}, protocol=2)),
    "an evaluation": (".pt", lambda mark: torch_file(Mark(eval, f"__import__('os').mkdir({str(mark)!r})"))),
    "getattr": (".bin", lambda mark: torch_file(Mark(getattr, "text", "upper"))),
    "a partial": (".ckpt", lambda mark: pickle.dumps(Mark(os.mkdir, str(mark)), protocol=4)),
    "a list of a range": (".pth", lambda mark: torch_file({"a": Mark(list, range(10**11))})),
    "a tuple of a range": (".pth", lambda mark: torch_file({"a": Mark(tuple, range(10**11))})),
    "a bytearray": (".pth", lambda mark: torch_file({"a": Mark(bytearray, 10**11)})),
    "a count of a bytearray": (".pth", lambda mark: torch_file(Mark(Counter, Mark(bytearray, 10**11)))),
    "an array of 1 TB": (".pth", lambda mark: torch_file({"a": Mark(numpy.zeros, 10**12)})),
    "nested a million times": (".pth", lambda mark: deep_list(10**6)),
    "nested in a zip": (".pth", lambda mark: packed_as_pkl(deep_list(10**5))),
    "compressed": (".pth", lambda mark: packed(torch_file({"a": torch.zeros(1 << 22)}))),
    "cut short": (".pth", lambda mark: torch_file(dict(network().state_dict()))[:2000]),
    "zeros": (".pth", lambda mark: bytes(5000)),
    "text": (".pth", lambda mark: b"import os\n" * 100),
    "safetensors by name": (".safetensors", lambda mark: torch_file(dict(network().state_dict()))),
    "a header of 2^63 bytes": (".safetensors", lambda mark: safetensors_header(b"{}", 1 << 63)),
    "a header that is cut": (".safetensors", lambda mark: safetensors_header(b"{}", 1000)),
    "a header that is no JSON": (".safetensors", lambda mark: safetensors_header(b"import os")),
    "a header nested without end": (".safetensors", lambda mark: safetensors_header(b'{"a":' * 10000)),
    "a tensor beyond the file": (".safetensors", lambda mark: one_tensor(b"F32", b"[1000]", b"[0, 4000]", 0)),
    "a tensor of 1e18 elements": (".safetensors", lambda mark: one_tensor(b"F32", b"[1000000,1000000]", b"[0, 4]", 4)),
    "a dtype that is none": (".safetensors", lambda mark: one_tensor(b"PY", b"[1]", b"[0, 4]", 4)),
    "codes of 8 bits": (".safetensors", lambda mark: one_tensor(b"I8", b"[5, 16]", b"[0, 80]", 80)),
}  # fmt: skip


def packed_as_pkl(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", member)
    return buffer.getvalue()


@pytest.mark.parametrize("fault", BAD_BYTES)
def test_hostile_bytes_are_refused(fault: str, tmp_path: Path) -> None:
    suffix, make = BAD_BYTES[fault]
    mark = tmp_path / "mark"
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(make(mark))
    refused(file, "weights")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pipes_devices_and_holes(suffix: str, tmp_path: Path) -> None:
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    refused(pipe, "pipe")
    device = tmp_path / f"device{suffix}"
    device.symlink_to("/dev/zero")
    refused(device, "device")
    holes = tmp_path / f"holes{suffix}"
    with holes.open("wb") as opened:
        opened.write(b"PK\x03\x04")
        opened.truncate(20 << 30)
    refused(holes, "20 GB|21,474,836,480 bytes")
