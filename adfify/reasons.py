"""Why an operation has no rule, and what to write instead, where that can be said."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adfify import chosen, tracing
from adfify.mask_kinds import SHAPE
from adfify.registry import names_of

_NUMBER = "its result is a Python number, which has no variance; compute with the tensor instead"
_WHOLE = "it takes whole numbers; give example_inputs=(...), so that they are known to be certain"
_PLACE = (
    "which element it is, is uncertain, and a position has no mean and variance; take the value: torch.amax, torch.amin"
)
_SHAPED = ("nonzero", "argwhere", "masked_select", "count_nonzero", "unique", "nonzero_static")
_PLACES = ("argmax", "argmin", "argsort", "searchsorted", "bucketize")
_PACKED = "packed sequences have no rule, for their batch changes from step to step; give padded ones of one length"
_POLES = (
    "it has poles, next to which no Gaussian input leaves it a mean or a variance; give torch.sin(x) and torch.cos(x) "
    "instead, or x itself"
)
_ANGLE = (
    "an angle jumps by a whole turn where the vector crosses the negative axis, and has no rule; give its cosine and "
    "sine, x / torch.hypot(x, y) and y / torch.hypot(x, y), or torch.atan(y / x) where x > 0; of complex values, x is "
    "z.real and y is z.imag"
)
_DISTANCES = (
    "two distances from one anchor aren't independent, and there is no rule for both; write it out: "
    "F.relu(F.pairwise_distance(a, p) - F.pairwise_distance(a, n) + margin).mean()"
)
_COSINES = (
    "there is no rule for it; write it out with c = F.cosine_similarity(a, b): "
    "torch.where(target > 0, 1 - c, F.relu(c - margin)).mean()"
)


def _called(names: tuple[str, ...]) -> list[Any]:
    """torch's functions and the methods of these names."""
    return [*names, *(getattr(torch, name) for name in names if hasattr(torch, name))]


_REASONS: dict[Any, str] = {
    **chosen.REASONS,
    **dict.fromkeys(tracing.PACKING, _PACKED),
    **dict.fromkeys(_called(_SHAPED), SHAPE),
    **dict.fromkeys(_called(_PLACES), _PLACE),
    **dict.fromkeys(("item", "tolist", "numpy", operator.index, int, float, bool), _NUMBER),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag, F.embedding, F.embedding_bag, F.one_hot), _WHOLE),
    **dict.fromkeys(_called(("tan", "tan_")), _POLES),
    **dict.fromkeys(_called(("atan2", "atan2_", "arctan2", "arctan2_", "angle")), _ANGLE),
    **dict.fromkeys((F.triplet_margin_loss, nn.TripletMarginLoss, torch.triplet_margin_loss), _DISTANCES),
    **dict.fromkeys((F.cosine_embedding_loss, nn.CosineEmbeddingLoss, torch.cosine_embedding_loss), _COSINES),
}
"""Why an operation without a rule can't have one, where that can be said."""


def reason_for(target: Any) -> str:
    """Why there is no rule for a target; of an aten overload as of torch's function of that name."""
    return next((_REASONS[name] for name in names_of(target) if name in _REASONS), "there is no rule for it")
