"""How large a program from a file grows, found without doing the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from adfify.exporting import Input
from adfify.printable import first_line, printable
from adfify.silence import quiet

LARGEST = 1 << 29
"""Bytes of one result, for one batch of the smallest size."""


_SAME = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default)


class SizeError(ValueError):
    """A program that does not fit into memory, or does not fit its own description."""


class _Sizes(fx.Interpreter):
    """Runs a program on tensors that have sizes and no elements."""

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """One operation; of a loop one turn, whose sizes are those of all."""
        if target in _SAME:  # of a constant, which has its elements
            return args[0]
        if target is torch.ops.higher_order.while_loop:
            _, body, carried, given = args
            return _Sizes(cast(fx.GraphModule, body)).run(*cast(Any, carried), *cast(Any, given))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """One operation.

        Raises:
            SizeError: its result is larger than any that a network of ours has.
        """
        result = super().run_node(n)
        for leaf in pytree.tree_leaves(result):
            size = _bytes(leaf) if isinstance(leaf, Tensor) else 0
            if size > LARGEST:
                raise SizeError(f"{printable(n.name)} in it makes {size:,} bytes, and at most {LARGEST:,} are allowed")
        return result


def check_sizes(program: nn.Module, inputs: Sequence[Input], batch: int) -> None:
    """Run a program without elements on inputs of its own description.

    Args:
        program: of plain tensors, a mean and a variance for every uncertain input.
        inputs: what it takes.
        batch: the batch size, where that is open.

    Raises:
        SizeError: a result is larger than `LARGEST`, or the program can't be run on such inputs.
    """
    if not isinstance(program, fx.GraphModule):
        raise SizeError(f"it is a {type(program).__name__}, and should be a graph")
    taken = sum(node.op == "placeholder" for node in program.graph.nodes)
    described = sum(2 if entry.uncertain else 1 for entry in inputs)
    if taken != described:
        raise SizeError(f"its program takes {taken} tensors, and its inputs are said to be {described}")
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            tensors = [tensor for entry in inputs for tensor in _empty(entry, batch)]
            _Sizes(program, garbage_collect_values=True).run(*tensors)
        except SizeError:
            raise
        except Exception as error:  # torch raises nearly any type here
            said = f"{type(error).__name__}: {first_line(error)}"
            raise SizeError(f"its program does not take its own inputs: {said}") from error


def _bytes(tensor: Tensor) -> int:
    """Of its elements, or of what lies between them, where strides leave gaps."""
    elements = tensor.numel() * tensor.element_size()
    return max(elements, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else elements


def _empty(entry: Input, batch: int) -> list[Tensor]:
    sizes = [batch if size is None else size for size in entry.shape]
    mean = torch.empty(sizes, dtype=entry.torch_dtype)
    # A variance has no less than float32.
    return [mean, mean.to(torch.promote_types(mean.dtype, torch.float32))] if entry.uncertain else [mean]
