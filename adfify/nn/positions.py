"""What operations return beside the elements that they choose: where those lie, which is random."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from adfify.errors import InputError
from adfify.moments import Moments
from adfify.nn.structural import SOURCE
from adfify.registry import Uncertain, case, register


class Positions:
    """Where the chosen elements lie: random, and no Gaussian variable, so that whatever asks for it is refused.

    A plan refuses it at conversion: see :mod:`adfify.chosen`. What calls a rule itself is stopped here.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InputError(
            "the position of the largest or smallest of several uncertain elements is itself uncertain, and has no "
            "mean and variance; of what torch.max or max_pool returns, use the values only."
        )


class Chosen(NamedTuple):
    """What torch.max over one dimension, torch.sort, torch.topk ... return."""

    values: Moments
    indices: Positions


class Range(NamedTuple):
    """What torch.aminmax returns."""

    min: Moments
    max: Moments


@register(
    ".values", family="structural", exact=True, source=SOURCE,
    cases=[case(torch.return_types.max((Uncertain((2, 3)), torch.zeros(2, 3))))],  # type: ignore[arg-type]
)  # fmt: skip
def values_of(x: Any) -> Moments:
    return x.values  # type: ignore[no-any-return]


@register(
    ".min", family="structural", exact=True, source=SOURCE,
    cases=[case(torch.return_types.aminmax((Uncertain((2, 3)), Uncertain((2, 3)))))],  # type: ignore[arg-type]
)  # fmt: skip
def least_of(x: Any) -> Moments:
    return x.min  # type: ignore[no-any-return]


@register(
    ".max", family="structural", exact=True, source=SOURCE,
    cases=[case(torch.return_types.aminmax((Uncertain((2, 3)), Uncertain((2, 3)))))],  # type: ignore[arg-type]
)  # fmt: skip
def largest_of(x: Any) -> Moments:
    return x.max  # type: ignore[no-any-return]
