"""A program's JSON, looked through before torch reads it: nothing in it may become code.

Note [A program is text that becomes code]
    torch evaluates the expressions of symbolic sizes, compiles guards, puts names into a source that it compiles, and
    imports what the output's structure names. So every text of the program is held to what belongs at its place: a
    name, an operation, an expression, a structure; what has no place here is refused. Guards and traces of the source
    are left out: inputs are checked by :class:`adfify.program.LoadedProgram`, from the metadata.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from adfify.operators import LOOPS, is_allowed
from adfify.printable import printable

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}")
_PATH = re.compile(r"[A-Za-z0-9_]{1,300}(?:\.[A-Za-z0-9_]{1,300}){0,50}")
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d{1,6}")
_VERSION = re.compile(r"[0-9A-Za-z.+<=_-]{1,60}")
_LONGEST_EXPRESSION, _LARGEST_SIZE, _DEEPEST, _MOST_STEPS = 500, 1 << 40, 200, 1024
_CALLS = {
    "Symbol", "Integer", "Add", "Mul", "FloorDiv", "CeilDiv", "Mod", "PythonMod", "Max", "Min", "CleanDiv",
    "IntTrueDiv",
}  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
_IMPORTING = frozenset({"collections.defaultdict"})  # its factory would be imported, by name


class VettingError(ValueError):
    """Something in a program that has no place there; the message says what."""


def harmless(program: Any) -> dict[str, Any]:
    """The program with what is only for people left out.

    Args:
        program: what its JSON holds.

    Raises:
        VettingError: it holds what could run code, open files, or is no program.
    """
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise VettingError("it holds no graph")
    cleaned = _cleaned({**program, "guards_code": []}, 0)
    _vet(cleaned, "program", 0)
    return cleaned  # type: ignore[no-any-return]


def without_sources(program: dict[str, Any]) -> dict[str, Any]:
    """The program without the places in source files that its operations come from: they say where somebody works."""
    return _cleaned(program, 0)  # type: ignore[no-any-return]


def leaves(structure: str) -> int:
    """How many leaves a pytree's JSON has.

    Raises:
        VettingError: it is none, or imports something.
    """
    if not is_structure(structure):
        raise VettingError(f"the structure of its outputs is {_shown(structure)}")

    def count(tree: dict[str, Any]) -> int:
        return 1 if tree["type"] is None else sum(map(count, tree["children_spec"]))

    return count(json.loads(structure)[1])


def _cleaned(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise VettingError("it is nested without end")
    if isinstance(value, dict):
        kept = {key: _cleaned(item, depth + 1) for key, item in value.items() if key != "metadata"}
        return kept | ({"metadata": {}} if "metadata" in value else {})
    return [_cleaned(item, depth + 1) for item in value] if isinstance(value, list) else value


def _vet(value: Any, key: str, depth: int) -> None:
    if isinstance(value, dict):
        if key in _FORBIDDEN and value:
            raise VettingError(f"it holds {key}, which can be any code")
        if value.get("target") in LOOPS and not _is_counted(value):
            raise VettingError("it holds a loop that need not end")
        for name, item in value.items():
            if _PATH.fullmatch(name) is None:
                raise VettingError(f"it holds the name {_shown(name)}")
            _vet(item, name, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _vet(item, key, depth + 1)
    elif isinstance(value, str):
        check = _TEXTS.get(key)
        if check is None or not check(value):
            raise VettingError(f"it holds {_shown(value)} as {key}")
    elif key in _FORBIDDEN and value is not None:
        raise VettingError(f"it holds {key}, which can be any code")
    elif isinstance(value, int) and abs(value) > _LARGEST_SIZE and key not in ("as_int", "as_ints", "max_val"):
        raise VettingError(f"it holds {value} as {key}")


# Note [A loop that ends]
# A loop is only the one that a quadrature writes: `while step < 32`, with `step + 1` as the first of what goes on, and
# nothing in it that writes in place, by which the step could be set back.
def _is_counted(node: dict[str, Any]) -> bool:
    try:
        condition, body = (entry["arg"]["as_graph"]["graph"] for entry in node["inputs"] if "as_graph" in entry["arg"])
        (compared,) = condition["nodes"]
        step, bound = (entry["arg"] for entry in compared["inputs"])
        ends = compared["target"] == "torch.ops.aten.lt.Scalar" and type(bound["as_int"]) is int
        ends = ends and bound["as_int"] <= _MOST_STEPS and step == condition["inputs"][0]
        ends = ends and compared["outputs"] == condition["outputs"]
        (counted,) = (entry for entry in body["nodes"] if entry["outputs"] == body["outputs"][:1])
        step, one = (entry["arg"] for entry in counted["inputs"])
        goes_on = (
            counted["target"] == "torch.ops.aten.add.Tensor" and step == body["inputs"][0] and one == {"as_int": 1}
        )
        return ends and goes_on and not any(_writes(entry["target"]) for entry in body["nodes"])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return False


def _writes(target: str) -> bool:
    name, _, overload = target.rpartition(".")
    return name.endswith("_") or "out" in overload or not target.startswith("torch.ops.aten.")


def _shown(text: str) -> str:
    return printable(repr(text[:80]))


def is_expression(text: str) -> bool:
    """Whether a symbolic size is made of names, whole numbers, + - * // and the like, and nothing else."""
    if len(text) > _LONGEST_EXPRESSION:
        return False
    try:
        return _is_term(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_term(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, _OPERATORS) and _is_term(node.left) and _is_term(node.right)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_term(node.operand)
    if isinstance(node, ast.Constant):
        return type(node.value) is int and abs(node.value) < _LARGEST_SIZE
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[a-z]{1,3}\d{1,6}", node.id) is not None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _CALLS:
        return False
    if node.func.id != "Symbol":
        return not node.keywords and all(map(_is_term, node.args))
    named = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    assumed = all(isinstance(k.value, ast.Constant) and type(k.value.value) is bool for k in node.keywords)
    return named and assumed and _NAME.fullmatch(node.args[0].value) is not None  # type: ignore[attr-defined]


def is_structure(text: str) -> bool:
    """Whether a pytree's JSON imports nothing: its classes are those that pytree knows here, its keys are plain.

    An enumeration among the keys would be imported by its name.
    """
    try:
        version, tree = json.loads(text)
        return version == 1 and _is_tree(tree, 0)
    except (ValueError, TypeError, RecursionError):
        return False


def _is_tree(tree: Any, depth: int) -> bool:
    if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"} or depth > _DEEPEST:
        return False
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list) or not all(_is_tree(child, depth + 1) for child in children):
        return False
    if kind is None:
        return context is None and not children
    return isinstance(kind, str) and kind not in _IMPORTING and isinstance(context, str) and _is_context(context)


def _is_context(text: str) -> bool:
    """The keys of a dictionary, or the name of a class that pytree was told of; no description of an object."""
    try:
        context = json.loads(text)
    except ValueError:
        return _PATH.fullmatch(text) is not None
    values = context if isinstance(context, list) else [context]
    return all(value is None or isinstance(value, (str, int, float, bool)) for value in values)


def _matches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


def _is_name(text: str) -> bool:
    return text == "" or _NAME.fullmatch(text) is not None


def _is_path(text: str) -> bool:
    return text == "" or _PATH.fullmatch(text) is not None


# What a text may be, by the field that holds it; a field that is not here holds none.
_TEXTS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _is_name),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "fqn", "graph", "user_input_name"), _is_path
    ),
    "path_name": _matches(_PAYLOAD),
    "target": is_allowed,
    "expr_str": is_expression,
    "in_spec": is_structure,
    "out_spec": is_structure,
    "as_string": lambda text: len(text) <= 1000,  # written into the source by repr()
    "type": lambda text: text in ("cpu", "meta"),  # of a device
    "torch_version": _matches(_VERSION),
    "verifiers": lambda text: text in ("TRAINING", "ATEN"),
    **dict.fromkeys(("as_float", "as_floats"), lambda text: text in ("Infinity", "-Infinity", "NaN")),
}

_FORBIDDEN = frozenset(
    {"as_custom_obj", "custom_obj", "custom_obj_values", "as_operator", "treespec_namedtuple_fields", "token"}
)


def check_payloads(config: Any) -> None:
    """Look through a weights_config or constants_config: where the bytes of every weight lie.

    Raises:
        VettingError: a pickled weight, or no such records.
    """
    records = config.get("config") if isinstance(config, dict) else None
    if not isinstance(records, dict):
        raise VettingError("it lists no weights")
    for name, record in records.items():
        if not isinstance(record, dict) or not isinstance(record.get("path_name"), str):
            raise VettingError(f"the weight {_shown(name)} has no record")
        if record.get("use_pickle") is not False or not isinstance(record.get("tensor_meta"), dict):
            raise VettingError(f"the weight {_shown(name)} is pickled, which can be any code")
    _vet(config, "config", 0)
