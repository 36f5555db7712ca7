"""Questions for the type of a traced value: answered rightly, or asked of torch.export, which knows the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from adfify import Moments, adfify
from adfify.errors import ModelError


def _tensor(net: Asking, x: Tensor) -> Tensor:
    return net.head(x) if isinstance(x, Tensor) else x


def _is_tensor(net: Asking, x: Tensor) -> Tensor:
    return net.head(x) if torch.is_tensor(x) else x


def _several_kinds(net: Asking, x: Tensor) -> Tensor:
    if not isinstance(
        x,
        (list, torch.Tensor),
    ):
        return x
    return net.head(x)


def _of_a_result(net: Asking, x: Tensor) -> Tensor:
    h = net.recurrent(x.unsqueeze(1))
    if isinstance(h, tuple):
        h = h[0]
    return net.head(h.squeeze(1))


def _of_parts(net: Asking, x: Tensor) -> Tensor:
    h = x.chunk(2, 1)
    return net.head(torch.cat(h, 1)) if isinstance(h, Sequence) else x


QUESTIONS = [_tensor, _is_tensor, _several_kinds, _of_a_result, _of_parts]


class Asking(nn.Module):
    def __init__(self, question: Callable[..., Tensor]) -> None:
        super().__init__()
        self.question, self.head, self.recurrent = question, nn.Linear(4, 3), nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.question(self, x)


@pytest.mark.parametrize("question", QUESTIONS)
def test_torch_export_answers_what_a_symbolic_value_can_not(question: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Asking(question).eval(), torch.randn(2, 4)
    mean = adfify(model, example_inputs=x)(Moments(x, torch.zeros_like(x))).mean
    assert torch.allclose(mean, model(x), atol=1e-6)


@pytest.mark.parametrize("question", QUESTIONS)
def test_without_an_example_the_line_is_named(question: Callable[..., Tensor]) -> None:
    with pytest.raises(ModelError, match=r"(?s)test_type_questions\.py:\d+.*asks for the type.*example_inputs"):
        adfify(Asking(question).eval())


def test_a_tensor_is_no_list_and_no_tuple() -> None:
    class Lenient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, (list, tuple)):
                x = x[0]
            elif isinstance(x, Sequence):
                x = x[1]
            h = self.head(x).relu() + 1
            return h[0] if isinstance(h, list) else h

    model, x = Lenient().eval(), torch.randn(2, 4)
    adf = adfify(model)
    assert torch.equal(adf(Moments(x, torch.zeros_like(x))).mean, model(x))
