"""The operations that a program from a file may call.

Note [Which operations a file may call]
    A program names its operations by text, which torch looks up in itself: most of what can be found so is a Python
    function that does anything. Allowed are overloads of aten and prims that take tensors, numbers and their kinds, and
    texts that choose between variants ("reflect", "mean"): that leaves out those that open files, print, seed or
    reach into memory by address. Of the private ones, which trust their arguments, only those are allowed that
    torch.export writes. Sizes are computed by Python's own operators, and by those that can't make huge numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

_ARITHMETIC = {
    "_operator": {
        "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt",
        "ge", "and_", "or_", "not_",
    },
    "math": {"ceil", "floor", "trunc", "sqrt"},
    "torch": {"sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum"},
}  # fmt: skip

LOOPS = ("torch.ops.higher_order.while_loop",)
"""Operations that take graphs, which are held to the same list."""

_OVERLOAD = re.compile(r"torch\.ops\.(aten|prims)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")

# torch.export writes these; torch.Tag.core marks those that every backend has.
_PRIVATE = {
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "_unsafe_view", "_unsafe_index", "_convolution",
    "_fft_r2c", "_fft_c2r", "_fft_c2c", "_conj", "_neg_view", "_weight_norm", "_shape_as_tensor",
    "_scaled_dot_product_flash_attention_for_cpu", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
}  # fmt: skip

_KINDS = {
    "Tensor", "int", "float", "bool", "complex", "number", "Scalar", "SymInt", "SymBool", "ScalarType", "Layout",
    "MemoryFormat", "Device", "Generator",
}  # fmt: skip
_WRAPPERS = re.compile(r"(?:List|Optional)\[(.*)\]")
_VARIANTS = {
    "mode", "pad_mode", "padding_mode", "padding", "padding_side", "interpolation", "interpolation_mode",
    "indexing", "reduce", "reduction", "rounding_mode", "equation", "norm", "approximate", "side", "UPLO", "ord",
    "p", "driver", "assert_msg", "msg",
}  # fmt: skip


def is_allowed(target: str) -> bool:
    """Whether a program from a file may call this, by the name that torch.export writes."""
    overload = _OVERLOAD.fullmatch(target)
    if overload is not None:
        return _is_allowed_overload(*overload.groups())
    module, _, name = target.rpartition(".")
    return target in LOOPS or (module in _ARITHMETIC and name in _ARITHMETIC[module])


@functools.cache
def _is_allowed_overload(namespace: str, name: str, overload: str) -> bool:
    found = _found(namespace, name, overload)
    if found is None:
        return False
    if name.startswith("_") and name not in _PRIVATE and torch.Tag.core not in found.tags:
        return False
    schema = found._schema
    arguments = all(_is_plain(str(a.type)) or _is_variant(a.name, str(a.type)) for a in schema.arguments)
    return arguments and all(_is_plain(str(value.type)) for value in schema.returns)


def _found(namespace: str, name: str, overload: str) -> Any:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None or not hasattr(packet, "overloads") or overload not in packet.overloads():
        return None
    found: Callable[..., Any] = getattr(packet, overload)
    return found


def _is_plain(kind: str) -> bool:
    while (wrapped := _WRAPPERS.fullmatch(kind)) is not None:
        kind = wrapped[1]
    return kind in _KINDS


def _is_variant(name: str, kind: str) -> bool:
    return kind in ("str", "Optional[str]") and name in _VARIANTS
