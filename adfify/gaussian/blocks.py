"""Elementwise rules on the CPU, a part of the tensor at a time.

Note [Blocks that stay in the cache]
    A rule is some tens to hundreds of operations on every element. Called on a whole tensor, each of them reads its
    operands from memory and writes its result back there, and that is what takes the time, not the arithmetic. On parts
    that fit into the cache they run several times faster, with the same results, bit for bit. A compiler does this by
    itself, and a GPU has other limits; where gradients are recorded everything is kept anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor, nn

P = ParamSpec("P")
Pair = tuple[Tensor, Tensor]

_BLOCK = 1 << 16  # elements per thread: half of it costs the same with one, but two would wait for each other more


def readable(*tensors: Tensor) -> bool:
    """Whether all are plain numbers on the CPU that nothing traces, maps or differentiates: they may be looked at."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not recorded and all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)


def in_blocks(rule: Callable[P, Pair]) -> Callable[P, Pair]:
    """Evaluate an elementwise ``rule`` block by block where that is faster: Note [Blocks that stay in the cache]."""

    @functools.wraps(rule)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Pair:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        # The number of threads comes second: torch.compile can't trace it.
        if not readable(*tensors) or max(x.numel() for x in tensors) <= (size := _BLOCK * torch.get_num_threads()):
            return rule(*args, **kwargs)
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))  # type: ignore[no-untyped-call]
        order = _order(next((x for x in tensors if x.shape == shape), tensors[0].expand(shape)))
        blocks = {id(x): torch.split(_flat(x, shape, order), size) for x in tensors if x.numel() > 1}
        count = len(next(iter(blocks.values())))
        blocks |= {id(x): (x.reshape(()),) * count for x in tensors if x.numel() == 1}

        def part(value: object, k: int) -> object:
            return blocks[id(value)][k] if isinstance(value, Tensor) else value

        outputs: list[Tensor] = []
        for k in range(count):
            block = rule(*[part(a, k) for a in args], **{n: part(a, k) for n, a in kwargs.items()})  # type: ignore[arg-type]
            outputs = outputs or [x.new_empty(shape.numel()) for x in block]
            for whole, x in zip(outputs, block, strict=True):  # at once, while it is in the cache
                whole.narrow(0, k * size, x.numel()).copy_(x)
        mean, variance = (_unflat(x, shape, order) for x in outputs)
        return mean, variance

    return wrapper


def _order(x: Tensor) -> list[int]:
    """The dimensions as they lie in memory, outermost first."""
    return sorted(range(x.dim()), key=lambda d: (-x.stride()[d], d))


def _flat(x: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    return x.expand(shape).permute(order).reshape(-1)


def _unflat(x: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.view([shape[d] for d in order]).permute(inverse)
