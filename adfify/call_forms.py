"""The forms in which an operation may be called, brought into the one in which its rule is called.

Note [One form of a call]
``torch.sum(input=x, axis=1)``, ``x.sum((1,))``, ``x.flip(0, 1)``: torch takes a call in many forms, and a rule is one
Python function. A traced call is therefore brought into one form, which torch takes as well: the first argument stands
first, numpy's names are torch's (``axis`` is ``dim``), and sizes given one by one are one tuple. Where the rule calls
an argument otherwise than torch does (``swapaxes(x, axis0=0, axis1=1)``), it is given by position, with torch's own
defaults in the gaps. The arguments are those of torch's own schema; nothing is inferred from values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from adfify.registry import Target
from adfify.signatures import parameter_at

# torch's own table (numpy_compatibility_arg_names in python_arg_parser.cpp).
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One argument of the original.

    Attributes:
        name: as Python calls it; ``""`` where it has no name there (an operator's operand).
        default: or REQUIRED.
        keyword: whether it is given by keyword only.
        kind: the kind of its type in torch's schema (``"ListType"``, ``"TensorType"``), ``""`` where there is none.
        optional: whether it may be None.
    """

    name: str
    default: Any = REQUIRED
    keyword: bool = False
    kind: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Form:
    """One signature of the original: its arguments in order.

    Attributes:
        arguments: those that are given by position come first.
        schema: whether it is torch's own, whose calls are parsed by torch.
        sizes: whether the one list of numbers after the first argument may be given number by number.
    """

    arguments: tuple[Argument, ...]
    schema: bool = False
    sizes: bool = False

    @property
    def positional(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if not argument.keyword)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call fits: every argument is known, none is given twice, none is lacking."""
        places = self.positional
        if len(args) > len(places):
            return False
        given = dict(zip([argument.name for argument in places], args, strict=False))
        rest = {argument.name: argument for argument in self.arguments[len(args) :]}
        if any(name not in rest for name in kwargs):
            return False
        given.update(kwargs)
        return all(
            _fits(argument, given[argument.name]) if argument.name in given else argument.default is not REQUIRED
            for argument in self.arguments
        )


def normalise(node: fx.Node, target: Target) -> None:
    """Bring the call of a traced node into the one form. See Note [One form of a call]."""
    if node.op not in ("call_function", "call_method", "call_module") or node.target is getattr:
        return
    if node.op == "call_method" and node.target in _DEVICES:
        _as_move(node)
        target = "to"
    forms = forms_of(target)
    args, kwargs = _packed(node.args, forms), dict(node.kwargs)
    if any(form.schema for form in forms):
        names = {argument.name for form in forms for argument in form.arguments}
        kwargs = {name if name in names else _NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
    node.args, node.kwargs = args, kwargs
    if not args and kwargs:
        first = next((form.arguments[0] for form in forms if form.takes((), kwargs)), None)
        if first is not None and first.name in kwargs and not first.keyword:
            node.args, node.kwargs = (kwargs.pop(first.name),), kwargs


# Methods that name their kind of device: they can't even be called where torch has none, and `to` can be tested.
_DEVICES = ("cuda", "xpu", "ipu", "hpu", "mtia")


def _as_move(node: fx.Node) -> None:
    """``x.cuda(1)`` as ``x.to("cuda:1")``."""
    kind = str(node.target)
    given = dict(zip(("device", "non_blocking", "memory_format"), node.args[1:], strict=False)) | dict(node.kwargs)
    device = given.pop("device", None)
    if device is None:
        device = torch.device(kind)
    elif isinstance(device, int):
        device = torch.device(kind, device)
    node.target, node.args, node.kwargs = "to", (node.args[0], device), given


def _packed(args: tuple[Any, ...], forms: tuple[Form, ...]) -> tuple[Any, ...]:
    """``x.flip(0, 1)`` as ``x.flip((0, 1))``."""
    rest = args[1:]
    if not any(form.sizes for form in forms) or not rest:
        return args
    numbers = all(isinstance(value, (int, fx.Node)) and not isinstance(value, bool) for value in rest)
    # A single node may be the whole list: torch takes it as it is.
    return (args[0], tuple(rest)) if numbers and not (len(rest) == 1 and isinstance(rest[0], fx.Node)) else args


def adapted(
    args: tuple[Any, ...], kwargs: dict[str, Any], target: Target, signature: inspect.Signature
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of the original as its rule takes it: by position or by name, whichever means the same to both.

    Args:
        args, kwargs: a call in the one form.
        target: the original.
        signature: the rule's.

    Returns:
        Arguments that the original takes as well. Where there are none they are as given, and don't bind.
    """
    form = next((form for form in forms_of(target) if form.takes(args, kwargs)), None)
    if form is None:
        return args, kwargs
    args, kwargs = _without_defaults(args, kwargs, signature, form)
    for place, argument in enumerate(form.positional[: len(args)]):
        if not _means(signature, place, argument, form) and not (place == 0 and isinstance(target, str)):
            # From here on only names mean the same to both.
            names = [later.name for later in form.positional[place : len(args)]]
            return args[:place], {**dict(zip(names, args[place:], strict=True)), **kwargs}
    return _by_position(args, kwargs, target, signature, form)


def _without_defaults(
    args: tuple[Any, ...], kwargs: dict[str, Any], signature: inspect.Signature, form: Form
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call without torch's own defaults written out, where the rule has no such argument."""
    defaults = {argument.name: argument.default for argument in form.arguments}
    short = args
    while short and parameter_at(signature, len(short) - 1) is None:
        if not _equal(short[-1], form.positional[len(short) - 1].default):
            return args, kwargs
        short = short[:-1]
    movable = {argument.name for place, argument in enumerate(form.positional) if parameter_at(signature, place)}
    known = {
        name: value
        for name, value in kwargs.items()
        if parameter_at(signature, name) is not None or name in movable or not _equal(value, defaults[name])
    }
    return short, known


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, fx.Node) and bool(value == default)


def _means(signature: inspect.Signature, place: int, argument: Argument, form: Form) -> bool:
    """Whether a rule's parameter at a place is that argument of the original, and not another one."""
    here = parameter_at(signature, place)
    if here is None:
        return parameter_at(signature, argument.name) is None
    others = {other.name for other in form.arguments} - {argument.name}
    return here.kind is here.VAR_POSITIONAL or here.name not in others


def _by_position(
    args: tuple[Any, ...], kwargs: dict[str, Any], target: Target, signature: inspect.Signature, form: Form
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the rule calls by another name is moved to its position."""
    longer, rest = list(args), dict(kwargs)
    while unknown := [name for name in rest if parameter_at(signature, name) is None]:
        later = form.positional[len(longer) :]
        if not {argument.name for argument in later}.issuperset(unknown) or _by_keyword(target) & set(unknown):
            return args, kwargs
        if later[0].name not in rest and later[0].default is REQUIRED:
            return args, kwargs
        if not _means(signature, len(longer), later[0], form):
            return args, kwargs
        longer.append(rest.pop(later[0].name, later[0].default))
    return tuple(longer), rest


def _by_keyword(target: Target) -> frozenset[str]:
    """What any signature of an operation takes by keyword only: aten's order is not Python's there (add's alpha)."""
    return frozenset(argument.name for form in forms_of(target) for argument in form.arguments if argument.keyword)


@functools.lru_cache(4096)
def forms_of(target: Target) -> tuple[Form, ...]:
    """The signatures of an operation; none where neither Python nor torch knows them."""
    found = _plain(target)
    if isinstance(target, type) and not issubclass(target, nn.Module):
        return ()  # a record, which a model returns its outputs in
    if isinstance(target, type):
        return _of_python(target.forward, skip=1)  # type: ignore[attr-defined]
    if isinstance(found, torch._ops.OpOverload):
        return (_of_schema(found._schema, method=False),)
    if isinstance(found, torch._ops.OpOverloadPacket):
        return tuple(_of_schema(getattr(found, name)._schema, method=False) for name in found.overloads())  # type: ignore[no-untyped-call]
    if inspect.isfunction(found):
        return _of_python(found)
    name = target if isinstance(target, str) else getattr(found, "__name__", "")
    if not isinstance(target, str) and not _is_torch_s(found):
        return ()
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    method = isinstance(target, str)
    return tuple(_of_schema(schema, method) for schema in schemas if _is_python_s(schema))


def _plain(target: Target) -> Any:
    """The object behind a target; of torch's functions that are two, with indices and without, the latter."""
    found = getattr(torch.Tensor, target, None) if isinstance(target, str) else target
    if inspect.isfunction(found) and {"if_true", "if_false"} <= set(found.__code__.co_freevars):
        found = inspect.getclosurevars(found).nonlocals["if_false"]
    return found


_HOMES = (torch, torch._C, *[getattr(torch._C, name) for name in ("_nn", "_linalg", "_special", "_fft")])


def _is_torch_s(function: Any) -> bool:
    """Whether a builtin is one that torch generates from its schemas, and not another of the same name."""
    name = getattr(function, "__name__", "")
    return any(getattr(home, name, None) is function for home in _HOMES)


def _is_python_s(schema: Any) -> bool:
    """Whether Python has this signature: those on lists and numbers alone are TorchScript's."""
    if schema.overload_name.startswith("prim_") or schema.overload_name.endswith("hacked_twin"):
        return False
    return any("Tensor" in str(argument.type) for argument in schema.arguments)


def _of_python(function: Callable[..., Any], skip: int = 0) -> tuple[Form, ...]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):
        return ()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return ()
    return (Form(tuple(Argument(p.name, p.default, p.kind is p.KEYWORD_ONLY, optional=True) for p in parameters)),)


def _of_schema(schema: Any, method: bool) -> Form:
    arguments = [_argument(argument) for argument in schema.arguments]
    if method:  # what it is a method of comes first: Tensor.where
        arguments.sort(key=lambda argument: argument.name != "input")
    places = [argument for argument in arguments if not argument.keyword]
    return Form(tuple(arguments), True, method and len(places) == 2 and places[1].kind == "ListType")


def _argument(argument: Any) -> Argument:
    kind, inner = argument.type.kind(), argument.type
    optional = kind == "OptionalType"
    if optional:
        inner = argument.type.getElementType()
        kind = inner.kind()
    if kind == "ListType" and argument.N is not None:
        kind = "ListOrOneType"  # int[1] also takes a number
    default = argument.default_value if argument.has_default_value() else REQUIRED
    name = "input" if argument.name == "self" else argument.name
    return Argument(name, default, argument.kwarg_only, kind, optional)


_NUMBERS = frozenset({"IntType", "SymIntType", "FloatType", "NumberType", "TensorType", "ListOrOneType"})


def _fits(argument: Argument, value: Any) -> bool:
    """Whether a constant of the graph may be given for an argument; of a node nothing is known."""
    kind = argument.kind
    if not kind or isinstance(value, fx.Node):
        return True
    if value is None:
        return argument.optional
    if isinstance(value, bool):
        return kind in ("BoolType", "NumberType", "TensorType")
    if isinstance(value, int):
        return kind in _NUMBERS
    if isinstance(value, float):
        return kind in ("FloatType", "NumberType", "TensorType")
    if isinstance(value, (list, tuple)):
        return kind in ("ListType", "ListOrOneType")
    if isinstance(value, str):
        return kind in ("StringType", "DeviceObjType")
    return kind not in ("BoolType", "FloatType", "StringType")


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes in an argument, however nested in lists, dictionaries and slices."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    yield from found
