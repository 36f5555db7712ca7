"""Comparisons and steps of uncertain values are refused when the model is converted, with what to write instead."""

import pytest
import torch
from torch import nn

import adfify
from adfify.errors import UnsupportedOpsError


class Written(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.activation = activation

    def forward(self, x):
        return self.activation(self.linear(x))


def relu_by_a_mask(x):
    return x * (x > 0)


def relu_by_where(x):
    return torch.where(x.gt(0), x, 0.1 * x)


def filled(x):
    return x.masked_fill(torch.lt(x, 0), 0.0)


def written_into(x):
    y = x.clone()
    y[y < 0] = 0
    return y


def safe_division(x):
    return torch.where(x == 0, 0, 1 / x)


def signed(x):
    return x * torch.sign(x)


def rounded(x):
    return x - x.floor()


CHOOSING = [relu_by_a_mask, relu_by_where, filled, written_into, safe_division, signed, rounded]


@pytest.mark.parametrize("examples", [(), (torch.ones(2, 5),)], ids=["fx", "export"])
@pytest.mark.parametrize("written", CHOOSING, ids=lambda f: f.__name__)
def test_a_jump_is_refused_and_what_to_write_is_said(written, examples):
    with pytest.raises(UnsupportedOpsError, match=r"its result jumps.*torch\.relu") as caught:
        adfify.adfify(Written(written), *examples)
    assert "test_masks.py" in str(caught.value)
