"""What an uncertain value can't be: an index, a shape, a whole number. Refused at conversion, with what to write."""

import pytest
import torch
from torch import nn

import adfify
from adfify.errors import UnsupportedOpsError


class Written(nn.Module):
    """A network of one function; ``branching`` on a size, which only torch.export can trace."""

    def __init__(self, function, branching=False):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.function, self.branching = function, branching

    def forward(self, x):
        if self.branching and x.shape[0] > 100:
            return x
        return self.function(self.linear(x))


def taken_by_a_mask(x):
    return x[x > 0].sum()


def selected(x):
    return torch.masked_select(x, x > 0)


def positions(x):
    return x.nonzero()


def taken_by_position(x):
    return x[torch.arange(2), x.argmax(1)]


def as_index(x):
    return x.flip(0).gather(1, x.long())


def as_whole_number(x):
    return x.int() * 2


def as_whole_number_by_dtype(x):
    return x.to(torch.int64) + x


def as_bool(x):
    return torch.where(x.bool(), 1.0, 2.0)


def scaled_where_it_is_negative(x):
    x = x.clone()
    x[x < 0] *= 0.1
    return x


def copied_where_it_is_negative(x):
    x, y = x.clone(), x * 2
    mask = x < 0
    x[mask] = y[mask]
    return x


def chosen_by_two(x):
    return torch.where(x > x.flip(0), x, x.flip(0)) * torch.where(x > x.flip(0), 1.0, x)


def larger(x):
    y = x.flip(0)
    return torch.where(x > y, x, y)


def difference_where_positive(x):
    y = x.flip(0)
    return (x - y) * (x > y)


def filled_by_infinity(x):
    return x.flip(0).masked_fill(x > 0, float("-inf")).softmax(1)


def sum_of_masks(x):
    return ((x > 0) + (x.flip(0) > 1)).float()


SHAPE = "shape of its result is uncertain"
WHOLE = "whole numbers have no variance"
ADVICE = "write what is chosen as one function"
REFUSED = {
    taken_by_a_mask: SHAPE,
    selected: SHAPE,
    positions: SHAPE,
    taken_by_position: "position has no mean and variance",
    as_index: WHOLE,
    as_whole_number: WHOLE,
    as_whole_number_by_dtype: WHOLE,
    as_bool: WHOLE,
    scaled_where_it_is_negative: SHAPE,
    copied_where_it_is_negative: SHAPE,
    chosen_by_two: ADVICE,
    larger: ADVICE,
    difference_where_positive: ADVICE,
    filled_by_infinity: "infinite value",
    sum_of_masks: r"write a \| b",
}


@pytest.mark.parametrize("branching", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("written", REFUSED, ids=lambda f: f.__name__)
def test_it_is_refused_with_the_line_and_what_to_write(written, branching):
    examples = (torch.randn(2, 5),) if branching else ()
    with pytest.raises(UnsupportedOpsError, match=REFUSED[written]) as caught:
        adfify.adfify(Written(written, branching), *examples)
    assert ("aten." in str(caught.value)) is branching, "which engine was it?"
    assert "test_masks.py" in str(caught.value)
