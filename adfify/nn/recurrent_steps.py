"""The steps of LSTM, GRU and plain recurrent networks, and the loop over time, for recurrent.py and recurrent_cells.py.

Gates, states and inputs are taken as independent of each other. The mean is torch's own fused operation on the means,
and what the variance adds to it: the loop with the variance less the same loop without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adfify import gaussian
from adfify.errors import InputError
from adfify.moments import Moments, lift
from adfify.nn import arithmetic, structural
from adfify.nn.affine import linear
from adfify.nn.products import parts
from adfify.nn.structural import both

Value = Moments | Tensor  # not in the signature of a rule: what a rule takes is read from there
State = tuple[Any, ...]
Weights = tuple[Tensor, Tensor | None, Tensor | None]
Step = Callable[[Any, State, Weights], State]

# The steps, on Moments or on plain tensors alike


def linear_map(x: Value, weight: Tensor, bias: Tensor | None) -> Any:
    return linear(x, weight, bias) if isinstance(x, Moments) else F.linear(x, weight, bias)


def _sigmoid(x: Value) -> Any:
    return Moments(*gaussian.sigmoid(*x)) if isinstance(x, Moments) else torch.sigmoid(x)


def _tanh(x: Value) -> Any:
    return Moments(*gaussian.tanh(*x)) if isinstance(x, Moments) else torch.tanh(x)


def _relu(x: Value) -> Any:
    return Moments(*gaussian.relu(*x)) if isinstance(x, Moments) else torch.relu(x)


def _add(a: Any, b: Any) -> Any:
    return arithmetic.add(a, b) if isinstance(a, Moments) else a + b


def _times(a: Any, b: Any) -> Any:
    return arithmetic.mul(a, b) if isinstance(a, Moments) else a * b


def _parts(x: Value, count: int) -> Any:
    return structural.chunk(x, count, -1) if isinstance(x, Moments) else x.chunk(count, -1)


def _joined(values: Sequence[Any]) -> Any:
    return structural.cat(values, -1) if isinstance(values[0], Moments) else torch.cat(list(values), -1)


def _affine(x: Value, scale: float, shift: float) -> Any:
    return Moments(x.mean * scale + shift, x.variance * scale**2) if isinstance(x, Moments) else x * scale + shift


def _between(new: Any, old: Any, share: Any) -> Any:
    """new + share (old - new), in which each of the three has its own variance."""
    if not isinstance(new, Moments):
        return new + share * (old - new)
    (n, n_variance), (h, h_variance), (z, z_variance) = new, old, share
    variance = n_variance * ((1 - z).square() + z_variance) + h_variance * (z.square() + z_variance)
    return Moments(n + z * (h - n), variance + z_variance * (h - n).square())


# Note [Gates in one quadrature]
# Nearly all the time of a step goes into the moments of its activations, and more by their number than their size. So
# those that are ready at the same time are taken together, and g with them, as tanh(g) = 2 sigmoid(2 g) - 1.


def lstm_step(gates: Any, state: State, weights: Weights) -> State:
    (h, c), (weight, bias, projection) = state, weights
    i, f, g, o = _parts(_add(gates, linear_map(h, weight, bias)), 4)
    i, f, g, o = _parts(_sigmoid(_joined([i, f, _affine(g, 2, 0), o])), 4)
    c = _add(_times(f, c), _times(i, _affine(g, 2, -1)))
    h = _times(o, _tanh(c))
    return (h if projection is None else linear_map(h, projection, None)), c


def gru_step(gates: Any, state: State, weights: Weights) -> State:
    (h,), (weight, bias, _) = state, weights
    (r, z, n), (hr, hz, hn) = _parts(gates, 3), _parts(linear_map(h, weight, bias), 3)
    r, z = _parts(_sigmoid(_joined([_add(r, hr), _add(z, hz)])), 2)
    return (_between(_tanh(_add(n, _times(r, hn))), h, z),)


def rnn_step(gates: Any, state: State, weights: Weights, nonlinearity: Callable[[Value], Any] = _tanh) -> State:
    (h,), (weight, bias, _) = state, weights
    return (nonlinearity(_add(gates, linear_map(h, weight, bias))),)


rnn_relu_step = partial(rnn_step, nonlinearity=_relu)

# The loop


def _run(step: Step, x: Any, states: Sequence[Any], layers: Sequence[Sequence[Any]], directions: int) -> list[Any]:
    """``[T, N, F]`` through all layers: the outputs and the final states; Moments or tensors, all alike.

    Args:
        step: one step of a layer.
        x: the sequence.
        states: ``[layers * directions, N, H]`` each.
        layers: for every layer and direction its weights, see `_layers`.
        directions: 1, or 2 where every second layer runs backwards, beside the one before.
    """
    whole, pick = (
        (structural.stack, structural.getitem) if isinstance(x, Moments) else (torch.stack, Tensor.__getitem__)
    )
    join: Any = structural.cat if isinstance(x, Moments) else torch.cat
    finals = []
    for first in range(0, len(layers), directions):
        sides = []
        for index in range(first, first + directions):
            (w_ih, w_hh, b_ih, b_hh, w_hr), backwards = layers[index], index > first
            gates = linear_map(x, w_ih, b_ih)
            state = tuple(pick(s, index) for s in states)
            times = range(x.shape[0])
            outputs = []
            for t in reversed(times) if backwards else times:
                state = step(pick(gates, t), state, (w_hh, b_hh, w_hr))
                outputs.append(state[0])
            sides.append(whole(outputs[::-1] if backwards else outputs))
            finals.append(state)
        x = sides[0] if directions == 1 else join(sides, -1)
    return [x, *(whole(list(part)) for part in zip(*finals, strict=True))]


def _layers(params: Sequence[Tensor], biases: bool, count: int) -> Iterator[tuple[Tensor | None, ...]]:
    """w_ih, w_hh, b_ih, b_hh, w_hr of every layer and direction, None for those that there are not."""
    each = len(params) // count
    for start in range(0, len(params), each):
        weights: list[Any] = list(params[start : start + each])
        yield tuple([*weights[:2], *(weights[2:4] if biases else (None, None)), *(weights[2 + 2 * biases :] or [None])])


def sequence(
    original: Callable[..., Any],
    step: Step,
    input: Value,
    states: Sequence[Value],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Moments, ...]:
    directions = 2 if bidirectional else 1
    layers = list(_layers(params, has_biases, num_layers * directions))
    means = [parts(x)[0] for x in (input, *states)]
    _check_states(means[0], means[1:], layers, batch_first)
    hx = means[1:] if step is lstm_step else means[1]
    exact = original(means[0], hx, params, has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    x, *starts = (lift(value) for value in (input, *states))
    x = both(torch.transpose, x, 0, 1) if batch_first else x
    moments = _run(step, x, starts, layers, directions)
    certain = _run(step, x.mean, [s.mean for s in starts], layers, directions)
    if batch_first:
        moments[0], certain[0] = both(torch.transpose, moments[0], 0, 1), certain[0].transpose(0, 1)
    return corrected(exact, moments, certain)


def _check_states(x: Tensor, states: Sequence[Tensor], layers: Sequence[Any], batch_first: bool) -> None:
    """Raise InputError for a state of other sizes than the input asks for.

    torch's modules look at them, and its kernels do not: they write where they should not.
    """
    if torch.compiler.is_compiling():
        return
    _, w_hh, *_ = layers[0]
    hidden = w_hh.shape[0] // 4 if len(states) == 2 else w_hh.shape[1]
    for name, state, size in zip(("h", "c"), states, (w_hh.shape[1], hidden), strict=False):
        wanted = (len(layers), x.shape[0 if batch_first else 1], size)
        if tuple(state.shape) != wanted:
            raise InputError(
                f"the recurrent state {name} has shape {tuple(state.shape)}, and an input of shape {tuple(x.shape)} "
                f"needs {wanted}: layers and directions, examples, features."
            )


def corrected(exact: Sequence[Tensor], moments: Sequence[Moments], certain: Sequence[Tensor]) -> tuple[Moments, ...]:
    triples = zip(exact, moments, certain, strict=True)
    return tuple(Moments(mean + (m.mean - plain), m.variance) for mean, m, plain in triples)


def unsqueezed(x: Value, dim: int) -> Value:
    return both(torch.unsqueeze, x, dim) if isinstance(x, Moments) else x.unsqueeze(dim)
