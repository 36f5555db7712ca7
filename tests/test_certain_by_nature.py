"""A tensor of which only dtype, shape or device is read stays certain; what no output depends on needs no rule."""

import pytest
import torch
from torch import nn

from adfify import Moments, adfify, graph, inspect, tracing
from adfify.errors import InputError
from adfify.registry import RULES


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.net(x))


FUNCTIONS = {
    "type_as": lambda h: h + torch.arange(4).type_as(h),
    "type_as, looked up": lambda h: h[:, torch.arange(3).flip(0).type_as(torch.arange(h.shape[1]))],
    "expand_as": lambda h: h + torch.arange(4.0).expand_as(h),
    "view_as": lambda h: h + torch.arange(12.0).view_as(h),
    "reshape_as": lambda h: h + torch.arange(12.0).reshape_as(h),
    "to another": lambda h: h + torch.arange(4).to(h),
    "to a dtype": lambda h: h + torch.arange(4).to(h.dtype),
    "to by keyword": lambda h: h + torch.arange(4).to(tensor=h),
    "to a device": lambda h: h + torch.arange(4).to(h.device, h.dtype),
    "new_zeros": lambda h: h + h.new_zeros(4),
    "new_ones": lambda h: h + h.new_ones(h.size(1)),
    "new_full": lambda h: h + h.new_full((4,), 2),
    "new_tensor": lambda h: h + h.new_tensor([1.0, 2.0, 3.0, 4.0]),
    "new_empty": lambda h: h + h.new_empty(4).fill_(3),
    "zeros_like": lambda h: h + torch.zeros_like(h),
    "empty_like": lambda h: h + torch.empty_like(h).zero_(),
    "ones_like, cumulated": lambda h: h + torch.ones_like(h).cumsum(1),
    "size": lambda h: h + torch.arange(h.size(1)),
    "broadcast_to": lambda h: h + torch.arange(4.0).broadcast_to(h.shape),
    "shape": lambda h: h.reshape(h.shape[0], -1) / h.shape[1],
    "dim": lambda h: h.mean(h.dim() - 1),
    "result_type": lambda h: h + torch.arange(4).to(torch.result_type(h, torch.ones(1))),
    "ordering": lambda h: h[:, torch.ones(4).type_as(h).argsort(stable=True)],
    "mask of a position": lambda h: h.masked_fill(torch.arange(4).expand_as(h) > 2, 0.0),
    "embedding of positions": lambda h: h + torch.eye(4)[torch.arange(h.size(1))].sum(0).type_as(h),
}


@pytest.mark.parametrize("engine", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_only_describes_leaves_the_other_certain(name, engine):
    model, x = Net(FUNCTIONS[name]).eval(), torch.randn(3, 4)
    if engine == "torch.fx":
        adf = adfify(model, example_inputs=x)
    else:
        traced = tracing.exported(model, (x,), {}, RULES)
        assert traced is not None
        adf = graph.apply(graph.plan(traced, RULES), 1e-3, 0.0, False)
    with torch.no_grad():
        out = adf(Moments(x, torch.zeros_like(x)))
        torch.testing.assert_close(out.mean, model(x))
        assert out.variance.abs().max() == 0
        if name in ("type_as", "expand_as", "to another", "new_ones"):
            alone = adfify(Net(lambda h: h)).eval()(Moments(x, torch.ones_like(x)))
            torch.testing.assert_close(adf(Moments(x, torch.ones_like(x))).variance, alone.variance)
            torch.testing.assert_close(adf.joint(x, outputs="all").mean, out.mean, rtol=0, atol=0.1)


def test_an_uncertain_one_stays_uncertain():
    adf, x = adfify(Net(lambda h: h.type_as(torch.ones(1)).expand_as(h))), torch.randn(3, 4)
    assert adf(x).variance.min() > 0


class Monitored(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        y = self.net(x)
        self.confident = (y > 0).float().mean()
        torch.linalg.svdvals(y)
        return y


@pytest.mark.parametrize("example", [None, torch.randn(3, 4)], ids=["torch.fx", "inputs"])
def test_what_nothing_reads_is_unused_and_left_out(example):
    plan = inspect(Monitored().eval(), example)
    unused = {record["op"] for record in plan.records() if record["action"] == "unused"}
    assert "torch.linalg.svdvals" in unused and not plan.missing
    adf = adfify(Monitored().eval(), example)
    assert "svd" not in adf.code and not hasattr(adf, "confident")


def test_an_assertion_is_kept():
    class Checked(nn.Module):
        def forward(self, x):
            torch._assert(x.shape[1] == 4, "four columns, please")
            return x * 2

    adf = adfify(Checked())
    assert adf(torch.randn(3, 4)).mean.shape == (3, 4)
    with pytest.raises(InputError, match="four columns"):
        adf(torch.randn(3, 5))
