"""One step of an LSTM, a GRU or a plain recurrent network: see recurrent.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adfify.moments import Moments, lift
from adfify.nn import recurrent_steps as steps
from adfify.nn.module import ADFModule
from adfify.nn.products import parts
from adfify.nn.recurrent import recurrent
from adfify.nn.structural import both
from adfify.registry import Certain, Uncertain, case


def _cell(
    original: Callable[..., Any],
    step: steps.Step,
    input: Moments | Tensor,
    states: Sequence[Moments | Tensor],
    weights: Sequence[Any],
) -> tuple[Moments, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    means = [parts(x)[0] for x in (input, *states)]
    exact = original(means[0], means[1:] if len(states) > 1 else means[1], *weights)
    x, *start = (lift(value) for value in (input, *states))
    results = []
    for value, state in ((x, tuple(start)), (x.mean, tuple(s.mean for s in start))):
        results.append(step(steps.linear_map(value, w_ih, b_ih), state, (w_hh, b_hh, None)))
    return steps.corrected(exact if len(states) > 1 else [exact], *results)


def _cases(gates: int, certain: Any, uncertain: Any) -> Any:
    weights = [Certain((2 * gates, 3)), Certain((2 * gates, 2)), Certain((2 * gates,)), Certain((2 * gates,))]
    return [case(Uncertain((4, 3)), certain, *weights), case(Certain((4, 3)), uncertain, *weights[:2])]


@recurrent(torch.lstm_cell, cases=_cases(4, [Certain((4, 2)), Certain((4, 2))], [Certain((4, 2)), Uncertain((4, 2))]))
def lstm_cell(
    input: Moments | Tensor,
    hx: Sequence[Moments | Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Moments, ...]:
    return _cell(torch.lstm_cell, steps.lstm_step, input, hx, (w_ih, w_hh, b_ih, b_hh))


@recurrent(torch.gru_cell, cases=_cases(3, Certain((4, 2)), Uncertain((4, 2))))
def gru_cell(
    input: Moments | Tensor,
    hx: Moments | Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Moments:
    return _cell(torch.gru_cell, steps.gru_step, input, [hx], (w_ih, w_hh, b_ih, b_hh))[0]


@recurrent(torch.rnn_tanh_cell, cases=_cases(1, Certain((4, 2)), Uncertain((4, 2))))
def rnn_tanh_cell(
    input: Moments | Tensor,
    hx: Moments | Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Moments:
    return _cell(torch.rnn_tanh_cell, steps.rnn_step, input, [hx], (w_ih, w_hh, b_ih, b_hh))[0]


@recurrent(torch.rnn_relu_cell, cases=_cases(1, Certain((4, 2)), Uncertain((4, 2))))
def rnn_relu_cell(
    input: Moments | Tensor,
    hx: Moments | Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Moments:
    return _cell(torch.rnn_relu_cell, steps.rnn_relu_step, input, [hx], (w_ih, w_hh, b_ih, b_hh))[0]


class _Cell(ADFModule):
    """What the three cells share: an input of one or two dimensions, and a state, zero where none is given."""

    many_inputs = True

    def _call(self, rule: Callable[..., Any], input: Moments | Tensor, hx: Sequence[Moments | Tensor] | None) -> Any:
        module: Any = self
        batched = len(input.shape) == 2
        x = input if batched else steps.unsqueezed(input, 0)
        count = 2 if rule is lstm_cell else 1
        if hx is None:
            hx = [parts(x)[0].new_zeros(x.shape[0], module.hidden_size)] * count
        elif not batched:
            hx = [steps.unsqueezed(part, 0) for part in hx]
        weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        final = rule(x, hx if count > 1 else hx[0], *weights)
        if batched:
            return final
        return tuple(both(torch.squeeze, part, 0) for part in final) if count > 1 else both(torch.squeeze, final, 0)


_INIT = {"input_size": 3, "hidden_size": 2}


@recurrent(
    nn.LSTMCell,
    cases=[
        case(Uncertain((4, 3)), init=_INIT),
        case(Uncertain((3,)), (Uncertain((2,)), Uncertain((2,))), init={**_INIT, "bias": False}),
    ],
)
class LSTMCell(_Cell, nn.LSTMCell):
    def forward(
        self, input: Moments | Tensor, hx: tuple[Moments | Tensor, Moments | Tensor] | None = None
    ) -> tuple[Moments, Moments]:
        result: tuple[Moments, Moments] = self._call(lstm_cell, input, hx)
        return result


@recurrent(
    nn.GRUCell,
    cases=[
        case(Uncertain((4, 3)), init=_INIT),
        case(Uncertain((3,)), Certain((2,)), init={**_INIT, "bias": False}),
    ],
)
class GRUCell(_Cell, nn.GRUCell):
    def forward(self, input: Moments | Tensor, hx: Moments | Tensor | None = None) -> Moments:
        result: Moments = self._call(gru_cell, input, None if hx is None else [hx])
        return result


@recurrent(
    nn.RNNCell,
    cases=[
        case(Uncertain((4, 3)), init=_INIT),
        case(Uncertain((3,)), Certain((2,)), init={**_INIT, "nonlinearity": "relu"}),
    ],
)
class RNNCell(_Cell, nn.RNNCell):
    def forward(self, input: Moments | Tensor, hx: Moments | Tensor | None = None) -> Moments:
        rule = rnn_relu_cell if self.nonlinearity == "relu" else rnn_tanh_cell
        result: Moments = self._call(rule, input, None if hx is None else [hx])
        return result
