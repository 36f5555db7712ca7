"""State dicts: read safely from files, and put into networks, or an account of why they don't fit."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfify import archives, state_tensors
from adfify.errors import CheckpointError
from adfify.files_on_disk import existing_file
from adfify.pickles import PickleError, check_growth
from adfify.plain_types import plain_types
from adfify.preprocessing import needs
from adfify.printable import first_line, printable
from adfify.state_tensors import State

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th")
"""``.tar`` as in model_best.pth.tar, which no tar program has seen."""

# Where training scripts put the state dict. The averaged weights come first: they are what was evaluated.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN, _LONGEST_KEY = 5, 80
_DEEPEST = 8  # entries within entries


def read_state(path: str | Path) -> tuple[State, str]:
    """The state dict in a file, and where it was found: the file, with the entry of a training checkpoint.

    A pickle is read as weights only, and plain data beside them: code in it never runs.

    Raises:
        CheckpointError: no such file, no checkpoint, or one that holds more than tensors and plain data.
    """
    file = existing_file(path)
    if file.suffix == ".pt2":
        raise CheckpointError(
            f"{printable(file)} is an exported program, not weights; give it alone, in place of the model."
        )
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    entry = ""
    for _ in range(_DEEPEST):  # a dictionary can hold itself
        if state_tensors.is_state(content):
            origin = f"{file}{f' ({entry})' if entry else ''}"
            return state_tensors.checked(content, printable(origin)), origin
        found = None
        if isinstance(content, Mapping):
            found = next((name for name in _ENTRIES if isinstance(content.get(name), Mapping)), None)
        if found is None:
            break
        entry, content = f"{entry}.{found}".removeprefix("."), content[found]
    raise CheckpointError(
        f"{printable(file)} can be read, but holds no state_dict: it is {_described(content)}. A state_dict is a "
        f"dictionary of tensors, by itself or under one of {', '.join(map(repr, _ENTRIES))}; write one with "
        "torch.save(model.state_dict(), path)."
    )


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"of type {type(content).__name__}"
    keys = ", ".join(_key(key) for key in list(content)[:_SHOWN])
    return f"a dictionary with {len(content)} entries ({keys}{' ...' if len(content) > _SHOWN else ''})"


def _key(key: Any) -> str:
    # Of another type its repr could be of any length.
    return printable(repr(key[:_LONGEST_KEY])) if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _read_safetensors(file: Path) -> State:
    safetensors = needs("safetensors")
    try:
        state: State = needs("safetensors.torch").load_file(file)
        return state
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        said = first_line(error)
        raise CheckpointError(f"{printable(file)} is not a safetensors file, or is damaged: {said}") from error


def _read_pickle(file: Path) -> Any:
    if any(name.endswith("constants.pkl") for name in archives.names(file)):
        raise CheckpointError(
            f"{printable(file)} is a TorchScript program, which holds code. Make the network in Python and save its "
            "weights: torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    _refuse_bombs(file)
    try:
        # Only what is not allowed already: at its end, torch's context takes away all that it was given.
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in plain_types() if kind not in allowed]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise nearly any type on foreign bytes
        raise CheckpointError(_why_unreadable(file, error)) from error


# Note [A small file that grows]
# torch writes nothing compressed, but would unpack it. What a pickle makes is counted before it is made, of the bytes
# that torch's own reader takes, for a zip may show another directory to Python's.
_ZIP, _LEGACY_PICKLES = b"PK\x03\x04", 5  # magic number, version, system, content, storages


def _refuse_bombs(file: Path) -> None:
    with file.open("rb") as opened:
        zipped = opened.read(len(_ZIP)) == _ZIP  # by which torch, too, tells them apart
        opened.seek(0)
        try:
            if zipped:
                _refuse_compressed(file)
                check_growth(io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")))
            else:
                check_growth(opened, _LEGACY_PICKLES)
        except PickleError as error:
            raise CheckpointError(f"{printable(file)} is not opened: {error}.") from error
        except CheckpointError:
            raise
        except Exception as error:  # torch and pickletools raise nearly any type on foreign bytes
            raise CheckpointError(_why_unreadable(file, error)) from error


def _refuse_compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                name = printable(entry.filename[:_LONGEST_KEY])
                raise CheckpointError(f"{printable(file)} holds {name} compressed, which torch never writes.")


def _why_unreadable(file: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    odd = isinstance(error, (pickle.UnpicklingError, ValueError)) and "data.pkl" in " ".join(archives.names(file))
    if (refused is not None and _is_pickle(file)) or odd:
        what = refused[1] if refused is not None else "code"
        return (
            f"{printable(file)} holds more than weights: to read it, Python would have to run {what} from the file, "
            "which could be anything, so it is not opened. If you trust where it comes from, make a state_dict of it "
            "once:\n"
            "  content = torch.load(path, weights_only=False)   # runs the code in it\n"
            "  torch.save(content.state_dict(), new_path)       # or content['state_dict'], if it is a dictionary"
        )
    return (
        f"{printable(file)} is not a checkpoint, or is damaged ({type(error).__name__}: "
        f"{str(error).splitlines()[0]:.200}). "
        f"Its first bytes are {file.open('rb').read(8)!r}. torch.save(model.state_dict(), path) writes what is wanted."
    )


def _is_pickle(file: Path) -> bool:
    """Whether torch.save wrote it: a zip with a pickle in it, or, long ago, a pickle (which starts with 0x80)."""
    with file.open("rb") as opened:
        return opened.read(1) == b"\x80" or any(name.endswith("data.pkl") for name in archives.names(file))


def fill(model: nn.Module, state: State, spec: str, origin: str) -> None:
    """Load a state dict into a network, strictly, with wrappers' prefixes taken off.

    Args:
        model: the network; its dtype stays.
        state: the weights, of any floating-point dtype.
        spec: the network's name, for the error.
        origin: the weights' file, for the error.

    Raises:
        CheckpointError: keys or shapes differ; the first five of each, and how many.
    """
    expected = model.state_dict()
    forms = list(_unwrapped(state))
    fitting = next((form for form in forms if _same_keys(form, expected)), None)
    chosen = min(forms, key=lambda form: len(form.keys() ^ expected.keys())) if fitting is None else fitting
    shown = printable(origin)
    different = _difference(chosen, expected, spec, origin)
    if different:
        raise CheckpointError(different)
    state_tensors.refuse_unfit(chosen, expected, shown)
    try:
        model.load_state_dict(chosen, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{shown}: {error}") from error
    state_tensors.refuse_values(model, shown)


def classes_in(state: State, model: nn.Module) -> int | None:
    """The number of outputs of a state dict that is ``model``'s in all else; None if it isn't, or is its own."""
    expected = model.state_dict()
    for form in _unwrapped(state):
        if _same_keys(form, expected):
            return _other_classes(form, expected, _reshaped(form, expected))
    return None


def _reshaped(state: State, expected: State) -> list[str]:
    return [key for key in expected if key in state and state[key].shape != expected[key].shape]


def _same_keys(state: State, expected: State) -> bool:
    return _needed(state.keys() ^ expected.keys()) == set()


def _needed(keys: set[str]) -> set[str]:
    """Without what PyTorch before 1.0 did not write, and load_state_dict does without."""
    return {key for key in keys if not key.endswith("num_batches_tracked")}


def _unwrapped(state: State) -> Iterator[State]:
    """The state dict as it is, and without the prefixes of wrappers, the least changed first.

    Raises:
        CheckpointError: two keys are the same one without the prefixes.
    """
    yield state
    # torch.optim.swa_utils.AveragedModel counts what it has averaged beside `module.`
    current = {key: value for key, value in state.items() if key != "n_averaged"}
    while any(all(key.startswith(prefix) for key in current) for prefix in _WRAPPERS):
        prefix = next(p for p in _WRAPPERS if all(key.startswith(p) for key in current))
        current = _renamed(current, {key: key.removeprefix(prefix) for key in current})
        yield current
    # A submodule that was compiled by itself has the prefix in the middle.
    current = _renamed(current, {key: key.replace("_orig_mod.", "") for key in current})
    yield current
    if all(key.startswith("model.") for key in current):  # a Lightning module, or a wrapper of the user's own
        yield from _unwrapped(_renamed(current, {key: key.removeprefix("model.") for key in current}))


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {names[key]: value for key, value in state.items()}
    if len(renamed) < len(state):
        count = Counter(names.values())
        both = [key for key, name in names.items() if count[name] > 1][:2]
        raise CheckpointError(
            f"the file has two keys for one parameter, {' and '.join(map(printable, both))}: nothing says which one is "
            "right."
        )
    return renamed


def _difference(state: State, expected: State, spec: str, origin: str) -> str:
    """Which keys differ, and what that looks like; ``""`` if none do."""
    missing = [key for key in expected if key in _needed(expected.keys() - state.keys())]
    unexpected = [key for key in state if key not in expected]
    reshaped = _reshaped(state, expected)
    lines = [
        *_listed("missing in the file", missing),
        *_listed("unknown to the network", unexpected),
        *_listed(
            "of another shape",
            [f"{key}: {list(state[key].shape)} in the file, {list(expected[key].shape)} here" for key in reshaped],
        ),
    ]
    if not lines:
        return ""
    classes = None if missing or unexpected else _other_classes(state, expected, reshaped)
    hint = (
        f"Only the number of outputs differs: give num_classes={classes} (--num-classes {classes})."
        if classes is not None
        else "It belongs to another network, or to another variant of this one: check the architecture's name."
    )
    shared = len(state.keys() & expected.keys())
    head = (
        f"{printable(origin)} does not fit {spec}. It has {len(state)} tensors, the network {len(expected)}; "
        f"{shared} names agree:"
    )
    return "\n".join([head, *lines, hint])


def _listed(what: str, keys: list[str]) -> Iterator[str]:
    if keys:
        yield f"  {len(keys)} {what}:"
        yield from (f"    {printable(key)}" for key in keys[:_SHOWN])
        if len(keys) > _SHOWN:
            yield f"    ... and {len(keys) - _SHOWN} more"


def _other_classes(state: State, expected: State, reshaped: list[str]) -> int | None:
    """The file's number of outputs, if that is all that differs: the first size, from the same to the same."""
    sizes = {(state[key].shape[:1], expected[key].shape[:1]) for key in reshaped}
    same_inputs = all(state[key].shape[1:] == expected[key].shape[1:] for key in reshaped)
    modules = {key.rpartition(".")[0] for key in reshaped}
    # A bias alone would make a network of as many outputs, whose weights the file does not hold.
    own = {key for key in expected if key.rpartition(".")[0] in modules}
    # Heads are few (GoogLeNet has three); a network of another width differs in all its layers.
    if len(sizes) != 1 or not same_inputs or len(modules) > 3 or own != set(reshaped):
        return None
    ((given, _),) = sizes
    return int(given[0]) if given else None
