"""Scaled dot-product attention and its multi-head modules; queries, keys and values are taken as independent.

The mean is torch's own operation on the means, and what the variance adds to it: at variance 0 it is the original's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adfify import gaussian
from adfify.moments import Moments, held_in
from adfify.nn.affine import linear
from adfify.nn.module import ADFModule
from adfify.nn.products import parts
from adfify.nn.structural import both, cat
from adfify.precision import wide
from adfify.registry import Certain, Uncertain, case, register

SOURCE = "scores as bilinear forms, the delta method with the moments of the softmax, see gaussian.attention"

# Against Monte Carlo, see gaussian.attention; most where the query alone is uncertain, and its noise is shared.
attention = partial(register, family="arithmetic", source=SOURCE, tolerance=0.5)

# The elements of a projection share their input, which is left out. With torch's own initial weights, input std 0.03 to
# 0.6 and 32 elements of 4 heads, mean is off by 1 to 12 % of the std (root mean square), and std by 11 to 15 %, on
# average 2 to 5 % too small; of 4 elements of 2 heads by up to 1.2.
multi_head = partial(
    register, family="arithmetic", source="projections and attention, composed: see gaussian.attention", tolerance=1.5
)

_MASKED = -(2.0**125)
"""A score that weighs nothing, and that can be computed with, unlike minus infinity."""


def _without_dropout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)


@attention(
    F.scaled_dot_product_attention,
    cases=[
        case(Uncertain((2, 3, 4)), Uncertain((2, 5, 4)), Uncertain((2, 5, 3))),
        case(Uncertain((2, 4, 4)), Uncertain((2, 4, 4)), Uncertain((2, 4, 4)), is_causal=True, scale=0.7),
        case(Uncertain((2, 3, 4)), Certain((2, 5, 4)), Certain((2, 5, 3)), Certain((3, 5))),
        case(Uncertain((1, 4, 3, 4)), Uncertain((1, 2, 5, 4)), Uncertain((1, 2, 5, 3)), enable_gqa=True),
        case(Certain((3, 4)), Certain((5, 4)), Uncertain((5, 3))),
    ],
)
@wide(_without_dropout)
def scaled_dot_product_attention(
    query: Moments | Tensor,
    key: Moments | Tensor,
    value: Moments | Tensor,
    attn_mask: Moments | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Moments:
    """Dropout is off, whatever ``dropout_p``; the mask may be random too (position biases made from the query)."""
    bias = None if attn_mask is None else parts(attn_mask)[0]
    q, k, v = (parts(x)[0] for x in (query, key, value))
    mean = F.scaled_dot_product_attention(q, k, v, bias, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (_each_head_for(query, x) for x in (key, value))
    if is_causal:
        bias = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    _, _, out = _attend(query, key, value, _finite(bias), attn_mask, scale)
    return Moments(mean + out.mean.to(mean.dtype), held_in(out.variance, mean.dtype))


def _attend(
    query: Moments | Tensor,
    key: Moments | Tensor,
    value: Moments | Tensor,
    bias: Tensor | None,
    mask: Moments | Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor | None, Moments]:
    """What the variance adds to the weights, their variance, and the output without the part of certain scores."""
    (q, q_variance), (k, k_variance) = parts(query), parts(key)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mean, variance = gaussian.scores(q, q_variance, k, k_variance, factor, bias)
    if isinstance(mask, Moments):
        variance = mask.variance if variance is None else variance + mask.variance
        variance = variance.expand(mean.shape)
    if bias is not None and variance is not None:
        variance = variance.masked_fill(bias <= _MASKED, 0.0)
    shift, weight_variance, out, spread = gaussian.attend(mean, variance, *parts(value))
    if bias is not None:  # where everything is masked torch returns zeros
        masked = (bias <= _MASKED).all(-1, keepdim=True)
        out, spread = out.masked_fill(masked, 0.0), spread.masked_fill(masked, 0.0)
    return shift, weight_variance, Moments(out, spread)


def _finite(mask: Tensor | None) -> Tensor | None:
    """A mask, True where there is attention or a number to be added, as finite numbers to be added to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, _MASKED)
    return gaussian.widened(mask).clamp(min=_MASKED)


def _each_head_for(query: Moments | Tensor, x: Moments | Tensor) -> Moments | Tensor:
    """Keys or values repeated for the queries that share them."""
    times = query.shape[-3] // x.shape[-3]
    if isinstance(x, Moments):
        return both(torch.repeat_interleave, x, times, -3)
    return torch.repeat_interleave(x, times, -3)


_DROPOUT_P = 10  # its place among the arguments of F.multi_head_attention_forward


def _heads_without_dropout(*args: Any, **kwargs: Any) -> Any:
    if "dropout_p" in kwargs:
        kwargs["dropout_p"] = 0.0
    else:
        args = (*args[:_DROPOUT_P], 0.0, *args[_DROPOUT_P + 1 :])
    return F.multi_head_attention_forward(*args, **kwargs)


@multi_head(
    F.multi_head_attention_forward,
    only={"static_k": None, "static_v": None},
    cases=[
        case(
            Uncertain((3, 2, 4)), Uncertain((5, 2, 4)), Uncertain((5, 2, 4)), 4, 2, Certain((12, 4)), Certain((12,)),
            Certain((1, 1, 4)), Certain((1, 1, 4)), True, 0.1, Certain((4, 4)), None, False,
        ),
        case(
            Uncertain((3, 2, 4)), Uncertain((5, 2, 3)), Uncertain((5, 2, 2)), 4, 2, None, None, None, None, False, 0.0,
            Certain((4, 4)), Certain((4,)), False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=Certain((4, 4)), k_proj_weight=Certain((4, 3)), v_proj_weight=Certain((4, 2)),
        ),
    ],
)  # fmt: skip
@wide(_heads_without_dropout)
def multi_head_attention_forward(
    query: Moments | Tensor, key: Moments | Tensor, value: Moments | Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: None = None,
    static_v: None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Moments, Moments | None]:  # fmt: skip
    """Dropout is off. The elements of the projections are taken as independent, and so are the heads."""
    q_mean, k_mean, v_mean = (parts(x)[0] for x in (query, key, value))
    mean, weights = F.multi_head_attention_forward(
        q_mean, k_mean, v_mean, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
        add_zero_attn, 0.0, out_proj_weight, out_proj_bias, False, key_padding_mask, need_weights,
        attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, None, None,
        average_attn_weights, is_causal,
    )  # fmt: skip
    if use_separate_proj_weight:
        matrices: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        matrices = in_proj_weight.chunk(3)
    biases: Any = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    projections = zip((query, key, value), matrices, biases, (None, bias_k, bias_v), strict=True)
    q, k, v = (_heads(*projection, num_heads) for projection in projections)
    if add_zero_attn:
        k, v = (_either(partial(F.pad, pad=(0, 0, 0, 1)), x) for x in (k, v))
    bias = _merged(attn_mask, key_padding_mask, q.shape, k.shape[-2])
    shift, weight_variance, heads = _attend(q, k, v, bias, None, None)
    out = linear(both(lambda x: x.permute(2, 0, 1, 3).flatten(2), heads), gaussian.widened(out_proj_weight))
    if mean.dim() == 2:
        out = both(torch.squeeze, out, 1)
    result = Moments(mean + out.mean.to(mean.dtype), held_in(out.variance, mean.dtype))
    return result, None if weights is None else _weights(weights, shift, weight_variance, average_attn_weights)


def _heads(
    x: Moments | Tensor, weight: Tensor, bias: Tensor | None, row: Tensor | None, heads: int
) -> Moments | Tensor:
    """``[L, N, E]`` or ``[L, E]`` projected, one more certain row appended if given: ``[N, heads, L, E / heads]``."""
    x = linear(x, weight, bias) if isinstance(x, Moments) else F.linear(x, weight, bias)
    if len(x.shape) == 2:
        x = _either(partial(torch.unsqueeze, dim=1), x)
    if row is not None:
        rows = row.expand(1, x.shape[1], -1)
        x = cat([x, rows]) if isinstance(x, Moments) else torch.cat([x, rows])
    return _either(lambda part: torch.unflatten(part, -1, (heads, -1)).permute(1, 2, 0, 3), x)


def _either(op: Callable[[Tensor], Tensor], x: Moments | Tensor) -> Moments | Tensor:
    """What moves elements, or adds zeros, on a random tensor or a certain one."""
    return both(op, x) if isinstance(x, Moments) else op(x)


def _merged(mask: Tensor | None, padding: Tensor | None, shape: torch.Size, keys: int) -> Tensor | None:
    """Both masks of nn.MultiheadAttention, True where there is *no* attention, as numbers to be added."""
    found = []
    if mask is not None:
        found.append(mask if mask.dim() == 2 else torch.unflatten(mask, 0, (shape[0], shape[1])))
    if padding is not None:
        found.append(padding.reshape(shape[0], 1, 1, -1))
    total: Tensor | None = None
    for part in found:
        finite = _finite(~part if part.dtype == torch.bool else part)
        assert finite is not None
        finite = F.pad(finite, (0, keys - finite.shape[-1]))
        total = finite if total is None else (total + finite).clamp(min=_MASKED)
    return total


def _weights(mean: Tensor, shift: Tensor, variance: Tensor | None, average: bool) -> Moments:
    """The weights as torch returns them: ``mean`` is its own, the rest is ``[N, heads, L, S]``."""
    heads = shift.shape[1]
    variance = torch.zeros_like(shift) if variance is None else variance
    if average:
        shift, variance = shift.mean(1), variance.mean(1) / heads
    return Moments(mean + shift.reshape(mean.shape).to(mean.dtype), held_in(variance.reshape(mean.shape), mean.dtype))


@register(
    NonDynamicallyQuantizableLinear, family="affine", exact=True, source="as Linear",
    cases=[case(Uncertain((3, 5)), init={"in_features": 5, "out_features": 4})],
)  # fmt: skip
class OutProjection(ADFModule, NonDynamicallyQuantizableLinear):
    """The class of nn.MultiheadAttention's last layer, for models that call it themselves."""

    def forward(self, input: Moments) -> Moments:
        return linear(input, self.weight, self.bias)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return "NonDynamicallyQuantizableLinear"


def _self(shape: tuple[int, ...], *args: Any, heads: int = 2, **options: Any) -> Any:
    init = {"embed_dim": 4, "num_heads": heads, **options}
    return case(*[Uncertain(shape)] * 3, *args, init=init)


@multi_head(
    nn.MultiheadAttention,
    cases=[
        _self((3, 2, 4)),
        _self((2, 3, 4), None, False, batch_first=True, bias=False),
        _self((3, 4), None, True, None, False, add_bias_kv=True, add_zero_attn=True),
        case(
            Uncertain((2, 4)), Uncertain((5, 3)), Uncertain((5, 2)), None, False, Certain((2, 5)),
            init={"embed_dim": 4, "num_heads": 2, "kdim": 3, "vdim": 2},
        ),
    ],
)  # fmt: skip
class MultiheadAttention(ADFModule, nn.MultiheadAttention):
    many_inputs = True

    def forward(
        self,
        query: Moments | Tensor,
        key: Moments | Tensor,
        value: Moments | Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Moments, Moments | None]:
        swap = self.batch_first and len(query.shape) == 3
        if swap:  # one tensor given three times stays one, as torch projects it at once
            turned = {id(x): _either(partial(torch.transpose, dim0=0, dim1=1), x) for x in (query, key, value)}
            query, key, value = (turned[id(x)] for x in (query, key, value))
        out, weights = multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, 0.0, self.out_proj.weight, self.out_proj.bias, False, key_padding_mask,
            need_weights, attn_mask, not self._qkv_same_embed_dim, self.q_proj_weight, self.k_proj_weight,
            self.v_proj_weight, None, None, average_attn_weights, is_causal,
        )  # fmt: skip
        return both(torch.transpose, out, 0, 1) if swap else out, weights
