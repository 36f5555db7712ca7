"""Hostile .pt2 files: nothing in them runs, and each is refused by one typed error, or read as the plain data it is.

Every file is what an attacker can make: a saved program with members changed or added and all checksums made anew.
Payloads would make a file, the mark.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adfify import adfify
from adfify.errors import CheckpointError
from adfify.operators import is_allowed
from adfify.preprocessing import Preprocessing
from adfify.program import load, save

Members = dict[str, bytes]
META, PROGRAM = "extra/adfify.json", "models/model.json"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Mark:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def code(mark: Path) -> str:
    return f"__import__('os').mkdir({str(mark)!r})"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Members:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SELU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    path = tmp_path_factory.mktemp("hostile") / "honest.pt2"
    save(adfify(network), path, preprocessing=Preprocessing(input_size=(3, 8, 8)), labels=list("abcde"))
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def sealed(members: Members, root: str = "adfify/", compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose checksums are right."""
    try:
        data = json.loads(members[META])
        if "digest" not in data:
            raise KeyError("digest")
        data["digests"] = {n: hashlib.sha256(c).hexdigest() for n, c in members.items() if n != META}
        data["digest"] = ""
        data["digest"] = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        members = {**members, META: json.dumps(data).encode()}
    except (KeyError, TypeError, ValueError, RecursionError):
        pass  # the metadata itself is the attack
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def changed(members: Members, name: str, change: Callable[[Any], Any]) -> Members:
    data = json.loads(members[name])
    made = change(data)
    return {**members, name: json.dumps(data if made is None else made).encode()}


def walk(data: Any, key: str, value: Any) -> int:
    """Put a value in all places of this name; how many there were."""
    count = 0
    if isinstance(data, dict):
        for name in list(data):
            if name == key:
                data[name] = value
                count += 1
            else:
                count += walk(data[name], key, value)
    elif isinstance(data, list):
        count += sum(walk(entry, key, value) for entry in data)
    return count


def in_program(key: str, text: Callable[[Path], Any]) -> Callable[[Members, Path], Members]:
    def attack(members: Members, mark: Path) -> Members:
        data = json.loads(members[PROGRAM])
        assert walk(data, key, text(mark)) > 0, "the attack has no target"
        return {**members, PROGRAM: json.dumps(data).encode()}

    return attack


def on_node(change: Callable[[dict[str, Any], Path], None], target: str = "") -> Callable[[Members, Path], Members]:
    def attack(members: Members, mark: Path) -> Members:
        data = json.loads(members[PROGRAM])
        nodes = data["graph_module"]["graph"]["nodes"]
        change(next(node for node in nodes if target in node["target"]), mark)
        return {**members, PROGRAM: json.dumps(data).encode()}

    return attack


def targeting(name: str) -> Callable[[Members, Path], Members]:
    return on_node(lambda node, mark: node.update(target=name))


def added(name: str, content: Callable[[Path], bytes]) -> Callable[[Members, Path], Members]:
    return lambda members, mark: {**members, name: content(mark)}


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Mark(str(mark)))


def saved(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Mark(str(mark)), buffer)
    return buffer.getvalue()


def pickled_weight(members: Members, mark: Path) -> Members:
    members = {**members, "data/weights/weight_0": saved(mark)}
    return changed(members, WEIGHTS, lambda data: next(iter(data["config"].values())).update(use_pickle=True))


def constant(name: str, content: Callable[[Path], bytes]) -> Callable[[Members, Path], Members]:
    record = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}

    def attack(members: Members, mark: Path) -> Members:
        members = {**members, f"data/constants/{name}": content(mark)}
        return changed(members, CONSTANTS, lambda data: data["config"].update(c=record))

    return attack


def structure(kind: str, context: Any) -> Callable[[Path], str]:
    leaf = {"type": None, "context": None, "children_spec": []}
    return lambda mark: json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf, leaf]}])


def argument(value: Any, name: str = "") -> dict[str, Any]:
    return {"name": name, "arg": value, "kind": 1}


def given(value: Any, name: Callable[[Path], str] = lambda mark: "") -> Callable[[Members, Path], Members]:
    """One more argument of a node."""
    return on_node(lambda node, mark: node["inputs"].append(argument(value, name(mark))))


ENUM = json.dumps([{"__enum__": True, "fqn": "antigravity:X", "name": "Y"}])
ESCAPED_ENUM = ENUM.replace("__enum__", "\\u005f\\u005fenum__")
FACTORY = {"default_factory_module": "os", "default_factory_name": "mkdir", "dict_context": ["a", "b"]}


def loop(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Members, Path], Members]:
    def on_loop(node: dict[str, Any], mark: Path) -> None:
        condition, body = (entry["arg"]["as_graph"]["graph"] for entry in node["inputs"][:2])
        change(condition, body)

    return on_node(on_loop, "while_loop")


def endless_step(condition: dict[str, Any], body: dict[str, Any]) -> None:
    body["outputs"][0] = body["inputs"][0]


def endless_bound(condition: dict[str, Any], body: dict[str, Any]) -> None:
    condition["nodes"][0]["inputs"][1]["arg"]["as_int"] = 1 << 62


def set_back(condition: dict[str, Any], body: dict[str, Any]) -> None:
    back = copy.deepcopy(condition["nodes"][0])
    back.update(target="torch.ops.aten.sub_.Tensor", name="back", outputs=[{"as_tensor": {"name": "back"}}])
    back["inputs"] = [argument(body["inputs"][0], "self"), argument({"as_int": 1}, "other")]
    body["nodes"].insert(0, back)


CODE = {
    "a pickled weight": pickled_weight,
    "a pickled constant": constant("tensor_0", saved),
    "a custom object": constant("custom_obj_0", pickled),
    "an opaque object": constant("opaque_obj_0", pickled),
    "constants of the old format": added("data/constants/model.pt", saved),
    "sample inputs": added(SAMPLES, saved),
    "sample inputs, a bare pickle": added(SAMPLES, pickled),
    "a second model": added("models/other.json", lambda mark: b"{}"),
    "a compiled library": added("data/aotinductor/model/x.so", lambda mark: b"\x7fELF"),
    "a compiled wrapper": added("data/aotinductor/model/x.cpp", lambda mark: b"int main() {}"),
    "a package of Python": added("code/model.py", lambda mark: code(mark).encode()),
    "a pickle of torch.package": added("model/model.pkl", pickled),
    "a pickle of torch.save": added("data.pkl", pickled),
    "the serialized program of torch 2.7": added("serialized_state_dict.pt", saved),
    "a name that climbs": added("../../mark.py", lambda mark: code(mark).encode()),
    "a size that is code": in_program("expr_str", code),
    "a size that calls": in_program("expr_str", lambda mark: f"Symbol('s0').__class__.mro() or {code(mark)}"),
    "a size in a lambda": in_program("expr_str", lambda mark: f"(lambda: {code(mark)})()"),
    "a size in a comprehension": in_program("expr_str", lambda mark: f"[{code(mark)} for x in (1,)][0]"),
    "a size of text": in_program("expr_str", lambda mark: f"f'{{{code(mark)}}}'"),
    "a size that is a power": in_program("expr_str", lambda mark: "9**9**9**9"),
    "a size that is a long number": in_program("expr_str", lambda mark: "9" * 400),
    "a size nested without end": in_program("expr_str", lambda mark: "(" * 5000 + "1" + ")" * 5000),
    "a size of a name of sympy": in_program("expr_str", lambda mark: "sympify"),
    "a symbol that is code": in_program("expr_str", lambda mark: f'Symbol("{code(mark)}")'),
    "a guard": in_program("guards_code", lambda mark: [code(mark)]),
    "a name that is code": in_program("name", lambda mark: f"a={code(mark)}"),
    "argument names": in_program("forward_arg_names", lambda mark: ["a", f"b={code(mark)}"]),
    "an argument's keyword": given({"as_int": 1}, lambda mark: f"x=1,y={code(mark)}"),
    "an enumeration in the input's structure": in_program("in_spec", structure("builtins.dict", ENUM)),
    "an enumeration in the output's structure": in_program("out_spec", structure("builtins.dict", ESCAPED_ENUM)),
    "a factory in the output's structure": in_program("out_spec", structure("collections.defaultdict", FACTORY)),
    "metadata of a node": in_program("metadata", lambda mark: {"stack_trace": code(mark)}),
    "an operator as an argument": given({"as_operator": "torch.load"}),
    "an object as an argument": given({"as_custom_obj": {"name": "a", "class_fqn": "os.system"}}),
    "a loop whose step stays": loop(endless_step),
    "a loop of many steps": loop(endless_bound),
    "a loop that is set back": loop(set_back),
} | {
    f"the target {name}": targeting(name)
    for name in (
        "torch.load", "torch.hub.load", "torch.serialization.os.mkdir", "torch.ops.aten.save.default",
        "torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Storage", "torch.ops.aten.warn.default",
        "torch.ops.aten.manual_seed.default", "torch.ops.load_library", "torch.ops.higher_order.cond",
        "torch.ops.mylib.evil.default", "torch._C._jit_eval", "torch.utils.cpp_extension.load",
        "_operator.attrgetter",
        "_operator.pow", "_operator.call", "math.factorial", "math.__loader__.load_module", "#pkg:evil", "os.system",
        "builtins.eval", "torch.ops.aten.relu.default.__class__", "torch.ops.aten.add", "",
    )
}  # fmt: skip


@pytest.mark.parametrize("attack", CODE)
def test_code_is_not_run(honest: Members, attack: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = tmp_path / "hostile.pt2"
    file.write_bytes(sealed(CODE[attack](honest, mark)))
    before = set(tmp_path.iterdir())
    harmless = ("sample inputs", "sample inputs, a bare pickle", "a guard", "metadata of a node")
    if attack in harmless:  # left out, and the rest is what was saved
        x = torch.randn(2, 3, 8, 8)
        load(file)(x)
    else:
        with pytest.raises(CheckpointError) as refused:
            load(file)
        assert len(str(refused.value)) < 1000
        assert "Traceback" not in str(refused.value)
    assert set(tmp_path.iterdir()) == before
    assert not mark.exists()


def test_the_payloads_would_work(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "a"))
    torch.load(io.BytesIO(saved(tmp_path / "b")), weights_only=False)
    eval(code(tmp_path / "c"))
    assert all((tmp_path / name).exists() for name in "abc")


def metadata(key: str, value: Any) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        data = json.loads(members[META])
        *path, last = key.split(".")
        inner = data
        for step in path:
            inner = inner[int(step) if isinstance(inner, list) else step]
        inner[int(last) if isinstance(inner, list) else last] = value
        return {**members, META: json.dumps(data).encode()}

    return change


def raw(text: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, META: text}


def deep() -> bytes:
    return b'{"format": 2, "labels": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


IMPORTED = structure("builtins.dict", ENUM)(Path())
MADE = structure("collections.defaultdict", FACTORY)(Path())
ENTRY = {"name": "x", "uncertain": True, "shape": [None, 3, 8, 8], "dtype": "float32"}
BAD_METADATA = {
    "no JSON": (raw(b"hello"), "no JSON"),
    "no text": (raw(b"\xff\xfe\x00"), "no JSON"),
    "a list": (raw(b"[]"), "named fields"),
    "null": (raw(b"null"), "named fields"),
    "nested without end": (raw(deep()), "nested without end"),
    "a key twice": (raw(b'{"format": 2, "format": 2}'), "twice"),
    "a number of a million digits": (raw(b'{"format": ' + b"9" * 1_000_000 + b"}"), "no JSON"),
    "nothing": (raw(b""), "no JSON"),
    "a newer format": (metadata("format", 99), "newer adfify"),
    "an older format": (metadata("format", 1), "convert the model again"),
    "a format of text": (metadata("format", "two"), "format"),
    "batch size 0": (metadata("batch_size", 0), "batch_size"),
    "batch size 2e9": (metadata("batch_size", 2_000_000_000), "batch_size"),
    "batch size -1": (metadata("batch_size", -1), "batch_size"),
    "batch size of text": (metadata("batch_size", "8"), "batch_size"),
    "batch size true": (metadata("batch_size", True), "batch_size"),
    "a batch size that is none of the program's": (metadata("batch_size", 7), "batch"),
    "noise NaN": (metadata("noise_variance", float("nan")), "NaN"),
    "noise infinite": (metadata("noise_variance", float("inf")), "Infinity"),
    "noise of text": (metadata("noise_variance", "1e-3"), "noise_variance"),
    "noise negative": (metadata("noise_variance", -1.0), "noise_variance"),
    "noise of 400 digits": (metadata("noise_variance", 10**399), "noise_variance"),
    "no inputs": (metadata("inputs", []), "inputs"),
    "more inputs than the program": (metadata("inputs", [ENTRY] * 2), "inputs"),
    "inputs that are no list": (metadata("inputs", {"a": 1}), "inputs"),
    "an input's name that is code": (metadata("inputs.0.name", "x=1"), "name"),
    "an input's dtype": (metadata("inputs.0.dtype", "load"), "dtype"),
    "an input of other sizes": (metadata("inputs.0.shape", [None, 3, 9, 9]), "inputs"),
    "an input of huge sizes": (metadata("inputs.0.shape", [None, 3, 1 << 23, 1 << 23]), "bytes"),
    "an input of negative sizes": (metadata("inputs.0.shape", [None, -3, 8, 8]), "shape"),
    "an input of text": (metadata("inputs.0.shape", "3,8,8"), "shape"),
    "outputs without a structure": (metadata("outputs.structure", ""), "structure"),
    "outputs that are imported": (metadata("outputs.structure", IMPORTED), "structure"),
    "outputs by a factory": (metadata("outputs.structure", MADE), "structure"),
    "more outputs than the structure has": (metadata("outputs.uncertain", [True, True]), "uncertain"),
    "crop_pct 1e-6": (metadata("preprocessing.crop_pct", 1e-6), "crop_pct"),
    "crop_pct 0": (metadata("preprocessing.crop_pct", 0), "crop_pct"),
    "a resize of 1e9": (metadata("preprocessing.resize_size", 10**9), "resize"),
    "a picture of 1e9": (metadata("preprocessing.input_size", [3, 10**9, 8]), "input_size"),
    "a picture of two sizes": (metadata("preprocessing.input_size", [3, 8]), "input_size"),
    "std 0": (metadata("preprocessing.std", [0.0, 1.0, 1.0]), "std"),
    "an interpolation that is none": (metadata("preprocessing.interpolation", "magic"), "interpolation"),
    "a library that is none": (metadata("preprocessing.library", "os"), "library"),
    "labels of numbers": (metadata("labels", [1, 2, 3, 4, 5]), "labels"),
    "a label of a megabyte": (metadata("labels", ["x" * (1 << 20)] * 5), "labels"),
    "labels that are no list": (metadata("labels", {"a": "b"}), "labels"),
    "a plan of text": (metadata("plan", ["conv"]), "plan"),
    "a field more": (metadata("evil", 1), "evil"),
    "versions missing": (metadata("versions", {}), "versions"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_METADATA)
def test_metadata_is_data(honest: Members, fault: str, tmp_path: Path) -> None:
    change, named = BAD_METADATA[fault]
    file = tmp_path / "hostile.pt2"
    file.write_bytes(sealed(change(honest)))
    with pytest.raises(CheckpointError, match=named) as refused:
        load(file)
    assert len(str(refused.value)) < 1000


def on_tensor(**meta: Any) -> Callable[[Members], bytes]:
    def change(data: Any) -> None:
        next(iter(data["config"].values()))["tensor_meta"].update(meta)

    return lambda members: sealed(changed(members, WEIGHTS, change))


def zeros_of(size: int) -> Callable[[Members], bytes]:
    """A program that makes 4 * size bytes out of nothing."""

    def change(node: dict[str, Any], mark: Path) -> None:
        node["target"] = "torch.ops.aten.full.default"
        node["inputs"] = [
            {"name": "size", "arg": {"as_ints": [size]}, "kind": 1},
            {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1},
        ]

    return lambda members: sealed(on_node(change, "aten.linear.default")(members, Path()))


def gaps(members: Members) -> bytes:
    """Ten elements that lie 8 GB apart."""

    def change(node: dict[str, Any], mark: Path) -> None:
        sizes = {"size": [2, 5], "stride": [1 << 33, 1]}
        node["target"] = "torch.ops.aten.empty_strided.default"
        node["inputs"] = [argument({"as_ints": value}, name) for name, value in sizes.items()]

    return sealed(on_node(change, "aten.linear.default")(members, Path()))


def beyond(members: Members) -> bytes:
    """A view of what is not there, which only shows where there are elements."""

    def change(node: dict[str, Any], mark: Path) -> None:
        sizes = {"size": [1, 5], "stride": [1, 1]}
        node["target"] = "torch.ops.aten.as_strided.default"
        given = [argument({"as_ints": value}, name) for name, value in sizes.items()]
        node["inputs"] = [node["inputs"][0], *given, argument({"as_int": 1 << 33}, "storage_offset")]
        node["inputs"][0]["name"] = "self"

    return sealed(on_node(change, "aten.linear.default")(members, Path()))


def test_a_view_beyond_its_tensor_is_one_error(honest: Members, tmp_path: Path) -> None:
    file = tmp_path / "hostile.pt2"
    file.write_bytes(beyond(honest))
    with pytest.raises(CheckpointError, match=r"can't be run|not opened"):
        load(file)(torch.randn(1, 3, 8, 8))


def twice(members: Members) -> bytes:
    buffer = io.BytesIO(sealed(members))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"adfify/{PROGRAM}", b"{}")
    return buffer.getvalue()


def without(name: str) -> Callable[[Members], bytes]:
    return lambda members: sealed({key: content for key, content in members.items() if key != name})


def bomb(members: Members) -> bytes:
    return sealed({**members, "data/weights/weight_999": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED)


DAMAGED: dict[str, Callable[[Members], bytes]] = {
    "half of it": lambda members: sealed(members)[: len(sealed(members)) // 2],
    "its end": lambda members: sealed(members)[-2000:],
    "compressed": lambda members: sealed(members, compression=zipfile.ZIP_DEFLATED),
    "a zip bomb": bomb,
    "a member twice": twice,
    "no weights": without("data/weights/weight_0"),
    "no program": without(PROGRAM),
    "no weights config": without(WEIGHTS),
    "no version": without("archive_version"),
    "another version": lambda members: sealed({**members, "archive_version": b"99"}),
    "a program that is no JSON": lambda members: sealed({**members, PROGRAM: b"import os"}),
    "a program of lists": lambda members: sealed({**members, PROGRAM: b"[]"}),
    "a program nested without end": lambda members: sealed({**members, PROGRAM: b"[" * 100_000}),
    "an empty program": lambda members: sealed({**members, PROGRAM: b'{"graph_module": {}}'}),
    "weights that are no JSON": lambda members: sealed({**members, WEIGHTS: b"\xff"}),
    "weights without records": lambda members: sealed({**members, WEIGHTS: b'{"config": {"a": 1}}'}),
    "a tensor beyond its bytes": on_tensor(sizes=[{"as_int": 1 << 30}]),
    "a tensor of negative sizes": on_tensor(sizes=[{"as_int": -4}]),
    "a tensor before its bytes": on_tensor(storage_offset={"as_int": -8}),
    "a tensor of no dtype": on_tensor(dtype=999),
    "a tensor with other strides": on_tensor(strides=[{"as_int": 1 << 50}] * 4),
    "4 TB of ones": zeros_of(1 << 40),
    "4 GB of ones": zeros_of(1 << 30),
    "ten elements 8 GB apart": gaps,
    "a text file": lambda members: b"hello\n" * 100,
    "zeros": lambda members: bytes(1000),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_files_are_refused(honest: Members, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.pt2"
    file.write_bytes(DAMAGED[fault](honest))
    with pytest.raises(CheckpointError) as refused:
        load(file)
    assert len(str(refused.value)) < 1000


def test_every_flipped_bit_is_seen(honest: Members, tmp_path: Path) -> None:
    """Of random flips none gives other numbers: the file is refused, or the flip is where nothing is read."""
    content = sealed(honest)
    file = tmp_path / "flipped.pt2"
    file.write_bytes(content)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load(file)(x)
    places = torch.randint(len(content) * 8, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    refused = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            got = load(file)(x)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(got.mean, expected.mean)
            assert torch.equal(got.variance, expected.variance)
    assert refused > len(places) * 0.9


def test_the_same_network_gives_the_same_bytes_and_says_nothing_of_its_maker(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adf = adfify(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval())
    x = torch.full((1, 4), 0.123456)
    one, two = (save(adf, tmp_path / name, example_inputs=x).read_bytes() for name in ("one.pt2", "two.pt2"))
    assert one == two
    assert str(Path(__file__).parent.parent).encode() not in one
    assert x.numpy().tobytes() not in one


@pytest.mark.parametrize("name", ["__and__", "__or__", "__xor__"])
def test_operators_on_masks_are_allowed(name: str) -> None:
    """torch.export writes `a & b` so."""
    assert is_allowed(f"torch.ops.aten.{name}.Tensor")


def test_trusted_files_say_what_is_skipped(honest: Members, tmp_path: Path) -> None:
    file = tmp_path / "others.pt2"
    file.write_bytes(sealed({**honest, "extra/notes.txt": b"by others"}))
    with pytest.raises(CheckpointError, match=r"notes\.txt.*trust=True"):
        load(file)
    with pytest.warns(UserWarning, match="checksums.*are not checked, and code in it may run"):
        program = load(file, trust=True)
    assert program(torch.randn(1, 3, 8, 8)).mean.shape == (1, 5)


def test_pipes_devices_and_holes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pt2"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="pipe"):
        load(pipe)
    device = tmp_path / "device.pt2"
    device.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="device"):
        load(device)
    holes = tmp_path / "holes.pt2"
    with holes.open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(CheckpointError, match="says that it has 21,474,836,480 bytes"):
        load(holes)
